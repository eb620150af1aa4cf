"""Settings every test runs under."""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may depend on a download

import hypothesis
import pytest
import torch

ROOT = Path(__file__).parent.parent

torch.set_num_threads(1)
# Deterministic and without a deadline: CI machines are shared, and a test that times is a defect.
hypothesis.settings.register_profile("colrow", deadline=None, derandomize=True)
hypothesis.settings.load_profile("colrow")


def pytest_collection_finish() -> None:
    """A tenth of the suite's time were collections that walked all of torch: what is imported here is no garbage."""
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)


@pytest.fixture
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture
def cwd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder; modules imported from it are forgotten afterwards, and so is its place in sys.path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    known = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - known:
        file = getattr(sys.modules[name], "__file__", None)
        if file and Path(file).is_relative_to(tmp_path):
            del sys.modules[name]
