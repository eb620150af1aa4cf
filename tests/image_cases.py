"""Runs of the operators of convolutional networks, for `rule_cases.CASES`."""

from __future__ import annotations

from typing import Any

import torch
from case_values import Case, case, i, p, r, weighted
from torch import Tensor

LENGTHS = (6, 4, 3)


def images(dims: int, batch: int = 2, channels: int = 4) -> Tensor:
    """[batch, channels, ..] with ``dims`` dims of positions."""
    return r(batch, channels, *LENGTHS[:dims])


def _interpolated(name: str, dims: int, *flags: Any) -> Case:
    """To sizes that are no multiples."""
    return case(images(dims), [5, 6, 4][:dims], *flags)


def _frozen_norm(name: str, *flags: Any) -> Any:
    """A norm whose running statistics are constants: they get no gradients, and change nothing outside."""

    def run(x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor | None, var: Tensor | None) -> Tensor:
        running = [None if value is None else value.detach().clone() for value in (mean, var)]
        return getattr(torch.ops.aten, name)(x, weight, bias, *running, *flags)

    return run


CONVOLUTION_CASES: dict[str, list[Case]] = {
    "conv1d": [
        weighted(r(2, 4, 7), r(6, 4, 3), r(6)),
        weighted(r(2, 4, 7), r(4, 2, 3), None, [1], [0], [1], 2),
        weighted(r(2, 4, 7), r(4, 1, 3), r(4), [1], [2], [1], 4),
        weighted(r(2, 4, 7), r(8, 1, 3), r(8), [1], [2], [1], 4),
    ],
    "conv2d": [
        weighted(r(2, 4, 5, 5), r(6, 4, 3, 3), r(6)),
        weighted(r(2, 6, 5, 4), r(6, 1, 2, 2), None, [2, 1], [1, 1], [1, 2], 6),
        weighted(r(4, 3, 3), r(6, 4, 2, 2)),
    ],
    "conv3d": [weighted(r(2, 4, 3, 3, 3), r(6, 4, 2, 2, 2)), weighted(r(2, 4, 3, 3, 3), r(4, 1, 2, 2, 2), groups=4)],
    "conv_transpose1d": [
        weighted(r(2, 4, 5), r(4, 6, 3), r(6), [2], [1], [1]),
        weighted(r(2, 4, 5), r(4, 1, 3), r(4), [2], [0], [0], 4),
        weighted(r(2, 4, 5), r(4, 2, 3), r(4), [2], [0], [0], 2, [2]),
    ],
    "conv_transpose2d": [weighted(r(2, 4, 3, 3), r(4, 6, 2, 2), r(6), [2, 2])],
    "conv_transpose3d": [weighted(r(2, 4, 2, 2, 2), r(4, 6, 2, 2, 2), None, [2, 2, 2])],
}

CHANNEL_CASES: dict[str, list[Case]] = {
    "batch_norm": [
        case(r(3, 4, 2), r(4), r(4), None, None, True, 0.1, 1e-5, False),
        case(r(3, 4), None, None, None, None, True, 0.1, 1e-5, False),
        Case((r(3, 5, 1, 2), r(5), r(5), r(5), p(5)), function=_frozen_norm("batch_norm", False, 0.1, 1e-5, False)),
        Case((r(3, 4, 5), None, None, r(4), p(4)), function=_frozen_norm("batch_norm", False, 0.1, 1e-5, False)),
    ],
    "instance_norm": [
        case(r(3, 4, 2), r(4), r(4), None, None, True, 0.1, 1e-5, False),
        Case((r(2, 5, 3), r(5), r(5), r(5), p(5)), function=_frozen_norm("instance_norm", False, 0.1, 1e-5, False)),
    ],
    "group_norm": [
        case(r(2, 6, 3), 3, r(6), r(6)),
        case(r(2, 8, 3), 2),
        case(r(3, 5, 1, 2), 5, r(5), r(5)),
        case(r(3, 5, 2), 1, r(5), r(5)),
    ],
    "prelu": [case(r(2, 4, 3), r(4)), case(r(2, 4, 3), r(1)), case(r(4, 6), r(6))],
}

IMAGE_CASES: dict[str, list[Case]] = {
    **CONVOLUTION_CASES,
    **CHANNEL_CASES,
    **{f"avg_pool{n}d": [case(images(n), [2] * n, [1] * n)] for n in (1, 2, 3)},
    **{f"adaptive_avg_pool{n}d": [case(images(n), [2] * n), case(images(n)[0], [1] * n)] for n in (1, 2, 3)},
    **{f"max_pool{n}d": [case(images(n), [2] * n, [1] * n)] for n in (1, 2, 3)},
    **{f"max_pool{n}d_with_indices": [case(images(n), [2] * n, [2] * n)] for n in (1, 2, 3)},
    **{f"adaptive_max_pool{n}d": [case(images(n), [2] * n)] for n in (1, 2, 3)},
    "max_unpool2d": [case(r(2, 4, 2, 2), i(24, 2, 4, 2, 2), [6, 4])],
    "max_unpool3d": [case(r(2, 4, 1, 2, 1), i(24, 2, 4, 1, 2, 1), [2, 4, 3], [1, 1, 1], [0, 0, 0])],
    **{f"upsample_nearest{n}d": [_interpolated("nearest", n)] for n in (1, 2, 3)},
    **{f"_upsample_nearest_exact{n}d": [_interpolated("nearest", n)] for n in (1, 2, 3)},
    "upsample_linear1d": [_interpolated("linear", 1, False)],
    "upsample_bilinear2d": [_interpolated("bilinear", 2, True)],
    "upsample_bicubic2d": [_interpolated("bicubic", 2, False)],
    "upsample_trilinear3d": [_interpolated("trilinear", 3, False)],
    "_upsample_bilinear2d_aa": [_interpolated("bilinear", 2, False)],
    "_upsample_bicubic2d_aa": [_interpolated("bicubic", 2, False)],
    "pixel_shuffle": [case(r(2, 8, 2, 3), 2), case(r(16, 2, 2), 2)],
    "pixel_unshuffle": [case(r(2, 4, 2, 4), 2), case(r(4, 2, 2), 2)],
    "channel_shuffle": [case(r(2, 8, 2, 3), 2), case(r(2, 6, 3), 3)],
    "im2col": [case(r(2, 4, 3, 5), [2, 2], [1, 1], [0, 0], [1, 1]), case(r(4, 3, 3), [2, 1], [1, 1], [1, 0], [1, 1])],
    "col2im": [
        case(r(2, 16, 8), [3, 5], [2, 2], [1, 1], [0, 0], [1, 1]),
        case(r(8, 6), [3, 3], [2, 1], [1, 1], [0, 0], [1, 1]),
    ],
    "feature_dropout": [case(r(2, 4, 3), 0.5, False)],
}
