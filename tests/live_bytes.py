"""Bytes of tensors alive, counted at PyTorch's dispatcher by code that knows nothing of colrow.

Every storage that an operator makes while the mode is on counts from then until Python's last reference to it is gone.
What was there before (weights, inputs) does not count, nor does a kernel's scratch space.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts while it is on.

    Attributes:
        now: Bytes alive of what was made since.
        peak: The most there were at once.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: dict[int, weakref.ref[Any]] = {}
        self._before = [local(t).untyped_storage() for t in known]
        self._known = {storage._cdata for storage in self._before}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        before = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if _is_plain(t)}
        for tensor in tree_leaves(made):
            if _is_plain(tensor) and tensor.untyped_storage()._cdata not in before:
                self._add(tensor)
        return made

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, nbytes = storage._cdata, storage.nbytes()
        if key in self._alive or key in self._known:
            return

        def gone(_: Any) -> None:
            self.now -= nbytes
            self._alive.pop(key, None)

        self._alive[key] = weakref.ref(storage, gone)
        self.now += nbytes
        self.peak = max(self.peak, self.now)


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor that may be spread over ranks."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Of their storages on this rank, each once."""
    storages = {local(t).untyped_storage()._cdata: local(t).untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def _is_plain(value: Any) -> bool:
    return isinstance(value, Tensor) and not isinstance(value, DTensor) and value.layout is torch.strided
