"""Rewritten models generate what dense ones do: with every kind of cache, with padding, sampled alike on all ranks."""

from functools import cache

import pytest
import torch
import torch.distributed as dist
from right_models import source_of

from colrow.planner.planning import plan
from colrow.rewrite import generation
from colrow.rewrite.generation import Generated, compare_generation, compare_tokens, greedy
from colrow.rewrite.parallel import parallelize
from colrow.rewrite.ranks import run_ranks

TOKENS = 12


@cache
def planned(name, tp=2):
    source = source_of(name, "prefill")
    return source, plan(source.model, source.example_inputs, tp=tp)


def builder(source):
    def build():
        model = source.build()
        model.generation_config.eos_token_id = None  # go on to the end
        model.generation_config.pad_token_id = 0
        return model

    return build


def prompt(source, padding=0):
    ids = source.example_inputs["input_ids"]
    mask = torch.ones_like(ids)
    mask[1, :padding] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
@pytest.mark.parametrize(
    ("padding", "options"),
    [
        (0, {}),
        (4, {}),
        (4, {"use_cache": False}),
        (4, {"cache_implementation": "static", "disable_compile": True}),
    ],
    ids=["dynamic", "padded", "no-cache", "static"],
)
def test_the_same_tokens(name, padding, options):
    source, p = planned(name)
    report = compare_generation(builder(source), prompt(source, padding), p, TOKENS, **options)
    assert report.ok(1e-5), report
    assert report.num_compared == 2 * TOKENS or report.num_flips


def test_on_three_ranks():
    source, p = planned("llama", 3)
    assert compare_generation(builder(source), prompt(source, 3), p, TOKENS).ok(1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gpt2"])
def test_planned_for_decoding_with_a_cache_in_the_trace(name):
    """One token, cached: the same reductions as without a cache, and the same tokens."""
    source = source_of(name, "decode", dtype="fp32")
    inputs = source.example_inputs | {"use_cache": True}
    p = plan(source.model, inputs, tp=2, phase="decode", context=source.context)
    without = plan(source.model, source.example_inputs, tp=2, phase="decode", context=source.context)
    counts = [made.count("all_reduce", "forward", category="block") for made in (p, without)]
    assert counts[0] == counts[1] == 2 * (1 if name == "gpt_neox" else 2)
    assert p.sharded_fraction == without.sharded_fraction == 1.0
    assert compare_generation(builder(source), prompt(source_of(name, "prefill")), p, TOKENS).ok(1e-5)


def sample(build, inputs, p):
    model = parallelize(build(), p)
    torch.manual_seed(7)
    return greedy(model, inputs, TOKENS, do_sample=True, temperature=1.5, top_k=0).tokens


def test_sampled_alike_on_every_rank():
    source, p = planned("llama")
    build = builder(source)
    one, other = run_ranks(sample, 2, "gloo", (build, prompt(source), p))
    assert torch.equal(one, other)
    torch.manual_seed(7)
    dense = greedy(build(), prompt(source), TOKENS, do_sample=True, temperature=1.5, top_k=0).tokens
    assert torch.equal(one, dense)
    assert not torch.equal(dense, greedy(build(), prompt(source), TOKENS).tokens)  # it was sampled indeed


def test_wrong_logits_are_found(monkeypatch):
    def wrong(model, p):
        model = parallelize(model, p)
        with torch.no_grad():
            model.model.norm.weight.to_local().mul_(1 + dist.get_rank())
        return model

    monkeypatch.setattr(generation, "parallelize", wrong)
    source, p = planned("llama")
    report = compare_generation(builder(source), prompt(source), p, TOKENS)
    assert not report.ok(1e-5) and report.logits_error > 1e-3


class TestMargins:
    def generated(self, *rows):
        logits = torch.tensor([[list(step) for step in row] for row in rows])
        return Generated(logits.argmax(-1), logits)

    def test_a_flip_at_a_tie_is_no_mistake(self):
        dense = self.generated([(1.0, 1.0001), (0.0, 1.0)])
        found = self.generated([(1.0001, 1.0), (1.0, 0.0)])  # what follows answers another prompt
        report = compare_tokens([found], dense)
        assert (report.wrong, report.num_flips, report.num_compared) == ((), 1, 1)

    def test_a_flip_where_the_dense_model_is_sure_is_one(self):
        dense = self.generated([(1.0, 0.0), (1.0, 0.0)], [(1.0, 0.0), (1.0, 0.0)])
        found = Generated(torch.tensor([[0, 0], [0, 1]]), dense.logits.clone())
        report = compare_tokens([found], dense)
        assert report.wrong == ((1, 1),) and not report.ok(1.0)

    def test_ranks_must_agree(self):
        one = self.generated([(1.0, 0.0)])
        assert compare_tokens([one, self.generated([(0.0, 1.0)])], one).unequal_ranks == (1,)

    def test_stopping_early_is_a_difference(self):
        dense = self.generated([(1.0, 0.0), (1.0, 0.0)])
        assert not compare_tokens([self.generated([(1.0, 0.0)])], dense).ok(1.0)
