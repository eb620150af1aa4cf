"""verify(): a plan applied to a model that runs on N ranks, against the dense model.

In float64, with every weight, norm, bias and buffer random. One forward and backward is compared in outputs and
gradients and counted in collectives; then two optimiser steps with gradient clipping are made on both models, with SGD
and with AdamW, and losses, norms and parameters compared. All that ranks hold in common must be equal by bit.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _NormBase

from colrow.cost_models.errors import UsageError
from colrow.planner.blocks import block_paths, outermost
from colrow.planner.plan_model import Plan
from colrow.planner.random_weights import persistent_buffers, randomize
from colrow.planner.returned_values import parts_of
from colrow.planner.trace import Inputs

from .comparison import (
    FLOAT32_TOLERANCE,
    FLOAT64_TOLERANCE,
    Count,
    Report,
    TrainingErrors,
    error_of,
    gradient_errors,
)
from .counting import fixed_loss, recorded_collectives
from .groups import group_of
from .narrowing import computes_in_float32
from .parallel import parallelize, spec_of
from .random_inputs import call, random_inputs
from .ranks import Backend, run_ranks
from .split_outputs import gathered
from .storage import as_dense

STEPS = 2
# AdamW's step for an entry is lr * g / (|g| + eps): where g is rounding, a small eps makes a whole step of it.
OPTIMISERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=1e-2, momentum=0.9),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, eps=1e-5),
}
LARGEST_NORM = 1.0  # what gradients are clipped to, or half their norm: they are always clipped
Full = Callable[[str, Tensor], Tensor]


def verify(
    build_model: Callable[[], nn.Module], example_inputs: Inputs, p: Plan, ranks: Backend = "simulated"
) -> Report:
    """Compare the model rewritten by ``p``, on ``p.tp`` ranks, with the dense model.

    Dropout is off on both sides; norms over the batch learn where the plan was made for training. Bytes of collectives
    are compared in the plan's own dtype.

    Args:
        build_model: Makes the dense model on the CPU, the same every time; its values are replaced by random ones.
        example_inputs: Of one forward; constant ones are replaced by random values, masks get some padding.
        p: Made for this model and inputs.
        ranks: "simulated" (threads of this process) or "gloo" (processes).

    Raises:
        UsageError: The model cannot run in float64, or has no output to differentiate.
        RankError: A rank failed.
    """
    dense = _without_draws(randomize(_runnable(build_model()).double()), p)
    inputs = random_inputs(dense, example_inputs, torch.float64)
    in_float32 = computes_in_float32(dense, inputs)
    reference = {name: _steps(copy.deepcopy(dense), inputs, name, _whole, _as_it_is) for name in OPTIMISERS}
    results = run_ranks(_on_rank, p.tp, ranks, (dense, inputs, p))
    executed, notes = _executed(build_model, example_inputs, p, ranks, results[0])
    report = _report(
        dense, p, reference, results, FLOAT32_TOLERANCE if in_float32 else FLOAT64_TOLERANCE, executed, notes
    )
    if report.ok():
        return report
    return replace(report, first_divergence=_first_divergence(dense, inputs, p, ranks, report))


@dataclass
class Steps:
    """What one model did: lists by step, dicts by parameter."""

    outputs: dict[str, Tensor] = field(default_factory=dict)  # of the first step
    gradients: dict[str, Tensor | None] = field(default_factory=dict)  # of the first step, before clipping
    collectives: list[Count] = field(default_factory=list)  # of the first step
    losses: list[float] = field(default_factory=list)
    loss_scales: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    parameters: dict[str, Tensor] = field(default_factory=dict)  # after the last step
    buffers: dict[str, Tensor] = field(default_factory=dict)  # after the last step
    fingerprints: dict[str, str] = field(default_factory=dict)  # of all that ranks hold in common

    def without_tensors(self) -> Steps:
        """What is left once rank 0 has sent the tensors."""
        return Steps(collectives=self.collectives, fingerprints=self.fingerprints)


def _steps(model: nn.Module, inputs: Inputs, optimiser: str, full: Full, whole: Full) -> Steps:
    """Train ``model`` for ``STEPS`` steps; ``full`` turns a parameter's value or gradient into the dense tensor,
    ``whole`` an output."""
    made = Steps()
    step = OPTIMISERS[optimiser]([p for p in model.parameters() if p.requires_grad])
    for i in range(STEPS):
        step.zero_grad()
        with recorded_collectives() as recorder:
            outputs = call(model, inputs)
            loss = _loss(outputs, inputs)
            recorder.direction = "backward"
            loss.backward()  # type: ignore[no-untyped-call]
        made.losses.append(float(loss.detach()))
        made.loss_scales.append(_loss_scale(outputs, loss, inputs))
        if i == 0:
            made.outputs = {path: whole(path, value.detach()).clone() for path, value in named_tensors(outputs)}
            made.collectives = sorted((c.kind, c.nbytes, c.direction) for c in recorder.found)
            made.gradients = {n: None if p.grad is None else full(n, p.grad) for n, p in model.named_parameters()}
            made.fingerprints |= {f"output {path}": _fingerprint(value) for path, value in made.outputs.items()}
            made.fingerprints |= _common(model, "gradient", lambda p: p.grad)
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        limit = min(LARGEST_NORM, float(_local(norm)) / 2)
        clipped = torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
        made.norms.append(float(_local(clipped)))
        step.step()
    made.parameters = {n: full(n, p.detach()) for n, p in model.named_parameters()}
    made.buffers = {n: b.detach().clone() for n, b in persistent_buffers(model)}
    made.fingerprints |= _common(model, "parameter", lambda p: p)
    made.fingerprints |= {f"buffer {n}": _fingerprint(b) for n, b in made.buffers.items()}
    return made


def steps_of(dense: nn.Module, inputs: Inputs, optimiser: str) -> Steps:
    """What a dense model does in ``STEPS`` steps; trains it in place."""
    return _steps(dense, inputs, optimiser, _whole, _as_it_is)


def _on_rank(dense: nn.Module, inputs: Inputs, p: Plan) -> dict[str, Steps]:
    """One rank's part of ``verify``; rank 0 returns the dense tensors, the others what must be equal to its."""
    specs = {parameter.edit.fqn: spec_of(parameter.edit, p.schedules[0].edits) for parameter in p.parameters}

    def full(fqn: str, value: Tensor) -> Tensor:
        dense_tensor: Tensor = as_dense(value, specs[fqn]).full_tensor()  # type: ignore[arg-type]
        return dense_tensor.detach().clone()  # a replicated parameter's is the parameter itself

    split, group = dict(p.schedules[0].edits.split_outputs), group_of(None)

    def whole(path: str, value: Tensor) -> Tensor:
        left = path in split and split[path].is_free
        return gathered(value, split[path], group) if left else value

    made = {name: _steps(parallelize(copy.deepcopy(dense), p), inputs, name, full, whole) for name in OPTIMISERS}
    return made if dist.get_rank() == 0 else {name: steps.without_tensors() for name, steps in made.items()}


def _report(
    dense: nn.Module,
    p: Plan,
    reference: dict[str, Steps],
    results: list[dict[str, Steps]],
    tolerance: float,
    executed: tuple[Count, ...],
    notes: tuple[str, ...],
) -> Report:
    mine, first = results[0], next(iter(OPTIMISERS))
    found, true = mine[first], reference[first]
    blocks = outermost(block_paths(dense.named_modules()))
    errors, small, none = gradient_errors(found.gradients, true.gradients, blocks)
    unequal = [
        f"{what} (rank {rank})"
        for rank, result in enumerate(results)
        for name, steps in result.items()
        for what, print_ in steps.fingerprints.items()
        if mine[name].fingerprints.get(what) != print_
    ]
    uncounted = [r for r in range(p.tp) if results[r][first].collectives != found.collectives]
    made = [c for c in p.collectives if c.category != "recomputation"]  # neither model runs checkpointed
    return Report(
        tp=p.tp,
        tolerance=tolerance,
        output_errors=_errors(found.outputs, true.outputs),
        gradient_errors=errors,
        small_gradients=small,
        none_gradients=none,
        trainings=tuple(_training_errors(name, mine[name], reference[name]) for name in OPTIMISERS),
        buffer_errors=_errors(found.buffers, true.buffers),
        unequal=tuple(dict.fromkeys(unequal + [f"collectives (rank {r})" for r in uncounted])),
        collectives_planned=tuple(sorted((c.kind, c.nbytes, c.direction) for c in made)),
        collectives_executed=executed,
        notes=notes,
    )


def _errors(found: Mapping[str, Tensor], dense: Mapping[str, Tensor]) -> dict[str, float]:
    missing = float("inf")
    both = {path: error_of(found[path], value) if path in found else missing for path, value in dense.items()}
    return both | {path: missing for path in found if path not in dense}


def _training_errors(optimiser: str, found: Steps, dense: Steps) -> TrainingErrors:
    losses = zip(found.losses, dense.losses, dense.loss_scales, strict=True)
    norms = zip(found.norms, dense.norms, strict=True)
    return TrainingErrors(
        optimiser,
        tuple(abs(a - b) / scale for a, b, scale in losses),
        tuple(abs(a - b) / b if b else abs(a - b) for a, b in norms),
        _errors(found.parameters, dense.parameters),
    )


def _executed(
    build_model: Callable[[], nn.Module], example_inputs: Inputs, p: Plan, ranks: Backend, counted: dict[str, Steps]
) -> tuple[tuple[Count, ...], tuple[str, ...]]:
    """Executed collectives in the plan's dtype: those of the float64 run, or of one more run in that dtype."""
    dtypes = {parameter.dtype for parameter in p.parameters}
    if dtypes <= {"float64"}:
        return tuple(counted[next(iter(OPTIMISERS))].collectives), ()
    model = _without_draws(randomize(_runnable(build_model())), p)
    values = dict(model.named_parameters(remove_duplicate=False))
    for parameter in p.parameters:
        value = values[parameter.edit.fqn]
        value.data = value.data.to(getattr(torch, parameter.dtype))
    widest = max((getattr(torch, name) for name in dtypes), key=lambda dtype: dtype.itemsize)
    inputs = random_inputs(model, example_inputs, widest)
    counts: list[list[Count]] = run_ranks(_count_on_rank, p.tp, ranks, (model, inputs, p))
    return tuple(counts[0]), (f"collectives counted in {', '.join(sorted(dtypes))}, values compared in float64",)


def _count_on_rank(model: nn.Module, inputs: Inputs, p: Plan) -> list[Count]:
    local = parallelize(copy.deepcopy(model), p)
    with recorded_collectives() as recorder:
        loss = _loss(call(local, inputs), inputs)
        recorder.direction = "backward"
        loss.backward()  # type: ignore[no-untyped-call]
    return sorted((c.kind, c.nbytes, c.direction) for c in recorder.found)


def _first_divergence(dense: nn.Module, inputs: Inputs, p: Plan, ranks: Backend, report: Report) -> str:
    """The first block whose output is another, else the last one whose gradients are."""
    blocks = outermost(block_paths(dense.named_modules()))
    true = _block_outputs(copy.deepcopy(dense), inputs, blocks)
    try:
        found = run_ranks(_blocks_on_rank, p.tp, ranks, (dense, inputs, p, blocks))[0]
    except Exception as failure:  # what is looked into is a wrong model already
        return f"unknown: {failure}"
    if report.forward_max_rel_error <= report.tolerance:
        wrong = {f for f, error in report.gradient_errors.items() if not error <= report.tolerance}
        last = [b for b in true if any(f.startswith(f"{b}.") for f in wrong)]
        return f"in the backward pass of {last[-1]}" if last else "in the backward pass, outside of the blocks"
    for block, value in true.items():
        error = error_of(found[block], value) if block in found else float("nan")
        if found.get(block) is not None and found[block].shape == value.shape and not error <= report.tolerance:
            return f"the output of {block}, error {error:.1e}"
    return "after the last block"


def _blocks_on_rank(dense: nn.Module, inputs: Inputs, p: Plan, blocks: list[str]) -> dict[str, Tensor]:
    return _block_outputs(parallelize(copy.deepcopy(dense), p), inputs, blocks)


@torch.no_grad()
def _block_outputs(model: nn.Module, inputs: Inputs, blocks: list[str]) -> dict[str, Tensor]:
    """The first tensor that each block returned when first called, in the order of the calls."""
    seen: dict[str, Tensor] = {}

    def keep(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            tensors = [value for _, value in named_tensors(output)]
            if path not in seen and tensors:
                seen[path] = tensors[0].detach().clone()

        return hook

    for path in blocks:
        model.get_submodule(path).register_forward_hook(keep(path))
    call(model, inputs)
    return seen


def named_tensors(value: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """``(path, tensor)`` for all tensors in nested containers and mappings; a KV cache is left out."""
    if isinstance(value, Tensor):
        yield path or "output", value
    else:
        for key, part in (parts_of(value) or {}).items():
            yield from named_tensors(part, f"{path}.{key}" if path else key)


def _loss(outputs: Any, inputs: Inputs) -> Tensor:
    """The model's own loss where it was given labels, else the dot product of all outputs with fixed cotangents."""
    own = _own_loss(outputs, inputs)
    try:
        return fixed_loss(outputs) if own is None else own
    except ValueError as error:
        raise UsageError(
            "outputs", str(error), remedy="verify needs a model whose outputs depend on its parameters."
        ) from error


def _own_loss(outputs: Any, inputs: Inputs) -> Tensor | None:
    labelled = isinstance(inputs, Mapping) and ("labels" in inputs or "return_loss" in inputs)
    loss = outputs.get("loss") if labelled and isinstance(outputs, Mapping) else None
    return loss if isinstance(loss, Tensor) else None


def _loss_scale(outputs: Any, loss: Tensor, inputs: Inputs) -> float:
    """What the loss's error is relative to: the loss, or the size a dot product has before terms cancel."""
    terms = [v.detach().double().square().sum() for _, v in named_tensors(outputs) if v.is_floating_point()]
    size = 0.0 if _own_loss(outputs, inputs) is not None else float(torch.stack(terms).sum().sqrt()) / 10
    return max(abs(float(loss.detach())), size) or 1.0


def _whole(fqn: str, value: Tensor) -> Tensor:
    return value.detach().clone()


def _as_it_is(path: str, value: Tensor) -> Tensor:
    return value


def _local(value: Any) -> Tensor:
    whole: Tensor = value.full_tensor() if isinstance(value, DTensor) else value
    return whole


def _common(model: nn.Module, what: str, of: Callable[[nn.Parameter], Tensor | None]) -> dict[str, str]:
    """Fingerprints of replicated parameters or of their gradients: each rank's own copy."""
    found = {}
    for name, parameter in model.named_parameters():
        value: Any = of(parameter)
        if isinstance(value, DTensor) and all(p.is_replicate() for p in value.placements):
            found[f"{what} {name}"] = _fingerprint(value.to_local())
    return found


def _fingerprint(value: Tensor) -> str:
    flat = value.detach().cpu().contiguous().reshape(-1)
    return hashlib.blake2b(flat.view(torch.uint8).numpy().tobytes(), digest_size=16).hexdigest()


def _without_draws(model: nn.Module, p: Plan) -> nn.Module:
    """In evaluation, but for norms over the batch that were planned with the statistics of each batch."""
    norms = [module for module in model.modules() if isinstance(module, _NormBase) and module.training]
    model.eval()
    for module in norms if p.assumptions.get("mode") == "train" else ():
        module.train()
    return model


def _runnable(model: nn.Module) -> nn.Module:
    """Checks a built model and turns its KV cache off.

    Raises:
        UsageError: Weights on meta; experts computed by a grouped matmul, which knows bf16 only.
    """
    where = type(model).__name__
    if any(parameter.is_meta for parameter in model.parameters()):
        raise UsageError(
            where, "its weights are on meta and cannot be run", remedy="Pass a build_model that fills them."
        )
    config: Any = getattr(model, "config", None)
    if getattr(config, "_experts_implementation", None) == "grouped_mm":
        raise UsageError(
            where,
            "its experts are a grouped matmul, which has no float64",
            remedy='Call model.set_experts_implementation("batched_mm") before planning and building.',
        )
    if hasattr(config, "use_cache"):
        config.use_cache = False
    return model
