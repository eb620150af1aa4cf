"""Calls in forms that only a careful trace can check: all logits of a plan for the last ones, masks with a cache."""

from __future__ import annotations

import copy

import torch
from right_models import source_of
from test_forms import TOLERANCE, TP, largest_error

from colrow.planner.planning import plan
from colrow.planner.random_weights import randomize
from colrow.rewrite.counting import fixed_loss
from colrow.rewrite.form_traces import examples
from colrow.rewrite.generation import compare_generation

IDS = torch.randint(3, 90, (2, 7), generator=torch.Generator().manual_seed(0))


def planned_for_prefill(name):
    source = source_of(name, "prefill")
    return source, plan(source.model, source.example_inputs, tp=TP)


def test_all_logits_of_a_plan_for_the_last_ones():
    """The planned move at ``hidden[:, slice(-1, None)]`` is made at ``hidden[:, slice(0, None)]`` too."""
    source, p = planned_for_prefill("llama")
    assert source.example_inputs["logits_to_keep"] == 1
    dense = randomize(source.build().double()).eval()

    def call(model):
        logits = model(input_ids=IDS).logits
        fixed_loss(logits).backward()
        assert logits.shape[1] == IDS.shape[1]
        return (logits,)

    assert largest_error(dense, p, call) <= TOLERANCE


def test_masks_of_a_static_cache(capfd):
    """Gemma 2 is given floating-point masks as long as the cache; and what torch cannot trace is not logged."""
    source, p = planned_for_prefill("gemma2")

    def build():
        model = source.build()
        model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
        return model

    inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    inputs["attention_mask"][1, :3] = 0
    options = {"cache_implementation": "static", "disable_compile": True}
    assert compare_generation(build, inputs, p, 3, **options).ok(1e-5)
    assert "failed while attempting" not in capfd.readouterr().err


def test_examples_of_a_call_with_a_cache():
    planned = {"input_ids": torch.zeros(2, 12, dtype=torch.long)}
    given = {"input_ids": torch.zeros(1, 3, dtype=torch.long), "mask": {"full": torch.ones(1, 1, 3, 40)}}
    given["encoded"] = torch.ones(1, 3, 8)
    assert len(list(examples(planned, given))) == 2
    without, _, own = examples(planned, given | {"cache": object()})
    assert own["mask"]["full"].shape == (1, 1, 3, 40) and without["mask"]["full"].shape == (1, 1, 3, 3)
    assert without["encoded"].shape == (1, 3, 8)
    assert without["input_ids"].shape == (1, 3) and "cache" not in copy.copy(without)
