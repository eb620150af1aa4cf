"""Hugging Face configurations: a type's default, or a file; quantised ones are refused.

transformers is imported where it is needed: a plain module is planned without it.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from colrow.cost_models.errors import SourceError

from .completed_defaults import complete

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def default_config(model_type: str) -> PreTrainedConfig:
    """Return the default configuration of a transformers model type.

    Raises:
        SourceError: The type is unknown, or its defaults are not a complete configuration.
    """
    require_transformers(f"hf:{model_type}")
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if model_type not in CONFIG_MAPPING:
        import difflib

        close = difflib.get_close_matches(model_type.replace("-", "_"), CONFIG_MAPPING.keys(), n=3)
        hint = f"Did you mean {', '.join('hf:' + c for c in close)}?" if close else ""
        raise SourceError(
            f"hf:{model_type}", "unknown model type", need="a model_type of the installed transformers", remedy=hint
        )
    try:
        config: PreTrainedConfig = CONFIG_MAPPING[model_type]()
    except Exception as error:  # a configuration's own code: anything can come out of it
        raise SourceError(
            f"hf:{model_type}",
            f"its default configuration is not usable: {type(error).__name__}: {first_line(error)}",
            remedy="Pass a complete config.json of this type.",
        ) from error
    complete(config)
    return config


def read_config(path: Path, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Read the Hugging Face configuration at ``path``, a JSON file or a directory holding ``config.json``.

    Raises:
        SourceError: It is missing, not JSON, not a model's, quantised, or needs remote code.
    """
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise SourceError(str(file), "no such file", need="a model directory or a config.json")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SourceError(str(file), f"not readable as JSON: {first_line(error)}") from error
    if not isinstance(content, dict) or "model_type" not in content:
        raise SourceError(
            str(file), "no model_type in it", need="the config.json of a Hugging Face model", remedy="Add model_type."
        )
    refuse_quantised(str(file), content)
    require_transformers(str(file))
    from transformers import AutoConfig

    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            str(path), trust_remote_code=trust_remote_code, local_files_only=True
        )
    except Exception as error:  # unknown types, bad values and remote code all raise their own
        remote = "auto_map" in content and not trust_remote_code
        raise SourceError(
            str(file),
            f"transformers cannot load it: {type(error).__name__}: {first_line(error)}",
            remedy="It ships its own code: read that code, then ask for it to be trusted (trust_remote_code)."
            if remote
            else "Compare it with the configuration class of its model_type.",
        ) from error
    return config


def refuse_quantised(where: str, config: Any) -> None:
    """Raise a SourceError if ``config`` (a configuration, its JSON, or None) is of quantised weights."""
    quantisation = config.get("quantization_config") if isinstance(config, dict) else None
    quantisation = quantisation or getattr(config, "quantization_config", None)
    if quantisation:
        method = quantisation.get("quant_method") if isinstance(quantisation, dict) else type(quantisation).__name__
        raise SourceError(
            where,
            "quantised weights are not supported",
            got=f"quantization_config ({method})",
            need="a model in bf16, fp16 or fp32",
            remedy="Plan the unquantised model: remove quantization_config, or use the original checkpoint.",
        )


def require_transformers(where: str) -> None:
    """Raise a SourceError that names the extra if transformers is not installed."""
    try:
        importlib.import_module("transformers")
    except ImportError as error:
        raise SourceError(
            where,
            f"Hugging Face models need transformers: {first_line(error)}",
            remedy="Install the hf extra: pip install 'colrow[hf]'.",
        ) from error


def first_line(error: BaseException) -> str:
    """What an error says, without the pages that some of transformers' go on for."""
    return next(iter(str(error).strip().splitlines()), "")
