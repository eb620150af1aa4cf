"""What people do with models, done with rewritten ones on two ranks: the dense model's outputs and gradients."""

from __future__ import annotations

import contextlib
import copy
from functools import cache

import pytest
import torch
from right_models import source_of
from torch.distributed.tensor import DTensor

from colrow.cost_models.errors import UsageError
from colrow.planner.planning import plan
from colrow.planner.random_weights import randomize
from colrow.rewrite.comparison import error_of
from colrow.rewrite.counting import fixed_loss
from colrow.rewrite.parallel import parallelize
from colrow.rewrite.ranks import run_ranks
from colrow.rewrite.storage import as_dense, specs_of

transformers = pytest.importorskip("transformers")
TP, FP32 = 2, 1e-5
INPUTS = {"input_ids": torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(0))}


@cache
def llama():
    source = source_of("llama", dtype="fp32")
    return randomize(source.build()).eval(), plan(source.model, source.example_inputs, tp=TP, phase="train")


def outputs_and_gradients(model, inputs=INPUTS, run=None, context=contextlib.nullcontext):
    specs = specs_of(model)
    with context():
        logits = (model if run is None else run)(**inputs).logits
    fixed_loss(logits).backward()
    full = {
        name: as_dense(p.grad, specs[name]).full_tensor() if isinstance(p.grad, DTensor) else p.grad
        for name, p in model.named_parameters()
    }
    return {"logits": logits.detach().float()} | {name: grad.float().clone() for name, grad in full.items()}


def largest_error(found, dense):
    assert found.keys() == dense.keys()
    return max(error_of(found[name], value) for name, value in dense.items())


def error_after(use, **options):
    """Largest error of a model that ``use`` was made of after the rewrite; of the dense one too."""
    dense, p = llama()

    def on_rank():
        return outputs_and_gradients(use(parallelize(copy.deepcopy(dense), p)), **options)

    true = outputs_and_gradients(use(copy.deepcopy(dense)), **options)
    return max(largest_error(found, true) for found in run_ranks(on_rank, TP, "gloo"))


def checkpointing(reentrant):
    def use(model):
        model.train().gradient_checkpointing_enable({"use_reentrant": reentrant})
        return model

    return use


USES = {
    "as it is": lambda model: model,
    "to float64": lambda model: model.to(torch.float64),
    "double": lambda model: model.double(),
    "moved": lambda model: model.to("cpu").cpu().to(device="cpu", dtype=torch.float32),
    "a copy": copy.deepcopy,
    "a copy of a copy": lambda model: copy.deepcopy(copy.deepcopy(model)),
    "train and back": lambda model: model.train().eval(),
    "checkpointing, reentrant": checkpointing(True),
    "checkpointing": checkpointing(False),
}


@pytest.mark.parametrize("name", USES)
def test_use(name):
    assert error_after(USES[name]) <= FP32


def test_dtypes_follow():
    dense, p = llama()

    def on_rank():
        model = parallelize(copy.deepcopy(dense), p).to(torch.bfloat16)
        return {(q.dtype, q.to_local().dtype) for q in model.parameters()}, model(**INPUTS).logits.dtype

    assert run_ranks(on_rank, TP) == [({(torch.bfloat16, torch.bfloat16)}, torch.bfloat16)] * TP


@pytest.mark.parametrize("use", [lambda model: model.bfloat16(), None], ids=["bfloat16", "autocast"])
def test_half_precision_is_as_near_as_the_dense_models(use):
    """Rounding differs with the order of sums: both are compared with float32."""
    dense, p = llama()
    context = contextlib.nullcontext if use else lambda: torch.autocast("cpu", dtype=torch.bfloat16)
    use = use or (lambda model: model)
    exact = outputs_and_gradients(copy.deepcopy(dense))
    rounded = largest_error(outputs_and_gradients(use(copy.deepcopy(dense)), context=context), exact)

    def on_rank():
        return outputs_and_gradients(use(parallelize(copy.deepcopy(dense), p)), context=context)

    found = [largest_error(found, exact) for found in run_ranks(on_rank, TP, "gloo")]
    assert 1e-3 < rounded < 0.2, "bfloat16 was used, and this model stands it"
    assert max(found) < 2 * rounded


def test_a_copy_shares_nothing():
    dense, p = llama()

    def on_rank():
        model = parallelize(copy.deepcopy(dense), p)
        other = copy.deepcopy(model)
        with torch.no_grad():
            for value in model.parameters():
                value.zero_()
        return other(**INPUTS).logits.detach()

    assert max(error_of(found, dense(**INPUTS).logits.detach()) for found in run_ranks(on_rank, TP)) <= FP32


def test_checkpointing_enabled_before_the_rewrite():
    dense, p = llama()

    def on_rank():
        return outputs_and_gradients(parallelize(checkpointing(False)(copy.deepcopy(dense)), p))

    true = outputs_and_gradients(checkpointing(False)(copy.deepcopy(dense)))
    assert max(largest_error(found, true) for found in run_ranks(on_rank, TP, "gloo")) <= FP32


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_whole(backend):
    """``fullgraph``, as the dense model compiles."""
    dense, p = llama()

    def compiled(model):
        torch._dynamo.reset()
        return outputs_and_gradients(model, run=torch.compile(model, backend=backend, fullgraph=True))

    true = compiled(copy.deepcopy(dense))
    found = run_ranks(lambda: compiled(parallelize(copy.deepcopy(dense), p)), TP, "gloo")
    assert max(largest_error(one, true) for one in found) <= FP32


def adapted(model):
    peft = pytest.importorskip("peft")
    torch.manual_seed(3)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "o_proj", "down_proj"], init_lora_weights=False)
    return peft.get_peft_model(model, config)


def test_adapters_before_planning():
    pytest.importorskip("peft")
    dense = adapted(copy.deepcopy(llama()[0]))
    p = plan(copy.deepcopy(dense).to("meta"), INPUTS, tp=TP, phase="train")

    def gradients(model):
        specs = specs_of(model)
        logits = model(**INPUTS).logits
        fixed_loss(logits).backward()
        trained = {name: q.grad for name, q in model.named_parameters() if q.requires_grad}
        assert trained and all("lora" in name for name in trained)
        whole = {n: as_dense(g, specs[n]).full_tensor() if isinstance(g, DTensor) else g for n, g in trained.items()}
        return {"logits": logits.detach()} | whole

    true = gradients(copy.deepcopy(dense))
    found = run_ranks(lambda: gradients(parallelize(copy.deepcopy(dense), p)), TP, "gloo")
    assert max(largest_error(one, true) for one in found) <= FP32


class Adapter(torch.nn.Module):
    """What is put in a module's place."""

    def __init__(self, base):
        super().__init__()
        self.base, self.scale = base, torch.nn.Parameter(torch.ones(1))

    def forward(self, x):
        return self.base(x) * self.scale


def test_adapters_after_the_rewrite_are_refused():
    dense, p = llama()

    def on_rank():
        model = parallelize(copy.deepcopy(dense), p)
        layer = model.model.layers[1]
        layer.mlp.down_proj = torch.nn.Sequential(layer.mlp.down_proj)  # brings no parameters
        logits = model(**INPUTS).logits
        layer.mlp.down_proj = Adapter(layer.mlp.down_proj)
        added = "mlp.down_proj.scale: this parameter was added after the rewrite"
        for call, why in ((model, added), (model.forward, "called by itself")):
            with pytest.raises(UsageError, match=why):
                call(**INPUTS)
        layer.mlp.down_proj = layer.mlp.down_proj.base
        assert torch.equal(model(**INPUTS).logits, logits)

    run_ranks(on_rank, TP, "gloo")


def test_trainer(tmp_path):
    """A few steps of transformers' Trainer: the dense losses and norms of gradients."""
    pytest.importorskip("accelerate")
    dense, p = llama()
    rows = [torch.randint(3, 90, (12,), generator=torch.Generator().manual_seed(i)) for i in range(12)]

    def trained(model):
        options = transformers.TrainingArguments(
            output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=2, report_to=[], use_cpu=True,
            save_strategy="no", logging_steps=1, learning_rate=1e-3, adam_epsilon=1e-5, disable_tqdm=True,
        )  # fmt: skip
        data = [{"input_ids": row, "labels": row} for row in rows]
        trainer = transformers.Trainer(model=model.train(), args=options, train_dataset=data)
        trainer.train()
        return [(entry["loss"], entry["grad_norm"]) for entry in trainer.state.log_history if "loss" in entry]

    found = run_ranks(lambda: trained(parallelize(copy.deepcopy(dense), p)), TP, "gloo")
    true = trained(copy.deepcopy(dense))
    assert len(true) == 3 and true[0] != true[2]
    for one in found:
        assert error_of(torch.tensor(one), torch.tensor(true)) <= 1e-4
