"""A checkpoint of more than 1 GB in several files: each of two ranks reads its half, and never has all of it."""

from __future__ import annotations

import resource
import sys

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file

from colrow.planner.planning import plan
from colrow.rewrite.checkpoint import read_report, tensors_in
from colrow.rewrite.parallel import parallelize
from colrow.rewrite.ranks import run_ranks
from colrow.rewrite.running import peak_bytes

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
FILES, TP = 4, 2
IDS = {"input_ids": torch.zeros(1, 16, dtype=torch.int64)}


def on_meta():
    """A Llama of 0.75 billion weights."""
    config = transformers.LlamaConfig(
        hidden_size=2048, intermediate_size=5632, num_hidden_layers=12, num_attention_heads=16, num_key_value_heads=16,
        vocab_size=32000, use_cache=False, dtype=torch.bfloat16,
    )  # fmt: skip
    with torch.device("meta"):
        return transformers.LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("large")
    noise = torch.randn(1 << 22, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    content = [{} for _ in range(FILES)]
    for i, (name, value) in enumerate(on_meta().state_dict().items()):
        count = value.numel()
        tensor = noise.repeat(-(-count // noise.numel()))[:count].view(value.shape)
        content[i * FILES // 111 % FILES][name] = tensor.roll(i)
    for i, tensors in enumerate(content):
        save_file(tensors, folder / f"model-{i}.safetensors")
    yield folder
    for file in folder.iterdir():
        file.unlink()


def resident_bytes():
    """Of this process, now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def load(folder, p):
    """One rank: what it read, its memory before and at most, and how many of its tensors are the file's slices."""
    model = on_meta()
    before = resident_bytes()
    parallelize(model, p, checkpoint=folder)
    peak = peak_bytes()
    rank, equal = dist.get_rank(), 0
    for name, stored in tensors_in(folder).items():
        local = model.get_parameter(name).to_local()
        with safe_open(stored.file, framework="pt") as opened:
            lazy = opened.get_slice(name)
            at = [
                slice(rank * n, rank * n + n) if n < whole else slice(None)
                for n, whole in zip(local.shape, stored.shape, strict=True)
            ]
            equal += torch.equal(local, lazy[tuple(at)])
    return read_report(model), before, peak, equal


@pytest.mark.timeout(600)
def test_each_rank_reads_its_share_and_never_holds_the_whole(checkpoint, monkeypatch):
    monkeypatch.setattr("colrow.rewrite.processes.can_fork", lambda: False)  # a forked one starts with our memory
    size = sum(file.stat().st_size for file in checkpoint.iterdir())
    assert size > 1e9 and len(list(checkpoint.iterdir())) == FILES
    p = plan(on_meta(), IDS, tp=TP, hardware="gloo-cpu")
    for report, before, peak, equal in run_ranks(load, TP, "gloo", (checkpoint, p)):
        assert equal == report.num_tensors == 111
        assert 0.99 * size < report.bytes_total <= size
        assert report.bytes_read < 0.501 * size  # norms are everybody's
        assert peak < size, "PyTorch included"
        assert peak - before < 0.6 * size
        print(f"read {report.bytes_read:,} of {report.bytes_total:,}; memory {before:,} before, {peak:,} at most")
