"""A random module: embeddings or vectors in, blocks of random parts with residuals, a head of some kind out."""

from __future__ import annotations

import random
from dataclasses import dataclass

from fuzz import (  # noqa: F401  # rows and parts
    attention,
    images,
    index_operators,
    product_operators,
    shape_operators,
    spectral_operators,
)
from fuzz.parts import draw_part, normed, soup
from fuzz.writer import Module, Scope, Value

_HEADER = '''"""{title}"""

import torch
import torch.nn.functional as F
from torch import nn

TP = {tp}
PHASE = "{phase}"
TRAINING = {training}


def build():
    return Model()


def inputs():
    torch.manual_seed(0)
    return {{{inputs}}}
'''


@dataclass(frozen=True)
class Generated:
    """One module and how it is to be split.

    Attributes:
        seed: What it was made from.
        source: A Python file with ``build``, ``inputs``, ``TP``, ``PHASE`` and ``TRAINING``.
    """

    seed: int
    source: str


def generate(seed: int) -> Generated:
    """The module of this seed; the same text every time."""
    rng = random.Random(seed)
    module = Module(rng)
    tp = rng.choice((2, 2, 2, 3, 3, 4, 4, 4, 5, 6, 7, 8))
    phase = rng.choice(("train", "train", "prefill"))
    b, s, n = rng.randint(1, 3), rng.randint(3, 6), rng.choice((8, 12, 16, 16, 20, 24, 24, 15, 14))
    top = Scope(module)
    fields: dict[str, str] = {}
    x, table, vocab = _entrance(top, b, s, n, fields)
    x = _blocks(top, x)
    results = _exit(top, x, table, vocab)
    classes = [*module.classes, top.class_text("Model", list(fields), results)]
    listed = ", ".join(f'"{name}": {text}' for name, text in fields.items())
    header = _HEADER.format(
        title=f"Random module {seed}.", tp=tp, phase=phase, training=rng.random() < 0.15, inputs=listed
    )
    return Generated(seed, "\n\n\n".join([header.rstrip(), *classes]) + "\n")


def _entrance(w: Scope, b: int, s: int, n: int, fields: dict[str, str]) -> tuple[Value, str, int]:
    """The input as ``[batch, positions, hidden]``; the table's attribute and its rows, if there is one."""
    vocab = w.rng.choice((17, 24, 31, 40, 48))
    if w.chance(0.45):
        k = w.rng.choice((n, n, 6, 10))
        wants = w.chance(0.15)
        fields["x"] = f"torch.randn({b}, {s}, {k}, dtype=torch.float64{', requires_grad=True' if wants else ''})"
        x = Value("x", (b, s, k))
        return (w.product(x, n) if k != n or w.chance(0.3) else x), "", 0
    fields["ids"] = f"torch.randint({vocab}, ({b}, {s}))"
    options = ", padding_idx=0" if w.chance(0.15) else ""
    table = w.child(f"nn.Embedding({vocab}, {n}{options})")
    x = w.let(f"{table}(ids)", b, s, n)
    kind = w.rng.randrange(5)
    if kind == 0:
        x = w.let(f"{x.text} + {w.parameter(1, s, n)}", b, s, n)
    elif kind == 1:
        x = w.let(f"{x.text} + {w.child(f'nn.Embedding({s + 2}, {n})')}(torch.arange(ids.shape[1]))", b, s, n)
    elif kind == 2:
        x = w.let(f"{x.text} * {n**0.5:.4f} + {w.buffer(f'torch.randn({s}, {n})', False)}", b, s, n)
    if w.chance(0.15):
        x = w.let(f"F.dropout({normed(w, x).text}, 0.1, self.training)", b, s, n)
    return x, table, vocab


def _blocks(w: Scope, x: Value) -> Value:
    """Alike, unlike, shared, in a Sequential, or none but a part written into the model itself."""
    kind = w.rng.randrange(8)
    if kind == 0:
        for _ in range(w.rng.randint(1, 2)):
            x = _residual(w, x, draw_part(w))
        return x
    count = w.rng.choice((1, 2, 2, 3))
    name = _block_class(w, x)
    if kind == 1:
        blocks = w.child(f"nn.Sequential(*[{name}(i) for i in range({count})])")
        return w.let(f"{blocks}({x.text})", *x.shape)
    if kind == 2:
        one = w.child(f"{name}(0)")
        w.lines += [f"for _ in range({count}):", f"    {x.text} = {one}({x.text})"]
        return x
    if kind == 3:
        other = _block_class(w, x)
        blocks = w.child(f"nn.ModuleList([{name}(0), {other}(1), {name}(2)][:{count + 1}])")
    else:
        blocks = w.child(f"nn.ModuleList([{name}(i) for i in range({count})])")
    if kind == 4:
        skips = w.module.name("skips")
        w.lines += [
            f"{skips} = []",
            f"for block in {blocks}:",
            f"    {x.text} = block({x.text})",
            f"    {skips}.append({x.text})",
        ]
        return w.let(f"{x.text} + 0.5 * {skips}[0]", *x.shape)
    w.lines += [f"for block in {blocks}:", f"    {x.text} = block({x.text})"]
    return x


def _block_class(w: Scope, x: Value) -> str:
    inner = Scope(w.module)
    inner.init.append("self.index = index")
    y = Value("x", x.shape)
    if w.chance(0.2):  # in parallel
        y = normed(inner, y) if w.chance(0.7) else y
        outs = [_called(inner, draw_part(inner), y) for _ in range(2)]
        y = inner.let(f"x + {outs[0].text} + {outs[1].text}", *x.shape)
    else:
        for _ in range(w.rng.choice((1, 1, 2, 2, 3))):
            y = _residual(inner, y, draw_part(inner))
    name = w.module.name("Block")
    w.module.classes.append(inner.class_text(name, ["x"], y.text, ", index"))
    return name


def _called(w: Scope, write: object, x: Value) -> Value:
    """A part, in its own module or written out in place."""
    return w.in_module(write, x) if w.chance(0.5) else write(w, x)  # type: ignore[operator, arg-type]


def _residual(w: Scope, x: Value, write: object) -> Value:
    kind = w.rng.randrange(10)
    if kind < 5:
        return w.let(f"{x.text} + {_called(w, write, normed(w, x)).text}", *x.shape)
    if kind < 7:
        return normed(w, w.let(f"{x.text} + {_called(w, write, x).text}", *x.shape))
    if kind == 7:
        made = _called(w, write, normed(w, x))
        return w.let(f"{x.text} + {w.parameter(x.shape[-1])} * {made.text}", *x.shape)
    if kind == 8:
        made = normed(w, _called(w, write, x))
        return w.let(f"{x.text} + F.dropout({made.text}, 0.1, training=self.training)", *x.shape)
    return _called(w, write, x)


def _exit(w: Scope, x: Value, table: str, vocab: int) -> str:
    """What the model returns."""
    n = x.shape[-1]
    if w.chance(0.6):
        x = normed(w, x)
    kind = w.rng.randrange(8)
    if kind < 2 and table:
        if w.chance(0.5):
            head = w.child(f"nn.Linear({n}, {vocab}, bias=False)")
            w.init.append(f"{head}.weight = {table}.weight")
            return f"{head}({x.text})"
        return f"F.linear({x.text}, {table}.weight)"
    if kind < 4:
        return w.product(x, w.rng.choice((10, 24, 31, 32))).text
    if kind == 4:
        return f'{{"hidden": {x.text}, "logits": {w.product(x, 12).text}}}'
    if kind == 5:
        return f"{w.product(Value(f'{x.text}.mean(1)', (x.shape[0], n)), 5).text}, {x.text}"
    if kind == 6:
        return soup(w, x).text
    return x.text
