"""Edited bodies: every traced call of real models can be replaced where it stands, and nothing else changes."""

from __future__ import annotations

import copy
import gc
import operator
import threading
import weakref
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from call_chains import assert_compilers_see_through, assert_every_call_replaced, edit_everything, identity, traced
from torch import Tensor, nn

from colrow.cost_models.errors import ValidationError
from colrow.rewrite.bodies import edit_module, edited_source, restore

SIZES = {
    "gpt_neox": {"num_key_value_heads": None},
    "llama": {"num_key_value_heads": 2},
    "mixtral": {"num_key_value_heads": 2, "num_local_experts": 4},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "bert": {},
    "t5": {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4},
}


def small(model_type: str, **changes: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    """A two-layer random model and its inputs."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "vocab_size": 96,
    }
    config = transformers.AutoConfig.for_model(model_type, **{**sizes, **SIZES[model_type], **changes})
    config.bos_token_id = config.eos_token_id = 1
    model = transformers.AutoModel.from_config(config).eval()
    ids = torch.randint(0, 90, (2, 12))
    inputs = {"input_ids": ids, "decoder_input_ids": ids} if config.is_encoder_decoder else {"input_ids": ids}
    return model, inputs


@pytest.mark.parametrize("model_type", SIZES)
def test_every_call_of_a_model_can_be_replaced(model_type: str) -> None:
    model, inputs = small(model_type)
    assert_every_call_replaced(model, **inputs)


def test_eager_attention_and_its_helper_in_the_same_file() -> None:
    model, inputs = small("llama", attn_implementation="eager")
    tracer = assert_every_call_replaced(model, **inputs)
    names = {frame.qualname for _, chain, _ in tracer.calls for frame in chain}
    assert {"eager_attention_forward", "repeat_kv", "apply_rotary_pos_emb", "rotate_half"} <= names


def test_a_helper_in_another_file_through_a_local_variable() -> None:
    model, inputs = small("llama", attn_implementation="sdpa")
    attention = model.layers[0].self_attn
    inputs["attention_mask"] = torch.ones(2, 12).tril(-3)[:, :12].bool().long()  # padding: no grouped-query kernel
    chains = traced(model, **inputs).chains(attention, "scaled_dot_product_attention")
    assert [frame.qualname for frame in chains[0]] == ["LlamaAttention.forward", "sdpa_attention_forward"]
    seen: list[Any] = []

    def watch(func, /, *args, **kwargs):
        seen.append((func, len(args), sorted(kwargs)))
        return func(*args, **kwargs)

    edit_module(attention, {chains[0]: watch})
    model(**inputs)
    assert len(seen) == 1
    assert seen[0][0] is F.scaled_dot_product_attention
    assert "is_causal" in seen[0][2]


def test_another_helper_than_the_recorded_one_is_refused() -> None:
    model, inputs = small("llama", attn_implementation="sdpa")
    attention = model.layers[0].self_attn
    edit_module(attention, {traced(model, **inputs).chains(attention, "scaled_dot_product_attention")[0]: identity})
    model.set_attn_implementation("eager")
    with pytest.raises(ValidationError, match="eager_attention_forward.*sdpa_attention_forward"):
        model(**inputs)


def test_nested_sums_are_two_sites() -> None:
    model, inputs = small("gpt_neox")
    layer = model.layers[0]
    inner, outer = traced(model, **inputs).chains(layer, "add")
    seen: list[tuple[str, Any, list[Tensor]]] = []

    def watch(name):
        def site(func, /, *args):
            seen.append((name, func, list(args)))
            return func(*args)

        return site

    edit_module(layer, {inner: watch("inner"), outer: watch("outer")})
    model(**inputs)
    assert [name for name, _, _ in seen] == ["inner", "outer"]
    assert seen[0][1] is operator.add
    assert torch.equal(seen[1][2][0], seen[0][2][0] + seen[0][2][1])


def test_one_helper_called_twice_is_edited_once_per_call() -> None:
    model, inputs = small("llama")
    attention = model.layers[0].self_attn
    chains = traced(model, **inputs).chains(attention, "neg")
    assert len(chains) == 2
    assert chains[0][-1] == chains[1][-1]
    assert chains[0][1] != chains[1][1]
    shapes: list[tuple[int, ...]] = []

    def watch(func, /, x):
        shapes.append(tuple(x.shape))
        return func(x)

    edit_module(attention, {chains[1]: watch})
    model(**inputs)
    assert shapes == [(2, 2, 12, 4)]  # the keys: 2 heads; the queries have 4


def test_layers_of_torch_and_their_neighbours() -> None:
    class Three(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.norm = nn.Embedding(7, 4), nn.LayerNorm(4)
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.second(self.first(self.norm(self.embed(x))))

    model, ids = Three(), torch.arange(5)
    before = model(ids)
    tracer = traced(model, ids)
    doubled = lambda func, /, *args, **kwargs: 2 * func(*args, **kwargs)  # noqa: E731
    edit_module(model.second, dict.fromkeys(tracer.chains(model.second, "linear"), doubled))
    assert torch.equal(model(ids), 2 * before)
    assert type(model.first) is nn.Linear
    assert isinstance(model.second, nn.Linear) and repr(model.second) == repr(model.first)
    assert "__colrow_0__(F.linear, input, self.weight, self.bias)" in edited_source(model.second)
    assert edited_source(model.first) == ""
    restore(model.second)
    assert type(model.second) is nn.Linear
    assert torch.equal(model(ids), before)
    assert_every_call_replaced(model, ids)


@dataclass(frozen=True)
class Times:
    """A replacement with state, compared by value."""

    factor: float

    def __call__(self, func, /, *args, **kwargs):
        return func(*args, **kwargs) * self.factor


def test_equal_edits_share_a_class_and_unequal_ones_do_not() -> None:
    model, inputs = small("gpt_neox")
    chains = [traced(model, **inputs).chains(layer.mlp.dense_4h_to_h, "linear")[0] for layer in model.layers]
    assert chains[0] == chains[1]
    first, second = (layer.mlp.dense_4h_to_h for layer in model.layers)
    edit_module(first, {chains[0]: Times(1.0)})
    edit_module(second, {chains[1]: Times(1.0)})
    assert type(first) is type(second)
    restore(second)
    edit_module(second, {chains[1]: Times(2.0)})
    assert type(first) is not type(second)


def test_unused_classes_are_collected() -> None:
    layer = nn.Linear(2, 2)
    edit_module(layer, dict.fromkeys(traced(layer, torch.randn(1, 2)).chains(layer, "linear"), Times(3.0)))
    held = weakref.ref(type(layer))
    del layer
    gc.collect()
    assert held() is None


def test_ranks_in_threads_do_not_mix() -> None:
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    x = torch.randn(3, 4)
    chain = traced(dense, x).chains(dense[0], "linear")[0]
    expected = dense(x)
    results: dict[int, Tensor] = {}

    def rank(index: int) -> None:
        model = copy.deepcopy(dense)
        edit_module(model[1], {chain: Times(float(index))})
        for _ in range(50):
            results[index] = model(x).detach()

    threads = [threading.Thread(target=rank, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in range(4):
        assert torch.equal(results[index], expected * index)


@pytest.mark.parametrize("model_type", ["gpt_neox", "gpt2"])
def test_compilers_see_through(model_type: str) -> None:
    model, inputs = small(model_type)
    assert_compilers_see_through(model, {**inputs, "use_cache": False})


def test_equal_layers_compile_once() -> None:
    model, inputs = small("gpt_neox", num_hidden_layers=10)  # more than the recompile limit of 8
    edit_everything(model, traced(model, **inputs))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for layer in model.layers:
        layer.compile(fullgraph=True, backend="eager")
    with torch.no_grad():
        model(**inputs, use_cache=False)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_misuse_is_refused() -> None:
    layer, x = nn.Linear(2, 2), torch.randn(1, 2)
    chain = traced(layer, x).chains(layer, "linear")[0]
    with pytest.raises(ValidationError, match="starts elsewhere"):
        edit_module(nn.Embedding(2, 2), {chain: identity})
    edit_module(layer, {chain: identity})
    with pytest.raises(ValidationError, match="edited already"):
        edit_module(layer, {chain: identity})
    own = nn.Linear(2, 2)
    own.forward = own.forward
    with pytest.raises(ValidationError, match="of its own"):
        edit_module(own, {chain: identity})
    restore(own)  # not edited: nothing to do
