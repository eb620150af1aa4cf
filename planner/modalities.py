"""Images and sounds for a Hugging Face model, in the form that its first layer reads.

pixel_values                       [batch, channels, height, width]
pixel_values + grid_thw            [patches of all images, values of a patch], and time, height, width of each image
pixel_values + spatial_shapes      [batch, patches, values of a patch], and height, width of each
pixel_values + position ids        [batch, patches, values of a patch], and column, row of each patch
input_features                     [batch, bins, frames] before a Conv1d, else [batch, frames, bins]
input_values                       [batch, samples], or [batch, channels, samples] where documented so
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .documented_inputs import documented_arguments

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# Sub-configurations by what they read; those of encoder-decoders' two halves are text.
TEXT_PARTS = ("text_config", "llm_config", "language_config", "thinker_config")
IMAGE_PARTS = ("vision_config", "image_config", "vision_model_config", "encoder", "backbone_config")
AUDIO_PARTS = ("audio_config", "audio_encoder_config", "speech_config", "encoder_config")
GRIDS = ("image_grid_thw", "grid_thw", "image_grid_hws")
POSITIONS = ("pixel_position_ids", "image_position_ids")
FEATURE_MASKS = r"^(input_)?features?_(attention_)?mask$|^audio_(mel_)?mask$"
SIDE = 4  # patches per side of an image whose size is free, in units of what is merged into one
FRAMES, SAMPLES = 256, 16000
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def image_inputs(
    model: nn.Module, accepted: Mapping[str, Any], batch: int, dtype: torch.dtype, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """One image per sequence, by argument name; none where the model takes none."""
    config: Any = model.config
    vision = part_of(config, IMAGE_PARTS)
    grid = next((name for name in GRIDS if name in accepted), None)
    pixels = "pixel_values" if "pixel_values" in accepted else "hidden_states"
    if pixels not in accepted or (pixels == "hidden_states" and grid is None) or _is_without(config, "vision_config"):
        return {}

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    side = SIDE * int(getattr(vision, "spatial_merge_size", None) or 1)
    first = first_layer(model, r"vis|image|patch")
    if grid is not None:
        size = [1, side, side] if grid.endswith("thw") else [side, side]
        return {pixels: noise(batch * side * side, _patch_values(vision, first)), grid: torch.tensor([size] * batch)}
    positions = next((name for name in POSITIONS if name in accepted), None)
    if positions is not None or "spatial_shapes" in accepted:
        inputs = {pixels: noise(batch, side * side, _patch_values(vision, first))}
        if positions is not None:
            places = torch.cartesian_prod(torch.arange(side), torch.arange(side)).flip(1)
            inputs[positions] = places.expand(batch, -1, -1).clone()
        if "spatial_shapes" in accepted:
            inputs["spatial_shapes"] = torch.tensor([[side, side]] * batch)
        if "pixel_attention_mask" in accepted:
            inputs["pixel_attention_mask"] = torch.ones(batch, side * side, dtype=torch.long)
        return inputs
    shape = _image_shape(config, first)
    if isinstance(first, nn.Linear) and first.in_features == _patch_values(vision, None):
        return {pixels: noise(batch, SIDE * SIDE, first.in_features)}
    return {pixels: noise(batch, *shape)}


def audio_inputs(
    model: nn.Module, accepted: Mapping[str, Any], batch: int, dtype: torch.dtype, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """One sound per sequence, by argument name; none where the model takes none."""
    config: Any = model.config
    inputs: dict[str, torch.Tensor] = {}
    if _is_without(config, "audio_config"):
        return inputs

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(batch, *shape, generator=generator).to(dtype)

    spectrogram = next((name for name in ("input_features", "audio_mel") if name in accepted), None)
    if spectrogram is not None:
        shape, frames = _spectrogram_shape(model, config)
        inputs[spectrogram] = noise(*shape)
        inputs |= {
            name: torch.ones(batch, frames, dtype=torch.bool if name.startswith("audio") else torch.long)
            for name in accepted
            if re.search(FEATURE_MASKS, name)
        }
    if "input_values" in accepted:
        inputs["input_values"] = noise(*_audio_shape(model, config))
    return inputs


def _is_without(config: Any, part: str) -> bool:
    """Whether a model that may have such a part was configured to have none."""
    return part in getattr(config, "sub_configs", ()) and getattr(config, part, None) is None


def part_of(config: Any, names: tuple[str, ...]) -> Any:
    """The first sub-configuration of these names, at any depth, or the configuration itself."""
    return _part_in(config, names) or config


def _part_in(config: Any, names: tuple[str, ...]) -> Any:
    own = (getattr(config, name, None) for name in names)
    inner = (getattr(config, name, None) for name in getattr(config, "sub_configs", ()))
    direct = next((part for part in own if hasattr(part, "to_dict")), None)
    return direct or next((part for sub in inner if sub is not None and (part := _part_in(sub, names))), None)


def first_layer(model: nn.Module, pattern: str) -> nn.Module | None:
    """The first layer of the outermost part whose path matches ``pattern``, or of the whole model."""
    found = [
        module for path, module in model.named_modules() if isinstance(module, LAYERS) and re.search(pattern, path)
    ]
    return next(iter(found or [module for module in model.modules() if isinstance(module, LAYERS)]), None)


def first_layer_reads(model: nn.Module, batch: int, seq: int, side: int) -> tuple[int, ...] | None:
    """Shape of an input that the first layer of a model would take: features of a sequence, or an image."""
    match first_layer(model, r""):
        case nn.Linear(in_features=width):
            return batch, seq, width
        case nn.Conv1d(in_channels=width):
            return batch, seq, width
        case nn.Conv2d(in_channels=channels):
            return batch, channels, side, side
    return None


def _patch_values(vision: Any, first: nn.Module | None) -> int:
    """Values of one patch: what the first layer reads of it."""
    if isinstance(first, nn.Linear):
        return first.in_features
    if isinstance(first, nn.Conv2d | nn.Conv3d):
        return first.weight.shape[1:].numel()
    size = int(getattr(vision, "patch_size", None) or 16)
    return int(getattr(vision, "num_channels", None) or 3) * size * size


def _image_shape(config: PreTrainedConfig, first: nn.Module | None) -> tuple[int, int, int]:
    """Channels, height and width of one image."""
    vision = part_of(config, IMAGE_PARTS)
    size = getattr(vision, "image_size", None) or getattr(config, "image_size", None) or 224
    height, width = (size, size) if isinstance(size, int) else (size[0], size[-1])
    channels = first.in_channels if isinstance(first, nn.Conv2d) and first.in_channels <= 4 else None
    return channels or int(getattr(vision, "num_channels", None) or 3), height, width


def _spectrogram_shape(model: nn.Module, config: PreTrainedConfig) -> tuple[tuple[int, int], int]:
    """Bins and frames in the order that the first layer wants, and the frames.

    An encoder with a fixed number of positions halves its frames by convolution first.
    """
    audio = part_of(config, AUDIO_PARTS)
    names = ("num_mel_bins", "feature_size", "n_mels", "input_feat_size", "input_size", "input_dim")
    bins = next((n for name in names if type(n := getattr(audio, name, None)) is int), 80)
    positions = getattr(audio, "max_source_positions", None)
    frames = 2 * positions if isinstance(positions, int) else FRAMES
    first = first_layer(model, r"audio|speech|sound|encoder")
    if isinstance(first, nn.Conv1d):
        return (first.in_channels * first.groups if first.groups == 1 else bins, frames), frames
    if isinstance(first, nn.Linear) and positions is None:
        return (frames, first.in_features), frames
    return ((bins, frames) if isinstance(positions, int) else (frames, bins)), frames


def _audio_shape(model: nn.Module, config: PreTrainedConfig) -> tuple[int, ...]:
    """Samples of raw audio, with channels where they are documented, or frames and mel bins where there are both."""
    audio = part_of(config, AUDIO_PARTS)
    frames, bins = getattr(audio, "max_length", None), getattr(audio, "num_mel_bins", None)
    if isinstance(frames, int) and isinstance(bins, int):
        return frames, bins
    described = documented_arguments(model.forward).get("input_values")
    first = first_layer(model, r"enc")
    if described is not None and len(described.dims) == 3 and isinstance(first, nn.Conv1d):
        return first.in_channels, SAMPLES
    return (SAMPLES,)
