"""Checkpoints: slices read, dense files written back bit for bit, bad ones refused before anything changes."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from split_model import Model, dense_model, inputs, specs
from test_regions import split
from torch import nn

from colrow.cost_models.errors import SourceError
from colrow.planner.layout import balanced
from colrow.rewrite import checkpoint as checkpoint_module
from colrow.rewrite.buffers import recompute_buffers
from colrow.rewrite.checkpoint import INDEX, check_checkpoint, load_checkpoint, read_report, save_dense, tensors_in
from colrow.rewrite.groups import group_of, tp_mesh
from colrow.rewrite.ranks import run_ranks
from colrow.rewrite.regions import install_regions
from colrow.rewrite.storage import ParameterSpec, store

DENSE = dense_model()
STATE = {name: value for name, value in DENSE.state_dict().items() if name != "head.weight"}  # tied, hence left out


@pytest.fixture
def checkpoint(tmp_path):
    save_file(STATE, tmp_path / "model.safetensors")
    return tmp_path


def sharded(folder, files=2):
    """The same tensors over several files, with an index."""
    weight_map = {name: f"model-{i % files}.safetensors" for i, name in enumerate(STATE)}
    for file in set(weight_map.values()):
        save_file({name: STATE[name] for name in STATE if weight_map[name] == file}, folder / file)
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return folder


def loaded(folder, size, meta=True):
    """A rewritten model filled from ``folder``, and the report."""
    mesh = tp_mesh(None)
    if meta:
        with torch.device("meta"):
            model = Model()
    else:
        model = Model()
    plan = store(model, specs(size), mesh)
    report = load_checkpoint(model, plan, folder, mesh)
    install_regions(model, ["blocks.0", "blocks.1"], plan, group_of(mesh))
    return model.split(group_of(mesh)), report


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("meta", [True, False])
def test_load_and_save(checkpoint, size, meta):
    def run():
        model, report = loaded(checkpoint, size, meta)
        for name, value in model.state_dict().items():
            assert torch.equal(value.full_tensor(), DENSE.state_dict()[name]), name
        assert model.head.weight is model.embed.weight
        with torch.no_grad():
            torch.testing.assert_close(model(inputs()), DENSE(inputs()), rtol=1e-12, atol=1e-12)
        save_dense(model, checkpoint / "again", group_of(None))
        assert read_report(model) == report and read_report(copy.deepcopy(model)) is None
        return report

    reports = run_ranks(run, size)
    written = load_file(checkpoint / "again" / "model.safetensors")
    assert written.keys() == STATE.keys() and all(torch.equal(written[name], STATE[name]) for name in STATE)
    total = sum(value.nbytes for value in STATE.values())
    assert all(report.bytes_total == total and report.num_tensors == len(STATE) for report in reports)
    if size == 1:
        assert reports[0].bytes_read == total


def test_bytes_read_are_those_of_the_slices(tmp_path):
    """A [12, 8] weight split evenly, a [8, 7] one split in its second dim, a replicated bias, on 2 ranks."""
    model = nn.Sequential(nn.Linear(8, 12, bias=False), nn.Linear(7, 8))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    parts = [ParameterSpec("0.weight", 0, balanced(12, 2)), ParameterSpec("1.weight", 1, balanced(7, 2))]

    def run():
        mesh, mine = tp_mesh(None), copy.deepcopy(model).to("meta")
        return load_checkpoint(mine, store(mine, parts, mesh), tmp_path, mesh)

    reports = run_ranks(run, 2)
    assert [r.bytes_read for r in reports] == [4 * (6 * 8 + 8 * 4 + 8), 4 * (6 * 8 + 8 * 3 + 8)]
    assert {r.bytes_total for r in reports} == {4 * (12 * 8 + 8 * 7 + 8)}


def test_nothing_of_the_file_stays_mapped(checkpoint):
    """Parameters own their memory: the file may be replaced while the model lives."""

    def run():
        model, _ = loaded(checkpoint, 2)
        return [p._local_tensor.untyped_storage().nbytes() == p._local_tensor.nbytes for p in model.parameters()]

    assert all(all(owned) for owned in run_ranks(run, 2))


def test_several_files_in_and_out(tmp_path):
    def run():
        model, _ = loaded(sharded_folder, 2)
        save_dense(model, tmp_path / "out", group_of(None), shard_bytes=1000)

    sharded_folder = sharded(tmp_path)
    run_ranks(run, 2)
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    count = len(names) - 1
    assert names == [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)] + [INDEX] and count > 2
    weight_map = json.loads((tmp_path / "out" / INDEX).read_text())["weight_map"]
    assert weight_map.keys() == STATE.keys()
    for name, file in weight_map.items():
        assert torch.equal(load_file(tmp_path / "out" / file)[name], STATE[name])
    assert tensors_in(tmp_path / "out").keys() == STATE.keys()


def test_a_tied_tensor_may_bear_either_name(tmp_path):
    state = {"head.weight" if name == "embed.weight" else name: value for name, value in STATE.items()}
    save_file(state, tmp_path / "model.safetensors")
    assert check_checkpoint(Model(), tmp_path)["embed.weight"][0] == "head.weight"


def missing(folder):
    save_file({n: v for n, v in STATE.items() if n != "blocks.1.q.bias"}, folder / "model.safetensors")
    return r"blocks.1.q.bias is missing; need \(12,\)"


def missing_tied(folder):
    save_file({n: v for n, v in STATE.items() if n != "embed.weight"}, folder / "model.safetensors")
    return r"embed.weight is missing \(nor head.weight, tied to it\)"


def misshapen(folder):
    save_file(STATE | {"norm.weight": torch.ones(9)}, folder / "model.safetensors")
    return r"model.safetensors: norm.weight has another shape; got \(9,\), need \(8,\)"


def quantised(folder):
    save_file(STATE | {"blocks.0.up.weight": STATE["blocks.0.up.weight"].to(torch.int8)}, folder / "model.safetensors")
    return "model.safetensors: blocks.0.up.weight is quantised; got I8, need F64 or F32"


def unknown(folder):
    save_file(STATE | {"norm.scale": torch.ones(8)}, folder / "model.safetensors")
    return "model.safetensors: norm.scale is not in the model"


def truncated(folder):
    save_file(STATE, folder / "model.safetensors")
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    return "model.safetensors: not a readable safetensors file"


def no_files(folder):
    return "no safetensors files in it"


def no_index(folder):
    sharded(folder)
    (folder / INDEX).write_text("[]")
    return f"{INDEX}: not a safetensors index"


def no_shard(folder):
    sharded(folder)
    (folder / "model-1.safetensors").unlink()
    return "model-1.safetensors: model.safetensors.index.json names it, but it does not exist"


def wrong_index(folder):
    sharded(folder)
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    both = dict.fromkeys(("norm.weight", "norm.bias"), "model-0.safetensors")  # one of them is in the other file
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map | both}))
    return "says that norm.(weight|bias) is in it, but it is not"


@pytest.mark.parametrize(
    "spoil",
    [missing, missing_tied, misshapen, quantised, unknown, truncated, no_files, no_index, no_shard, wrong_index],
)
def test_a_bad_checkpoint_changes_nothing(spoil, tmp_path):
    message = spoil(tmp_path)

    def run():
        model = copy.deepcopy(DENSE)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        plan, mesh = store(model, specs(2), tp_mesh(None)), tp_mesh(None)
        with pytest.raises(SourceError, match=message):
            load_checkpoint(model, plan, tmp_path, mesh)
        for name, value in model.state_dict().items():
            assert torch.equal(value.full_tensor(), before[name])

    run_ranks(run, 2)


def test_a_checkpoint_that_one_rank_cannot_read_is_refused_on_all(checkpoint, tmp_path):
    def run():
        rank = torch.distributed.get_rank()
        plan_model = Model()
        plan, mesh = store(plan_model, specs(2), tp_mesh(None)), tp_mesh(None)
        with pytest.raises(SourceError) as caught:
            load_checkpoint(plan_model, plan, checkpoint if rank else tmp_path / "nowhere", mesh)
        return str(caught.value)

    first, second = run_ranks(run, 2, "gloo")
    assert "no such directory" in first and "another rank failed here" in second


@pytest.mark.parametrize("meta", [True, False])
def test_a_file_that_goes_away_while_it_is_read_is_refused_on_all(checkpoint, meta, monkeypatch):
    def run():
        real, reads = checkpoint_module._read_block, []

        def broken(name, *rest):
            reads.append(name)
            if torch.distributed.get_rank() == 1 and len(reads) == 3:
                raise OSError("no such device")
            return real(name, *rest)

        monkeypatch.setattr(checkpoint_module, "_read_block", broken)
        with pytest.raises(SourceError) as caught:
            loaded(checkpoint, 2, meta)
        return str(caught.value)

    first, second = run_ranks(run, 2, "gloo")
    assert "another rank failed here" in first
    assert "model.safetensors: " in second and "cannot be read: no such device" in second


def test_saving_into_a_file_is_refused_on_all_ranks(tmp_path):
    (tmp_path / "file").write_text("")

    def run():
        with pytest.raises(SourceError, match="cannot be written to|another rank failed"):
            save_dense(split(copy.deepcopy(DENSE), 2), tmp_path / "file", group_of(None))

    run_ranks(run, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


class WithBuffers(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))
        self.register_buffer("kept", torch.arange(4.0))
        self.register_buffer("steps", torch.arange(3), persistent=False)

    def _init_weights(self, module):
        module.steps.copy_(torch.arange(3))


def test_buffers(tmp_path):
    save_file({"weight": torch.ones(3), "kept": torch.arange(4.0) + 1}, tmp_path / "model.safetensors")

    def run():
        with torch.device("meta"):
            model = WithBuffers()
        mesh = tp_mesh(None)
        load_checkpoint(model, store(model, [], mesh), tmp_path, mesh)
        assert model.kept.tolist() == [1, 2, 3, 4] and model.steps.tolist() == [0, 1, 2]
        assert model.weight.full_tensor().tolist() == [1, 1, 1]

    run_ranks(run, 2)


def test_a_buffer_that_nobody_can_fill_is_refused():
    with torch.device("meta"):
        model = nn.Sequential(WithBuffers())
    model[0]._init_weights = lambda module: None
    with pytest.raises(SourceError, match="0.kept: this buffer is on meta"):
        recompute_buffers(model, torch.device("cpu"))


def test_a_hugging_face_model_from_meta(tmp_path):
    """Rotary frequencies come back, tied heads stay tied, and ``from_pretrained`` reads what ``save_dense`` writes."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=31, tie_word_embeddings=True, max_position_embeddings=64,
    )  # fmt: skip
    dense = transformers.LlamaForCausalLM(config).eval()
    dense.save_pretrained(tmp_path / "in")

    def run():
        with torch.device("meta"):
            model = transformers.LlamaForCausalLM(config).eval()
        mesh = tp_mesh(None)
        plan = store(model, [], mesh)
        load_checkpoint(model, plan, tmp_path / "in", mesh)
        install_regions(model, [f"model.layers.{i}" for i in range(2)], plan, group_of(mesh))
        for name, buffer in dense.named_buffers():
            assert torch.equal(model.get_buffer(name), buffer), name
        ids = torch.arange(12).view(2, 6)
        with torch.no_grad():
            assert torch.equal(model(ids).logits, dense(ids).logits)
        save_dense(model, tmp_path / "out", group_of(mesh))

    run_ranks(run, 2, "gloo")
    assert (tmp_path / "in" / "model.safetensors").read_bytes() == (tmp_path / "out" / "model.safetensors").read_bytes()
