"""Blocks: direct children of a ModuleList or Sequential with two or more modules."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn


def block_paths(model: nn.Module) -> list[str]:
    """Paths of all blocks, in the model's order."""
    return [
        f"{name}.{child}" if name else child
        for name, module in model.named_modules()
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module) > 1
        for child, _ in module.named_children()
    ]


def outermost(paths: Iterable[str]) -> list[str]:
    """Those that lie in no other of them."""
    listed = list(paths)
    known = set(listed)

    def inside(path: str) -> bool:
        parts = path.split(".")
        return any(".".join(parts[:depth]) in known for depth in range(1, len(parts)))

    return [path for path in listed if not inside(path)]
