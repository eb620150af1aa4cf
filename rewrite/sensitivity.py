"""Whether a comparison can tell anything: how far a dense model moves when its own weights change in the last digits.

A small random model may amplify rounding (a layer repeated twelve times, gradients that vanish and are divided by their
own size). Where the dense model, its weights nudged by rounding, differs from itself as much as the rewritten one does,
the difference says nothing about the rewrite. That is no verdict: such a model is neither right nor wrong.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from colrow.planner.random_weights import randomize
from colrow.planner.trace import Inputs

from .comparison import FLOAT64_TOLERANCE, Report, error_of
from .random_inputs import random_inputs
from .verification import steps_of

NUDGES = {True: 1e-13, False: 1e-7}  # relative, in float64 and where the model computes in float32
FACTOR = 10.0  # the rewritten model rounds at every operator, the nudged one only in its weights


def decides_nothing(build_model: Callable[[], nn.Module], example_inputs: Inputs, report: Report) -> bool:
    """Whether every tensor that ``report`` finds wrong is as wrong in the nudged dense model.

    What rounding cannot explain decides: gradients that are None on one side, ranks or collectives that differ.
    """
    if report.none_gradients or report.unequal or report.collectives_planned != report.collectives_executed:
        return False
    others = (*report.small_gradients.values(), *report.buffer_errors.values())
    if any(not error <= report.tolerance for error in others):
        return False
    dense = randomize(build_model().double()).eval()
    inputs = random_inputs(dense, example_inputs, torch.float64)
    nudged = _nudged(dense, NUDGES[report.tolerance <= FLOAT64_TOLERANCE])
    for index, training in enumerate(report.trainings):
        true = steps_of(copy.deepcopy(dense), inputs, training.optimiser)
        moved = steps_of(copy.deepcopy(nudged), inputs, training.optimiser)
        pairs: list[tuple[Mapping[str, float], dict[str, Tensor], dict[str, Tensor]]] = [
            (training.parameters, moved.parameters, true.parameters)
        ]
        if index == 0:
            pairs += [
                (report.gradient_errors, _present(moved.gradients), _present(true.gradients)),
                (report.output_errors, moved.outputs, true.outputs),
            ]
        scales = zip(training.losses, moved.losses, true.losses, true.loss_scales, strict=True)
        scales_of_norms = zip(training.norms, moved.norms, true.norms, true.norms, strict=True)
        for error, nudged_value, value, scale in (*scales, *scales_of_norms):
            if not error <= max(report.tolerance, FACTOR * abs(nudged_value - value) / (scale or 1.0)):
                return False
        for errors, found, expected in pairs:
            wrong = [name for name, error in errors.items() if not error <= report.tolerance]
            if any(
                name not in expected or not errors[name] <= FACTOR * error_of(found[name], expected[name])
                for name in wrong
            ):
                return False
    return True


def _present(gradients: dict[str, Tensor | None]) -> dict[str, Tensor]:
    return {name: gradient for name, gradient in gradients.items() if gradient is not None}


def _nudged(dense: nn.Module, size: float) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    nudged = copy.deepcopy(dense)
    with torch.no_grad():
        for parameter in nudged.parameters():
            parameter.mul_(1 + size * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return nudged
