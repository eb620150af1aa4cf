"""Rows of `fuzz.operators` that read and write by index, or in place."""

from __future__ import annotations

from fuzz.operators import dim_of, operator
from fuzz.writer import Scope, Value


def _indices(w: Scope, n: int, count: int) -> str:
    return w.buffer(f"torch.tensor({[w.rng.randrange(n) for _ in range(count)]})")


@operator
def gather_rows(w: Scope, v: Value, pool: list[Value]) -> Value | None:
    """Indexing in its spellings."""
    dim = dim_of(w, v) % len(v.shape)
    index = _indices(w, v.shape[dim], v.shape[dim])
    colons = ":, " * dim
    wide = ", ".join(["1"] * dim + ["-1"] + ["1"] * (len(v.shape) - dim - 1))
    forms = [
        f"{v.text}[{colons}{index}]",
        f"{v.text}.index_select({dim}, {index})",
        f"torch.gather({v.text}, {dim}, {index}.view({wide}).expand({', '.join(map(str, v.shape))}))",
        f"torch.take_along_dim({v.text}, {index}.view({wide}), {dim})",
        f"torch.take_along_dim({v.text}, {v.text}.argsort({dim}), {dim})",
    ]
    return w.let(w.rng.choice(forms), *v.shape)


@operator
def write_rows(w: Scope, v: Value, pool: list[Value]) -> Value | None:
    """Scattering in its spellings."""
    dim = dim_of(w, v) % len(v.shape)
    n = v.shape[dim]
    order = list(range(n))
    w.rng.shuffle(order)
    index = w.buffer(f"torch.tensor({order})")
    same = [p for p in pool if p.shape == v.shape]
    other = w.rng.choice(same).text if same else f"torch.tanh({v.text})"
    sizes = ", ".join(map(str, v.shape))
    wide = ", ".join(["1"] * dim + ["-1"] + ["1"] * (len(v.shape) - dim - 1))
    spread = f"{index}.view({wide}).expand({sizes})"
    forms = [
        f"{v.text}.index_add({dim}, {index}, {other})",
        f"{v.text}.index_copy({dim}, {index}, {other})",
        f"{v.text}.index_fill({dim}, {index}[:1], 0.5)",
        f"torch.scatter({v.text}, {dim}, {spread}, {other})",
        f"{v.text}.scatter_add({dim}, {spread}, {other})",
        f"{v.text}.scatter_reduce({dim}, {spread}, {other}, 'sum')",
        f"{v.text}.index_put((torch.arange(1),), {other}[:1])",
    ]
    return w.let(w.rng.choice(forms), *v.shape)


@operator
def write_slice(w: Scope, v: Value, pool: list[Value]) -> Value | None:
    """Part of a copy is overwritten."""
    dim = dim_of(w, v) % len(v.shape)
    n = v.shape[dim]
    if n < 2:
        return None
    at = w.rng.randint(1, n - 1)
    made = w.let(f"{v.text}.clone()", *v.shape)
    colons = ":, " * dim
    source = w.rng.choice((f"torch.tanh({v.text}[{colons}:{at}])", "0.25", f"-{v.text}[{colons}:{at}]"))
    if w.chance(0.5):
        w.lines.append(f"{made.text}[{colons}:{at}] = {source}")
        return made
    return w.let(f"torch.slice_scatter({v.text}, torch.tanh({v.text}[{colons}:{at}]), {dim}, 0, {at})", *v.shape)


@operator
def in_place(w: Scope, v: Value, pool: list[Value]) -> Value | None:
    """A copy changed in place."""
    made = w.let(f"{v.text} * 1.5", *v.shape)
    forms = (".relu_()", ".mul_(0.5)", ".add_({b})", " += {b}", " *= 0.7", ".clamp_(-1, 1)", ".sigmoid_()",
             ".sub_(0.1)",
             ".masked_fill_({b} > 0.4, 0.0)", ".tanh_()")  # fmt: skip
    w.lines.append(f"{made.text}{w.rng.choice(forms).format(b=v.text)}")
    return made


@operator
def largest(w: Scope, v: Value, pool: list[Value]) -> Value | None:
    """What topk finds, or a mask of it."""
    if v.shape[-1] < 3:
        return None
    k = w.rng.randint(1, v.shape[-1] - 1)
    if w.chance(0.5):
        return w.let(f"torch.topk({v.text}, {k}, dim=-1)[0]", *v.shape[:-1], k)
    best, index = w.module.name("t"), w.module.name("i")
    w.lines.append(f"{best}, {index} = {v.text}.topk({k}, -1)")
    return w.let(f"torch.zeros_like({v.text}).scatter(-1, {index}, {best}.softmax(-1)) + {v.text}", *v.shape)


@operator
def pad(w: Scope, v: Value, pool: list[Value]) -> Value | None:
    """Padding along the last dims."""
    value = w.rng.choice(("", ", value=0.5"))
    if w.chance(0.5):
        return w.let(f"F.pad({v.text}, (0, 0, 1, 0){value})[..., :-1, :]", *v.shape)
    return w.let(f"F.pad({v.text}, (1, 2){value})", *v.shape[:-1], v.shape[-1] + 3)


@operator
def triangle(w: Scope, v: Value, pool: list[Value]) -> Value | None:
    """One triangle of the last two dims."""
    return w.let(f"torch.{w.rng.choice(('tril', 'triu'))}({v.text})", *v.shape)


@operator
def made_new(w: Scope, v: Value, pool: list[Value]) -> Value | None:
    """Constants made from a value."""
    sizes = w.rng.choice((f"{v.text}.shape", ", ".join(map(str, v.shape)), f"{v.text}.size()"))
    forms = [f"{v.text}.new_zeros({sizes})", f"{v.text}.new_ones({sizes})", f"{v.text}.new_empty({sizes}).fill_(0.5)"]
    if not sizes[0].isdigit():
        forms.append(f"{v.text}.new_full({sizes}, 0.3)")
    return w.let(f"{v.text} + {w.rng.choice(forms)}", *v.shape)


@operator
def masked(w: Scope, v: Value, pool: list[Value]) -> Value | None:
    """A causal or random mask."""
    if len(v.shape) < 3:
        return None
    shape = v.shape[-2:]
    mask = w.buffer(f"torch.rand({shape[0]}, {shape[1]}) > 0.5", w.chance(0.5))
    forms = (f"{v.text}.masked_fill({mask}, 0)", f"torch.where({mask}, {v.text}, 0.1)", f"{v.text} * {mask}")
    return w.let(w.rng.choice(forms), *v.shape)
