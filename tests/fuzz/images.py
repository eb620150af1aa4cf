"""Convolutional networks: the hidden dim as channels, or spread over an image of its own for every position."""

from __future__ import annotations

from fuzz.parts import ACTIVATIONS, part
from fuzz.writer import Scope, Value

SIDE = 4


@part(3)
def image(w: Scope, x: Value) -> Value:
    """Channels from a product, two or three layers over an image of ``SIDE * SIDE``, pooled and projected back."""
    b, s, n = x.shape
    channels = w.rng.choice((4, 6, 8, 12))
    wide = w.product(Value(f"{x.text}.mean(1)", (b, n)), channels * SIDE * SIDE)
    h = w.let(f"{wide.text}.view({b}, {channels}, {SIDE}, {SIDE})", b, channels, SIDE, SIDE)
    for _ in range(w.rng.randint(1, 3)):
        h = _layer(w, h)
    c = h.shape[1]
    pools = ("F.adaptive_avg_pool2d({}, 1).flatten(1)", "F.adaptive_max_pool2d({}, 1).flatten(1)", "{}.mean((2, 3))")
    pooled = w.let(w.rng.choice(pools).format(h.text), b, c)
    return w.let(f"{x.text} + {w.product(pooled, n).text}.unsqueeze(1)", *x.shape)


def _layer(w: Scope, h: Value) -> Value:
    """A convolution, a norm, an activation, and something that changes the size."""
    b, c, *_ = h.shape
    out = w.rng.choice((4, 6, 8, 12, 10))
    convolutions = [
        (out, f"nn.Conv2d({c}, {out}, 3, padding=1)"),
        (out, f"nn.Conv2d({c}, {out}, 1, bias=False)"),
        (c, f"nn.Conv2d({c}, {c}, 3, padding=1, groups={c})"),
        (out, f"nn.ConvTranspose2d({c}, {out}, 3, padding=1)"),
    ]
    if c % 2 == 0:
        convolutions.append((2 * c, f"nn.Conv2d({c}, {2 * c}, 3, padding=1, groups=2)"))
    out, layer = w.rng.choice(convolutions)
    h = w.let(f"{w.child(layer)}({h.text})", b, out, *h.shape[2:])
    norms = [f"nn.BatchNorm2d({out})", f"nn.InstanceNorm2d({out}, affine=True)", f"nn.GroupNorm(2, {out})", ""]
    norm = w.rng.choice([n for n in norms if "Group" not in n or out % 2 == 0])
    if norm and ("Instance" not in norm or h.shape[2] * h.shape[3] > 1):
        h = w.let(f"{w.child(norm)}({h.text})", *h.shape)
    act = w.rng.choice((*ACTIVATIONS, w.child(f"nn.PReLU({out})")))
    return _resized(w, w.let(f"{act}({h.text})", *h.shape))


def _resized(w: Scope, h: Value) -> Value:
    """Pooled, interpolated, rearranged, or left."""
    b, c, rows, columns = h.shape
    small, large = (rows // 2, columns // 2), (2 * rows, 2 * columns)
    forms: list[tuple[tuple[int, ...], str]] = [((c, rows, columns), "{}")]
    if rows >= 4:
        pools = ("F.max_pool2d({}, 2)", "F.avg_pool2d({}, 2)", f"F.adaptive_avg_pool2d({{}}, {small})")
        forms += [((c, *small), pool) for pool in (*pools, f"F.adaptive_max_pool2d({{}}, {small})")]
        forms.append(((4 * c, *small), "F.pixel_unshuffle({}, 2)"))
        unfolded = f"F.unfold({{}}, 2, stride=2).view({b}, {4 * c}, {small[0]}, {small[1]})"
        folded = f"F.fold({{}}.flatten(2).repeat(1, 4, 1), {large}, 2, stride=2)"
        forms += [((4 * c, *small), unfolded), ((c, *large), folded)] if c <= 6 else []
    if rows <= 4:
        modes = ("'nearest'", "'nearest-exact'", "'bilinear'", "'bicubic'", "'bilinear', antialias=True")
        forms += [((c, *large), f"F.interpolate({{}}, scale_factor=2, mode={mode})") for mode in modes]
        forms += [((c // 4, *large), "F.pixel_shuffle({}, 2)")] if c % 4 == 0 else []
    forms += [((c, rows, columns), "F.channel_shuffle({}, 2)")] if c % 2 == 0 else []
    forms.append(((c, rows, columns), "F.dropout2d({}, 0.2, self.training)"))
    if rows == columns:
        grid = f"torch.linspace(-0.91, 0.87, {b * rows * columns * 2}, dtype=torch.float64)"
        sampled = f"F.grid_sample({{}}, {grid}.view({b}, {rows}, {columns}, 2), align_corners=False)"
        forms.append(((c, rows, columns), sampled))
    shape, form = w.rng.choice(forms)
    return w.let(form.format(h.text), b, *shape)


@part(1)
def sequence_of_channels(w: Scope, x: Value) -> Value:
    """Layers over positions: norms, pools and interpolations of one dim, or of three."""
    b, s, n = x.shape
    width = w.rng.choice((8, 12, 16, 10))
    h = w.let(f"{w.product(x, width).text}.transpose(1, 2)", b, width, s)
    layers = [
        f"{w.child(f'nn.BatchNorm1d({width})')}({h.text})",
        f"F.interpolate(F.avg_pool1d({h.text}, 2), size={s})",
        f"F.interpolate(F.max_pool1d({h.text}, 2), size={s}, mode='linear')",
        f"F.interpolate(F.adaptive_avg_pool1d({h.text}, 2), size={s}, mode='nearest-exact')",
        f"F.interpolate(F.adaptive_max_pool1d({h.text}, 2), size={s})",
        f"{w.child(f'nn.ConvTranspose1d({width}, {width}, 3, padding=1)')}({h.text})",
    ]
    h = w.let(w.rng.choice(layers), b, width, s)
    if width % 8 == 0 and w.chance(0.5):
        cube = f"{h.text}.reshape({b}, {width}, {s}, 1, 1)"
        pool = w.rng.choice(("F.avg_pool3d({}, 1)", "F.max_pool3d({}, 1)", "F.interpolate({}, scale_factor=1.0)"))
        solid = w.child(f"nn.Conv3d({width}, {width}, 1)")
        h = w.let(f"{solid}({pool.format(cube)}).flatten(2)", b, width, s)
    return w.product(Value(f"{h.text}.transpose(1, 2)", (b, s, width)), n)
