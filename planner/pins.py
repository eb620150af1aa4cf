"""Pins: placements that a user fixes, by pattern of a parameter or module path."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

from colrow.cost_models.errors import LayoutError, UsageError

from .plan_model import PlannedParameter


def matches(pattern: str, fqn: str) -> bool:
    """Whether ``pattern`` means this parameter: by its path, without ``.weight``, or by its module's path."""
    return any(fnmatchcase(name, pattern) for name in (fqn, fqn.removesuffix(".weight"), fqn.rpartition(".")[0]))


def refuse_pins_of_nothing(pin: Mapping[str, str], fqns: Iterable[str]) -> None:
    """A pattern that means no parameter is a mistyped one.

    Raises:
        UsageError: Names it.
    """
    known = list(fqns)
    for pattern in pin:
        if not any(matches(pattern, fqn) for fqn in known):
            raise UsageError(
                f"pin {pattern}", "no parameter of the model has such a path", got=pattern, remedy=f"Try {known[0]}."
            )


def refuse_unmet_pins(pin: Mapping[str, str], parameters: Iterable[PlannedParameter], tp: int) -> None:
    """A matrix that could not be placed as it was pinned is no plan; biases and norms follow their weights.

    Raises:
        LayoutError: Names the weight.
    """
    for parameter in parameters:
        words = [word for pattern, word in pin.items() if matches(pattern, parameter.edit.fqn)]
        if not words or len(parameter.shape) < 2:
            continue
        met = {"column", "vocab"} if parameter.placement in ("column", "vocab") else {parameter.placement}
        if not met.intersection(words):
            raise LayoutError(
                parameter.edit.fqn,
                f"no exact layout of it for {tp} ranks is what it was pinned to",
                got=parameter.placement,
                need=" or ".join(words),
                remedy="Drop the pin, or plan for another number of ranks.",
            )
