"""Reading a SOURCE: what comes out, and what is refused with which advice."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPModel

from colrow.cost_models.errors import SourceError
from colrow.planner import sources
from colrow.planner.configurations import default_config
from colrow.planner.example_inputs import example_inputs, usable_seq
from colrow.planner.head_class import head_class
from colrow.planner.random_weights import persistent_buffers, randomize
from colrow.planner.sources import load_source, source_from_config

CONFIGS = Path(__file__).parent.parent / "examples" / "configs"


@pytest.mark.parametrize(
    ("size", "parameters"), [("8b", 8_030_261_248), ("70b", 70_553_706_496), ("405b", 405_853_388_800)]
)
def test_published_llamas_are_built_on_meta_with_their_published_size(size: str, parameters: int) -> None:
    source = load_source(str(CONFIGS / f"llama-3.1-{size}.json"))
    assert source.name == f"llama-3.1-{size}"
    assert sum(p.numel() for p in source.model.parameters()) == parameters
    assert all(p.is_meta and p.dtype is torch.bfloat16 for p in source.model.parameters())
    assert not source.model.training and source.model.config.use_cache is False
    assert source.example_inputs["input_ids"].shape == (1, 2048)
    assert source.example_inputs["logits_to_keep"] == 1
    assert f"{parameters:,}".replace(",", " ") in (CONFIGS / "README.md").read_text()


@pytest.mark.parametrize(
    ("model_type", "name"),
    [
        ("llama", "LlamaForCausalLM"),
        ("t5", "T5ForConditionalGeneration"),
        ("llava", "LlavaForConditionalGeneration"),
        ("whisper", "WhisperForCausalLM"),  # registered as a causal LM too, which comes first
        ("speech_to_text", "Speech2TextForConditionalGeneration"),
        ("distilbert", "DistilBertForMaskedLM"),
        ("vit", "ViTForImageClassification"),
        ("dinov2", "Dinov2ForImageClassification"),
    ],
)
def test_head_class_follows_the_definition(model_type: str, name: str) -> None:
    assert head_class(default_config(model_type)).__name__ == name


def test_head_class_believes_the_configuration_first() -> None:
    config = default_config("whisper")
    config.architectures = ["WhisperForConditionalGeneration"]
    assert head_class(config).__name__ == "WhisperForConditionalGeneration"


def test_a_part_of_a_model_has_no_head_class() -> None:
    with pytest.raises(SourceError, match="plan that type"):
        head_class(default_config("idefics3_vision").__class__.__base__())


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A saved two-layer Llama."""
    source = load_source("hf:llama", small=True, dtype="fp32")
    source.build().save_pretrained(tmp_path / "tiny-llama")
    return tmp_path / "tiny-llama"


def test_a_model_directory_builds_the_saved_weights(checkpoint: Path) -> None:
    source = load_source(str(checkpoint), dtype="fp32", seq=8)
    assert source.name == "tiny-llama" and source.checkpoint == checkpoint
    assert all(p.is_meta for p in source.model.parameters())
    saved = load_source("hf:llama", small=True, dtype="fp32").build().state_dict()
    built = source.build().state_dict()
    assert saved.keys() == built.keys() and all(torch.equal(saved[name], built[name]) for name in saved)


def test_tied_weights_are_not_missing_from_a_checkpoint(tmp_path: Path) -> None:
    dense = load_source("hf:gpt2", small=True, dtype="fp32").build()
    dense.save_pretrained(tmp_path)
    loaded = load_source(str(tmp_path), dtype="fp32").build()
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    assert torch.equal(loaded.lm_head.weight, dense.lm_head.weight)


def test_a_checkpoint_with_a_missing_or_misshapen_tensor_is_not_made_up(checkpoint: Path) -> None:
    file = checkpoint / "model.safetensors"
    whole = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({key: value for key, value in whole.items() if key != name}, file, metadata={"format": "pt"})
    with pytest.raises(SourceError, match=f"1 tensors are missing .*got none for {name}"):
        load_source(str(checkpoint), dtype="fp32").build()
    save_file({**whole, name: whole[name][:, 1:].contiguous()}, file, metadata={"format": "pt"})
    with pytest.raises(SourceError, match="cannot be loaded"):
        load_source(str(checkpoint), dtype="fp32").build()
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(SourceError, match="cannot be loaded"):
        load_source(str(checkpoint), dtype="fp32").build()


def test_pickled_weights_are_named_as_not_read(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").rename(checkpoint / "pytorch_model.bin")
    source = load_source(str(checkpoint))
    assert source.checkpoint is None and "pytorch_model" in source.notes[0]


def test_a_config_file_inside_a_directory_has_the_directorys_name(checkpoint: Path) -> None:
    source = load_source(str(checkpoint / "config.json"))
    assert source.name == "tiny-llama" and source.checkpoint is None


def test_build_is_deterministic_and_leaves_the_global_generator_alone() -> None:
    source = load_source("hf:gpt2", small=True, dtype="fp32")
    state = torch.random.get_rng_state()
    first = source.build().state_dict()
    assert torch.equal(state, torch.random.get_rng_state())
    torch.manual_seed(1234)
    assert all(torch.equal(value, first[name]) for name, value in source.build().state_dict().items())


def test_phase_decides_training_mode_and_tokens() -> None:
    train = load_source("hf:llama", small=True, phase="train", seq=8, labels=True)
    assert train.model.training and train.build().training
    assert train.example_inputs["labels"].shape == (1, 8) and "logits_to_keep" not in train.example_inputs
    decode = load_source("hf:llama", small=True, phase="decode", seq=8, context=100, batch=3)
    assert decode.example_inputs["input_ids"].shape == (3, 1) and decode.context == 100
    assert load_source("hf:llama", small=True, phase="decode", seq=8).context == 8


def test_experts_become_a_batched_matmul_where_grouped_ones_know_no_dtype() -> None:
    grouped = load_source("hf:mixtral", small=True, dtype="bf16")
    assert grouped.model.config._experts_implementation == "grouped_mm"
    batched = load_source("hf:mixtral", small=True, dtype="fp64", seq=4)
    assert batched.model.config._experts_implementation == "batched_mm"
    model = batched.build()
    assert model.config._experts_implementation == "batched_mm"
    assert model(**batched.example_inputs).logits.dtype is torch.float64


def test_a_sequence_longer_than_the_positions_is_clipped_and_said_so() -> None:
    source = load_source("hf:bert", seq=2048)
    assert source.example_inputs["input_ids"].shape == (1, 512)
    assert source.notes == ("sequence clipped from 2048 to 512, the positions this model has",)
    assert usable_seq(default_config("bert"), 512) == (512, ())


def write(path: Path, content: object) -> str:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def test_unreadable_sources_are_refused_with_advice(tmp_path: Path) -> None:
    llama = json.loads((CONFIGS / "llama-3.1-8b.json").read_text())
    quantised = {**llama, "quantization_config": {"quant_method": "fp8"}}
    remote = {"model_type": "mine", "auto_map": {"AutoConfig": "code.Config"}}
    cases = {
        "no/such/place.json": "no such file",
        str(tmp_path): "need a model directory or a config.json",  # it holds no config.json
        "meta-llama/Llama-3.1-8B": "not downloaded",
        "hf:lama": "Did you mean .*hf:llama",
        "hf:": "unknown model type",
        write(tmp_path / "broken.json", "{"): "not readable as JSON",
        write(tmp_path / "list.json", []): "model_type",
        write(tmp_path / "empty.json", {}): "model_type",
        write(tmp_path / "quantised.json", quantised): r"quantised .*got quantization_config \(fp8\)",
        write(tmp_path / "remote.json", remote): "trust_remote_code",
        write(tmp_path / "unknown.json", {"model_type": "mine"}): "cannot load it",
        write(tmp_path / "bad.json", {**llama, "hidden_size": "wide"}): "cannot load it",
        write(tmp_path / "odd.json", {**llama, "hidden_act": "nonsense"}): "LlamaForCausalLM cannot be built",
    }
    for source, message in cases.items():
        with pytest.raises(SourceError, match=message) as caught:
            load_source(source)
        assert "\n" not in str(caught.value)
    with pytest.raises(SourceError, match="fp8; got|got fp8"):
        load_source("hf:gpt2", dtype="fp8")


def test_without_transformers_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(SourceError, match=r"colrow\[hf\]"):
        load_source("hf:llama")
    with pytest.raises(SourceError, match=r"colrow\[hf\]"):
        load_source(str(CONFIGS / "llama-3.1-8b.json"))


FACTORY = """
import torch
from torch import nn

def model():
    return nn.Sequential(nn.Linear(4, 8), nn.Dropout(), nn.Linear(8, 4)), (torch.zeros(2, 4),)

def keywords():
    return nn.Linear(4, 4), {"input": torch.zeros(1, 4)}

def meta():
    return nn.Linear(4, 4, device="meta"), (torch.zeros(1, 4),)

def only_model():
    return nn.Linear(4, 4)

def raises():
    raise RuntimeError("no weights today")

constant = 3
"""


def test_a_factory_in_the_current_folder(cwd: Path) -> None:
    (cwd / "mymodels.py").write_text(FACTORY)
    source = load_source("mymodels:model", phase="train")
    assert source.model.training and isinstance(source.example_inputs, tuple) and source.name == "mymodels:model"
    assert not load_source("mymodels:model").model.training
    first, second = source.build(), source.build()
    assert first is not second and torch.equal(first[0].weight, second[0].weight)
    assert torch.equal(first[0].weight, source.model[0].weight)
    assert set(load_source("mymodels:keywords").example_inputs) == {"input"}


def test_a_factory_is_not_shrunk_silently(cwd: Path) -> None:
    (cwd / "mymodels.py").write_text(FACTORY)
    with pytest.raises(SourceError, match="small version"):
        load_source("mymodels:model", small=True)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("mymodels:missing", "cannot be imported"),
        ("nosuchmodule:model", "ModuleNotFoundError"),
        ("mymodels:constant", "got int, need a factory function"),
        ("mymodels:only_model", "got Linear, need .model, example_inputs."),
        ("mymodels:raises", "RuntimeError: no weights today"),
        (":model", "cannot be imported"),
    ],
)
def test_bad_factories_are_refused(cwd: Path, source: str, message: str) -> None:
    (cwd / "mymodels.py").write_text(FACTORY)
    with pytest.raises(SourceError, match=message):
        load_source(source)


def test_meta_weights_of_a_factory_can_be_planned_but_not_built(cwd: Path) -> None:
    (cwd / "mymodels.py").write_text(FACTORY)
    source = load_source("mymodels:meta")
    with pytest.raises(SourceError, match="got weight"):
        source.build()


REMOTE = """
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

class MineConfig(PreTrainedConfig):
    model_type = "mine"
    def __init__(self, hidden_size=8, **kwargs):
        self.hidden_size = hidden_size
        super().__init__(**kwargs)

class MineForCausalLM(PreTrainedModel):
    config_class = MineConfig
    def __init__(self, config):
        super().__init__(config)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.post_init()
    def _init_weights(self, module):
        pass
    def forward(self, input_ids):
        return self.proj(input_ids.unsqueeze(-1).expand(*input_ids.shape, self.config.hidden_size).to(self.dtype))
"""


def test_remote_code_runs_only_when_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers.dynamic_module_utils as remote

    monkeypatch.setattr(remote, "HF_MODULES_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "code.py").write_text(REMOTE)
    classes = {"AutoConfig": "code.MineConfig", "AutoModelForCausalLM": "code.MineForCausalLM"}
    write(folder / "config.json", {"model_type": "mine", "auto_map": classes})
    with pytest.raises(SourceError, match="trust_remote_code"):
        load_source(str(folder))
    source = load_source(str(folder), trust_remote_code=True)
    assert type(source.model).__name__ == "MineForCausalLM" and source.model.proj.weight.is_meta


def test_inputs_avoid_special_tokens_and_are_reproducible() -> None:
    source = load_source("hf:llama", seq=64, batch=2, small=True)
    ids = source.example_inputs["input_ids"]
    special = {source.config.bos_token_id, source.config.eos_token_id}
    assert ids.unique().numel() > 32 and not special & set(ids.flatten().tolist())
    assert torch.equal(ids, example_inputs(source.model, seq=64, batch=2)["input_ids"])


@pytest.mark.parametrize("model_type", ["llava", "paligemma", "got_ocr2"])
def test_images_take_as_many_tokens_as_they_have_features(model_type: str) -> None:
    """With text alone the whole image tower would stay out of the trace."""
    source = load_source(f"hf:{model_type}", seq=8, batch=2, small=True, dtype="fp32")
    ids, token = source.example_inputs["input_ids"], source.config.image_token_id
    images = (ids == token).sum(dim=1).tolist()
    assert images[0] > 0 and images == [ids.shape[1] - 8] * 2
    model = source.build()
    model(**source.example_inputs).logits.sum().backward()
    tower = [name for name, p in model.named_parameters() if "vision" in name and p.grad is not None]
    assert tower
    decode = load_source(f"hf:{model_type}", seq=8, phase="decode", small=True).example_inputs
    assert "pixel_values" not in decode and decode["input_ids"].shape == (1, 1)


def test_decoding_an_encoder_decoder_starts_from_encoder_outputs() -> None:
    source = load_source("hf:t5", small=True, phase="decode", seq=16, batch=2, dtype="fp32")
    assert "input_ids" not in source.example_inputs
    assert source.example_inputs["encoder_outputs"][0].shape == (2, 16, source.config.d_model)
    assert source.build()(**source.example_inputs).logits.shape[:2] == (2, 1)


def test_a_model_that_does_not_generate_keeps_its_images_in_every_phase() -> None:
    source = source_from_config(default_config("clip"), model_class=CLIPModel, phase="decode", small=True, dtype="fp32")
    assert source.example_inputs["pixel_values"].dim() == 4
    assert source.build()(**source.example_inputs).logits_per_image.shape == (1, 1)


def test_random_weights_leave_nothing_as_initialised() -> None:
    model = load_source("hf:gpt2", small=True, dtype="fp32").build()
    for name, parameter in model.named_parameters():
        assert not ((parameter == 0) | (parameter == 1)).any(), name
    norm = model.transformer.ln_f
    assert norm.weight.mean().sub(1).abs() < 0.2 and norm.bias.mean().abs() < 0.2


def test_random_buffers_are_positive_and_computed_ones_stay() -> None:
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(4))
    model.register_buffer("frequencies", torch.arange(3.0), persistent=False)
    randomize(model, seed=1)
    norm = model[0]
    assert (norm.running_var > 0.4).all() and not (norm.running_mean == 0).any()
    assert int(norm.num_batches_tracked) == 0 and torch.equal(model.frequencies, torch.arange(3.0))
    assert [name for name, _ in persistent_buffers(model)][:1] == ["0.running_mean"]
    assert torch.equal(randomize(torch.nn.Linear(3, 3), 7).weight, randomize(torch.nn.Linear(3, 3), 7).weight)


def test_tied_weights_stay_tied() -> None:
    model = load_source("hf:gpt2", small=True, dtype="fp32").build()
    assert model.lm_head.weight is model.transformer.wte.weight


def test_dtypes_of_one_model_hold_the_same_weights() -> None:
    """A float64 check of a model says something about its float32 weights only if they are the same numbers."""
    wide = load_source("hf:llama", small=True, dtype="fp64").build()
    narrow = load_source("hf:llama", small=True, dtype="fp32").build()
    for (name, a), b in zip(wide.named_parameters(), narrow.parameters(), strict=True):
        assert torch.allclose(a.float(), b, rtol=1e-6), name


def test_every_dtype_name_is_offered_in_the_error() -> None:
    with pytest.raises(SourceError) as caught:
        load_source("hf:gpt2", dtype="int4")
    assert all(name in str(caught.value) for name in sources.DTYPES)
