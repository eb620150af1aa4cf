"""Configurations changed after the rewrite: the forward reads them, so what they ask for is right or refused."""

from __future__ import annotations

import copy

import pytest
import torch
from right_models import planned_twin
from test_uses import INPUTS

from colrow.cost_models.errors import ValidationError
from colrow.rewrite.comparison import error_of
from colrow.rewrite.live_settings import LiveSettings
from colrow.rewrite.parallel import parallelize
from colrow.rewrite.ranks import run_ranks

TP, TOLERANCE = 2, 1e-5


def on_ranks(check, backend="simulated"):
    """What ``check`` returns for every rank's rewritten model."""
    dense, p = planned_twin("llama")
    return run_ranks(lambda: check(parallelize(copy.deepcopy(dense), p)), TP, backend)


@pytest.mark.parametrize(
    ("asked", "implementation"), [("output_hidden_states", "sdpa"), ("output_attentions", "eager")]
)
def test_what_was_not_planned_is_refused(asked, implementation):
    """Hidden states would be partial sums here, attentions this rank's heads."""

    def check(model):
        before = model(**INPUTS).logits
        model.set_attn_implementation(implementation)
        setattr(model.config, asked, True)
        for _ in range(2):
            with pytest.raises(ValidationError, match=rf"call with config\.\w*{asked} changed"):
                model(**INPUTS)
        setattr(model.config, asked, False)
        assert error_of(model(**INPUTS).logits.detach(), before.detach()) <= TOLERANCE

    on_ranks(check)


def test_what_does_not_matter_is_right_and_looked_into_once(monkeypatch):
    from colrow.rewrite import forms

    dense, _ = planned_twin("llama")
    traced = []
    monkeypatch.setattr(forms, "traced_on", lambda *args, t=forms.traced_on: traced.append(1) or t(*args))

    def check(model):
        model.config.use_cache = not model.config.use_cache
        model(**INPUTS)
        assert not traced, "traces have no cache"
        model.config.pad_token_id = 7
        return [model(**INPUTS).logits.detach() for _ in range(3)][-1]

    found = on_ranks(check)
    assert len(traced) == 1
    assert max(error_of(one, dense(**INPUTS).logits.detach()) for one in found) <= TOLERANCE


def test_compiled_with_an_option_that_was_not_planned():
    def check(model):
        torch._dynamo.reset()
        with pytest.raises(Exception, match=r"argument output_hidden_states: the model was not planned with it"):
            torch.compile(model, backend="eager")(**INPUTS, output_hidden_states=True)

    on_ranks(check, "gloo")


def test_changes_are_found_in_configurations_inside_others():
    class Settings:
        def __init__(self, **said):
            vars(self).update(said)

    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    model.config = Settings(depth=2, text=Settings(width=3, sizes=[1, 2]))
    kept = LiveSettings(copy.deepcopy(model))
    assert kept.changed(model) == ()
    model.config.text.sizes.append(3)
    model.config.new = True
    changes = kept.changed(model)
    assert {(name, repr(value)) for _, name, value in changes} == {("sizes", "[1, 2, 3]"), ("new", "True")}
    with kept.applied(changes):
        assert kept.held[0]["new"] and kept.held[1]["sizes"] == [1, 2, 3]
    assert "new" not in kept.held[0] and kept.held[1]["sizes"] == [1, 2]
