"""Rows of `fuzz.operators` beside those of transformers: spectra, complex numbers, statistics, losses, scatters."""

from __future__ import annotations

from fuzz.operators import along, binary, operator, unary
from fuzz.writer import MAX_NUMEL, Scope, Value

_COMPLEX = "torch.complex({a}, {a}.cos())"
unary(
    "torch.polar({a}.abs() + 0.1, {a}).real", f"{_COMPLEX}.imag", f"torch.view_as_real({_COMPLEX})[..., 1]",
    "torch.view_as_complex(torch.stack([{a}, -{a}], -1)).imag", f"{_COMPLEX}.conj().resolve_conj().imag",
    f"torch.conj_physical({_COMPLEX}).imag", "torch.resolve_neg({a})", f"({_COMPLEX} * {_COMPLEX}.conj()).real",
    "{a} + torch.bucketize({a}.detach(), torch.linspace(-2.07, 2.11, 5, dtype=torch.float64))",
    "{a} + torch.searchsorted(torch.linspace(-2.07, 2.11, 5, dtype=torch.float64), {a}.detach())",
    "{a} * ~torch.isin((3 * {a}).round().long(), torch.tensor([1, 2]))",
)  # fmt: skip
binary(
    "F.mse_loss({a}, {b} + 0 * {a}, reduction='none')", "F.l1_loss({a}, {b} + 0 * {a}, reduction='none')",
    "F.smooth_l1_loss({a}, {b} + 0 * {a}, reduction='none')", "F.huber_loss({a}, {b} + 0 * {a}, reduction='none')",
    "F.binary_cross_entropy_with_logits({a}, ({b} + 0 * {a}).sigmoid(), reduction='none')",
    "F.kl_div({a}, ({b} + 0 * {a}).sigmoid(), reduction='none')",
    "torch.linalg.vecdot({a}, {b} + 0 * {a}).unsqueeze(-1) * {a}",
    "F.cosine_similarity({a}, {b} + 0 * {a}, dim=-1).unsqueeze(-1) * {a}",
    "F.pairwise_distance({a}, {b} + 0 * {a} + 9).unsqueeze(-1) * {a}",
    "{a}.masked_scatter({a} > 0.313, {b} + 0 * {a})",
)  # fmt: skip
along(
    "torch.fft.fft({a}, dim={d}).real", "torch.fft.ifft({a}, dim={d}).imag", "torch.fft.fftshift({a}, dim={d})",
    "torch.fft.ifftshift({a}, dim={d})", "torch.fft.irfft(torch.fft.rfft({a}, dim={d}), n={a}.shape[{d}], dim={d})",
    "torch.fft.hfft(torch.fft.ihfft({a}, dim={d}), n={a}.shape[{d}], dim={d})",
    "torch.fft.ifftn(torch.fft.fftn({a}, dim=(1, {d})) if {d} % {a}.dim() != 1 else {a} + 0j, dim=({d},)).real",
    "torch.fft.irfftn(torch.fft.rfftn({a}, dim=({d},)), s=({a}.shape[{d}],), dim=({d},))",
    "torch.cummax({a}, {d})[0]", "torch.cummin({a}, {d})[0]", "{a} - {a}.kthvalue(1, {d}, keepdim=True)[0]",
    "{a} - {a}.median({d}, keepdim=True).values", "{a} - {a}.nanmedian({d}, keepdim=True).values",
    "{a} * {a}.mode({d}, keepdim=True).values", "{a} - {a}.nanmean({d}, keepdim=True)",
    "{a} * {a}.sigmoid().nansum({d}, keepdim=True)", "{a} - torch.var_mean({a}, dim={d}, keepdim=True)[1]",
    "{a} / (torch.std_mean({a}, dim={d}, keepdim=True)[0] + 1)", "{a} + 0.1 * {a}.detach().argsort({d})",
    "{a} - torch.aminmax({a}, dim={d}, keepdim=True)[0]", "torch.diff({a}, dim={d}, prepend={a}.narrow({d}, 0, 1))",
    "{a}.index_fill({d}, torch.tensor([0]), 0.3)", "{a}.index_copy({d}, torch.tensor([1]), {a}.narrow({d}, 0, 1))",
    "torch.take_along_dim({a}, {a}.detach().argsort({d}), {d})", "{a}.gather({d}, {a}.detach().argsort({d}))",
    "{a}.scatter_reduce({d}, {a}.detach().argsort({d}).narrow({d}, 0, 1), {a}.narrow({d}, 0, 1), 'sum')",
    "{a}.scatter_add({d}, {a}.detach().argsort({d}), {a})",
)  # fmt: skip


@operator
def windows(w: Scope, v: Value, pool: list[Value]) -> Value | None:
    """Overlapping windows of the last dim."""
    n = v.shape[-1]
    if n < 3 or len(v.shape) > 3 or v.numel * 2 > MAX_NUMEL:
        return None
    size = w.rng.choice((2, 3))
    return w.let(f"{v.text}.unfold(-1, {size}, 1)", *v.shape[:-1], n - size + 1, size)


@operator
def diagonals(w: Scope, v: Value, pool: list[Value]) -> Value | None:
    """A matrix with the last dim on its diagonal, or the diagonal of one."""
    n = v.shape[-1]
    if len(v.shape) == 4:
        return w.let(f"torch.diagonal({v.text}, dim1=-2, dim2=-1)", *v.shape[:2], min(v.shape[-2:]))
    return w.let(f"torch.diag_embed({v.text})", *v.shape, n) if v.numel * n <= MAX_NUMEL else None


@operator
def against_rows(w: Scope, v: Value, pool: list[Value]) -> Value | None:
    """Products of another kind with a weight."""
    n, m = v.shape[-1], w.rng.randint(3, 12)
    forms = [f"torch.inner({v.text}, {w.parameter(m, n)})", f"torch.tensordot({v.text}, {w.parameter(n, m)}, dims=1)"]
    if len(v.shape) == 3:
        forms.append(f"torch.cdist({v.text}, {w.parameter(m, n)})")
    return w.let(w.rng.choice(forms), *v.shape[:-1], m)


@operator
def bilinear(w: Scope, v: Value, pool: list[Value]) -> Value | None:
    """A product with two values at once."""
    n, m = v.shape[-1], w.rng.randint(3, 8)
    if n > 12:
        return None
    return w.let(f"{w.child(f'nn.Bilinear({n}, {n}, {m})')}({v.text}, torch.tanh({v.text}))", *v.shape[:-1], m)


@operator
def bags(w: Scope, v: Value, pool: list[Value]) -> Value | None:
    """Sums of some rows of a table for every element of the batch."""
    b, n = v.shape[0], v.shape[-1]
    rows = w.rng.choice((8, 12, 15))
    mode = w.rng.choice(("sum", "mean", "max"))
    made = f'F.embedding_bag(torch.arange({3 * b}).view({b}, 3) % {rows}, {w.parameter(rows, n)}, mode="{mode}")'
    ones = ", ".join("1" for _ in v.shape[1:-1])
    return w.let(f"{v.text} + {made}.view({b}, {ones}, {n})", *v.shape)


@operator
def turned(w: Scope, v: Value, pool: list[Value]) -> Value | None:
    """The last two dims turned by a quarter."""
    if len(v.shape) != 4:
        return None
    return w.let(f"torch.rot90({v.text}, 1, [2, 3])", *v.shape[:2], v.shape[3], v.shape[2])


@operator
def weight_normed(w: Scope, v: Value, pool: list[Value]) -> Value | None:
    """A product with a weight of known length and learned direction."""
    n, m = v.shape[-1], w.rng.randint(3, 16)
    weight = f"torch._weight_norm({w.parameter(m, n)}, {w.parameter(m, 1)}, 0)"
    return w.let(f"F.linear({v.text}, {weight})", *v.shape[:-1], m)
