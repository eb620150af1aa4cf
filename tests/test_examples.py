"""The examples run, and say what they should."""

import subprocess
import sys

import pytest

from colrow.rewrite.generation import compare_tokens


@pytest.mark.parametrize(
    ("script", "last_line"),
    [
        ("demo.py", "✓ each rank read and holds its slices alone"),
        ("plain_module.py", "the ranks' logits are the dense model's"),
        ("hf_model.py", "the ranks' tokens are the dense model's"),
        ("train_2d.py", "the losses are the dense run's, before and after the checkpoint"),
    ],
)
def test_example(root, tmp_path, script, last_line):
    command = [sys.executable, str(root / "examples" / script)]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=280, encoding="utf-8")
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    assert ended.stdout.splitlines()[-1] == last_line
    assert "Traceback" not in ended.stderr


def test_the_demo_fails_if_anything_differs(root, monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(str(root))
    from examples import demo

    def slips(found, dense):
        found[1].tokens[0, -1] += 1
        return compare_tokens(found, dense)

    monkeypatch.setattr(demo, "compare_tokens", slips)
    assert demo.run_small(str(tmp_path)) == 1
    assert "✗ not so: both ranks chose the same tokens" in capsys.readouterr().out
