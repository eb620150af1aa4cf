"""Fourier transforms and complex numbers.

A transform is linear and works along its own dims; every other dim may be split. A complex value is split and summed
like a real one, but no collective moves it (`storing.price_move`): it is moved before or after, as a real one.
"""

from __future__ import annotations

from ..placement import Replicate, Shard
from .base import Operation, Result, rule, wrapped
from .pointwise import joint, linear_unary, shards

_ONE_DIM = ("fft_fft", "fft_ifft", "fft_rfft", "fft_irfft", "fft_hfft", "fft_ihfft")
_TWO_DIMS = ("fft_fft2", "fft_ifft2", "fft_rfft2", "fft_irfft2")
_MANY_DIMS = ("fft_fftn", "fft_ifftn", "fft_rfftn", "fft_irfftn")
_ORDERS = ("fft_fftshift", "fft_ifftshift")


def _transformed(op: Operation) -> set[int]:
    """The dims that a transform works along: without a list of them, as many trailing ones as lengths are given, or
    all."""
    rank = len(op.shape(op.argument(0)))
    name = op.node.op
    if name in _ORDERS:
        dims = op.argument(1, "dim")
    elif name in _ONE_DIM:
        dims = op.argument(2, "dim", -1)
    else:
        dims = op.argument(2, "dim", (-2, -1) if name in _TWO_DIMS else None)
        lengths = op.argument(1, "s")
        dims = range(-len(lengths), 0) if dims is None and lengths is not None else dims
    listed = range(rank) if dims is None else [dims] if isinstance(dims, int) else dims
    return {wrapped(d, rank) for d in listed}


@rule(*_ONE_DIM, *_TWO_DIMS, *_MANY_DIMS, *_ORDERS)
def transform(op: Operation) -> Result:
    """Any dim that is not transformed may be split; a partial sum passes."""
    match op.placement(op.argument(0)):
        case Shard(d) as placement:
            return None if d in _transformed(op) else placement
        case placement:
            return placement


@rule("stft", "istft")
def short_time_transform(op: Operation) -> Result:
    """Signals ``[batch, ...]`` with a whole window: the batch may be split; a partial sum passes."""
    x = op.argument(0)
    if not all(isinstance(op.placement(t), Replicate) for t in op.tensors[1:]):
        return None
    match op.placement(x):
        case Shard(d) as placement:
            batched = len(op.shape(x)) == (2 if op.node.op == "stft" else 3)
            return placement if d == 0 and batched else None
        case placement:
            return placement


@rule("view_as_real", "view_as_complex")
def as_pairs(op: Operation) -> Result:
    """Real and imaginary parts as a last dim of two, which is not split."""
    x = op.argument(0)
    match op.placement(x):
        case Shard(d) as placement:
            pairs = op.node.op == "view_as_complex" and d == len(op.shape(x)) - 1
            return None if pairs else placement
        case placement:
            return placement


@rule("imag", "_conj", "conj_physical", "resolve_conj", "resolve_neg")
def part(op: Operation) -> Result:
    """Linear over the real numbers, and sums have real coefficients."""
    return linear_unary(op)


@rule("complex")
def complex_(op: Operation) -> Result:
    """Linear in both parts together."""
    return joint(op)


@rule("polar")
def polar(op: Operation) -> Result:
    """``r, phi -> r exp(i phi)``: linear in r, but torch's derivative takes r for positive, and partial sums may be
    negative."""
    return shards(op, len(op.node.shape), op.node.shape)
