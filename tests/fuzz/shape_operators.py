"""Rows of `fuzz.operators` that change shapes: views, cuts, joins, repeats."""

from __future__ import annotations

from fuzz.operators import dim_of, divisors, operator
from fuzz.writer import MAX_NUMEL, Scope, Value


@operator
def split_dim(w: Scope, v: Value, pool: list[Value]) -> Value | None:
    """The last dim as two or three."""
    n, found = v.shape[-1], divisors(v.shape[-1])
    if not found or len(v.shape) > 4:
        return None
    a = w.rng.choice(found)
    b = n // a
    lead = w.lead(v, 1)
    forms = [
        f"view({lead}, {a}, {b})",
        f"view({lead}, -1, {b})",
        f"view({lead}, {a}, -1)",
        f"unflatten(-1, ({a}, {b}))",
    ]
    forms += [f"reshape({lead}, {a}, {b})", f"unflatten(-1, (-1, {b}))", f"view({lead}, {a}, {w.size(v, -1)} // {a})"]
    return w.let(f"{v.text}.{w.rng.choice(forms)}", *v.shape[:-1], a, b)


@operator
def merge_dims(w: Scope, v: Value, pool: list[Value]) -> Value | None:
    """The last two dims as one."""
    if len(v.shape) < 4:
        return None
    n = v.shape[-1] * v.shape[-2]
    forms = ["flatten(-2)", f"reshape({w.lead(v, 2)}, -1)", f"reshape({w.lead(v, 2)}, {n})"]
    forms += [f"reshape({w.lead(v, 2)}, {w.size(v, -2)} * {w.size(v, -1)})", "flatten(start_dim=2)"]
    form = w.rng.choice(forms if len(v.shape) == 4 else forms[:-1])
    return w.let(f"{v.text}.{form}", *v.shape[:-2], n)


@operator
def swap(w: Scope, v: Value, pool: list[Value]) -> Value | None:
    """Two of the last dims change places."""
    if len(v.shape) < 4:
        return None
    shape = (*v.shape[:-2], v.shape[-1], v.shape[-2])
    rank = len(shape)
    order = [*range(rank - 2), rank - 1, rank - 2]
    forms = ["transpose(-1, -2)", "mT", f"permute({', '.join(map(str, order))})", "swapaxes(-2, -1)", "movedim(-1, -2)"]
    return w.let(f"{v.text}.{w.rng.choice([*forms, 'swapdims(-1, -2)'])}", *shape)


@operator
def positions_last(w: Scope, v: Value, pool: list[Value]) -> Value | None:
    """Something along positions, which are carried to the end and back."""
    there, back = w.rng.choice((("transpose(1, -1)",) * 2, ("movedim(1, -1)", "movedim(-1, 1)")))
    template = w.rng.choice(
        ("F.softmax({}, -1)", "torch.tanh({})", "{}.cumsum(-1) * 0.5", "F.pad({}, (1, 0))[..., :-1]")
    )
    return w.let(f"({template.format(f'{v.text}.{there}')}).{back}", *v.shape)


@operator
def insert(w: Scope, v: Value, pool: list[Value]) -> Value | None:
    """A dim of length 1, which something broadcasts against."""
    if len(v.shape) > 3 or v.numel * 3 > MAX_NUMEL:
        return None
    at = w.rng.choice((2, -1))
    shape = (*v.shape[:2], 1, *v.shape[2:]) if at == 2 else (*v.shape, 1)
    text = w.rng.choice((f"{v.text}.unsqueeze({at})", f"{v.text}[:, :, None]" if at == 2 else f"{v.text}[..., None]"))
    made = w.let(text, *shape)
    times = w.rng.randint(2, 3)
    full = (*v.shape[:2], times, *v.shape[2:]) if at == 2 else (*v.shape, times)
    sizes = ", ".join("-1" if a == b else str(a) for a, b in zip(full, shape, strict=True))
    forms = [
        f"{made.text}.expand({sizes})",
        f"{made.text}.broadcast_to({full})",
        f"{made.text} * {w.parameter(*full[2:])}",
    ]
    return w.let(w.rng.choice(forms), *full)


@operator
def squeeze(w: Scope, v: Value, pool: list[Value]) -> Value | None:
    """A mean that is kept and squeezed."""
    return w.let(f"{v.text} + {v.text}.mean(-1, keepdim=True).squeeze(-1).unsqueeze(-1)", *v.shape)


@operator
def repeat(w: Scope, v: Value, pool: list[Value]) -> Value | None:
    """Copies along a dim."""
    times = w.rng.randint(2, 3)
    if len(v.shape) < 3 or v.numel * times > MAX_NUMEL:
        return None
    dim = dim_of(w, v, 2) % len(v.shape)
    counts = ", ".join(str(times if d == dim else 1) for d in range(len(v.shape)))
    forms = [f"repeat({counts})", f"tile({counts})", f"repeat_interleave({times}, dim={dim})"]
    forms.append(f"repeat_interleave({times}, {dim - len(v.shape)})")
    shape = [n * times if d == dim else n for d, n in enumerate(v.shape)]
    return w.let(f"{v.text}.{w.rng.choice(forms)}", *shape)


@operator
def join(w: Scope, v: Value, pool: list[Value]) -> Value | None:
    """``cat`` or ``stack`` of two or three values."""
    same = [p for p in pool if len(p.shape) == len(v.shape) and p.shape[:-1] == v.shape[:-1]]
    others = [w.rng.choice(same).text for _ in range(w.rng.randint(1, 2))] if same else [f"-{v.text}"]
    lengths = {p.text: p.shape[-1] for p in same} | {f"-{v.text}": v.shape[-1]}
    alike = all(lengths[t] == v.shape[-1] for t in others)
    listed = ", ".join([v.text, *others])
    if alike and len(v.shape) < 5 and w.chance(0.3):
        dim = w.rng.choice((2, -1))
        shape = (*v.shape[:2], len(others) + 1, *v.shape[2:]) if dim == 2 else (*v.shape, len(others) + 1)
        made = w.let(f"torch.stack([{listed}], dim={dim})", *shape)
    else:
        total = v.shape[-1] + sum(lengths[t] for t in others)
        name = w.rng.choice(("cat", "cat", "concat", "concatenate"))
        made = w.let(f"torch.{name}([{listed}], dim=-1)", *v.shape[:-1], total)
    return made if made.numel <= MAX_NUMEL else None


@operator
def cut(w: Scope, v: Value, pool: list[Value]) -> Value | None:
    """The last dim, or another, in pieces that meet again as a product or a sum."""
    dim = dim_of(w, v, 2) if len(v.shape) > 2 else -1
    n = v.shape[dim]
    if n % 2 or n < 2:
        return None
    half = n // 2
    at = dim % len(v.shape)
    colons = ":, " * at
    two = [f"torch.chunk({v.text}, 2, dim={dim})", f"{v.text}.split({half}, {dim})",
           f"torch.split({v.text}, [{half}, {half}], {dim})",
           f"torch.tensor_split({v.text}, 2, {dim})", f"({v.text}[{colons}:{half}], {v.text}[{colons}{half}:])",
           f"({v.text}.narrow({dim}, 0, {half}), {v.text}.narrow({dim}, {half}, {half}))",
           f"{v.text}.chunk(2, {dim})", f"({v.text}[{colons}::2], {v.text}[{colons}1::2])"]  # fmt: skip
    shape = [*v.shape]
    shape[dim] = half
    first, second = w.module.name("a"), w.module.name("b")
    w.lines.append(f"{first}, {second} = {w.rng.choice(two)}")
    form = w.rng.choice(
        (
            f"{first} * torch.sigmoid({second})",
            f"{first} + {second}",
            f"F.silu({first}) * {second}",
            f"F.glu({v.text}, {dim})",
        )
    )
    return w.let(form, *shape)


@operator
def rotate(w: Scope, v: Value, pool: list[Value]) -> Value | None:
    """The two halves of the last dim change places, one negated."""
    n = v.shape[-1]
    if n % 2:
        return None
    half = w.rng.choice((str(n // 2), f"{v.text}.shape[-1] // 2"))
    return w.let(f"torch.cat((-{v.text}[..., {half}:], {v.text}[..., :{half}]), dim=-1)", *v.shape)


@operator
def uneven_cut(w: Scope, v: Value, pool: list[Value]) -> Value | None:
    """Two pieces of different lengths, both used."""
    n = v.shape[-1]
    if n < 3:
        return None
    at = w.rng.randint(1, n - 1)
    first, second = w.module.name("a"), w.module.name("b")
    w.lines.append(f"{first}, {second} = {v.text}.split([{at}, {n - at}], dim=-1)")
    return w.let(f"torch.cat([torch.tanh({second}), {first}], -1)", *v.shape)


@operator
def unbind(w: Scope, v: Value, pool: list[Value]) -> Value | None:
    """One dim taken apart."""
    if len(v.shape) < 4:
        return None
    dim = w.rng.choice((2, -1, -2))
    if not 2 <= v.shape[dim] <= 4 or dim % len(v.shape) < 2:
        return None
    parts = [w.module.name("u") for _ in range(v.shape[dim])]
    w.lines.append(f"{', '.join(parts)} = {v.text}.unbind({dim})")
    at = dim % len(v.shape)
    return w.let(" + ".join(f"{p} * {i + 1}" for i, p in enumerate(parts)), *v.shape[:at], *v.shape[at + 1 :])


@operator
def take_one(w: Scope, v: Value, pool: list[Value]) -> Value | None:
    """One index of a dim, added to all."""
    dim = dim_of(w, v)
    if v.shape[dim] < 2:
        return None
    index = w.rng.choice((0, -1, 1))
    forms = [f"{v.text} + {v.text}.select({dim}, {index}).unsqueeze({dim})", f"{v.text} * {v.text}.narrow({dim}, 1, 1)"]
    return w.let(w.rng.choice(forms), *v.shape)


@operator
def as_other(w: Scope, v: Value, pool: list[Value]) -> Value | None:
    """Shaped as another value."""
    others = [p for p in pool if p.numel == v.numel and p.shape[:2] == v.shape[:2]]
    if not others:
        return None
    other = w.rng.choice(others)
    form = w.rng.choice(
        (f"reshape_as({other.text})", f"contiguous().view_as({other.text})", f"reshape({other.text}.shape)")
    )
    return w.let(f"{v.text}.{form} + {other.text}", *other.shape)


@operator
def ravel(w: Scope, v: Value, pool: list[Value]) -> Value | None:
    """Flattened wholly and back."""
    form = w.rng.choice(("ravel()", "flatten()", "reshape(-1)"))
    return w.let(f"torch.tanh({v.text}.{form}).view({', '.join(map(str, v.shape))})", *v.shape)


@operator
def expand_as(w: Scope, v: Value, pool: list[Value]) -> Value | None:
    """A statistic expanded to what it came from."""
    return w.let(f"{v.text} - {v.text}.mean(-1, keepdim=True).expand_as({v.text})", *v.shape)
