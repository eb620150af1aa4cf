"""Sequence parallelism: right, each all_reduce a reduce_scatter and an all_gather, and what stands in where a length
does not divide."""

from __future__ import annotations

import copy
import math
from collections import Counter
from dataclasses import replace
from functools import cache

import pytest
import torch
from changed_plans import with_edits
from plain_models import HIDDEN, VOCAB, Block, Decoder, Norm
from right_models import source_of
from torch import nn

from colrow.cost_models.errors import RankError, UsageError
from colrow.planner import Plan, plan
from colrow.planner.edits import ForwardEdits
from colrow.planner.layout import Layout, balanced
from colrow.planner.placement import WHOLE, Shard
from colrow.planner.plan_model import PlannedCost, Schedule
from colrow.planner.random_weights import randomize
from colrow.planner.sequence import is_elastic, is_read, keeps_tokens, sequence_splits, works_on_tokens
from colrow.planner.sources import source_from_config
from colrow.planner.trace import trace
from colrow.planner.workloads import Length, Workload, required_lengths
from colrow.rewrite.comparison import error_of
from colrow.rewrite.counting import fixed_loss, recorded_collectives
from colrow.rewrite.generation import compare_generation
from colrow.rewrite.parallel import parallelize, spec_of
from colrow.rewrite.ranks import run_ranks
from colrow.rewrite.schedules import Running, chosen
from colrow.rewrite.storage import as_dense
from colrow.rewrite.verification import named_tensors, verify

TOLERANCE = {"llama": 1e-5, "olmo2": 1e-5, "mixtral": 1e-5, "t5": 1e-5}  # they compute norms in float32
NAMES = ["llama", "gpt2", "bert", "olmo2", "opt", "mixtral", "t5", "gpt_neox"]
IDS = {"ids": torch.arange(12).reshape(2, 6) % VOCAB}


@cache
def planned(name: str, tp: int = 2, labels: bool = False):
    source = source_of(name, "train", labels)
    return source, plan(source.model, source.example_inputs, tp=tp, phase="train", sequence_parallel=True)


def kinds(collectives) -> Counter:
    """Of activations and what is returned: not of statistics, whose size does not depend on the hidden size."""
    return Counter((c.direction, c.kind) for c in collectives if c.category not in ("statistic", "parameter_gradient"))


# ---- numbers and counts


@pytest.mark.parametrize(
    ("name", "tp", "labels"),
    [*((name, 2, name in ("llama", "t5")) for name in NAMES), ("gpt2", 3, True), ("llama", 4, False)],
)
def test_right_with_a_reduce_scatter_and_an_all_gather_for_each_all_reduce(name, tp, labels, tmp_path):
    source, made = planned(name, tp, labels)
    split, whole = made.schedules
    assert split.lengths and whole.stands_in and split.workload == whole.workload
    on, off = kinds(split.collectives), kinds(whole.collectives)
    replaced = off["forward", "all_reduce"] - on["forward", "all_reduce"]
    assert replaced >= 2 - (name == "gpt_neox")
    assert on["forward", "reduce_scatter"] == on["backward", "all_gather"] == replaced
    assert on["forward", "all_gather"] == off["forward", "all_gather"] + replaced
    assert not off["forward", "reduce_scatter"]
    assert made.count("all_reduce") == 0  # of any block's activations, forward or backward
    assert made.sharded_fraction >= 0.9

    report = verify(source.build, source.example_inputs, made)
    assert report.ok(), report.explain()
    assert report.collectives_planned == report.collectives_executed
    assert report.gradient_errors and len(report.trainings) == 2

    made.save(tmp_path / "plan.json")
    back = Plan.load(tmp_path / "plan.json")
    assert back == made and back.digest == made.digest
    moves = [m for edit in split.edits.calls.values() for m in (edit.result, *(m for _, m in edit.arguments)) if m]
    assert any(m.layout is not None and m.layout.elastic for m in moves)


def test_no_more_all_reduces_stand_in_than_a_plan_without_has():
    for name in ("llama", "gpt2"):
        source, made = planned(name)
        without = plan(source.model, source.example_inputs, tp=2, phase="train")
        stand_in = kinds(made.schedules[1].collectives)
        assert stand_in["forward", "all_reduce"] <= kinds(without.collectives)["forward", "all_reduce"]
        assert made.schedules[1].cost.total_s >= without.cost.total_s * (1 - 1e-9)


def test_auto_is_never_slower_than_either():
    costs = {
        policy: plan(Decoder(2), IDS, tp=2, phase="train", sequence_parallel=policy).cost
        for policy in (False, True, "auto")
    }
    assert all(cost.proven for cost in costs.values())
    assert costs["auto"].total_s <= min(costs[False].total_s, costs[True].total_s) * (1 + 1e-9)


def test_auto_splits_long_sequences_and_leaves_short_ones():
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.up = nn.LayerNorm(4096), nn.Linear(4096, 16384)
            self.down = nn.Linear(16384, 4096)

        def forward(self, x):
            return x + self.down(torch.relu(self.up(self.norm(x))))

    def model():
        with torch.device("meta"):
            return nn.Sequential(*(Wide() for _ in range(3)))

    made = {
        seq: plan(
            model(), (torch.empty(1, seq, 4096, device="meta"),), tp=8, hardware="a100-sxm", sequence_parallel="auto"
        )
        for seq in (8, 8192)
    }
    assert [len(made[8].schedules), len(made[8192].schedules)] == [1, 2]


def test_one_token_has_nothing_to_split():
    made = plan(Decoder(2), {"ids": IDS["ids"][:, :1]}, tp=2, phase="decode", sequence_parallel=True)
    assert [s.lengths for s in made.schedules] == [()] and made.count("all_reduce", "forward") == 4


def test_a_length_that_does_not_divide_is_planned_whole():
    made = plan(Decoder(2), {"ids": IDS["ids"][:, :5]}, tp=2, phase="train", sequence_parallel=True)
    assert [s.lengths for s in made.schedules] == [()] and made.count("all_reduce", "forward") == 4


# ---- other lengths


def run_dense(dense, inputs, backward):
    return run_one(copy.deepcopy(dense), inputs, backward)


def run_one(model, inputs, backward):
    with torch.set_grad_enabled(backward), recorded_collectives() as recorder:
        outputs = model(**inputs)
        if backward:
            loss = fixed_loss(outputs)
            recorder.direction = "backward"
            loss.backward()
    return dict(named_tensors(outputs)), [(c.direction, c.kind) for c in recorder.found]


def whole_gradient(made):
    """A parameter's gradient as the dense model has it."""
    specs = {p.edit.fqn: spec_of(p.edit, made.schedules[0].edits) for p in made.parameters}
    return lambda name, gradient: as_dense(gradient, specs[name]).full_tensor().clone()


def inputs_of(name, batch, length):
    ids = torch.randint(1, 20, (batch, length), generator=torch.Generator().manual_seed(length))
    found = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return found | ({"decoder_input_ids": ids.flip(1)} if name == "t5" else {})


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "mixtral", "t5"])
def test_every_length_and_batch_is_right(name):
    """Through the schedule that splits where it can, else through the one that stands in: by what was executed."""
    source, made = planned(name)
    dense = randomize(source.build().double()).eval()
    calls = [
        (inputs_of(name, batch, length), backward, which)
        for batch, length, backward, which in (
            (2, 12, True, 0), (2, 13, True, 1), (3, 1, False, 1), (1, 7, False, 1), (5, 8, False, 0), (1, 30, True, 0),
        )
    ]  # fmt: skip
    if name == "t5":  # one of two sequences divides
        ids = torch.ones(2, 12, dtype=torch.int64)
        other = {"input_ids": ids, "attention_mask": ids, "decoder_input_ids": ids[:, :5]}
        calls.append((other, True, 1))
    true = [run_dense(dense, inputs, backward)[0] for inputs, backward, _ in calls]

    def on_rank():
        local = parallelize(copy.deepcopy(dense), made)
        return [run_one(local, inputs, backward) for inputs, backward, _ in calls]

    for found in run_ranks(on_rank, made.tp):
        for (outputs, executed), expected, (inputs, backward, which) in zip(found, true, calls, strict=True):
            errors = {path: error_of(outputs[path], value) for path, value in expected.items()}
            assert outputs.keys() == expected.keys()
            assert max(errors.values()) <= TOLERANCE.get(name, 1e-9), (which, errors)
            of_plan = made.schedules[which].collectives
            wanted = [(c.direction, c.kind) for c in of_plan if backward or c.direction == "forward"]
            assert Counter(executed) == Counter(wanted), inputs["input_ids"].shape


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bert"])
def test_gradients_of_every_length_are_right(name):
    source, made = planned(name)
    dense = randomize(source.build().double()).eval()

    def gradients(model, length, full):
        model.zero_grad()
        fixed_loss(model(**inputs_of(name, 2, length))).backward()
        return {n: full(n, p.grad) for n, p in model.named_parameters() if p.grad is not None}

    lengths = (13, 12, 1)
    true = [gradients(copy.deepcopy(dense), length, lambda _, g: g) for length in lengths]
    largest = [max(float(g.abs().max()) for g in of_length.values()) for of_length in true]

    def on_rank():
        local = parallelize(copy.deepcopy(dense), made)
        return [gradients(local, length, whole_gradient(made)) for length in lengths]

    for found in run_ranks(on_rank, made.tp):
        for of_length, expected, size in zip(found, true, largest, strict=True):
            assert of_length.keys() == expected.keys()
            for name_, gradient in expected.items():
                if float(gradient.abs().max()) > 1e-3 * size:
                    assert error_of(of_length[name_], gradient) <= TOLERANCE.get(name, 1e-9), name_


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "t5"])
@pytest.mark.parametrize("length", [12, 7])
def test_the_same_tokens_are_generated_with_the_cache(name, length):
    source, made = planned(name)

    def build():
        model = source.build()
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0
        if model.config.is_encoder_decoder:
            model.generation_config.decoder_start_token_id = 0
        return model

    inputs = {n: v for n, v in inputs_of(name, 2, length).items() if n != "decoder_input_ids"}
    report = compare_generation(build, inputs, made, tokens=9)
    assert report.ok(1e-5), report
    assert report.num_compared == 18 or report.num_flips


def test_the_prompt_is_split_and_each_further_token_is_not():
    source, made = planned("llama")
    dense = randomize(source.build().double()).eval()

    def on_rank():
        local = parallelize(copy.deepcopy(dense), made)
        found, cache_ = [], None
        ids = inputs_of("llama", 2, 17)["input_ids"]
        for part in (ids[:, :12], ids[:, 12:13], ids[:, 13:17]):
            past = 0 if cache_ is None else cache_.get_seq_length()
            mask = torch.ones(2, past + part.shape[1], dtype=torch.int64)
            with torch.no_grad(), recorded_collectives() as recorder:
                out = local(input_ids=part, attention_mask=mask, use_cache=True, past_key_values=cache_)
            cache_ = out.past_key_values
            found.append((out.logits, {c.kind for c in recorder.found}))
        return found

    with torch.no_grad():
        whole = dense(input_ids=inputs_of("llama", 2, 17)["input_ids"]).logits
    for (first, split), (second, one), (third, chunk) in run_ranks(on_rank, made.tp):
        assert error_of(torch.cat([first, second, third], 1), whole) <= 1e-5
        assert "reduce_scatter" in split and "all_reduce" not in split
        assert "all_reduce" in one and "reduce_scatter" not in one
        assert ("reduce_scatter" in chunk) != ("all_reduce" in chunk)


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_gradient_checkpointing(name):
    source, made = planned(name)
    dense = randomize(source.build().double())
    for module in dense.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for part in (dense, *dense.modules()):
        config = getattr(part, "config", None)
        for field in ("attention_dropout", "attn_pdrop", "dropout_rate"):
            if hasattr(config, field):
                setattr(config, field, 0.0)
        if isinstance(getattr(part, "dropout", None), float):
            part.dropout = 0.0

    def gradients(model, full, length=12):
        model.gradient_checkpointing_enable()
        model.train()
        fixed_loss(model(**inputs_of(name, 2, length), use_cache=False)).backward()
        return {n: full(n, p.grad) for n, p in model.named_parameters()}

    def plainly(model, length=12):
        fixed_loss(model.train()(**inputs_of(name, 2, length), use_cache=False)).backward()
        return {n: p.grad for n, p in model.named_parameters()}

    for length in (12, 13):
        true = plainly(copy.deepcopy(dense), length)
        largest = max(float(g.abs().max()) for g in true.values())

        def on_rank(length=length):
            return gradients(parallelize(copy.deepcopy(dense), made), whole_gradient(made), length)

        for found in run_ranks(on_rank, made.tp):
            compared = [n for n, true_ in true.items() if float(true_.abs().max()) > 1e-3 * largest]
            assert len(compared) > len(true) / 2
            assert max(error_of(found[n], true[n]) for n in compared) <= TOLERANCE.get(name, 1e-9)


def test_after_calls_that_fail():
    """The schedule that takes any lengths is back; a block by itself passes slices and is refused."""
    made = plan(Decoder(2), IDS, tp=2, phase="train", sequence_parallel=True)
    dense = randomize(Decoder(2).double())
    x = torch.randn(2, 5, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def on_rank():
        local = parallelize(copy.deepcopy(dense), made)
        with pytest.raises((RuntimeError, IndexError)):
            local(torch.full((2, 6), VOCAB + 5))
        with pytest.raises(UsageError, match="Block was called by itself, and in this plan it passes slices"):
            local.blocks[0](x)
        return local(IDS["ids"])

    for model in run_ranks(on_rank, 2):
        assert error_of(model.detach(), dense(IDS["ids"]).detach()) <= 1e-9


def elastic_edits():
    made = plan(Decoder(2), IDS, tp=2, phase="train", sequence_parallel=True)

    def is_split(move):
        return move is not None and move.layout is not None and move.layout.elastic

    found = []
    for site, edit in made.schedules[0].edits.calls.items():
        if is_split(edit.result):
            found.append((site, replace(edit, result=None)))
        for n, (_, move) in enumerate(edit.arguments):
            if is_split(move):
                found.append((site, replace(edit, arguments=edit.arguments[:n] + edit.arguments[n + 1 :])))
    return made, found


def test_a_plan_with_one_elastic_move_less_is_refused():
    made, found = elastic_edits()
    assert len(found) >= 8
    for site, without in found:
        broken = with_edits(made, calls={**made.schedules[0].edits.calls, site: without})
        with pytest.raises(RankError, match=r"not what its layouts need|not exact for this model|planned"):
            run_ranks(lambda broken=broken: parallelize(Decoder(2), broken), 2)


# ---- planner/sequence.py


def elastic(length: int, dim: int = 1, ranks: int = 2) -> Shard:
    return Shard(dim, Layout(balanced(length, ranks).segments, elastic=True))


def graph_of(model: nn.Module, inputs) -> object:
    return trace(model, inputs)


def test_values_between_blocks_may_be_split_where_their_length_divides():
    graph = trace(Decoder(2), IDS)
    assert sequence_splits(graph, 2) == {(2, 6, HIDDEN): elastic(6)}
    assert sequence_splits(graph, 3) == {(2, 6, HIDDEN): elastic(6, ranks=3)}
    assert sequence_splits(graph, 4) == {}
    assert sequence_splits(trace(Decoder(2), {"ids": IDS["ids"][:, :1]}), 1) == {}


def test_what_is_elastic():
    assert is_elastic(elastic(6))
    assert not is_elastic(Shard(1, balanced(6, 2)))
    assert not is_elastic(WHOLE) and not is_elastic((elastic(6),))


def test_a_length_that_the_code_reads_is_noticed():
    class Reads(nn.Module):
        def forward(self, x):
            made = torch.relu(x)
            return made * made.shape[1], torch.sigmoid(x)

    graph = trace(Reads(), {"x": torch.zeros(2, 6, 4)})
    (read,) = [n for n in graph.nodes if n.op == "relu"]
    assert is_read(read, elastic(6)) and not is_read(read, elastic(4, dim=2))
    (other,) = [n for n in graph.nodes if n.op == "sigmoid"]
    assert not is_read(other, elastic(6)) and not is_read(read, Shard(1, balanced(6, 2)))


def test_which_operators_keep_tokens():
    graph = trace(Decoder(1), IDS)
    by_op = {n.op: n for n in graph.nodes if n.op != "add" or len(n.operands) == 2}
    assert works_on_tokens(by_op["add"]) and works_on_tokens(by_op["mean"])
    for op in ("linear", "scaled_dot_product_attention", "view"):
        assert op not in by_op or not works_on_tokens(by_op[op])
    add = by_op["add"]
    left, right = add.operands
    assert keeps_tokens(add, {left: elastic(6), right: elastic(6)}, elastic(6))
    assert not keeps_tokens(add, {left: elastic(6), right: elastic(6)}, WHOLE)
    assert keeps_tokens(add, {left: WHOLE, right: WHOLE}, WHOLE)
    linear = by_op["linear"]
    assert not keeps_tokens(linear, {linear.operands[0]: elastic(6)}, elastic(6))


# ---- planner/workloads.py


def lengths_of(model, inputs, split):
    graph = trace(model, inputs)
    shapes = {name: tuple(value.shape) for name, value in inputs.items()}
    workload = Workload("train", "train", tuple((name, "float32", shape) for name, shape in shapes.items()))
    stored = [elastic(n.shape[1]) if split(n) else WHOLE for n in graph.nodes]
    return required_lengths(graph, stored, workload)


def test_lengths_are_asked_of_the_inputs_that_have_them():
    assert lengths_of(Decoder(1), IDS, lambda n: False) == ()
    assert lengths_of(Decoder(1), IDS, lambda n: n.shape == (2, 6, HIDDEN)) == (Length("ids", 1),)


def test_a_sequence_as_long_as_no_input_asks_for_the_planned_lengths():
    class Joins(nn.Module):
        def forward(self, x, y):
            return torch.relu(torch.cat([x, y], 1))

    inputs = {"x": torch.zeros(3, 4, 5), "y": torch.zeros(3, 2, 5)}
    assert lengths_of(Joins(), inputs, lambda n: n.op == "relu") == (
        Length("x", 1, 4), Length("x", 2, 5), Length("y", 1, 2), Length("y", 2, 5),
    )  # fmt: skip


class Folded(nn.Module):
    """Reads one dim of tokens and makes sequences of twelve of it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(VOCAB, HIDDEN), Norm()
        self.blocks = nn.ModuleList(Block(index) for index in range(2))

    def forward(self, ids):
        x = self.embed(ids).view(-1, 6, HIDDEN)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


def test_sequences_that_no_input_has_are_right_for_every_batch():
    ids = torch.arange(24) % VOCAB
    made = plan(Folded(), {"ids": ids}, tp=2, phase="train", sequence_parallel=True)
    dense = randomize(Folded().double())

    def on_rank():
        local = parallelize(copy.deepcopy(dense), made)
        return [local(ids), local(ids[:18])]

    for found in run_ranks(on_rank, 2):
        for value, part in zip(found, (ids, ids[:18]), strict=True):
            assert error_of(value.detach(), dense(part).detach()) <= 1e-9


# ---- rewrite/schedules.py


def schedule(name: str, shape: tuple[int, ...], lengths=(), stands_in: bool = False) -> Schedule:
    workload = Workload(name, name.partition(":")[0], (("ids", "int64", shape),))
    return Schedule(workload, ForwardEdits(), (), PlannedCost(0, 0, 0, 0, True), lengths, stands_in)


EVEN = (Length("ids", 1),)
SCHEDULES = [
    schedule("prefill", (1, 2048), EVEN),
    schedule("prefill", (1, 2048), stands_in=True),
    schedule("decode", (8, 1)),
    schedule("train", (4, 512), EVEN),
    schedule("train", (4, 512), stands_in=True),
]


@pytest.mark.parametrize(
    ("shape", "trains", "index"),
    [
        ((1, 2048), False, 0),
        ((1, 1000), False, 0),
        ((1, 1001), False, 1),
        ((64, 1), False, 2),
        ((1, 1), False, 2),
        ((1, 1), True, 4),
        ((1, 2), True, 3),
        ((1, 2048), True, 3),
    ],
)
def test_the_schedule_of_a_call(shape, trains, index):
    assert chosen(SCHEDULES, {"ids": torch.zeros(shape)}, trains, 2) == index


def test_three_ranks_divide_other_lengths():
    assert [chosen(SCHEDULES, {"ids": torch.zeros(1, n)}, False, 3) for n in (2048, 2049)] == [1, 0]


def test_a_phase_that_was_not_planned_has_the_nearest_of_all():
    without = SCHEDULES[:3]
    assert chosen(without, {"ids": torch.zeros(4, 512)}, True, 2) == 0
    assert chosen(without, {"ids": torch.zeros(4, 1)}, True, 2) == 2


def test_inputs_of_other_names_stand_in():
    assert chosen(SCHEDULES, {"embeds": torch.zeros(1, 2048, 8)}, False, 2) == 1
    assert chosen(SCHEDULES, {}, True, 2) == 4
    assert chosen(SCHEDULES, {"ids": torch.zeros(2048)}, False, 2) == 1


def test_a_planned_length_is_asked_for_exactly():
    exact = [schedule("prefill", (1, 12), (Length("ids", 1, 12),)), schedule("prefill", (1, 12), stands_in=True)]
    assert [chosen(exact, {"ids": torch.zeros(1, n)}, False, 2) for n in (12, 24)] == [0, 1]


def test_outside_a_call_runs_what_takes_any_lengths():
    running = Running(SCHEDULES)
    assert running.index == running.otherwise == 1
    running.index = 0
    assert copy.deepcopy({"hook": running})["hook"] is running
    running.stop()
    assert running.index == 1


def test_every_rank_chooses_alike_by_position_and_by_name():
    made = plan(Decoder(2), (IDS["ids"],), tp=2, phase="train", sequence_parallel=True)
    dense = randomize(Decoder(2).double())

    def on_rank():
        local = parallelize(copy.deepcopy(dense), made)
        found = []
        for call in (lambda ids: local(ids), lambda ids: local(ids=ids)):
            for ids in (IDS["ids"], IDS["ids"][:, :5]):
                with torch.no_grad(), recorded_collectives() as recorder:
                    value = call(ids)
                found.append(
                    (error_of(value, dense(ids).detach()), "reduce_scatter" in {c.kind for c in recorder.found})
                )
        return found

    for found in run_ranks(on_rank, 2):
        assert [split for _, split in found] == [True, False, True, False]
        assert max(error for error, _ in found) <= 1e-9
        assert not math.isnan(sum(error for error, _ in found))


@pytest.mark.parametrize(("heads", "kv_heads", "tp"), [(7, 7, 3), (6, 2, 4), (4, 2, 4), (5, 1, 3)])
def test_awkward_heads_tied_weights_and_an_odd_vocabulary(heads, kv_heads, tp):
    """Padded heads, key heads that ranks share, a tied table of odd length: none of their padding meets a sequence."""
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen2Config(
        hidden_size=8 * heads, intermediate_size=50, num_hidden_layers=2, num_attention_heads=heads,
        num_key_value_heads=kv_heads, vocab_size=257, tie_word_embeddings=True, use_cache=False,
    )  # fmt: skip
    source = source_from_config(config, phase="train", batch=2, seq=12, dtype="fp32")
    made = plan(source.model, source.example_inputs, tp=tp, phase="train", sequence_parallel=True)
    assert made.schedules[0].lengths and made.ties and made.sharded_fraction > 0.9
    report = verify(source.build, source.example_inputs, made)
    assert report.ok(), report.explain()
    assert report.collectives_planned == report.collectives_executed
