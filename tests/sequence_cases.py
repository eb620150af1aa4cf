"""Runs of the operators that models beside transformers are made of: spectra, bags, scatters, statistics, products."""

from __future__ import annotations

import torch
from case_values import Case, b, case, i, p, r
from torch import Tensor


def c(*shape: int) -> Tensor:
    """Complex numbers."""
    return torch.complex(r(*shape), r(*shape))


def _bag(weight: Tensor, ids: Tensor, offsets: Tensor, *more: object) -> Tensor:
    """``F.embedding_bag`` returns the first of what the operator returns."""
    made: Tensor = torch.ops.aten.embedding_bag(weight, ids, offsets, *more)[0]
    return made


def _bags(*arguments: object) -> Case:
    return Case(arguments, function=_bag, zero_pads=(0,))


def _sorted(*shape: int) -> Tensor:
    return p(*shape).sort(-1).values


TWICE, LENGTH = r(2, 2), r(7)
OFFSETS = torch.tensor([0, 2, 5])

SEQUENCE_CASES: dict[str, list[Case]] = {
    # spectra and complex numbers
    **{name: [case(r(4, 6)), case(c(2, 6), None, 0)] for name in ("fft_fft", "fft_ifft", "fft_fftshift")},
    "fft_fftshift": [case(r(4, 6), [1]), case(c(4, 6), 0), case(r(6))],
    "fft_ifftshift": [case(r(4, 6), [1])],
    "fft_rfft": [case(r(4, 6)), case(r(4, 6), 8, 0, "ortho")],
    "fft_irfft": [case(c(4, 6)), case(c(4, 4), 6, 0)],
    "fft_hfft": [case(c(4, 6))],
    "fft_ihfft": [case(r(4, 6), None, 0)],
    "fft_fft2": [case(r(4, 3, 2)), case(c(4, 3, 2), None, [0, 1])],
    "fft_ifft2": [case(c(4, 3, 2))],
    "fft_rfft2": [case(r(4, 3, 2))],
    "fft_irfft2": [case(c(4, 3, 4), [3, 6])],
    "fft_fftn": [case(r(4, 3, 2), None, [1, 2]), case(r(4, 6, 2), [3]), case(r(4, 3))],
    "fft_ifftn": [case(c(4, 3, 2), None, [1, -1])],
    "fft_rfftn": [case(r(4, 3, 2), None, [0, 1])],
    "fft_irfftn": [case(c(4, 3, 2), None, [0, 1])],
    "stft": [case(r(2, 12), 4, 2, 4, p(4), False, True, True), case(r(12), 4, 2, 4, p(4), False, True, True)],
    "istft": [case(c(2, 3, 7), 4, 2, 4, p(4))],
    "view_as_real": [case(c(4, 6))],
    "view_as_complex": [case(r(4, 6, 2))],
    "imag": [case(c(4, 6))],
    "_conj": [case(c(4, 6))],
    "conj_physical": [case(c(4, 6))],
    "resolve_conj": [case(c(4, 6))],
    "resolve_neg": [case(c(4, 6))],
    "complex": [case(r(4, 6), r(4, 6))],
    "polar": [case(p(4, 6), r(4, 6)), case(p(2, 4, 1), r(4, 6))],
    # bags of embeddings
    "embedding_bag": [
        _bags(r(7, 4), i(7, 6), OFFSETS),
        _bags(r(8, 4), i(8, 6), OFFSETS, False, 1),
        _bags(r(8, 4), i(8, 6), OFFSETS, False, 2),
        _bags(r(8, 4), i(8, 6), OFFSETS, False, 0, False, r(6)),
        _bags(r(7, 4), torch.tensor([3, 1, 3, 3, 6, 0]), OFFSETS, False, 1, False, None, False, 3),
        _bags(r(7, 4), torch.tensor([3, 1, 3, 3, 6, 0]), torch.tensor([0, 2, 2, 6]), False, 0, False, None, True, -4),
    ],
    # by place along a dim
    "gather": [case(r(4, 6), 1, i(6, 4, 3)), case(r(4, 6), 0, i(4, 3, 3))],
    "take_along_dim": [Case((r(4, 6), i(6, 4, 3), 1)), Case((r(4), i(4, 6)))],
    "scatter": [
        case(r(4, 6), 1, torch.tensor([[0], [3], [5], [1]]), r(4, 1)),
        case(r(4, 6), 1, i(6, 4, 1), 0.0),
        case(r(4, 6), 1, i(6, 4, 1), 2.0),
        case(r(4, 6), 1, torch.tensor([[0], [3]]), r(2, 1)),
    ],
    "scatter_add": [case(r(4, 6), 1, i(6, 4, 3), r(4, 3)), case(r(4, 6), 0, i(4, 2, 6), r(2, 6))],
    "scatter_reduce": [case(r(4, 6), 1, i(6, 4, 3), r(4, 3), "sum"), case(r(4, 6), 1, i(6, 4, 3), r(4, 3), "amax")],
    "index_copy": [case(r(4, 6), 0, torch.tensor([2, 0]), r(2, 6))],
    "index_fill": [case(r(4, 6), 0, i(4, 2), 2.0), case(r(4, 6), 1, i(6, 2), 0.0), case(r(4, 6), 1, i(6, 2), r())],
    # statistics, orders, look-ups
    "var_mean": [
        case(r(4, 6, 3), [1], correction=1, keepdim=True),
        case(r(4, 6, 3), [-1], correction=0),
        case(r(4, 6), False),
    ],
    "std_mean": [case(r(4, 6, 3), [0], correction=1)],
    "nanmean": [case(r(4, 6), [1]), case(r(4, 6, 2), [0], True)],
    "nansum": [case(r(4, 6), [1])],
    "cummax": [case(r(4, 6), 1)],
    "cummin": [case(r(4, 6), 0)],
    "kthvalue": [case(r(4, 6), 2), case(r(4, 6, 3), 2, 1, True)],
    "median": [case(r(4, 6), 1), case(r(4, 6))],
    "nanmedian": [case(r(4, 6), 0, True)],
    "mode": [case(r(4, 6))],
    "aminmax": [case(r(4, 6), dim=1, keepdim=True), case(r(4, 6))],
    "argsort": [case(r(4, 6)), case(r(4, 6), 0, True), case(r(4, 6), stable=True, dim=1)],
    "bucketize": [case(p(4, 6), _sorted(5))],
    "isin": [case(i(9, 4, 6), i(9, 5))],
    "searchsorted": [case(_sorted(5), p(4, 6)), case(_sorted(4, 5), p(4, 6))],
    "mse_loss": [case(r(4, 6), r(4, 6), 0), case(r(4, 6), r(4, 6))],
    "l1_loss": [case(r(4, 6), r(4, 6), 0)],
    "smooth_l1_loss": [case(r(4, 6), r(4, 6), 0)],
    "huber_loss": [case(r(4, 6), r(4, 6), 0)],
    "binary_cross_entropy_with_logits": [case(r(4, 6), p(4, 6), None, None, 0)],
    "kl_div": [case(r(4, 6), p(4, 6), 0), case(r(4, 6), r(4, 6), 0, log_target=True)],
    # products
    "outer": [case(r(4), r(6))],
    "ger": [case(r(4), r(6))],
    "dot": [Case((r(6), r(6)), zero_pads=(1,)), Case((r(7), r(7)), zero_pads=(1,))],
    "vdot": [Case((r(6), r(6)), zero_pads=(1,)), Case((LENGTH, LENGTH), zero_pads=(0,))],
    "mv": [Case((r(4, 6), r(6)), zero_pads=(0,))],
    "addmv": [Case((r(4), r(4, 6), r(6)), zero_pads=(1,)), case(r(4), r(4, 6), r(6), beta=2.0)],
    "inner": [Case((r(4, 6), r(3, 6)), zero_pads=(1,)), Case((r(6), r(6)), zero_pads=(1,))],
    "tensordot": [
        Case((r(4, 6), r(2, 3, 6), [1], [2]), zero_pads=(1,)),
        Case((r(2, 4, 3), r(3, 4, 2), [1, -1], [1, 0]), zero_pads=(1,)),
    ],
    "addbmm": [case(r(3, 2), r(4, 3, 6), r(4, 6, 2)), case(r(3, 2), r(4, 3, 6), r(4, 6, 2), beta=0.5, alpha=2.0)],
    "linalg_vecdot": [Case((r(4, 6), r(4, 6)), zero_pads=(1,)), Case((r(4, 6), r(4, 6)), {"dim": 0}, zero_pads=(1,))],
    "bilinear": [
        Case((r(2, 4), r(2, 6), r(3, 4, 6), r(3)), zero_pads=(2,)),
        Case((r(2, 4), r(2, 3), r(6, 4, 3)), zero_pads=(2,)),
        Case((TWICE, TWICE, r(4, 2, 2)), zero_pads=(2,)),
    ],
    "kron": [case(r(4, 3), r(2, 2)), case(r(4), r(2, 2)), case(TWICE, TWICE)],
    "cdist": [case(r(4, 3, 2), r(4, 6, 2)), case(r(4, 3), r(6, 3)), case(r(4, 3), r(2, 6, 3))],
    "cosine_similarity": [case(r(4, 6), r(4, 6)), case(r(4, 6, 3), r(4, 6, 3), 0), case(r(4, 1, 6), r(1, 3, 6), -1)],
    "pairwise_distance": [case(r(4, 6), r(4, 6)), case(r(4, 6), r(4, 6), 2.0, 1e-6, True)],
    "cross": [case(r(4, 3), r(4, 3), 1), case(r(3, 4), r(3, 4))],
    "linalg_cross": [case(r(4, 3), r(4, 3))],
    # rearranged
    "unfold": [case(r(4, 6), 1, 3, 1), case(r(6), 0, 2, 2)],
    "_weight_norm": [case(r(4, 6), r(4, 1), 0), case(r(2, 3, 4), r(1, 1, 4), 2)],
    **{
        name: [case(r(2, 4, 3, 3), r(2, 2, 3, 2), 0, 0, False)] for name in ("grid_sampler", "grid_sampler_2d")
    },
    "grid_sampler_3d": [case(r(2, 2, 3, 3, 2), r(2, 2, 1, 2, 3), 0, 0, False)],
    "masked_scatter": [case(r(4, 6), b(4, 6), r(24)), case(r(4, 6), b(4, 1), r(4, 6))],
    "diagonal": [case(r(4, 6, 3)), case(r(4, 6, 3), 1, -1, 1)],
    "diag_embed": [case(r(4, 6)), case(r(4, 6), 1, 0, 2)],
    "diag": [case(r(6)), case(r(4, 4))],
    "trace": [case(r(4, 4))],
    "take": [case(r(4, 6), i(24, 3))],
    "rot90": [case(r(4, 6))],
    "fliplr": [case(r(4, 6))],
    "flipud": [case(r(4, 6))],
    "diff": [case(r(4, 6)), case(r(4, 6), 1, 0, r(1, 6)), case(r(4, 6), 2, 1)],
    "one_hot": [case(i(6, 4, 3), 6), Case((torch.tensor([0, 1, 2, 3, 0, 1]),))],
    "block_diag": [case([r(4, 6), r(2, 2)])],
    "hstack": [case([r(4, 6), r(4, 2)])],
    "vstack": [case([r(4, 6), r(2, 6)])],
    "dstack": [case([r(4, 6), r(4, 6)])],
    "column_stack": [case([r(4, 6), r(4, 2)])],
}  # fmt: skip
