"""Configurations of a model and its parts: what they said when it was rewritten, and what was changed since.

Forwards read them at every call: ``model.config.output_attentions = True`` returns what was not planned, and
``set_attn_implementation`` runs other operators.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

NAME = "config"
WITHOUT_MEANING = frozenset({"use_cache"})
"""Traces have no cache, whatever is asked for."""

Change = tuple[int, str, Any]


class LiveSettings:
    """The configurations of a model's copy, and where to find those of a model that is alike."""

    def __init__(self, model: nn.Module) -> None:
        """Args: model: The copy; its configurations are its own."""
        self.places: list[tuple[str, tuple[str, ...]]] = []
        self.held: list[dict[str, Any]] = []
        self.said: list[dict[str, Any]] = []
        self.modules: WeakKeyDictionary[nn.Module, list[nn.Module]] = WeakKeyDictionary()
        seen: set[int] = set()
        for path, module in model.named_modules():
            self._find(path, (NAME,), vars(module).get(NAME), seen)

    def _find(self, path: str, names: tuple[str, ...], value: Any, seen: set[int]) -> None:
        if not _is_open(value) or id(value) in seen:
            return
        seen.add(id(value))
        held = vars(value)
        self.places.append((path, names))
        self.held.append(held)
        kept = {name: one for name, one in held.items() if not _is_open(one) and name not in WITHOUT_MEANING}
        self.said.append(copy.deepcopy(kept))
        for name, one in held.items():
            self._find(path, (*names, name), one, seen)

    def changed(self, model: nn.Module) -> tuple[Change, ...]:
        """What the configurations of ``model`` say otherwise: which one, the name, the new value."""
        if model not in self.modules:
            self.modules[model] = [model.get_submodule(path) for path, _ in self.places]
        found: list[Change] = []
        for index, (module, said) in enumerate(zip(self.modules[model], self.said, strict=True)):
            value: Any = module
            for name in self.places[index][1]:
                value = vars(value).get(name) if hasattr(value, "__dict__") else None
            live = vars(value) if hasattr(value, "__dict__") else {}
            if len(live) == len(self.held[index]) and said.items() <= live.items():
                continue
            found += [
                (index, name, one)
                for name, one in live.items()
                if not _is_open(one) and name not in WITHOUT_MEANING and (name not in said or said[name] != one)
            ]
        return tuple(found)

    @contextmanager
    def applied(self, changes: tuple[Change, ...]) -> Iterator[None]:
        """The copy's configurations say the same while the body runs."""
        before = [(self.held[index], dict(self.held[index])) for index in {index for index, *_ in changes}]
        for index, name, value in changes:
            self.held[index][name] = copy.deepcopy(value)
        try:
            yield
        finally:
            for held, original in before:
                held.clear()
                held.update(original)


def _is_open(value: Any) -> bool:
    """Whether it is an object whose attributes are settings themselves (a configuration inside another)."""
    return hasattr(value, "__dict__") and not isinstance(value, (type, nn.Module)) and not callable(value)
