"""Example inputs by what a forward's docstring says: ``states (torch.Tensor of shape (batch_size, length, act_dim))``.

For arguments that no rule of `example_inputs` knows. A dim is a configuration field of that name, a literal, the batch,
an image's side, or else a length.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

_ENTRY = re.compile(r"^\s*(\w+) \(([^\n]*?)of shape\s*[`'\"]*\(([^)\n]*)\)[`'\"]*([^\n]*)", re.MULTILINE)
_COUNTS = r"batch|num_(images|videos|audios|samples|segments)"
_SIDES = r"height|width|image_size|frame_size"


@dataclass(frozen=True)
class Documented:
    """An argument as its docstring has it.

    Attributes:
        dims: Names of its dims.
        dtype: The type's name, as in ``torch.LongTensor``.
        optional: It says so.
    """

    dims: tuple[str, ...]
    dtype: str
    optional: bool


def documented_arguments(forward: Any) -> dict[str, Documented]:
    """Every argument whose shape the docstring of ``forward`` tells."""
    return {
        name: Documented(
            tuple(dim.strip() for dim in dims.split(",") if dim.strip()),
            dtype,
            "optional" in rest,
        )
        for name, dtype, dims, rest in _ENTRY.findall(forward.__doc__ or "")
    }


def documented_tensor(
    argument: Documented,
    configs: list[Any],
    lengths: Mapping[str, int],
    dtype: torch.dtype,
    generator: torch.Generator,
) -> torch.Tensor:
    """A tensor of the documented shape: noise, ones where it is a mask or a boolean, zeros for other integers.

    Args:
        argument: What the docstring says.
        configs: Configurations whose fields may name a dim, the most specific first.
        lengths: ``batch`` and ``seq``.
        dtype: Of floating-point values.
        generator: Seeded.
    """
    shape = tuple(_length(dim, configs, lengths) for dim in argument.dims)
    if "Bool" in argument.dtype:
        return torch.ones(shape, dtype=torch.bool)
    if "Long" in argument.dtype or "Int" in argument.dtype:
        return torch.zeros(shape, dtype=torch.long)
    return torch.randn(shape, generator=generator).to(dtype)


def _length(dim: str, configs: list[Any], lengths: Mapping[str, int]) -> int:
    if dim.isdecimal():
        return int(dim)
    if re.search(_COUNTS, dim):
        return lengths["batch"]
    named = next(_fields(dim, configs), None)
    if named is not None:
        return named
    return lengths["image"] if re.search(_SIDES, dim) else lengths["seq"]


def _fields(dim: str, configs: list[Any]) -> Iterator[int]:
    names = (dim, dim.removesuffix("_dim"), f"{dim}_size", dim.replace("_dim", "_size"))
    for config in configs:
        for name in names:
            value = getattr(config, name, None)
            if type(value) is int and value > 0:
                yield value
