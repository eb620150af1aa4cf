"""Bytes on one rank, by kind. Sizes are of what the rank holds: shards, not whole tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Literal

MasterWeights = Literal["same", "float32"]

FLOAT32_BYTES = 4


@dataclass(frozen=True, slots=True)
class MemoryBytes:
    """Bytes on one rank. Addition is per kind; `total` is the sum of all kinds.

    Attributes:
        weights: Parameters and buffers.
        gradients: One per trained parameter.
        optimizer: Optimiser state, master weights included.
        activations: Kept by autograd from a forward pass for its backward.
        kv_cache: Keys and values of all layers.
        workspace: What else is alive at once: values on their way, gradients of values, a weight's new gradient.
        communication: What the largest collective holds beside its result.
    """

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    kv_cache: int = 0
    workspace: int = 0
    communication: int = 0

    @property
    def total(self) -> int:
        """Sum of all kinds, bytes."""
        return sum(self.by_kind().values())

    def by_kind(self) -> Mapping[str, int]:
        """Kind -> bytes, in the order of the fields."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def __add__(self, other: MemoryBytes) -> MemoryBytes:
        mine, theirs = self.by_kind(), other.by_kind()
        return MemoryBytes(**{kind: mine[kind] + theirs[kind] for kind in mine})


def fits(memory: MemoryBytes, memory_gb: float) -> bool:
    """Whether a rank's bytes fit ``memory_gb``, 1 GB = 1e9 bytes."""
    return memory.total <= memory_gb * 1e9


def gradient_bytes(numel: int, itemsize: int) -> int:
    """Gradients of ``numel`` trained elements, in the parameters' dtype as autograd leaves them in ``.grad``."""
    return numel * itemsize


def adamw_bytes(numel: int, itemsize: int, master_weights: MasterWeights = "same") -> int:
    """State AdamW keeps for ``numel`` trained elements: two moments, and a master copy if asked for.

    - ``same``: ``torch.optim.AdamW`` on the parameters as they are. ``exp_avg`` and ``exp_avg_sq`` in the parameters'
      dtype, no master copy: 2 * itemsize per element. (The step counter, 4 bytes a parameter tensor, is not counted.)
    - ``float32``: mixed precision as in Megatron-LM and ZeRO. Two float32 moments, and a float32 master copy unless
      the parameters are float32 or wider themselves: 12 bytes per 2-byte element, 8 per float32 one.

    Source: I. Loshchilov, F. Hutter, "Decoupled Weight Decay Regularization", ICLR 2019, algorithm 2; S. Rajbhandari et
    al., "ZeRO", SC 2020, section 3.1 (K = 12).
    """
    if master_weights == "same":
        return 2 * itemsize * numel
    moments = 2 * max(itemsize, FLOAT32_BYTES)
    master = FLOAT32_BYTES if itemsize < FLOAT32_BYTES else 0
    return (moments + master) * numel


def training_bytes(numel: int, itemsize: int, master_weights: MasterWeights = "same") -> MemoryBytes:
    """Weights, gradients and AdamW state of ``numel`` trained elements on this rank (`adamw_bytes`)."""
    return MemoryBytes(
        weights=numel * itemsize,
        gradients=gradient_bytes(numel, itemsize),
        optimizer=adamw_bytes(numel, itemsize, master_weights),
    )


def collective_bytes(kind: str, nbytes: int, ranks: int) -> int:
    """Bytes a collective holds on one rank beside its result, or its operand where that is the larger one.

    An all_reduce's result is not its operand; an all_gather has the rank's part, and the parts in rank order before
    they are laid out along their dim; a reduce_scatter has its operand and the parts it is laid out in. What a library
    allocates once per communicator (NCCL: ``NCCL_BUFFSIZE`` per channel and peer) is not in it.

    Args:
        kind: all_reduce, all_gather, reduce_scatter or all_to_all.
        nbytes: The whole buffer over all ranks.
        ranks: Size of the group.
    """
    if ranks == 1:
        return 0
    match kind:
        case "all_gather":
            return nbytes // ranks + nbytes
        case "reduce_scatter":
            return 2 * nbytes
        case _:
            return nbytes


def kv_cache_bytes(layers: int, batch: int, context: int, kv_heads: int, head_dim: int, itemsize: int) -> int:
    """Keys and values of ``context`` positions: ``2 * layers * batch * context * kv_heads * head_dim * itemsize``.

    ``kv_heads`` are this rank's, replicated ones included. Source: R. Pope et al., "Efficiently Scaling Transformer
    Inference", MLSys 2023, section 3.3.
    """
    return 2 * layers * batch * context * kv_heads * head_dim * itemsize
