"""What default configurations leave open is filled in, by field name, and only that."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import LlamaConfig

from colrow.planner.completed_defaults import complete
from colrow.planner.configurations import default_config


def default(model_type: str) -> Any:
    return default_config(model_type)


def test_rotary_sections_are_as_long_as_the_pairs_of_a_head() -> None:
    text = default("glm4v_text")
    pairs = text.hidden_size // text.num_attention_heads // 2
    assert sum(text.rope_parameters["mrope_section"]) == pairs


def test_a_table_for_each_type_of_layer() -> None:
    text = default("cohere_compass_text")
    assert set(text.rope_parameters) == set(text.layer_types)
    assert all(sum(t["mrope_section"]) == text.head_dim // 2 for t in text.rope_parameters.values())


def test_heads_of_an_image_divide_its_width() -> None:
    vision = default("aya_vision").vision_config
    assert vision.hidden_size % vision.num_attention_heads == 0


def test_all_layers_but_the_first_are_sparse() -> None:
    text = default("deepseek_ocr2_text")
    assert text.mlp_layer_types == ["dense"] + ["sparse"] * (text.num_hidden_layers - 1)


@pytest.mark.parametrize("name", ["num_experts", "top_k_experts", "moe_intermediate_size"])
def test_experts_behind_a_switch_stay_off(name: str) -> None:
    assert getattr(default("gemma4_text"), name) is None
    assert getattr(default("diffusion_gemma_text"), name) is not None


def test_what_is_set_stays() -> None:
    config = LlamaConfig(num_attention_heads=4, hidden_size=64)
    before = config.to_dict()
    complete(config)
    assert config.to_dict() == before


@pytest.mark.parametrize("model_type", ["qwen3_vl", "qwen2_5_vl"])
def test_images_are_as_wide_as_the_text_they_are_written_into(model_type: str) -> None:
    config = default(model_type)
    assert config.vision_config.out_hidden_size == config.text_config.hidden_size


def test_a_projector_reads_what_its_encoder_makes() -> None:
    config = default("granite_speech")
    assert config.projector_config.encoder_hidden_size == config.encoder_config.hidden_dim
