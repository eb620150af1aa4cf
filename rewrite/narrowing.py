"""Whether a float64 model computes in less on its way, as norms that upcast do: then float32 is what is compared."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from colrow.planner.trace import Inputs

from .random_inputs import call


class _Narrowing(TorchFunctionMode):
    """Sees whether any function turns a float64 value that depends on parameters into something narrower."""

    found: bool = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self.found:
            given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            made = [x for x in tree_leaves(result) if isinstance(x, Tensor) and x.requires_grad]
            wide = any(x.requires_grad and x.dtype is torch.float64 for x in given)
            self.found = wide and any(x.dtype is not torch.float64 for x in made)
        return result


def computes_in_float32(dense: nn.Module, inputs: Inputs) -> bool:
    """Whether the float64 model casts a value that depends on parameters down. Runs it once."""
    mode = _Narrowing()
    with torch.enable_grad(), mode:
        call(dense, inputs)
    return mode.found
