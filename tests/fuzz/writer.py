"""Writes random modules as source text: scopes of statements, values with known shapes, products in every spelling."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod

MAX_NUMEL = 6000
"""Largest value a module makes: the fuzzer is about structure, and time is limited."""


@dataclass(frozen=True)
class Value:
    """A tensor in the text: an expression without side effects, usually a name, and its shape."""

    text: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)


@dataclass
class Module:
    """The text of one random module file while it is written.

    Attributes:
        rng: All random choices are drawn from it.
        classes: Finished classes and functions, in the order they must stand.
        count: Names handed out.
    """

    rng: random.Random
    classes: list[str] = field(default_factory=list)
    count: int = 0

    def name(self, hint: str) -> str:
        """A name nobody has."""
        self.count += 1
        return f"{hint}{self.count}"


class Scope:
    """One class: what its ``__init__`` makes and what its ``forward`` computes."""

    def __init__(self, module: Module) -> None:
        self.module, self.rng = module, module.rng
        self.init: list[str] = []
        self.lines: list[str] = []

    def let(self, expression: str, *shape: int, hint: str = "h") -> Value:
        """Assigns an expression to a new name."""
        name = self.module.name(hint)
        self.lines.append(f"{name} = {expression}")
        return Value(name, tuple(shape))

    def child(self, constructor: str, hint: str = "m") -> str:
        """A submodule; returns its attribute."""
        name = self.module.name(hint)
        self.init.append(f"self.{name} = {constructor}")
        return f"self.{name}"

    def parameter(self, *shape: int) -> str:
        """A bare parameter."""
        return self.child(f"nn.Parameter(torch.randn({', '.join(map(str, shape)) or '()'}))", "p")

    def buffer(self, expression: str, persistent: bool = True) -> str:
        """A buffer."""
        name = self.module.name("c")
        self.init.append(f'self.register_buffer("{name}", {expression}, persistent={persistent})')
        return f"self.{name}"

    def chance(self, probability: float) -> bool:
        """True that often."""
        return self.rng.random() < probability

    def size(self, value: Value, dim: int) -> str:
        """A length: written out, or read from the tensor."""
        dim %= len(value.shape)
        back = dim - len(value.shape)
        forms = [str(value.shape[dim])] * 3 + [f"{value.text}.shape[{self.rng.choice((dim, back))}]"]
        return self.rng.choice([*forms, f"{value.text}.size({back})"])

    def lead(self, value: Value, rest: int) -> str:
        """All lengths but the last ``rest``, as arguments."""
        kept = len(value.shape) - rest
        forms = [f"*{value.text}.shape[:{-rest}]", ", ".join(self.size(value, d) for d in range(kept))]
        return self.rng.choice([*forms, ", ".join(map(str, value.shape[:kept]))])

    def product(self, x: Value, n: int, bias: bool | None = None) -> Value:
        """``[.., k] -> [.., n]`` with a weight of its own, in one of many spellings."""
        k, lead = x.shape[-1], x.shape[:-1]
        with_bias = self.chance(0.4) if bias is None else bias
        spelling = self.rng.choice(_PRODUCTS)
        if spelling in (_addmm, _pointwise) and (len(x.shape) != 3 or not with_bias):
            spelling = _linear
        return self.let(spelling(self, x, k, n, with_bias), *lead, n)

    def in_module(self, write: Callable[[Scope, Value], Value], x: Value, *others: Value) -> Value:
        """``write`` as a class of its own, called on ``x``; ``others`` are handed to it under their own names."""
        inner = Scope(self.module)
        made = write(inner, Value("x", x.shape))
        name = self.module.name("Part")
        self.module.classes.append(inner.class_text(name, ["x", *(o.text for o in others)], made.text))
        called = self.child(f"{name}()")
        arguments = ", ".join([x.text, *(o.text for o in others)])
        return self.let(f"{called}({arguments})", *made.shape)

    def class_text(self, name: str, arguments: list[str], result: str, init_arguments: str = "") -> str:
        """The class."""
        init = ["super().__init__()", *self.init]
        lines = [f"class {name}(nn.Module):", f"    def __init__(self{init_arguments}):"]
        lines += [f"        {line}" for line in init]
        lines += ["", f"    def forward(self, {', '.join(arguments)}):"]
        lines += [f"        {line}" for line in (*self.lines, f"return {result}")]
        return "\n".join(lines)


def _linear(w: Scope, x: Value, k: int, n: int, bias: bool) -> str:
    return f"{w.child(f'nn.Linear({k}, {n}, bias={bias})')}({x.text})"


def _functional(w: Scope, x: Value, k: int, n: int, bias: bool) -> str:
    weight = w.parameter(n, k)
    return f"F.linear({x.text}, {weight}{', ' + w.parameter(n) if bias else ''})"


def _matmul(w: Scope, x: Value, k: int, n: int, bias: bool) -> str:
    flipped = w.chance(0.5)
    weight = w.parameter(*((n, k) if flipped else (k, n)))
    weight += w.rng.choice((".t()", ".T", ".transpose(0, 1)", ".mT")) if flipped else ""
    made = w.rng.choice((f"{x.text} @ {weight}", f"torch.matmul({x.text}, {weight})"))
    return f"{made} + {w.parameter(n)}" if bias else made


def _einsum(w: Scope, x: Value, k: int, n: int, bias: bool) -> str:
    letters = "abcdef"[: len(x.shape) - 1]
    flipped = w.chance(0.5)
    weight = w.parameter(*((n, k) if flipped else (k, n)))
    equation = f"{letters}k,{'nk' if flipped else 'kn'}->{letters}n"
    made = f'torch.einsum("{equation}", {x.text}, {weight})'
    return f"{made} + {w.parameter(n)}" if bias else made


def _addmm(w: Scope, x: Value, k: int, n: int, bias: bool) -> str:
    del bias  # always
    flat = w.rng.choice((f"{x.text}.view(-1, {k})", f"{x.text}.reshape(-1, {x.text}.size(-1))"))
    return f"torch.addmm({w.parameter(n)}, {flat}, {w.parameter(k, n)}).view(*{x.text}.shape[:-1], {n})"


def _pointwise(w: Scope, x: Value, k: int, n: int, bias: bool) -> str:
    layer = w.child(f"nn.Conv1d({k}, {n}, 1, bias={bias})")
    return f"{layer}({x.text}.transpose(1, 2)).transpose(1, 2)"


def _mm(w: Scope, x: Value, k: int, n: int, bias: bool) -> str:
    made = f"torch.mm({x.text}.reshape(-1, {k}), {w.parameter(k, n)}).reshape(*{x.text}.shape[:-1], {n})"
    return f"{made} + {w.parameter(n)}" if bias else made


_PRODUCTS = (_linear, _linear, _linear, _linear, _functional, _functional, _matmul, _einsum, _addmm, _pointwise, _mm)
