"""Local views: right gradients in every encoding, and nothing left behind, whatever happens in a forward."""

import copy

import pytest
import torch
from split_model import cotangent, dense_model, inputs, specs
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from colrow.cost_models.errors import UsageError
from colrow.planner.layout import balanced
from colrow.rewrite import gradients
from colrow.rewrite.groups import group_of, tp_mesh
from colrow.rewrite.ranks import run_ranks
from colrow.rewrite.regions import install_regions
from colrow.rewrite.storage import ParameterSpec, store


def split(model, size, mesh=None):
    """``model`` split over the group, in place."""
    mesh = tp_mesh(mesh)
    plan = store(model, specs(size), mesh)
    install_regions(model, ["blocks.0", "blocks.1"], plan, group_of(mesh))
    return model.split(group_of(mesh))


def views(model):
    """What regions have left in instance dictionaries."""
    return [name for module in model.modules() for name in module.__dict__ if name in module._parameters]


def dense_grads(model):
    return {name: None if p.grad is None else p.grad.full_tensor() for name, p in model.named_parameters()}


def dense_gradient(name, grad, size):
    spec = {s.fqn: s for s in specs(size)}.get(name, ParameterSpec(name))
    return spec.dense(grad)


DENSE = dense_model()


def expected(model=DENSE):
    model = copy.deepcopy(model)
    out = model(inputs())
    (out * cotangent()).sum().backward()
    return out.detach(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_forward_and_gradients(size):
    out, grads = expected()

    def run():
        model = split(copy.deepcopy(DENSE), size)
        with torch.no_grad():
            torch.testing.assert_close(model(inputs()), out, rtol=1e-12, atol=1e-12)
        for times in (1, 2):  # gradients accumulate over micro-batches
            (model(inputs()) * cotangent()).sum().backward()
            assert not views(model)
            for name, p in model.named_parameters():
                assert type(p.grad) is DTensor and p.grad.placements == p.placements
                got = dense_gradient(name, p.grad.full_tensor(), size)
                torch.testing.assert_close(got, times * grads[name], rtol=1e-11, atol=1e-11, msg=name)
        return {name: p.grad._local_tensor for name, p in model.named_parameters() if p.placements[0].is_replicate()}

    ranks = run_ranks(run, size)
    for other in ranks[1:]:
        for name, grad in ranks[0].items():
            assert torch.equal(grad, other[name]), f"{name} differs between ranks"


def test_gloo_ranks():
    def run():
        model = split(copy.deepcopy(DENSE), 2)
        (model(inputs()) * cotangent()).sum().backward()
        return dense_grads(model)

    simulated, real = run_ranks(run, 2), run_ranks(run, 2, "gloo")
    for name, grad in simulated[0].items():
        torch.testing.assert_close(real[1][name], grad, rtol=1e-12, atol=1e-12)


def test_two_optimizer_steps_leave_padding_zero():
    def run():
        model = split(copy.deepcopy(DENSE), 3)
        dense = copy.deepcopy(DENSE)
        for optimizer in (torch.optim.AdamW, torch.optim.SGD):
            both = [(m, optimizer(m.parameters(), lr=0.1, weight_decay=0.1)) for m in (dense, model)]
            for m, optim in both:
                optim.zero_grad()
                (m(inputs()) * cotangent()).sum().backward()
                nn.utils.clip_grad_norm_(m.parameters(), 1.0)
                optim.step()
        for (name, p), q in zip(model.named_parameters(), dense.parameters(), strict=True):
            stored = p.full_tensor().detach()
            torch.testing.assert_close(dense_gradient(name, stored, 3), q.detach(), rtol=1e-9, atol=1e-9, msg=name)
            spec = {s.fqn: s for s in specs(3)}.get(name, ParameterSpec(name))
            torch.testing.assert_close(spec.stored(spec.dense(stored)), stored, rtol=0, atol=0, msg=f"{name}'s padding")

    run_ranks(run, 3)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_blocks(reentrant):
    _, grads = expected()

    def run():
        model = split(copy.deepcopy(DENSE), 2)
        model.blocks = Checkpointed(model.blocks, reentrant)
        (model(inputs()) * cotangent()).sum().backward()
        assert not views(model)
        for name, p in model.named_parameters():
            got = dense_gradient(name, p.grad.full_tensor(), 2)
            torch.testing.assert_close(got, grads[name], rtol=1e-11, atol=1e-11, msg=name)

    run_ranks(run, 2)


class Checkpointed(nn.ModuleList):
    """Runs each block, hooks included, under activation checkpointing, as Hugging Face layers do."""

    def __init__(self, blocks, reentrant):
        super().__init__(blocks)
        self.reentrant = reentrant

    def __iter__(self):
        for block in self._modules.values():
            yield lambda x, fail, block=block: checkpoint(block, x, use_reentrant=self.reentrant)


def test_an_exception_leaves_nothing_behind():
    def run():
        model = split(copy.deepcopy(DENSE), 2)
        with pytest.raises(ValueError, match="as asked"):
            model(inputs(), fail=True)
        assert not views(model)
        with torch.no_grad():
            return model(inputs())

    torch.testing.assert_close(run_ranks(run, 2)[0], expected()[0], rtol=1e-12, atol=1e-12)


def test_a_copy_is_independent():
    _, grads = expected()

    def run():
        model = split(copy.deepcopy(DENSE), 2)
        twin = copy.deepcopy(model)
        (twin(inputs()) * cotangent()).sum().backward()
        assert all(p.grad is None for p in model.parameters())
        assert not views(twin) and not views(model)
        assert twin.head.weight is twin.embed.weight and twin.head.weight is not model.head.weight
        for name, grad in dense_grads(twin).items():
            torch.testing.assert_close(dense_gradient(name, grad, 2), grads[name], rtol=1e-11, atol=1e-11, msg=name)

    run_ranks(run, 2)


def test_parts_can_be_called_alone():
    x = torch.randn(3, 5, 8, dtype=torch.float64)

    def run():
        model = split(copy.deepcopy(DENSE), 2)
        torch.testing.assert_close(model.blocks[1](x), DENSE.blocks[1](x), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(model.norm(x), DENSE.norm(x), rtol=0, atol=0)
        assert not views(model)
        assert model.head(x).shape[-1] == balanced(11, 2).local

    run_ranks(run, 2)


class Recursive(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(3, 3, dtype=torch.float64)

    def forward(self, x, depth=2):
        return self.lin(self(x, depth - 1) if depth else x).tanh()


def test_a_module_that_calls_itself():
    torch.manual_seed(0)
    dense, x = Recursive(), torch.randn(2, 3, dtype=torch.float64)
    dense(x).sum().backward()

    def run():
        model, mesh = Recursive(), tp_mesh(None)
        model.load_state_dict(dense.state_dict())
        install_regions(model, [], store(model, [], mesh), group_of(mesh))
        model(x).sum().backward()
        assert not views(model)
        return model.lin.weight.grad.full_tensor()

    torch.testing.assert_close(run_ranks(run, 1)[0], dense.lin.weight.grad, rtol=0, atol=0)


def test_frozen_and_unused_parameters_get_no_gradient():
    def run():
        model = split(copy.deepcopy(DENSE), 2)
        model.blocks[0].q.weight.requires_grad_(False)
        model.norm.bias.requires_grad_(False)
        out = model.blocks[0](torch.ones(1, 1, 8, dtype=torch.float64))
        out.sum().backward()
        return {name for name, p in model.named_parameters() if p.grad is not None}

    named = {f"blocks.0.{name}" for name, _ in DENSE.blocks[0].named_parameters()} - {"blocks.0.q.weight"}
    assert run_ranks(run, 2) == [named, named]


class Biases(nn.Module):
    """Two parameters that autograd hands the same gradient tensor."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.zeros(4))
        self.b = nn.Parameter(torch.zeros(4))

    def forward(self, x):
        return (x + self.a + self.b) * 3


@pytest.mark.parametrize("direct", [True, False])
def test_shared_gradient_tensors_are_not_shared_by_parameters(direct, monkeypatch):
    assert gradients.sole_owners() > 0, "this torch would take the slow way always"
    if not direct:
        monkeypatch.setattr(gradients, "sole_owners", lambda: -1)

    def run():
        model, mesh = Biases(), tp_mesh(None)
        install_regions(model, [], store(model, [], mesh), group_of(mesh))
        model(torch.ones(4)).sum().backward()
        model.a.grad._local_tensor.mul_(2)
        return model.a.grad._local_tensor, model.b.grad._local_tensor

    ((a, b),) = run_ranks(run, 1)
    assert a.tolist() == [6] * 4 and b.tolist() == [3] * 4


class Operators(TorchDispatchMode):
    """The names of all operators called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def test_weight_gradients_are_not_copied():
    def run():
        model, mesh = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), tp_mesh(None)
        install_regions(model, [], store(model, [], mesh), group_of(mesh))
        loss = model(torch.ones(2, 5, 3)).pow(2).sum()
        with Operators() as seen:
            loss.backward()
        return seen.names

    (names,) = run_ranks(run, 1)
    assert "aten::mm" in names and not {"aten::clone", "aten::copy_", "aten::_to_copy"} & set(names)


def test_autograd_grad_and_hooks_see_gradients():
    _, grads = expected()

    def run():
        model = split(copy.deepcopy(DENSE), 2)
        seen = []
        model.norm.weight.register_post_accumulate_grad_hook(lambda p: seen.append("after"))
        model.norm.bias.register_hook(lambda g: seen.append("before"))
        names, values = zip(*model.named_parameters(), strict=True)
        loss = (model(inputs()) * cotangent()).sum()
        for name, grad in zip(names, torch.autograd.grad(loss, values, retain_graph=True), strict=True):
            got = dense_gradient(name, grad.full_tensor(), 2)
            torch.testing.assert_close(got, grads[name], rtol=1e-11, atol=1e-11, msg=name)
        assert all(p.grad is None for p in values) and seen == ["before"]
        loss.backward(inputs=[model.norm.weight])
        assert [name for name, p in zip(names, values, strict=True) if p.grad is not None] == ["norm.weight"]
        assert seen == ["before", "after"]

    run_ranks(run, 2)


def test_partial_gradients_of_a_block_are_reduced_together():
    from colrow.rewrite.counting import count_collectives

    def run():
        model = split(copy.deepcopy(DENSE), 4)
        model.requires_grad_(False)
        model.blocks[0].head_norm.requires_grad_(True)
        model.blocks[0].k.requires_grad_(True)
        found = count_collectives(model, (inputs(),), backward=True)
        return [c.nbytes for c in found if c.direction == "backward"]

    sizes = run_ranks(run, 4)[0]
    own = 8 * (2 + 2 + 4 * 8 + 4)  # head_norm's weight and bias, the whole of k's
    assert sizes.count(own) == 1
    activations = 3 * 5 * 8 * 8
    assert all(nbytes in (own, activations) for nbytes in sizes), sizes


def compiled():
    """A compiled block gives the eager block's outputs and gradients, in one graph."""
    model, x = split(copy.deepcopy(DENSE), 2), torch.ones(2, 3, 8, dtype=torch.float64).cumsum(-1)
    block = model.blocks[0]
    expected = block(x)
    (expected**2).sum().backward()
    grads = {name: p.grad._local_tensor for name, p in block.named_parameters()}
    block.zero_grad()
    fast = torch.compile(block, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(fast(x), expected.detach(), rtol=1e-12, atol=1e-12)
    (fast(x) ** 2).sum().backward()
    for name, p in block.named_parameters():
        torch.testing.assert_close(p.grad._local_tensor, grads[name], rtol=1e-11, atol=1e-11, msg=name)
    assert not views(model)


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
def test_a_block_compiles():
    run_ranks(compiled, 2, "gloo")


def test_a_part_of_what_fsdp2_shards_is_refused():
    def run():
        mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("dp", "tp"))
        model = split(copy.deepcopy(DENSE), 1, mesh)
        fully_shard(model, mesh=mesh["dp"])
        with pytest.raises(UsageError, match="FSDP2 holds it in pieces"):
            model.blocks[0](torch.ones(1, 1, 8, dtype=torch.float64))
        assert not views(model)

    run_ranks(run, 2, "gloo")


@pytest.mark.parametrize("grad", [True, False])
def test_fsdp2_inside_a_block(grad):
    """The block's own parameters come from the root's gathering, a part's from its own: both are read."""

    def run():
        mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("dp", "tp"))
        model = split(copy.deepcopy(DENSE), 1, mesh)
        fully_shard(model.blocks[0].up, mesh=mesh["dp"])
        fully_shard(model, mesh=mesh["dp"])
        for _ in range(2):
            with torch.set_grad_enabled(grad):
                out = model(inputs())
            torch.testing.assert_close(out, DENSE(inputs()).detach(), rtol=1e-12, atol=1e-12)
            assert not views(model)
        if grad:
            (out * cotangent()).sum().backward()
            for name, value in dense_grads(model).items():
                torch.testing.assert_close(value, expected()[1][name], rtol=1e-10, atol=1e-10, msg=name)

    run_ranks(run, 2, "gloo")


@pytest.mark.parametrize("fsdp", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_hugging_face_checkpointing(fsdp, reentrant):
    """Its layers checkpoint ``forward`` with the hooks left out, and recompute it when no forward is running."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=31, max_position_embeddings=64,
    )  # fmt: skip
    dense, ids = transformers.LlamaForCausalLM(config), torch.arange(24).view(2, 12)
    dense(ids, labels=ids).loss.backward()

    def run():
        mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("dp", "tp"))
        model = copy.deepcopy(dense)
        model.zero_grad()
        group = group_of(mesh)
        install_regions(model, ["model.layers.0", "model.layers.1"], store(model, [], tp_mesh(mesh)), group)
        if fsdp:
            for layer in model.model.layers:
                fully_shard(layer, mesh=mesh["dp"])
            fully_shard(model, mesh=mesh["dp"])
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        if reentrant:
            model.enable_input_require_grads()
        for _ in range(2):
            model.zero_grad()
            model.train()(ids, labels=ids).loss.backward()
            assert not views(model)
            for (name, p), q in zip(model.named_parameters(), dense.parameters(), strict=True):
                torch.testing.assert_close(p.grad.full_tensor(), q.grad, rtol=1e-5, atol=1e-7, msg=name)

    run_ranks(run, 2, "gloo")
