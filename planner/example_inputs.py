"""Example inputs for a Hugging Face model, from its forward's signature and its configuration.

No model is known by name: each rule below reads argument names, ``main_input_name`` and configuration fields that many
models share. Inputs are real CPU tensors, since what prepares them inside a model may depend on their values.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from colrow.cost_models.errors import SourceError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Phase = Literal["prefill", "decode", "train"]

# Sub-configurations by what they read; those of encoder-decoders' two halves are text.
TEXT_PARTS = ("text_config", "llm_config", "language_config", "thinker_config")
IMAGE_PARTS = ("vision_config", "image_config", "vision_model_config", "encoder")
AUDIO_PARTS = ("audio_config", "audio_encoder_config", "speech_config", "encoder_config")


def example_inputs(
    model: nn.Module,
    *,
    phase: Phase = "prefill",
    batch: int = 1,
    seq: int = 2048,
    labels: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """Keyword arguments of one forward of ``model``.

    Prefill asks for the last token's logits only, where the model can give them (``logits_to_keep``). In decode each
    sequence has one token; what is in the cache is not an input here. An encoder-decoder decodes from given encoder
    outputs.

    Args:
        model: A Hugging Face model; its weights are not read and may be on meta.
        phase: See ``load_source``.
        batch: Sequences per forward.
        seq: Tokens per sequence, already within what the model's positions allow (``usable_seq``).
        labels: Also pass ``labels``, so that the forward computes the model's own loss.
        seed: Seeds the token ids and features.

    Returns:
        ``input_ids [batch, seq]`` and the like by argument name, on the CPU; features in the model's dtype.
    """
    config: PreTrainedConfig = model.config  # type: ignore[assignment]  # nn.Module.__getattr__ promises a tensor or module
    accepted = inspect.signature(model.forward).parameters
    main = str(getattr(model, "main_input_name", "input_ids"))
    generator = torch.Generator().manual_seed(seed)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    tokens = 1 if phase == "decode" else seq

    def ids(length: int) -> torch.Tensor:
        return _token_ids(config, batch, length, generator)

    def features(*shape: int) -> torch.Tensor:
        return torch.randn(batch, *shape, generator=generator).to(dtype)

    inputs: dict[str, Any] = {}
    if config.is_encoder_decoder and phase == "decode" and "encoder_outputs" in accepted:
        inputs["encoder_outputs"] = (features(_source_length(config, seq, main), _encoder_width(config)),)
    else:
        required = "input_ids" in accepted and accepted["input_ids"].default is inspect.Parameter.empty
        if required or ("input_ids" in accepted and (main == "input_ids" or "decoder_input_ids" not in accepted)):
            inputs["input_ids"] = ids(tokens)
        # What generates text has seen the image by the time it decodes: its features are in the cache.
        cached = phase == "decode" and main == "input_ids" and bool(getattr(model, "can_generate", bool)())
        if "pixel_values" in accepted and not cached:
            inputs["pixel_values"] = features(*_image_shape(config))
        if "input_features" in accepted:
            inputs["input_features"] = features(*_spectrogram_shape(config))
        if "input_values" in accepted:
            inputs["input_values"] = features(*_audio_shape(config))
    if phase != "decode" and "input_ids" in inputs and "pixel_values" in inputs:
        inputs["input_ids"] = _with_image_tokens(model, config, inputs["input_ids"], inputs["pixel_values"])
    if "input_ids" in inputs and "attention_mask" in accepted:
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if "decoder_input_ids" in accepted:
        inputs["decoder_input_ids"] = ids(min(tokens, _positions(config, "max_target_positions", tokens)))
    if "bbox" in accepted and "input_ids" in inputs:
        inputs["bbox"] = torch.zeros(*inputs["input_ids"].shape, 4, dtype=torch.long)
    if phase == "prefill" and "logits_to_keep" in accepted and not labels:  # a loss wants every token's logits
        inputs["logits_to_keep"] = 1
    if labels and "labels" in accepted:
        inputs["labels"] = _labels(model, config, inputs)
    elif labels and "return_loss" in accepted:  # contrastive models: the batch is its own label
        inputs["return_loss"] = True
    return inputs


def usable_seq(config: PreTrainedConfig, seq: int) -> tuple[int, tuple[str, ...]]:
    """The longest sequence up to ``seq`` that the model has positions for, and a note if that is shorter."""
    text = _part(config, TEXT_PARTS)
    fields = ("max_position_embeddings", "n_positions", "max_source_positions", "max_text_len")
    limit = next((value for name in fields if isinstance(value := getattr(text, name, None), int) and value > 0), seq)
    if limit >= seq:
        return seq, ()
    return limit, (f"sequence clipped from {seq} to {limit}, the positions this model has",)


def _token_ids(config: PreTrainedConfig, batch: int, length: int, generator: torch.Generator) -> torch.Tensor:
    """Random ids [batch, length] with no special token among them: padding or an image token would change the graph."""
    text = _part(config, TEXT_PARTS)
    vocab = int(getattr(text, "vocab_size", None) or getattr(config, "vocab_size", None) or 100)
    special: set[int | None] = set()
    for part in (config, text):
        for name, value in vars(part).items():
            if name.endswith(("_token_id", "_token_index")):
                special.update(value if isinstance(value, list | tuple) else [value])
    plain = torch.tensor([i for i in range(min(vocab, 4096)) if i not in special] or [0])
    return plain[torch.randint(len(plain), (batch, length), generator=generator)]


def _with_image_tokens(model: Any, config: PreTrainedConfig, ids: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    """Ids [batch, positions of one image + tokens] where a model writes image features over the image's own token.

    How many positions an image takes is what the model's image features say, computed where the weights are (on meta
    for free). A model that keeps images and text apart gets its ids back.
    """
    token = getattr(config, "image_token_id", None)
    if type(token) is not int or not hasattr(model, "get_image_features"):
        return ids
    device = next(model.parameters()).device
    try:
        with torch.no_grad():
            features = model.get_image_features(pixel_values=pixels.to(device))
        images = getattr(features, "pooler_output", features)
        taken = images[0].shape[-2] if images[0].dim() > 1 else 1
    except Exception as error:  # the model's own code, given inputs that are a guess
        raise SourceError(
            f"example inputs of {type(model).__name__}",
            f"its image features cannot be computed from pixel_values alone: {type(error).__name__}: {error}",
            remedy="Pass package.module:factory, which returns the model with inputs of your own.",
        ) from error
    return torch.cat([torch.full((len(ids), taken), token), ids], dim=1)


def _image_shape(config: PreTrainedConfig) -> tuple[int, int, int]:
    """Channels, height and width of one image."""
    vision = _part(config, IMAGE_PARTS)
    size = getattr(vision, "image_size", None) or getattr(config, "image_size", None) or 224
    height, width = (size, size) if isinstance(size, int) else (size[0], size[-1])
    return int(getattr(vision, "num_channels", None) or 3), height, width


def _spectrogram_shape(config: PreTrainedConfig) -> tuple[int, int]:
    """Mel bins and frames; an encoder with a fixed number of positions halves its frames by convolution first."""
    audio = _part(config, AUDIO_PARTS)
    bins = int(getattr(audio, "num_mel_bins", None) or getattr(audio, "feature_size", None) or 80)
    positions = getattr(audio, "max_source_positions", None)
    return bins, 2 * positions if isinstance(positions, int) else 256


def _audio_shape(config: PreTrainedConfig) -> tuple[int, ...]:
    """Samples of raw audio, or frames and mel bins where the configuration speaks of both."""
    audio = _part(config, AUDIO_PARTS)
    frames, bins = getattr(audio, "max_length", None), getattr(audio, "num_mel_bins", None)
    return (frames, bins) if isinstance(frames, int) and isinstance(bins, int) else (16000,)


def _source_length(config: PreTrainedConfig, seq: int, main: str) -> int:
    """Positions of an encoder's output."""
    return seq if main == "input_ids" else _positions(config, "max_source_positions", seq)


def _encoder_width(config: PreTrainedConfig) -> int:
    encoder: Any = getattr(config, "encoder", None) or config
    return int(getattr(encoder, "hidden_size", None) or encoder.d_model)


def _positions(config: PreTrainedConfig, name: str, default: int) -> int:
    value = getattr(config, name, None)
    return value if isinstance(value, int) else default


def _labels(model: nn.Module, config: PreTrainedConfig, inputs: dict[str, Any]) -> torch.Tensor:
    """Labels: a token per position for language models, else one class per example."""
    text: torch.Tensor | None = inputs.get("decoder_input_ids", inputs.get("input_ids"))
    if text is not None and any(word in type(model).__name__ for word in ("LM", "Generation", "Token", "PreTraining")):
        return text.clone()
    batch = next(iter(inputs.values())).shape[0]
    return torch.arange(batch) % max(1, int(getattr(config, "num_labels", 1)))


def _part(config: PreTrainedConfig, names: tuple[str, ...]) -> Any:
    """The first sub-configuration of these names, or the configuration itself."""
    return next((part for name in names if hasattr(part := getattr(config, name, None), "to_dict")), config)
