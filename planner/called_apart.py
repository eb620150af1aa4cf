"""Blocks called in parts: a part of one is called, or a parameter of it read, while the block itself does not run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor, nn

CALLED_APART = "blocks called in parts"
"""The assumption of a plan that names them."""


class CalledApart:
    """Looks at operators in the order in which they were traced.

    Attributes:
        blocks: Those called in parts so far, in order.
    """

    def __init__(self, model: nn.Module, blocks: Iterable[str], parameters: Mapping[str, Tensor]) -> None:
        self.blocks: dict[str, None] = {}
        lists = (nn.ModuleList, nn.ModuleDict)  # never called: the module around them reads what they hold
        self._is_called = {path: not isinstance(model.get_submodule(path), lists) for path in blocks}
        self._block_of: dict[str, str] = {}
        self._parameters = parameters

    def note(self, running: Sequence[str], read: Iterable[str]) -> None:
        """Notes the blocks that one operator shows to be called in parts.

        Args:
            running: Paths of the modules whose forwards run, outermost first.
            read: Names of the parameters that the operator reads; a tied one is apart if it is so by all its names.
        """
        block = self._block_around(running[-1] if running else "")
        if block and block not in running:
            self.blocks[block] = None
        for name in read:
            if self._is_apart(name, running):
                value = self._parameters.get(name)
                names = [other for other, tied in self._parameters.items() if tied is value]
                if all(self._is_apart(other, running) for other in names):
                    self.blocks[self._block_of_parameter(name)] = None

    def _is_apart(self, name: str, running: Sequence[str]) -> bool:
        block = self._block_of_parameter(name)
        return bool(block) and block not in running

    def _block_of_parameter(self, name: str) -> str:
        return self._block_around(name.rpartition(".")[0])

    def _block_around(self, path: str) -> str:
        """The outermost block at or around ``path``; "" where there is none, or it is a list, which is never called."""
        if path not in self._block_of:
            parts = path.split(".")
            around = (".".join(parts[:depth]) for depth in range(1, len(parts) + 1))
            block = next((path for path in around if path in self._is_called), "")
            self._block_of[path] = block if block and self._is_called[block] else ""
        return self._block_of[path]
