"""What cannot be done is refused: on every rank, within a minute, by name, with the model as it was and no file half
written."""

from __future__ import annotations

import os
import signal
from functools import cache

import pytest
import torch
import torch.distributed as dist
from plain_models import HIDDEN, IDS, Decoder, Mlp
from safetensors.torch import save_file
from torch import nn

from colrow.cost_models.errors import ColrowError, RankError
from colrow.planner import Plan, plan
from colrow.rewrite.identity import identity
from colrow.rewrite.parallel import parallelize
from colrow.rewrite.ranks import run_ranks

TP = 2
LIMIT_S = 60  # the contract's; a rank that is still at it then ends the test


@cache
def planned(tp: int = TP, **options: object) -> Plan:
    return plan(Decoder(2, **options), IDS, tp=tp, phase="train")


# ---- parallelize


def refused(build, p=None, checkpoint=None):
    """What every rank says of ``parallelize(build(rank), p(rank))``: error class, exit code, message."""

    def on_rank():
        rank = dist.get_rank()
        model, made = build(rank), p(rank) if callable(p) else p or planned()
        before, values = identity(model), {name: (value, value.clone()) for name, value in model.named_parameters()}
        drawn = torch.get_rng_state()
        try:
            parallelize(model, made, checkpoint=checkpoint)
        except ColrowError as error:
            said = type(error).__name__, error.exit_code, str(error)
        else:
            return None
        assert identity(model) == before, "classes, hooks, attributes"
        for name, value in model.named_parameters():
            assert value is values[name][0], name
            assert value.is_meta or torch.equal(value, values[name][1]), name
        assert torch.equal(torch.get_rng_state(), drawn)
        return said

    return run_ranks(on_rank, TP, "gloo", timeout_s=LIMIT_S)


def marked(name, value):
    def build(rank):
        model = Decoder(2)
        setattr(model, name, value)
        return model

    return build


def hooked(rank):
    model = Decoder(2)
    model.blocks[1].mlp._hf_hook = object()  # as accelerate marks them
    return model


def hooked_by_accelerate(rank):
    hooks = pytest.importorskip("accelerate.hooks")
    model = Decoder(2)
    hooks.add_hook_to_module(model.blocks[1].mlp, hooks.ModelHook())
    return model


def int8(rank):
    model = Decoder(2)
    up = model.blocks[0].mlp.up
    up.weight = nn.Parameter(up.weight.detach().to(torch.int8), requires_grad=False)
    return model


def configured(rank):
    model = Decoder(2)
    model.config = type("Config", (), {"quantization_config": {"quant_method": "gptq"}})()
    return model


def on_meta(rank):
    with torch.device("meta"):
        return Decoder(2)


def own_forward(rank):
    model = Decoder(2)
    down = model.blocks[1].mlp.down
    down.forward = lambda x: 2 * type(down).forward(down, x)
    return model


def narrower(rank):
    model = Decoder(2)
    model.blocks[1].mlp.up = nn.Linear(HIDDEN, 8, bias=False)
    return model


def with_more(rank):
    model = Decoder(2)
    model.blocks[1].extra = nn.Linear(HIDDEN, HIDDEN)
    return model


class Softmax(Mlp):
    """The parameters of `Mlp`, between which every column reads every other."""

    def forward(self, x):
        return self.down(self.gate(x) + torch.softmax(self.up(x), -1))


def other_code(rank):
    model = Decoder(2)
    model.blocks[1].mlp.__class__ = Softmax
    return model


@pytest.mark.parametrize(
    ("build", "p", "kind", "code", "words"),
    [
        (marked("hf_device_map", {"": 0}), None, "UsageError", 2, "Decoder: the model is dispatched by a device_map"),
        (hooked, None, "UsageError", 2, "blocks.1.mlp: accelerate moves its weights"),
        (hooked_by_accelerate, None, "UsageError", 2, "blocks.1.mlp: accelerate moves its weights"),
        (marked("is_quantized", True), None, "UsageError", 2, "Decoder: its weights are quantised"),
        (configured, None, "SourceError", 2, "quantised weights are not supported; got quantization_config (gptq)"),
        (int8, None, "UsageError", 2, "blocks.0.mlp.up.weight: quantised weights"),
        (on_meta, None, "UsageError", 2, "the weights are on meta"),
        (own_forward, None, "ValidationError", 1, "carries a forward of its own"),
        (narrower, None, "PlanFileError", 2, "blocks.1.mlp.up.weight: the plan was made for another shape"),
        (with_more, None, "PlanFileError", 2, "blocks.1.extra.bias: the plan lacks this parameter"),
        (lambda rank: Decoder(1), None, "PlanFileError", 2, "the plan has a parameter that the model lacks"),
        (lambda rank: Decoder(2, tied=True), None, "PlanFileError", 2, "tied otherwise than planned; got embed.weight"),
        (lambda rank: Decoder(2), lambda _: planned(tied=True), "PlanFileError", 2, "than planned; got not tied"),
        (lambda rank: Decoder(2), lambda rank: planned(3), "UsageError", 2, "mesh: the plan was made for another"),
        (other_code, None, "ValidationError", 1, "Decoder: the plan is not exact for this model"),
    ],
)  # fmt: skip
def test_every_rank_refuses(build, p, kind, code, words):
    if build is hooked_by_accelerate:
        pytest.importorskip("accelerate")
    for said in refused(build, p):
        assert said is not None
        assert said[:2] == (kind, code), said
        assert words in said[2]


@pytest.mark.parametrize("build", [hooked, narrower, own_forward])
def test_what_one_rank_refuses_the_others_refuse_too(build):
    first, second = refused(lambda rank: build(rank) if rank == 1 else Decoder(2))
    assert first[0] == "RankError" and "another rank failed here" in first[2]
    assert second[0] != "RankError"


def test_ranks_with_different_plans():
    for said in refused(lambda rank: Decoder(2), lambda rank: planned() if rank else planned(tied=True)):
        assert said[:2] == ("RankError", 1) and "starts something else" in said[2]
        assert planned().digest[:12] in said[2] and planned(tied=True).digest[:12] in said[2]


def missing(state):
    del state["blocks.1.mlp.up.weight"]
    return "blocks.1.mlp.up.weight is missing"


def misshapen(state):
    state["norm.weight"] = torch.ones(3)
    return "norm.weight has another shape; got (3,), need (16,)"


def quantised(state):
    state["head.weight"] = state["head.weight"].to(torch.int8)
    return "head.weight is quantised; got I8"


@pytest.mark.parametrize("spoil", [missing, misshapen, quantised])
@pytest.mark.parametrize("build", [on_meta, lambda rank: Decoder(2)], ids=["meta", "real"])
def test_a_bad_checkpoint(build, spoil, tmp_path):
    state = Decoder(2).state_dict()
    words = spoil(state)
    save_file(state, tmp_path / "model.safetensors")
    for said in refused(build, checkpoint=tmp_path):
        assert said[:2] == ("SourceError", 2) and words in said[2]
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]


class NeedsBuffer(Decoder):
    """Has a buffer that no checkpoint holds; found out when everything else has been read."""

    def __init__(self) -> None:
        super().__init__(2)
        self.register_buffer("scale", torch.ones(HIDDEN), persistent=False)


def test_what_fails_after_the_weights_are_read_is_undone(tmp_path):
    def build(rank):
        with torch.device("meta"):
            return NeedsBuffer()

    save_file(Decoder(2).state_dict(), tmp_path / "model.safetensors")
    p = plan(NeedsBuffer(), IDS, tp=TP, phase="train")
    for said in refused(build, p, tmp_path):
        assert said[:2] == ("SourceError", 2) and "scale: this buffer is on meta" in said[2]


def test_a_model_is_rewritten_once():
    def on_rank():
        model = parallelize(Decoder(2), planned())
        out = model(**IDS)
        before = identity(model)
        with pytest.raises(ColrowError, match="embed.weight: the model is parallel already"):
            parallelize(model, planned())
        assert identity(model) == before and torch.equal(model(**IDS), out)

    run_ranks(on_rank, TP, "gloo", timeout_s=LIMIT_S)


# ---- ranks that fail while the model runs


def running(fail):
    """A rank of a rewritten model whose second rank meets ``fail`` in the forward of a block."""

    def on_rank():
        model = parallelize(Decoder(2), planned())
        if dist.get_rank() == 1:
            model.blocks[1].mlp.register_forward_pre_hook(lambda module, args: fail())
        model(**IDS)

    return on_rank


def raises():
    raise ValueError("overflow in block 1")


@pytest.mark.parametrize(
    ("fail", "code", "words"),
    [
        (raises, 3, "rank 1: ValueError: overflow in block 1"),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), 137, "rank 1: killed by SIGKILL"),
        (lambda: os._exit(5), 5, "rank 1: exited with code 5 without a result"),
    ],
)
def test_a_rank_that_fails_in_the_forward(fail, code, words):
    with pytest.raises(RankError) as caught:
        run_ranks(running(fail), TP, "gloo", timeout_s=LIMIT_S)
    assert caught.value.exit_code == code
    assert words in str(caught.value)


def test_an_exception_in_the_forward_leaves_a_model_that_runs():
    def on_rank():
        model = parallelize(Decoder(2), planned())
        out = model(**IDS)
        before = identity(model)
        hook = model.blocks[1].mlp.register_forward_pre_hook(lambda module, args: raises())
        with pytest.raises(ValueError):
            model(**IDS)
        hook.remove()
        assert identity(model) == before
        assert torch.equal(model(**IDS), out)
        model(**IDS).sum().backward()
        assert all(p.grad is not None for p in model.parameters())

    run_ranks(on_rank, TP, "gloo", timeout_s=LIMIT_S)
