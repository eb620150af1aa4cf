"""Layouts applied to tensors: cut, put together, pad; no communication here.

With a layout whose intervals are held several times (``Layout.is_replicated``: kv heads fewer than ranks) a *value*
is on every holder, and its *gradient* is a partial sum over the holders: each has seen its own readers only. So there
are two pairs of adjoint maps:

    local_part(copies=True)    every holder gets the value     <->   summed_parts:holders are added, each at its place
    local_part(copies=False)   the first holder gets it all    <->   canonical:   read from the first holder

Without replicated intervals the two pairs are the same maps.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from colrow.planner.layout import Layout

Piece = tuple[int, int, int]  # global start, local start, length


@lru_cache(maxsize=4096)
def cover(layout: Layout) -> tuple[tuple[int, int, int, int], ...]:
    """Where to read every global element exactly once, in global order: ``(global start, rank, local start, length)``.

    The first holder wins. Raises ValueError for a layout that leaves elements to nobody.
    """
    held = sorted(
        (start, rank, local, length) for rank in range(layout.ranks) for start, local, length in layout.pieces(rank)
    )
    found: list[tuple[int, int, int, int]] = []
    position = 0
    for start, rank, local, length in held:
        if start > position:
            break
        if start + length > position:
            skip = position - start
            found.append((position, rank, local + skip, length - skip))
            position = start + length
    if position != layout.size:
        raise ValueError(f"layout: element {position} of {layout.size} is held by no rank")
    return tuple(found)


@lru_cache(maxsize=4096)
def pieces(layout: Layout, rank: int, copies: bool = True) -> tuple[Piece, ...]:
    """The pieces of ``rank``: all it holds, or (``copies=False``) only those that ``cover`` reads from it."""
    if copies or not layout.is_replicated:
        return tuple(layout.pieces(rank))
    return tuple((start, local, length) for start, holder, local, length in cover(layout) if holder == rank)


@lru_cache(maxsize=4096)
def gaps(layout: Layout, rank: int, copies: bool = True) -> tuple[tuple[int, int], ...]:
    """The ``(local start, length)`` not filled by ``pieces``: padding, and copies that do not count."""
    found, position = [], 0
    for _, local, length in sorted(pieces(layout, rank, copies), key=lambda piece: piece[1]):
        if local > position:
            found.append((position, local - position))
        position = local + length
    if position < layout.local:
        found.append((position, layout.local - position))
    return tuple(found)


@lru_cache(maxsize=4096)
def is_plain(layout: Layout) -> bool:
    """Equal consecutive blocks without padding: rank-major order is canonical order."""
    return layout.is_even and not layout.is_padded


def local_part(full: Tensor, dim: int, layout: Layout, rank: int, copies: bool = True) -> Tensor:
    """What ``rank`` holds of ``full``: [.., layout.size, ..] -> [.., layout.local, ..], padded with zeros."""
    mine = sorted(pieces(layout, rank, copies), key=lambda piece: piece[1])
    if len(mine) == 1 and mine[0][2] == layout.local:
        return full.narrow(dim, mine[0][0], layout.local)
    shape = list(full.shape)
    parts, position = [], 0
    for start, local, length in mine:
        if local > position:
            shape[dim] = local - position
            parts.append(full.new_zeros(shape))
        parts.append(full.narrow(dim, start, length))
        position = local + length
    if position < layout.local:
        shape[dim] = layout.local - position
        parts.append(full.new_zeros(shape))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def local_parts(full: Tensor, dim: int, layout: Layout, copies: bool = True) -> Tensor:
    """The parts of all ranks, stacked: [.., layout.size, ..] -> [ranks, .., layout.local, ..]."""
    if is_plain(layout):
        return full.reshape(*full.shape[:dim], layout.ranks, layout.local, *full.shape[dim + 1 :]).movedim(dim, 0)
    return torch.stack([local_part(full, dim, layout, rank, copies) for rank in range(layout.ranks)])


def canonical(parts: Tensor, dim: int, layout: Layout) -> Tensor:
    """The dense tensor, read from first holders: [ranks, .., layout.local, ..] -> [.., layout.size, ..]."""
    if is_plain(layout):
        return parts.movedim(0, dim).flatten(dim, dim + 1)
    return torch.cat([parts[rank].narrow(dim, local, length) for _, rank, local, length in cover(layout)], dim)


def padded_part(local: Tensor, dim: int, layout: Layout, rank: int) -> Tensor:
    """Zeros around what ``rank`` holds, copies added: [.., layout.local, ..] -> [.., layout.size, ..]."""
    shape = list(local.shape)
    shape[dim] = layout.size
    full = local.new_zeros(shape)
    for start, offset, length in pieces(layout, rank):
        full.narrow(dim, start, length).add_(local.narrow(dim, offset, length))
    return full


def summed_parts(parts: Tensor, dim: int, layout: Layout) -> Tensor:
    """The dense tensor, all holders of an element added: [ranks, .., layout.local, ..] -> [.., layout.size, ..]."""
    if not layout.is_replicated:
        return canonical(parts, dim, layout)
    full = padded_part(parts[0], dim, layout, 0)
    for rank in range(1, layout.ranks):
        for start, offset, length in pieces(layout, rank):
            full.narrow(dim, start, length).add_(parts[rank].narrow(dim, offset, length))
    return full


def without_gaps(local: Tensor, dim: int, layout: Layout, rank: int, copies: bool = True) -> Tensor:
    """``local`` with zeros where ``rank`` owns nothing (see ``gaps``); itself where there is no gap."""
    empty = gaps(layout, rank, copies)
    if not empty:
        return local
    keep = torch.ones(layout.local, dtype=torch.bool, device=local.device)
    for start, length in empty:
        keep[start : start + length] = False
    keep = keep.view([layout.local if d == dim else 1 for d in range(local.dim())])
    return torch.where(keep, local, 0)  # not a product: padding may be inf or nan
