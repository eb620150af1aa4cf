"""Example inputs of models that read images, sounds or what only their docstrings describe."""

from __future__ import annotations

import pytest
import torch

from colrow.planner.configurations import default_config
from colrow.planner.documented_inputs import documented_arguments, documented_tensor
from colrow.planner.example_inputs import runs
from colrow.planner.sources import Source, load_source


def small(model_type: str) -> Source:
    pytest.importorskip("transformers")
    return load_source(f"hf:{model_type}", small=True, batch=2, seq=8, dtype="fp32")


def shapes(source: Source) -> dict[str, tuple[int, ...]]:
    inputs = source.example_inputs
    assert isinstance(inputs, dict)
    return {name: tuple(value.shape) for name, value in inputs.items() if isinstance(value, torch.Tensor)}


@pytest.mark.parametrize(
    ("model_type", "name", "shape"),
    [
        ("exaone4_5_vision", "grid_thw", (2, 3)),  # sizes of images whose patches lie in one sequence
        ("gemma4_vision", "pixel_position_ids", (2, 16, 2)),  # where each patch is
        ("dac", "input_values", (2, 1, 16000)),  # a channel, because the first layer is documented to read one
        ("canary", "input_features", (2, 256, 128)),  # frames first before an image-like convolution
        ("whisper", "input_ids", (2, 8)),
        ("decision_transformer", "actions", (2, 8, 4)),  # by its docstring alone
        ("fuyu", "pixel_values", (2, 16, 2700)),  # patches, because a Linear of a patch's size reads them
    ],
)
def test_inputs_have_the_form_that_the_model_reads(model_type: str, name: str, shape: tuple[int, ...]) -> None:
    source = small(model_type)
    assert shapes(source)[name] == shape
    assert runs(source.model, source.example_inputs)


@pytest.mark.parametrize(("model_type", "token"), [("voxtral", "audio_token_id"), ("llava", "image_token_id")])
def test_tokens_stand_for_images_and_sounds(model_type: str, token: str) -> None:
    source = small(model_type)
    assert isinstance(source.example_inputs, dict) and source.config is not None
    ids = source.example_inputs["input_ids"]
    counted = (ids == getattr(source.config, token)).sum(1)
    assert counted[0] == counted[1] == ids.shape[1] - 8 > 0
    assert runs(source.model, source.example_inputs)


def test_wrong_inputs_do_not_run() -> None:
    source = small("vit")
    assert not runs(source.model, {"pixel_values": torch.zeros(2, 7, 64, 64)})


def test_open_fields_of_default_configurations_are_completed() -> None:
    pytest.importorskip("transformers")
    config = default_config("deepseek_v2")
    assert config.num_experts_per_tok == 2
    assert default_config("llama").vocab_size == 32000


def test_a_small_version_keeps_what_the_code_knows_by_itself() -> None:
    config = small("qwen2_5_vl").config  # its rotary sections are 16 + 24 + 24 wherever none are given
    assert config is not None
    text = config.get_text_config()
    assert text.hidden_size // text.num_attention_heads == 128


def test_docstrings_tell_shapes_dtypes_and_what_is_optional() -> None:
    def forward() -> None:
        """Runs.

        Args:
            states (`torch.FloatTensor` of shape `(batch_size, episode_length, state_dim)`):
                The states.
            mask (`torch.BoolTensor` of shape `(batch_size, 3)`, *optional*):
                Where they count.
        """

    class Config:
        state_dim = 5

    found = documented_arguments(forward)
    assert found["states"].dims == ("batch_size", "episode_length", "state_dim") and not found["states"].optional
    assert found["mask"].optional
    lengths, generator = {"batch": 2, "seq": 7, "image": 9}, torch.Generator()
    made = documented_tensor(found["states"], [Config()], lengths, torch.float64, generator)
    assert made.shape == (2, 7, 5) and made.dtype is torch.float64
    assert documented_tensor(found["mask"], [], lengths, torch.float64, generator).dtype is torch.bool


def test_a_model_configured_without_a_tower_gets_no_images() -> None:
    loaded = load_source("hf:gemma4", phase="train", batch=2, seq=16, dtype="fp64", small=True)
    assert loaded.config is not None and loaded.config.vision_config is None  # its default
    assert "pixel_values" not in loaded.example_inputs and "input_ids" in loaded.example_inputs
