"""The trace of a form: a call's arguments in sizes that a trace takes, and an operator where an indexing takes all."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch.overrides
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from colrow.planner.graph import Graph
from colrow.planner.sites import Frame, Site, frame_of
from colrow.planner.trace import Inputs, trace

PLAIN = (bool, int, float, str)
_MODULE_CALL = nn.Module._call_impl.__code__
_log = logging.getLogger("torch._subclasses.fake_tensor")


def traced_on(model: nn.Module, inputs: Inputs, sites: Collection[Site]) -> Graph:
    """The graph of a forward, for a plan that moves something at ``sites``.

    Raises:
        TraceError: torch cannot trace it.
    """
    with _quietly(), _Copies(sites):
        return trace(model, inputs)


class _Copies(TorchFunctionMode):
    """``x[:, 0:]`` at a planned site is a copy: a trace has no operator for what takes all, though the forward calls
    it and the plan's move is made there (last-token logits were planned, and all are asked for)."""

    def __init__(self, sites: Collection[Site]) -> None:
        super().__init__()
        self.frames: frozenset[Frame] = frozenset(site.frames[-1] for site in sites if site.frames)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs ``func``."""
        made = func(*args, **(kwargs or {}))
        if func is Tensor.__getitem__ and made.shape == args[0].shape and made.is_floating_point() and self._is_site():
            return made.clone()
        return made

    def _is_site(self) -> bool:
        frame = sys._getframe(2)
        while frame is not None and frame.f_code is not _MODULE_CALL:
            if frame_of(frame.f_code, frame.f_lasti) in self.frames:
                return True
            frame = frame.f_back  # type: ignore[assignment]
        return False


@contextmanager
def _quietly() -> Iterator[None]:
    """torch logs a page for every operator that does not take its sizes; what is refused says why itself."""
    before, _log.disabled = _log.disabled, True
    try:
        yield
    finally:
        _log.disabled = before


def examples(planned: Mapping[str, Any], given: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Inputs that stand for the ``given`` ones, by name: where they come with a cache, with masks of the new tokens
    alone (traces have no cache; with other masks they take long to fail); in the planned sizes; in their own."""
    kept = {name: value for name, value in given.items() if value is not None and _is_open(value)}
    kept |= {"use_cache": False} if "use_cache" in kept else {}  # traces have none
    common = [(v.shape, planned[k].shape) for k, v in kept.items() if _are_alike(v, planned.get(k))]
    batch = {mine[0]: theirs[0] for mine, theirs in common if mine}
    sizes = {n: m for mine, theirs in reversed(common) for n, m in zip(mine[1:], theirs[1:], strict=True)}

    def stand_in(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if value.dim() == 0 and not value.requires_grad:  # the tokens that a loss is divided by
            return 1.0 if value.is_floating_point() else 1
        shape = [(sizes if d else batch).get(n, n) for d, n in enumerate(value.shape)]
        return torch.zeros(shape, dtype=value.dtype)

    def without_past(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        queries, keys = value.shape[-2:] if value.dim() > 3 else (0, 0)  # hidden states have three dims
        return value.detach()[..., keys - queries :] if queries in sizes and keys > queries else value.detach()

    if any(value is not None and not _is_open(value) for value in given.values()):
        yield {name: _mapped(without_past, value) for name, value in kept.items()}
    yield {
        name: planned[name] if _are_alike(value, planned.get(name)) else _mapped(stand_in, value)
        for name, value in kept.items()
    }
    yield {name: _mapped(lambda v: v.detach() if isinstance(v, Tensor) else v, value) for name, value in kept.items()}


def has_floats(value: Any) -> bool:
    """Whether a floating-point tensor is among its leaves."""
    if isinstance(value, Mapping):
        return any(map(has_floats, value.values()))
    if isinstance(value, (list, tuple)):
        return any(map(has_floats, value))
    return isinstance(value, Tensor) and value.is_floating_point()


def _are_alike(value: Any, planned: Any) -> bool:
    return isinstance(value, Tensor) and isinstance(planned, Tensor) and value.dim() == planned.dim()


def _is_open(value: Any) -> bool:
    """Whether it is made of tensors and plain values, so that a trace may take it."""
    if isinstance(value, Mapping):
        return all(map(_is_open, value.values()))
    if isinstance(value, (list, tuple)):
        return all(map(_is_open, value))
    return isinstance(value, (Tensor, type(None), *PLAIN))


def _mapped(change: Callable[[Any], Any], value: Any) -> Any:
    """``value`` with every leaf changed, in containers of its types."""
    leaves, spec = pytree.tree_flatten(value)
    return pytree.tree_unflatten([change(leaf) for leaf in leaves], spec)
