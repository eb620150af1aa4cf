"""What an operator needs at its call so that the same source, run on slices, computes its slice.

Most operators need nothing: they read lengths off their operands. Sizes and offsets written as literals (or taken
from attributes) are made
local; lengths the code measured itself are left alone. An operator that would be wrong on slices is replaced by its
local form.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .channel_groups import GROUPED, groups_of, local_groups
from .edits import CallEdit, OperatorEdit
from .graph import Call, Node, Ref, numel
from .measured import Measured
from .placement import Placement, Shard
from .rules.base import wrapped
from .rules.pointwise import EACH, FIRST, JOINT, NONLINEAR

Placed = Mapping[int, Placement | tuple[Placement, ...]]

_CALCULATES = frozenset({*EACH, *FIRST, *JOINT, *NONLINEAR})
_SIZED = frozenset(
    {
        "view",
        "reshape",
        "expand",
        "unflatten",
        "_unsafe_view",
        "broadcast_to",
        "new_zeros",
        "new_ones",
        "new_full",
        "new_empty",
    }
)


def local_form(
    node: Node, call: Call | None, placed: Placed, made: Placement | tuple[Placement, ...]
) -> CallEdit | str | None:
    """The edit that makes ``node`` right on local operands; None if it is; a reason if no edit can make it so.

    Args:
        node: The operator.
        call: Its API call; None if it was not recorded or cannot be edited.
        placed: Placement of each operand as the operator reads it.
        made: Placement of the result.
    """
    if not isinstance(made, (tuple, Shard)) and not any(isinstance(p, Shard) for p in placed.values()):
        return None
    first = placed[node.operands[0]] if node.operands else None
    if _unreadable(node, call, placed):
        return "its sizes cannot be calculated from local lengths"
    match node.op:
        case "embedding" if isinstance(first, Shard) and first.dim == 0:
            return _replaced(call, OperatorEdit("vocab_embedding", 0, first.layout))
        case "embedding_bag" if isinstance(first, Shard) and first.dim == 0:
            return _replaced(call, OperatorEdit("vocab_embedding_bag", 0, first.layout))
        case "cross_entropy_loss" if isinstance(first, Shard):
            return _replaced(call, OperatorEdit("vocab_cross_entropy", first.dim, first.layout))
        case "mean" if isinstance(first, Shard) and not isinstance(made, Shard):
            return _replaced(call, OperatorEdit("mean_of_shard", first.dim, first.layout))
        case "sum" if isinstance(first, Shard) and not isinstance(made, Shard) and not first.layout.is_partition:
            return "a sum over padding, or over copies that several ranks hold"
        case "batch_norm" | "instance_norm" if isinstance(first, Shard) and first.dim == 1 and _has_statistics(node):
            return _replaced(call, OperatorEdit("norm_of_shard", 1, first.layout))
        case "dropout" | "feature_dropout" if isinstance(first, Shard) and float(node.arguments[1]) > 0:
            return _replaced(call, OperatorEdit("rank_random"))
        case "scaled_dot_product_attention" if isinstance(first, Shard) and _dropout_of(node) > 0:
            return _replaced(call, OperatorEdit("rank_random"))
        case "split" | "split_with_sizes" | "chunk" | "tensor_split" if isinstance(first, Shard) and isinstance(
            made, tuple
        ):
            return _split(node, call, first, made)
        case "slice" | "narrow" if isinstance(first, Shard):
            return _sliced(node, call, first)
        case op if op in _SIZED and isinstance(made, Shard):
            return _sized(node, call, made)
        case op if op in GROUPED and (groups := local_groups(node, first)) is not None:
            return _grouped(node, call, groups)
    return None


def _replaced(call: Call | None, edit: OperatorEdit) -> CallEdit | str:
    return CallEdit(operator=edit) if call is not None else "its call cannot be edited"


def _has_statistics(norm: Node) -> bool:
    """Whether a norm over the batch reads running statistics, or changes them."""
    return isinstance(_at(norm, 3, norm.keywords.get("running_mean")), Ref)


def _learns(norm: Node) -> bool:
    """Whether a norm computes the statistics itself."""
    return bool(_at(norm, 5, norm.keywords.get("training", norm.keywords.get("use_input_stats", False))))


def _grouped(node: Node, call: Call | None, local: int) -> CallEdit | str | None:
    """The number of groups, a literal or an attribute: a convolution's last argument but for a transposed one's
    dilation, where nothing else is equal to it."""
    groups = groups_of(node)
    if call is None:
        return "its number of groups is not written at its call"
    found = [i for i, leaf in enumerate(call.leaves) if type(leaf) in (int, Measured) and leaf == groups]
    usual = len(call.leaves) - 1 - (len(node.shape) - 2 if node.op.startswith("conv_transpose") else 0)
    leaf = found[0] if len(found) == 1 else usual if usual in found else None
    if leaf is None:
        return "its number of groups is not written at its call"
    return None if isinstance(call.leaves[leaf], Measured) else CallEdit(integers=((leaf, groups, local),))


def own_reductions(node: Node, edit: CallEdit | None, nodes: Sequence[Node]) -> tuple[int, ...]:
    """Bytes of the all_reduces that a local operator makes in its forward pass; its backward makes none.

    The cross entropy of split classes reduces every row's largest logit, then its sum and its label's logit (with
    label smoothing also the sum of all logits), half precision in float32. Running statistics that learn are put
    together from the ranks' channels.
    """
    if edit is None or edit.operator is None:
        return ()
    if edit.operator.name == "norm_of_shard" and _learns(node):
        return (2 * nodes[_at(node, 3, node.keywords.get("running_mean")).index].nbytes,)
    if edit.operator.name != "vocab_cross_entropy":
        return ()
    logits, labels = (nodes[i] for i in node.operands[:2])
    row = numel(labels.shape) * max(4, logits.dtype.itemsize)
    smoothed = float(_at(node, 5, node.keywords.get("label_smoothing", 0.0))) > 0
    return (row, (3 if smoothed else 2) * row)


def _sized(node: Node, call: Call | None, made: Shard) -> CallEdit | str | None:
    """A view's or expand's literal length of the split dim."""
    sizes = next((a for a in node.arguments[1:] if isinstance(a, (list, tuple))), [])
    wanted = node.shape[made.dim]
    position = made.dim if len(sizes) == len(node.shape) else _position_in_unflatten(node, made.dim)
    if position is None or position >= len(sizes) or sizes[position] == -1:
        return None
    if sizes[position] != wanted:
        return "its sizes do not name the split dim"
    leaf = _leaf_of(call, sizes, position)
    if leaf is None or call is None:
        return "its sizes are not written at its call"
    if isinstance(call.leaves[leaf], Measured):
        return None
    return CallEdit(integers=((leaf, wanted, made.layout.local),))


def measured_sizes(
    node: Node, call: Call, made: Placement | tuple[Placement, ...], stored: Callable[[int], object]
) -> CallEdit | None:
    """Lengths that the code reads from a tensor which is split otherwise than the result: set to what the result
    needs. A length that is a number to calculate with, as in ``x / x.shape[-1]``, is set to the whole one."""
    if isinstance(made, tuple):
        return None
    if node.op in _CALCULATES:
        return _whole_lengths(call, stored)
    if node.op not in _SIZED:
        return None
    sizes = next((a for a in node.arguments[1:] if isinstance(a, (list, tuple))), [])
    if len(sizes) != len(node.shape):
        return None
    edits = []
    for dim, length in enumerate(node.shape):
        leaf = _leaf_of(call, sizes, dim)
        value = call.leaves[leaf] if leaf is not None else None
        if leaf is None or not isinstance(value, Measured):
            continue
        reads = value.read_on(lambda origin, at, whole: _local_length(stored(origin.index), at, whole))
        needs = made.layout.local if isinstance(made, Shard) and made.dim == dim else length
        if reads is not None and reads != needs:
            edits.append((leaf, reads, needs))
    return CallEdit(integers=tuple(edits)) if edits else None


def _local_length(placement: object, dim: int, whole: int) -> int:
    return placement.layout.local if isinstance(placement, Shard) and placement.dim == dim else whole


def _unreadable(node: Node, call: Call | None, placed: Placed) -> bool:
    """Whether the code calculates a size from lengths of this operator's operands, and cannot from the local ones."""

    def local(origin: Any, dim: int, whole: int) -> int:
        return _local_length(placed.get(origin.index), dim, whole)

    sizes = [leaf for leaf in call.leaves if isinstance(leaf, Measured) and leaf.formula] if call is not None else []
    known = [leaf for leaf in sizes if leaf.read_on(lambda origin, dim, whole: whole) is not None]
    return node.op in _SIZED and any(leaf.read_on(local) is None for leaf in known)


def _whole_lengths(call: Call, stored: Callable[[int], object]) -> CallEdit | None:
    edits = []
    for leaf, value in enumerate(call.leaves):
        source = stored(value.origin.index) if isinstance(value, Measured) and isinstance(value.origin, Ref) else None
        if isinstance(source, Shard) and source.dim == value.dim and source.layout.local != int(value):
            edits.append((leaf, source.layout.local, int(value)))
    return CallEdit(integers=tuple(edits)) if edits else None


def _position_in_unflatten(node: Node, dim: int) -> int | None:
    if node.op != "unflatten":
        return None
    at = dim - wrapped(node.arguments[1], len(node.shape) - len(node.arguments[2]) + 1)
    return at if at >= 0 else None


def _leaf_of(call: Call | None, sizes: Sequence[int], position: int) -> int | None:
    """Where the sizes stand among the call's leaves."""
    if call is None:
        return None
    leaves = call.leaves
    for start in range(len(leaves) - len(sizes) + 1):
        run = leaves[start : start + len(sizes)]
        if all(isinstance(a, int) and not isinstance(a, bool) and a == b for a, b in zip(run, sizes, strict=True)):
            return start + position
    return None


def _split(node: Node, call: Call | None, source: Shard, made: tuple[Placement, ...]) -> CallEdit | str | None:
    dim = wrapped(
        node.arguments[2] if len(node.arguments) > 2 else node.keywords.get("dim", 0), len(node.outputs[0][0])
    )
    if source.dim != dim:
        return None
    pieces = [p.layout.local for p in made if isinstance(p, Shard)]
    if node.op == "chunk":
        return None if len(set(pieces)) == 1 else "its chunks differ in local length"
    sizes = node.arguments[1]
    listed = list(sizes) if isinstance(sizes, (list, tuple)) else [sizes]
    if not isinstance(sizes, (list, tuple)) and len(set(pieces)) > 1:
        return "its pieces differ in local length"
    leaf = _leaf_of(call, listed, 0)
    if leaf is None or call is None:
        return "its sizes are not written at its call"
    edits = [
        (leaf + i, size, local)
        for i, (size, local) in enumerate(zip(listed, pieces, strict=False))
        if not isinstance(call.leaves[leaf + i], Measured)
    ]
    return CallEdit(integers=tuple(edits)) if edits else None


def _sliced(node: Node, call: Call | None, source: Shard) -> CallEdit | str | None:
    dim = wrapped(_at(node, 1, 0), len(node.shape))
    if source.dim != dim:
        return None
    length = source.layout.size
    if node.op == "narrow":
        start, stop = node.arguments[2], node.arguments[2] + node.arguments[3]
    else:
        start, stop, _ = slice(_at(node, 2, None), _at(node, 3, None)).indices(length)
    if (start, stop) == (0, length):
        return None
    if node.op == "narrow" or call is None:
        return "its bounds are not written at its call"
    edits = []
    for bound in (start, stop):
        if bound in (0, length):
            continue
        local = source.layout.local_offset(bound)
        leaves = [
            i for i, leaf in enumerate(call.leaves) if type(leaf) in (int, Measured) and leaf in (bound, bound - length)
        ]
        if local is None or len(leaves) != 1:
            return "its bounds are not written at its call"
        leaf = leaves[0]
        value = call.leaves[leaf]
        if not isinstance(value, Measured):
            edits.append((leaf, int(value), local if value >= 0 else local - source.layout.local))
    return CallEdit(integers=tuple(edits)) if edits else None


def _dropout_of(attention: Node) -> float:
    return float(_at(attention, 4, attention.keywords.get("dropout_p", 0.0)))


def _at(node: Node, position: int, default: Any) -> Any:
    return node.arguments[position] if position < len(node.arguments) else default


def merged(edits: Sequence[CallEdit]) -> CallEdit:
    """Several operators' edits of one call.

    Raises:
        ValueError: They contradict each other.
    """
    operators = [e.operator for e in edits if e.operator is not None]
    results = [e.result for e in edits if e.result is not None]
    arguments = dict(pair for e in edits for pair in e.arguments)
    integers: dict[int, tuple[int, int]] = {}
    for edit in edits:
        for leaf, wanted, local in edit.integers:
            if integers.setdefault(leaf, (wanted, local)) != (wanted, local):
                raise ValueError("one literal with two local values")
    if len(operators) > 1 or len(results) > 1:
        raise ValueError("two replacements of one call")
    return CallEdit(
        tuple(sorted(arguments.items(), key=lambda pair: pair[0])),
        tuple((leaf, *values) for leaf, values in sorted(integers.items())),
        operators[0] if operators else None,
        results[0] if results else None,
    )


def leaves_of(call: Call, index: int) -> list[int]:
    """Leaves of ``call`` that are the value of node ``index``."""
    return [i for i, leaf in enumerate(call.leaves) if leaf == Ref(index)]
