"""verify() must find what is wrong: each test breaks a rewritten model in one way and names how it shows."""

from dataclasses import replace
from functools import cache

import pytest
import torch
import torch.distributed as dist
from changed_plans import with_edits
from torch import nn

from colrow.cost_models.errors import UsageError
from colrow.planner.planning import plan
from colrow.rewrite import parallel, verification
from colrow.rewrite.collectives import all_reduce
from colrow.rewrite.comparison import error_of, gradient_errors
from colrow.rewrite.random_inputs import random_inputs
from colrow.rewrite.verification import verify


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.up, self.down = nn.Linear(8, 24), nn.Linear(24, 8)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.register_buffer("scale", torch.ones(()))
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return {"out": x * self.scale}


class Upcasting(nn.Linear):
    def forward(self, x):
        return super().forward(x.float().to(self.weight.dtype) if x.requires_grad else x).float()


def build(dtype=torch.float64):
    torch.manual_seed(0)
    return Model().to(dtype)


INPUTS = {"x": torch.zeros(3, 5, 8, dtype=torch.float64)}


@cache
def planned(tp=2):
    return plan(build(), INPUTS, tp=tp, phase="train")


def broken(monkeypatch, change):
    """The report on a model that ``change(model, rank)`` was done to."""

    def parallelize(model, p):
        model = parallel.parallelize(model, p)
        change(model, dist.get_rank())
        return model

    monkeypatch.setattr(verification, "parallelize", parallelize)
    report = verify(build, INPUTS, planned())
    assert not report.ok()
    return report


@pytest.mark.parametrize("ranks", ["simulated", "gloo"])
def test_a_right_model_is_right(ranks):
    report = verify(build, INPUTS, planned(), ranks=ranks)
    assert report.ok() and report.failures() == [] and report.explain().startswith("right on 2 ranks")
    assert report.tolerance == 1e-9 and report.forward_max_rel_error < 1e-12
    assert set(report.gradient_errors) | set(report.small_gradients) == {
        n for n, _ in build().named_parameters() if n != "unused"
    }
    assert [t.optimiser for t in report.trainings] == ["SGD", "AdamW"]
    assert report.collectives_executed == report.collectives_planned != ()
    assert not report.ok(tolerance=0.0)
    assert report.as_dict()["ok"] is True


def test_a_dropped_reduction_shows_in_values_and_counts(monkeypatch):
    def edit_bodies(model, plan, group, running):
        calls = plan.schedules[0].edits.calls
        dropped = next(site for site, edit in calls.items() if edit.result and edit.result.forward == "all_reduce")
        if next(model.parameters()).is_meta:  # the copy that is validated
            return real(model, plan, group, running)
        fewer = {site: replace(e, result=None) if site == dropped else e for site, e in calls.items()}
        return real(model, with_edits(plan, calls=fewer), group, running)

    real = parallel.edit_bodies
    monkeypatch.setattr(parallel, "edit_bodies", edit_bodies)
    report = verify(build, INPUTS, planned())
    text = report.explain()
    assert not report.ok() and report.forward_max_rel_error > 1e-3
    assert "1 forward all_reduce of" in text and "planned only" in text
    assert "first divergence: the output of blocks.0" in text
    assert any(line.startswith("output out: error") for line in report.failures())


def test_an_added_reduction_shows_in_counts_alone(monkeypatch):
    def add(model, rank):
        group = parallel.group_of(None)

        def hook(module, args, output):
            all_reduce(torch.ones(4), group)

        model.blocks[1].register_forward_hook(hook)

    report = broken(monkeypatch, add)
    assert report.forward_max_rel_error < 1e-12
    assert [line.split(":")[0] for line in report.failures()] == ["collectives"]
    assert "none planned only, 1 forward all_reduce of 16 bytes executed only" in report.explain()


def test_a_rank_that_drifts_shows_as_unequal(monkeypatch):
    def drift(model, rank):
        if rank == 1:
            model.register_forward_hook(lambda m, a, out: {"out": out["out"] * (1 + 1e-14)})

    assert "output out (rank 1): differs between ranks" in broken(monkeypatch, drift).explain()


def test_a_bias_halved_on_every_rank_but_one_shows_after_training_at_the_latest(monkeypatch):
    def halve(model, rank):
        bias = model.blocks[0].down.bias
        if rank:
            bias.register_hook(lambda g: g * 0.5)

    report = broken(monkeypatch, halve)
    assert any("blocks.0.down.bias" in what for what in report.unequal)


def test_a_wrong_gradient_is_named_with_its_block(monkeypatch):
    def scale(model, rank):
        model.blocks[1].norm.weight.register_hook(lambda g: g * 1.01)

    report = broken(monkeypatch, scale)
    assert report.forward_max_rel_error < 1e-12
    assert max(report.gradient_errors, key=report.gradient_errors.get) == "blocks.1.norm.weight"
    assert report.first_divergence == "in the backward pass of blocks.1"


def test_a_gradient_that_is_none_is_not_passed_over(monkeypatch):
    report = broken(monkeypatch, lambda model, rank: model.blocks[0].down.bias.requires_grad_(False))
    assert report.none_gradients == ("blocks.0.down.bias",)


def test_a_wrong_buffer_is_found(monkeypatch):
    report = broken(monkeypatch, lambda model, rank: model.scale.mul_(1.5))
    assert report.buffer_errors["scale"] == pytest.approx(0.5)


def test_nan_is_wrong(monkeypatch):
    def spoil(model, rank):
        model.register_forward_hook(lambda m, a, out: {"out": out["out"] * float("nan")})

    assert "output out: error nan" in broken(monkeypatch, spoil).explain()


def test_counts_are_in_the_plans_dtype():
    inputs = {"x": INPUTS["x"].to(torch.bfloat16)}
    p = plan(build(torch.bfloat16), inputs, tp=2, phase="train")
    report = verify(lambda: build(torch.bfloat16), inputs, p)
    assert report.ok(), report.explain()
    assert {nbytes for _, nbytes, direction in report.collectives_executed if direction == "forward"} == {3 * 5 * 8 * 2}
    assert report.notes == ("collectives counted in bfloat16, values compared in float64",)


def test_float32_inside_the_model_sets_the_tolerance():
    def upcasting():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 24), nn.ReLU(), Upcasting(24, 8)).double()

    inputs = (torch.randn(3, 8, dtype=torch.float64),)
    report = verify(upcasting, inputs, plan(upcasting(), inputs, tp=2))
    assert report.ok(), report.explain()
    assert report.tolerance == 1e-5


def test_models_that_cannot_run_are_refused():
    with torch.device("meta"):
        meta = Model()
    with pytest.raises(UsageError, match="on meta and cannot be run"):
        verify(lambda: meta, INPUTS, planned())


class TestErrors:
    def test_relative_to_the_largest_entry(self):
        assert error_of(torch.tensor([1.0, 4.5]), torch.tensor([1.0, 5.0])) == pytest.approx(0.1)

    def test_absolute_where_the_dense_tensor_is_zero(self):
        assert error_of(torch.tensor([2.0]), torch.tensor([0.0])) == 2.0

    def test_integers_are_equal_or_not(self):
        assert error_of(torch.tensor([1]), torch.tensor([1])) == 0.0
        assert error_of(torch.tensor([1]), torch.tensor([2])) == float("inf")

    def test_another_shape_is_wrong(self):
        assert error_of(torch.ones(2), torch.ones(1, 2)) == float("inf")

    def test_small_gradients_are_listed_apart_and_held_to_their_block(self):
        dense = {"b.0.big": torch.tensor([2.0]), "b.0.small": torch.tensor([1e-9]), "b.1.small": torch.tensor([1e-9])}
        found = {"b.0.big": torch.tensor([2.0]), "b.0.small": torch.tensor([3e-9]), "b.1.small": torch.tensor([3e-9])}
        errors, small, none = gradient_errors(found, dense, ["b.0", "b.1"])
        assert small == {"b.0.small": pytest.approx(1e-9)}  # of 2.0, the largest in its block
        assert errors == {"b.0.big": 0.0, "b.1.small": pytest.approx(2.0)} and none == ()

    def test_none_must_be_none_on_both_sides(self):
        found, dense = {"a": None, "b": None, "c": torch.ones(1)}, {"a": None, "b": torch.ones(1), "c": None}
        assert gradient_errors(found, dense, [])[2] == ("b", "c")


class TestRandomInputs:
    MODEL = nn.Embedding(7, 2)

    def test_constants_become_random_and_the_same_each_time(self):
        example = {"input_ids": torch.zeros(4, 64, dtype=torch.long), "x": torch.ones(5), "y": torch.tensor([1.0, 2.0])}
        made, again = (random_inputs(self.MODEL, example, torch.float64) for _ in range(2))
        assert made["input_ids"].unique().tolist() == list(range(7))
        assert made["x"].unique().numel() == 5 and made["x"].dtype is torch.float64
        assert made["y"].tolist() == [1.0, 2.0]
        assert all(torch.equal(made[name], again[name]) for name in made)
        assert not example["input_ids"].any()  # the caller's are as they were

    def test_masks_get_padding_at_the_end_of_every_other_sequence(self):
        made = random_inputs(self.MODEL, {"attention_mask": torch.ones(3, 8, dtype=torch.long)}, torch.float64)
        assert made["attention_mask"].sum(1).tolist() == [8, 6, 8]
        short = random_inputs(self.MODEL, {"attention_mask": torch.ones(2, 1, dtype=torch.long)}, torch.float64)
        assert short["attention_mask"].all()

    def test_positional_inputs_stay_a_tuple(self):
        made = random_inputs(self.MODEL, (torch.tensor([1, 2]), "mode"), torch.float64)
        assert made[0].tolist() == [1, 2] and made[1] == "mode"
