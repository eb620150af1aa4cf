"""Errors between a rewritten model's tensors and the dense model's, and the report that says whether it is right.

The error of a tensor is max |a - b| / max |b|. Gradients whose largest entry is below a thousandth of the largest in
their block are often nothing but rounding (a key bias: softmax does not see it), so their own size says nothing: they
are listed apart, and held to the block's size instead.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

FLOAT64_TOLERANCE = 1e-9
FLOAT32_TOLERANCE = 1e-5  # where the model itself computes in float32, whatever its weights are
SMALL_GRADIENT = 1e-3  # of the largest gradient in the block
Count = tuple[str, int, str]  # kind, bytes of the whole buffer, direction


def error_of(found: Tensor, dense: Tensor, size: float | None = None) -> float:
    """max |found - dense| / ``size``, by default max |dense|; inf for another shape, nan where a value is nan."""
    if found.shape != dense.shape:
        return float("inf")
    if not dense.numel():
        return 0.0
    if not dense.dtype.is_floating_point:
        return 0.0 if torch.equal(found, dense) else float("inf")
    scale = float(dense.abs().max()) if size is None else size
    difference = float((found.double() - dense.double()).abs().max())
    return difference / scale if scale else difference


def gradient_errors(
    found: Mapping[str, Tensor | None], dense: Mapping[str, Tensor | None], blocks: Iterable[str]
) -> tuple[dict[str, float], dict[str, float], tuple[str, ...]]:
    """Errors by parameter, those of small gradients relative to their block, and parameters where one side is None."""
    listed = list(blocks)

    def block_of(fqn: str) -> str:
        return next((block for block in listed if fqn.startswith(f"{block}.")), "")

    largest: dict[str, float] = {}
    for fqn, value in dense.items():
        if value is not None and value.numel():
            largest[block_of(fqn)] = max(largest.get(block_of(fqn), 0.0), float(value.abs().max()))
    errors: dict[str, float] = {}
    small: dict[str, float] = {}
    none = []
    for fqn, value in dense.items():
        mine = found.get(fqn)
        if value is None or mine is None:
            if value is not mine:
                none.append(fqn)
            continue
        whole = largest.get(block_of(fqn), 0.0)
        if value.numel() and float(value.abs().max()) < SMALL_GRADIENT * whole:
            small[fqn] = error_of(mine, value, whole)
        else:
            errors[fqn] = error_of(mine, value)
    return errors, small, tuple(none)


@dataclass(frozen=True)
class TrainingErrors:
    """Two models after the same optimiser steps.

    Attributes:
        optimiser: Its name.
        losses: Error of the loss, by step.
        norms: Error of the total gradient norm that ``clip_grad_norm_`` returned, by step.
        parameters: Error of every parameter after the last step.
    """

    optimiser: str
    losses: tuple[float, ...]
    norms: tuple[float, ...]
    parameters: Mapping[str, float]


@dataclass(frozen=True)
class Report:
    """What ``verify`` found.

    Attributes:
        tp: Ranks.
        tolerance: The largest error that counts as right: 1e-9, or 1e-5 where the model computes in float32.
        output_errors: By the output's path.
        gradient_errors: By parameter.
        small_gradients: Gradients too small to be judged by their own size; errors relative to their block's largest.
        none_gradients: Parameters where one model has a gradient and the other none.
        trainings: After optimiser steps.
        buffer_errors: By buffer, after the steps.
        unequal: Outputs, replicated parameters, their gradients and buffers that differ between ranks, by bit.
        collectives_planned: Of one step, sorted.
        collectives_executed: The same, counted at the dispatcher on rank 0.
        notes: What the check could not do or did differently.
        first_divergence: Where a wrong model first differs from the dense one.
    """

    tp: int
    tolerance: float
    output_errors: Mapping[str, float]
    gradient_errors: Mapping[str, float]
    small_gradients: Mapping[str, float]
    none_gradients: tuple[str, ...]
    trainings: tuple[TrainingErrors, ...]
    buffer_errors: Mapping[str, float]
    unequal: tuple[str, ...]
    collectives_planned: tuple[Count, ...]
    collectives_executed: tuple[Count, ...]
    notes: tuple[str, ...] = ()
    first_divergence: str = field(default="", compare=False)

    @property
    def forward_max_rel_error(self) -> float:
        """The worst output's."""
        return _worst(self.output_errors)[1]

    @property
    def gradient_max_rel_error(self) -> float:
        """The worst gradient's, small ones left out."""
        return _worst(self.gradient_errors)[1]

    def ok(self, tolerance: float | None = None) -> bool:
        """Whether the rewritten model is right, its collectives are the planned ones, and all ranks agree."""
        return not self.failures(tolerance)

    def failures(self, tolerance: float | None = None) -> list[str]:
        """One line per kind of failure, each naming its worst tensor; ``tolerance`` defaults to the report's own."""
        limit = self.tolerance if tolerance is None else tolerance
        tables = [("output", self.output_errors), ("gradient", self.gradient_errors)]
        tables += [("gradient (small, by its block)", self.small_gradients), ("buffer", self.buffer_errors)]
        for steps in self.trainings:
            tables.append((f"loss under {steps.optimiser}", _by_step(steps.losses)))
            tables.append((f"gradient norm under {steps.optimiser}", _by_step(steps.norms)))
            tables.append((f"parameter after {len(steps.losses)} {steps.optimiser} steps", steps.parameters))
        lines = []
        for what, errors in tables:
            wrong = [name for name, error in errors.items() if not error <= limit]  # nan is wrong
            if wrong:
                name, error = _worst(errors)
                others = f", and {len(wrong) - 1} of {len(errors)} more" if len(wrong) > 1 else ""
                lines.append(f"{what} {name}: error {error:.1e}, need {limit:.0e}{others}")
        if self.none_gradients:
            lines.append(f"gradient {self.none_gradients[0]}: None in one of the two models ({self._more('none')})")
        if self.unequal:
            lines.append(f"{self.unequal[0]}: differs between ranks ({self._more('unequal')})")
        if self.collectives_planned != self.collectives_executed:
            planned, executed = Counter(self.collectives_planned), Counter(self.collectives_executed)
            lines.append(
                f"collectives: {_counts(planned - executed)} planned only, {_counts(executed - planned)} executed only"
            )
        return lines

    def explain(self, tolerance: float | None = None) -> str:
        """The verdict in a few lines: the worst tensor of every kind of failure, and where the models part."""
        lines = self.failures(tolerance)
        if not lines:
            worst = max((e for t in self.trainings for e in t.parameters.values()), default=0.0)
            return (
                f"right on {self.tp} ranks: outputs within {self.forward_max_rel_error:.1e}, gradients within "
                f"{self.gradient_max_rel_error:.1e}, parameters after training within {worst:.1e}, "
                f"{len(self.collectives_executed)} collectives as planned"
            )
        where = [f"first divergence: {self.first_divergence}"] if self.first_divergence else []
        return "\n".join([f"wrong on {self.tp} ranks:", *(f"  {line}" for line in [*lines, *where])])

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return {
            "schema": "colrow.verify/1",
            "ok": self.ok(),
            "tp": self.tp,
            "tolerance": self.tolerance,
            "forward_max_rel_error": self.forward_max_rel_error,
            "gradient_max_rel_error": self.gradient_max_rel_error,
            "output_errors": dict(self.output_errors),
            "gradient_errors": dict(self.gradient_errors),
            "small_gradients": dict(self.small_gradients),
            "none_gradients": list(self.none_gradients),
            "trainings": [
                {"optimiser": t.optimiser, "loss_errors": list(t.losses), "norm_errors": list(t.norms)}
                | {"parameter_errors": dict(t.parameters)}
                for t in self.trainings
            ],
            "buffer_errors": dict(self.buffer_errors),
            "unequal": list(self.unequal),
            "collectives_planned": [list(c) for c in self.collectives_planned],
            "collectives_executed": [list(c) for c in self.collectives_executed],
            "failures": self.failures(),
            "first_divergence": self.first_divergence,
            "notes": list(self.notes),
        }

    def _more(self, which: str) -> str:
        names = self.none_gradients if which == "none" else self.unequal
        return f"{len(names)} in all"


def _worst(errors: Mapping[str, float]) -> tuple[str, float]:
    """The largest error and its name; nan is larger than everything."""
    return max(errors.items(), key=lambda item: (item[1] != item[1], item[1]), default=("", 0.0))


def _by_step(errors: tuple[float, ...]) -> dict[str, float]:
    return {f"at step {i}": error for i, error in enumerate(errors)}


def _counts(found: Counter[Count]) -> str:
    listed = [f"{n} {direction} {kind} of {nbytes} bytes" for (kind, nbytes, direction), n in sorted(found.items())]
    shown = listed[:4] + [f"{len(listed) - 4} more"] * (len(listed) > 4)
    return ", ".join(shown) or "none"
