"""The parallel cross entropy: planned where the loss is inside the forward, right in values and gradients, counted."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from colrow.planner import Plan, plan
from colrow.planner.graph import Node, Ref
from colrow.planner.layout import even
from colrow.planner.placement import PARTIAL, WHOLE, Shard
from colrow.planner.rules import RULES, Operation
from colrow.rewrite import verify
from colrow.rewrite.random_inputs import random_inputs
from colrow.rewrite.ranks import run_ranks
from colrow.rewrite.replacements import replacement

VOCAB, ROWS = 4099, 96


class Tower(nn.Module):
    """Embedding, one block's worth of work, a head; ``returns`` says what comes out beside the loss."""

    def __init__(self, returns: str = "loss", reduction: str = "mean", smoothing: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.up, self.down = nn.Embedding(VOCAB, 16), nn.Linear(16, 64), nn.Linear(64, 16)
        self.head = nn.Linear(16, VOCAB)
        self.returns, self.reduction, self.smoothing = returns, reduction, smoothing

    def forward(self, ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        x = self.embed(ids)
        logits = self.head(x + self.down(F.gelu(self.up(x))))
        loss = F.cross_entropy(
            logits.view(-1, VOCAB),
            labels.view(-1),
            ignore_index=3,
            reduction=self.reduction,
            label_smoothing=self.smoothing,
        )
        made = {"loss": loss.sum() if self.reduction == "none" else loss}
        return made | ({"logits": logits} if self.returns == "both" else {})


def inputs() -> dict[str, Tensor]:
    torch.manual_seed(1)
    labels = torch.randint(4, VOCAB, (2, ROWS // 2))
    labels[0, :5] = 3
    return {"ids": torch.randint(0, VOCAB, (2, ROWS // 2)), "labels": labels}


def planned(tp: int, outputs: Any = "whole", **options: Any) -> Plan:
    return plan(Tower(**options).double(), inputs(), tp=tp, phase="train", outputs=outputs, pin={"head": "vocab"})


def losses(made: Plan) -> list[tuple[str, str]]:
    return [(c.kind, c.direction) for c in made.collectives if c.category == "loss"]


@pytest.mark.parametrize("tp", [2, 3, 4])
@pytest.mark.parametrize(
    "options",
    [{}, {"smoothing": 0.1}, {"reduction": "sum"}, {"reduction": "none", "smoothing": 0.2}],
    ids=lambda options: "-".join(map(str, options.values())) or "mean",
)
def test_a_loss_inside_the_forward_is_computed_on_split_classes(tp: int, options: dict[str, Any]) -> None:
    made = planned(tp, **options)
    assert losses(made) == [("all_reduce", "forward")] * 2
    assert not any(c.kind == "all_gather" and c.category == "head" for c in made.collectives)
    report = verify(lambda: Tower(**options).double(), inputs(), made)
    assert report.ok(1e-9), report.first_divergence
    assert Counter(report.collectives_executed) == Counter(report.collectives_planned)


@pytest.mark.parametrize("tp", [2, 3])
def test_logits_stay_split_where_that_was_asked_for(tp: int) -> None:
    made = planned(tp, "sharded", returns="both")
    ((path, move),) = made.schedules[0].edits.split_outputs
    assert path == "logits" and move.is_free and move.layout == even(VOCAB, tp)
    assert losses(made) and not any(c.kind == "all_gather" and c.category == "head" for c in made.collectives)
    report = verify(lambda: Tower("both").double(), inputs(), made)
    assert report.ok(1e-9) and set(report.output_errors) == {"loss", "logits"}


def test_returned_logits_are_whole_by_default() -> None:
    made = planned(2, returns="both")
    report = verify(lambda: Tower("both").double(), inputs(), made)
    assert report.ok(1e-9)
    gathers = [c for c in made.collectives if c.kind == "all_gather" and c.nbytes > ROWS * VOCAB * 8]
    assert len(gathers) == 1 and gathers[0].direction == "forward"


def test_a_gather_on_the_way_out_is_planned_where_the_loss_gains_from_split_logits() -> None:
    """Many rows: computing the loss whole takes longer than two small reductions."""
    many = {name: value.repeat(64, 1) for name, value in inputs().items()}
    made = plan(Tower("both").double(), many, tp=2, phase="train", pin={"head": "vocab"})
    ((path, move),) = made.schedules[0].edits.split_outputs
    assert (path, move.forward) == ("logits", "all_gather") and losses(made)
    report = verify(lambda: Tower("both").double(), many, made)
    assert report.ok(1e-9)
    assert Counter(report.collectives_executed) == Counter(report.collectives_planned)


def operation(logits: Any, labels: torch.dtype = torch.int64, *more: Any) -> Operation:
    nodes = [Node(0, "input", (), {}, (8, 12), torch.float64), Node(1, "input", (), {}, (8,), labels)]
    node = Node(2, "cross_entropy_loss", (Ref(0), Ref(1), *more), {}, (), torch.float64)
    return Operation(node, [*nodes, node], {0: logits, 1: WHOLE})


def test_the_rule_allows_split_classes_with_indices_and_nothing_else() -> None:
    rule = RULES["cross_entropy_loss"]
    assert rule(operation(Shard(1, even(12, 2)))) == WHOLE and rule(operation(WHOLE)) == WHOLE
    assert rule(operation(Shard(0, even(8, 2)))) is None
    assert rule(operation(PARTIAL)) is None
    assert rule(operation(Shard(1, even(12, 2)), torch.float64)) is None


def test_class_weights_are_refused_at_run_time_too() -> None:
    from colrow.cost_models.errors import RankError
    from colrow.planner.edits import CallEdit, OperatorEdit
    from colrow.rewrite.groups import group_of

    def run() -> None:
        edit = CallEdit(operator=OperatorEdit("vocab_cross_entropy", 1, even(12, 2)))
        form = replacement("here", edit, group_of(None))
        form(F.cross_entropy, torch.randn(4, 6), torch.zeros(4, dtype=torch.long), torch.ones(12))

    with pytest.raises(RankError, match="class weights"):
        run_ranks(run, 2)


def test_random_inputs_keep_labels_in_range() -> None:
    made = random_inputs(Tower().double(), inputs(), torch.float64)
    assert int(made["labels"].max()) < VOCAB
