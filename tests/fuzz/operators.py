"""One random operator on random values: the rows from which `soup` draws, each keeping [batch, positions] in front."""

from __future__ import annotations

from collections.abc import Callable

from fuzz.writer import Scope, Value

Operator = Callable[[Scope, Value, list[Value]], Value | None]
OPERATORS: dict[str, Operator] = {}
# Rows of several forms are drawn more often, so that every form is.
FORMS = {
    "gather_rows": 8, "write_rows": 12, "write_slice": 3, "made_new": 6, "pad": 4, "triangle": 4, "swap": 6,
    "repeat": 4, "join": 5, "cut": 5, "pair": 6, "convolve": 4, "insert": 3, "as_other": 4, "take_one": 3, "ravel": 2,
    "largest": 3,
}  # fmt: skip

# One value in, one of its shape out. Kept near 1, and away from where a rounding error changes the result: a centred
# value's mean is 0 or 1e-17, so nothing is compared with 0.
UNARY = (
    "F.relu({a})", "F.gelu({a})", "F.silu({a})", "torch.sigmoid({a})", "torch.tanh({a})", "torch.exp(-{a}.abs())",
    "torch.log({a}.square() + 1.5)", "torch.log1p({a}.abs())", "torch.expm1(-{a}.abs())",
    "torch.sqrt({a}.square() + 0.1)", "torch.rsqrt({a}.pow(2) + 0.5)", "torch.reciprocal({a}.abs() + 1)", "{a}.abs()",
    "{a}.sin()", "{a}.cos()", "torch.tan({a}.sigmoid())", "torch.erf({a})", "F.softplus({a})", "F.elu({a})",
    "F.selu({a})", "F.celu({a})", "F.hardtanh({a})", "F.hardswish({a})", "F.hardsigmoid({a})",
    "F.leaky_relu({a}, 0.1)", "F.mish({a})", "F.relu6({a})", "F.logsigmoid({a})", "{a}.pow(2) * 0.3",
    "{a}.clamp(-1, 1)", "{a}.clamp_min(-0.4)", "{a}.clamp_max(0.6)", "torch.clip({a}, -2.0, 0.9)",
    "(3 * {a}).round() + {a}", "torch.floor(2 * {a} + 0.3) + {a}", "torch.ceil({a} + 0.3) * 0.5 + {a}",
    "{a}.sign() * {a}.square()", "torch.trunc({a}) + {a}", "torch.square({a})", "torch.atan({a})",
    "torch.sinh({a}.tanh())", "torch.cosh({a}.tanh())", "torch.log2({a}.square() + 1)", "{a} * torch.isfinite({a})",
    "{a}.masked_fill(torch.isnan({a}), 0.0)", "torch.where({a}.isinf(), 0.0, {a})", "torch.nan_to_num({a})",
    "F.threshold({a}, 0.1, 0.2)", "F.softsign({a})", "F.softshrink({a}, 0.2)", "{a} + torch.zeros_like({a})",
    "torch.ones_like({a}) - {a}", "torch.full_like({a}, 0.3) * {a}", "torch.empty_like({a}).fill_(0.25) + {a}",
    "torch.sinc({a})", "-{a}", "torch.neg({a})", "{a}.clone()", "{a}.contiguous()", "{a}.detach() * 0.5 + {a}",
    "torch.positive({a})", "torch.conj({a})", "torch.real({a})", "{a}.to(torch.float64)", "{a}.type_as({a})",
    "2.0 - {a}", "{a} / 3.0", "0.7 * {a}", "torch.rsub({a}, 0.4)", "1.0 / ({a}.exp() + 1)",
    "{a}.square().mul(0.5).sub(0.1)", "F.dropout({a}, 0.3, self.training)",
    "torch.alpha_dropout({a}, 0.2, self.training)",
)  # fmt: skip

# Two values of broadcastable shapes.
BINARY = (
    "{a} + {b}", "{a} - {b}", "torch.add({a}, {b}, alpha=2)", "{a}.sub({b})", "torch.rsub({a}, {b})",
    "torch.subtract({a}, {b})", "{a} * {b}", "torch.multiply({a}, {b})", "{a} / ({b}.square() + 1)",
    "torch.divide({a}, {b}.abs() + 1)", "torch.true_divide({a}, {b}.exp() + 1)", "torch.maximum({a}, {b})",
    "torch.minimum({a}, {b})", "torch.max({a}, {b})", "torch.where({a} > {b}, {a}, {b})",
    "torch.where({b} < 0.2, {a}, 0.0)", "{a}.masked_fill({b} > 0.5, 0.0)", "torch.lerp({a}, {b}, 0.3)",
    "torch.hypot({a} + 3, {b})", "torch.atan2({a}, {b}.abs() + 1)", "torch.fmod({a}, {b}.abs() + 1)",
    "torch.remainder({a} + 0.37, {b}.square() + 2)", "torch.xlogy({a}, {b}.square() + 1)",
    "({a}.abs() + 1).pow({b}.sigmoid())", "{a} * (({a} > 0.013) & ({b} > 0.013))",
    "{a} * (({a} > -0.021) | ({b} <= 0.1))", "{a} * (({a} < 0.017) ^ ({b} < 0.017))",
    "{a} * torch.logical_and({a} > 0.011, {b} > 0.013)", "{a} * torch.logical_or({a} > 0.3, {b} > 0.013)",
    "{a} * torch.logical_xor({a} > 0.011, {b} > 0.2)", "{a} * torch.logical_not({b} > 0.013)", "{a} * (~({b} > 0.1))",
    "{a} * torch.bitwise_and({a} > 0.011, {b} > 0.013)", "{a} * torch.bitwise_or({a} > 0.011, {b} > 0.013)",
    "{a} * torch.bitwise_xor({a} > 0.011, {b} > 0.013)", "{a} * torch.bitwise_not({b} > 0.013)",
    "{a} * ({a} != {b} + 7.1)", "{a} + ({a} == {b} + 7.1)", "{a} + torch.eq({a}, {b} + 7.1).type_as({a})",
    "F.silu({a}) * {b}", "F.gelu({b}) * {a}", "torch.floor_divide({a}.detach() + 0.3, {b}.detach().abs() + 1) + {b}",
    "{a} * (1 << (3 * {b}.sigmoid()).long())", "{a} * torch.bitwise_right_shift((9 * {b}.sigmoid()).long(), 1)",
    "torch.div({a}.detach() + 0.3, {b}.detach().abs() + 1, rounding_mode='floor') + {a}",
)  # fmt: skip

# Work along dim {d}, the shape kept.
ALONG = (
    "F.softmax({a}, dim={d})", "{a}.softmax({d})", "F.log_softmax({a}, dim={d})", "torch.cumsum({a}, {d}) * 0.3",
    "torch.cumprod({a}.tanh(), {d})", "torch.logcumsumexp({a}, {d})", "torch.flip({a}, [{d}])",
    "torch.roll({a}, 1, {d})", "{a}.roll(shifts=-1, dims={d})", "{a}.sort(dim={d})[0]",
    "torch.sort({a}, dim={d}, descending=True).values", "{a} - {a}.mean({d}, keepdim=True)",
    "{a} - {a}.amax({d}, keepdim=True)", "{a} * torch.rsqrt({a}.pow(2).mean({d}, keepdim=True) + 1e-5)",
    "{a} / {a}.norm(dim={d}, keepdim=True).clamp_min(1e-3)", "F.normalize({a}, dim={d})",
    "{a} / (1 + torch.linalg.vector_norm({a}, dim={d}, keepdim=True))", "{a} / {a}.shape[{d}] * 4",
    "({a} - {a}.mean({d}, True)) / ({a}.var({d}, keepdim=True, unbiased=False) + 0.1).sqrt()",
    "{a} / ({a}.std({d}, keepdim=True) + 1)", "{a} * ({a}.argmax({d}, keepdim=True) + 1)",
    "{a} + {a}.argmin({d}, keepdim=True)", "{a} * ({a} > 0.013).any({d}, keepdim=True)",
    "{a} * ({a} > -1).all({d}, keepdim=True)", "{a} + torch.count_nonzero({a} > 0.011, dim={d}).unsqueeze({d})",
    "{a} * {a}.sigmoid().sum({d}, keepdim=True)", "{a} - torch.logsumexp({a}, {d}, keepdim=True)",
    "{a} + {a}.tanh().prod({d}, keepdim=True)", "{a} * {a}.amin({d}, keepdim=True)",
    "{a} - {a}.max({d}, keepdim=True)[0]", "{a} + {a}.min({d}, keepdim=True).values",
)  # fmt: skip

REDUCTIONS = (
    "{a}.sum({d})", "{a}.mean({d})", "torch.mean({a}, dim={d})", "{a}.amax({d})", "{a}.amin(dim={d})",
    "torch.logsumexp({a}, {d})", "{a}.var({d})", "{a}.std({d}) + 0.1", "{a}.norm(dim={d})", "{a}.tanh().prod({d})",
    "{a}.max({d})[0]", "{a}.min({d}).values", "torch.linalg.vector_norm({a}, dim={d})",
    "{a}.square().mean(dim=({d},))",
)  # fmt: skip


def operator(function: Operator) -> Operator:
    """Adds a row."""
    OPERATORS[function.__name__] = function
    return function


def _of_templates(
    kind: str, templates: tuple[str, ...], write: Callable[[Scope, Value, list[Value], str], Value | None]
) -> None:
    for template in templates:
        OPERATORS[f"{kind} {template}"] = lambda w, v, pool, template=template: write(w, v, pool, template)


def _unary(w: Scope, v: Value, pool: list[Value], template: str) -> Value:
    return w.let(template.format(a=v.text), *v.shape)


def partner(w: Scope, v: Value, pool: list[Value]) -> Value:
    """Something that broadcasts to ``v``: another value, a part of one, a parameter, a buffer, ``v`` itself."""
    same = [p for p in pool if p.shape == v.shape and p.text != v.text]
    made = w.rng.randrange(8)
    if same and made < 4:
        return w.rng.choice(same)
    if made == 4:
        return w.let(f"{v.text}.mean(-1, keepdim=True)", *v.shape[:-1], 1)
    if made == 5:
        tail = v.shape[-w.rng.randint(1, max(1, len(v.shape) - 2)) :]
        return Value(w.parameter(*tail), tail)
    if made == 6:
        tail = (*v.shape[2:-1], 1) if w.chance(0.4) else v.shape[-1:]
        return Value(w.buffer(f"torch.randn({', '.join(map(str, tail))})"), tail)
    if made == 7 and same:
        other = w.rng.choice(same)
        return w.let(f"{other.text}[:, :1]", other.shape[0], 1, *other.shape[2:])
    return w.let(f"torch.tanh({v.text})", *v.shape)


def _binary(w: Scope, v: Value, pool: list[Value], template: str) -> Value:
    other = partner(w, v, pool)
    return w.let(template.format(a=v.text, b=other.text), *v.shape)


def dim_of(w: Scope, v: Value, first: int = 1) -> int:
    """A dim, the last ones more often, counted from either end."""
    dim = w.rng.choice([*range(first, len(v.shape)), *range(2, len(v.shape)), len(v.shape) - 1])
    return dim - len(v.shape) * w.rng.randrange(2)


def _along(w: Scope, v: Value, pool: list[Value], template: str) -> Value | None:
    dim = dim_of(w, v)
    return None if v.shape[dim] < 2 else w.let(template.format(a=v.text, d=dim), *v.shape)


def _reduction(w: Scope, v: Value, pool: list[Value], template: str) -> Value | None:
    if len(v.shape) < 3:
        return None
    dim = dim_of(w, v, 2)
    if v.shape[dim] < 2:
        return None
    at = dim % len(v.shape)
    return w.let(template.format(a=v.text, d=dim), *v.shape[:at], *v.shape[at + 1 :])


def unary(*templates: str) -> None:
    """Adds rows of one value in and one of its shape out."""
    _of_templates("unary", templates, _unary)


def binary(*templates: str) -> None:
    """Adds rows of two values of broadcastable shapes."""
    _of_templates("binary", templates, _binary)


def along(*templates: str) -> None:
    """Adds rows that work along a dim and keep the shape."""
    _of_templates("along", templates, _along)


unary(*UNARY)
binary(*BINARY)
along(*ALONG)
_of_templates("reduction", REDUCTIONS, _reduction)


def divisors(n: int) -> list[int]:
    """Proper ones."""
    return [d for d in range(2, n) if n % d == 0]
