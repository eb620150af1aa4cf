"""A rewrite that fails leaves the model as it was: classes, parameters, buffers, hooks, attributes."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def all_or_nothing(model: nn.Module) -> Iterator[None]:
    """Puts every module of ``model`` back as it was if the body raises.

    What modules hold is put back, not what tensors hold: the body replaces parameters and writes into none. The
    replaced ones are kept until the body ends.
    """
    saved: list[tuple[nn.Module, type[nn.Module], dict[str, Any], dict[str, Any]]] = []
    for module in model.modules():
        held = dict(vars(module))
        contents = {name: copy.copy(value) for name, value in held.items() if isinstance(value, (dict, set))}
        saved.append((module, type(module), held, contents))
    try:
        yield
    except BaseException:
        for module, cls, held, contents in saved:
            module.__class__ = cls
            for name, content in contents.items():
                held[name].clear()
                held[name].update(content)
            vars(module).clear()
            vars(module).update(held)
        raise
