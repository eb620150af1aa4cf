"""Default configurations made whole: what a type leaves open although no model of it can be built, or run, without.

Only a type's own defaults are completed, never a configuration somebody wrote. Values are picked by field name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# Field -> its value where it is None.
COMPLETIONS: Mapping[str, int] = {
    "vocab_size": 32000,
    "num_experts_per_tok": 2,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts": 8,
    "top_k_experts": 2,
    "moe_intermediate_size": 512,
    "image_token_id": 5,
    "audio_token_id": 6,
    "video_token_id": 7,
    "prediction_length": 24,
    "context_length": 24,
    "decoder_hidden_size": 512,
    "decoder_depth": 8,
    "decoder_num_heads": 16,
}
# Only where another field is there and set ...
_ONLY_WITH = dict.fromkeys(("num_experts_per_tok", "n_routed_experts", "n_shared_experts"), "moe_intermediate_size")
# ... or where no switch says that experts are an option that is off.
_EXPERTS = ("num_experts", "top_k_experts", "moe_intermediate_size")
_SWITCH = "enable_moe_block"
ENCODER_WIDTHS = ("hidden_size", "hidden_dim", "d_model")
ROTARY_AXES = (2, 3, 3)  # eighths of a head's pairs that turn with time, height and width


def complete(config: PreTrainedConfig) -> None:
    """Fill in, in place and in the whole tree, what is None or missing.

    Sizes and token ids by `COMPLETIONS`; which layers are sparse (all but the first); the sections of rotary pairs
    that follow time, height and width, in a type that has such sections; images' heads that do not divide their width;
    widths in which one part hands its features to another.
    """
    if getattr(config, "vocab_size", 0) is None and getattr(config, "pad_token_id", 0) is None:
        config.pad_token_id = 1  # a type without any default vocabulary may count positions from its padding
    for name, value in COMPLETIONS.items():
        if hasattr(config, name) and getattr(config, name) is None and _is_wanted(config, name):
            setattr(config, name, value)
    _complete_layer_types(config)
    _complete_rotary(config)
    _complete_heads(config)
    for key in config.sub_configs:
        part: Any = getattr(config, key, None)
        if hasattr(part, "sub_configs"):
            complete(part)
    _complete_handovers(config)


def _is_wanted(config: Any, name: str) -> bool:
    if name in _EXPERTS:
        return hasattr(config, "top_k_experts") and not hasattr(config, _SWITCH)
    return name not in _ONLY_WITH or getattr(config, _ONLY_WITH[name], None) is not None


def _complete_layer_types(config: Any) -> None:
    layers = getattr(config, "num_hidden_layers", None)
    if getattr(config, "mlp_layer_types", ()) is None and isinstance(layers, int):
        config.mlp_layer_types = ["dense"] + ["sparse"] * (layers - 1)


def _complete_rotary(config: Any) -> None:
    """A table per type of layer where there are such types and tables are empty, and the sections of each table."""
    tables = getattr(config, "rope_parameters", None)
    has_sections = "mrope_section" in getattr(config, "ignore_keys_at_rope_validation", ())
    if not isinstance(tables, dict) or not has_sections:
        return
    if not tables:
        base = getattr(config, "default_theta", 10000.0)
        kinds = getattr(config, "layer_types", None) or ()
        tables.update({kind: {"rope_type": "default", "rope_theta": float(base)} for kind in kinds})
    width, heads = getattr(config, "hidden_size", None), getattr(config, "num_attention_heads", None)
    head_dim = getattr(config, "head_dim", None) or (width // heads if width and heads else None)
    for table in [tables] if "rope_type" in tables else tables.values():
        if isinstance(table, dict) and head_dim and "mrope_section" not in table:
            pairs = -(-int(head_dim * table.get("partial_rotary_factor", 1)) // 2)
            first, second, _ = (pairs * share // sum(ROTARY_AXES) for share in ROTARY_AXES)
            table["mrope_section"] = [first, second, pairs - first - second]


def _complete_handovers(config: Any) -> None:
    """What an encoder returns is as wide as the text it is written into, and as what reads it expects."""
    text: Any = getattr(config, "text_config", None)
    vision: Any = getattr(config, "vision_config", None)
    width = getattr(text, "hidden_size", None)
    if isinstance(width, int) and isinstance(getattr(vision, "out_hidden_size", None), int):
        vision.out_hidden_size = width
    reader: Any = getattr(config, "projector_config", None)
    encoder: Any = getattr(config, "encoder_config", None)
    width = next((n for name in ENCODER_WIDTHS if isinstance(n := getattr(encoder, name, None), int)), None)
    if width is not None and isinstance(getattr(reader, "encoder_hidden_size", None), int):
        reader.encoder_hidden_size = width


def _complete_heads(config: Any) -> None:
    """An image's encoder whose heads do not divide its width gets the nearest number that does."""
    width, heads = getattr(config, "hidden_size", None), getattr(config, "num_attention_heads", None)
    if not hasattr(config, "patch_size") or getattr(config, "head_dim", None) is not None:
        return
    if isinstance(width, int) and isinstance(heads, int) and width % heads:
        config.num_attention_heads = min(
            (n for n in range(1, width + 1) if width % n == 0), key=lambda n: (abs(n - heads), n)
        )
