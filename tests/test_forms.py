"""A forward called in another form than planned is right, or raises: it is never silently another computation."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
from plain_models import HIDDEN
from right_models import planned_twin
from torch import nn

from colrow.cost_models.errors import ValidationError
from colrow.planner.planning import plan
from colrow.planner.random_weights import randomize
from colrow.rewrite.comparison import error_of
from colrow.rewrite.counting import fixed_loss
from colrow.rewrite.parallel import parallelize
from colrow.rewrite.ranks import run_ranks
from colrow.rewrite.storage import as_dense, specs_of

TP, TOLERANCE = 2, 1e-5


def largest_error(dense, p, call, calls=1):
    """Of what ``call`` returns and of the gradients it leaves, on any rank."""

    def run(model):
        specs = specs_of(model)
        for _ in range(calls):
            values = call(model)
        full = {n: as_dense(q.grad, specs[n]).full_tensor() if n in specs else q.grad
                for n, q in model.named_parameters() if q.grad is not None}  # fmt: skip
        return {f"value {i}": v.detach().clone() for i, v in enumerate(values)} | {
            n: g.clone() for n, g in full.items()
        }

    true = run(copy.deepcopy(dense))
    found = run_ranks(lambda: run(parallelize(copy.deepcopy(dense), p)), TP)
    assert all(one.keys() == true.keys() for one in found)
    return max(error_of(one[name], true[name]) for one in found for name in true)


def embedded(hidden):
    def call(model):
        given = torch.randn(2, 7, hidden, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        given.requires_grad_()
        logits = model(inputs_embeds=given).logits
        fixed_loss(logits).backward()
        return logits, given.grad

    return call


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "bert"])
def test_embeddings_in_place_of_tokens(name):
    """The embedding's partial sums are added to others before they are reduced; what is whole must not be."""
    dense, p = planned_twin(name)
    call = embedded(dense.get_input_embeddings().weight.shape[1])
    try:
        error = largest_error(dense, p, call)
    except Exception as refusal:
        assert "call with inputs_embeds: the model was not planned in this form" in str(refusal)
    else:
        assert error <= TOLERANCE


def test_embeddings_that_were_planned():
    dense, _ = planned_twin("llama")
    hidden = dense.config.hidden_size
    inputs = {"inputs_embeds": torch.randn(2, 12, hidden, dtype=torch.float64)}
    p = plan(copy.deepcopy(dense).to("meta"), inputs, tp=TP, phase="train")
    assert largest_error(dense, p, embedded(hidden)) <= TOLERANCE


def test_encoded_before():
    """T5's decoder on a given encoder output: the encoder does not run, and all of the rest is as planned."""
    dense, p = planned_twin("t5")
    from transformers.modeling_outputs import BaseModelOutput

    def call(model):
        given = torch.randn(2, 7, dense.config.d_model, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        given.requires_grad_()
        encoded = BaseModelOutput(last_hidden_state=given)
        for _ in range(2):  # the caller's container is not changed
            logits = model(encoder_outputs=encoded, decoder_input_ids=torch.arange(3, 13).view(2, 5)).logits
            fixed_loss(logits).backward()
        return logits, given.grad

    assert largest_error(dense, p, call) <= TOLERANCE


class Optional(nn.Module):
    """Its options stand between a row layer and the operator that forces the reduction."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(HIDDEN, 32), nn.Linear(32, HIDDEN)
        self.other_up, self.other_down = nn.Linear(HIDDEN, 32), nn.Linear(32, HIDDEN)
        self.norm, self.head = nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, 8)

    def forward(self, x, extra=None, cut=False, power=1, scale=1.0, mode="sum"):
        made = self.down(torch.relu(self.up(x)))
        if cut:
            made = made.relu()
        if power > 1:
            made = made**power
        if extra is not None:
            made = made + extra
        if mode == "sum":
            made = made + self.other_down(torch.relu(self.other_up(x)))
        if self.training:
            made = made * 2
        return (self.head(self.norm(made * scale)),)


@cache
def optional():
    torch.manual_seed(0)
    model = randomize(Optional().double()).eval()
    return model, plan(model, {"x": torch.randn(3, HIDDEN, dtype=torch.float64)}, tp=TP, phase="train")


X = torch.randn(3, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def called(*args, training=False, **options):
    def call(model):
        model.train(training)
        made = model(*args, **options)
        fixed_loss(made).backward()
        return made

    return call


FINE = {
    "scaled": called(X, scale=0.5),
    "scaled otherwise": called(X[:2], scale=3.0),
    "in training": called(X, training=True),
    "defaults said aloud": called(X, None, False, 1, 1.0, "sum"),
}
CHANGED = {
    "cut": called(X, cut=True),
    "cut, by place": called(X, None, True),
    "power": called(X, power=2),
    "extra": called(X, extra=X),
}


@pytest.mark.parametrize("name", FINE)
def test_options_that_the_plan_covers(name):
    assert largest_error(*optional(), FINE[name], calls=2) <= TOLERANCE


@pytest.mark.parametrize("name", CHANGED)
def test_options_that_it_does_not_cover(name):
    """The sum of both branches is reduced once, after what these options would do to one branch's partial sums."""
    dense, p = optional()
    assert p.count("all_reduce", "forward", category=None) == 1

    def on_rank():
        model = parallelize(copy.deepcopy(dense), p)
        before = model(X)[0]
        for _ in range(2):
            with pytest.raises(ValidationError, match=r"Optional, call with \w+: the model was not planned in this"):
                CHANGED[name](model)
        assert torch.equal(model(X)[0], before)

    run_ranks(on_rank, TP)


def test_a_number_that_changes_at_every_call_is_looked_into_a_few_times(monkeypatch):
    from colrow.rewrite import forms

    dense, p = optional()
    traced = []
    monkeypatch.setattr(forms, "_form", lambda *args, f=forms._form: traced.append(1) or f(*args))

    def on_rank():
        model = parallelize(copy.deepcopy(dense), p)
        return [error_of(model(X, scale=float(n))[0], dense(X, scale=float(n))[0]) for n in range(20)]

    errors = run_ranks(on_rank, TP)
    assert max(map(max, errors)) <= TOLERANCE and 1 < len(traced) <= forms.MAX_NUMBERS


def test_compiled_with_what_was_not_planned():
    dense, p = optional()

    def on_rank():
        model = parallelize(copy.deepcopy(dense), p)
        torch._dynamo.reset()
        with pytest.raises(Exception, match="not planned with it"):
            torch.compile(model, backend="eager")(X, extra=X)

    run_ranks(on_rank, TP, "gloo")
