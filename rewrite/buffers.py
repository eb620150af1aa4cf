"""Buffers that no checkpoint holds (rotary frequencies, scales), recomputed when a model on meta becomes real."""

from __future__ import annotations

import torch
from torch import nn

from colrow.cost_models.errors import SourceError


def recompute_buffers(model: nn.Module, device: torch.device) -> None:
    """Make buffers on meta real, by the model's own ``_init_weights`` (Hugging Face models recompute theirs there).

    Args:
        model: Its parameters are real and stay as they are.
        device: Where the buffers go.

    Raises:
        SourceError: A buffer is on meta and its model does not recompute it.
    """
    initialisers = {path: module for path, module in model.named_modules() if hasattr(module, "_init_weights")}
    for path, module in model.named_modules():
        absent = [name for name, buffer in module._buffers.items() if buffer is not None and buffer.is_meta]
        if not absent:
            continue
        for name in absent:
            buffer = torch.empty_like(module._buffers[name], device=device)
            module._buffers[name] = _unset(buffer)
        own = [value for value in module._parameters.values() if value is not None]
        for value in own:
            value._is_hf_initialized = True  # transformers leaves such a parameter alone
        around = max(
            (at for at in initialisers if at == "" or path == at or path.startswith(at + ".")), key=len, default=None
        )
        if around is not None:
            with torch.no_grad():
                initialisers[around]._init_weights(module)
        for value in own:
            del value._is_hf_initialized
        for name in absent:
            if _is_unset(module._buffers[name]):
                raise SourceError(
                    f"{path}.{name}",
                    "this buffer is on meta, and neither the checkpoint nor the model's _init_weights gives it values",
                    remedy="Build the model with real buffers: put only its parameters on meta.",
                )


def _unset(buffer: torch.Tensor) -> torch.Tensor:
    """Fill with what no initialisation writes everywhere."""
    if buffer.is_floating_point() or buffer.is_complex():
        return buffer.fill_(float("nan"))
    return buffer.fill_(True) if buffer.dtype is torch.bool else buffer.fill_(torch.iinfo(buffer.dtype).min + 1)


def _is_unset(buffer: torch.Tensor | None) -> bool:
    if buffer is None or not buffer.numel():
        return False
    if buffer.is_floating_point() or buffer.is_complex():
        return bool(buffer.isnan().all())
    return torch.equal(buffer, _unset(buffer.clone()))
