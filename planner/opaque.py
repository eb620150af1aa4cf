"""Submodules that cannot be traced, each as one operator of the trace: run as they are, on every rank alike.

A data-dependent branch, a loop over what was found, a call into another library: where no route traces a model, the
innermost module that failed and those like it become one operator node each, which reads the module's arguments,
parameters and buffers whole and returns what it returns. The planner has no rule for it, so that all of these stay
replicated; the model's source keeps calling the module. What shapes come out is seen by running it for real, on random
weights and, where they are not known, random arguments. Where that fails, too, the module around it is taken.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import TracebackType
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, get_proxy_mode, track_tensor
from torch.nn.utils.stateless import _reparametrize_module

from .call_record import CallRecorder, itself

OPERATOR = "opaque_module"
NO_GRADIENT = "colrow_no_gradient"
"""Set in the metadata of an FX node through which no gradient flows."""
ATTEMPTS = 12  # traces of one model, each with one more kind of module left as it is
LARGEST = 8e9  # bytes of a module that is run to see what shapes it returns
SCALE = 0.02  # of random weights
_MODULE_CALL = nn.Module._call_impl.__code__
_LIBRARY = torch.library.Library("colrow", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(f"{OPERATOR}(Tensor[] read) -> Tensor[]")  # type: ignore[no-untyped-call]


class CannotRun(Exception):
    """A module that was to be one operator does not run on its own."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path, self.reason = path, reason


def opaque_modules(
    model: nn.Module, refused: BaseException, attempt: Callable[[dict[str, str]], BaseException | None]
) -> dict[str, str]:
    """The modules to leave as they are, path -> why, so that the rest of ``model`` can be traced; {} if none will do.

    Args:
        model: The model that was not traced.
        refused: What its trace raised.
        attempt: Traces with such modules; what it raised, or None.
    """
    paths = {id(module): path for path, module in model.named_modules()}
    kept: dict[str, str] = {}
    error: BaseException | None = refused
    for _ in range(ATTEMPTS):
        if error is None:
            return kept
        cause = _first_cause(error)
        called = _called_modules(error, paths)
        if isinstance(cause, CannotRun) and cause.path in called:
            called = called[: called.index(cause.path)]
        if not called:
            return {}
        reason = f"{type(cause).__name__}: {next(iter(str(cause).splitlines()), '')[:120]}"
        alike = _alike(model, called[-1])
        inside = [path for path in kept if any(path.startswith(f"{outer}.") for outer in alike)]
        if isinstance(cause, CannotRun):
            reason = kept.get(cause.path, reason)
        kept = {path: why for path, why in kept.items() if path not in inside} | dict.fromkeys(alike, reason)
        error = attempt(kept)
    return {}


def findings_of(left: Mapping[str, str]) -> list[str]:
    """One line for all modules in the same place of repeated blocks."""
    places: dict[str, tuple[int, str]] = {}
    for path, reason in left.items():
        count, first = places.get(_place(path), (0, reason))
        places[_place(path)] = count + 1, first
    return [
        f"{place[1:]} ({count}x) cannot be traced and stays whole, as one operator: {reason}"
        for place, (count, reason) in places.items()
    ]


@contextmanager
def as_operators(modules: Mapping[str, nn.Module], recorder: CallRecorder) -> Iterator[None]:
    """While a trace runs, each of ``modules`` (by path) is one operator, and one call to ``recorder``."""
    before = {path: module.__dict__.get("forward") for path, module in modules.items()}
    try:
        for path, module in modules.items():
            module.__dict__["forward"] = _as_operator(module, path, recorder)
        yield
    finally:
        for path, module in modules.items():
            module.__dict__.pop("forward", None)
            if before[path] is not None:
                module.__dict__["forward"] = before[path]


def _as_operator(module: nn.Module, path: str, recorder: CallRecorder) -> Callable[..., Any]:
    forward = module.forward

    def opaque_module(*args: Any, **kwargs: Any) -> Any:
        with torch._C.DisableTorchFunction():  # what is done here is no part of the model
            leaves = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            made, spec = _shapes(module, forward, path, args, kwargs)
            read = [*leaves, *(value for _, value in _state(module))]
            tensors = iter(_node(read, [leaf for leaf in made if isinstance(leaf, Tensor)]))
            return pytree.tree_unflatten([next(tensors) if isinstance(leaf, Tensor) else leaf for leaf in made], spec)

    def run(*args: Any, **kwargs: Any) -> Any:
        return recorder.__torch_function__(opaque_module, (), args, kwargs)

    return run


def _shapes(
    module: nn.Module, forward: Callable[..., Any], path: str, args: Any, kwargs: Any
) -> tuple[list[Any], pytree.TreeSpec]:
    """What the module returns, run for real, flattened.

    Raises:
        CannotRun: It is too large, refuses its arguments, or has a number of its own that is not known.
    """
    if sum(value.numel() * value.element_size() for _, value in _state(module)) > LARGEST:
        raise CannotRun(path, f"its weights have more than {LARGEST / 1e9:g} GB")
    if unknown := next((name for name, value in module.named_buffers() if _decides(value)), None):
        raise CannotRun(path, f"{unknown} may decide its shapes, and its value is not known")
    refused: Exception | None = None
    for with_gradients in (True, False):  # a module may refuse them: then all it returns counts as differentiable
        with (
            unset_fake_temporarily(),
            disable_proxy_modes_tracing(),
            torch.set_grad_enabled(with_gradients),
            torch.random.fork_rng(devices=[]),
        ):
            torch.manual_seed(0)
            state = {name: _leaf(value, with_gradients, SCALE) for name, value in module.named_parameters()}
            state |= {name: _real(value, SCALE) for name, value in module.named_buffers()}
            given = pytree.tree_map_only(Tensor, partial(_leaf, with_gradients=with_gradients), (args, kwargs))
            try:
                with _reparametrize_module(module, state):
                    leaves, spec = pytree.tree_flatten(forward(*given[0], **given[1]))
            except Exception as error:  # the module's own code, on values that are a guess
                refused = error
                continue
            return [_with_gradient(leaf, with_gradients) for leaf in leaves], spec
    raise CannotRun(path, f"{type(refused).__name__}: {refused}") from refused


def _leaf(value: Tensor, with_gradients: bool, scale: float = 1.0) -> Tensor:
    """A value whose readers may show whether they pass a gradient back to it."""
    made = _real(value, scale)
    return made.requires_grad_(with_gradients and (made.is_floating_point() or made.is_complex()))


def _with_gradient(leaf: Any, is_known: bool) -> Any:
    """A result that says whether a gradient flows through it, as far as that is known."""
    if not isinstance(leaf, Tensor):
        return leaf
    return leaf.detach().requires_grad_(not is_known or leaf.requires_grad) if leaf.is_floating_point() else leaf


def _decides(value: Tensor) -> bool:
    """Whether a buffer is a single number, a stride or a length, whose value is not known."""
    unknown = isinstance(value, FakeTensor) or value.is_meta
    return unknown and value.numel() == 1 and not value.is_floating_point() and value.dtype is not torch.bool


def _state(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(), *module.named_buffers()]


def _real(value: Tensor, scale: float = 1.0) -> Tensor:
    """``value`` itself where it has one; else noise, zeros for integers, ones for booleans."""
    if not isinstance(value, FakeTensor) and not value.is_meta:
        return value.detach().clone()
    if value.is_floating_point() or value.is_complex():
        return torch.randn(value.shape, dtype=value.dtype) * scale
    fill = torch.ones if value.dtype is torch.bool else torch.zeros
    return fill(value.shape, dtype=value.dtype)


def _node(read: list[Tensor], made: list[Tensor]) -> list[Tensor]:
    """Fake tensors like ``made``, the outputs of one operator node that reads ``read``."""
    mode: Any = get_proxy_mode()
    if mode is None:
        raise RuntimeError("an opaque module runs outside its trace")
    tracer = mode.tracer
    operator = getattr(torch.ops.colrow, OPERATOR).default
    proxy = tracer.create_proxy("call_function", operator, ([tracer.unwrap_proxy(t) for t in read],), {}, name=OPERATOR)
    with disable_proxy_modes_tracing():
        fakes = [torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu") for tensor in made]
    proxy.node.meta["val"] = fakes
    for position, fake in enumerate(fakes):
        output = proxy[position]
        output.node.meta["val"] = fake
        output.node.meta[NO_GRADIENT] = not made[position].requires_grad
        track_tensor(fake, output, constant=None, tracer=tracer)
    return fakes


def _first_cause(error: BaseException) -> BaseException:
    """The error at the root, but no further than where a module was found not to run on its own."""
    while not isinstance(error, CannotRun) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _called_modules(error: BaseException, paths: dict[int, str]) -> list[str]:
    """Paths of the submodules whose calls an error came through, outermost first."""
    found: dict[str, None] = {}
    cause: BaseException | None = error
    while cause is not None:
        for module in _modules_of(cause.__traceback__):
            if paths.get(id(module)):
                found.setdefault(paths[id(module)])
        if isinstance(cause, CannotRun):
            break
        cause = cause.__cause__
    return list(found)


def _modules_of(frames: TracebackType | None) -> Iterator[nn.Module]:
    while frames is not None:
        if frames.tb_frame.f_code is _MODULE_CALL:
            yield itself(frames.tb_frame.f_locals["self"])
        frames = frames.tb_next


def _alike(model: nn.Module, path: str) -> list[str]:
    """The module at ``path`` and those of its class in the same place of other blocks."""
    place = _place(path)
    kind = type(model.get_submodule(path))
    return [other for other, module in model.named_modules() if type(module) is kind and _place(other) == place]


def _place(path: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", f".{path}")
