"""Other forms of example images and sounds, for models that take none of the usual ones.

Which form a model takes is often said by its code alone; whether it takes one is seen by running it on weights without
values (`example_inputs.runs`). Forms are tried in this order.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from .modalities import FEATURE_MASKS

IMAGES = ("pixel_values",)
SPECTROGRAMS = ("input_features", "audio_mel")
ENCODED = 8  # positions of another encoder's states
BINS = (128, 80, 64)  # of spectrograms whose configuration gives none


def other_forms(
    inputs: Mapping[str, Any], accepted: Mapping[str, Any], config: Any, dtype: torch.dtype
) -> Iterator[dict[str, Any]]:
    """``inputs`` with images and sounds in other forms, without sounds' masks, then with another encoder's states."""
    for name in IMAGES:
        if name in inputs:
            yield from ({**inputs, name: form} for form in image_forms(inputs[name]))
    unmasked = {name: value for name, value in inputs.items() if not re.search(FEATURE_MASKS, name)}
    if len(unmasked) < len(inputs):
        yield unmasked  # of features, where the usual mask is one of frames
    for name in SPECTROGRAMS:
        if name in inputs:
            yield from ({**inputs, name: form} for form in sound_forms(inputs[name]))
    if "encoder_hidden_states" in accepted and "encoder_hidden_states" not in inputs:
        batch = next(len(value) for value in inputs.values() if isinstance(value, torch.Tensor))
        width = getattr(config, "encoder_hidden_size", None) or getattr(config, "hidden_size", None)
        if isinstance(width, int):
            states = torch.randn(batch, ENCODED, width, generator=torch.Generator().manual_seed(0))
            yield {**inputs, "encoder_hidden_states": states.to(dtype)}


def image_forms(image: torch.Tensor) -> Iterator[torch.Tensor]:
    """``[batch, channels, height, width]`` as one, or two, of several images of each sequence."""
    if image.dim() == 4:
        yield image.unsqueeze(1)
        yield image.unsqueeze(1).expand(-1, 2, -1, -1, -1).contiguous()


def sound_forms(sound: torch.Tensor) -> Iterator[torch.Tensor]:
    """``[batch, frames, bins]`` with a channel, the other way round, and of other numbers of bins."""
    if sound.dim() != 3:
        return
    frames_first = sound if sound.shape[1] >= sound.shape[2] else sound.transpose(1, 2).contiguous()
    yield sound.unsqueeze(1)
    yield sound.transpose(1, 2).contiguous()
    for bins in BINS:
        if bins != frames_first.shape[2]:
            generator = torch.Generator().manual_seed(0)
            values = torch.randn(*frames_first.shape[:2], bins, generator=generator).to(sound.dtype)
            yield values
            yield values.transpose(1, 2).contiguous()
            yield values.unsqueeze(1)
