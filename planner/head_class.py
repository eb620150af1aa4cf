"""Which class of a Hugging Face model type gets planned.

The *head class* of a type is the first that exists of AutoModelForCausalLM, ForSeq2SeqLM, ForConditionalGeneration /
ImageTextToText, SpeechSeq2Seq, MaskedLM, any other AutoModelFor*, AutoModel, else the first public ``PreTrainedModel``
with that configuration class. A configuration that names its own architecture is taken at its word.
"""

from __future__ import annotations

import importlib
import inspect
from typing import TYPE_CHECKING, Any, cast

from colrow.cost_models.errors import SourceError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

PREFERRED = (
    "AutoModelForCausalLM",
    "AutoModelForSeq2SeqLM",
    "AutoModelForMultimodalLM",  # what *ForConditionalGeneration classes of several modalities are registered under
    "AutoModelForImageTextToText",
    "AutoModelForSpeechSeq2Seq",
    "AutoModelForMaskedLM",
)


def head_class(config: PreTrainedConfig, *, trust_remote_code: bool = False) -> type[PreTrainedModel]:
    """Return the class to build for ``config``.

    Raises:
        SourceError: No model has this configuration (it is a part of another's), or its class needs a missing package.
    """
    where = f"model type {config.model_type}"
    try:
        cls = (
            (_remote(config) if trust_remote_code else None)
            or _named(config)
            or _registered(config)
            or _by_config_class(config)
        )
    except (ImportError, RuntimeError) as error:
        wrong = f"its class cannot be imported: {str(error).strip().splitlines()[0]}"
        raise SourceError(where, wrong, remedy="Install what the message names.") from error
    if cls is None:
        raise SourceError(
            where,
            "no model has this configuration",
            got=type(config).__name__,
            need="a configuration of a whole model",
            remedy="It configures a part of another type: plan that type.",
        )
    return cls


def _auto_classes() -> list[Any]:
    """Every auto class, in the order of the definition."""
    from transformers.models.auto import modeling_auto

    rest = [name for name in vars(modeling_auto) if name.startswith("AutoModelFor") and name not in PREFERRED]
    return [getattr(modeling_auto, name) for name in (*PREFERRED, *rest, "AutoModel")]


def _remote(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """The class in the model directory's own code, where it ships some."""
    code: dict[str, str] = getattr(config, "auto_map", None) or {}
    for auto in _auto_classes():
        if auto.__name__ in code:
            from transformers.dynamic_module_utils import get_class_from_dynamic_module

            cls: type[PreTrainedModel] = get_class_from_dynamic_module(code[auto.__name__], config._name_or_path)
            return cls
    return None


def _named(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """The class that ``architectures`` names, if transformers has it."""
    import transformers

    for name in config.architectures or ():
        cls: Any = getattr(transformers, name, None)
        if _takes(cls, config):
            return cast("type[PreTrainedModel]", cls)
    return None


def _registered(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    for auto in _auto_classes():
        found = auto._model_mapping.get(type(config), None)
        # One type may register several classes of the same head; the first is its standard one.
        cls: type[PreTrainedModel] | None = found[0] if isinstance(found, tuple) else found
        if cls is not None:
            return cls
    return None


def _by_config_class(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """The first public model of the configuration's own modelling module."""
    module_name = type(config).__module__.replace(".configuration_", ".modeling_")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError:
        return None
    for name in getattr(module, "__all__", ()):
        cls: Any = getattr(module, name)
        if _takes(cls, config) and not name.endswith("PreTrainedModel"):
            return cast("type[PreTrainedModel]", cls)
    return None


def _takes(cls: Any, config: PreTrainedConfig) -> bool:
    return inspect.isclass(cls) and getattr(cls, "config_class", None) is type(config)
