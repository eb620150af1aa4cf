"""The plan: what `plan()` returns, people read and `parallelize` applies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from .edits import CallEdit, ParameterEdit
from .graph import numel
from .lowering import Collective
from .sites import Site


@dataclass(frozen=True)
class PlannedCost:
    """Predicted seconds of one step on one rank.

    Attributes:
        total_s: ``compute_s + comm_s``.
        compute_s: Operators.
        comm_s: Collectives and local moves.
        lower_bound_s: No plan in the stated space is faster; what the solver returned, in the same terms as
            ``total_s``.
        proven: The bound equals the cost, to the picosecond.
        forward_comm_s: Of ``comm_s``, in the forward pass.
        backward_comm_s: Collectives of the backward pass, predicted also where the workload has none.
    """

    total_s: float
    compute_s: float
    comm_s: float
    lower_bound_s: float
    proven: bool
    forward_comm_s: float = 0.0
    backward_comm_s: float = 0.0


@dataclass(frozen=True)
class PlannedParameter:
    """One parameter's layout.

    Attributes:
        edit: How it is stored and read.
        placement: column, row, vocab, expert or replicated.
        shape: Global shape.
        dtype: Its dtype's name.
        is_weight: A product or an embedding reads it.
    """

    edit: ParameterEdit
    placement: str
    shape: tuple[int, ...]
    dtype: str
    is_weight: bool

    @property
    def is_whole(self) -> bool:
        """Every rank stores all of it."""
        layout = self.edit.layout
        return layout is None or layout.is_replicated or layout.local >= layout.size

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Its shape on every rank, padding included."""
        if self.edit.dim is None or self.edit.layout is None:
            return self.shape
        return tuple(self.edit.layout.local if d == self.edit.dim else n for d, n in enumerate(self.shape))


@dataclass(frozen=True)
class Workload:
    """What a plan was made for: a phase and the inputs' names, dtypes and shapes.

    Attributes:
        name: Its name.
        phase: prefill, decode or train.
        inputs: ``(path, dtype name, shape)`` of every tensor input; positional ones are named by number.
        values: Plain (non-tensor) keyword inputs.
        context: Tokens already in the cache.
    """

    name: str
    phase: str
    inputs: tuple[tuple[str, str, tuple[int, ...]], ...]
    values: tuple[tuple[str, Any], ...] = ()
    context: int = 0


@dataclass(frozen=True)
class Plan:
    """A weight layout, the edits that realise it, and what they cost.

    Attributes:
        name: The model's class.
        tp: Ranks.
        hardware: Profile name.
        workloads: What it was made for.
        options: Options that shaped it.
        parameters: All parameters, ties under every name.
        ties: Alias -> name.
        calls: Edits of call expressions.
        inputs: Floating inputs whose gradient would be partial on each rank.
        outputs: Paths of returned values whose gradient is partial on each rank.
        collectives: Of one step, in order.
        unsplit: ``(fqn, bytes, reason)`` of every weight left whole.
        findings: What the user should know.
        assumptions: What the trace assumed.
        cost: Predicted time.
        memory_bytes: Per rank, by kind.
    """

    name: str
    tp: int
    hardware: str
    workloads: tuple[Workload, ...]
    options: Mapping[str, Any]
    parameters: tuple[PlannedParameter, ...]
    ties: Mapping[str, str]
    calls: Mapping[Site, CallEdit]
    inputs: tuple[str, ...]
    collectives: tuple[Collective, ...]
    unsplit: tuple[tuple[str, int, str], ...]
    findings: tuple[str, ...]
    assumptions: Mapping[str, str]
    cost: PlannedCost
    memory_bytes: Mapping[str, int]
    outputs: tuple[str, ...] = ()
    statistics: Mapping[str, int] = field(default_factory=dict, compare=False)

    @cached_property
    def layers(self) -> Mapping[str, str]:
        """Parameter fqn -> placement; a weight also under its module's path."""
        return _Layers({p.edit.fqn: p.placement for p in self.parameters})

    def count(
        self, kind: str, direction: str | None = None, workload: str | None = None, category: str | None = "block"
    ) -> int:
        """Collectives of a kind; None leaves a property open."""
        return sum(
            c.kind == kind
            and direction in (None, c.direction)
            and workload in (None, c.workload)
            and category in (None, c.category)
            for c in self.collectives
        )

    @property
    def sharded_fraction(self) -> float:
        """Share of matmul, embedding and expert bytes that no rank holds whole."""
        weights = [p for p in self.parameters if p.is_weight and p.edit.fqn not in self.ties]
        total = sum(numel(p.shape) for p in weights)
        split = sum(numel(p.shape) for p in weights if not p.is_whole)
        return split / total if total else 1.0

    @property
    def digest(self) -> str:
        """SHA-256 of the plan's content."""
        from .plan_file import digest_of

        return digest_of(self)

    def save(self, path: str | Path) -> None:
        """Writes the plan as versioned JSON; the same plan gives the same bytes."""
        from .plan_file import dumps

        Path(path).write_text(dumps(self), encoding="utf-8")

    @staticmethod
    def load(path: str | Path) -> Plan:
        """Reads a plan back.

        Raises:
            PlanFileError: The file is missing, truncated, edited or of another version.
        """
        from .plan_file import read

        return read(Path(path))


class _Layers(dict[str, str]):
    """Placements by parameter path, ``.weight`` optional."""

    def __missing__(self, name: str) -> str:
        if f"{name}.weight" in self:
            return self[f"{name}.weight"]
        raise KeyError(name)

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or super().__contains__(f"{name}.weight")
