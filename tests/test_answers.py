"""How commands answer: JSON without infinities, and files that are never half written."""

from __future__ import annotations

import json

import pytest

from colrow.cost_models.errors import UsageError
from colrow.rewrite.answers import json_text, written_whole

INF = float("inf")


def test_json_has_null_where_a_number_is_not_finite():
    value = {"a": INF, "b": [-INF, 1.5, (float("nan"), 2)], "c": {"d": "inf", "e": True, "f": None}}
    assert json.loads(json_text(value), parse_constant=pytest.fail) == {
        "a": None,
        "b": [None, 1.5, [None, 2]],
        "c": {"d": "inf", "e": True, "f": None},
    }


def test_a_file_is_replaced_only_when_it_is_whole(cwd):
    (cwd / "answer").write_text("old")
    with pytest.raises(ZeroDivisionError), written_whole("answer") as path:
        path.write_text("ha")
        raise ZeroDivisionError
    assert [(p.name, p.read_text()) for p in cwd.iterdir()] == [("answer", "old")]
    with written_whole("answer") as path:
        path.write_text("new")
    assert [(p.name, p.read_text()) for p in cwd.iterdir()] == [("answer", "new")]


def test_a_file_that_cannot_be_written_is_wrong_use(cwd):
    with (
        pytest.raises(UsageError, match="--out nowhere/answer: cannot be written"),
        written_whole("nowhere/answer") as path,
    ):
        path.write_text("x")
