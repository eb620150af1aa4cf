"""Blocks: direct children of a ModuleList or Sequential with two or more modules."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn


def block_paths(modules: Iterable[tuple[str, nn.Module]]) -> list[str]:
    """Paths of all blocks among a model's named modules, in their order."""
    return [
        f"{name}.{child}" if name else child
        for name, module in modules
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module) > 1
        for child, _ in module.named_children()
    ]


class OuterBlocks(dict[str, str]):
    """Path of a module or parameter -> path of the outermost block that contains it, "" if none does; filled as asked.

    Attributes:
        paths: Blocks that lie in no other, in order.
    """

    def __init__(self, blocks: Iterable[str]) -> None:
        super().__init__()
        self.paths = outermost(blocks)
        self._known = frozenset(self.paths)

    def __missing__(self, path: str) -> str:
        parts = path.split(".")
        around = (".".join(parts[:depth]) for depth in range(1, len(parts) + 1))
        found = self[path] = next((block for block in around if block in self._known), "")
        return found


def outermost(paths: Iterable[str]) -> list[str]:
    """Those that lie in no other of them."""
    listed = list(paths)
    known = set(listed)

    def inside(path: str) -> bool:
        parts = path.split(".")
        return any(".".join(parts[:depth]) in known for depth in range(1, len(parts)))

    return [path for path in listed if not inside(path)]
