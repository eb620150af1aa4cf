"""Plan files: versioned JSON that people can read, diff and edit, and that says when somebody has.

    schema, digest      what the file is; SHA-256 of all that follows
    name ... assumptions     one field of `Plan` each (`PlanDocument`), keyed by parameter and module path

Layers that agree share one entry (``model.layers.{0-31}.self_attn.q_proj.weight``), a call is named by module and place
in the source (`site_text`), and a split dim by its segments: ``[4096]`` is one cut evenly. The same plan gives the same
bytes; nothing is pickled, and reading runs no code.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from colrow.cost_models.errors import PlanFileError

from .plan_decoding import WrongField, plan_of
from .plan_document import PlanDocument
from .plan_encoding import content_of
from .plan_model import Plan

SCHEMA = "colrow.plan/2"
WIDTH = 160


def dumps(plan: Plan) -> str:
    """The plan as the text of a plan file."""
    content = content_of(plan)
    return "\n".join(_lines({"schema": SCHEMA, "digest": _digest(content), **content})) + "\n"


def digest_of(plan: Plan) -> str:
    """SHA-256 of the plan's content, as its file carries it."""
    return _digest(content_of(plan))


def read(path: str | Path, verify_digest: bool = True) -> Plan:
    """Reads a plan file.

    Args:
        path: Of the file.
        verify_digest: Refuse a file edited by hand.

    Raises:
        PlanFileError: Missing, no plan, truncated, of another version, edited, or with a wrong field.
    """
    where = str(path)
    content = _parsed(where, path)
    if content.pop("schema") != SCHEMA:
        raise PlanFileError(
            where, "a plan of another version", need=SCHEMA, remedy="Make it again: colrow plan SOURCE --out FILE."
        )
    digest = content.pop("digest", None)
    if verify_digest and digest != _digest(content):
        raise PlanFileError(
            where,
            "its digest does not match: edited by hand",
            got=_digest(content)[:12],
            need=str(digest)[:12],
            remedy=f"colrow plan SOURCE --from {where} re-checks, re-prices and re-signs it.",
        )
    try:
        return plan_of(PlanDocument.model_validate(content))
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"] if not str(part).startswith("<"))
        more = f" ({error.error_count() - 1} more)" if error.error_count() > 1 else ""
        raise PlanFileError(
            f"{where}: {field or 'the file'}",
            f"{first['msg'][:1].lower()}{first['msg'][1:]}{more}",
            got=None if first["type"] == "missing" else _shortened(first["input"]),
            remedy="The README lists the fields of a plan.",
        ) from error
    except WrongField as error:
        raise PlanFileError(
            f"{where}: {error.field}", error.wrong, remedy="Correct it, or make the plan again."
        ) from error


def _parsed(where: str, path: str | Path) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = dict(pairs)
        if len(names) < len(pairs):
            twice = next(name for i, (name, _) in enumerate(pairs) if name in dict(pairs[:i]))
            raise PlanFileError(f"{where}: {twice}", "is given twice", remedy="Keep one of them.")
        return names

    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=unique)
    except FileNotFoundError as error:
        raise PlanFileError(where, "no such file", remedy="Make one: colrow plan SOURCE --out FILE.") from error
    except OSError as error:
        raise PlanFileError(where, f"cannot be read: {error.strerror}", need="a plan file") from error
    except (ValueError, RecursionError) as error:
        at = f"line {error.lineno}: {error.msg}" if isinstance(error, json.JSONDecodeError) else type(error).__name__
        raise PlanFileError(
            where, f"not JSON, perhaps truncated ({at})", remedy="Make it again: colrow plan SOURCE --out FILE."
        ) from error
    if not isinstance(content, dict) or not str(content.get("schema", "")).startswith("colrow.plan/"):
        raise PlanFileError(where, "not a plan", need=f'a JSON object with "schema": "{SCHEMA}"')
    return content


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, separators=(",", ":"), allow_nan=False).encode()).hexdigest()


def _shortened(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _lines(value: Any, indent: str = "", head: str = "", tail: str = "") -> Iterator[str]:
    """JSON with everything that fits on one line on one line."""
    line = json.dumps(value, allow_nan=False)
    plain = isinstance(value, list) and not any(isinstance(item, (dict, list)) for item in value)
    if not isinstance(value, (dict, list)) or not value or plain or (len(indent + head + line) < WIDTH and indent):
        yield f"{indent}{head}{line}{tail}"
        return
    keyed = isinstance(value, dict)
    yield f"{indent}{head}{'{' if keyed else '['}"
    rows = (
        [(f"{json.dumps(k)}: ", v) for k, v in value.items()] if isinstance(value, dict) else [("", v) for v in value]
    )
    for n, (key, item) in enumerate(rows):
        yield from _lines(item, indent + "  ", key, "," if n < len(rows) - 1 else "")
    yield f"{indent}{'}' if keyed else ']'}{tail}"
