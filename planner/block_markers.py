"""Marker nodes: what stands in a trace for the entry, the exit or the whole of a block.

A marker is put into the traced graph directly, as torch's higher-order operators do it, and not through the dispatcher:
a deep model has hundreds of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.fx
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, get_proxy_mode, track_tensor

Make = Callable[[], list[Tensor]]


def block_marker(tensors: list[Tensor], key: int, part: str) -> list[Tensor]:
    """The target of marker nodes: the values that go in, the key of their fold call, and ``enter``, ``exit`` or
    ``call``. A node stands for the one value that comes out, or for the list of several."""
    raise RuntimeError("block markers exist in traces only")


def marked(tensors: Sequence[Tensor], key: int, part: str) -> list[Tensor]:
    """New values like ``tensors``, made by a marker node that reads them."""
    return _mark(tensors, key, part, lambda: [torch.empty_like(tensor) for tensor in tensors])


def stand_ins(tensors: Sequence[Tensor], key: int, like: Sequence[Tensor]) -> list[Tensor]:
    """New values of the shapes and dtypes of ``like``, made by a marker node that reads ``tensors``."""
    return _mark(tensors, key, "call", lambda: [_made_like(tensor) for tensor in like])


def _made_like(tensor: Tensor) -> Tensor:
    """A new fake tensor of this shape and dtype, without asking the fake mode what ``empty`` returns (0.2 ms)."""
    if not isinstance(tensor, FakeTensor):
        return torch.empty_like(tensor)
    with unset_fake_temporarily():
        shape_only = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    return FakeTensor(tensor.fake_mode, shape_only, tensor.fake_device)


def _mark(tensors: Sequence[Tensor], key: int, part: str, make: Make) -> list[Tensor]:
    mode: Any = get_proxy_mode()
    if mode is None:
        raise RuntimeError("a folded block runs outside its trace")
    tracer = mode.tracer
    nodes = [tracer.unwrap_proxy(tensor).node for tensor in tensors]
    node = tracer.graph.create_node("call_function", block_marker, (nodes, key, part), name="block")
    proxy: Any = torch.fx.Proxy(node, tracer)
    with disable_proxy_modes_tracing():
        made = make()
    for position, tensor in enumerate(made):
        track_tensor(tensor, proxy if len(made) == 1 else proxy[position], constant=None, tracer=tracer)
    return made
