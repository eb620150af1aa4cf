"""Plans of one model over tensor-parallel sizes, machines, link speeds, batches and lengths: what `sweep` compares.

A model is traced once per batch and length, and solved once per machine, link speed and tp. Where no plan fits the
memory, the plan that would be made with enough of it is reported, as one that does not fit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from colrow.cost_models.errors import HardwareError, Infeasible, MemoryCapError
from colrow.cost_models.hardware import Hardware
from colrow.cost_models.link_speed import with_link_speed
from colrow.cost_models.routes import Prediction
from colrow.planner.expressions import can_edit
from colrow.planner.graph import Graph, numel
from colrow.planner.plan_model import Plan
from colrow.planner.planned_collectives import Collective
from colrow.planner.planning import plan_graph
from colrow.planner.pricing import Phase
from colrow.planner.recomputation import check_checkpointing
from colrow.planner.site_settings import Options
from colrow.planner.sources import Source, load_source
from colrow.planner.suitability import refuse_unsuitable
from colrow.planner.trace import trace
from colrow.planner.workloads import Workload, workload_of

ENOUGH_GB = 1e9
BULK_BYTES = 2**30  # of a message whose time is its bytes'


@dataclass(frozen=True)
class Axes:
    """What is varied; every combination is planned.

    Attributes:
        tp: Ranks.
        batch: Sequences per step.
        seq: Tokens per sequence; in decode, tokens in the KV cache.
        hardware: Profiles.
        link_speed: Multiples of each profile's link bandwidth.
    """

    tp: tuple[int, ...]
    batch: tuple[int, ...]
    seq: tuple[int, ...]
    hardware: tuple[Hardware, ...]
    link_speed: tuple[float, ...] = (1.0,)


@dataclass(frozen=True)
class Setting:
    """One combination of the axes."""

    hardware: str
    link_speed: float
    batch: int
    seq: int
    tp: int


@dataclass(frozen=True)
class Basis:
    """What a predicted communication time rests on.

    Attributes:
        rel_error: Time-weighted mean of the profile's own errors (each measured size predicted from the others); None
            where no collective is between measured sizes.
        unmeasured: Share of the communication time that is not between measured sizes of this very group.
        findings: What it is instead, largest share first.
    """

    rel_error: float | None
    unmeasured: float
    findings: tuple[str, ...]


@dataclass(frozen=True)
class Point:
    """One plan of the sweep.

    Attributes:
        setting: What it was made for.
        plan: None where none exists at this size.
        refusal: Why there is none, else "".
        fits: Within the memory.
        tokens: Tokens per step.
        empty_s: Seconds that collectives of no bytes would take: latency alone.
        transfer_s: Seconds that their bytes add.
        bulk_s: Seconds their bytes would take at the rate of very large messages: what the link alone asks for.
        moves_s: Seconds of local moves (slices and the like); all but ``bulk_s`` sum to the plan's ``comm_s``.
        basis: What the communication time rests on.
        two_nodes_s: Step time were the same ranks spread over two nodes; None where the profile cannot tell.
        two_nodes_measured: Whether that is between measured sizes of groups so spread.
    """

    setting: Setting
    plan: Plan | None
    refusal: str = ""
    fits: bool = False
    tokens: int = 0
    empty_s: float = 0.0
    transfer_s: float = 0.0
    bulk_s: float = 0.0
    moves_s: float = 0.0
    basis: Basis = Basis(None, 0.0, ())
    two_nodes_s: float | None = None
    two_nodes_measured: bool = False

    @property
    def step_s(self) -> float:
        """Predicted seconds of a step."""
        assert self.plan is not None
        return self.plan.cost.total_s

    @property
    def compute_s(self) -> float:
        """Of that, in operators."""
        assert self.plan is not None
        return self.plan.cost.compute_s

    @property
    def comm_s(self) -> float:
        """Of that, communicating."""
        assert self.plan is not None
        return self.plan.cost.comm_s

    @property
    def ratio(self) -> float:
        """R = T_comm / T_comp."""
        return self.comm_s / self.compute_s if self.compute_s else 0.0

    @property
    def memory_bytes(self) -> int:
        """On one rank."""
        assert self.plan is not None
        return sum(self.plan.memory_bytes.values())

    @property
    def link_speed_of_one(self) -> float | None:
        """Multiple of the link's bandwidth at which this plan's R is one; None where latency alone is above it, or
        no bytes are sent."""
        left = self.compute_s - self.empty_s - self.moves_s
        return self.setting.link_speed * self.transfer_s / left if left > 0 and self.transfer_s > 0 else None


def sweep_points(
    source: str,
    phase: Literal["prefill", "decode", "train"],
    dtype: str,
    axes: Axes,
    sequence_parallel: bool | Literal["auto"] = False,
    memory_gb: float | None = None,
    checkpointing: Literal["none", "blocks"] = "none",
    said: Callable[[str], None] = lambda text: None,
) -> Iterator[Point]:
    """Every combination, tp varying fastest.

    Args:
        source: A SOURCE; a factory's inputs are its own, so its batch and length do not vary.
        phase: What a step is.
        dtype: Of the weights.
        axes: What is varied.
        sequence_parallel: As `planner.plan` takes it.
        memory_gb: Cap per rank; None: each profile's.
        checkpointing: As `planner.plan` takes it.
        said: Is told what is being done.

    Raises:
        SourceError: The source cannot be read.
        TraceError: It cannot be traced.
    """
    check_checkpointing(checkpointing, (phase,), sequence_parallel)
    options = Options(sequence_parallel=sequence_parallel, checkpointing=checkpointing, editable=can_edit)
    for batch in axes.batch:
        for seq in axes.seq:
            said(f"Tracing {source}, batch {batch}, {seq} tokens")
            loaded = load_source(source, phase=phase, batch=batch, seq=seq, dtype=dtype)
            refuse_unsuitable(loaded.model)
            workload = workload_of(phase, loaded.example_inputs, loaded.context)
            graph, name = trace(loaded.model, loaded.example_inputs), type(loaded.model).__name__
            for hardware in axes.hardware:
                for speed in axes.link_speed:
                    linked = with_link_speed(hardware, speed)
                    for tp in axes.tp:
                        said(f"Planning for {tp} ranks of {linked.name}, batch {batch}, {seq} tokens")
                        setting = Setting(hardware.name, speed, batch, _length(loaded, phase, workload, seq), tp)
                        yield point_of(setting, graph, name, linked, workload, options, memory_gb)


def point_of(
    setting: Setting,
    graph: Graph,
    name: str,
    hardware: Hardware,
    workload: Workload,
    options: Options,
    memory_gb: float | None,
) -> Point:
    """One combination, planned."""
    try:
        try:
            plan, fits = plan_graph(graph, name, setting.tp, hardware, workload, options, memory_gb), True
        except MemoryCapError:
            plan = plan_graph(graph, name, setting.tp, hardware, workload, options, ENOUGH_GB)
            # The planner sets room aside before it knows what a plan takes; this one may take less.
            fits = sum(plan.memory_bytes.values()) <= (memory_gb or hardware.memory_gb) * 1e9
    except (Infeasible, HardwareError) as error:
        return Point(setting, None, str(error))
    made = Counter((c.kind, c.nbytes) for c in collectives_made(plan))
    known = [(hardware.predict(kind, nbytes, plan.tp), count) for (kind, nbytes), count in made.items()]
    empty_s = sum(count * prediction.empty_s for prediction, count in known)
    transfer_s = sum(count * prediction.transfer_s for prediction, count in known)
    bulk_s = sum(
        count * nbytes * hardware.collective_s(kind, BULK_BYTES, plan.tp) / BULK_BYTES
        for (kind, nbytes), count in made.items()
    )
    return Point(
        setting,
        plan,
        "",
        fits,
        tokens_of(workload),
        empty_s,
        transfer_s,
        min(bulk_s, transfer_s),
        max(0.0, plan.cost.comm_s - empty_s - transfer_s),
        _basis(known),
        *_over_two_nodes(plan, hardware, made, empty_s + transfer_s),
    )


def collectives_made(plan: Plan) -> list[Collective]:
    """Of one step: all where it trains, else those of the forward pass."""
    training = {workload.name for workload in plan.workloads if workload.phase == "train"}
    return [c for c in plan.collectives if c.direction == "forward" or c.workload in training]


def tokens_of(workload: Workload) -> int:
    """Of one step: the ids of the first input that looks like token ids, else the first dim of the first input."""
    ids = [shape for _, dtype, shape in workload.inputs if len(shape) == 2 and dtype.startswith("int")]
    shaped = [shape for _, _, shape in workload.inputs if shape]
    return numel(ids[0]) if ids else shaped[0][0] if shaped else 1


def _length(loaded: Source, phase: Phase, workload: Workload, asked: int) -> int:
    """Tokens per sequence as they are: a model may have fewer positions than were asked for."""
    if phase == "decode":
        return loaded.context
    ids = [shape for _, dtype, shape in workload.inputs if len(shape) == 2 and dtype.startswith("int")]
    return ids[0][1] if ids else asked


def _basis(known: Sequence[tuple[Prediction, int]]) -> Basis:
    whole = sum(count * prediction.seconds for prediction, count in known)
    if not whole:
        return Basis(None, 0.0, ())
    inside = [(p.rel_error, count * p.seconds) for p, count in known if not p.finding and p.rel_error is not None]
    beside: Counter[str] = Counter()
    for prediction, count in known:
        if prediction.finding:
            beside[prediction.finding] += round(count * prediction.seconds * 1e12)
    measured = sum(seconds for _, seconds in inside)
    error = sum(error * seconds for error, seconds in inside) / measured if measured else None
    return Basis(error, sum(beside.values()) * 1e-12 / whole, tuple(text for text, _ in beside.most_common()))


def _over_two_nodes(
    plan: Plan, hardware: Hardware, made: Counter[tuple[str, int]], within_s: float
) -> tuple[float | None, bool]:
    """The same plan with half of its ranks on another node, its collectives priced again; and whether those prices are
    measured."""
    if hardware.inter_node is None or plan.tp % 2 or plan.tp > hardware.ranks_per_node:
        return None, False
    across = [(hardware.predict(kind, size, plan.tp, nodes=2), count) for (kind, size), count in made.items()]
    across_s = sum(count * prediction.seconds for prediction, count in across)
    return plan.cost.total_s - within_s + across_s, not any(prediction.finding for prediction, _ in across)


def without_repeats(axes: Axes) -> Axes:
    """Every value once, ascending; machines in the order they were given."""
    named = {profile.name: profile for profile in axes.hardware}
    ordered = {name: tuple(sorted(set(getattr(axes, name)))) for name in ("tp", "batch", "seq", "link_speed")}
    return replace(axes, hardware=tuple(named.values()), **ordered)
