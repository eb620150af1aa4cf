"""One small model on two gloo ranks: split by transformers' own tensor parallelism, or by a colrow plan.

Both are measured by the same function: a forward and a backward in float64, outputs and gradients of every rank
compared with the dense model's, and another in float32, its collectives counted at PyTorch's dispatcher. (In float64 a
norm that computes in float32 would make half of a reduction's bytes a matter of which side of the cast it is on.)
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from colrow.planner.blocks import block_paths, outermost
from colrow.planner.plan_model import Plan
from colrow.planner.trace import Inputs
from colrow.rewrite.comparison import error_of, gradient_errors
from colrow.rewrite.counting import count_collectives, fixed_loss
from colrow.rewrite.parallel import parallelize, spec_of
from colrow.rewrite.random_inputs import call, random_inputs
from colrow.rewrite.ranks import run_ranks
from colrow.rewrite.storage import as_dense
from colrow.rewrite.verification import named_tensors

RANKS = 2
COUNTED, COMPARED = torch.float32, torch.float64
LONGEST_S = 300.0  # of one run, in wall seconds
Counts = dict[str, dict[str, list[int]]]  # direction -> kind -> [how many, bytes of their whole buffers]
Full = Callable[[str, Tensor], Tensor]


@dataclass(frozen=True)
class Reference:
    """Example inputs, the dense model's outputs by path and gradients by parameter, and the paths of its blocks."""

    example: Inputs
    outputs: Mapping[str, Tensor]
    gradients: Mapping[str, Tensor | None]
    blocks: list[str]


@dataclass(frozen=True)
class Run:
    """What one rank did in one forward and backward.

    Attributes:
        counts: Of executed collectives.
        errors: The worst output and the worst gradient: what it is, and max |a - b| / max |b|.
        split: Parameters of which this rank holds a part.
        deferred: Parameters whose gradient was left a partial sum: whoever reads it makes the reduction.
    """

    counts: Counts
    errors: Mapping[str, tuple[str, float]]
    split: tuple[str, ...]
    deferred: tuple[str, ...]

    @property
    def error(self) -> float:
        """The worst of all; nan is worse than everything."""
        return max((e for _, e in self.errors.values()), key=lambda e: (e != e, e))


def reference_of(dense: nn.Module, example: Inputs) -> Reference:
    """What ``dense`` (in float64) computes; leaves no gradients on it."""
    outputs = call(dense, random_inputs(dense, example, COMPARED))
    fixed_loss(outputs).backward()  # type: ignore[no-untyped-call]
    kept = {path: value.detach().clone() for path, value in named_tensors(outputs)}
    gradients = {name: parameter.grad for name, parameter in dense.named_parameters()}
    dense.zero_grad(set_to_none=True)
    return Reference(example, kept, gradients, outermost(block_paths(dense.named_modules())))


def peer_run(cls: Any, folder: Path, reference: Reference) -> Run:
    """The checkpoint in ``folder``, loaded and split by transformers (``tp_plan="auto"``).

    Raises:
        RankError: It cannot be loaded, or a rank failed.
    """
    return _worst(run_ranks(_peer_on_rank, RANKS, "gloo", (cls, folder, reference), LONGEST_S))


def colrow_run(dense: nn.Module, p: Plan, reference: Reference) -> Run:
    """``dense`` (in float64) split by a plan.

    Raises:
        RankError: A rank failed.
    """
    return _worst(run_ranks(_colrow_on_rank, RANKS, "gloo", (dense, p, reference), LONGEST_S))


def loaded(cls: Any, folder: Path, **arguments: Any) -> Any:
    """The model in ``folder``, its experts computed by operators that know float64 too."""
    model = cls.from_pretrained(str(folder), dtype=COUNTED, **arguments)
    set_implementation: Any = getattr(model, "set_experts_implementation", None)
    if set_implementation is not None:
        set_implementation("batched_mm")
    return model.eval()


def pattern(path: str) -> str:
    """``path`` with ``*`` for the numbers of blocks."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.|$)", "*", path)


def _peer_on_rank(cls: Any, folder: Path, reference: Reference) -> Run:
    from transformers.distributed import DistributedConfig

    split = DistributedConfig(tp_size=RANKS, tp_plan="auto")
    return _measured(loaded(cls, folder, distributed_config=split), reference, lambda _, value: _full(value))


def _colrow_on_rank(dense: nn.Module, p: Plan, reference: Reference) -> Run:
    specs = {parameter.edit.fqn: spec_of(parameter.edit, p.schedules[0].edits) for parameter in p.parameters}
    model = parallelize(copy.deepcopy(dense).to(COUNTED), p)
    return _measured(model, reference, lambda fqn, value: _full(as_dense(value, specs[fqn])))


def _measured(model: nn.Module, reference: Reference, full: Full) -> Run:
    """Count in float32, then compare in float64: random weights are drawn in float32, so that none changes."""
    counts = _counts(model, reference)
    model.zero_grad(set_to_none=True)
    model.to(COMPARED)
    outputs = call(model, random_inputs(model, reference.example, COMPARED))
    fixed_loss(outputs).backward()  # type: ignore[no-untyped-call]
    given = dict(model.named_parameters())
    split = tuple(name for name, value in given.items() if _is_split(value))
    deferred = tuple(name for name, value in given.items() if _is_partial(value.grad))
    found = {path: _full(value.detach()) for path, value in named_tensors(outputs)}
    errors = {path: error_of(found[path], value) for path, value in reference.outputs.items() if path in found}
    errors |= {path: float("inf") for path in reference.outputs.keys() ^ found.keys()}
    gradients = {name: None if value.grad is None else full(name, value.grad) for name, value in given.items()}
    judged, small, none = gradient_errors(gradients, reference.gradients, reference.blocks)
    of_gradients = judged | small | {name: float("inf") for name in none}
    return Run(counts, _worst_of(errors, of_gradients), split, deferred)


def _counts(model: nn.Module, reference: Reference) -> Counts:
    counts: Counts = {"forward": {}, "backward": {}}
    for collective in count_collectives(model, random_inputs(model, reference.example, COUNTED), backward=True):
        seen = counts[collective.direction].setdefault(collective.kind, [0, 0])
        seen[0] += 1
        seen[1] += collective.nbytes
    return counts


def _worst_of(outputs: Mapping[str, float], gradients: Mapping[str, float]) -> dict[str, tuple[str, float]]:
    return {"output": _largest(outputs), "gradient": _largest(gradients)}


def _full(value: Any) -> Tensor:
    whole: Tensor = value.full_tensor() if isinstance(value, DTensor) else value
    return whole.detach().clone()


def _is_split(value: Any) -> bool:
    return isinstance(value, DTensor) and not all(placement.is_replicate() for placement in value.placements)


def _is_partial(gradient: Any) -> bool:
    return isinstance(gradient, DTensor) and any(placement.is_partial() for placement in gradient.placements)


def _largest(errors: Mapping[str, float]) -> tuple[str, float]:
    return max(errors.items(), key=lambda item: (item[1] != item[1], item[1]), default=("", 0.0))


def _worst(runs: list[Run]) -> Run:
    """Rank 0's counts with the errors of the rank that is furthest off: ranks that differ cannot all be right."""
    worst = max(runs, key=lambda run: (run.error != run.error, run.error))
    return Run(runs[0].counts, worst.errors, runs[0].split, runs[0].deferred)
