"""Images and sounds in the form that a model's own code takes, where no name or field says which."""

from __future__ import annotations

import pytest
import torch

from colrow.planner.input_forms import image_forms, other_forms, sound_forms
from colrow.planner.sources import load_source


@pytest.mark.parametrize(
    ("source", "name", "dims"),
    [
        ("hf:clap_audio_model", "input_features", 4),
        ("hf:efficientloftr", "pixel_values", 5),
        ("hf:granite_speech_encoder", "hidden_states", 3),
        ("hf:blip_2_qformer", "encoder_hidden_states", 3),
    ],
)
def test_a_form_that_the_model_takes(source: str, name: str, dims: int) -> None:
    loaded = load_source(source, phase="train", batch=2, seq=16, dtype="fp64", small=True)
    assert isinstance(loaded.example_inputs, dict)
    given = loaded.example_inputs[name]
    assert given.dim() == dims and given.dtype is torch.float64
    model = loaded.build().eval()
    with torch.no_grad():
        model(**loaded.example_inputs)


def test_forms_are_of_one_batch_and_dtype() -> None:
    sound, image = torch.zeros(2, 256, 80, dtype=torch.float64), torch.zeros(2, 3, 8, 8)
    assert {(len(form), form.dtype) for form in sound_forms(sound)} == {(2, torch.float64)}
    assert [form.shape for form in image_forms(image)] == [(2, 1, 3, 8, 8), (2, 2, 3, 8, 8)]
    assert {form.shape[-1] for form in sound_forms(sound)} >= {80, 128, 64, 256}


def test_other_arguments_stay() -> None:
    inputs = {"pixel_values": torch.zeros(2, 3, 8, 8), "input_ids": torch.zeros(2, 4, dtype=torch.long)}
    for form in other_forms(inputs, {}, object(), torch.float32):
        assert form["input_ids"] is inputs["input_ids"]
