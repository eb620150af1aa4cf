"""Models that would run the same forward are known as such, and no others: what is validated once holds for them."""

import copy

import pytest
from plain_models import Decoder
from torch import nn

from colrow.rewrite.identity import identity
from colrow.rewrite.undoing import all_or_nothing

MODEL = Decoder(2)


def test_copies_and_other_weights_are_alike():
    assert identity(copy.deepcopy(MODEL)) == identity(Decoder(2)) == identity(MODEL)


def other_attribute(model):
    model.blocks[1].index = 7


def own_forward(model):
    model.blocks[0].mlp.forward = model.blocks[1].mlp.forward


def hooked(model):
    model.norm.register_forward_hook(lambda module, args, output: output)


def other_class(model):
    model.norm.__class__ = type("Norm", (type(model.norm),), {})


def frozen(model):
    model.norm.weight.requires_grad_(False)


def configured(model):
    model.config = type("Config", (), {})()
    model.config.heads = 4


CHANGES = [other_attribute, own_forward, hooked, other_class, frozen, configured, lambda model: model.eval()]


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen(change):
    model = copy.deepcopy(MODEL)
    change(model)
    assert identity(model) != identity(MODEL)


def test_what_a_configuration_holds_is_seen():
    one, other = copy.deepcopy(MODEL), copy.deepcopy(MODEL)
    for model in (one, other):
        configured(model)
    other.config.heads = 8
    assert identity(one) != identity(other)


@pytest.mark.parametrize("change", CHANGES)
def test_a_failure_undoes_every_change(change):
    model, weight = copy.deepcopy(MODEL), MODEL.norm.weight
    before = identity(model)
    with pytest.raises(ValueError), all_or_nothing(model):
        if change is not frozen:  # of a parameter, which is replaced, not written into
            change(model)
        model.norm.weight = nn.Parameter(weight.detach() + 1)
        model.blocks[0].register_buffer("scale", weight.detach())
        raise ValueError
    assert identity(model) == before
    assert (model.norm.weight == weight).all()


def test_a_class_defined_again_is_another():
    """As in a notebook: the same name and attributes, another forward."""

    def defined(change):
        class Named(nn.Module):
            def forward(self, x):
                return change(x)

        return Named()

    assert identity(defined(abs)) != identity(defined(abs))
