"""Rows of `fuzz.operators` that multiply: matrices, attention, convolutions, norms, tables."""

from __future__ import annotations

from math import prod

from fuzz.operators import operator
from fuzz.writer import MAX_NUMEL, Scope, Value


@operator
def project(w: Scope, v: Value, pool: list[Value]) -> Value | None:
    """One more product with a weight."""
    return w.product(v, w.rng.randint(3, 24)) if v.shape[-1] > 1 else None


@operator
def pair(w: Scope, v: Value, pool: list[Value]) -> Value | None:
    """Two values multiplied as matrices: outer products, scores, mixtures."""
    if len(v.shape) != 4 or prod(v.shape[:3]) * v.shape[2] > MAX_NUMEL:
        return None
    same = [p for p in pool if p.shape == v.shape]
    other = w.rng.choice(same).text if same else f"torch.tanh({v.text})"
    b, s, g, n = v.shape
    shape = (b, s, g, g)
    forms = [
        f"{v.text} @ {other}.transpose(-1, -2)",
        f"torch.matmul({v.text}, {other}.mT)",
        f'torch.einsum("bsgn,bshn->bsgh", {v.text}, {other})',
        f"torch.bmm({v.text}.reshape(-1, {g}, {n}), {other}.reshape(-1, {g}, {n}).mT).view({b}, {s}, {g}, {g})",
    ]
    if w.chance(0.4):
        first = f"{v.text}.transpose(1, 2).reshape({b * g}, {s}, {n})"
        second = f"{other}.transpose(1, 2).reshape({b * g}, {s}, {n})"
        added = w.rng.choice((w.parameter(1, s, s), f"{first}[:, :, :1]"))
        scores = w.let(f"torch.baddbmm({added}, {first}, {second}.transpose(1, 2), alpha=0.5)", b * g, s, s)
        return w.let(
            f"torch.bmm({scores.text}.softmax(-1), {second}).view({b}, {g}, {s}, {n}).transpose(1, 2)", *v.shape
        )
    return w.let(f"{w.rng.choice(forms)} / {n}", *shape)


@operator
def grouped_weight(w: Scope, v: Value, pool: list[Value]) -> Value | None:
    """One small matrix per group, as per-head weights are."""
    if len(v.shape) != 4:
        return None
    b, s, g, n = v.shape
    m = w.rng.randint(2, 5)
    weight = w.parameter(g, n, m)
    forms = [f'torch.einsum("bsgn,gnm->bsgm", {v.text}, {weight})', f"({v.text}.unsqueeze(-2) @ {weight}).squeeze(-2)"]
    forms.append(f"torch.matmul({v.text}.transpose(1, 2), {weight}).transpose(1, 2)")
    return w.let(w.rng.choice(forms), b, s, g, m)


@operator
def attend(w: Scope, v: Value, pool: list[Value]) -> Value | None:
    """Attention of values among themselves."""
    if len(v.shape) != 4:
        return None
    same = [p for p in pool if p.shape == v.shape]
    other = w.rng.choice(same).text if same else v.text
    causal = w.rng.choice(("", ", is_causal=True"))
    q, k = f"{v.text}.transpose(1, 2)", f"{other}.transpose(1, 2)"
    return w.let(f"F.scaled_dot_product_attention({q}, {k}, {k}{causal}).transpose(1, 2)", *v.shape)


@operator
def convolve(w: Scope, v: Value, pool: list[Value]) -> Value | None:
    """Convolutions of one, two and three dims."""
    bias = w.chance(0.5)
    if len(v.shape) == 3:
        n = v.shape[-1]
        m = w.rng.randint(3, 12)
        if w.chance(0.4):
            layer = w.child(f"nn.Conv1d({n}, {n}, 3, padding=2, groups={n}, bias={bias})")
            return w.let(f"{layer}({v.text}.transpose(1, 2))[..., :{v.shape[1]}].transpose(1, 2)", *v.shape)
        layer = w.child(f"nn.Conv1d({n}, {m}, 3, padding=1, bias={bias})")
        return w.let(f"{layer}({v.text}.transpose(1, 2)).mT", *v.shape[:2], m)
    if len(v.shape) == 4:
        b, s, g, n = v.shape
        m = w.rng.randint(2, 5)
        if w.chance(0.3):
            layer = w.child(f"nn.Conv3d(1, {m}, (1, 3, 1), padding=(0, 1, 0), bias={bias})")
            return w.let(f"{layer}({v.text}.unsqueeze(1)).mean(1)", b, s, g, n)
        layer = w.child(f"nn.Conv2d({g}, {m}, (3, 1), padding=(1, 0), bias={bias})")
        return w.let(f"{layer}({v.text}.transpose(1, 2)).transpose(1, 2)", b, s, m, n)
    return None


@operator
def norm(w: Scope, v: Value, pool: list[Value]) -> Value | None:
    """A norm over the last dim or two."""
    n = v.shape[-1]
    forms = [f"nn.LayerNorm({n})", f"nn.RMSNorm({n}, eps=1e-5)", f"nn.LayerNorm({n}, elementwise_affine=False)"]
    if len(v.shape) > 3 and w.chance(0.4):
        forms = [f"nn.LayerNorm(({v.shape[-2]}, {n}))"]
    if w.chance(0.2):
        return w.let(f"F.rms_norm({v.text}, ({n},))", *v.shape)
    return w.let(f"{w.child(w.rng.choice(forms))}({v.text})", *v.shape) if n > 1 else None


@operator
def look_up(w: Scope, v: Value, pool: list[Value]) -> Value | None:
    """An embedding of something counted."""
    rows = w.rng.randint(5, 12)
    n = v.shape[-1]
    table = w.child(f"nn.Embedding({rows}, {n})")
    ids = w.rng.choice(
        (f"torch.arange({v.shape[1]}) % {rows}", f"({v.text}.sigmoid().mean(-1) * {rows - 1.3:g}).long()")
    )
    if ids[0] == "t":
        wide = "".join(", 1" for _ in v.shape[3:])
        found = f"{table}({ids})" if len(v.shape) < 4 else f"{table}({ids}).view({v.shape[1]}{wide}, {n})"
        return w.let(f"{v.text} + {found}", *v.shape)
    return w.let(f"{v.text} + {table}({ids})", *v.shape)
