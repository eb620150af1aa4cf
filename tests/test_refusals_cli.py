"""What the command line refuses: one line that names the thing, its exit code, and no file half written."""

from __future__ import annotations

import textwrap

import pytest
from click.testing import CliRunner

from colrow.planner.plan_file import SCHEMA
from colrow.rewrite.cli import main

FACTORY = """
    import os, signal, torch
    import torch.distributed as dist
    from torch import nn

    class Mlp(nn.Module):
        def __init__(self, width=24):
            super().__init__()
            self.up, self.down = nn.Linear(8, width), nn.Linear(width, 8)

        def forward(self, x):
            return self.down(torch.relu(self.up(x)))

    class Branching(Mlp):
        def forward(self, x):
            y = super().forward(x)
            return y if y.sum() > 0 else -y

    class Fails(Mlp):
        def forward(self, x):
            if torch.is_tensor(x) and type(x) is torch.Tensor and dist.is_initialized() and dist.get_rank() == 1:
                self.fail()
            return super().forward(x)

    class Raises(Fails):
        def fail(self):
            raise ValueError("overflow")

    class Dies(Fails):
        def fail(self):
            os.kill(os.getpid(), signal.SIGKILL)

    class Mixed(Mlp):
        def __init__(self):
            super().__init__()
            self.mix = nn.Parameter(torch.eye(8))

        def forward(self, x):
            return super().forward(x) @ torch.linalg.inv(self.mix)

    def dispatched():
        model = Mlp()
        model.hf_device_map = {"": "cpu"}
        return model, (torch.ones(2, 8),)

    def quantised():
        model = Mlp()
        model.up.weight = nn.Parameter(model.up.weight.detach().to(torch.int8), requires_grad=False)
        return model, (torch.ones(2, 8),)

    def made_by(cls, *sizes):
        return lambda: (cls(*sizes), (torch.ones(2, 8),))

    mlp, wider, branching = made_by(Mlp), made_by(Mlp, 32), made_by(Branching)
    raises, dies, mixed = made_by(Raises), made_by(Dies), made_by(Mixed)
"""


@pytest.fixture
def colrow(cwd):
    """Runs the command line; returns the one line on stderr of a refusal."""
    (cwd / "refused_models.py").write_text(textwrap.dedent(FACTORY))

    def run(*arguments, code=0):
        result = CliRunner().invoke(main, [str(a) for a in arguments])
        assert result.exit_code == code, result.output
        if code:
            assert result.stdout == ""
            assert result.stderr.startswith(("colrow: ", "Usage: ")), result.stderr
        return result.stderr

    return run


@pytest.fixture
def files(cwd):
    """The folder's content, which a refusal must not change."""

    def names():
        return {file.name: file.read_bytes() for file in cwd.iterdir() if file.is_file()}

    return names


def message_form(line):
    """``colrow: <where>: <what is wrong>; got X, need Y. <what to do>``, on one line."""
    assert line.count("\n") == 1 and line.endswith("\n")
    assert line.startswith("colrow: ") and line.count(": ") >= 2
    return line


M = "refused_models:"
BAD_SOURCES = [
    (f"{M}branching", 2, "Branching: torch cannot trace this model"),
    (f"{M}dispatched", 2, "Mlp: the model is dispatched by a device_map"),
    (f"{M}quantised", 2, "up.weight: quantised weights are not supported; got torch.int8"),
    (f"{M}absent", 2, "cannot be imported"),
    ("nowhere/config.json", 2, "no such file"),
    ("quantised", 2, "quantised weights are not supported; got quantization_config (fp8)"),
]  # fmt: skip


@pytest.mark.parametrize("command", ["plan", "verify", "run"])
@pytest.mark.parametrize(("source", "code", "words"), BAD_SOURCES, ids=[source for source, *_ in BAD_SOURCES])
def test_bad_sources(colrow, files, cwd, command, source, code, words):
    (cwd / "quantised").mkdir()
    config = (
        '{"model_type": "llama", "architectures": ["LlamaForCausalLM"], "quantization_config": {"quant_method": "fp8"}}'
    )
    (cwd / "quantised" / "config.json").write_text(config)
    before = files()
    out = ["--out", "plan.json"] if command == "plan" else []
    assert words in message_form(colrow(command, source, "--tp", 2, *out, code=code))
    assert files() == before


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--tp", 0], 2, "0 is not in the range x>=1"),
        (["--tp", 4096], 2, "tp: not a number of ranks; got 4096, need 1 to 1024"),
        (["--tp", 2, "--hardware", "tpu-v9"], 2, "hardware: unknown profile; got 'tpu-v9'"),
        (["--tp", 2, "--memory-gb", "1e-9"], 1, "no plan for 2 ranks fits"),
        (["--tp", 2, "--pin", "mix=column"], 1, "mix: no exact layout of it for 2 ranks"),
        (["--tp", 2, "--pin", "mixx=column"], 2, "pin mixx: no parameter of the model"),
    ],
)
def test_bad_options(colrow, files, options, code, words):
    before = files()
    assert words in colrow("plan", f"{M}mixed", *options, "--out", "plan.json", code=code)
    assert files() == before


def truncated(text):
    return text[: len(text) // 2]


def edited(text):
    assert '"tp": 2' in text
    return text.replace('"tp": 2', '"tp": 3')


def of_another_version(text):
    return text.replace(SCHEMA, "colrow.plan/0")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (truncated, "bad.json: not JSON, perhaps truncated"),
        (edited, "bad.json: its digest does not match: edited by hand"),
        (of_another_version, "bad.json: a plan of another version"),
        (lambda text: "", "bad.json: not JSON, perhaps truncated"),
    ],
)
@pytest.mark.parametrize(
    "command", [["show"], ["check"], ["verify", f"{M}mlp", "--plan"], ["run", f"{M}mlp", "--plan"]], ids=lambda c: c[0]
)
def test_bad_plan_files(colrow, files, cwd, command, spoil, words):
    colrow("plan", f"{M}mlp", "--tp", 2, "--out", "good.json")
    (cwd / "bad.json").write_text(spoil((cwd / "good.json").read_text()))
    before = files()
    assert words in message_form(colrow(*command, "bad.json", code=2))
    assert files() == before


@pytest.mark.parametrize("command", ["verify", "run"])
def test_a_plan_of_another_model(colrow, command):
    colrow("plan", f"{M}mlp", "--tp", 2, "--out", "plan.json")
    line = message_form(colrow(command, f"{M}wider", "--plan", "plan.json", code=2))
    assert "up.weight: the plan was made for another shape" in line


@pytest.mark.parametrize(("source", "code", "words"), [("raises", 3, "ValueError: overflow"), ("dies", 137, "SIGKILL")])
def test_a_rank_that_fails(colrow, source, code, words):
    line = message_form(colrow("run", f"{M}{source}", "--tp", 2, code=code))
    assert line.startswith("colrow: rank 1: ") and words in line


@pytest.mark.parametrize("option", ["--memory-gb", "--min-sharded"])
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_numbers_that_are_none(option, value):
    from click.testing import CliRunner

    from colrow.rewrite.cli import main

    command = ["plan", "somewhere"] if option == "--memory-gb" else ["check", __file__]
    made = CliRunner().invoke(main, [*command, option, value])
    assert made.exit_code == 2 and option in made.output
