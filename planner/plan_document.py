"""The fields of a plan file. All are checked, and one too many is an error: a typo in a hand edit must not pass."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

from .edits import OperatorName
from .moves import Step
from .planned_collectives import Category

Natural = Annotated[int, Field(ge=0)]
Direction = Literal["forward", "backward"]


def _kind(value: object) -> str:
    """Which kind of entry a value is meant to be: decided by its form, so that an error speaks of one kind only."""
    if isinstance(value, dict):
        return "<many>" if "over" in value else "<one>"
    if isinstance(value, BaseModel):
        return "<many>" if hasattr(value, "over") else "<one>"
    return "<plain>"


class _Fields(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class SegmentEntry(_Fields):
    """One piece of a split dim that is not cut evenly: per rank, what it owns as ``start:stop,start:stop``."""

    length: Natural
    local: Natural
    owned: list[str]


Split = list[
    Annotated[Annotated[Natural, Tag("<plain>")] | Annotated[SegmentEntry, Tag("<one>")], Discriminator(_kind)]
]
"""Segments of a split dim; a number is the length of one cut into equal consecutive blocks."""


class ParameterEntry(_Fields):
    """How one parameter is stored; ``weight``: a product or an embedding reads it."""

    placement: Literal["column", "row", "vocab", "expert", "replicated"]
    shape: list[Natural]
    dtype: str
    weight: bool = False
    dim: Natural | None = None
    split: Split | None = None


class MoveEntry(_Fields):
    """What is done to a value, and to its gradient; ``elastic``: the dim may have any length that divides."""

    forward: Step
    backward: Step
    dim: Natural = 0
    split: Split | None = None
    elastic: bool = False


class ArgumentEntry(_Fields):
    """A move of one argument (a leaf of the call's arguments flattened)."""

    leaf: Natural
    move: MoveEntry


class IntegerEntry(_Fields):
    """A literal size or offset of a call."""

    leaf: Natural
    whole: int
    local: int


class OperatorEntry(_Fields):
    """The operator to run instead."""

    name: OperatorName
    dim: Natural = 0
    split: Split | None = None


class CallEntry(_Fields):
    """An edit of one call expression of a module's forward."""

    at: str
    arguments: list[ArgumentEntry] = []
    integers: list[IntegerEntry] = []
    operator: OperatorEntry | None = None
    result: MoveEntry | None = None


class CollectiveEntry(_Fields):
    """One collective of one step."""

    kind: str
    nbytes: Natural
    direction: Direction
    workload: str
    site: str = ""
    block: str = ""
    forced_by: str
    category: Category
    bucket: str = ""
    ps: Natural


class CollectiveRepeat(_Fields):
    """Collectives of many blocks; ``{i}`` is the block's number."""

    over: str
    each: list[CollectiveEntry]


class UnsplitEntry(_Fields):
    """A weight left whole."""

    parameter: str
    nbytes: Natural
    reason: str


class UnsplitRepeat(_Fields):
    """Weights left whole in many blocks."""

    over: str
    each: list[UnsplitEntry]


class TextRepeat(_Fields):
    """Lines that many blocks have in common."""

    over: str
    each: list[str]


Collectives = list[
    Annotated[
        Annotated[CollectiveEntry, Tag("<one>")] | Annotated[CollectiveRepeat, Tag("<many>")], Discriminator(_kind)
    ]
]
Unsplit = list[
    Annotated[Annotated[UnsplitEntry, Tag("<one>")] | Annotated[UnsplitRepeat, Tag("<many>")], Discriminator(_kind)]
]
Texts = list[Annotated[Annotated[str, Tag("<plain>")] | Annotated[TextRepeat, Tag("<many>")], Discriminator(_kind)]]


class InputEntry(_Fields):
    """A tensor input."""

    dtype: str
    shape: list[Natural]


class CostEntry(_Fields):
    """Predicted seconds of one step on one rank."""

    total_s: float
    compute_s: float
    comm_s: float
    lower_bound_s: float
    proven: bool
    forward_comm_s: float
    backward_comm_s: float
    optimizer_s: float = 0.0


class LengthEntry(_Fields):
    """What a schedule asks of an input's dim: a length, or any that divides."""

    input: str
    dim: Natural
    exactly: Natural | None = None


class ReadEntry(_Fields):
    """How a schedule reads a parameter: whether its gradient is partial on each rank, whether only rank 0 reads it."""

    partial_grad: bool = False
    lifted: bool = False


class ScheduleEntry(_Fields):
    """What one workload's forward does; ``reads``: parameters that are not simply read."""

    workload: str
    inputs: dict[str, InputEntry]
    values: dict[str, Any] = {}
    context: Natural = 0
    weight: float = 1.0
    lengths: list[LengthEntry] = []
    stands_in: bool = False
    cost: CostEntry
    reads: dict[str, ReadEntry] = {}
    partial_inputs: list[str] = []
    partial_outputs: list[str] = []
    split_outputs: dict[str, MoveEntry] = {}
    collectives: Collectives = []
    calls: dict[str, list[CallEntry]] = {}


class PlanDocument(_Fields):
    """A plan file without its header (``schema``, ``digest``)."""

    name: str
    tp: Annotated[int, Field(ge=1)]
    hardware: str
    options: dict[str, Any]
    cost: CostEntry
    memory_bytes: dict[str, Natural]
    findings: Texts
    unsplit: Unsplit
    parameters: dict[str, ParameterEntry]
    parameter_order: str | None = None
    ties: dict[str, str]
    schedules: Annotated[list[ScheduleEntry], Field(min_length=1)]
    assumptions: dict[str, str]
