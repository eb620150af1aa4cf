"""Layouts: which slices of a dim each rank holds.

A layout is the truth about a split dim: a concatenation of segments (fused ``q, k, v``), each cut into one list of
intervals per rank.
Local lengths are equal on all ranks; a rank that owns less is padded at the end of the segment. Two ranks may own
the same interval (kv
heads fewer than ranks): then the interval is replicated. Everything else in colrow (views, slices, checkpoints)
transforms layouts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache

Interval = tuple[int, int]


def _merged(intervals: tuple[Interval, ...]) -> tuple[Interval, ...]:
    """Joins neighbours, so that equal index maps compare equal."""
    joined: list[Interval] = []
    for start, stop in intervals:
        if start == stop:
            continue
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], stop)
        else:
            joined.append((start, stop))
    return tuple(joined)


@dataclass(frozen=True)
class Segment:
    """One piece of a dim.

    Attributes:
        length: Global length.
        owned: Per rank, the intervals it holds, relative to the segment's start, in local order.
        local: Local length on every rank, padding included.
    """

    length: int
    owned: tuple[tuple[Interval, ...], ...]
    local: int

    def scaled(self, factor: int) -> Segment:
        """The segment of the dim merged with ``factor`` trailing elements."""
        owned = tuple(tuple((a * factor, b * factor) for a, b in rank) for rank in self.owned)
        return Segment(self.length * factor, owned, self.local * factor)

    def divided(self, factor: int) -> Segment | None:
        """The inverse of ``scaled``; None where a bound does not divide."""
        bounds = [self.length, self.local, *(x for rank in self.owned for interval in rank for x in interval)]
        if any(x % factor for x in bounds):
            return None
        owned = tuple(tuple((a // factor, b // factor) for a, b in rank) for rank in self.owned)
        return Segment(self.length // factor, owned, self.local // factor)


@dataclass(frozen=True)
class Layout:
    """How one dim is split over the ranks: a concatenation of segments.

    Attributes:
        segments: In order.
        elastic: The dim's length is not known before the run (a sequence): whatever it is, it is cut into equal
            consecutive blocks; the segments are those of the length planned with.
    """

    segments: tuple[Segment, ...]
    elastic: bool = False

    def __hash__(self) -> int:
        """Remembered: a layout is looked up far more often than it is made."""
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash((self.segments, self.elastic))

    @property
    def size(self) -> int:
        """Global length of the dim."""
        return sum(segment.length for segment in self.segments)

    @property
    def local(self) -> int:
        """Local length of the dim on every rank, padding included."""
        return sum(segment.local for segment in self.segments)

    @property
    def ranks(self) -> int:
        """Number of ranks."""
        return len(self.segments[0].owned)

    @property
    def is_even(self) -> bool:
        """One segment cut into equal consecutive blocks: what DTensor's ``Shard`` can carry as it is."""
        return self.segments == even(self.size, self.ranks).segments

    @property
    def is_padded(self) -> bool:
        """Some rank owns less than its local length."""
        return any(sum(b - a for a, b in rank) < segment.local for segment in self.segments for rank in segment.owned)

    @property
    def is_partition(self) -> bool:
        """Every element is held once, and nothing else is: sums over local parts add up."""
        return not self.is_padded and not self.is_replicated

    @property
    def is_replicated(self) -> bool:
        """Some interval is held by several ranks, or by one rank several times."""
        owned = sum(b - a for segment in self.segments for rank in segment.owned for a, b in rank)
        return owned > self.size

    def pieces(self, rank: int) -> Iterator[tuple[int, int, int]]:
        """Yields ``(global start, local start, length)`` of every interval ``rank`` holds."""
        start = local = 0
        for segment in self.segments:
            offset = local
            for a, b in segment.owned[rank]:
                yield start + a, offset, b - a
                offset += b - a
            start += segment.length
            local += segment.local

    def scaled(self, factor: int) -> Layout:
        """Of the dim merged with ``factor`` unsplit trailing elements."""
        return Layout(tuple(s.scaled(factor) for s in self.segments)) if factor != 1 else self

    def divided(self, factor: int) -> Layout | None:
        """The inverse of ``scaled``."""
        parts = [s.divided(factor) for s in self.segments]
        return None if any(p is None for p in parts) else Layout(tuple(p for p in parts if p is not None))

    def repeated(self, times: int) -> Layout:
        """Of the dim merged with an unsplit leading dim of length ``times``."""
        return Layout(self.segments * times)

    def period(self, times: int) -> Layout | None:
        """The inverse of ``repeated``; None where the layout is not ``times`` equal copies."""
        count, rest = divmod(len(self.segments), times)
        if rest or self.segments[:count] * times != self.segments:
            return None
        return Layout(self.segments[:count])

    def sliced(self, start: int, stop: int) -> Layout | None:
        """Of ``dim[start:stop]``; None where a bound cuts a segment."""
        kept, offset = [], 0
        for segment in self.segments:
            end = offset + segment.length
            if start <= offset and end <= stop:
                kept.append(segment)
            elif offset < stop and start < end:
                return None
            offset = end
        return Layout(tuple(kept)) if kept else None

    def local_offset(self, position: int) -> int | None:
        """Where the segment boundary ``position`` lies in a local tensor; None where it is no boundary."""
        offset = local = 0
        for segment in self.segments:
            if position == offset:
                return local
            offset += segment.length
            local += segment.local
        return local if position == offset else None


def joined(layouts: tuple[Layout, ...]) -> Layout:
    """The layout of a concatenation."""
    return Layout(tuple(s for layout in layouts for s in layout.segments))


@lru_cache(maxsize=65536)
def balanced(size: int, ranks: int, unit: int = 1) -> Layout:
    """One segment of ``size // unit`` indivisible units, the first ranks holding one more where they do not divide.

    Raises:
        ValueError: ``unit`` does not divide ``size``.
    """
    if size % unit:
        raise ValueError(f"balanced: {size} is no multiple of the unit {unit}")
    units = size // unit
    each, more = divmod(units, ranks)
    starts = [rank * each + min(rank, more) for rank in range(ranks + 1)]
    owned = tuple(_merged(((starts[r] * unit, starts[r + 1] * unit),)) for r in range(ranks))
    return Layout((Segment(size, owned, -(-units // ranks) * unit),))


def even(size: int, ranks: int) -> Layout:
    """Equal consecutive blocks of one segment (padded at the end where they do not divide)."""
    return balanced(size, ranks)


def owned_units(size: int, unit: int, owned: tuple[tuple[int, ...], ...]) -> Layout:
    """One segment given by the units each rank holds, in local order (replica groups, head maps)."""
    local = max(len(rank) for rank in owned) * unit
    return Layout((Segment(size, tuple(_merged(tuple((u * unit, (u + 1) * unit) for u in r)) for r in owned), local),))
