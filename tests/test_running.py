"""colrow run: tokens from a checkpoint on two ranks, torchrun's too; a failing rank ends it with its code."""

import os
import subprocess
import sys
import textwrap
import time

import pytest
import torch
from right_models import source_of

from colrow.cost_models.errors import RankError, UsageError
from colrow.planner.planning import plan
from colrow.planner.sources import load_source
from colrow.rewrite.generation import greedy
from colrow.rewrite.running import run

PROMPT = [5, 6, 7, 300]
TOKENS = 6


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A small Llama in several files, and what the dense model makes of the prompt."""
    folder = tmp_path_factory.mktemp("llama")
    model = source_of("llama", "prefill", dtype="fp32").build()
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder, max_shard_size="100KB")
    inputs = {"input_ids": torch.tensor([PROMPT]), "attention_mask": torch.ones(1, len(PROMPT), dtype=torch.long)}
    return str(folder), greedy(model, inputs, TOKENS).tokens[0].tolist()


def test_a_checkpoint_on_two_ranks(checkpoint, capfd):
    folder, dense = checkpoint
    result = run(folder, tp=2, prompt_ids=PROMPT, tokens=TOKENS)
    assert result.tokens == dense and result.prompt == PROMPT
    assert len(result.uses) == 2
    for use in result.uses:
        assert use.bytes_held < 0.6 * use.bytes_total
        assert 0 < use.bytes_read < 0.6 * use.bytes_stored
        assert use.peak_bytes > use.bytes_held
    assert result.collectives and {direction for _, _, direction in result.collectives} == {"forward"}
    stdout, stderr = capfd.readouterr()
    assert stdout == " ".join(map(str, dense)) + "\n"
    assert "6 tokens on 2 ranks" in stderr
    lines = stderr.splitlines()
    for rank in (0, 1):
        assert any(line.startswith(f"rank {rank} read ") and "peak memory" in line for line in lines), stderr


def test_the_plan_says_how_many_ranks(checkpoint):
    folder, dense = checkpoint
    source = load_source(folder, dtype="fp32", seq=len(PROMPT))
    p = plan(source.model, source.example_inputs, tp=3)
    assert run(folder, plan=p, prompt_ids=PROMPT, tokens=TOKENS).tokens == dense
    with pytest.raises(UsageError, match="got 2, need 3, which the plan was made for"):
        run(folder, tp=2, plan=p)


def test_the_end_of_text_ends_it(checkpoint, tmp_path):
    folder, dense = checkpoint
    model = load_source(folder, dtype="fp32").build()
    model.generation_config.eos_token_id = dense[0]
    model.save_pretrained(tmp_path)
    assert run(str(tmp_path), tp=2, prompt_ids=PROMPT, tokens=TOKENS).tokens == dense[:1]


def test_under_torchrun(checkpoint):
    folder, dense = checkpoint
    script = os.path.join(folder, "start.py")
    with open(script, "w") as file:
        file.write(
            "import sys; from colrow.rewrite.running import run; run(sys.argv[1], prompt_ids=[5, 6, 7, 300], tokens=6)"
        )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script, folder]
    ended = subprocess.run(command, capture_output=True, timeout=250)
    assert ended.returncode == 0, ended.stderr.decode()
    assert ended.stdout.decode() == " ".join(map(str, dense)) + "\n"  # once, by rank 0


@pytest.mark.parametrize(
    ("prompt", "message"),
    [([], "--prompt-ids: empty"), ([1, 512], "not in the vocabulary; got 512, need 0 to 511")],
)
def test_wrong_prompts_are_refused(checkpoint, prompt, message):
    with pytest.raises(UsageError, match=message):
        run(checkpoint[0], tp=2, prompt_ids=prompt)


def test_a_number_of_ranks_is_needed(checkpoint, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(UsageError, match="got 0, need 1 or more"):
        run(checkpoint[0])


FACTORY = """
    import os, signal, torch
    import torch.distributed as dist
    from torch import nn

    def make():
        return nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 8)), (torch.ones(2, 8),)

    def on(rank, what):
        def factory():
            if dist.is_initialized() and dist.get_rank() == rank:
                what()
            return make()
        return factory

    def fail():
        raise SystemExit(7)

    exits = on(1, fail)
    dies = on(0, lambda: os.kill(os.getpid(), signal.SIGKILL))
    raises = on(1, lambda: {}["absent"])
"""


@pytest.fixture
def factories(cwd):
    (cwd / "run_factories.py").write_text(textwrap.dedent(FACTORY))


def test_a_model_that_does_not_generate_makes_one_forward(factories, capfd):
    result = run("run_factories:make", tp=2)
    model = load_source("run_factories:make").build()
    ((path, dtype, shape, mean),) = result.outputs
    assert (path, dtype, shape, result.tokens) == ("output", "float32", (2, 8), [])
    assert [use.bytes_read for use in result.uses] == [None, None]
    assert mean == pytest.approx(float(model(torch.ones(2, 8)).mean().detach()), rel=1e-5)
    assert capfd.readouterr().out.startswith("output: float32 [2, 8], mean ")
    with pytest.raises(UsageError, match="does not read token ids"):
        run("run_factories:make", tp=2, prompt_ids=[1])


@pytest.mark.parametrize(
    ("factory", "code", "message"),
    [("exits", 7, "rank 1: "), ("dies", 137, "rank 0: killed by SIGKILL"), ("raises", 2, "rank 1: .*KeyError")],
)
def test_a_failing_ranks_message_and_code_come_soon(factories, factory, code, message):
    started = time.monotonic()
    with pytest.raises(RankError, match=message) as raised:
        run(f"run_factories:{factory}", tp=2)
    assert raised.value.exit_code == code
    assert time.monotonic() - started < 60
