"""The plan: what `plan()` returns, people read and `parallelize` applies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from .edits import ForwardEdits, ParameterEdit
from .graph import numel
from .planned_collectives import Collective
from .workloads import Length, Workload


@dataclass(frozen=True)
class PlannedCost:
    """Predicted seconds of one step on one rank.

    Attributes:
        total_s: ``compute_s + comm_s``.
        compute_s: Operators, and in training the optimiser's step.
        comm_s: Collectives and local moves.
        lower_bound_s: No plan in the stated space is faster; what the solver returned, in the same terms as
            ``total_s``.
        proven: The bound equals the cost, to the picosecond.
        forward_comm_s: Of ``comm_s``, in the forward pass.
        backward_comm_s: Collectives of the backward pass, predicted also where the workload has none.
        optimizer_s: Of ``compute_s``, in AdamW's step: memory traffic of the rank's parameters, gradients and moments.
    """

    total_s: float
    compute_s: float
    comm_s: float
    lower_bound_s: float
    proven: bool
    forward_comm_s: float = 0.0
    backward_comm_s: float = 0.0
    optimizer_s: float = 0.0


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
class Schedule:
    """What one workload's forward does over the plan's layout.

    Attributes:
        workload: What it was planned for.
        edits: What the forward does.
        collectives: Of one step, in order.
        cost: Predicted time of the workload.
        lengths: What it asks of the inputs of a call; where they are not so, the schedule that stands in runs.
        stands_in: For the schedule of this workload that splits the sequence.
    """

    workload: Workload
    edits: ForwardEdits
    collectives: tuple[Collective, ...]
    cost: PlannedCost
    lengths: tuple[Length, ...] = ()
    stands_in: bool = False


@dataclass(frozen=True)
class Plan:
    """A weight layout, a schedule of moves per workload, and what they cost.

    Attributes:
        name: The model's class.
        tp: Ranks.
        hardware: Profile name.
        options: Options that shaped it.
        parameters: All parameters, ties under every name.
        ties: Alias -> name.
        schedules: One per workload, the first one's first; after one that splits the sequence, the one that stands in.
        unsplit: ``(fqn, bytes, reason)`` of every weight left whole.
        findings: What the user should know.
        assumptions: What the trace assumed.
        cost: Predicted time; of several workloads, their weighted sum.
        memory_bytes: Per rank, by kind; of the workload that needs most.
    """

    name: str
    tp: int
    hardware: str
    options: Mapping[str, Any]
    parameters: tuple[PlannedParameter, ...]
    ties: Mapping[str, str]
    schedules: tuple[Schedule, ...]
    unsplit: tuple[tuple[str, int, str], ...]
    findings: tuple[str, ...]
    assumptions: Mapping[str, str]
    cost: PlannedCost
    memory_bytes: Mapping[str, int]
    statistics: Mapping[str, int] = field(default_factory=dict, compare=False)

    @property
    def planned(self) -> tuple[Schedule, ...]:
        """The workloads' own schedules, without those that stand in."""
        return tuple(schedule for schedule in self.schedules if not schedule.stands_in)

    @property
    def workloads(self) -> tuple[Workload, ...]:
        """What it was made for."""
        return tuple(schedule.workload for schedule in self.planned)

    @property
    def collectives(self) -> tuple[Collective, ...]:
        """Of one step of every workload, in order."""
        return tuple(c for schedule in self.planned for c in schedule.collectives)

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

    @cached_property
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
