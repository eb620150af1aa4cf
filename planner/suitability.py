"""Models that cannot be planned or rewritten, whatever their graph: dispatched to devices, or quantised."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from colrow.cost_models.errors import UsageError

from .configurations import refuse_quantised


def refuse_unsuitable(model: nn.Module) -> None:
    """Looks at a model's marks, hooks and dtypes; runs nothing.

    Raises:
        UsageError: Names what is dispatched, quantised or parallel already. (``SourceError`` where the configuration
            says so.)
    """
    where = type(model).__name__
    device_map = getattr(model, "hf_device_map", None)
    if device_map:
        raise UsageError(
            where, "the model is dispatched by a device_map", got=device_map, remedy="Load it without device_map."
        )
    modules = list(model.named_modules())
    for path, module in modules:
        if hasattr(module, "_hf_hook"):
            raise UsageError(
                path or where,
                "accelerate moves its weights about (it has an accelerate hook)",
                got=type(module._hf_hook).__name__,
                remedy="Load the model without device_map, or call accelerate.hooks.remove_hook_from_submodules.",
            )
    refuse_quantised(where, getattr(model, "config", None))
    method = getattr(model, "quantization_method", None)
    if getattr(model, "is_quantized", False) or method:
        raise UsageError(where, "its weights are quantised", got=method, remedy="Load them in bf16, fp16 or fp32.")
    for name, value in (
        (f"{path}.{name}" if path else name, value)
        for path, module in modules
        for name, value in module._parameters.items()
        if value is not None
    ):
        if isinstance(value, DTensor):
            raise UsageError(name, "the model is parallel already", got="a DTensor", remedy="Build the model anew.")
        wrapped = is_traceable_wrapper_subclass(value) and not type(value).__module__.startswith("torch.")
        if wrapped or (value.dtype.itemsize == 1 and value.dtype is not torch.bool):
            raise UsageError(
                name,
                "quantised weights are not supported",
                got=type(value).__name__ if wrapped else value.dtype,
                need="a plain tensor in bf16, fp16, fp32 or fp64",
                remedy="Load the model unquantised.",
            )
