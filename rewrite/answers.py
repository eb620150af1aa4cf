"""How every command answers: JSON that any reader takes, files written whole, progress on stderr."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from colrow.cost_models.errors import UsageError


def json_text(value: Any) -> str:
    """``value`` as JSON; infinities and NaN, which JSON does not have, as null."""
    return json.dumps(_finite(value), indent=1, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value


def check_writable(out: str | None) -> None:
    """Before the work, not after it.

    Raises:
        UsageError: The folder of ``out`` does not exist.
    """
    if out is not None and not Path(out).absolute().parent.is_dir():
        raise UsageError(f"--out {out}", "no such folder", got=str(Path(out).parent), remedy="Make it first.")


@contextmanager
def written_whole(out: str) -> Iterator[Path]:
    """A file to write that becomes ``out`` at the end: readers see the old file or the new one, never half of one.

    Raises:
        UsageError: It cannot be written.
    """
    path = Path(out)
    part = path.with_name(f"{path.name}.part")
    try:
        yield part
        part.replace(path)
    except OSError as error:
        raise UsageError(f"--out {out}", f"cannot be written: {error.strerror}") from error
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def progress(text: str) -> Iterator[None]:
    """A spinner on stderr while something long runs; nothing where stderr is no terminal."""
    console = Console(stderr=True)
    if not console.is_terminal:  # without the spinner's thread, ranks can be forked
        yield
        return
    with console.status(text):
        yield
