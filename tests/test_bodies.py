"""Edited bodies: every traced call of real models can be replaced where it stands, and nothing else changes."""

from __future__ import annotations

import copy
import functools
import gc
import importlib.util
import linecache
import operator
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode

from colrow.cost_models.errors import ValidationError
from colrow.planner.sites import Frame, frame_of
from colrow.rewrite.bodies import can_edit, edit_module, edited_source, restore

MODULE_CALL = nn.Module._call_impl.__code__
TORCH = torch.__path__[0]
Chain = tuple[Frame, ...]


class Tracer(TorchFunctionMode):
    """Every torch call made below a module: module, chain, function. An ``if`` and ``no_grad`` are no expressions."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[nn.Module, Chain, Any]] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        frame, chain = sys._getframe(1), []
        while frame is not None and frame.f_code is not MODULE_CALL:
            file = frame.f_code.co_filename
            if chain or not file.startswith(TORCH) or file.startswith(f"{TORCH}/nn/modules"):
                chain.append(frame_of(frame.f_code, frame.f_lasti))
            frame = frame.f_back
        if frame is not None and chain and getattr(func, "__name__", "") not in ("__bool__", "_set_grad_enabled"):
            self.calls.append((frame.f_locals["self"], tuple(reversed(chain)), func))
        return func(*args, **(kwargs or {}))

    def chains(self, module: nn.Module, name: str) -> list[Chain]:
        """The distinct chains of one module's calls of the function called ``name``, in order."""
        found = [c for m, c, func in self.calls if m is module and getattr(func, "__name__", "") == name]
        return list(dict.fromkeys(found))


def traced(model: nn.Module, *args: Any, **kwargs: Any) -> Tracer:
    with Tracer() as tracer, torch.no_grad():
        model(*args, **kwargs)
    return tracer


def identity(func, /, *args, **kwargs):
    return func(*args, **kwargs)


def edit_everything(model: nn.Module, tracer: Tracer, replacement: Callable[..., Any] | None = None) -> None:
    edits: dict[int, tuple[nn.Module, dict[Chain, Any]]] = {}
    for module, chain, _ in tracer.calls:
        assert can_edit(chain) is None, can_edit(chain)
        edits.setdefault(id(module), (module, {}))[1][chain] = replacement or identity
    for module, of_module in edits.values():
        edit_module(module, of_module)


@dataclass(frozen=True, eq=False)
class Watched:
    """A replacement that shows which site is running."""

    chain: Chain
    running: Any

    def __call__(self, func, /, *args, **kwargs):
        self.running.append(self.chain)
        try:
            return func(*args, **kwargs)
        finally:
            self.running.pop()


class Witness(TorchFunctionMode):
    """Which site every torch call runs in."""

    def __init__(self) -> None:
        super().__init__()
        self.running: list[Chain] = []
        self.seen: list[tuple[Chain, Any]] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if self.running:
            self.seen.append((self.running[-1], func))
        return func(*args, **(kwargs or {}))


def assert_every_call_replaced(model: nn.Module, *args: Any, **kwargs: Any) -> Tracer:
    """Replaces every traced call and compares, call by call, the sites that then run with the traced ones."""
    with torch.no_grad():
        expected = model(*args, **kwargs)
    tracer = traced(model, *args, **kwargs)
    witness = Witness()
    edits: dict[int, tuple[nn.Module, dict[Chain, Any]]] = {}
    for module, chain, _ in tracer.calls:
        assert can_edit(chain) is None, can_edit(chain)
        edits.setdefault(id(module), (module, {}))[1][chain] = Watched(chain, witness.running)
    for module, of_module in edits.values():
        edit_module(module, of_module)
    with witness, torch.no_grad():
        actual = model(*args, **kwargs)
    assert witness.seen == [(chain, func) for _, chain, func in tracer.calls]
    for a, b in zip(_tensors(actual), _tensors(expected), strict=True):
        assert torch.equal(a, b)
    return tracer


def _tensors(value: Any) -> list[Tensor]:
    value = value[0] if not isinstance(value, Tensor) else value
    return [value]


SIZES = {
    "gpt_neox": {"num_key_value_heads": None},
    "llama": {"num_key_value_heads": 2},
    "mixtral": {"num_key_value_heads": 2, "num_local_experts": 4},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "bert": {},
    "t5": {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4},
}


def small(model_type: str, **changes: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    """A two-layer random model and its inputs."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "vocab_size": 96,
    }
    config = transformers.AutoConfig.for_model(model_type, **{**sizes, **SIZES[model_type], **changes})
    config.bos_token_id = config.eos_token_id = 1
    model = transformers.AutoModel.from_config(config).eval()
    ids = torch.randint(0, 90, (2, 12))
    inputs = {"input_ids": ids, "decoder_input_ids": ids} if config.is_encoder_decoder else {"input_ids": ids}
    return model, inputs


@pytest.mark.parametrize("model_type", SIZES)
def test_every_call_of_a_model_can_be_replaced(model_type: str) -> None:
    model, inputs = small(model_type)
    assert_every_call_replaced(model, **inputs)


def test_eager_attention_and_its_helper_in_the_same_file() -> None:
    model, inputs = small("llama", attn_implementation="eager")
    tracer = assert_every_call_replaced(model, **inputs)
    names = {frame.qualname for _, chain, _ in tracer.calls for frame in chain}
    assert {"eager_attention_forward", "repeat_kv", "apply_rotary_pos_emb", "rotate_half"} <= names


def test_a_helper_in_another_file_through_a_local_variable() -> None:
    model, inputs = small("llama", attn_implementation="sdpa")
    attention = model.layers[0].self_attn
    inputs["attention_mask"] = torch.ones(2, 12).tril(-3)[:, :12].bool().long()  # padding: no grouped-query kernel
    chains = traced(model, **inputs).chains(attention, "scaled_dot_product_attention")
    assert [frame.qualname for frame in chains[0]] == ["LlamaAttention.forward", "sdpa_attention_forward"]
    seen: list[Any] = []

    def watch(func, /, *args, **kwargs):
        seen.append((func, len(args), sorted(kwargs)))
        return func(*args, **kwargs)

    edit_module(attention, {chains[0]: watch})
    model(**inputs)
    assert len(seen) == 1
    assert seen[0][0] is F.scaled_dot_product_attention
    assert "is_causal" in seen[0][2]


def test_another_helper_than_the_recorded_one_is_refused() -> None:
    model, inputs = small("llama", attn_implementation="sdpa")
    attention = model.layers[0].self_attn
    edit_module(attention, {traced(model, **inputs).chains(attention, "scaled_dot_product_attention")[0]: identity})
    model.set_attn_implementation("eager")
    with pytest.raises(ValidationError, match="eager_attention_forward.*sdpa_attention_forward"):
        model(**inputs)


def test_nested_sums_are_two_sites() -> None:
    model, inputs = small("gpt_neox")
    layer = model.layers[0]
    inner, outer = traced(model, **inputs).chains(layer, "add")
    seen: list[tuple[str, Any, list[Tensor]]] = []

    def watch(name):
        def site(func, /, *args):
            seen.append((name, func, list(args)))
            return func(*args)

        return site

    edit_module(layer, {inner: watch("inner"), outer: watch("outer")})
    model(**inputs)
    assert [name for name, _, _ in seen] == ["inner", "outer"]
    assert seen[0][1] is operator.add
    assert torch.equal(seen[1][2][0], seen[0][2][0] + seen[0][2][1])


def test_one_helper_called_twice_is_edited_once_per_call() -> None:
    model, inputs = small("llama")
    attention = model.layers[0].self_attn
    chains = traced(model, **inputs).chains(attention, "neg")
    assert len(chains) == 2
    assert chains[0][-1] == chains[1][-1]
    assert chains[0][1] != chains[1][1]
    shapes: list[tuple[int, ...]] = []

    def watch(func, /, x):
        shapes.append(tuple(x.shape))
        return func(x)

    edit_module(attention, {chains[1]: watch})
    model(**inputs)
    assert shapes == [(2, 2, 12, 4)]  # the keys: 2 heads; the queries have 4


def test_layers_of_torch_and_their_neighbours() -> None:
    class Three(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.norm = nn.Embedding(7, 4), nn.LayerNorm(4)
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.second(self.first(self.norm(self.embed(x))))

    model, ids = Three(), torch.arange(5)
    before = model(ids)
    tracer = traced(model, ids)
    doubled = lambda func, /, *args, **kwargs: 2 * func(*args, **kwargs)  # noqa: E731
    edit_module(model.second, dict.fromkeys(tracer.chains(model.second, "linear"), doubled))
    assert torch.equal(model(ids), 2 * before)
    assert type(model.first) is nn.Linear
    assert isinstance(model.second, nn.Linear) and repr(model.second) == repr(model.first)
    assert "__colrow_0__(F.linear, input, self.weight, self.bias)" in edited_source(model.second)
    assert edited_source(model.first) == ""
    restore(model.second)
    assert type(model.second) is nn.Linear
    assert torch.equal(model(ids), before)
    assert_every_call_replaced(model, ids)


def _scaled(factor: float) -> Callable[..., Any]:
    def decorate(function):
        @functools.wraps(function)
        def wrapper(*args, **kwargs):
            return function(*args, **kwargs) * factor

        return wrapper

    return decorate


class _Pool:
    def __call__(self, x):
        return x.mean(-1, keepdim=True)


def _shifted(x: Tensor, by: float = 1.0, *, scale: float = 2.0) -> Tensor:
    return (x + by) * scale


class Parent(nn.Module):
    def forward(self, x):
        return torch.relu(x)


class Everything(Parent):
    """One of each expression kind and of each way to reach a function."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(12, 4))
        self.register_buffer("table", torch.randn(3, 4))
        self.pool, self.square = _Pool(), lambda x: x * x
        self.shift = functools.partial(_shifted, by=3.0)
        self.__hidden = torch.tanh

    def __private(self, x):
        return self.__hidden(x) - 1.0

    @staticmethod
    def _static(x):
        return x.abs()

    @torch.no_grad()
    def _frozen(self, x):
        return x.exp()

    @_scaled(0.5)
    def _decorated(self, x):
        return x.sigmoid()

    @_scaled(2.0)
    def forward(self, x, *rest, flag=True, **extra):
        shape = (*x.shape[:-1], 3, 4)
        q, k, v = F.linear(x, self.weight).view(shape).unbind(-2)
        y = (
            q
            .transpose(0, 1)
            .contiguous()
            .transpose(0, 1)
        )  # fmt: skip
        y += k
        holder = [v, v.clone()]
        holder[0] = holder[0] @ self.table[:, : v.size(-1)].mT[..., :3].mT.mT @ self.table
        holder[self._index()] *= 2
        grid = torch.zeros_like(y)
        grid[..., 1:] = -y[..., 1:]
        for _ in range(2):
            y = y + grid**2 if flag else y
        options = {"dim": -1}
        parts = [part * 2 for part in y.split(1, dim=-1)]
        y = torch.cat((*parts,), **options)
        y = sum(part.sin() for part in (y, k)) + {n: t.cos() for n, t in (("a", y),)}["a"]
        y = y + super().forward(y) + self.pool(y) + self.square(y) + self.shift(y) + _shifted(y, scale=3.0)
        y = y + self.__private(y) + self._static(y) + self._frozen(y) + self._decorated(y)
        return torch.where(y > 0, y, ~(y < -1) * 0.1) / y.norm() + holder[0] + holder[1]

    def _index(self):
        self.asked = getattr(self, "asked", 0) + 1
        return 1


def test_every_expression_kind() -> None:
    torch.manual_seed(0)
    model = Everything()
    tracer = assert_every_call_replaced(model, torch.randn(2, 3, 4))
    assert model.asked == 3  # once a run: an index is not evaluated twice
    names = {getattr(func, "__name__", "") for _, _, func in tracer.calls}
    assert {"linear", "view", "__setitem__", "iadd", "__iadd__", "add_"} & names
    source = edited_source(model)
    assert "__colrow_value__ = " in source and "__operator__.iadd" in source
    assert "# _scaled.<locals>.decorate.<locals>.wrapper, " in source


def test_gradients_flow_through_replaced_calls() -> None:
    torch.manual_seed(0)
    model, x = Everything(), torch.randn(2, 3, 4)
    model(x).sum().backward()
    expected, model.weight.grad = model.weight.grad.clone(), None
    edit_everything(model, traced(model, x))
    model(x).sum().backward()
    assert torch.equal(model.weight.grad, expected)


@dataclass(frozen=True)
class Times:
    """A replacement with state, compared by value."""

    factor: float

    def __call__(self, func, /, *args, **kwargs):
        return func(*args, **kwargs) * self.factor


def test_equal_edits_share_a_class_and_unequal_ones_do_not() -> None:
    model, inputs = small("gpt_neox")
    chains = [traced(model, **inputs).chains(layer.mlp.dense_4h_to_h, "linear")[0] for layer in model.layers]
    assert chains[0] == chains[1]
    first, second = (layer.mlp.dense_4h_to_h for layer in model.layers)
    edit_module(first, {chains[0]: Times(1.0)})
    edit_module(second, {chains[1]: Times(1.0)})
    assert type(first) is type(second)
    restore(second)
    edit_module(second, {chains[1]: Times(2.0)})
    assert type(first) is not type(second)


def test_unused_classes_are_collected() -> None:
    import weakref

    layer = nn.Linear(2, 2)
    edit_module(layer, dict.fromkeys(traced(layer, torch.randn(1, 2)).chains(layer, "linear"), Times(3.0)))
    held = weakref.ref(type(layer))
    del layer
    gc.collect()
    assert held() is None


def test_ranks_in_threads_do_not_mix() -> None:
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    x = torch.randn(3, 4)
    chain = traced(dense, x).chains(dense[0], "linear")[0]
    expected = dense(x)
    results: dict[int, Tensor] = {}

    def rank(index: int) -> None:
        model = copy.deepcopy(dense)
        edit_module(model[1], {chain: Times(float(index))})
        for _ in range(50):
            results[index] = model(x).detach()

    threads = [threading.Thread(target=rank, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in range(4):
        assert torch.equal(results[index], expected * index)


def test_a_copy_stands_on_its_own() -> None:
    torch.manual_seed(0)
    model, x = Everything(), torch.randn(2, 3, 4)
    edit_everything(model, traced(model, x))
    twin = copy.deepcopy(model)
    before = model(x)
    with torch.no_grad():
        twin.weight.zero_()
    assert torch.equal(model(x), before)
    assert not torch.equal(twin(x), before)
    assert type(twin) is type(model)


@pytest.mark.parametrize("build", [lambda: small("gpt_neox"), lambda: small("gpt2"), lambda: (Everything(), None)])
def test_compilers_see_through(build: Callable[[], tuple[nn.Module, Any]]) -> None:
    model, inputs = build()
    inputs = {"x": torch.randn(2, 3, 4)} if inputs is None else {**inputs, "use_cache": False}
    plain = isinstance(model, Everything)
    if plain:
        model.asked = 0  # an attribute that appears while tracing is no business of this test
    expected = _tensors(model(**inputs))[0]
    edit_everything(model, traced(model, **inputs))
    torch._dynamo.reset()
    assert torch.equal(_tensors(torch.compile(model, fullgraph=True, backend="eager")(**inputs))[0], expected)
    exported = torch.export.export(model, (), inputs, strict=False)
    assert torch.equal(_tensors(exported.module()(**inputs))[0], expected)
    tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
    graph = make_fx(
        lambda kw: _tensors(model(**{**inputs, **kw}))[0],
        pre_dispatch=True,
        tracing_mode="fake",
        _allow_non_fake_inputs=True,
    )(tensors)
    assert any(node.op == "call_function" for node in graph.graph.nodes)


def test_equal_layers_compile_once() -> None:
    model, inputs = small("gpt_neox", num_hidden_layers=10)  # more than the recompile limit of 8
    edit_everything(model, traced(model, **inputs))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for layer in model.layers:
        layer.compile(fullgraph=True, backend="eager")
    with torch.no_grad():
        model(**inputs, use_cache=False)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_fully_shard_swaps_classes_on_top(tmp_path) -> None:
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        torch.manual_seed(0)
        model, x = Everything(), torch.randn(2, 3, 4)
        expected = model(x)
        edit_everything(model, traced(model, x))
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        fully_shard(model, mesh=mesh)
        assert torch.equal(model(x), expected)
        assert isinstance(model, Everything) and edited_source(model)
        with pytest.raises(ValidationError, match="swapped again"):
            restore(model)
    finally:
        dist.destroy_process_group()


def test_super_and_signature_survive() -> None:
    import inspect

    model = Everything()
    before = inspect.signature(model.forward)
    edit_everything(model, traced(model, torch.randn(2, 3, 4)))
    assert inspect.signature(model.forward) == before
    assert type(model).__name__ == "Everything" and type(model).__module__ == Everything.__module__


def _loaded(path, name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


SOURCE = """
from torch import nn

class Layer(nn.Module):
    def forward(self, x):
        return x.relu() + 1
"""


def test_changed_source_is_refused(tmp_path) -> None:
    path = tmp_path / "changing.py"
    path.write_text(SOURCE)
    layer = _loaded(path, "changing").Layer()
    chain = traced(layer, torch.ones(1)).chains(layer, "relu")[0]
    assert can_edit(chain) is None
    path.write_text(SOURCE.replace("+ 1", "- 1"))
    with pytest.raises(ValidationError, match="not what was imported"):
        edit_module(layer, {chain: identity})
    path.unlink()
    with pytest.raises(ValidationError, match="source"):
        edit_module(layer, {chain: identity})
    assert edited_source(layer) == ""


def test_what_cannot_be_edited_says_why() -> None:
    scope: dict[str, Any] = {"nn": nn}
    exec(compile(SOURCE, "<made>", "exec"), scope)
    linecache.clearcache()

    class Odd(nn.Module):
        def forward(self, x):
            def local(y):
                return y.tanh()

            x[0] += 1
            return local(x) * (0 < x < 5)

    made, odd = scope["Layer"](), Odd()
    reasons = {
        "no readable source": traced(made, torch.ones(1)).chains(made, "relu")[0],
        "made anew": traced(odd, torch.ones(1)).chains(odd, "tanh")[0],
        "no single operation": traced(odd, torch.ones(1)).chains(odd, "lt")[0],
        "x[i] += y": traced(odd, torch.ones(1)).chains(odd, "__setitem__")[0],
        "not made by a module": (),
    }
    for reason, chain in reasons.items():
        assert reason in (can_edit(chain) or ""), (reason, can_edit(chain))
    first = reasons["made anew"][0]
    assert "no call" in (can_edit((Frame(first.file, first.qualname, first.firstlineno, (0, 0, 0, 3)),)) or "")
    assert "no function" in (can_edit((Frame(first.file, "gone", first.firstlineno, first.span),)) or "")


def test_misuse_is_refused() -> None:
    layer, x = nn.Linear(2, 2), torch.randn(1, 2)
    chain = traced(layer, x).chains(layer, "linear")[0]
    with pytest.raises(ValidationError, match="starts elsewhere"):
        edit_module(nn.Embedding(2, 2), {chain: identity})
    edit_module(layer, {chain: identity})
    with pytest.raises(ValidationError, match="edited already"):
        edit_module(layer, {chain: identity})
    own = nn.Linear(2, 2)
    own.forward = own.forward
    with pytest.raises(ValidationError, match="of its own"):
        edit_module(own, {chain: identity})
    restore(own)  # not edited: nothing to do
