"""Bytes by kind: parts sum to the total; AdamW against what torch really allocates."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from colrow.cost_models.memory import MemoryBytes, adamw_bytes, fits, kv_cache_bytes, training_bytes

AMOUNTS = st.builds(MemoryBytes, *[st.integers(0, 2**40)] * 7)


@given(AMOUNTS, AMOUNTS)
def test_parts_sum_to_the_total(one: MemoryBytes, other: MemoryBytes) -> None:
    kinds = ["weights", "gradients", "optimizer", "activations", "kv_cache", "workspace", "communication"]
    assert list(one.by_kind()) == kinds and one.total == sum(getattr(one, kind) for kind in kinds)
    assert (one + other).total == one.total + other.total
    assert (one + other).kv_cache == one.kv_cache + other.kv_cache


def test_a_gigabyte_is_1e9_bytes() -> None:
    assert fits(MemoryBytes(weights=10**9), 1.0) and not fits(MemoryBytes(weights=10**9, workspace=1), 1.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_same_dtype_training_is_what_torch_adamw_allocates(dtype: torch.dtype) -> None:
    weight = torch.nn.Parameter(torch.ones(7, 13, dtype=dtype))
    optimizer = torch.optim.AdamW([weight])
    weight.sum().backward()
    optimizer.step()
    state = [value for value in optimizer.state[weight].values() if value.shape == weight.shape]
    allocated = training_bytes(weight.numel(), dtype.itemsize)
    assert allocated.weights == weight.nbytes and allocated.gradients == weight.grad.nbytes
    assert allocated.optimizer == sum(tensor.nbytes for tensor in state)


@pytest.mark.parametrize(("itemsize", "per_element"), [(2, 12), (4, 8), (8, 16), (1, 12)])
def test_master_weights_follow_zero(itemsize: int, per_element: int) -> None:
    assert adamw_bytes(10, itemsize, "float32") == 10 * per_element


def test_kv_cache_of_llama_3_1_8b() -> None:
    # 32 layers, 8 kv heads of 128, bf16: 128 KiB a token.
    assert kv_cache_bytes(layers=32, batch=1, context=1, kv_heads=8, head_dim=128, itemsize=2) == 131072
    cache = torch.empty(2, 3, 4, 5, 6, 7, dtype=torch.bfloat16)
    assert kv_cache_bytes(3, 4, 5, 6, 7, 2) == cache.nbytes
