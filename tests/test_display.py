"""A plan as people read it: everything the plan says is on the page, at 80 columns too."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from changed_plans import with_schedule
from rich.console import Console
from small_plans import all_reduce, small_plan

from colrow.rewrite import display, units

GOLDEN = """\
Small on 2 ranks of h100-sxm
  train: ids int64 [2, 16], x float32 [2, 5, 8], scale=0.5
  sequence split where ids.shape[1] % 2 == 0 and x.shape[2] == 8; elsewhere whole: 16.0 us a step
  predicted step: 14.0 us = 4.10 us compute + 9.90 us communication (71%)
  proven optimal: no plan in the stated space takes less predicted time
  93.22% of the matmul, embedding and expert bytes are split
  digest DIGEST

Outside the blocks
  parameter       placement   shape   per rank
  embed.weight    vocab       32 x 8  16 x 8
  kv.weight       column      4 x 8   4 x 8     shared by ranks
  odd.weight      column      6 x 8   4 x 8     padded
  router.weight   replicated  4 x 8   4 x 8
  lm_head.weight  vocab       32 x 8  16 x 8    is embed.weight

  collective          bytes     time  after    forced by
  forward
    reduce_scatter  1.02 kB  2.00 us  embed    layer_norm in layers.0.norm  [embedding]
    all_gather      4.10 kB  2.00 us  lm_head  the model's output  [head]

layers.{0-2}  (3 equal blocks)
  parameter        placement   shape   per rank
  attn.qkv.weight  column      16 x 8  8 x 8     each of 8 + 4 + 4
  attn.o.weight    row         8 x 8   8 x 4
  attn.o.bias      replicated  8       8         added on rank 0
  norm.weight      replicated  8       8         gradient summed

  blocks 0-1:
  collective      bytes     time  after     forced by
  forward
    all_reduce  1.02 kB  2.00 us  attn.o    add in the next block's norm
  backward
    all_reduce  1.02 kB  2.00 us  norm      gradient of linear in norm
    all_reduce     32 B   500 ns  (itself)  partial gradients of replicated parameters  [parameter gradient]

  block 2:
  collective      bytes     time  after     forced by
  forward
    all_reduce  1.02 kB  2.00 us  attn.o    layer_norm in norm
  backward
    all_reduce  1.02 kB  2.00 us  norm      gradient of linear in norm
    all_reduce     32 B   500 ns  (itself)  partial gradients of replicated parameters  [parameter gradient]

Collectives of one step
  category            collective      direction  count    bytes     time
  embedding           reduce_scatter  forward        1  1.02 kB  2.00 us
  block               all_reduce      forward        3  3.07 kB  6.00 us
  head                all_gather      forward        1  4.10 kB  2.00 us
  block               all_reduce      backward       3  3.07 kB  6.00 us
  parameter gradient  all_reduce      backward       3     96 B  1.50 us
  all                                 forward        5  8.19 kB  10.0 us
  all                                 backward       6  3.17 kB  7.50 us

Memory per rank
  kind         bytes
  weights    4.10 kB
  gradients  4.10 kB
  all        8.19 kB  of 80 GB

Not split
  parameter      bytes  reason
  router.weight  128 B  pinned

Findings
  - operator without a rule, its operands are replicated: foo (3x)
  for layers.{0-2}:
    - seen in layers.{i}
"""


def shown(plan, width=None):
    stream = io.StringIO()
    console = units.console(stream) if width is None else Console(file=stream, width=width, markup=False)
    console.print(display.render(plan))
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines()) + "\n"


def test_golden():
    assert shown(small_plan()) == GOLDEN.replace("DIGEST", small_plan().digest[:16])


def test_plain_text_where_there_is_no_terminal():
    stream = io.StringIO()
    units.console(stream).print(display.render(small_plan()))
    assert "\x1b" not in stream.getvalue()


def test_it_fits_80_columns():
    text = shown(small_plan(), width=80)
    assert max(map(len, text.splitlines())) <= 80
    joined = "".join(text.split())
    for fact in ("layers.{0-2}", "attn.qkv.weight", "8+4+4", "1.02kB", "layer_norminnorm", "[parametergradient]"):
        assert fact in joined


def test_brackets_are_text_not_markup():
    assert "read by [bold]x[/bold]" in shown(small_plan(findings=("read by [bold]x[/bold]",)))


def test_an_open_proof_shows_its_gap():
    plan = small_plan()
    text = shown(replace(plan, cost=replace(plan.cost, proven=False, lower_bound_s=10e-6)))
    assert "NOT proven optimal: the lower bound is 10.0 us, a gap of 40.00%" in text


def test_a_backward_pass_that_nobody_asked_for_says_so():
    plan = small_plan()
    prefill = with_schedule(plan, workload=replace(plan.workloads[0], phase="prefill"))
    assert "backward, if trained" in shown(prefill)
    assert "backward, if trained" not in shown(plan)


def test_nothing_left_whole_is_said():
    assert "nothing: every matmul, embedding and expert weight is split" in shown(small_plan(unsplit=()))


def test_a_hardware_file_that_is_gone_is_no_error():
    assert "8.19 kB\n" in shown(small_plan(hardware="my-machine"))


def test_the_cap_asked_for_is_the_limit():
    assert "of 40 GB" in shown(small_plan(options={"memory_gb": 40}))


def test_what_the_model_itself_makes_is_named():
    gradients = all_reduce("", "", "partial gradients of replicated parameters", direction="backward")
    assert "(model)" in shown(with_schedule(small_plan(), collectives=(gradients,)))


def test_a_statistic_is_marked():
    statistic = all_reduce("layers.0", "layers.0.norm", "add in layers.0.norm", category="statistic", nbytes=64)
    assert "add in norm  [statistic]" in shown(with_schedule(small_plan(), collectives=(statistic,)))


def decoding(plan, phase="decode"):
    """The plan with a second workload."""
    first = plan.schedules[0]
    workload = replace(first.workload, name=f"{phase}:short", phase=phase, context=64, weight=0.5)
    collectives = tuple(replace(c, workload=workload.name, ps=3_000_000) for c in first.collectives)
    cost = replace(first.cost, total_s=20e-6)
    other = replace(first, workload=workload, collectives=collectives, cost=cost, lengths=())
    return replace(plan, schedules=(*plan.schedules, other), cost=replace(plan.cost, total_s=38e-6))


def test_each_workload_has_its_inputs_cost_and_collectives():
    text = shown(decoding(small_plan()))
    heading = [line for line in text.partition("\n\n")[0].splitlines() if "digest" not in line]
    assert [line.partition("=")[0].rstrip() for line in heading[1:-1]] == [
        "  train: ids int64 [2, 16], x float32 [2, 5, 8], scale",
        "    weight 2, predicted step: 14.0 us",
        "    sequence split where ids.shape[1] % 2",
        "  decode:short: ids int64 [2, 16], x float32 [2, 5, 8], scale",
        "    weight 0.5, predicted step: 20.0 us",
        "    sequence not split",
        "  weighted sum of the predicted steps: 38.0 us",
        "  proven optimal: no plan in the stated space takes less predicted time",
    ]
    parts = {part.partition("\n")[0]: part for part in text.split("\n\n")}
    totals = [parts[f"Collectives of one step of {name}"] for name in ("train", "decode:short")]
    assert ["all", "forward", "5", "8.19", "kB", "10.0", "us"] in [line.split() for line in totals[0].splitlines()]
    assert ["all", "forward", "5", "8.19", "kB", "15.0", "us"] in [line.split() for line in totals[1].splitlines()]
    assert "  train, forward\n" in text and "  decode:short, forward\n" in text


def test_with_training_only_its_backward_pass_is_shown():
    text = shown(decoding(small_plan()))
    assert "train, backward\n" in text and "decode:short, backward" not in text
    (totals,) = [part for part in text.split("\n\n") if part.startswith("Collectives of one step of decode:short")]
    counted = [line.split()[:4] for line in totals.splitlines()]
    assert ["block", "all_reduce", "forward", "3"] in counted
    assert [line for line in counted if "backward" in line] == [["all", "backward", "0", "0"]]
    train = small_plan()
    prefill = replace(decoding(train), schedules=decoding(train).schedules[2:])
    assert "backward, if trained\n" in shown(prefill)


def test_a_sequence_that_was_asked_to_be_split_and_is_not():
    plan = small_plan()
    whole = replace(plan, schedules=(replace(plan.schedules[1], stands_in=False),))
    assert "  sequence not split\n" in shown(whole)
    assert "sequence" not in shown(replace(whole, options={**plan.options, "sequence_parallel": False}))


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 s"), (1.5e-9, "1.50 ns"), (16.8e-6, "16.8 us"), (0.0199, "19.9 ms"), (2.5, "2.50 s"), (250, "250 s")],
)
def test_seconds(value, text):
    assert units.seconds(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0 B"), (999, "999 B"), (16777216, "16.8 MB"), (80e9, "80.0 GB"), (2e12, "2.00 TB")]
)
def test_bytes(value, text):
    assert units.nbytes(value) == text
