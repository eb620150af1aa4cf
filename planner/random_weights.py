"""Random values for every weight of a model, so that no mistake hides behind a zero bias or a norm of one."""

from __future__ import annotations

import torch
from torch import nn


@torch.no_grad()
def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Fill ``model`` with random values in place, the same for the same seed, and return it.

    Freshly initialised models are too kind to a rewrite: biases are 0, norms 1, running statistics 0 and 1, and a bias
    added on every rank or a norm weight applied twice changes nothing. Here a parameter of two or more dims is normal
    with the variance 1 / fan-in, which keeps activations near 1 at every depth, and one of fewer is 1 or 0 as it was,
    plus noise. Persistent floating-point buffers get positive noise (running variances must be); those that are not
    saved are computed from the configuration (rotary frequencies, masks) and stay.

    Args:
        model: A model with real weights; those on meta are left alone. Tied weights stay tied.
        seed: Seeds a generator of its own.
    """
    generator = torch.Generator().manual_seed(seed)

    def noise(like: torch.Tensor, scale: float) -> torch.Tensor:
        # Drawn in float32 and scaled before the cast: bf16 and fp64 copies of a model then hold the same weights.
        return (torch.randn(like.shape, generator=generator) * scale).to(like)

    for parameter in model.parameters():
        if parameter.is_meta or not parameter.is_floating_point() or not parameter.numel():
            continue
        if parameter.dim() >= 2:
            parameter.copy_(noise(parameter, _fan_in(parameter) ** -0.5))
        else:
            centre = float(parameter.float().mean())
            parameter.copy_(noise(parameter, 0.1) + (round(centre) if abs(centre) < 1e3 else 0))
    for _, buffer in persistent_buffers(model):
        if buffer.is_floating_point() and not buffer.is_meta and buffer.numel():
            buffer.copy_(noise(buffer, 0.1).abs() + 0.5)
    return model


def _fan_in(weight: torch.Tensor) -> int:
    """Terms in each output's sum: of an image convolution exactly, else the larger inner dim.

    Layers store ``[out, in]`` or ``[in, out]`` and experts ``[experts, out, in]`` or the other way round; which of them
    cannot be told from the weight, and a factor of 2 in the scale does no harm.
    """
    inner = weight.shape[1:]
    return inner.numel() if weight.dim() >= 4 else max(inner)


def persistent_buffers(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """The buffers that ``state_dict`` saves, by fqn, each tensor once."""
    saved = []
    for fqn, buffer in model.named_buffers():
        path, _, name = fqn.rpartition(".")
        if name not in model.get_submodule(path)._non_persistent_buffers_set:
            saved.append((fqn, buffer))
    return saved
