"""The small version keeps ratios, patterns, ties and operators, and runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import BartForConditionalGeneration, CLIPModel, WhisperForConditionalGeneration

from colrow.planner.configurations import default_config
from colrow.planner.shrink import configs_in, small_config
from colrow.planner.sources import load_source, source_from_config

# The class that holds both halves of a type whose head class is only one of them.
WHOLE = {
    "whisper": WhisperForConditionalGeneration,
    "bart": BartForConditionalGeneration,
    "clip": CLIPModel,
}
# Verified by execution on several simulated ranks, over and over: these have to be quick.
VERIFIED = (
    "llama qwen3 gemma2 gpt2 gpt_neox phi3 olmo2 bert opt t5 vit mixtral deepseek_v3 whisper falcon bloom bart clip "
    "mamba gpt_oss"
).split()
# Other structures. Twelve query heads per kv head (glm4_moe) and eight layers to a period (jamba) take their room.
OTHERS = (
    "qwen2_moe gemma3_text glm4 glm4_moe cohere2 jamba granitemoehybrid qwen3_5 phi gptj mamba2 swin swinv2 deberta-v2 "
    "wav2vec2"
).split()
TYPES = [*VERIFIED, *OTHERS]


@pytest.mark.parametrize("model_type", TYPES)
def test_small_models_build_and_run(model_type: str) -> None:
    source = source_from_config(
        default_config(model_type), model_class=WHOLE.get(model_type), small=True, batch=2, seq=16, dtype="fp32"
    )
    model = source.build()
    assert sum(p.numel() for p in model.parameters()) < (2_000_000 if model_type in VERIFIED else 5_000_000)
    with torch.no_grad():
        outputs = model(**source.example_inputs)
    tensors = [value for value in outputs.to_tuple() if torch.is_tensor(value) and value.is_floating_point()]
    assert tensors and all(torch.isfinite(value).all() for value in tensors)


@pytest.mark.parametrize("model_type", TYPES)
def test_small_models_have_the_modules_of_the_full_one(model_type: str) -> None:
    """Every module path of the small model exists in the full one, with the same class and kinds of parameters."""
    config = default_config(model_type)
    small = source_from_config(config, model_class=WHOLE.get(model_type), small=True, seq=8).model
    full = source_from_config(config, model_class=WHOLE.get(model_type), seq=8).model
    classes = {type(module).__name__ for module in full.modules()}  # by name: parametrizations make classes as they go
    assert {type(module).__name__ for module in small.modules()} == classes
    kinds = {name.rpartition(".")[2]: parameter.dim() for name, parameter in full.named_parameters()}
    assert {name.rpartition(".")[2]: parameter.dim() for name, parameter in small.named_parameters()} == kinds
    assert len(dict(small.named_parameters(remove_duplicate=False))) - len(dict(small.named_parameters())) == len(
        dict(full.named_parameters(remove_duplicate=False))
    ) - len(dict(full.named_parameters()))


def shrunk(model_type: str, **fields: Any) -> Any:
    config = default_config(model_type)
    for name, value in fields.items():
        setattr(config, name, value)
    return small_config(config)


@pytest.mark.parametrize(
    ("heads", "kv_heads"),
    [(32, 8), (32, 32), (64, 8), (8, 4), (28, 4), (40, 8), (6, 2), (14, 2), (7, 7), (71, 1), (9, 3)],
)
@pytest.mark.parametrize("divisible_by", [2, 3, 4, 8])
def test_head_ratio_and_divisibility_are_kept(heads: int, kv_heads: int, divisible_by: int) -> None:
    config = default_config("qwen3")
    config.num_attention_heads, config.num_key_value_heads, config.head_dim = heads, kv_heads, 128
    config.hidden_size = heads * 128
    small = small_config(config, divisible_by=divisible_by)
    if kv_heads > 1:
        assert small.num_attention_heads * kv_heads == small.num_key_value_heads * heads
    for before, after in ((heads, small.num_attention_heads), (kv_heads, small.num_key_value_heads)):
        assert after <= before and (after % divisible_by == 0) == (before % divisible_by == 0)
    assert small.hidden_size == small.num_attention_heads * small.head_dim and small.head_dim == 8


def test_only_single_head_queries_may_change_their_ratio() -> None:
    small = shrunk("llama", num_attention_heads=32, num_key_value_heads=1)
    assert (small.num_attention_heads, small.num_key_value_heads) == (4, 1)


def test_layer_patterns_are_kept_whole() -> None:
    assert shrunk("llama").num_hidden_layers == 2
    gemma2 = shrunk("gemma2")
    assert gemma2.layer_types == ["sliding_attention", "full_attention"] and gemma2.num_hidden_layers == 2
    gemma3 = shrunk("gemma3_text")
    assert gemma3.layer_types == ["sliding_attention"] * 5 + ["full_attention"] and gemma3.num_hidden_layers == 6
    deepseek = shrunk("deepseek_v3")
    assert (deepseek.first_k_dense_replace, deepseek.num_hidden_layers) == (1, 3)  # one dense layer, two with experts
    assert shrunk("jamba").num_hidden_layers == 8  # attn_layer_period


def test_irregular_patterns_keep_a_layer_of_each_kind() -> None:
    types = ["full_attention"] * 5 + ["sliding_attention"] * 20 + ["full_attention"] * 3
    small = shrunk("qwen3", num_hidden_layers=28, layer_types=types)
    assert small.layer_types == ["full_attention", "sliding_attention", "sliding_attention"]
    assert small.num_hidden_layers == 3
    moe = shrunk("qwen2_moe", num_hidden_layers=24, mlp_only_layers=[3, 7])
    assert moe.num_hidden_layers == 3 and moe.mlp_only_layers == [2]


def test_vocabularies_keep_what_divides_them_and_hold_the_special_tokens() -> None:
    gpt2 = shrunk("gpt2")
    assert gpt2.vocab_size % 32 == 50257 % 32 and gpt2.vocab_size < 600
    assert gpt2.bos_token_id == gpt2.eos_token_id < gpt2.vocab_size
    llava = shrunk("llava")
    assert llava.image_token_index < llava.text_config.vocab_size % 10_000
    tokens = shrunk("bart")
    assert len({tokens.bos_token_id, tokens.pad_token_id, tokens.eos_token_id}) == 3


def test_experts_keep_groups_and_several_per_token() -> None:
    mixtral = shrunk("mixtral")
    assert (mixtral.num_local_experts, mixtral.num_experts_per_tok) == (8, 2)
    deepseek = shrunk("deepseek_v3")
    assert (deepseek.n_routed_experts, deepseek.n_group, deepseek.topk_group) == (16, 4, 2)
    assert deepseek.num_experts_per_tok == 2 and deepseek.n_shared_experts == 1
    assert deepseek.qk_head_dim == deepseek.qk_nope_head_dim + deepseek.qk_rope_head_dim


def test_grouped_matmuls_of_the_small_version_are_aligned_on_every_rank() -> None:
    """A grouped matmul wants rows of a multiple of 16 bytes, in the shares of 4 ranks too."""
    for model_type in ("mixtral", "deepseek_v3", "gpt_oss"):
        config = shrunk(model_type)
        width = getattr(config, "moe_intermediate_size", config.intermediate_size)
        assert config.hidden_size % 32 == 0 and width % 32 == 0, model_type
        source = source_from_config(default_config(model_type), small=True, batch=2, seq=8, dtype="bf16")
        with torch.no_grad():
            assert torch.isfinite(source.build()(**source.example_inputs).logits).all()


def test_the_published_llama_shrinks_with_its_rotary_scaling() -> None:
    source = load_source("examples/configs/llama-3.1-8b.json", small=True)
    config = source.config
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (16, 4, 8)
    assert config.hidden_size == 128 and config.rope_parameters["original_max_position_embeddings"] == 8192


def test_towers_of_different_width_still_fit_together() -> None:
    small = shrunk("clip")
    assert small.text_config.projection_dim == small.vision_config.projection_dim == small.projection_dim
    llava = shrunk("llava")
    paligemma = shrunk("paligemma")
    assert paligemma.vision_config.projection_dim == paligemma.text_config.hidden_size
    assert llava.text_config.num_hidden_layers == llava.vision_config.num_hidden_layers == 2


def test_the_full_configuration_is_not_touched() -> None:
    config = default_config("llava")
    before = config.to_dict()
    small_config(config)
    assert config.to_dict() == before
    assert [type(part).__name__ for part in configs_in(config)][0] == "LlavaConfig"


def test_shrinking_twice_changes_nothing() -> None:
    once = shrunk("deepseek_v3")
    assert small_config(once).to_dict() == once.to_dict()
