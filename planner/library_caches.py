"""Caches of libraries that would hand the lengths of one value to another while tracing.

The trace's lengths know which value they were read from (`call_record.Measured`). einops remembers, for every pattern
and shape, the lengths of the view that it makes: a second value of the same shape would get the first one's, and a
value of a later forward those of this trace.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def no_lengths_remembered() -> Iterator[None]:
    """einops, where it is imported, calculates every view's lengths anew."""
    library: Any = sys.modules.get("einops.einops")
    remembering = getattr(library, "_reconstruct_from_shape", None)
    calculating = getattr(library, "_reconstruct_from_shape_uncached", None)
    if remembering is None or calculating is None:
        yield
        return
    library._reconstruct_from_shape = calculating
    try:
        yield
    finally:
        library._reconstruct_from_shape = remembering
