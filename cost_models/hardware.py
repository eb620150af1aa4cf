"""Hardware profiles: what one machine kind costs in seconds and holds in bytes, read from JSON and checked.

A profile is data (``profiles/*.json``, or a file of the user's); `Hardware` is its schema and the only thing the
planner asks for times. Every field name carries its unit, bounds catch values in another unit, and unknown fields
are refused, so a profile is either right in form or refused with the name of the field at fault.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cached_property, lru_cache
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from .communication import (
    COLLECTIVE_KINDS,
    CollectiveKind,
)
from .errors import HardwareError
from .profile import Collective, Collectives, Compute, Date, InterNode, Link, Memory, Strict, Text
from .routes import CurveKey, Prediction, Route, route_of

SCHEMA = "colrow.hardware/1"
PROFILE_REMEDY = "Compare with a profile that ships with colrow (cost_models/profiles)."


class Hardware(Strict):
    """One machine kind.

    Attributes:
        schema_version: ``schema`` in the file.
        name: What ``--hardware`` takes.
        description: One line for people.
        source: Where the collective times come from: repository, path, or "measured" and on what.
        commit: Commit of that source, "" for a measurement.
        licence: SPDX identifier of the measured table; a table without a licence is not used.
        date: ISO date of the measurement or of the source's commit.
        memory_gb: Per rank, 1 GB = 1e9 bytes.
        ranks_per_node: Ranks that share the measured links; larger groups need ``inter_node``.
        collectives: Communication.
        inter_node: None: groups stay within a node.
        link: The links within a node; None: kinds and group sizes without a curve are refused.
        compute: Arithmetic.
        memory: Memory bandwidth.
        launch_overhead_s: Seconds each operator costs the device before its roofline, launched from a CUDA graph.
        eager_dispatch_s: Seconds the host takes to launch one operator from Python: no eager operator takes less. None
            where not known.
        eager_collective_s: Seconds a collective takes longer when the host launches it than replayed from a CUDA graph
            or back to back: its launch, and the wait for the slowest host. None where not known.
        launch_source: Where these come from.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, populate_by_name=True)

    schema_version: Literal["colrow.hardware/1"] = Field(alias="schema")
    name: Text
    description: Text
    source: Text
    commit: str
    licence: Text
    date: Date
    memory_gb: Annotated[float, Field(gt=0.1, lt=1e5, allow_inf_nan=False)]
    ranks_per_node: Annotated[int, Field(ge=1)]
    collectives: Collectives
    inter_node: InterNode | None
    link: Link | None = None
    compute: Compute
    memory: Memory
    launch_overhead_s: Annotated[float, Field(ge=0, lt=0.1, allow_inf_nan=False)]
    eager_dispatch_s: Annotated[float, Field(ge=0, lt=0.1, allow_inf_nan=False)] | None = None
    eager_collective_s: Annotated[float, Field(ge=0, lt=0.1, allow_inf_nan=False)] | None = None
    launch_source: Text

    @property
    def basis(self) -> Literal["measured", "structural"]:
        """Whether any collective was measured, or all were derived from the links."""
        groups = [group for kind in COLLECTIVE_KINDS for group in self._collective(kind).groups]
        return "measured" if any(group.basis == "measured" for group in groups) else "structural"

    @cached_property
    def curves(self) -> dict[CurveKey, Route]:
        """Curves built so far. A plain attribute: pydantic's private ones cost 2 us an access."""
        return {}

    def __getstate__(self) -> dict[Any, Any]:
        """Pickled without ``curves``, which hold closures and are rebuilt on use."""
        state = super().__getstate__()
        return {**state, "__dict__": {key: value for key, value in state["__dict__"].items() if key != "curves"}}

    def collective_s(
        self, kind: str, nbytes: float, size: int, implementation: str = "library", nodes: int | None = None
    ) -> float:
        """Predicted seconds of one collective.

        Args:
            kind: One of all_reduce, all_gather, reduce_scatter, all_to_all, broadcast.
            nbytes: Bytes of the whole, unsharded tensor over all ranks (nccl-tests' message size, except that an
                all_to_all also counts all ranks), at least 0.
            size: Ranks in the group. 1 costs nothing.
            implementation: Who runs it (`profile.Implementation`); see `implementations`.
            nodes: Nodes the group is spread over; None for as few as hold it.

        Raises:
            HardwareError: An unknown kind or implementation, negative ``nbytes``, ``size`` below 1, or a group that
                the profile has neither a curve nor a link for.
        """
        route = self.curves.get((kind, size, implementation, nodes))
        if route is None:
            if size == 1 and kind in COLLECTIVE_KINDS:
                return 0.0
            route = self._remembered(kind, size, implementation, nodes)
        if nbytes < 0:
            raise HardwareError("nbytes", "a message cannot be negative", got=nbytes, need="0 or more")
        return route.seconds(nbytes)

    def predict(
        self, kind: str, nbytes: float, size: int, implementation: str = "library", nodes: int | None = None
    ) -> Prediction:
        """`collective_s` with its parts and where it comes from; arguments and errors as there."""
        seconds = self.collective_s(kind, nbytes, size, implementation, nodes)
        if size == 1:
            return Prediction(0.0, 0.0, "measured", None, "")
        route = self._remembered(kind, size, implementation, nodes)
        empty_s = min(route.seconds(0), seconds)
        return Prediction(empty_s, seconds - empty_s, route.basis, route.rel_error, route.finding(nbytes))

    def predicts_within(self, kind: str, nbytes: float, size: int, implementation: str = "library") -> bool:
        """Whether `collective_s` interpolates a measurement of exactly this kind and group size.

        False outside the measured range of sizes, for group sizes between or beyond measured ones, and for curves
        that a formula derived (``basis: structural``). A group of one is always within.
        """
        self._collective(kind)
        return size == 1 or not self._remembered(kind, size, implementation, None).finding(nbytes)

    def implementations(self, kind: str) -> list[str]:
        """Implementations the profile has curves of."""
        return ["library", *(alternative.name for alternative in self._collective(kind).alternatives)]

    def _collective(self, kind: str) -> Collective:
        if kind not in COLLECTIVE_KINDS:
            raise HardwareError("kind", "unknown collective", got=repr(kind), need=", ".join(COLLECTIVE_KINDS))
        collective: Collective = getattr(self.collectives, kind)
        return collective

    def _remembered(self, kind: str, size: int, implementation: str, nodes: int | None) -> Route:
        key = (kind, size, implementation, nodes)
        if key not in self.curves:
            self._collective(kind)
            known: CollectiveKind = next(k for k in COLLECTIVE_KINDS if k == kind)
            self.curves[key] = route_of(self, known, size, implementation, nodes)
        return self.curves[key]


def hardware_names() -> list[str]:
    """Names of the profiles that ship with colrow, sorted."""
    return sorted(entry.name.removesuffix(".json") for entry in _profiles().iterdir() if entry.name.endswith(".json"))


def load_hardware(name_or_path: str) -> Hardware:
    """Read and check a profile.

    Args:
        name_or_path: The name of a shipped profile, or the path of a JSON file (anything with a separator or ending
            in ``.json``).

    Raises:
        HardwareError: The name is unknown (the known ones are listed), the file cannot be read, or a field is
            missing, unknown or out of bounds (it is named).
    """
    if name_or_path.endswith(".json") or "/" in name_or_path or "\\" in name_or_path:
        try:
            text = Path(name_or_path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise HardwareError(
                name_or_path,
                f"cannot read the hardware profile ({type(error).__name__})",
                remedy=f"Check the path, or name a profile. {_known_names()}",
            ) from error
        return parse_hardware(text, where=name_or_path)
    if name_or_path not in hardware_names():
        raise HardwareError(
            "hardware", "unknown profile", got=repr(name_or_path), need="a known name or a path", remedy=_known_names()
        )
    return _shipped(name_or_path)


def parse_hardware(text: str, where: str) -> Hardware:
    """Check the JSON text of a profile; ``where`` names it in errors (a path or a profile's name)."""
    try:
        content = json.loads(text)
    except ValueError as error:
        raise HardwareError(where, f"not valid JSON ({error})", remedy=PROFILE_REMEDY) from error
    if not isinstance(content, dict):
        raise HardwareError(where, "not a hardware profile", got=type(content).__name__, need="a JSON object")
    if content.get("schema") != SCHEMA:
        raise HardwareError(
            f"{where}: schema",
            "unknown version of a hardware profile",
            got=repr(content.get("schema")),
            need=repr(SCHEMA),
            remedy=PROFILE_REMEDY,
        )
    try:
        return Hardware.model_validate(content)
    except ValidationError as error:
        first, *others = error.errors(include_url=False)
        # For a missing field pydantic's input is the whole surrounding object: of no use in a message.
        got = None if first["type"] == "missing" or isinstance(first["input"], dict) else repr(first["input"])
        # A field in the wrong unit (latency_us) is a missing one and an unknown one; both are named.
        also = "".join(f" Also {_field(other)}: {other['msg']}." for other in others[:3])
        raise HardwareError(f"{where}: {_field(first)}", first["msg"], got=got, remedy=PROFILE_REMEDY + also) from error


def _field(detail: ErrorDetails) -> str:
    return ".".join(str(part) for part in detail["loc"]) or "profile"


def _known_names() -> str:
    return f"Known profiles: {', '.join(hardware_names())}."


def _profiles() -> Traversable:
    return resources.files(__package__) / "profiles"


def _read_shipped(name: str) -> Hardware:
    return parse_hardware((_profiles() / f"{name}.json").read_text(encoding="utf-8"), where=f"hardware {name}")


_shipped: Callable[[str], Hardware] = lru_cache(maxsize=None)(_read_shipped)
