"""The parts of a hardware profile, as JSON holds them: every field name carries its unit, bounds catch other units.

`hardware.Hardware` puts the parts together. All parts are immutable, refuse unknown fields and convert no types, so a
profile is either right in form or refused with the name of the field at fault. Fields with a default were added after
version 1 was first written; a file without them stays valid and means what the default says.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from .communication import SegmentedLine

Text = Annotated[str, Field(min_length=1)]
# The bounds are where a number in another unit (us for s, GB for bytes, TFLOPS for flops) would land.
Latency = Annotated[float, Field(gt=0, lt=0.1, allow_inf_nan=False)]
SecondsPerByte = Annotated[float, Field(ge=0, lt=1e-6, allow_inf_nan=False)]
BytesPerSecond = Annotated[float, Field(gt=1e8, lt=1e15, allow_inf_nan=False)]
FlopsPerSecond = Annotated[float, Field(gt=1e8, lt=1e19, allow_inf_nan=False)]
Fraction = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
Error = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Bytes = Annotated[int, Field(ge=0)]
Date = Annotated[str, Field(pattern=r"^\d{4}-\d{2}-\d{2}$")]

MAX_SEGMENTS = 64
"""A segment per measured size; nccl-tests from 8 bytes to 16 GB in steps of two has 32."""

Implementation = Literal["library", "library_graph", "custom_graph", "custom_eager", "one_shot_graph"]
"""Who runs a collective: ``library`` is NCCL, RCCL or gloo called as such, ``library_graph`` the same in a CUDA
graph, ``custom_graph`` a kernel over peer memory with barriers in a CUDA graph (vLLM), ``custom_eager`` that kernel
launched from Python, ``one_shot_graph`` kernels that write to every peer at once, data and flag together, in a CUDA
graph (TensorRT-LLM)."""

DTYPES = frozenset(
    "float64 float32 float16 bfloat16 float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz float8_e8m0fnu"
    " float4_e2m1fn_x2 int8 uint8 int16 int32 int64 complex64 complex128 bool".split()
)
"""torch's names. A misspelt one would silently run at float32's rate."""

Topology = Literal["nvswitch", "nvlink_pairs", "pcie", "host"]
"""What joins the ranks of a node: a switch every GPU reaches at full rate, bridges between pairs and PCIe beyond, a
PCIe tree, or the memory of one host (CPU ranks)."""


class Strict(BaseModel):
    """Base of all profile parts: immutable, no unknown fields, no conversion of types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Segment(Strict):
    """From ``from_bytes`` on, each further byte of the whole tensor takes ``s_per_byte`` seconds."""

    from_bytes: Bytes
    s_per_byte: SecondsPerByte


class GroupCurve(Strict):
    """One collective at one group size.

    Attributes:
        size: Ranks in the group.
        nodes: Nodes they are spread over evenly; None where they are as few as hold the group.
        basis: ``measured`` (fitted to a table) or ``structural`` (derived by a formula from a measured curve, or from
            the machine's links alone).
        min_bytes: Smallest measured message, bytes of the whole tensor.
        max_bytes: Largest measured message.
        latency_s: Seconds of an empty message.
        segments: Ascending, the first from byte 0.
        median_rel_error: Of the curve against the table it was fitted to; None where structural.
        max_rel_error: As above, the worst row.
        left_out_median_rel_error: Of predicting each interior measured size from the others; None where not known.
        left_out_max_rel_error: As above, the worst row.
    """

    size: Annotated[int, Field(ge=2)]
    nodes: Annotated[int, Field(ge=1)] | None = None
    basis: Literal["measured", "structural"]
    min_bytes: Bytes
    max_bytes: Bytes
    latency_s: Latency
    segments: Annotated[list[Segment], Field(min_length=1, max_length=MAX_SEGMENTS)]
    median_rel_error: Error | None = None
    max_rel_error: Error | None = None
    left_out_median_rel_error: Error | None = None
    left_out_max_rel_error: Error | None = None

    @model_validator(mode="after")
    def _ascending(self) -> Self:
        starts = [segment.from_bytes for segment in self.segments]
        if starts[0] != 0 or starts != sorted(set(starts)):
            raise ValueError(f"segments.from_bytes must start at 0 and ascend strictly, got {starts}")
        if self.min_bytes > self.max_bytes:
            raise ValueError(f"min_bytes must not exceed max_bytes, got {self.min_bytes} > {self.max_bytes}")
        return self

    def line(self) -> SegmentedLine:
        """The curve to evaluate."""
        return SegmentedLine.through(
            self.latency_s,
            [float(segment.from_bytes) for segment in self.segments],
            [segment.s_per_byte for segment in self.segments],
        )


class GroupCurves(Strict):
    """Curves of one kind by one implementation, ascending by group size and nodes."""

    groups: Annotated[list[GroupCurve], Field(min_length=1)]

    @model_validator(mode="after")
    def _distinct_sizes(self) -> Self:
        sizes = [(group.size, group.nodes or 0) for group in self.groups]
        if sizes != sorted(set(sizes)):
            raise ValueError(f"groups.size must ascend strictly, got {[size for size, _ in sizes]}")
        return self


class Alternative(GroupCurves):
    """The same kind by another implementation, from a table of its own.

    Attributes:
        name: Which one.
        software: What was measured, with its version.
        source: Repository and path, or "measured" and on what.
        commit: Commit of that source, "" for a measurement.
        licence: SPDX identifier of the measured table.
        date: ISO date of the measurement or of the source's commit.
    """

    name: Implementation
    software: Text
    source: Text
    commit: str
    licence: Text
    date: Date


class Collective(GroupCurves):
    """One kind of collective: the library that was measured, its curves, and other implementations of the kind."""

    implementation: Text
    alternatives: list[Alternative] = []

    @model_validator(mode="after")
    def _distinct_names(self) -> Self:
        names = ["library", *(alternative.name for alternative in self.alternatives)]
        if len(names) != len(set(names)):
            raise ValueError(f"alternatives.name must be distinct and not library, got {names[1:]}")
        return self


class Collectives(Strict):
    """Every kind the planner may place."""

    all_reduce: Collective
    all_gather: Collective
    reduce_scatter: Collective
    all_to_all: Collective
    broadcast: Collective


class Link(Strict):
    """What joins the ranks of a node, for group sizes and kinds without a curve (see `structural`).

    Attributes:
        topology: How ranks are joined.
        bytes_per_s_per_rank: What one rank can send to others at a time, one direction, all its links together (with
            ``nvlink_pairs``: over PCIe).
        pair_bytes_per_s: With ``nvlink_pairs``, one direction between the two ranks of a pair.
        multicast: Whether the switch adds and copies (NVLink SHARP, "NVLS").
        source: Where that comes from.
    """

    topology: Topology
    bytes_per_s_per_rank: BytesPerSecond
    pair_bytes_per_s: BytesPerSecond | None = None
    multicast: bool = False
    source: Text

    @model_validator(mode="after")
    def _pairs(self) -> Self:
        if (self.topology == "nvlink_pairs") != (self.pair_bytes_per_s is not None):
            raise ValueError("pair_bytes_per_s goes with topology nvlink_pairs, and only with it")
        return self


class InterNode(Strict):
    """The network between nodes, for groups larger than ``ranks_per_node`` (always a structural prediction).

    Attributes:
        network: What kind it is; "" where not said.
        latency_s: Of one hop.
        bytes_per_s_per_rank: One rank's share of its node's interfaces, one direction.
        source: Where both come from.
    """

    network: Literal["", "infiniband", "roce", "efa", "tcp"] = ""
    latency_s: Latency
    bytes_per_s_per_rank: BytesPerSecond
    source: Text


class Compute(Strict):
    """Arithmetic rates.

    Attributes:
        peak_flops_per_s: By torch dtype name (``bfloat16``, ``float32``, ...), dense. ``float32`` must be present:
            dtypes that are not listed run at its rate, on the ordinary vector units.
        efficiency: Share of that peak a large matmul reaches, by the same names; unlisted dtypes take float32's.
        units: Processors that work on tiles of a result side by side (an NVIDIA GPU's multiprocessors); 1 where a
            matmul of any shape reaches the whole rate. See `compute.occupancy`.
        matmul_start_s: Seconds a matmul takes on top of the launch and the roofline: its first tiles and last sums.
        source: Where all of these come from.
    """

    peak_flops_per_s: dict[str, FlopsPerSecond]
    efficiency: dict[str, Fraction]
    units: Annotated[int, Field(ge=1)] = 1
    matmul_start_s: Annotated[float, Field(ge=0, lt=0.1, allow_inf_nan=False)] = 0.0
    source: Text

    @model_validator(mode="after")
    def _known_dtypes(self) -> Self:
        for field, rates in (("peak_flops_per_s", self.peak_flops_per_s), ("efficiency", self.efficiency)):
            unknown = sorted(set(rates) - DTYPES)
            if unknown:
                raise ValueError(f"{field}.{unknown[0]} names no torch dtype")
            if "float32" not in rates:
                raise ValueError(f"{field} must name float32, the rate of dtypes that are not listed")
        return self


class Memory(Strict):
    """The device's own memory: its bandwidth, and the share of it that streaming kernels reach."""

    bandwidth_bytes_per_s: BytesPerSecond
    efficiency: Fraction
    source: Text
