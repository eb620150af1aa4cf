"""Example inputs for a Hugging Face model, from its forward's signature and its configuration.

No model is known by name: each rule below reads argument names, ``main_input_name`` and configuration fields that many
models share. Inputs are real CPU tensors, since what prepares them inside a model may depend on their values.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.utils.stateless
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._pytree import tree_map_only

from colrow.cost_models.errors import SourceError

from .configurations import first_line
from .documented_inputs import documented_arguments, documented_tensor
from .input_forms import image_forms, other_forms, sound_forms
from .known_values import KnownValues, unchecked_values
from .modalities import IMAGE_PARTS, TEXT_PARTS, audio_inputs, first_layer_reads, image_inputs
from .modalities import part_of as _part

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Phase = Literal["prefill", "decode", "train"]
LARGEST = 4e9  # bytes of weights that are made up to see how many features an image has


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
        if not cached:
            inputs.update(image_inputs(model, accepted, batch, dtype, generator))
        inputs.update(audio_inputs(model, accepted, batch, dtype, generator))
    if phase != "decode" and "input_ids" in inputs:
        for kind, source in (("image", "pixel_values"), ("audio", "input_features")):
            if source in inputs:
                inputs |= _with_tokens_of(kind, source, model, config, inputs)
    if "mm_token_type_ids" in accepted and "pixel_values" in inputs:
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == getattr(config, "image_token_id", -1)).to(torch.int)
    if "input_ids" in inputs and "attention_mask" in accepted:
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if "decoder_input_ids" in accepted:
        inputs["decoder_input_ids"] = ids(min(tokens, _positions(config, "max_target_positions", tokens)))
    if "bbox" in accepted and "input_ids" in inputs:
        inputs["bbox"] = torch.zeros(*inputs["input_ids"].shape, 4, dtype=torch.long)
    inputs.update(_documented(model, config, inputs, {"batch": batch, "seq": tokens}, dtype, generator))
    if phase == "prefill" and "logits_to_keep" in accepted and not labels:  # a loss wants every token's logits
        inputs["logits_to_keep"] = 1
    if labels and "labels" in accepted:
        inputs["labels"] = _labels(model, config, inputs)
    elif labels and "return_loss" in accepted:  # contrastive models: the batch is its own label
        inputs["return_loss"] = True
    return _taken(model, inputs, dtype)


def _taken(model: nn.Module, inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """``inputs``, or where the model does not take their images or sounds, the first other form that it takes."""
    floating = any(isinstance(value, torch.Tensor) and value.is_floating_point() for value in inputs.values())
    if not floating or runs(model, inputs):
        return inputs
    accepted = inspect.signature(model.forward).parameters
    forms = other_forms(inputs, accepted, model.config, dtype)
    return next((form for form in forms if runs(model, form)), inputs)


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


def _with_tokens_of(
    kind: str, source: str, model: Any, config: PreTrainedConfig, inputs: dict[str, Any]
) -> dict[str, torch.Tensor]:
    """Ids [batch, positions + tokens] where a model writes features of an image or sound over that kind's own token.

    How many positions they take is what the model's features say, computed on fake weights; a model of several images
    per sequence gets one of them. A model that keeps them and text apart gets its ids back.
    """
    ids: torch.Tensor = inputs["input_ids"]
    token = getattr(config, f"{kind}_token_id", None)
    features = getattr(model, f"get_{kind}_features", None)
    if type(token) is not int or features is None:
        return {}
    accepted = {source, *inspect.signature(features).parameters}
    given = {name: value for name, value in inputs.items() if name in accepted}
    refused: Exception | None = None
    forms = image_forms if kind == "image" else sound_forms
    for values in (inputs[source], *forms(inputs[source])):
        try:
            taken = _positions_taken(_features(model, features, {**given, source: values})) // len(ids)
        except Exception as error:  # the model's own code, given inputs that are a guess
            refused = refused or error
            continue
        return {source: values, "input_ids": torch.cat([torch.full((len(ids), taken), token), ids], dim=1)}
    assert refused is not None
    raise SourceError(
        f"example inputs of {type(model).__name__}",
        f"its {kind} features cannot be computed from these inputs: {type(refused).__name__}: {first_line(refused)}",
        remedy="Pass package.module:factory, which returns the model with inputs of your own.",
    ) from refused


def _features(model: nn.Module, function: Any, given: dict[str, Any]) -> Any:
    """``function(**given)`` on weights without values, or where it branches on values, on random ones."""
    try:
        return _on_fake_weights(model, function, given)
    except (DataDependentOutputException, DynamicOutputShapeException):
        if sum(p.numel() * p.element_size() for p in model.parameters()) > LARGEST:
            raise
        state = {
            name: torch.randn(value.shape).to(value.dtype) * 0.02
            if value.is_floating_point()
            else torch.zeros(value.shape, dtype=value.dtype)
            for values in (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
            for name, value in values
            if value.is_meta
        }
        with (
            torch.no_grad(),
            torch.random.fork_rng(devices=[]),
            torch.nn.utils.stateless._reparametrize_module(model, state),
        ):
            return function(**given)


def _positions_taken(features: Any) -> int:
    """Feature vectors that all images or sounds together became."""
    vectors = getattr(features, "pooler_output", features)
    vectors = list(vectors) if isinstance(vectors, list | tuple) else [vectors]
    return sum(part.shape[:-1].numel() for part in vectors)


def runs(model: nn.Module, inputs: dict[str, Any] | tuple[Any, ...]) -> bool:
    """Whether the model takes these inputs, as far as that can be seen without the values of its weights."""
    try:
        if isinstance(inputs, dict):
            _on_fake_weights(model, model, inputs)
    except (DataDependentOutputException, DynamicOutputShapeException):
        return True  # it took them that far
    except Exception:  # the model's own code
        return False
    return True


def _on_fake_weights(model: nn.Module, function: Any, inputs: dict[str, Any]) -> Any:
    """``function(**inputs)``, a method of ``model``, on weights without values; integers keep theirs."""

    def fake(value: torch.Tensor) -> torch.Tensor:
        return torch.empty(value.shape, dtype=value.dtype, device="cpu")

    with (
        _quiet(),
        FakeTensorMode(allow_non_fake_inputs=True),
        torch.no_grad(),
        unchecked_values(),
        KnownValues(),
    ):
        given = tree_map_only(torch.Tensor, lambda v: fake(v) if v.is_floating_point() else v, inputs)
        state = {
            name: fake(value)
            for values in (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
            for name, value in values
        }
        with torch.nn.utils.stateless._reparametrize_module(model, state):
            return function(**given)


@contextmanager
def _quiet() -> Iterator[None]:
    """What a model refuses is an answer here, and no error of anybody's to be printed."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


def _documented(
    model: nn.Module,
    config: PreTrainedConfig,
    inputs: dict[str, Any],
    lengths: dict[str, int],
    dtype: torch.dtype,
    generator: torch.Generator,
) -> dict[str, torch.Tensor]:
    """What is required beside ``inputs``, by its documented shape; without other inputs, all that is not optional, or
    a model's only argument by what its first layer reads."""
    documented = documented_arguments(model.forward)
    accepted = inspect.signature(model.forward).parameters
    side = _part(config, IMAGE_PARTS)
    lengths = lengths | {"image": int(getattr(side, "image_size", 0) or 32) if _is_number(side) else 32}
    made = {
        name: documented_tensor(documented[name], [config, _part(config, TEXT_PARTS)], lengths, dtype, generator)
        for name, argument in accepted.items()
        if name not in inputs
        and name in documented
        and (argument.default is inspect.Parameter.empty or (not inputs and not documented[name].optional))
    }
    open_ = [
        name
        for name, argument in accepted.items()
        if argument.default is inspect.Parameter.empty
        and argument.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
        and name not in {*inputs, *made}
    ]
    if len(open_) == 1 and not inputs and not made:
        shape = first_layer_reads(model, lengths["batch"], lengths["seq"], lengths["image"])
        return {open_[0]: torch.randn(shape, generator=generator).to(dtype)} if shape else {}
    return made


def _is_number(part: Any) -> bool:
    return isinstance(getattr(part, "image_size", None), int)


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
