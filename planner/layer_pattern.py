"""Which layers of a deep model show all its kinds: one period of the pattern, else one of each kind."""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

LONGEST_PERIOD = 8
COUNT = r"^n_layers?$|^(\w+_)?(layers|depth)$"
PREFIX = r"^first_k_dense|^num_dense_layers$|^num_\w*first\w*layers$"
PERIOD = r"_(period|interval|freq|step|pattern|every_n\w*)$"
INDICES = r"layers?(_(ids?|idxs?|idx|indices|indexes))?$|_(indexes|indices|idxs)$"
STAGES = r"^depths$|^conv_dim$"


def keep_layers(part: PreTrainedConfig) -> None:
    """Reduce the layers of one configuration in place.

    A list with an entry per layer keeps the kept layers' entries, a list of layer numbers is renumbered, and a count of
    leading layers of another kind counts the kept ones. Periods given as numbers stay and are kept whole.
    """
    fields = {name: value for name, value in vars(part).items() if not name.startswith("_")}
    # Where stages are listed one by one, a count that equals their number counts stages, not layers.
    stages = {len(v) for name, v in fields.items() if re.search(STAGES, name) and isinstance(v, list | tuple)}
    counts = {
        name: value
        for name, value in fields.items()
        if re.search(COUNT, name) and not re.search(PREFIX, name) and type(value) is int and value > 2
    }
    for name, value in fields.items():
        if name == "depths" and isinstance(value, list | tuple):
            setattr(part, name, type(value)(min(2, depth) for depth in value))
    kept = {depth: _kept(depth, fields) for depth in set(counts.values()) - stages}
    for name, depth in counts.items():
        if depth in kept:
            setattr(part, name, len(kept[depth]))
    main = max(kept, default=0)  # lists and prefixes speak of the deepest stack
    for name, value in fields.items():
        if isinstance(value, list) and len(value) in kept:
            setattr(part, name, [value[i] for i in kept[len(value)]])
        elif _is_indices(name, value, main):
            setattr(part, name, [kept[main].index(i) for i in value if i in kept[main]])
        elif main and re.search(PREFIX, name) and type(value) is int:
            setattr(part, name, sum(i < value for i in kept[main]))


def _kept(depth: int, fields: dict[str, Any]) -> list[int]:
    """The numbers of the layers to keep out of ``depth``."""
    signatures = [_signature(i, depth, fields) for i in range(depth)]
    longest = min(depth, LONGEST_PERIOD)
    given = [v for name, v in fields.items() if re.search(PERIOD, name) and type(v) is int and 1 < v <= longest]
    for period in range(1, LONGEST_PERIOD + 1):
        if all(signatures[i] == signatures[i - period] for i in range(period, depth)):
            return list(range(min(depth, max(2, period, *given))))
    common = Counter(signatures).most_common(1)[0][0]
    first = {signatures.index(signature) for signature in set(signatures)}
    second = [i for i in range(depth) if signatures[i] == common][1:2]
    return sorted(first | set(second))


def _signature(layer: int, depth: int, fields: dict[str, Any]) -> tuple[str, ...]:
    """What tells one layer from another: its entries in per-layer lists, its membership in lists and prefixes."""
    marks = []
    for name, value in fields.items():
        if isinstance(value, list) and len(value) == depth:
            marks.append(str(value[layer]))
        elif _is_indices(name, value, depth):
            marks.append(str(layer in value))
        elif re.search(PREFIX, name) and type(value) is int:
            marks.append(str(layer < value))
    return tuple(marks)


def _is_indices(name: str, value: Any, depth: int) -> bool:
    """Whether a field lists layers by their numbers."""
    return bool(
        isinstance(value, list)
        and value
        and len(value) < depth
        and re.search(INDICES, name)
        and all(type(i) is int and 0 <= i < depth for i in value)
    )
