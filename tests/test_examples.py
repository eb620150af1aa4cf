"""The examples run, and say what they should."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("script", "last_line"),
    [
        ("demo.py", "✓ no rank read the whole checkpoint"),
        ("plain_module.py", "the ranks' logits are the dense model's"),
    ],
)
def test_example(root, tmp_path, script, last_line):
    command = [sys.executable, str(root / "examples" / script)]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=280, encoding="utf-8")
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    assert ended.stdout.splitlines()[-1] == last_line
    assert "Traceback" not in ended.stderr


def test_the_demo_fails_if_anything_differs(root, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(root))
    from examples import demo

    real = demo.on_rank

    def slips(folder, plan):
        generated, executed, in_all, read = real(folder, plan)
        return generated, executed, in_all + 1, read  # one collective too many

    monkeypatch.setattr(demo, "on_rank", slips)
    assert demo.run_small(str(tmp_path)) == 1
