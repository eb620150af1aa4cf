"""Records every torch API call made while a model runs: its module, its chain of Python frames, its arguments.

The chain is what lets a plan say *where* a reduction goes and the rewriter put it there: every ATen node of the
trace is tagged with the API
call that made it, and a call is an expression in somebody's source.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass
from types import CodeType
from typing import Any

import torch.fx.traceback
import torch.nn as nn
from torch.fx.experimental.proxy_tensor import (
    disable_proxy_modes_tracing,
    get_proxy_mode,
    get_proxy_slot,
    set_proxy_slot,
)
from torch.overrides import TorchFunctionMode

from . import folding
from .measured import Measured, Reading, Shape
from .written_out import CODES, written_out

TAG = "colrow_call"
_MODULE_CALL = nn.Module._call_impl.__code__
_TORCH = torch.__path__[0]
_LAYERS = f"{_TORCH}/nn/modules/"
_MODULES = f"{_LAYERS}module.py"
_OWN = (__file__, folding.__file__)


_SHAPE = torch.Tensor.shape.__get__  # type: ignore[attr-defined]
_SIZE = torch.Tensor.size
_COUNTS = (torch.Tensor.numel, torch.Tensor.nelement, torch.numel)


@dataclass(frozen=True)
class RawCall:
    """One API call as it was seen.

    Attributes:
        module: The module whose forward runs.
        frames: ``(code, last instruction)`` from that forward inward.
        function: The API function.
        leaves: Arguments and keyword arguments, flattened; a traced tensor as the FX node that made it.
    """

    module: nn.Module | None
    frames: tuple[tuple[CodeType, int], ...]
    function: Callable[..., Any]
    leaves: tuple[Any, ...]


class CallRecorder(TorchFunctionMode):
    """Keeps a `RawCall` per API call and tags the FX nodes traced inside it with its index."""

    def __init__(self, model: nn.Module, but: Container[int] = ()) -> None:
        """Records the calls of ``model``; those of modules whose ids are in ``but`` are their callers' calls."""
        super().__init__()
        self.own = frozenset(id(module) for module in model.modules() if id(module) not in but)
        self.calls: list[RawCall] = []
        self.measured: dict[Any, set[Reading]] = {}
        """FX node -> dims whose length the model's code has read."""
        self.let_go: dict[Any, int] = {}
        """FX node -> how many calls had been made when the model's code no longer held the value."""
        self._watched: list[weakref.ref[torch.Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs ``func`` with its tag in the tracer's current metadata."""
        if func is _SIZE or func == _SHAPE:
            lengths = func(*args, **(kwargs or {}))
            origin = _made_by(args[0], _tracer())
            read = self.measured.setdefault(origin, set())
            if isinstance(lengths, int):
                dim = (args[1] if len(args) > 1 else (kwargs or {}).get("dim", 0)) % args[0].dim()
                read.add(dim)
                return Measured.read(lengths, origin, dim, read)
            return Shape.of(lengths, origin, read)
        if func in _COUNTS:
            self.measured.setdefault(_made_by(args[0], _tracer()), set()).update(range(args[0].dim()))
        form = written_out(func, args, kwargs or {})
        if form is not None:
            with self:
                return form(*args, **(kwargs or {}))
        module, frames = _caller(self.own)
        self.calls.append(RawCall(module, frames, func, _leaves(args, kwargs or {})))
        meta = torch.fx.traceback.current_meta
        before = meta.get("custom")
        meta["custom"] = {**(before or {}), TAG: len(self.calls) - 1}
        tracer = _tracer()
        given = [(t, get_proxy_slot(t, tracer, None)) for t in args if isinstance(t, torch.Tensor)] if tracer else []
        try:
            result = _apart(func(*args, **(kwargs or {})), given, tracer)
        finally:
            if before is None:
                del meta["custom"]
            else:
                meta["custom"] = before
        if tracer is not None:
            self._watch(result, tracer)
        return result

    def _watch(self, result: Any, tracer: Any) -> None:
        """Notes when the last reference to a tensor goes: a local outlives its last reader until it is assigned anew
        or its function returns."""
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            node = _made_by(tensor, tracer) if isinstance(tensor, torch.Tensor) else None
            if node is not None:

                def gone(_: Any, node: Any = node) -> None:
                    self.let_go[node] = len(self.calls)

                self._watched.append(weakref.ref(tensor, gone))


def _apart(result: Any, given: list[tuple[torch.Tensor, Any]], tracer: Any) -> Any:
    """``result``; a new tensor where it is an argument returned as it is (dropout in evaluation, a cast to the same
    dtype): the trace would take later readers of that argument for readers of the result. What was changed in place
    stays one tensor."""
    for tensor, before in given:
        now = get_proxy_slot(tensor, tracer, None) if tensor is result else None
        if before is None or now is None or now is before or _changes(now.proxy.node.target):
            continue
        with disable_proxy_modes_tracing():
            fresh = tensor.view_as(tensor)
        set_proxy_slot(fresh, tracer, now)
        set_proxy_slot(tensor, tracer, before)
        return fresh
    return result


def _changes(operator: Any) -> bool:
    """Whether an operator writes to an argument."""
    schema = getattr(operator, "_schema", None)
    return schema is None or schema.is_mutable


def flat(tree: Any) -> Iterator[Any]:
    """Leaves of nested tuples, lists, dicts and slices: the numbering that edits of a call use."""
    if isinstance(tree, (tuple, list)):
        for item in tree:
            yield from flat(item)
    elif isinstance(tree, dict):
        for item in tree.values():
            yield from flat(item)
    elif isinstance(tree, slice):
        yield from (tree.start, tree.stop, tree.step)
    else:
        yield tree


def _leaves(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    tracer = _tracer()
    return tuple(
        _made_by(leaf, tracer) if isinstance(leaf, torch.Tensor) else leaf for leaf in flat((args, dict(kwargs)))
    )


def _tracer() -> Any:
    mode = get_proxy_mode()
    return mode.tracer if mode is not None else None


def _made_by(tensor: torch.Tensor, tracer: Any) -> Any:
    slot = get_proxy_slot(tensor, tracer, None) if tracer is not None else None
    return slot.proxy.node if slot is not None else None


def itself(module: nn.Module) -> nn.Module:
    """The module behind the stand-in through which make_fx shows modules that have several names."""
    base = getattr(type(module), "get_base", None)
    return module if base is None else base(module)


def _caller(own: frozenset[int]) -> tuple[nn.Module | None, tuple[tuple[CodeType, int], ...]]:
    """The calling module and the frames between its forward and the API call, torch's own plumbing left out.

    A module that is no part of the model (one made when the code was imported, for all) is the caller's call.
    """
    frame = sys._getframe(2)
    chain: list[tuple[CodeType, int]] = []
    is_between = False  # a function written out and the call that it stands for
    while frame is not None:
        code = frame.f_code
        if code is _MODULE_CALL:
            module = itself(frame.f_locals["self"])
            if id(module) in own:
                return module, tuple(reversed(chain))
            chain.clear()
        file = code.co_filename
        internal = file.startswith(_TORCH) and not file.startswith(_LAYERS)
        is_between = is_between and (internal or file in _OWN)
        if not is_between and file not in _OWN and file != _MODULES and (chain or not internal):
            chain.append((code, frame.f_lasti))
        is_between = is_between or code in CODES
        frame = frame.f_back  # type: ignore[assignment]
    return None, ()
