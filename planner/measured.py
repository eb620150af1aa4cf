"""Lengths that a model's code reads from shapes while it is traced, and what it does with them.

Run on local tensors, the same code reads local lengths. Most of what is made of a length is a size again, and follows;
where code refuses any other length, or calculates a number from it, only the whole one will do.
"""

from __future__ import annotations

import ast
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from types import CodeType
from typing import Any, NamedTuple

import torch

from colrow.cost_models.errors import ValidationError

from .source_functions import path_of

_TORCH = torch.__path__[0]
_LAYERS = f"{_TORCH}/nn/modules/"


class Whole(NamedTuple):
    """A dim of which the code needs the whole length."""

    dim: int


Reading = int | Whole
"""A dim whose length the code reads."""


class Measured(int):
    """A length that the model's code read from a tensor's shape: run on local tensors, the code reads the local length.

    Attributes:
        origin: The value it was read from; None for products and quotients of lengths.
        dim: Which dim of it.
        formula: What it was calculated from: the method, the length, the other operand.
        readings: Receives `Whole` where the code needs the whole length: it refuses any other, or calculates a number
            from it that is no length. A local one will not do there. None where nobody asks any more.
    """

    origin: Any = None
    dim: int = 0
    formula: tuple[str, Measured, Any] | None = None
    readings: set[Reading] | None = None

    @classmethod
    def read(cls, length: int, origin: Any, dim: int, readings: set[Reading]) -> Measured:
        """A length with its origin."""
        made = cls(length)
        made.origin, made.dim, made.readings = origin, dim, readings
        return made

    def needed_whole(self) -> None:
        """Notes that a local length will not do."""
        if self.readings is not None:
            self.readings.add(Whole(self.dim))
        for part in self.formula or ():
            if isinstance(part, Measured):
                part.needed_whole()

    def _compared(self, other: object) -> None:
        if isinstance(other, Measured) or not self._is_asked():
            return
        caller = sys._getframe(2)
        if caller.f_lineno in lines_that_refuse(caller.f_code):
            self.needed_whole()

    def _is_asked(self) -> bool:
        if self.formula is None:
            return self.readings is not None
        return any(isinstance(part, Measured) and part._is_asked() for part in self.formula)

    def __eq__(self, other: object) -> bool:
        """Equality, noted where anything else is refused."""
        self._compared(other)
        return int(self) == other

    def __ne__(self, other: object) -> bool:
        """Inequality, noted where it is refused."""
        self._compared(other)
        return int(self) != other

    __hash__ = int.__hash__

    def __float__(self) -> float:
        """A number like any other, as ``math.sqrt`` reads it."""
        self.needed_whole()
        return float(int(self))

    def __pow__(self, other: Any, modulo: Any = None) -> Any:
        """A power; noted where it is no length (``x.shape[-1] ** -0.5``)."""
        return self._number(pow(int(self), other, modulo))

    def __truediv__(self, other: Any) -> Any:
        """A quotient, no length."""
        return self._number(int.__truediv__(self, other))

    def __rtruediv__(self, other: Any) -> Any:
        """A quotient, no length."""
        return self._number(int.__rtruediv__(self, other))

    def _number(self, result: Any) -> Any:
        if isinstance(result, float):
            self.needed_whole()
        return result

    def _combined(self, method: str, other: Any) -> Any:
        result = getattr(int, method)(self, other)
        if type(result) is not int:
            return result
        made = Measured(result)
        made.formula = method, self, other
        return made

    def resolved(self, value_of: Callable[[Any], Any]) -> Measured:
        """The same length with its origins replaced."""
        made = Measured(self)
        made.origin, made.dim = None if self.origin is None else value_of(self.origin), self.dim
        if self.formula is not None:
            method, left, right = self.formula
            made.formula = (
                method,
                left.resolved(value_of),
                right.resolved(value_of) if isinstance(right, Measured) else right,
            )
        return made

    def origins(self) -> Iterator[Any]:
        """All values it was read from."""
        if self.formula is None:
            yield self.origin
            return
        for operand in self.formula[1:]:
            if isinstance(operand, Measured):
                yield from operand.origins()

    def read_on(self, local: Callable[[Any, int, int], int | None]) -> int | None:
        """What the same code reads where tensors are local.

        Args:
            local: The local length of ``(origin, dim, whole length)``; None: not known.

        Returns:
            None where an origin is not known, or a local length does not divide where the whole one does.
        """
        if self.formula is None:
            return None if self.origin is None else local(self.origin, self.dim, int(self))
        method, left, right = self.formula
        a = left.read_on(local)
        b = right.read_on(local) if isinstance(right, Measured) else right
        if a is None or b is None or (method == "__floordiv__" and int(left) % right == 0 != a % b):
            return None
        made: int = getattr(int, method)(a, b)
        return made

    def __mul__(self, other: Any) -> Any:
        """Products of a measured length are measured."""
        return self._combined("__mul__", other)

    def __rmul__(self, other: Any) -> Any:
        """Products of a measured length are measured."""
        return self._combined("__rmul__", other)

    def __floordiv__(self, other: Any) -> Any:
        """Parts of a measured length are measured."""
        return self._combined("__floordiv__", other)


class Shape(tuple[Measured, ...]):
    """A tensor's shape that keeps its lengths measured (``torch.Size`` would make them plain) and notes which are read.

    Attributes:
        readings: Receives the dims that the code looks at.
    """

    readings: set[Reading]

    @classmethod
    def of(cls, lengths: Iterable[int], origin: Any, readings: set[Reading]) -> Shape:
        """The shape of the value ``origin``."""
        made = cls(Measured.read(n, origin, dim, readings) for dim, n in enumerate(lengths))
        made.readings = readings
        return made

    def _all(self) -> tuple[Measured, ...]:
        self.readings.update(range(len(self)))
        return tuple(super().__iter__())

    def __getitem__(self, index: Any) -> Any:
        """One length, or a plain tuple of some."""
        dims = range(len(self))[index]
        self.readings.update([dims] if isinstance(dims, int) else dims)
        return super().__getitem__(index)

    def __iter__(self) -> Iterator[Measured]:
        """All lengths."""
        return iter(self._all())

    def __add__(self, other: Any) -> Any:
        """A longer shape, as a plain tuple."""
        return self._all() + tuple(other)

    def numel(self) -> int:
        """Number of elements."""
        return Measured(math.prod(self._all()))


@cache
def lines_that_refuse(code: CodeType) -> frozenset[int]:
    """Lines, counted in the file, on which a function decides to raise: its asserts, and ifs of which a branch does.

    Of torch's own functions its layers' only: the others look at the tensors that they are given.
    """
    if code.co_filename.startswith(_TORCH) and not code.co_filename.startswith(_LAYERS):
        return frozenset()
    try:
        function = path_of(code)[-1]
    except ValidationError:  # without its source nothing is known
        return frozenset()
    found: set[int] = set()
    for node in ast.walk(function):
        if isinstance(node, ast.Assert) or (isinstance(node, ast.If) and (_raises(node.body) or _raises(node.orelse))):
            found.update(range(node.test.lineno, (node.test.end_lineno or node.test.lineno) + 1))
    return frozenset(found)


def _raises(body: list[ast.stmt]) -> bool:
    last = body[-1] if body else None
    return isinstance(last, ast.Raise) or (isinstance(last, ast.If) and (_raises(last.body) or _raises(last.orelse)))
