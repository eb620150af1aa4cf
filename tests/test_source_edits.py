"""Source edits: one of each expression kind and of each way to reach a function, replaced and compared call by call."""

from __future__ import annotations

import copy
import functools
import importlib.util
import inspect
import linecache
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from call_chains import assert_compilers_see_through, assert_every_call_replaced, edit_everything, identity, traced
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from colrow.cost_models.errors import ValidationError
from colrow.planner.sites import Frame
from colrow.rewrite.bodies import can_edit, edit_module, edited_source, restore


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


class _Made:
    def __init__(self, x):
        self.value = x.erf()


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


def test_compilers_see_through() -> None:
    model = Everything()
    model.asked = 0  # an attribute that appears while tracing is no business of this test
    assert_compilers_see_through(model, {"x": torch.randn(2, 3, 4)})


def test_fully_shard_swaps_classes_on_top() -> None:
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
            x = _Made(x).value + sum(map(_shifted, [x]))
            return local(x) * (0 < x < 5)

    made, odd = scope["Layer"](), Odd()
    reasons = {
        "no readable source": traced(made, torch.ones(1)).chains(made, "relu")[0],
        "made anew": traced(odd, torch.ones(1)).chains(odd, "tanh")[0],
        "no single operation": traced(odd, torch.ones(1)).chains(odd, "lt")[0],
        "x[i] += y": traced(odd, torch.ones(1)).chains(odd, "__setitem__")[0],
        "_Made.__init__ is not called by '_Made(x)'": traced(odd, torch.ones(1)).chains(odd, "erf")[0],
        "_shifted is not called by 'sum(map(_shifted, [x]))'": traced(odd, torch.ones(1)).chains(odd, "mul")[0],
        "not made by a module": (),
    }
    for reason, chain in reasons.items():
        assert reason in (can_edit(chain) or ""), (reason, can_edit(chain))
    first = reasons["made anew"][0]
    assert "no call" in (can_edit((Frame(first.file, first.qualname, first.firstlineno, (0, 0, 0, 3)),)) or "")
    assert "no function" in (can_edit((Frame(first.file, "gone", first.firstlineno, first.span),)) or "")


def test_a_module_imported_again_is_the_one_that_is_found(tmp_path, monkeypatch):
    import importlib
    import sys

    from colrow.planner.source_functions import key_of, live_object

    (tmp_path / "imported_twice.py").write_text("def twice(x):\n    return x + x\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    first = importlib.import_module("imported_twice").twice
    assert live_object(key_of(first.__code__)) is first
    del sys.modules["imported_twice"]  # and back in: as many modules as before
    second = importlib.import_module("imported_twice").twice
    assert live_object(key_of(second.__code__)) is second is not first
    monkeypatch.delitem(sys.modules, "imported_twice")
