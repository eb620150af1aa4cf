"""Training loops that do more than forward, backward and step: right as dense training is, or refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from split_model import cotangent, dense_model, inputs, specs
from test_regions import split, views
from torch import Tensor, nn

from colrow.cost_models.errors import UsageError
from colrow.rewrite.ranks import run_ranks
from colrow.rewrite.storage import ParameterSpec

DENSE = dense_model()
SIZE = 3  # queries even, kv heads held twice, everything else padded


def loss_of(model: nn.Module) -> Tensor:
    loss: Tensor = (model(inputs()) * cotangent()).sum()
    return loss


def same(train: Callable[[nn.Module], Any]) -> None:
    """``train`` leaves parameters and gradients of the split model as it leaves the dense one's."""
    dense = copy.deepcopy(DENSE)
    train(dense)
    true = dict(dense.named_parameters())

    def run() -> None:
        model = split(copy.deepcopy(DENSE), SIZE)
        train(model)
        known = {spec.fqn: spec for spec in specs(SIZE)}
        for name, p in model.named_parameters():
            spec = known.get(name, ParameterSpec(name))
            for what, got, want in (("value", p, true[name]), ("gradient", p.grad, true[name].grad)):
                if want is None:
                    assert got is None, name
                else:
                    found = spec.dense(got.full_tensor())
                    torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-9, msg=f"{what} of {name}")

    run_ranks(run, SIZE)


def noisy_parameters(model: nn.Module) -> None:
    """Written to as a whole, padding included: by in-place operators, and through ``data``, where no version tells."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.01)
    loss_of(model).backward()
    for p in model.parameters():
        p.data.mul_(1.1).add_(0.02)
    loss_of(model).backward()


def hooked_gradients(model: nn.Module) -> None:
    """A hook that makes something of nothing, as gradient noise does."""
    for p in model.parameters():
        p.register_hook(lambda gradient: (gradient + 1).cos())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        loss_of(model).backward()
        optimizer.step()
        optimizer.zero_grad()


def stepped_in_backward(model: nn.Module) -> None:
    """Each parameter by its own optimiser, as soon as its gradient is there."""
    optimizers = {p: torch.optim.AdamW([p], lr=0.05) for p in model.parameters()}

    def step(p: Tensor) -> None:
        optimizers[p].step()  # type: ignore[index]
        optimizers[p].zero_grad()  # type: ignore[index]

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(step)
    for _ in range(2):
        loss_of(model).backward()


def two_graphs(model: nn.Module) -> None:
    """Backward passes in another order than the forwards, one of them twice."""
    one, other = loss_of(model), loss_of(model).square()
    other.backward(retain_graph=True)
    one.backward()
    (other / 2).backward()


@pytest.mark.parametrize("train", [noisy_parameters, hooked_gradients, stepped_in_backward, two_graphs])
def test_same_as_dense(train: Callable[[nn.Module], Any]) -> None:
    same(train)


def test_adamw_makes_a_step_of_rounding() -> None:
    """Why float64 models that compute in float32 (upcasting norms) differ after AdamW, with any clipping: a gradient
    near eps is rounding, and lr * g / (|g| + eps) is a step of its own. Without rounding the same entry is right.
    """

    def stepped(gradient: float, eps: float) -> float:
        p = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        p.grad = torch.tensor([gradient], dtype=torch.float64)
        torch.optim.AdamW([p], lr=1e-2, eps=eps).step()
        return float(p.detach())

    of_float32 = 1e-8  # of gradients near 0.1
    assert abs(stepped(of_float32, 1e-8) - stepped(2 * of_float32, 1e-8)) > 1e-3
    assert abs(stepped(of_float32, 1e-5) - stepped(2 * of_float32, 1e-5)) < 1e-4  # as `verify` has it


def clipped_adamw(model: nn.Module) -> None:
    """With eps at its default: the model computes in float64 throughout."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for step in range(2):
        optimizer.zero_grad()
        loss_of(model).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3, foreach=bool(step))
        optimizer.step()


def test_clipped_adamw_is_exact_where_nothing_computes_in_float32() -> None:
    same(clipped_adamw)


def test_noise_in_padding_is_not_seen_in_evaluation() -> None:
    dense = copy.deepcopy(DENSE)
    with torch.no_grad():
        for p in dense.parameters():
            p.add_(0.01)
        expected = dense(inputs())

    def run() -> None:
        model = split(copy.deepcopy(DENSE), SIZE)
        with torch.no_grad():
            model(inputs())
            for p in model.parameters():
                p.add_(0.01)
            torch.testing.assert_close(model(inputs()), expected, rtol=1e-11, atol=1e-11)

    run_ranks(run, SIZE)


def test_a_step_between_a_forward_and_its_backward_is_refused() -> None:
    """As torch refuses it in the dense model: it would be the gradient of other weights."""
    dense = copy.deepcopy(DENSE)
    kept = loss_of(dense)
    torch.optim.SGD(dense.parameters(), lr=0.1).zero_grad()
    loss_of(dense).backward()
    torch.optim.SGD(dense.parameters(), lr=0.1).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.backward()

    def run() -> None:
        model = split(copy.deepcopy(DENSE), 2)
        kept = loss_of(model)
        loss_of(model).backward()
        torch.optim.SGD(model.parameters(), lr=0.1).step()
        with pytest.raises(UsageError, match="changed in place between a forward and its backward"):
            kept.backward()
        assert not views(model)

    run_ranks(run, 2)


@pytest.mark.filterwarnings("ignore:Using backward")
def test_gradients_of_parameters_are_not_differentiated_again() -> None:
    def run() -> None:
        model = split(copy.deepcopy(DENSE), 2)
        with pytest.raises(UsageError, match="create_graph=True"):
            loss_of(model).backward(create_graph=True)
        with pytest.raises(UsageError, match="create_graph=True"):
            torch.autograd.grad(loss_of(model), list(model.parameters()), create_graph=True)

    run_ranks(run, 2)


def test_dense_tensors_in_the_place_of_parameters_are_refused() -> None:
    def run() -> None:
        model = split(copy.deepcopy(DENSE), 2)
        stored, dense = dict(model.named_parameters()), dict(DENSE.named_parameters())
        torch.testing.assert_close(torch.func.functional_call(model, stored, (inputs(),)), DENSE(inputs()))
        with pytest.raises(UsageError, match="something else in the place of this parameter"):
            torch.func.functional_call(model, dense, (inputs(),))
        with pytest.raises(UsageError, match="something else in the place of this parameter"):
            torch.func.grad(lambda values: torch.func.functional_call(model, values, (inputs(),)).sum())(stored)
        assert not views(model)
        loss_of(model).backward()

    run_ranks(run, 2)
