"""Published end-to-end runs against `transformer.step_s`, with one number fitted per series at its smallest tp.

That number multiplies the work (arithmetic and memory traffic) of every kernel, so that the smallest tp is met exactly:
it stands for the software's kernels and the GPU's power limit. Launches, collectives and how work divides are the
profile's and the model's.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal

from costs_tables import DATA

from colrow.cost_models.hardware import load_hardware
from colrow.cost_models.transformer import Step, StepSeconds, Transformer, step_s


@dataclass(frozen=True)
class Run:
    """One series: measured and predicted seconds by tp, and the factor the smallest tp fixed."""

    group: str
    what: str
    factor: float
    measured_s: dict[int, float]
    predicted_s: dict[int, float]

    def errors(self) -> list[float]:
        """Relative errors, the smallest tp left out: it was met by fitting."""
        return [abs(self.predicted_s[tp] / self.measured_s[tp] - 1) for tp in sorted(self.measured_s)[1:]]

    @property
    def picks_best(self) -> bool:
        """Whether the tp predicted fastest was fastest."""
        return min(self.predicted_s, key=self.predicted_s.__getitem__) == min(
            self.measured_s, key=self.measured_s.__getitem__
        )


def published_runs(part: Literal["groups", "held_out"] = "groups") -> tuple[list[dict[str, Any]], list[Run]]:
    """The groups of a part of the data file (its note says which is which), and every series predicted."""
    content = json.loads((DATA / "published_runs.json").read_text("utf-8"))
    runs = [_run(group, series, content["models"]) for group in content[part] for series in group["series"]]
    return content[part], runs


def _run(group: dict[str, Any], series: dict[str, Any], models: dict[str, Any]) -> Run:
    model = Transformer(**{**models[series["model"]], "head_split": group["head_split"]})
    measured = {int(tp): ms * 1e-3 for tp, ms in series["ms"].items()}
    parts = {tp: _seconds(group, series, model, tp) for tp in measured}
    smallest = min(measured)
    first = parts[smallest]
    factor = (measured[smallest] - first.launch_s - first.communication_s) / first.work_s
    predicted = {tp: part.work_s * factor + part.launch_s + part.communication_s for tp, part in parts.items()}
    what = f"{series['model']}, batch {series['batch']}, {series['input_len']} + {series['output_len']} tokens"
    return Run(group["name"], what, factor, measured, predicted)


def _seconds(group: dict[str, Any], series: dict[str, Any], model: Transformer, tp: int) -> StepSeconds:
    """The prompt in one step, then a step per new token at the mean context."""
    hardware = load_hardware(group["hardware"])
    if "compute_of" in group:  # the same GPU on other links
        gpu = load_hardware(group["compute_of"])
        own = {"compute": gpu.compute, "memory": gpu.memory, "launch_overhead_s": gpu.launch_overhead_s}
        hardware = hardware.model_copy(update=own)
    if "eager_collective_s" in group:  # the runs' host is not the profile's
        hardware = hardware.model_copy(update={"eager_collective_s": group["eager_collective_s"]})
    steps = series["output_len"]
    total = StepSeconds(0.0, 0.0, 0.0)
    if group["prefill_counted"]:
        total += _step(group, series, model, hardware, tp, series["input_len"], 0)
        steps = max(steps - 1, 0)
    if steps:
        total += _step(group, series, model, hardware, tp, 1, series["input_len"] + steps // 2) * steps
    return total


def _step(
    group: dict[str, Any], series: dict[str, Any], model: Transformer, hardware: Any, tp: int, query: int, context: int
) -> StepSeconds:
    step = Step(series["batch"], query, context, 2, "float16", tp, group["implementation"], group["eager"])
    return step_s(model, step, hardware)
