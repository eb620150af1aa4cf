"""Dropout in training: masks inside split heads differ between ranks, masks outside are the same everywhere."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.distributed as dist
from right_models import source_of
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from colrow.cost_models.errors import RankError
from colrow.planner.planning import plan
from colrow.planner.sources import source_from_config
from colrow.rewrite.counting import fixed_loss
from colrow.rewrite.parallel import parallelize
from colrow.rewrite.ranks import run_ranks

transformers = pytest.importorskip("transformers")
P, TP, BATCH, SEQ = 0.3, 2, 4, 24


class Masks(TorchFunctionMode):
    """Notes which elements every dropout kept, by shape."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is F.dropout and (kwargs or {}).get("training", True):
            given = args[0] if args else kwargs["input"]
            self.seen.append((given != 0, result != 0))
        return result


def gpt2(attention):
    config = transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=4, n_inner=64, vocab_size=64, n_positions=64, attn_implementation=attention,
        attn_pdrop=P, resid_pdrop=P, embd_pdrop=P, use_cache=False,
    )  # fmt: skip
    return source_from_config(config, phase="train", batch=BATCH, seq=SEQ, dtype="fp32")


def trained(build, inputs, p):
    """One rank: a training step with dropout; masks, and what of the model every rank has a copy of."""
    torch.manual_seed(dist.get_rank())  # parallelize makes the ranks agree
    model = parallelize(build(), p)
    assert model.training
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with Masks() as masks:
        loss = fixed_loss(model(**inputs))
    loss.backward()
    optimizer.step()
    copies = {n: q.to_local().clone() for n, q in model.named_parameters() if q.placements[0].is_replicate()}
    assert all(isinstance(q, DTensor) for q in model.parameters())
    return masks.seen, float(loss), copies, torch.get_rng_state()


@pytest.fixture(scope="module", params=["eager", "sdpa"])
def ranks(request):
    source = gpt2(request.param)
    p = plan(source.model, source.example_inputs, tp=TP, phase="train")
    inputs = {"input_ids": torch.randint(3, 60, (BATCH, SEQ), generator=torch.Generator().manual_seed(0))}
    return request.param, run_ranks(trained, TP, "gloo", (source.build, inputs, p))


def test_masks(ranks):
    attention, ((first, *_), (second, *_)) = ranks
    assert len(first) == len(second) == 1 + 2 * (3 if attention == "eager" else 2)  # embeddings; of a block
    inside = 0
    for (given, kept), (other_given, other_kept) in zip(first, second, strict=True):
        assert kept.shape == other_kept.shape
        heads = kept.dim() == 4
        inside += heads
        both = given & other_given
        count = int(both.sum())
        dropped = 1 - float(kept[both].double().mean())
        assert abs(dropped - P) < 5 * math.sqrt(P * (1 - P) / count)
        alike = float((kept == other_kept)[both].double().mean())
        if heads:  # independent draws agree this often
            expected = P**2 + (1 - P) ** 2
            assert abs(alike - expected) < 5 * math.sqrt(expected * (1 - expected) / count)
        else:
            assert alike == 1.0
    assert inside == (2 if attention == "eager" else 0)


def test_what_all_ranks_hold_stays_equal(ranks):
    _, ((_, loss, copies, state), (_, other_loss, other_copies, other_state)) = ranks
    assert loss == other_loss
    assert copies.keys() == other_copies.keys() and any("ln_1" in name for name in copies)
    for name, value in copies.items():
        assert torch.equal(value, other_copies[name]), name
    assert torch.equal(state, other_state), "the next draws are the same again"


def test_evaluation_draws_nothing():
    """Else tokens sampled with a seed would be others than the dense model's."""
    source = gpt2("sdpa")
    dense = source.build()
    p = plan(source.model, source.example_inputs, tp=TP, phase="train")

    def states():
        model, found = parallelize(copy.deepcopy(dense), p), []
        for training in (False, True):
            before = torch.get_rng_state()
            model.train(training)(**source.example_inputs)
            found.append(torch.equal(torch.get_rng_state(), before))
        return found

    assert run_ranks(states, TP, "gloo") == [[True, False]] * TP


def test_heads_draw_differently_inside_fused_attention():
    """Inside a kernel masks cannot be seen: equal heads on two ranks would give equal outputs with equal masks."""
    source = gpt2("sdpa")
    dense = source.build()
    for block in dense.transformer.h:  # every head of q, k, v is the same
        block.attn.c_attn.weight.data = (
            block.attn.c_attn.weight.data.view(32, 12, 8)[:, :1].repeat(1, 12, 1).view(32, 96)
        )
        block.attn.c_attn.bias.data.zero_()
    p = plan(source.model, source.example_inputs, tp=TP, phase="train")
    inputs = {"input_ids": torch.randint(3, 60, (BATCH, SEQ), generator=torch.Generator().manual_seed(0))}

    def heads(training):
        model = parallelize(dense, p).train(training)
        seen = []
        model.transformer.h[0].attn.c_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
        model(**inputs)
        return seen[0]

    for training in (False, True):
        one, other = run_ranks(heads, TP, "gloo", (training,))
        assert one.shape == (BATCH, SEQ, 16)
        assert torch.equal(one, other) is not training


def test_llama_attention_dropout():
    source = source_of("llama", dtype="fp32")

    def build():
        model = source.build().train()
        model.config.attention_dropout = P
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = P
        return model

    p = plan(build().to("meta"), source.example_inputs, tp=TP, phase="train")
    (_, loss, copies, _), (_, other_loss, other_copies, _) = run_ranks(
        trained, TP, "gloo", (build, source.example_inputs, p)
    )
    assert loss == other_loss
    assert copies and all(torch.equal(copies[name], other_copies[name]) for name in copies)


def test_a_plan_made_in_evaluation_is_refused_in_training_where_split_heads_drop() -> None:
    """Without an edit of the dropout, all ranks would draw the same for different heads: nobody would see it."""

    def run(rate: float, trains: bool) -> bool:
        config = gpt2("sdpa").model.config
        config.attn_pdrop = config.resid_pdrop = config.embd_pdrop = rate
        source = source_from_config(config, batch=2, seq=8, dtype="fp32")
        model = source.build().eval()
        made = plan(model, source.example_inputs, tp=2)

        def step() -> bool:
            local = parallelize(copy.deepcopy(model), made)
            local.train(trains)
            return bool(local(**source.example_inputs).logits.isfinite().all())

        return all(run_ranks(step, 2))

    assert run(0.1, trains=False) and run(0.0, trains=True)
    with pytest.raises(RankError, match="planned in evaluation, it has dropout in split regions"):
        run(0.1, trains=True)
