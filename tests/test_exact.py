"""Plans are optimal, deterministic, blind to names, and have the field's own numbers of reductions."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
from plain_models import IDS, Decoder
from plan_ilp import PlanIlp

from colrow.cost_models.hardware import load_hardware
from colrow.planner import Plan, plan
from colrow.planner.expressions import can_edit
from colrow.planner.factor_graph import evaluate
from colrow.planner.formulation import Formulation, Options, formulate
from colrow.planner.plan_file import dumps
from colrow.planner.pricing import Phase, Pricing
from colrow.planner.solver import solve
from colrow.planner.sources import load_source
from colrow.planner.trace import trace

TESTS = Path(__file__).parent


def small(model_type: str, phase: Phase, tp: int = 2) -> Formulation:
    source = load_source(f"hf:{model_type}", phase=phase, small=True, seq=16, batch=2, dtype="fp32")
    graph = trace(source.model, source.example_inputs)
    return formulate(graph, Pricing(load_hardware("h100-sxm"), tp, phase), Options(editable=can_edit))


@pytest.mark.parametrize("phase", ["train", "prefill"])
@pytest.mark.parametrize("model_type", ["llama", "gpt_neox", "gpt2", "mixtral", "t5"])
def test_an_integer_program_of_the_same_graph_costs_the_same(model_type: str, phase: Phase) -> None:
    formulation = small(model_type, phase)
    solution = solve(formulation.problem)
    assert solution.proven and solution.lower_bound == solution.cost
    assert evaluate(formulation.problem, solution.assignment) == solution.cost
    assert PlanIlp(formulation).solve() == solution.cost


def test_awkward_sizes_agree_too() -> None:
    formulation = small("llama", "train", tp=3)
    assert PlanIlp(formulation).solve() == solve(formulation.problem).cost


def test_the_integer_program_would_notice_a_cheaper_or_dearer_table() -> None:
    """One entry of one table changed by one picosecond is seen."""
    formulation = small("gpt_neox", "train")
    solution, found = solve(formulation.problem), PlanIlp(formulation).solve()
    wide = next(f for f in formulation.problem.factors if f.table.ndim > 1)
    dearer = wide._replace(table=wide.table + 1)
    factors = tuple(dearer if f is wide else f for f in formulation.problem.factors)
    assert solve(replace(formulation.problem, factors=factors)).cost == solution.cost + 1 != found


def test_forbidding_what_the_plan_chose_costs_more() -> None:
    """The optimum is strict where it should be: pinned to rows where columns are cheapest, a plan is no faster."""
    free = plan(Decoder(), IDS, tp=2, phase="train")
    assert free.layers["blocks.1.mlp.up"] == "column" and free.layers["blocks.1.mlp.down"] == "row"
    pinned = plan(Decoder(), IDS, tp=2, phase="train", pin={"blocks.1.mlp.up": "row"})
    assert pinned.layers["blocks.1.mlp.up"] == "row"
    assert pinned.cost.total_s > free.cost.total_s


PRINT = """
import sys; sys.path.insert(0, sys.argv[1])
from plain_models import IDS, Decoder
from colrow.planner import plan
from colrow.planner.plan_file import dumps
sys.stdout.write(dumps(plan(Decoder(), IDS, tp=2, phase="train")))
"""


def test_the_same_input_gives_the_same_bytes_in_every_process() -> None:
    here = dumps(plan(Decoder(), IDS, tp=2, phase="train"))
    assert here == dumps(plan(Decoder(), IDS, tp=2, phase="train"))
    there = subprocess.run(
        [sys.executable, "-c", PRINT, str(TESTS)],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
        env={"PYTHONHASHSEED": "12345", "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
    )
    assert there.stdout == here


NAMES = {
    "Norm": "Zebra", "Attention": "Aardvark", "Mlp": "Lemur", "Block": "Ibex", "Decoder": "Yak",
    "gate": "zz", "up": "head", "down": "q_proj", "first": "row", "second": "column", "attention": "mlp2",
    "mlp": "attn9", "embed": "lm_head", "head": "wte", "norm": "dropout1", "blocks": "a_list",
    "q": "out", "k": "gate_up", "v": "fc", "o": "aa", "weight": "gamma", "index": "number",
}  # fmt: skip


def renamed(tmp_path: Path) -> ModuleType:
    """The plain models with other names for every class, module, attribute and parameter."""
    text = (TESTS / "plain_models.py").read_text()
    text = text.replace("self.head.weight = self.embed.weight", "self.head.__WEIGHT__ = self.embed.__WEIGHT__")
    text = re.sub(r"\bself\.(\w+)", lambda m: f"self.{NAMES.get(m[1], m[1])}", text)
    text = re.sub(r"\b(Norm|Attention|Mlp|Block|Decoder)\b", lambda m: NAMES[m[1]], text)
    path = tmp_path / "other_models.py"
    path.write_text(text.replace("__WEIGHT__", "weight"))
    spec = importlib.util.spec_from_file_location("other_models", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def nameless(planned: Plan) -> dict[str, object]:
    """A plan without its names."""
    return {
        "parameters": [
            (p.placement, p.shape, p.is_weight, replace(p.edit, fqn="")) for p in planned.parameters
        ],
        "calls": [sorted(str(edit) for edit in schedule.edits.calls.values()) for schedule in planned.schedules],
        "reads": [(len(s.edits.partial), len(s.edits.lifted)) for s in planned.schedules],
        "collectives": [(c.kind, c.nbytes, c.direction, c.category, c.ps) for c in planned.collectives],
        "cost": planned.cost,
        "memory": planned.memory_bytes,
        "unsplit": [(nbytes, reason) for _, nbytes, reason in planned.unsplit],
    }  # fmt: skip


@pytest.mark.parametrize("tied", [False, True])
def test_names_decide_nothing(tied: bool, tmp_path: Path) -> None:
    mine, other = Decoder(2, tied), renamed(tmp_path).Yak(2, tied)
    names = {name for name, _ in mine.named_parameters()}, {name for name, _ in other.named_parameters()}
    assert not names[0] & names[1]
    plans = [nameless(plan(model, IDS, tp=2, phase="train")) for model in (mine, other)]
    for part in plans[0]:
        assert plans[0][part] == plans[1][part], part


# model type -> per kind of block: all-reduces of its activations, forward and backward (Shoeybi et al. 2019, section 3:
# two and two; in parallel attention and MLP one and one; a decoder with cross-attention three and three).
REDUCTIONS = {
    "gpt_neox": {"gpt_neox.layers": (1, 1)},
    "llama": {"model.layers": (2, 2)},
    "gpt2": {"transformer.h": (2, 2)},
    "bert": {"bert.encoder.layer": (2, 2)},
    "opt": {"model.decoder.layers": (2, 2)},
    "vit": {"vit.layers": (2, 2)},
    "phi3": {"model.layers": (2, 2)},
    "mixtral": {"model.layers": (2, 2)},
    "olmo2": {"model.layers": (2, 2)},
    "t5": {"encoder.block": (2, 2), "decoder.block": (3, 3)},
}


@pytest.mark.parametrize("model_type", REDUCTIONS)
def test_reductions_per_block_of_default_configurations(model_type: str) -> None:
    source = load_source(f"hf:{model_type}", phase="train")
    planned = plan(source.model, source.example_inputs, tp=8, phase="train", memory_gb=1000)
    inside = [c for c in planned.collectives if c.block and c.category == "block"]
    assert {c.kind for c in inside} == {"all_reduce"}
    for blocks, expected in REDUCTIONS[model_type].items():
        for direction, number in zip(("forward", "backward"), expected, strict=True):
            found = Counter(c.block for c in inside if c.direction == direction and c.block.startswith(f"{blocks}."))
            assert max(found.values()) == number
            # the first block's input gradient may be left to the embedding
            assert Counter(found.values())[number] >= len(found) - (direction == "backward")
    statistics = Counter(c.direction for c in planned.collectives if c.category == "statistic")
    layers = len({c.block for c in inside})
    assert statistics == ({"forward": 2 * layers, "backward": 2 * layers} if model_type == "olmo2" else {})
    outside = [c for c in planned.collectives if not c.block and c.category == "block"]
    assert len(outside) == (model_type == "t5")  # the gradient of the encoder's output, from all decoder blocks
    assert planned.cost.proven
    assert planned.sharded_fraction > 0.99
    assert all(reason for _, _, reason in planned.unsplit)
    split = {p.edit.fqn for p in planned.parameters if p.is_weight and p.placement != "replicated"}
    named = {fqn for fqn, _, _ in planned.unsplit}
    assert split | named == {p.edit.fqn for p in planned.parameters if p.is_weight}
    assert all(p.is_meta for p in source.model.parameters())
