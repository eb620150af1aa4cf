"""The small version of a Hugging Face configuration: same structure, sizes a CPU runs in milliseconds.

One set of rules on field names and the relations between values; no model is known by name. With three factors for a
whole tree of sub-configurations

    heads    n  -> n / h     h: the largest that keeps which counts the ranks divide, and query heads : kv heads
    head dim x  -> x / d     d: the largest that leaves 8 or more of each, an even number of them rotary
    widths   w  -> w / (h d) exactly, where w is a multiple of the hidden size or of heads times head dim

products such as hidden = heads x head dim and sums such as qk = nope + rope survive division, and equal values stay
equal, so fields that must agree need not be known to. Layers: one period of their pattern, or one of each kind.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from .layer_pattern import keep_layers

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

SMALLEST_HEAD_DIM = 8
UNTIED_HIDDEN = 128  # hidden size where heads x head dim does not fix it
# The widest of what is in no simple proportion to the hidden size (feed-forward, low-rank dims). Not a power of two: a
# weight that happens to be square would hide a transposition.
WIDEST = 160
NARROW = 4  # what is no wider is the channels of an image or the like
VOCAB = 512
POSITIONS = 128
WINDOW = 8  # below any sequence worth testing, so that the window cuts something
EXPERTS, GROUPED_EXPERTS, EXPERT_GROUPS, TOP_K = 8, 16, 4, 2
PATCHES = 4  # per side of an image

HIDDEN = ("hidden_size", "d_model", "n_embd", "embed_dim", "hidden_dim", "dim", "embedding_size")


Kept = Literal["", "head dims", "layers", "widths"]
KEEPS: tuple[Kept, ...] = ("", "head dims", "layers", "widths")  # in the order in which versions are tried


def small_config(config: PreTrainedConfig, *, divisible_by: int = 4, keep: Kept = "") -> PreTrainedConfig:
    """Return the small version of ``config``.

    Args:
        config: Any transformers configuration; not modified.
        divisible_by: The largest group the small model is for. A head count or vocabulary that this divides is
            replaced by one that it divides, any other by one that it does not; other dims stay multiples of 8 per rank
            where they were.
        keep: What stays as it is, for models whose code knows sizes that no field gives: head dims (rotary sections),
            layers (outputs of some taken by number), or all widths and head counts.
    """
    full, config = configs_in(config), copy.deepcopy(config)
    parts = configs_in(config)
    sizes = _Sizes.of(full, divisible_by, keep)
    for whole, part in zip(full, parts, strict=True):
        if keep != "layers":
            keep_layers(part)
        for name, value in list(vars(part).items()):
            rule = next((rule for pattern, rule in RULES if re.search(pattern, name)), None)
            if rule is not None and not (keep == "widths" and rule in WIDTHS):
                _set(part, name, _each(value, partial(rule, sizes, whole)))
        _shrink_rotary(part, sizes)
        _shrink_positions(part)
        _shrink_experts(part, divisible_by)
    _shrink_token_ids(parts)
    return config


@dataclass(frozen=True)
class _Sizes:
    """The factors of the module docstring, fixed for a whole configuration tree."""

    heads: Fraction
    head_dim: Fraction
    width: Fraction
    unit: int
    hidden: dict[int, int] = field(default_factory=dict)

    @staticmethod
    def of(parts: list[PreTrainedConfig], divisible_by: int, keep: Kept) -> _Sizes:
        counts = {n for part in parts for n in _numbers(part, HEADS) if n > 1}
        heads = _head_factor(counts, divisible_by) if keep != "widths" else Fraction(1)
        dims = {(dim, _rotary_share(part)) for part in parts for dim in _head_dims(part)}
        head_dim = _head_dim_factor(dims) if keep in ("", "layers") else Fraction(1)
        hidden = max((size for part in parts if (size := _hidden(part))), default=UNTIED_HIDDEN)
        width = heads * head_dim
        if not dims:  # no heads, or heads that do not divide the hidden size and yet get a floor of it each
            wanted = int(max(counts, default=0) * heads) * SMALLEST_HEAD_DIM
            width = Fraction(max(wanted, UNTIED_HIDDEN), hidden)
        elif not any(_is_tied(part) for part in parts):
            width = max(width, Fraction(UNTIED_HIDDEN, hidden))
        sizes = _Sizes(heads, head_dim, min(width, Fraction(1)), 8 * divisible_by)
        # Parts whose heads fix their hidden size come last: their answer stands where two parts have the same.
        for part in sorted(parts, key=_is_tied):
            if full := _hidden(part):
                exact = full * sizes.width
                sizes.hidden[full] = int(exact) if _is_tied(part) and exact.denominator == 1 else _rounded(sizes, full)
        return sizes


def _head_factor(counts: set[int], divisible_by: int) -> Fraction:
    """The smallest n'/n for all head counts that keeps their ratios and which of them ``divisible_by`` divides."""
    if not counts:
        return Fraction(1)
    if len(counts) == 1:
        (n,) = counts
        smaller = divisible_by if n % divisible_by == 0 else divisible_by + n % divisible_by
        return Fraction(min(n, smaller), n)

    def keeps(h: int) -> bool:
        return all(
            n % h == 0 and n // h > 1 and (n // h % divisible_by == 0) == (n % divisible_by == 0) for n in counts
        )

    return Fraction(1, next(h for h in range(min(counts), 0, -1) if keeps(h)) if min(counts) > 1 else 1)


def _head_dim_factor(dims: set[tuple[int, Fraction]]) -> Fraction:
    """The smallest x'/x for all head dims (each with the share of it that is rotary)."""

    def keeps(d: int, dim: int, rotary: Fraction) -> bool:
        return dim % d == 0 and dim // d >= min(dim, SMALLEST_HEAD_DIM) and (rotary * (dim // d)) % 2 == 0

    largest = max((dim for dim, _ in dims), default=1)
    return Fraction(1, next((d for d in range(largest, 1, -1) if all(keeps(d, *dim) for dim in dims)), 1))


def _shrink_width(sizes: _Sizes, part: PreTrainedConfig, width: int) -> int:
    """A feature dim: in exact proportion if tied to the hidden size or the heads, else still a multiple as before."""
    if width <= NARROW:
        return width
    if width in sizes.hidden:  # of this part or of one it has to fit
        return sizes.hidden[width]
    hidden = _hidden(part)
    if hidden and not _is_tied(part):  # the hidden size is free itself, and its multiples follow
        return width // hidden * sizes.hidden[hidden] if width % hidden == 0 else _rounded(sizes, width)
    exact: Fraction = width * sizes.width
    bases = [base for base in (hidden, _attention_width(part)) if base]
    if exact.denominator == 1 and any(width % base == 0 or base % width == 0 for base in bases):
        return max(1, int(exact))
    return _rounded(sizes, width)


def _rounded(sizes: _Sizes, width: int) -> int:
    """About ``width`` in proportion, a multiple of what shares and kernels need (8 per rank) if ``width`` is one."""
    unit = next(u for u in (sizes.unit, 16, 8, 4, 2, 1) if width % u == 0)
    return min(width, max(1, round(min(width * sizes.width, Fraction(WIDEST)) / unit)) * unit)


def _shrink_vocab(sizes: _Sizes, part: PreTrainedConfig, size: int) -> int:
    return min(size, VOCAB + size % sizes.unit)


def _scale_heads(sizes: _Sizes, part: PreTrainedConfig, count: int) -> int:
    return max(1, int(count * sizes.heads))


def _scale_head_dim(sizes: _Sizes, part: PreTrainedConfig, dim: int) -> int:
    return max(1, int(dim * sizes.head_dim))


def _shrink_image(sizes: _Sizes, part: PreTrainedConfig, size: int) -> int:
    """A few patches per side; models whose stages merge patches keep the size their windows fit."""
    patch = getattr(part, "patch_size", None)
    staged = any(isinstance(getattr(part, name, None), list | tuple) for name in ("depths", "hidden_sizes"))
    return min(size, PATCHES * patch) if isinstance(patch, int) and not staged else size


def _shrink_window(sizes: _Sizes, part: PreTrainedConfig, size: int) -> int:
    return min(size, WINDOW)


# Field name -> rule; the first that matches decides, so what must not change stands first.
Rule = Callable[[_Sizes, Any, int], int]
KEPT = r"^_|token|label|kernel|stride|state|conv_(?!dim)|bucket|chunk_size_feed|type_vocab|num_mel|patch_size|expand"
HEADS = r"(^|_)n?_?heads?(_kv)?$|(^|_)heads?_(count|per)|^n_head|num_\w*heads$"
HEAD_DIM = r"head_(dim|size)$|(^|_)(d|dim)_head$|^d_kv$|^kv_channels$|^query_pre_attn_scalar$|^rotary_dim$"
OWN_HEADS = r"^(mamba|linear|ssm|index|rotary)"  # not attention's own: of a mixer beside it, or a part of its head dim
RULES: tuple[tuple[str, Rule], ...] = (
    (KEPT, lambda sizes, part, value: value),
    (r"vocab", _shrink_vocab),
    (HEAD_DIM, _scale_head_dim),
    (HEADS, _scale_heads),
    (r"(^|_)n_groups$", _scale_heads),  # of heads that share a state, as kv heads are shared
    (r"^image_size$", _shrink_image),
    (r"^sliding_window$|^attention_chunk_size$|^attention_window$", _shrink_window),
    (r"window|image|pool_size|group_size|num_|^n_(?!embd|inner|ctx)", lambda sizes, part, value: value),
    (r"_sizes?$|_dims?$|^dim$|^d_|_rank$|_width$|^n_embd$|^n_inner$|_channels$", _shrink_width),
)


WIDTHS = (_shrink_width, _scale_heads, _scale_head_dim)


def configs_in(config: PreTrainedConfig) -> list[PreTrainedConfig]:
    """``config`` and its sub-configurations, outermost first."""
    found = [config]
    for key in config.sub_configs:
        part = getattr(config, key, None)
        if part is not None and part is not config:
            found += configs_in(part)
    return found


def _shrink_rotary(part: PreTrainedConfig, sizes: _Sizes) -> None:
    """Rotary parameters that are one per pair of features: sections are scaled, factors thinned out."""
    for name in ("rope_parameters", "rope_scaling"):
        for table in _tables(getattr(part, name, None)):
            for key, value in table.items():
                if isinstance(value, list) and all(isinstance(x, int) for x in value):
                    table[key] = _scaled_sections(value, sizes.head_dim)
                elif isinstance(value, list) and all(isinstance(x, int | float) for x in value):
                    table[key] = value[: max(1, int(len(value) * sizes.head_dim))]


def _scaled_sections(sections: list[int], factor: Fraction) -> list[int]:
    """Sections in proportion, of the same scaled sum: rounding takes from the last ones first."""
    ends = [math.ceil(sum(sections[: i + 1]) * factor) for i in range(len(sections))]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


def _tables(rope: Any) -> list[dict[str, Any]]:
    """The rotary parameters, one table or one per layer type."""
    if not isinstance(rope, dict):
        return []
    nested = [value for value in rope.values() if isinstance(value, dict)]
    return nested or [rope]


def _shrink_positions(part: PreTrainedConfig) -> None:
    """Learned positions are weights; rotary ones are not, and their scaling is a relation between lengths."""
    if getattr(part, "rope_parameters", None):
        return
    for name, value in list(vars(part).items()):
        if re.search(r"position(s|_embeddings)$|^n_ctx$", name) and type(value) is int:
            _set(part, name, min(value, POSITIONS))


def _shrink_experts(part: PreTrainedConfig, divisible_by: int) -> None:
    """Eight experts (four groups of four where they are grouped), two of them per token."""
    groups = int(getattr(part, "n_group", None) or 1)
    grouped = groups > 1
    common = {own: name for name, own in part.attribute_map.items()}
    for own, value in list(vars(part).items()):
        name = common.get(own, own)  # a type's own name for what others call so
        if type(value) is not int or re.search(r"shared|zero", name):
            continue
        if re.search(r"(^|_)experts$|^moe_num_experts$|^num_experts$", name) and value > 1:
            _set(part, own, min(value, GROUPED_EXPERTS if grouped else max(EXPERTS, divisible_by)))
        elif re.search(r"experts_per_tok|^(moe_|router_)?top_?k$|^moe_k$|num_selected_experts", name):
            _set(part, own, min(value, TOP_K))
        elif grouped and name == "n_group":
            _set(part, own, min(value, EXPERT_GROUPS))
        elif grouped and name == "topk_group":
            _set(part, own, max(1, value * min(groups, EXPERT_GROUPS) // groups))


def _shrink_token_ids(parts: list[PreTrainedConfig]) -> None:
    """Move special tokens that fell outside the vocabulary to its end, different ids staying different."""
    vocab = min((size for part in parts if type(size := vars(part).get("vocab_size")) is int), default=0)
    moved: dict[int, int] = {}

    def inside(token: int) -> int:
        return token if token < vocab else moved.setdefault(token, vocab - 1 - len(moved))

    for part in parts if vocab else ():
        for name, value in list(vars(part).items()):
            if re.search(r"token_(id|index)s?$", name):
                _set(part, name, _each(value, inside))


def _hidden(part: PreTrainedConfig) -> int | None:
    return next((value for name in HIDDEN if type(value := vars(part).get(name)) is int), None)


def _query_heads(part: PreTrainedConfig) -> int:
    return max(_numbers(part, HEADS, but=OWN_HEADS), default=0)


def _attention_width(part: PreTrainedConfig) -> int | None:
    """Query heads times head dim, or None without attention."""
    heads, dims = _query_heads(part), _head_dims(part)
    return heads * max(dims) if heads and dims else None


def _head_dims(part: PreTrainedConfig) -> set[int]:
    """Head dims, given or the hidden size over the heads."""
    named = [name for name, value in vars(part).items() if re.search(HEAD_DIM, name) and value is not None]
    given = {n for name in named for n in _ints(vars(part)[name]) if n > 1}
    hidden, heads = _hidden(part), _query_heads(part)
    implied = hidden and heads and hidden % heads == 0 and all(re.search(OWN_HEADS, name) for name in named)
    return given | {hidden // heads} if implied and hidden else given


def _is_tied(part: PreTrainedConfig) -> bool:
    """Whether heads x head dim fixes the hidden size."""
    hidden, attention = _hidden(part), _attention_width(part)
    return bool(hidden and attention and (hidden % attention == 0 or attention % hidden == 0))


def _rotary_share(part: PreTrainedConfig) -> Fraction:
    """The share of a head dim that is rotated; 1 where unknown, so that head dims stay even."""
    tables = _tables(getattr(part, "rope_parameters", None))
    shares: list[float] = [table.get("partial_rotary_factor", 1) for table in tables]
    return Fraction(min(shares, default=1)).limit_denominator(64)


def _numbers(part: PreTrainedConfig, pattern: str, but: str = "^_") -> list[int]:
    """The integers in fields whose name matches ``pattern`` and is neither kept, a head dim, nor matches ``but``."""
    other = f"{KEPT}|{HEAD_DIM}|{but}"
    names = [name for name in vars(part) if re.search(pattern, name) and not re.search(other, name)]
    return [number for name in names for number in _ints(vars(part)[name])]


def _ints(value: Any) -> list[int]:
    numbers: list[int] = []
    _each(value, lambda number: numbers.append(number) or number)  # type: ignore[func-returns-value]
    return numbers


def _each(value: Any, rule: Callable[[int], int]) -> Any:
    """``rule`` on an integer or each of a list of them; everything else, None, 0 and -1 included, is left as it is."""
    if type(value) is int:
        return rule(value) if value > 0 else value
    if isinstance(value, list | tuple):
        return type(value)(_each(item, rule) for item in value)
    return value


def _set(part: PreTrainedConfig, name: str, value: Any) -> None:
    if value != vars(part)[name]:
        setattr(part, name, value)
