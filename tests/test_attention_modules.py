"""nn.MultiheadAttention and what is made of it: split by heads, as torch's one function for it would compute."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from colrow.planner.plan_model import Plan
from colrow.planner.planning import plan
from colrow.planner.written_out import multi_head_attention
from colrow.rewrite.parallel import parallelize
from colrow.rewrite.ranks import run_ranks
from colrow.rewrite.verification import verify

WIDTH, HEADS, BATCH, QUERIES, KEYS = 12, 3, 2, 5, 4
_random = torch.Generator().manual_seed(0)


def r(*shape: int) -> Tensor:
    return torch.randn(shape, generator=_random, dtype=torch.float64)


PADDED = torch.tensor([[False] * 4, [False, False, True, True]])
MASKS = {
    "none": None,
    "causal": torch.ones(QUERIES, KEYS, dtype=torch.bool).triu(1),
    "to add": r(QUERIES, KEYS),
    "per head": r(BATCH * HEADS, QUERIES, KEYS),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("inputs", ["self", "key is value", "all apart", "own projections", "one example"])
def test_what_is_written_out_is_what_torch_computes(inputs: str, mask: str) -> None:
    """Values, weights, random draws and gradients, with and without padding and biases."""
    query, key = r(QUERIES, BATCH, WIDTH), r(KEYS, BATCH, WIDTH)
    value, attn_mask = key, MASKS[mask]
    if inputs == "self":
        query = value = key
        attn_mask = None if attn_mask is None else attn_mask[..., :KEYS, :]
    elif inputs in ("all apart", "own projections"):
        value = r(KEYS, BATCH, WIDTH)
    elif inputs == "one example":
        query, key = query[:, 0], key[:, 0]
        value = key
        attn_mask = attn_mask[:HEADS] if mask == "per head" and attn_mask is not None else attn_mask
    own = {f"{name}_proj_weight": r(WIDTH, WIDTH) for name in "qkv"} if inputs == "own projections" else {}
    packed, bias = (None if own else r(3 * WIDTH, WIDTH)), r(3 * WIDTH)
    out_weight, out_bias = r(WIDTH, WIDTH), r(WIDTH)
    padding = PADDED[1] if inputs == "one example" else PADDED

    def run(function: Callable[..., Any], dropout: float, options: dict[str, Any]) -> list[Tensor]:
        torch.manual_seed(0)
        leaves = [t.clone().requires_grad_() for t in (bias, out_weight)]
        given = {**own, "use_separate_proj_weight": bool(own), "attn_mask": attn_mask, **options}
        sizes = (WIDTH, HEADS, packed, leaves[0], None, None, False, dropout, leaves[1], out_bias)
        made = [t for t in function(query, key, value, *sizes, **given) if t is not None]
        return [*made, *torch.autograd.grad(sum(t.sin().sum() for t in made), leaves)]

    both = (False, True)
    for weights, average, padded, dropout in itertools.product(both, both, (None, padding), (0.0, 0.4)):
        options = {"need_weights": weights, "average_attn_weights": average, "key_padding_mask": padded}
        got = run(multi_head_attention, dropout, options)
        want = run(F.multi_head_attention_forward, dropout, options)
        for one, other in zip(got, want, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


class Attended(nn.Module):
    """nn.MultiheadAttention between a norm and a residual sum."""

    def __init__(self, call: dict[str, Any], **options: Any) -> None:
        super().__init__()
        self.call, self.norm = call, nn.LayerNorm(24)
        self.attention = nn.MultiheadAttention(24, 4, batch_first=True, **options)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        y = self.norm(x)
        made, weights = self.attention(y, y, y, **self.call)
        return x + made, weights


TOKENS = torch.zeros(2, 4, 24, dtype=torch.float64)
MODULES: dict[str, Callable[[], nn.Module]] = {
    "weights": lambda: Attended({}),
    "weights per head": lambda: Attended({"average_attn_weights": False}),
    "padding": lambda: Attended({"need_weights": False, "key_padding_mask": PADDED}),
    "mask per head": lambda: Attended({"need_weights": False, "attn_mask": MASK_PER_HEAD}),
    "no bias": lambda: Attended({"need_weights": False}, bias=False),
    "layers": lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(24, 4, 48, batch_first=True), 2),
}
MASK_PER_HEAD = r(8, 4, 4)


def _inferred(dense: nn.Module, x: Tensor, made: Plan) -> Any:
    """Without gradients, where torch's layers would hand all their weights to one kernel."""
    with torch.no_grad():
        return parallelize(copy.deepcopy(dense), made)(x)


@pytest.mark.parametrize(
    ("name", "tp"), [*((name, 2) for name in MODULES), ("weights", 3), ("mask per head", 3), ("layers", 4)]
)
def test_attention_modules_are_split_by_heads(name: str, tp: int) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return MODULES[name]().double().eval()

    made = plan(build(), (TOKENS,), tp=tp, phase="train")
    report = verify(build, (TOKENS,), made)
    assert report.ok(), report.explain()
    assert made.sharded_fraction == 1.0, made.unsplit
    dense, x = build(), r(3, 4, 24) if "mask" not in name and name != "padding" else r(2, 4, 24)  # another batch
    with torch.no_grad():
        want = dense(x)
    for got in run_ranks(_inferred, tp, "simulated", (dense, x, made)):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_what_cannot_be_written_out_stays_one_call() -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return Attended({}, add_bias_kv=True).double()

    made = plan(build(), (TOKENS,), tp=2, phase="train")
    report = verify(build, (TOKENS,), made)
    assert report.ok(), report.explain()
    assert made.sharded_fraction == 0.0
