"""Stage 7: a plan applied to a model. The model keeps its classes, its names and its own forward, edited where the
plan says."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import distributed_c10d
from torch.distributed.device_mesh import DeviceMesh
from torch.utils._pytree import tree_leaves, tree_map

from colrow.cost_models.errors import PlanFileError, UsageError, ValidationError
from colrow.planner.blocks import block_paths, outermost
from colrow.planner.called_apart import CALLED_APART
from colrow.planner.edits import CallEdit, ForwardEdits, ParameterEdit
from colrow.planner.moves import Move
from colrow.planner.plan_model import Plan
from colrow.planner.sites import Frame, Site
from colrow.planner.suitability import refuse_unsuitable
from colrow.planner.trace import tied_names

from .agreement import together
from .bodies import edit_module
from .checkpoint import check_checkpoint, load_checkpoint
from .clones import Replacement
from .collectives import all_reduce, apply_move
from .forms import CheckForm, Form, Key
from .groups import TpGroup, group_of, tp_mesh
from .identity import identity
from .optimizer_trial import check_optimizers_of
from .random_draws import RefuseTraining, lacks_draws
from .ranks import agree
from .regions import install_regions
from .replacements import scheduled
from .returned import ReturnedGradients
from .schedules import ChooseSchedule, Running, Stop
from .split_outputs import GatherOutputs, changed_at
from .storage import ParameterSpec, store
from .undoing import all_or_nothing
from .user_hooks import Boundary, guard_calls, guard_hooks, refuse_hooks
from .validation import meta_copy, validate, with_local_shapes


def parallelize(
    model: nn.Module, plan: Plan, mesh: DeviceMesh | None = None, checkpoint: str | Path | None = None
) -> nn.Module:
    """Rewrites ``model`` in place into this rank's part of the planned tensor-parallel model, and returns it.

    Args:
        model: Dense with equal values on every rank, or on meta together with ``checkpoint``.
        plan: Made for this model.
        mesh: Its dim named "tp", else a 1-D mesh; None: the default process group.
        checkpoint: Directory of safetensors files; only this rank's slices are read.

    Raises (on every rank of the group, and the model is as it was):
        UsageError: No group, or one of another size; a model that is dispatched, quantised or rewritten already.
        RankError: Another rank has another plan, did not come, or failed.
        PlanFileError: The plan was made for another model.
        SourceError: A tensor of the checkpoint is missing or misshapen.
        ValidationError: The rewritten model is not the planned one.
    """
    axis, group = tp_mesh(mesh), group_of(mesh)
    _agree(plan, group)
    dense, ((returned, passed), draws_alike, forms) = together(
        lambda: _check(model, plan, group, checkpoint), group, "parallelize"
    )
    with all_or_nothing(model):
        running = Running(plan.schedules)
        together(lambda: edit_bodies(model, plan, group, running), group, "parallelize")
        stored = store(model, [spec_of(p.edit, plan.schedules[0].edits) for p in plan.parameters], axis)
        if checkpoint is not None:
            load_checkpoint(model, stored, checkpoint, axis)
        edits = [schedule.edits for schedule in plan.schedules]
        if len(edits) > 1:
            chooses = ChooseSchedule(model, plan.schedules, running, plan.tp)
            model.register_forward_pre_hook(chooses, with_kwargs=True)
        if draws_alike:
            model.register_forward_pre_hook(RefuseTraining())
        apart = plan.assumptions.get(CALLED_APART, "").split(", ")
        blocks = outermost(block_paths(model.named_modules()))
        regions = install_regions(model, blocks, stored, group, running, edits, apart)
        checks = CheckForm(dense, plan, returned, group, running, forms)
        model.register_forward_pre_hook(checks, with_kwargs=True)
        model.register_forward_pre_hook(InputGradients(group, running, checks), with_kwargs=True)
        if any(not move.is_free for one in edits for _, move in one.split_outputs):
            model.register_forward_hook(GatherOutputs(edits, group, running))
        model.register_forward_hook(ReturnedGradients(plan, group, running))
        if len(edits) > 1:
            model.register_forward_hook(Stop(running), always_call=True)
        guard_calls(model, [region.module for region in regions], passed, running, checks.floats)
        guard_hooks(model, passed, group)
    check_optimizers_of(model, axis)
    _same_random_state(group)
    return model


Validated = tuple[
    tuple[tuple[frozenset[str], ...], dict[str, Boundary]], bool, dict[tuple[int, Key], Form | ValidationError]
]
_validated: dict[tuple[str, str], Validated] = {}
"""By the plan's digest and the model's identity: what each schedule's forward returns and which modules pass values
that are not whole, whether the plan lacks what
training needs, and what was found out about other forms of the forward."""
_validating = threading.Lock()


def _agree(plan: Plan, group: TpGroup) -> None:
    """All ranks start the same plan, or none does; asked through the store, since a collective would hang."""
    agree(distributed_c10d._get_default_store(), plan.digest, group)
    if group.size != plan.tp:
        raise UsageError(
            "mesh",
            "the plan was made for another number of ranks",
            got=group.size,
            need=plan.tp,
            remedy=f"Plan with tp={group.size}, or start {plan.tp} ranks.",
        )


def _same_random_state(group: TpGroup) -> None:
    """All ranks go on from the first one's random state: what is drawn outside split regions must be the same
    everywhere."""
    on_gpu = torch.cuda.is_available() and torch.distributed.get_backend() == "nccl"

    def common(state: Tensor) -> Tensor:
        mine = (state if group.rank == 0 else torch.zeros_like(state)).to(torch.int32)
        return all_reduce(mine.to("cuda" if on_gpu else "cpu"), group).to("cpu", torch.uint8)

    torch.set_rng_state(common(torch.get_rng_state()))
    if on_gpu:
        torch.cuda.set_rng_state(common(torch.cuda.get_rng_state()))


def _check(model: nn.Module, plan: Plan, group: TpGroup, checkpoint: str | Path | None) -> tuple[nn.Module, Validated]:
    """Everything that can be refused, before anything is changed. A plan is validated once per process, for models
    that are alike.

    Returns:
        A copy on meta; the paths of what each schedule's forward returns, and whether training would draw alike on
        all ranks (`lacks_draws`).
    """
    refuse_unsuitable(model)
    check_same_model(model, plan)
    if checkpoint is not None:
        check_checkpoint(model, checkpoint)
    elif any(p.is_meta for p in model.parameters()):
        raise UsageError(type(model).__name__, "the weights are on meta", remedy="Pass checkpoint=DIRECTORY.")
    key, dense = (plan.digest, identity(model)), meta_copy(model)
    with _validating:
        if key not in _validated:
            edited = with_local_shapes(model, plan)
            running = Running(plan.schedules)
            edit_bodies(edited, plan, group, running)
            _validated[key] = validate(dense, edited, plan, running), lacks_draws(dense, plan), {}
        refuse_hooks(model, _validated[key][0][1])
        return dense, _validated[key]


class InputGradients:
    """Pre-hook of the model: inputs that want a gradient get the sum of the ranks' partial ones."""

    def __init__(self, group: TpGroup, running: Running, checks: CheckForm) -> None:
        self.group, self.running, self.checks = group, running, checks

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Copies such inputs; nothing is done, or sent, for inputs without gradients."""
        del module
        partial = self.running.form.inputs
        if not partial or not any(isinstance(v, Tensor) and v.requires_grad for v in tree_leaves((args, kwargs))):
            return None
        named = [*self.checks.named(args, {}), *kwargs]
        number = {name: str(i) for i, name in enumerate(named[: len(args)])}  # positional examples are known by it
        values = dict(zip(named, (*args, *kwargs.values()), strict=True))
        for path in partial:
            for name in named:
                if path.split(".")[0] in (name, number.get(name)):
                    own = tree_map(lambda leaf: leaf, values[name])  # the caller's containers stay as they are
                    values[name] = changed_at(own, path.split(".")[1:], self._copied)
        return tuple(values[name] for name in named[: len(args)]), {name: values[name] for name in kwargs}

    def _copied(self, value: Tensor) -> Tensor:
        return apply_move(value, _COPY, self.group)


_COPY = Move("identity", "all_reduce")


def edit_bodies(model: nn.Module, plan: Plan, group: TpGroup, running: Running) -> None:
    """Edits every forward that any schedule of the plan names."""
    by_site: dict[Site, list[CallEdit | None]] = {}
    for index, schedule in enumerate(plan.schedules):
        for site, edit in schedule.edits.calls.items():
            by_site.setdefault(site, [None] * len(plan.schedules))[index] = edit
    by_module: dict[str, dict[tuple[Frame, ...], Replacement]] = {}
    for site, edits in by_site.items():
        made = scheduled(str(site.frames[-1]), edits, group, running)
        by_module.setdefault(site.module, {})[site.frames] = made
    for path, replacements in by_module.items():
        edit_module(model.get_submodule(path), replacements)


def spec_of(edit: ParameterEdit, edits: ForwardEdits) -> ParameterSpec:
    """The storage's view of a parameter, as a schedule's forward reads it."""
    return ParameterSpec(edit.fqn, edit.dim, edit.layout, edit.fqn in edits.partial, edit.fqn in edits.lifted)


def check_same_model(model: nn.Module, plan: Plan) -> None:
    """Refuses a plan of another model.

    Raises:
        PlanFileError: Names, shapes or ties differ.
    """
    have = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
    want = {p.edit.fqn: p.shape for p in plan.parameters}
    for name in sorted(set(want) - set(have)):
        raise PlanFileError(name, "the plan has a parameter that the model lacks", remedy="Plan this model again.")
    for name in sorted(set(have) - set(want) - set(plan.ties)):
        raise PlanFileError(name, "the plan lacks this parameter of the model", remedy="Plan this model again.")
    ties = tied_names(model.named_parameters(remove_duplicate=False))
    for name in sorted(set(ties) | set(plan.ties)):
        if ties.get(name) != plan.ties.get(name):
            raise PlanFileError(
                name,
                "tied otherwise than planned",
                got=ties.get(name, "not tied"),
                need=plan.ties.get(name, "not tied"),
                remedy="Plan this model again.",
            )
    for name, shape in want.items():
        if have[name] != shape:
            raise PlanFileError(
                name, "the plan was made for another shape", got=have[name], need=shape, remedy="Plan this model again."
            )
