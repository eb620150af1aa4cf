"""Sites: the places in forward bodies where an operator was called, as they were seen while tracing.

A frame is one source expression that was being evaluated; a site is the module whose forward ran and the chain of
frames from that forward down to the expression that called torch. The chain is plain data, so that a plan can be
saved and applied in another process.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from types import CodeType

Span = tuple[int, int, int, int]


@dataclass(frozen=True)
class Frame:
    """One expression under evaluation.

    Attributes:
        file: ``co_filename`` of the code that holds it.
        qualname: ``co_qualname`` of that code.
        firstlineno: ``co_firstlineno`` of that code.
        span: ``(line, end line, column, end column)``; lines count from ``firstlineno``, columns are UTF-8 bytes; -1
            where unknown.
    """

    file: str
    qualname: str
    firstlineno: int
    span: Span

    def __str__(self) -> str:
        return f"{self.qualname} ({self.file}:{self.firstlineno + self.span[0]})"


@dataclass(frozen=True)
class Site:
    """A call expression inside one module's forward: the module's fqn and the chain of frames, outermost first."""

    module: str
    frames: tuple[Frame, ...]

    def __hash__(self) -> int:
        """Where the innermost frame is tells nearly all sites apart, and a chain may be long."""
        return hash((self.module, self.frames[-1].span if self.frames else ()))


# A frame is looked up once per traced call, and walking co_positions is linear in the code: remembered by identity,
# because equal code objects of two files compare equal. The code object is kept so that its id stays its own.
_seen: dict[int, tuple[CodeType, dict[int, Frame]]] = {}


def frame_of(code: CodeType, lasti: int) -> Frame:
    """The frame of ``code`` at instruction offset ``lasti`` (bytes, as in ``f_lasti``)."""
    _, frames = _seen.setdefault(id(code), (code, {}))
    frame = frames.get(lasti)
    if frame is None:
        first, span = code.co_firstlineno, (-1, -1, -1, -1)
        for line, end_line, column, end_column in islice(code.co_positions(), lasti // 2, lasti // 2 + 1):
            if line is not None and end_line is not None and column is not None and end_column is not None:
                span = (line - first, end_line - first, column, end_column)
        frame = frames[lasti] = Frame(code.co_filename, code.co_qualname, first, span)
    return frame
