"""What plan() refuses, what it honours, and what it reports."""

from __future__ import annotations

import re

import pytest
import torch
from plain_models import HIDDEN, IDS, Decoder, Wide
from torch import Tensor, nn

from colrow.cost_models.errors import ColrowError, LayoutError, MemoryCapError, UsageError
from colrow.planner import plan
from colrow.planner.workloads import example_of


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"tp": 0}, r"^tp: .*got 0, need 1 to 1024"),
        ({"tp": -2}, r"^tp: "),
        ({"tp": True}, r"^tp: "),
        ({"tp": 2.0}, r"^tp: "),
        ({"tp": 4096}, r"^tp: "),
        ({"phase": "training"}, r"^phase: .*got 'training', need prefill, decode or train"),
        ({"replicate": "always"}, r"^replicate: .*need never or auto"),
        ({"sequence_parallel": "on"}, r"^sequence_parallel: unknown policy; got 'on', need False, True or auto"),
        ({"pin": {"head": "diagonal"}}, r"^pin head: .*got 'diagonal'"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_traced(wrong: dict[str, object], message: str) -> None:
    class Untraced(nn.Module):
        def forward(self, ids: Tensor) -> Tensor:
            raise AssertionError("traced")

    arguments = {"tp": 2, **wrong}
    with pytest.raises(UsageError, match=message.replace("'", "'?")):
        plan(Untraced(), IDS, **arguments)  # type: ignore[arg-type]


def test_an_unknown_profile_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ColrowError, match="h100-sxm"):
        plan(Decoder(2), IDS, tp=2, hardware="abacus")


def test_nested_inputs_are_refused() -> None:
    class Takes(nn.Module):
        def forward(self, pair: tuple[Tensor, Tensor]) -> Tensor:
            return pair[0] + pair[1]

    with pytest.raises(UsageError, match="^input pair: nested tensors"):
        plan(Takes(), {"pair": (torch.zeros(2), torch.zeros(2))}, tp=2)


def test_columns_then_rows_and_two_reductions_a_block() -> None:
    made = plan(Decoder(3), IDS, tp=2, phase="train")
    for block in ("blocks.0", "blocks.1", "blocks.2"):
        words = {
            name: made.layers[f"{block}.{name}"] for name in ("attention.q", "attention.o", "mlp.gate", "mlp.down")
        }
        assert list(words.values()) == ["column", "row", "column", "row"]
    assert made.layers["embed"] == made.layers["head"] == "vocab" and made.layers["norm"] == "replicated"
    assert made.count("all_reduce", "forward") == 2 * 3
    assert made.sharded_fraction == 1.0 and not made.unsplit


@pytest.mark.parametrize("word", ["replicated", "row", "column"])
def test_a_pin_is_honoured(word: str) -> None:
    made = plan(Decoder(2), IDS, tp=2, pin={"blocks.*.mlp.up": word})
    assert {made.layers[f"blocks.{n}.mlp.up"] for n in range(2)} == {word}
    assert made.options["pin"] == {"blocks.*.mlp.up": word}
    reasons = {fqn: reason for fqn, _, reason in made.unsplit}
    if word == "replicated":
        assert reasons["blocks.0.mlp.up.weight"] == "pinned" and made.sharded_fraction < 1
    else:
        assert not reasons


def test_a_tied_weight_has_one_layout() -> None:
    made = plan(Decoder(2, tied=True), IDS, tp=2)
    assert made.ties == {"head.weight": "embed.weight"}
    edits = {p.edit.fqn: p.edit for p in made.parameters}
    assert edits["head.weight"].layout == edits["embed.weight"].layout
    assert made.layers["head"] == made.layers["embed"] == "vocab"


def test_one_rank_communicates_nothing() -> None:
    made = plan(Decoder(2), IDS, tp=1, phase="train")
    assert not made.collectives and not made.schedules[0].edits.calls
    assert made.cost.comm_s == 0 and made.cost.compute_s > 0
    assert all(p.local_shape == p.shape for p in made.parameters)


def test_cost_adds_up_and_is_proven() -> None:
    made = plan(Decoder(2), IDS, tp=2, phase="train")
    assert made.cost.total_s == pytest.approx(made.cost.compute_s + made.cost.comm_s)
    assert made.cost.proven and made.cost.lower_bound_s == pytest.approx(made.cost.total_s)
    assert sum(c.ps for c in made.collectives) * 1e-12 == pytest.approx(
        made.cost.forward_comm_s + made.cost.backward_comm_s
    )


WIDE = {"x": torch.zeros(2, 1024)}
MB = 1e-3


def test_a_memory_cap_changes_nothing_where_the_plan_fits() -> None:
    free, capped = plan(Wide(), WIDE, tp=2), plan(Wide(), WIDE, tp=2, memory_gb=5 * MB)
    assert sum(capped.memory_bytes.values()) <= 5e6
    assert capped.cost == free.cost and capped.parameters == free.parameters


def test_a_memory_cap_is_honoured_where_time_alone_would_break_it() -> None:
    """Pure time replicates such small weights; the cap splits them."""
    free = plan(Wide(), WIDE, tp=2, replicate="auto")
    assert free.sharded_fraction == 0 and sum(free.memory_bytes.values()) > 8e6
    capped = plan(Wide(), WIDE, tp=2, replicate="auto", memory_gb=7 * MB)
    assert sum(capped.memory_bytes.values()) <= 7e6
    assert capped.sharded_fraction > 0 and capped.cost.total_s > free.cost.total_s
    assert capped.cost.proven


def test_a_cap_that_nothing_fits_names_the_smallest_tp_that_does() -> None:
    with pytest.raises(MemoryCapError) as caught:
        plan(Wide(), WIDE, tp=2, memory_gb=3 * MB)
    assert re.search(r"need tp >= 4", str(caught.value)) and "--tp 4" in str(caught.value)
    assert sum(plan(Wide(), WIDE, tp=4, memory_gb=3 * MB).memory_bytes.values()) <= 3e6


def test_a_cap_below_every_tp_says_so() -> None:
    with pytest.raises(MemoryCapError, match="No tp up to 128 fits"):
        plan(Wide(), WIDE, tp=2, memory_gb=0.01 * MB)


@torch.library.custom_op("colrow_tests::twice", mutates_args=())
def twice(x: Tensor) -> Tensor:
    """An operator nobody has a rule for."""
    return x * 2


@twice.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def test_an_operator_without_a_rule_is_a_finding_and_its_operands_are_whole() -> None:
    class Strange(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(HIDDEN, 64), nn.Linear(64, HIDDEN)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(twice(self.up(x)))

    made = plan(Strange(), (torch.zeros(2, HIDDEN),), tp=2)
    assert "operator without a rule, its operands are replicated: twice (1x)" in made.findings
    first = next(c for c in made.collectives if c.site == "up")
    assert first.kind in ("all_gather", "all_reduce") and "twice" in first.forced_by
    assert not plan(Decoder(2), IDS, tp=2).findings


def test_a_weight_that_no_rule_can_split_is_named_with_its_reason() -> None:
    class Grouped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv1d(4, 4, 3, groups=2)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)

    made = plan(Grouped(), (torch.zeros(2, 4, 8),), tp=2)
    ((fqn, nbytes, reason),) = made.unsplit
    assert (fqn, nbytes) == ("layer.weight", 4 * 2 * 3 * 4) and reason.startswith("no legal split of it exists")
    assert made.layers["layer"] == "replicated" and made.sharded_fraction == 0


def test_inputs_are_remembered_by_name_dtype_and_shape() -> None:
    made = plan(Decoder(2), IDS, tp=2)
    (workload,) = made.workloads
    assert workload.inputs == (("ids", "int64", (2, 5)),) and workload.phase == "prefill"
    again = example_of(workload)
    assert isinstance(again, dict) and torch.equal(again["ids"], IDS["ids"])
    positional = plan(Decoder(2), (IDS["ids"],), tp=2)
    assert isinstance(example_of(positional.workloads[0]), tuple)
    assert positional.parameters == made.parameters


class Inverse(nn.Module):
    """Its ``mix`` is a matrix that no rule can split."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.out = nn.Parameter(torch.eye(8)), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(x) @ torch.linalg.inv(self.mix)


def test_a_pin_that_no_layout_meets_is_refused() -> None:
    inputs = (torch.ones(2, 8),)
    assert plan(Inverse(), inputs, tp=2).layers["mix"] == "replicated"
    with pytest.raises(LayoutError, match="mix: no exact layout .* pinned to; got replicated, need column"):
        plan(Inverse(), inputs, tp=2, pin={"mix": "column"})


def test_a_pin_of_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match=r"pin blocks\.\*\.mpl: no parameter of the model has such a path"):
        plan(Decoder(2), IDS, tp=2, pin={"blocks.*.mpl": "row"})


@pytest.mark.parametrize("phase", ["prefill", "train"])
def test_single_layers_in_a_row_are_split_in_pairs(phase: str) -> None:
    """Every child of a Sequential is a block; what lies between two layers is no hidden state to be kept whole."""
    pairs = [layer for _ in range(3) for layer in (nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64), nn.ReLU())]
    made = plan(nn.Sequential(*pairs), (torch.zeros(4, 64),), tp=2, phase=phase)
    words = [made.layers[f"{4 * n + at}.weight"] for n in range(3) for at in (0, 2)]
    assert words == ["column", "row"] * 3
    assert (made.count("all_reduce", "forward"), made.count("all_reduce", "backward")) == (3, 2)
    assert not made.count("all_gather", category=None)
