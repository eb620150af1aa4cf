"""Right: on 2, 3 and 4 ranks these models give the dense outputs, gradients and trained weights, with the planned
collectives, and no block reduces more often than it must."""

from collections import Counter
from functools import cache

import pytest
from right_models import AWKWARD, BLOCK_COUNTS, ONE_BACKWARD_MORE, OWN_BLOCK_COUNTS, awkward_source, source_of

from colrow.planner.planning import plan
from colrow.rewrite.verification import verify

ALL = {**BLOCK_COUNTS, **OWN_BLOCK_COUNTS}


@cache
def verified(name, tp, phase="train", labels=False):
    source = source_of(name, phase, labels)
    made = plan(source.model, source.example_inputs, tp=tp, phase=phase)
    return made, verify(source.build, source.example_inputs, made)


@pytest.fixture(autouse=True)
def importable(monkeypatch, root):
    monkeypatch.syspath_prepend(str(root))  # for the examples


@pytest.mark.parametrize("tp", [2, 3, 4])
@pytest.mark.parametrize("name", ALL)
def test_right(name, tp):
    made, report = verified(name, tp)
    assert report.ok(), report.explain()
    assert report.gradient_errors and len(report.trainings) == 2
    assert made.sharded_fraction >= 0.9, made.unsplit  # what is not split proves nothing


@pytest.mark.parametrize("name", ALL)
def test_counts(name):
    made, report = verified(name, 2, "prefill")
    assert report.ok(), report.explain()
    assert report.collectives_planned == report.collectives_executed
    counts = Counter(
        (c.block, c.direction) for c in made.collectives if c.category == "block" and c.kind == "all_reduce"
    )
    extra = Counter()
    for (block, direction), count in counts.items():
        place = next(path for path in ALL[name] if block.startswith(path))
        extra[direction] += max(0, count - ALL[name][place][direction == "backward"])
    assert not extra["forward"] and extra["backward"] <= (name in ONE_BACKWARD_MORE), counts
    inside = [c for c in made.collectives if c.block and c.category in ("block", "statistic")]
    assert {c.kind for c in inside} <= {"all_reduce"}
    gradients = Counter(c.bucket for c in made.collectives if c.category == "parameter_gradient")
    assert all(count == 1 for count in gradients.values()), gradients


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_right_under_the_models_own_loss(name):
    _, report = verified(name, 2, labels=True)
    assert "loss" in report.output_errors
    assert report.ok(), report.explain()


def test_statistics_are_reduced_where_a_norm_spans_split_heads():
    made, _ = verified("olmo2", 2, "prefill")
    assert made.count("all_reduce", "forward", category="statistic") > 0


@pytest.mark.parametrize("name", AWKWARD)
def test_right_where_sizes_do_not_divide(name):
    fields, tp = AWKWARD[name]
    source = awkward_source(fields)
    made = plan(source.model, source.example_inputs, tp=tp, phase="train")
    report = verify(source.build, source.example_inputs, made)
    assert report.ok(), report.explain()
    assert not made.unsplit
