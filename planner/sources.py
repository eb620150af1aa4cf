"""SOURCE, the argument of every command: from a string to a model, its example inputs and a way to build it for real.

    model directory or config.json  ->  the class its ``architectures`` names, else the head class of its type
    hf:MODEL_TYPE                   ->  that type's default configuration and head class
    package.module:factory          ->  what ``factory()`` returns: (model, example_inputs)

Hugging Face models are built on the meta device from their configuration alone: no weight is read or allocated
(Llama 405B: 0.2 CPU s). ``Source.build`` makes the same model on the CPU, seeded, for checks that run it.
"""

from __future__ import annotations

import copy
import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from colrow.cost_models.errors import SourceError

from .configurations import default_config, first_line, read_config, refuse_quantised
from .example_inputs import Phase, example_inputs, runs, usable_seq
from .head_class import head_class
from .random_weights import randomize
from .shrink import KEEPS, configs_in, small_config

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
SEED = 0


@dataclass(frozen=True)
class Source:
    """A model to plan, with all that planning and checking it needs.

    Attributes:
        name: What to call it in a plan.
        model: The model; on the meta device when it comes from a configuration.
        example_inputs: Keyword arguments (or a tuple of positional ones) of one forward.
        build: Builds the model on the CPU, the same every time: a checkpoint's weights, a factory's own, or random ones
            (no norm is 1 and no bias 0, see ``randomize``) when there is only a configuration.
        config: The Hugging Face configuration the model was built from, or None.
        checkpoint: The directory with the weights, or None.
        context: Tokens already in the KV cache, in the decode phase.
        notes: What was changed in what was asked for, e.g. a sequence clipped to the model's positions.
    """

    name: str
    model: nn.Module
    example_inputs: dict[str, Any] | tuple[Any, ...]
    build: Callable[[], nn.Module]
    config: PreTrainedConfig | None = None
    checkpoint: Path | None = None
    context: int = 0
    notes: tuple[str, ...] = ()


def load_source(
    source: str,
    *,
    phase: Phase = "prefill",
    batch: int = 1,
    seq: int = 2048,
    context: int | None = None,
    dtype: str = "bf16",
    labels: bool = False,
    small: bool = False,
    trust_remote_code: bool = False,
) -> Source:
    """Read a SOURCE.

    Args:
        source: A model directory, a ``config.json``, ``hf:MODEL_TYPE`` or ``package.module:factory``.
        phase: What one forward is: the whole prompt, one token after ``context`` others, or a training step.
        batch: Sequences per forward.
        seq: Tokens per sequence; in decode, what ``context`` defaults to.
        context: Tokens already in the KV cache (decode only).
        dtype: Of the weights: bf16, fp16, fp32 or fp64.
        labels: Also pass labels where the model takes them, so that its loss is part of the forward.
        small: Build the small version of a Hugging Face model instead (see ``shrink``).
        trust_remote_code: Run the modelling code shipped in a model directory.

    Raises:
        SourceError: The source is missing, unreadable, quantised or not a model; each message says what to do.
    """
    notes: tuple[str, ...] = ()
    if dtype not in DTYPES:
        raise SourceError("--dtype", "unknown dtype", got=dtype, need=" | ".join(DTYPES))
    if source.startswith("hf:"):
        config = default_config(source.removeprefix("hf:"))
        name, checkpoint = source.removeprefix("hf:"), None
    elif _is_path(source):
        path = Path(source).expanduser()
        config = read_config(path, trust_remote_code=trust_remote_code)
        name = path.resolve().stem if path.is_file() and path.name != "config.json" else _folder_name(path)
        checkpoint = path if path.is_dir() and any(path.glob("*.safetensors")) else None
        if checkpoint is None and path.is_dir() and any(path.glob("pytorch_model*.bin")):
            notes = ("only pickled weights (pytorch_model*.bin) here: not read; save them as safetensors to run them",)
    elif ":" in source:
        if small:
            wrong = "only a Hugging Face configuration has a small version"
            raise SourceError(source, wrong, remedy="Let a factory make a small model.")
        return _from_factory(source, phase, context or 0)
    else:
        raise SourceError(
            f"SOURCE {source}",
            "no such file, directory or source",
            need="a model directory, a config.json, hf:MODEL_TYPE or package.module:factory",
            remedy="Models of the Hub are not downloaded: pass the directory they were downloaded to.",
        )
    loaded = source_from_config(
        config,
        name=name,
        phase=phase,
        batch=batch,
        seq=seq,
        context=context,
        dtype=dtype,
        labels=labels,
        small=small,
        checkpoint=checkpoint,
        trust_remote_code=trust_remote_code,
    )
    return replace(loaded, notes=loaded.notes + notes)


def source_from_config(
    config: PreTrainedConfig,
    *,
    name: str | None = None,
    model_class: type[PreTrainedModel] | None = None,
    phase: Phase = "prefill",
    batch: int = 1,
    seq: int = 2048,
    context: int | None = None,
    dtype: str = "bf16",
    labels: bool = False,
    small: bool = False,
    checkpoint: Path | None = None,
    trust_remote_code: bool = False,
) -> Source:
    """Build a Hugging Face model on meta from ``config``; arguments as in ``load_source``.

    Args:
        config: The configuration; not modified.
        name: What to call the model; its type if None.
        model_class: The class to build; None for the one ``config`` names, else the head class of its type.

    Raises:
        SourceError: The class cannot be found or built.
    """
    model_type = config.model_type
    cls = model_class or head_class(config, trust_remote_code=trust_remote_code)
    if cls.config_class is config.sub_configs.get("text_config"):
        config = config.get_text_config()  # registered for the whole type, but only the text half of it
    if small:
        return _first_that_runs(
            [
                partial(
                    source_from_config, small_config(config, keep=keep), name=name, model_class=cls, phase=phase,
                    batch=batch, seq=seq, context=context, dtype=dtype, labels=labels,
                )
                for keep in KEEPS
            ]
        )  # fmt: skip
    config = _without_cache(config)

    def construct() -> nn.Module:
        try:
            model: nn.Module = cls._from_config(_copy(config), dtype=DTYPES[dtype])  # type: ignore[no-untyped-call]
        except Exception as error:  # the configuration's own code: anything can come out of it
            raise SourceError(
                f"configuration of {model_type}",
                f"{cls.__name__} cannot be built from it: {type(error).__name__}: {first_line(error)}",
                remedy="Complete the configuration, or pass package.module:factory.",
            ) from error
        return _traceable(model, DTYPES[dtype]).train(phase == "train")

    def build() -> nn.Module:
        if checkpoint is not None:
            model = _load_weights(cls, _copy(config), checkpoint, DTYPES[dtype])
            return _traceable(model, DTYPES[dtype]).train(phase == "train")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            model = construct()
        randomize(model, SEED)
        return model

    from transformers.initialization import no_init_weights

    with torch.device("meta"), no_init_weights():
        model = construct()
    cast("PreTrainedModel", model).tie_weights()  # skipped with the initialisation
    length, notes = usable_seq(config, seq)
    inputs = example_inputs(model, phase=phase, batch=batch, seq=length, labels=labels)
    cached = 0 if phase != "decode" else length if context is None else context
    return Source(name or model_type, model, inputs, build, config, checkpoint, cached, notes)


def _first_that_runs(versions: list[Callable[[], Source]]) -> Source:
    """The first version that can be built and runs on its example inputs; the first of all where none does."""
    refused: SourceError | None = None
    first: Source | None = None
    for version in versions:
        try:
            made = version()
        except SourceError as error:
            refused = error  # of the version that is least changed
            continue
        first = first or made
        if runs(made.model, made.example_inputs):
            return made
    if first is None:
        assert refused is not None
        raise refused
    return first


def _load_weights(
    cls: type[PreTrainedModel], config: PreTrainedConfig, checkpoint: Path, dtype: torch.dtype
) -> nn.Module:
    """The model with the weights saved in a directory; transformers would make up those it does not find."""
    try:
        loaded: Any = cls.from_pretrained(str(checkpoint), config=config, dtype=dtype, output_loading_info=True)
    except Exception as error:  # a missing file, a truncated one, a tensor of another shape: each raises its own
        wrong = f"its weights cannot be loaded: {type(error).__name__}: {first_line(error)}"
        raise SourceError(str(checkpoint), wrong, remedy="Download or save the checkpoint again.") from error
    model: nn.Module = loaded[0]
    if missing := sorted(loaded[1]["missing_keys"]):
        raise SourceError(
            str(checkpoint),
            f"{len(missing)} tensors are missing from its weights",
            got=f"none for {missing[0]}",
            remedy="Download or save the checkpoint again.",
        )
    return model


def _from_factory(source: str, phase: Phase, context: int) -> Source:
    """Call ``package.module:factory`` with the current folder importable."""
    module_name, _, attribute = source.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # for good: the factory's module may import its neighbours later
    try:
        factory: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            factory = getattr(factory, part)
    except (ImportError, AttributeError, ValueError, SyntaxError) as error:
        raise SourceError(
            source,
            f"cannot be imported: {type(error).__name__}: {first_line(error)}",
            need="package.module:factory, importable from the current folder",
        ) from error
    if not callable(factory):
        raise SourceError(source, "not callable", got=type(factory).__name__, need="a factory function")

    def make() -> tuple[nn.Module, Any]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            try:
                made = factory()
            except Exception as error:
                wrong = f"the factory raised {type(error).__name__}: {first_line(error)}"
                raise SourceError(source, wrong, remedy="It is called without arguments.") from error
        match made:
            case (nn.Module() as model, dict() | tuple() | list() as inputs):
                refuse_quantised(source, getattr(model, "config", None))
                return model.train(phase == "train"), inputs if isinstance(inputs, dict) else tuple(inputs)
        raise SourceError(
            source,
            "the factory returned something else",
            got=f"({', '.join(type(m).__name__ for m in made)})" if isinstance(made, tuple) else type(made).__name__,
            need="(model, example_inputs), the inputs a dict of keyword arguments or a tuple",
        )

    def build() -> nn.Module:
        model, _ = make()
        on_meta = [name for name, parameter in model.named_parameters() if parameter.is_meta]
        if on_meta:
            raise SourceError(source, "its weights are on meta and cannot be run", got=on_meta[0])
        return model

    model, inputs = make()
    return Source(source, model, inputs, build, context=context if phase == "decode" else 0)


def _without_cache(config: PreTrainedConfig) -> PreTrainedConfig:
    """A copy of ``config`` whose models return no KV cache: it is not a tree of tensors that torch.export knows."""
    config = _copy(config)
    for part in configs_in(config):
        if hasattr(part, "use_cache"):
            part.use_cache = False
    return config


def _traceable(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Compute experts by a batched matmul where the default does not trace.

    The default is one grouped matmul, which knows bf16 only; the loop over the experts that were hit depends on data.
    """
    set_implementation: Any = getattr(model, "set_experts_implementation", None)
    if dtype is not torch.bfloat16 and set_implementation is not None:
        set_implementation("batched_mm")
    return model


def _copy(config: PreTrainedConfig) -> PreTrainedConfig:
    """A deep copy: building a model writes dtype and implementations into its configuration."""
    return copy.deepcopy(config)


def _is_path(source: str) -> bool:
    return Path(source).exists() or source.endswith(".json") or source.startswith((".", "/", "~"))


def _folder_name(path: Path) -> str:
    return (path if path.is_dir() else path.parent).resolve().name
