"""What blocks are made of: feed-forwards, attention, routing, convolutions, recurrences, and soups of operators."""

from __future__ import annotations

from collections.abc import Callable

from fuzz.operators import FORMS, OPERATORS, divisors
from fuzz.writer import MAX_NUMEL, Scope, Value

Part = Callable[[Scope, Value], Value]
PARTS: dict[str, tuple[Part, int]] = {}
ACTIVATIONS = ("F.gelu", "F.silu", "torch.relu", "torch.tanh", "F.softplus", "torch.sigmoid", "nn.functional.gelu")


def part(weight: int) -> Callable[[Part], Part]:
    """Adds a part, drawn in proportion to ``weight``."""

    def add(function: Part) -> Part:
        PARTS[function.__name__] = (function, weight)
        return function

    return add


def draw_part(w: Scope) -> Part:
    """A random one."""
    functions, weights = zip(*PARTS.values(), strict=True)
    chosen: Part = w.rng.choices(functions, weights)[0]
    return chosen


def normed(w: Scope, x: Value) -> Value:
    """A norm of the last dim, in one of many spellings."""
    n = x.shape[-1]
    kind = w.rng.randrange(8)
    if kind < 3:
        return w.let(f"{w.child(f'nn.LayerNorm({n})')}({x.text})", *x.shape)
    if kind < 5:
        return w.let(f"{w.child(f'nn.RMSNorm({n}, eps=1e-6)')}({x.text})", *x.shape)
    if kind == 5:
        rms = f"torch.rsqrt({x.text}.pow(2).mean(-1, keepdim=True) + 1e-6)"
        return w.let(f"{w.parameter(n)} * ({x.text} * {rms})", *x.shape)
    if kind == 6:
        centred = w.let(f"{x.text} - {x.text}.mean(-1, keepdim=True)", *x.shape)
        spread = w.let(f"{centred.text}.square().mean(-1, keepdim=True)", *x.shape[:-1], 1)
        weights = f"* {w.parameter(n)} + {w.parameter(n)}"
        return w.let(f"{centred.text} / torch.sqrt({spread.text} + 1e-5) {weights}", *x.shape)
    groups = w.rng.choice([d for d in (1, 2, 4) if n % d == 0])
    if len(x.shape) != 3:
        return w.let(f"F.layer_norm({x.text}, ({n},))", *x.shape)
    return w.let(f"{w.child(f'nn.GroupNorm({groups}, {n})')}({x.text}.transpose(1, 2)).transpose(1, 2)", *x.shape)


def widths(w: Scope) -> int:
    """A hidden width, odd ones and multiples of many numbers."""
    return w.rng.choice((12, 16, 24, 24, 32, 36, 40, 48, 13, 21, 30, 35))


def _gate(w: Scope, wide: Value) -> Value:
    """Gate and up out of one product, cut in one of many ways."""
    n = wide.shape[-1] // 2
    lead = wide.shape[:-1]
    act = w.rng.choice(ACTIVATIONS)
    a, b = w.module.name("a"), w.module.name("b")
    cuts = (
        f"{a}, {b} = {wide.text}.chunk(2, dim=-1)",
        f"{a}, {b} = {wide.text}.split({n}, -1)",
        f"{a}, {b} = torch.split({wide.text}, [{n}, {n}], dim=-1)",
        f"{a}, {b} = {wide.text}[..., :{n}], {wide.text}[..., {n}:]",
        f"{a}, {b} = {wide.text}[..., ::2], {wide.text}[..., 1::2]",
        f"{a}, {b} = {wide.text}.unflatten(-1, (2, {n})).unbind(-2)",
        f"{a}, {b} = {wide.text}.view({w.lead(wide, 1)}, {n}, 2).unbind(-1)",
        f"{a}, {b} = {wide.text}.narrow(-1, 0, {n}), {wide.text}.narrow(-1, {n}, {n})",
    )
    if w.chance(0.1):
        return w.let(f"F.glu({wide.text}, dim=-1)", *lead, n)
    w.lines.append(w.rng.choice(cuts))
    return w.let(f"{act}({a}) * {b}", *lead, n)


@part(5)
def feed_forward(w: Scope, x: Value) -> Value:
    """Up, a nonlinearity or a gate, down."""
    n, width = x.shape[-1], widths(w)
    act = w.rng.choice(ACTIVATIONS)
    kind = w.rng.randrange(5)
    if kind == 0:
        inner = w.let(f"{act}({w.product(x, width).text})", *x.shape[:-1], width)
    elif kind == 1:
        up, gate = w.product(x, width), w.product(x, width)
        inner = w.let(f"{act}({gate.text}) * {up.text}", *up.shape)
    elif kind == 2:
        inner = _gate(w, w.product(x, 2 * width))
    elif kind == 3:
        layers = f"nn.Linear({n}, {width}), nn.{w.rng.choice(('GELU', 'ReLU', 'SiLU'))}(), nn.Dropout(0.1)"
        return w.let(f"{w.child(f'nn.Sequential({layers}, nn.Linear({width}, {n}))')}({x.text})", *x.shape)
    else:
        one, two = w.product(x, width), w.product(x, widths(w))
        narrow = w.product(Value(f"{act}({one.text})", one.shape), two.shape[-1])
        inner = w.let(f"{narrow.text} + {act}({two.text})", *two.shape)
    if w.chance(0.25):
        inner = normed(w, inner)
    if w.chance(0.2):
        inner = w.let(f"{w.child('nn.Dropout(0.2)')}({inner.text})", *inner.shape)
    return w.product(inner, n)


@part(3)
def routed(w: Scope, x: Value) -> Value:
    """Experts that a router weighs, all of them computed, or looped over with a mask."""
    n, width = x.shape[-1], w.rng.choice((8, 12, 16, 10))
    experts = w.rng.choice((2, 3, 4, 4, 6, 8))
    act = w.rng.choice(ACTIVATIONS)
    scores = w.product(x, experts, bias=False)
    gates = w.let(f"{w.rng.choice(('F.softmax({}, dim=-1)', 'torch.sigmoid({})')).format(scores.text)}", *scores.shape)
    if w.chance(0.7):
        k = w.rng.randint(1, max(1, experts // 2))
        best, index = w.module.name("t"), w.module.name("i")
        w.lines.append(f"{best}, {index} = torch.topk({gates.text}, {k}, dim=-1)")
        if w.chance(0.4):
            w.lines.append(f"{best} = {best} / ({best}.sum(-1, keepdim=True) + 1e-6)")
        hot = f"(F.one_hot({index}, {experts}) * {best}.unsqueeze(-1)).sum(-2)"
        gates = w.let(w.rng.choice((hot, f"torch.zeros_like({gates.text}).scatter(-1, {index}, {best})")), *gates.shape)
    up, down = w.parameter(experts, n, width), w.parameter(experts, width, n)
    kind = w.rng.randrange(4)
    if kind == 0:
        inner = f'{act}(torch.einsum("bsn,enw->bsew", {x.text}, {up}))'
        return w.let(f'torch.einsum("bsew,ewn,bse->bsn", {inner}, {down}, {gates.text})', *x.shape)
    if kind == 1:
        flat = w.let(f"{x.text}.reshape(1, -1, {n}).expand({experts}, -1, -1)", experts, x.shape[0] * x.shape[1], n)
        inner = w.let(f"{act}(torch.bmm({flat.text}, {up}))", experts, flat.shape[1], width)
        out = w.let(f"torch.bmm({inner.text}, {down})", experts, flat.shape[1], n)
        weighed = f"({out.text} * {gates.text}.reshape(-1, {experts}).t().unsqueeze(-1)).sum(0)"
        return w.let(f"{weighed}.view({x.shape[0]}, {x.shape[1]}, {n})", *x.shape)
    if kind == 2:
        made = w.let(f"torch.zeros_like({x.text})", *x.shape, hint="acc")
        w.lines.append(f"for e in range({experts}):")
        mixed = f"{act}({x.text} @ {up}[e]) @ {down}[e]"
        w.lines.append(f"    {made.text} = {made.text} + {gates.text}[..., e : e + 1] * ({mixed})")
        return made
    expert = f"nn.Sequential(nn.Linear({n}, {width}), nn.SiLU(), nn.Linear({width}, {n}))"
    layers = w.child(f"nn.ModuleList([{expert} for _ in range({experts})])")
    made = w.let(f"{gates.text}[..., :1] * {layers}[0]({x.text})", *x.shape, hint="acc")
    w.lines.append(f"for e in range(1, {experts}):")
    w.lines.append(f"    {made.text} = {made.text} + {gates.text}[..., e].unsqueeze(-1) * {layers}[e]({x.text})")
    return made


@part(2)
def convolution(w: Scope, x: Value) -> Value:
    """A convolution over positions, gated or separable."""
    b, s, n = x.shape
    width = w.rng.choice((8, 12, 16, 18, 15))
    act = w.rng.choice(ACTIVATIONS)
    turned = w.let(f"{x.text}.transpose(1, 2)", b, n, s)
    kind = w.rng.randrange(4)
    if kind == 0:
        up = w.child(f"nn.Conv1d({n}, {width}, 3, padding=1)")
        down = w.child(f"nn.Conv1d({width}, {n}, 1, bias={w.chance(0.5)})")
        return w.let(f"{down}({act}({up}({turned.text}))).transpose(1, 2)", b, s, n)
    if kind == 1:
        up = w.child(f"nn.Conv1d({n}, {2 * width}, 1)")
        deep = w.child(f"nn.Conv1d({width}, {width}, 3, padding=1, groups={width})")
        down = w.child(f"nn.Conv1d({width}, {n}, 1)")
        return w.let(f"{down}({act}({deep}(F.glu({up}({turned.text}), dim=1)))).transpose(1, 2)", b, s, n)
    if kind == 2:
        inner = w.product(x, width)
        deep = w.child(f"nn.Conv1d({width}, {width}, 4, padding=3, groups={width})")
        mixed = w.let(f"{deep}({inner.text}.transpose(1, 2))[..., :{s}].transpose(1, 2)", b, s, width)
        gate = w.product(x, width)
        return w.product(Value(f"({act}({mixed.text}) * {gate.text})", mixed.shape), n)
    up = w.child(f"nn.Conv2d(1, {width}, (3, 1), padding=(1, 0))")
    down = w.child(f"nn.Conv2d({width}, 1, 1)")
    return w.let(f"{down}({act}({up}({x.text}.unsqueeze(1)))).squeeze(1)", b, s, n)


@part(2)
def recurrent(w: Scope, x: Value) -> Value:
    """A scan over positions: decayed sums, linear attention, a loop of steps."""
    b, s, n = x.shape
    width = w.rng.choice((8, 12, 16, 14))
    kind = w.rng.randrange(3)
    if kind == 0:
        inner, gate = w.product(x, width), w.product(x, width)
        decay = w.parameter(width)
        state = w.module.name("state")
        w.lines += [f"{state} = torch.zeros_like({inner.text}[:, 0])", f"steps_{state} = []", f"for t in range({s}):"]
        w.lines.append(
            f"    {state} = torch.sigmoid({decay}) * {state} + {inner.text}[:, t] * torch.sigmoid({gate.text}[:, t])"
        )
        w.lines.append(f"    steps_{state}.append({state})")
        return w.product(w.let(f"torch.stack(steps_{state}, dim=1)", b, s, width), n)
    if kind == 1:
        heads, d = w.rng.choice((2, 3, 4, 6)), 4
        q, k, v = (w.product(x, heads * d) for _ in range(3))
        names = [w.let(f"{y.text}.view({w.lead(y, 1)}, {heads}, {d})", b, s, heads, d).text for y in (q, k, v)]
        turned = [w.let(f"F.elu({y}) + 1", b, s, heads, d).text for y in names[:2]]
        sums = w.let(f'torch.einsum("bshd,bshe->bshde", {turned[1]}, {names[2]}).cumsum(1)', b, s, heads, d, d)
        out = w.let(f'torch.einsum("bshd,bshde->bshe", {turned[0]}, {sums.text})', b, s, heads, d)
        total = w.let(f"({turned[0]} * {turned[1]}.cumsum(1)).sum(-1, keepdim=True)", b, s, heads, 1)
        return w.product(w.let(f"({out.text} / ({total.text} + 1e-2)).flatten(2)", b, s, heads * d), n)
    inner = w.product(x, width)
    shifted = w.let(f"F.pad({inner.text}, (0, 0, 1, 0))[:, :-1]", *inner.shape)
    mix = w.parameter(width)
    return w.product(
        w.let(f"torch.relu(torch.lerp({inner.text}, {shifted.text}, torch.sigmoid({mix})))", *inner.shape), n
    )


@part(2)
def squeezed(w: Scope, x: Value) -> Value:
    """A gate from all positions, or a low-rank pair."""
    b, s, n = x.shape
    if w.chance(0.5):
        pooled = w.let(f"{x.text}.mean(dim=1, keepdim={w.chance(0.5)})", b, n)
        inner = w.product(Value(f"{x.text}.mean(1)", (b, n)), widths(w))
        gate = w.product(Value(f"torch.relu({inner.text})", inner.shape), n)
        return w.let(f"{x.text} * torch.sigmoid({gate.text}).unsqueeze(1) + 0 * {pooled.text}.mean()", *x.shape)
    low = w.product(x, w.rng.choice((2, 3, 4)))
    if w.chance(0.5):
        low = normed(w, low)
    return w.product(w.product(low, widths(w)), n)


@part(9)
def soup(w: Scope, x: Value) -> Value:
    """Random operators on random values, and a product back."""
    b, s, n = x.shape
    pool = [w.product(x, w.rng.choice((12, 16, 24, 8, 18, 20, 30, 15))) for _ in range(w.rng.randint(1, 2))]
    if w.chance(0.6):
        value = pool[-1]
        found = divisors(value.shape[-1])
        a = w.rng.choice(found) if found else 1
        pool.append(
            w.let(f"{value.text}.view({w.lead(value, 1)}, {a}, {value.shape[-1] // a})", b, s, a, value.shape[-1] // a)
        )
    rows, weights = list(OPERATORS.values()), [FORMS.get(name, 1) for name in OPERATORS]
    for row in w.rng.choices(rows, weights, k=w.rng.randint(5, 14)):
        value = w.rng.choice(pool[-3:])
        made = row(w, value, pool)
        if made is not None and made.numel <= MAX_NUMEL and made.shape[:2] == (b, s):
            pool.append(made)
    ends = [pool[-1]] + ([w.rng.choice(pool)] if w.chance(0.4) else [])
    flat = []
    for value in ends:
        size = value.numel // (b * s)
        form = w.rng.choice((f"{value.text}.flatten(2)", f"{value.text}.reshape({b}, {s}, -1)"))
        flat.append(
            w.let(
                form
                if len(value.shape) > 3
                else value.text
                if len(value.shape) == 3
                else f"{value.text}.unsqueeze(-1)",
                b,
                s,
                size,
            )
        )
    outs = [w.product(value, n) for value in flat]
    return outs[0] if len(outs) == 1 else w.let(" + ".join(o.text for o in outs), *x.shape)
