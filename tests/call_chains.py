"""What the tests of edited bodies share: a tracer of call chains, and the proof that every traced call was replaced."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode

from colrow.planner.sites import Frame, frame_of
from colrow.rewrite.bodies import can_edit, edit_module

MODULE_CALL = nn.Module._call_impl.__code__
TORCH = torch.__path__[0]
Chain = tuple[Frame, ...]


class Tracer(TorchFunctionMode):
    """Every torch call made below a module: module, chain, function. An ``if`` and ``no_grad`` are no expressions."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[nn.Module, Chain, Any]] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        frame, chain = sys._getframe(1), []
        while frame is not None and frame.f_code is not MODULE_CALL:
            file = frame.f_code.co_filename
            if chain or not file.startswith(TORCH) or file.startswith(f"{TORCH}/nn/modules"):
                chain.append(frame_of(frame.f_code, frame.f_lasti))
            frame = frame.f_back
        if frame is not None and chain and getattr(func, "__name__", "") not in ("__bool__", "_set_grad_enabled"):
            self.calls.append((frame.f_locals["self"], tuple(reversed(chain)), func))
        return func(*args, **(kwargs or {}))

    def chains(self, module: nn.Module, name: str) -> list[Chain]:
        """The distinct chains of one module's calls of the function called ``name``, in order."""
        found = [c for m, c, func in self.calls if m is module and getattr(func, "__name__", "") == name]
        return list(dict.fromkeys(found))


def traced(model: nn.Module, *args: Any, **kwargs: Any) -> Tracer:
    with Tracer() as tracer, torch.no_grad():
        model(*args, **kwargs)
    return tracer


def identity(func, /, *args, **kwargs):
    return func(*args, **kwargs)


def edit_everything(model: nn.Module, tracer: Tracer, replacement: Callable[..., Any] | None = None) -> None:
    edits: dict[int, tuple[nn.Module, dict[Chain, Any]]] = {}
    for module, chain, _ in tracer.calls:
        assert can_edit(chain) is None, can_edit(chain)
        edits.setdefault(id(module), (module, {}))[1][chain] = replacement or identity
    for module, of_module in edits.values():
        edit_module(module, of_module)


@dataclass(frozen=True, eq=False)
class Watched:
    """A replacement that shows which site is running."""

    chain: Chain
    running: Any

    def __call__(self, func, /, *args, **kwargs):
        self.running.append(self.chain)
        try:
            return func(*args, **kwargs)
        finally:
            self.running.pop()


class Witness(TorchFunctionMode):
    """Which site every torch call runs in."""

    def __init__(self) -> None:
        super().__init__()
        self.running: list[Chain] = []
        self.seen: list[tuple[Chain, Any]] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if self.running:
            self.seen.append((self.running[-1], func))
        return func(*args, **(kwargs or {}))


def assert_every_call_replaced(model: nn.Module, *args: Any, **kwargs: Any) -> Tracer:
    """Replaces every traced call and compares, call by call, the sites that then run with the traced ones."""
    with torch.no_grad():
        expected = model(*args, **kwargs)
    tracer = traced(model, *args, **kwargs)
    witness = Witness()
    edits: dict[int, tuple[nn.Module, dict[Chain, Any]]] = {}
    for module, chain, _ in tracer.calls:
        assert can_edit(chain) is None, can_edit(chain)
        edits.setdefault(id(module), (module, {}))[1][chain] = Watched(chain, witness.running)
    for module, of_module in edits.values():
        edit_module(module, of_module)
    with witness, torch.no_grad():
        actual = model(*args, **kwargs)
    assert witness.seen == [(chain, func) for _, chain, func in tracer.calls]
    assert torch.equal(first_tensor(actual), first_tensor(expected))
    return tracer


def first_tensor(value: Any) -> Tensor:
    """A model's output: itself, or the first field of a model output."""
    return value if isinstance(value, Tensor) else value[0]


def assert_compilers_see_through(model: nn.Module, inputs: dict[str, Any]) -> None:
    """Replaces every traced call and runs torch.compile(fullgraph), torch.export and make_fx on the result."""
    expected = first_tensor(model(**inputs))
    edit_everything(model, traced(model, **inputs))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.equal(first_tensor(compiled(**inputs)), expected)
    exported = torch.export.export(model, (), inputs, strict=False)
    assert torch.equal(first_tensor(exported.module()(**inputs)), expected)
    tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
    run = lambda tensors: first_tensor(model(**{**inputs, **tensors}))  # noqa: E731
    graph = make_fx(run, pre_dispatch=True, tracing_mode="fake", _allow_non_fake_inputs=True)(tensors)
    assert any(node.op == "call_function" for node in graph.graph.nodes)
