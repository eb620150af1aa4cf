"""Hooks on modules of a rewritten model see the dense model's values, or are refused, or say what they see."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from right_models import planned_twin
from test_uses import largest_error

from colrow.cost_models.errors import ColrowError, UsageError
from colrow.rewrite.counting import fixed_loss
from colrow.rewrite.parallel import parallelize
from colrow.rewrite.ranks import run_ranks
from colrow.rewrite.storage import as_dense, specs_of

TP, TOLERANCE = 2, 1e-5
INPUTS = {"input_ids": torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(0))}


def blocks_of(model):
    return [module for path, module in model.named_modules() if path.split(".")[-2:-1] in (["layers"], ["h"])]


def first(value):
    return value[0] if isinstance(value, tuple) else value


def read(model, seen):
    for block in blocks_of(model):
        block.register_forward_hook(lambda module, args, output: seen.append(first(output)))
        block.register_forward_pre_hook(lambda module, args: seen.append(args[0]))


def steered(model, seen):
    for block in blocks_of(model):
        block.register_forward_hook(
            lambda module, args, out: (out[0] + 0.1, *out[1:]) if isinstance(out, tuple) else out + 0.1
        )


def back(model, seen):
    for block in blocks_of(model):
        block.register_full_backward_hook(lambda module, into, out: seen.append(out[0]))


def run(model, register):
    """What hooks saw, and gradients of a loss that what they saw in forward has a part in."""
    seen, specs = [], specs_of(model)
    register(model, seen)
    logits = model(**INPUTS).logits
    (fixed_loss(logits) + sum(value.pow(2).sum() for value in seen)).backward()
    grads = {name: as_dense(p.grad, specs[name]).full_tensor() if name in specs else p.grad
             for name, p in model.named_parameters()}  # fmt: skip
    return {str(i): value.detach().clone() for i, value in enumerate([logits, *seen])} | grads


@pytest.mark.parametrize(("name", "register"), [("gpt2", read), ("gpt_neox", read), ("gpt2", steered), ("gpt2", back)])
def test_right(name, register):
    """GPT-2's blocks pass whole values; so do GPT-NeoX's, whose gradients are partial sums."""
    dense, p = planned_twin(name)
    true = run(copy.deepcopy(dense), register)
    for found in run_ranks(lambda: run(parallelize(copy.deepcopy(dense), p), register), TP):
        assert largest_error(found, true) <= TOLERANCE


@pytest.mark.parametrize("register", [read, steered, back])
def test_refused_on_partial_sums(register):
    """In float64 a Llama's norms reduce what they have rounded to half the bytes: its blocks pass partial sums."""
    dense, p = planned_twin("llama")
    hooked = copy.deepcopy(dense)
    register(hooked, [])

    def on_rank():
        model = parallelize(copy.deepcopy(dense), p)
        with pytest.raises(UsageError, match=r"layers\.0: a hook here .* partial sums pass here"):
            register(model, [])
        model(**INPUTS)
        # One that changes values changes what the model computes: the plan is not exact for it.
        with pytest.raises(ColrowError, match=r"layers\.0: a hook here|plan is not exact for this model"):
            parallelize(copy.deepcopy(hooked), p)

    run_ranks(on_rank, TP)


@pytest.mark.parametrize("register", [steered, back])
def test_refused_on_partial_gradients(register):
    dense, p = planned_twin("gpt_neox")

    def on_rank():
        model = parallelize(copy.deepcopy(dense), p)
        with pytest.raises(UsageError, match=r"gpt_neox\.layers\.\d: a hook"):
            register(model, [])
            model(**INPUTS)

    run_ranks(on_rank, TP)


def test_what_sees_slices_says_so():
    dense, p = planned_twin("gpt2")

    def on_rank():
        model = parallelize(copy.deepcopy(dense), p)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            model.transformer.h[0].mlp.c_fc.register_forward_hook(lambda *given: None)
            model.transformer.h[0].register_forward_hook(lambda *given: None)
        return [str(one.message) for one in said if "colrow" in str(one.message)]

    (said, *_) = run_ranks(on_rank, TP, "gloo")
    assert len(said) == 1 and "transformer.h.0.mlp.c_fc sees slices" in said[0]


def test_a_copy_is_guarded_too():
    dense, p = planned_twin("llama")

    def on_rank():
        model = copy.deepcopy(parallelize(copy.deepcopy(dense), p))
        with pytest.raises(UsageError, match="a hook here"):
            read(model, [])

    run_ranks(on_rank, TP)


def test_a_block_is_not_called_by_itself_where_it_passes_partial_sums():
    dense, p = planned_twin("llama")

    def direct():
        model = parallelize(copy.deepcopy(dense), p)
        hidden, whole = torch.zeros(2, 12, 64, dtype=torch.float64), model(**INPUTS).logits
        with pytest.raises(UsageError, match=r"called by itself.*partial sums"):
            model.model.layers[1](hidden)
        with torch.no_grad():  # a base model passes whole values; and what broke off leaves no trace
            with pytest.raises(UsageError, match=r"called by itself, and its input inputs_embeds was not planned"):
                model.model(inputs_embeds=hidden)
            base = model.model(**INPUTS).last_hidden_state
            return model(**INPUTS).logits - whole, base

    with torch.no_grad():
        true = dense.model(**INPUTS).last_hidden_state
    for again, base in run_ranks(direct, TP):
        assert again.abs().max() == 0 and largest_error({"base": base}, {"base": true}) <= TOLERANCE
