"""Sites as text: ``torch.nn.modules.linear:Linear.forward@125+4:15-54``.

    module:qualname@firstlineno+line:column-end column     one frame; ``:column-+2:end column`` ends two lines later
    outer frame > inner frame                              a chain
    (/path/to/file.py):qualname@...                        code of no importable module

A file is named by its module, so that a plan made on one machine can be read on another. Finding the file of a module
imports nothing: reading a plan runs no code.
"""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

from .sites import Frame, Span

_FRAME = re.compile(r"(\([^)]*\)|[^:()]+):(.+)@(\d+)(?:\+(-?\d+):(\d+)-(?:\+(\d+):)?(\d+))?")
_UNKNOWN: Span = (-1, -1, -1, -1)
_MISSING = "<module {}>"  # stands for a file that is not on this machine


_read: dict[str, str] = {}  # file -> module, as plans that were read named it


class Sources:
    """The two-way map between files and module names, as this process sees it."""

    def __init__(self) -> None:
        self._names: dict[str, str] = {}
        self._files: dict[str, str] = {}

    def module_of(self, file: str) -> str:
        """The name of the module in ``file``, or the file in parentheses.

        The import path decides before what happens to be loaded, so that every process of a job names a file alike; a
        script is named by its file, not ``__main__``.
        """
        if file.startswith("<module ") and file.endswith(">"):
            return file[len("<module ") : -1]
        if file not in self._names:
            self._names[file] = _importable(file) or _loaded().get(file) or _read.get(file) or f"({file})"
        return self._names[file]

    def file_of(self, module: str) -> str:
        """The file of a module; a stand-in that `module_of` gives back where this machine has none."""
        if module.startswith("("):
            return module[1:-1]
        if module not in self._files:
            loaded = getattr(sys.modules.get(module), "__file__", None)
            file = self._files[module] = loaded or _find(module) or _MISSING.format(module)
            _read.setdefault(file, module)
        return self._files[module]


def _loaded() -> dict[str, str]:
    """Files of loaded modules; the shortest name of each."""
    names: dict[str, str] = {}
    for name, module in sorted(sys.modules.items(), key=lambda item: (item[0] == "__main__", len(item[0]), item[0])):
        names.setdefault(str(getattr(module, "__file__", None)), name)
    return names


def _importable(file: str) -> str | None:
    """The name by which ``import`` finds a file from a folder of ``sys.path``, the innermost folder first."""
    path = Path(file)
    if path.suffix != ".py":
        return None
    for folder in sorted({os.path.abspath(entry) for entry in sys.path}, key=lambda entry: (-len(entry), entry)):
        if path.is_relative_to(folder):
            parts = path.relative_to(folder).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            if name and _find(name) == file:
                return name
    return None


def _find(module: str) -> str | None:
    """Where ``import module`` would find its source; parents are looked through, not imported."""
    spec: ModuleSpec | None = None
    name = ""
    for part in module.split("."):
        name = f"{name}.{part}" if name else part
        try:
            found = (
                PathFinder.find_spec(name, spec.submodule_search_locations) if spec else importlib.util.find_spec(name)
            )
        except (ImportError, ValueError):  # ValueError: a module without a spec
            return None
        if found is None:
            return None
        spec = found
    return spec.origin if spec is not None and spec.has_location else None


def chain_text(frames: tuple[Frame, ...], sources: Sources) -> str:
    """A chain of frames as one line."""
    return " > ".join(_frame_text(frame, sources) for frame in frames)


def parse_chain(text: str, sources: Sources) -> tuple[Frame, ...]:
    """The inverse of `chain_text`.

    Raises:
        ValueError: Not such a text.
    """
    return tuple(_parse_frame(part, sources) for part in text.split(" > ")) if text else ()


def _frame_text(frame: Frame, sources: Sources) -> str:
    line, end_line, column, end_column = frame.span
    text = f"{sources.module_of(frame.file)}:{frame.qualname}@{frame.firstlineno}"
    if frame.span == _UNKNOWN:
        return text
    more = f"+{end_line - line}:" if end_line != line else ""
    return f"{text}+{line}:{column}-{more}{end_column}"


def _parse_frame(text: str, sources: Sources) -> Frame:
    found = _FRAME.fullmatch(text)
    if found is None:
        raise ValueError(f"not a place in the source: {text!r}, need module:function@line+line:column-column")
    module, qualname, first, line, column, more, end_column = found.groups()
    span = _UNKNOWN
    if line is not None:
        span = (int(line), int(line) + int(more or 0), int(column), int(end_column))
    return Frame(sources.file_of(module), qualname, int(first), span)
