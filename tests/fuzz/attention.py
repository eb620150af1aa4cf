"""Attention in many spellings: fused or separate projections, grouped heads, norms, rotations, masks, biases."""

from __future__ import annotations

from fuzz.parts import normed, part
from fuzz.writer import Scope, Value


@part(6)
def attention(w: Scope, x: Value) -> Value:
    """Queries, keys and values by one, two or three products; masks, biases, norms, rotations, grouped heads."""
    b, s, n = x.shape
    d = w.rng.choice((2, 3, 4, 4, 6))
    heads = w.rng.choice((2, 3, 4, 4, 6, 6, 8, 12, 5, 7))
    groups = w.rng.choice([g for g in (1, 1, 1, 2, 3, heads) if heads % g == 0])
    kept = heads // groups
    lead = w.lead(x, 1)
    named = w.chance(0.3)
    if named:
        w.init += [f"self.heads = {heads}", f"self.head_dim = {d}"]
    h_, d_ = ("self.heads", "self.head_dim") if named else (str(heads), str(d))
    q, k, v = (w.module.name(letter) for letter in "qkv")
    if groups == 1 and w.chance(0.5):
        fused = w.product(x, 3 * heads * d)
        forms = (
            [f"{q}, {k}, {v} = {fused.text}.chunk(3, dim=-1)", 0],
            [f"{q}, {k}, {v} = {fused.text}.split({heads * d}, dim=2)", 0],
            [f"{q}, {k}, {v} = {fused.text}.view({lead}, 3, {h_}, {d_}).permute(2, 0, 3, 1, 4).unbind(0)", 1],
            [f"{q}, {k}, {v} = {fused.text}.view({lead}, {h_}, 3, {d_}).permute(3, 0, 2, 1, 4)", 1],
            [f"{q}, {k}, {v} = {fused.text}.view({lead}, {h_}, 3 * {d_}).transpose(1, 2).chunk(3, -1)", 1],
            [f"{q}, {k}, {v} = {fused.text}.view({lead}, {h_}, {d_}, 3).transpose(1, 2).unbind(-1)", 1],
            [f"{q}, {k}, {v} = {fused.text}.reshape({lead}, 3, {h_}, -1).transpose(1, 3).unbind(2)", 1],
        )
        text, is_split = w.rng.choice(forms)
        w.lines.append(str(text))
    elif w.chance(0.35):
        sizes = (heads * d, kept * d, kept * d)
        fused = w.product(x, sum(sizes))
        one, two = sizes[0], sizes[0] + sizes[1]
        w.lines.append(
            w.rng.choice(
                (
                    f"{q}, {k}, {v} = {fused.text}.split([{', '.join(map(str, sizes))}], dim=-1)",
                    f"{q}, {k}, {v} = {fused.text}[..., :{one}], "
                    f"{fused.text}[..., {one}:{two}], {fused.text}[..., {two}:]",
                )
            )
        )
        is_split = 0
    else:
        q, k = w.product(x, heads * d).text, w.product(x, kept * d).text
        v = w.product(x, kept * d).text
        is_split = 0
    wide_norm = w.chance(0.1) and not is_split
    if wide_norm:
        q = normed(w, Value(q, (b, s, heads * d))).text
        k = normed(w, Value(k, (b, s, kept * d))).text
    if not is_split:
        shape_of = w.rng.choice(("view", "reshape"))
        for_q = w.rng.choice(
            (f"{shape_of}({lead}, {h_}, {d_})", f"{shape_of}({lead}, -1, {d_})", f"unflatten(-1, ({h_}, {d_}))")
        )
        for_k = w.rng.choice(
            (f"reshape({lead}, {kept}, {d_})", f"reshape({lead}, -1, {d_})", f"unflatten(-1, (-1, {d}))")
        )
        if is_fused_slice(q) or shape_of == "view":
            for_q = for_q.replace("view", "reshape")
        q = w.let(f"{q}.{for_q}.transpose(1, 2)", b, heads, s, d).text
        k = w.let(f"{k}.{for_k}.transpose(1, 2)", b, kept, s, d).text
        v = w.let(f"{v}.{for_k}.transpose(1, 2)", b, kept, s, d).text
    if w.chance(0.2):
        q, k = (normed_head(w, name, b, count, s, d) for name, count in ((q, heads), (k, kept)))
    if w.chance(0.3) and d % 2 == 0:
        q, k = rotated(w, q, k, s, d)
    if groups > 1 and not w.chance(0.25):
        k, v = (repeated(w, name, b, kept, groups, s, d) for name in (k, v))
        is_grouped = False
    else:
        is_grouped = groups > 1
    out = _mixed(w, q, k, v, (b, heads, s, d), is_grouped)
    back = w.rng.choice(
        (
            f"reshape({lead}, {heads * d})",
            f"reshape({lead}, -1)",
            "flatten(-2)",
            f"contiguous().view({lead}, {h_} * {d_})",
        )
    )
    merged = w.let(f"{out}.transpose(1, 2).{back}", b, s, heads * d)
    if w.chance(0.15):
        gate = w.product(x, heads * d)
        merged = w.let(f"{merged.text} * torch.sigmoid({gate.text})", *merged.shape)
    return w.product(merged, n)


def is_fused_slice(name: str) -> bool:
    """Whether a query may be a strided piece, which ``view`` refuses."""
    return name.startswith("q")


def normed_head(w: Scope, name: str, b: int, heads: int, s: int, d: int) -> str:
    """A norm per head."""
    forms = (
        f"{w.child(f'nn.LayerNorm({d})')}({name})",
        f"{w.child(f'nn.RMSNorm({d}, eps=1e-6)')}({name})",
        f"F.normalize({name}, dim=-1)",
        f"{name} / ({name}.norm(dim=-1, keepdim=True) + 1e-3)",
    )
    return w.let(w.rng.choice(forms), b, heads, s, d).text


def rotated(w: Scope, q: str, k: str, s: int, d: int) -> tuple[str, str]:
    """Rotary positions."""
    table = f"torch.outer(torch.arange({s}).double(), torch.rand({d // 2}).double())"
    angles = w.buffer(f"torch.cat([{table}] * 2, -1)", persistent=False)
    cos, sin = w.let(f"{angles}.cos()", s, d).text, w.let(f"{angles}.sin()", s, d).text
    half = w.rng.choice((str(d // 2), f"{q}.shape[-1] // 2"))
    made = [
        w.let(f"{x} * {cos} + torch.cat((-{x}[..., {half}:], {x}[..., :{half}]), dim=-1) * {sin}", 0).text
        for x in (q, k)
    ]
    return made[0], made[1]


def repeated(w: Scope, name: str, b: int, kept: int, groups: int, s: int, d: int) -> str:
    """Key heads repeated for the query heads of their group."""
    heads = kept * groups
    forms = (
        f"{name}.repeat_interleave({groups}, dim=1)",
        f"{name}[:, :, None].expand({b}, {kept}, {groups}, {s}, {d}).reshape({b}, {heads}, {s}, {d})",
        f"{name}.unsqueeze(2).expand(-1, -1, {groups}, -1, -1).reshape({name}.shape[0], -1, {s}, {d})",
        f"{name}[:, :, None, :, :].expand({b}, {name}.shape[1], {groups}, {s}, {d}).flatten(1, 2)",
    )
    return w.let(w.rng.choice(forms), b, heads, s, d).text


def _mixed(w: Scope, q: str, k: str, v: str, shape: tuple[int, int, int, int], is_grouped: bool) -> str:
    """Attention itself."""
    b, heads, s, d = shape
    kind = w.rng.randrange(6)
    bias, distance = "", f"(torch.arange({s})[:, None] - torch.arange({s})).abs()"
    if kind in (1, 4):
        bias = w.rng.choice(
            (
                w.buffer(f"torch.randn({heads}, 1, 1)"),  # slopes
                w.buffer(f"torch.zeros({s}, {s}).masked_fill(torch.ones({s}, {s}).triu(1).bool(), -1e9)", False),
                w.parameter(heads, s, s),
                w.parameter(1, heads, 1, 1),
                f"{w.child(f'nn.Embedding({s}, {heads})')}({distance}).permute(2, 0, 1)",
            )
        )
    if is_grouped:
        return w.let(f"F.scaled_dot_product_attention({q}, {k}, {v}, enable_gqa=True)", *shape).text
    if kind < 3:
        options = w.rng.choice(("", ", is_causal=True", ", scale=0.3")) if not bias else ""
        if bias:
            if bias.startswith("self") and "(" not in bias and ".c" not in bias:
                options = f", attn_mask={bias}.expand({b}, {heads}, {s}, {s})"
            else:
                options = f", attn_mask={bias} * torch.ones({b}, {heads}, {s}, {s}, dtype={q}.dtype)"
        dropout = ", dropout_p=0.1 if self.training else 0.0" if w.chance(0.15) else ""
        return w.let(f"F.scaled_dot_product_attention({q}, {k}, {v}{options}{dropout})", *shape).text
    scale = w.rng.choice((f"* {d**-0.5}", f"/ {q}.size(-1) ** 0.5", f"* {q}.shape[-1] ** -0.5", ""))
    scores = w.let(
        w.rng.choice((
            f"{q} @ {k}.transpose(-1, -2) {scale}",
            f"torch.matmul({q}, {k}.mT) {scale}",
            f'torch.einsum("bhid,bhjd->bhij", {q}, {k}) {scale}',
        )),
        b, heads, s, s,
    )  # fmt: skip
    if w.chance(0.1):  # before anything is masked: sums of large numbers round
        scores = w.let(f"{w.child(f'nn.Conv2d({heads}, {heads}, 1)')}({scores.text})", *scores.shape)
    if bias:
        scores = w.let(f"{scores.text} + {bias}", *scores.shape)
    if w.chance(0.4):
        mask = w.buffer(f"torch.ones({s}, {s}, dtype=torch.bool).tril()", False)
        fill = w.rng.choice((f"{scores.text}.masked_fill(~{mask}, -1e9)", f"torch.where({mask}, {scores.text}, -1e9)"))
        scores = w.let(fill, *scores.shape)
    softmax = w.rng.choice(("F.softmax({}, dim=-1)", "{}.softmax(-1)", "F.softmax({}, -1, dtype=torch.float64)"))
    weights = w.let(softmax.format(scores.text), *scores.shape)
    if w.chance(0.2):
        weights = w.let(f"F.dropout({weights.text}, 0.1, training=self.training)", *weights.shape)
    return w.let(
        w.rng.choice((f"{weights.text} @ {v}", f'torch.einsum("bhij,bhjd->bhid", {weights.text}, {v})')), *shape
    ).text
