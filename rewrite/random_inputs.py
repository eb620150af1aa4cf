"""Inputs that hide nothing: random where they were constant, and with some padding where there is a mask."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from colrow.planner.trace import Inputs

SEED = 1


def call(model: nn.Module, inputs: Inputs) -> Any:
    """``model`` on keyword arguments, or on a tuple of positional ones."""
    return model(*inputs) if isinstance(inputs, tuple) else model(**inputs)


def random_inputs(model: nn.Module, example: Inputs, dtype: torch.dtype) -> Inputs:
    """A copy of ``example`` to run ``model`` on, the same every time.

    Floating-point tensors get ``dtype`` and, if all their entries are equal, random ones. So do token ids (within
    the vocabulary). An ``attention_mask`` [batch, positions] of ones gets padding at the end of every other sequence,
    first positions excepted: no query is left without a key.
    """
    generator = torch.Generator().manual_seed(SEED)

    def random_input(name: str, value: Any) -> Any:
        if isinstance(value, tuple | list):
            return type(value)(random_input(name, part) for part in value)
        if not isinstance(value, Tensor):
            return value
        constant = value.numel() > 1 and bool((value == value.flatten()[0]).all())
        if value.is_floating_point():
            drawn = torch.randn(value.shape, generator=generator) if constant else value
            return drawn.to(dtype)
        if constant and name.endswith("input_ids"):
            return torch.randint(_rows(model), value.shape, generator=generator).to(value.dtype)
        if name.endswith("attention_mask") and value.dim() == 2 and bool(value.all()):
            padded = value.clone()
            padded[1::2, max(1, value.shape[1] - value.shape[1] // 4) :] = 0
            return padded
        return value

    if isinstance(example, tuple):
        return tuple(random_input("", value) for value in example)
    return {name: random_input(name, value) for name, value in example.items()}


def _rows(model: nn.Module) -> int:
    """Token ids that every embedding of the vocabulary knows."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    declared = getattr(text, "vocab_size", None)
    if isinstance(declared, int) and declared > 0:
        return declared
    return min((m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)), default=1)
