"""Tracing: what a graph says of the model's source."""

from __future__ import annotations

import inspect
import linecache

import pytest
import torch
from plain_models import HIDDEN, IDS, VOCAB, Attention, Block, Decoder
from torch import Tensor, nn
from torch.nn import functional as F

from colrow.cost_models.errors import TraceError
from colrow.planner.graph import Graph, Node, Ref
from colrow.planner.measured import Measured
from colrow.planner.trace import tied_names, trace

X = (torch.zeros(2, 5, HIDDEN),)


def only(graph: Graph, op: str, module: str | None = None) -> Node:
    (node,) = [n for n in graph.nodes if n.op == op and module in (None, n.module)]
    return node


def source_line(graph: Graph, node: Node) -> str:
    frame = graph.calls[node.call].site.frames[-1]
    return linecache.getline(frame.file, frame.firstlineno + frame.span[0]).strip()


def expression(graph: Graph, node: Node) -> str:
    frame = graph.calls[node.call].site.frames[-1]
    first, last, start, stop = frame.span
    assert first == last
    return linecache.getline(frame.file, frame.firstlineno + first)[start:stop]


def test_products_norms_and_attention_stay_whole() -> None:
    graph = trace(Decoder(1), IDS)
    ops = [n.op for n in graph.nodes]
    assert ops.count("linear") == 8 and ops.count("scaled_dot_product_attention") == 1 and ops.count("embedding") == 1
    assert not {"addmm", "mm", "bmm", "_softmax"} & set(ops)


def test_nothing_is_allocated_and_meta_is_enough() -> None:
    with torch.device("meta"):
        model = Decoder()
    graph = trace(model, IDS)
    assert all(p.is_meta for p in model.parameters())
    assert graph.nodes[graph.outputs[0]].shape == (2, 5, VOCAB)


def test_every_parameter_is_a_leaf_of_its_own_name_even_when_unread() -> None:
    model = Decoder(2)
    model.spare = nn.Parameter(torch.zeros(3))
    graph = trace(model, IDS)
    leaves = {n.fqn: n.shape for n in graph.nodes if n.op == "parameter"}
    assert leaves == {name: tuple(p.shape) for name, p in model.named_parameters()}


def test_call_sites_are_the_expressions_in_the_source() -> None:
    graph = trace(Decoder(1), IDS)
    silu = only(graph, "silu")
    assert expression(graph, silu) == "F.silu(self.gate(x))"
    assert graph.calls[silu.call].site.module == "blocks.0.mlp"
    attention = only(graph, "scaled_dot_product_attention")
    assert expression(graph, attention) == "F.scaled_dot_product_attention(q, k, v, is_causal=True)"
    down = next(n for n in graph.nodes if n.op == "linear" and n.module == "blocks.0.mlp.down")
    assert graph.calls[down.call].site.frames[-1].qualname == "Linear.forward"
    adds = [n for n in graph.nodes if n.op == "add" and n.module == "blocks.0"]
    lines = inspect.getsource(Block.forward).splitlines()
    assert [source_line(graph, n) for n in adds] == [
        lines[1].strip(),
        lines[2].strip(),
    ]


def test_a_call_in_a_function_has_the_whole_chain_of_frames() -> None:
    def gated(x: Tensor) -> Tensor:
        return F.gelu(x)

    class Calls(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return gated(x) + 1

    graph = trace(Calls(), X)
    frames = graph.calls[only(graph, "gelu").call].site.frames
    assert [f.qualname.rpartition(".")[2] for f in frames] == ["forward", "gated"]


def test_ties_are_seen_by_identity() -> None:
    model = Decoder(2, tied=True)
    assert tied_names(model.named_parameters(remove_duplicate=False)) == {"head.weight": "embed.weight"}
    graph = trace(model, IDS)
    assert graph.ties == {"head.weight": "embed.weight"}
    assert not trace(Decoder(2), IDS).ties


def test_a_tensor_changed_through_a_view_pins_all_that_share_its_memory() -> None:
    class Writes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x * 2
            y.transpose(1, 2).clamp_(min=0)
            return y.relu()

    class Copies(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x * 2
            return y.transpose(1, 2).clamp(min=0).transpose(1, 2).relu()

    graph = trace(Writes(), X)
    assert {graph.nodes[i].op for i in graph.whole} == {"mul", "transpose", "clamp_", "changed_in_place"}
    assert not trace(Copies(), X).whole


def test_measured_lengths_carry_their_origin_and_literals_do_not() -> None:
    graph = trace(Attention(), X)
    view = next(n for n in graph.nodes if n.op == "view")
    leaves = graph.calls[view.call].leaves
    lengths = [leaf for leaf in leaves if isinstance(leaf, int)]
    assert [int(n) for n in lengths] == [2, 5, 4, 4]
    assert [isinstance(n, Measured) for n in lengths] == [True, True, False, False]
    given = next(n.index for n in graph.nodes if n.op == "input")
    assert [(n.origin, n.dim) for n in lengths[:2]] == [(Ref(given), 0), (Ref(given), 1)]


def test_products_and_parts_of_measured_lengths_are_measured_and_sums_are_not() -> None:
    length = Measured.read(12, None, 0, set())
    assert all(isinstance(n, Measured) for n in (length * 2, 2 * length, length // 3, length))
    assert not any(isinstance(n, Measured) for n in (length + 1, length - 1, -length))


def test_copies_measure_their_own_values() -> None:
    graph = trace(Decoder(3), IDS)
    for block in ("blocks.1", "blocks.2"):
        views = [n for n in graph.nodes if n.op == "view" and n.module == f"{block}.attention"]
        assert views
        for view in views:
            origins = {
                leaf.origin.index
                for leaf in graph.calls[view.call].leaves
                if isinstance(leaf, Measured) and isinstance(leaf.origin, Ref)
            }
            assert origins and {graph.nodes[i].module for i in origins} == {f"{block}.first"}


def test_outputs_carry_their_paths() -> None:
    class Returns(nn.Module):
        def forward(self, x: Tensor) -> dict[str, object]:
            return {"logits": x + 1, "hidden": (x * 2, x * 3), "count": 3}

    graph = trace(Returns(), X)
    assert graph.output_paths == ["logits", "hidden.0", "hidden.1"]
    assert [graph.nodes[i].op for i in graph.outputs] == ["add", "mul", "mul"]


def test_gradients_flow_into_floats_that_ask_for_them() -> None:
    model = Decoder(1)
    model.head.weight.requires_grad_(False)
    nodes = {n.fqn: n for n in trace(model, IDS).nodes if n.fqn}
    assert nodes["embed.weight"].differentiable and not nodes["head.weight"].differentiable
    assert not nodes["ids"].differentiable


def test_the_trace_says_what_it_assumed() -> None:
    model = Decoder(1).double().eval()
    assumed = trace(model, IDS).assumptions
    assert assumed["mode"] == "eval" and assumed["dtype"] == "float64"
    assert assumed["torch"] == torch.__version__.split("+")[0]


def test_a_model_that_cannot_be_traced_is_refused_by_name() -> None:
    class Decides(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1 if x.sum().item() > 0 else x - 1

    with pytest.raises(TraceError, match="Decides: torch cannot trace this model"):
        trace(Decides(), X)


def test_inputs_that_do_not_fit_are_refused() -> None:
    with pytest.raises(TraceError, match="Decoder"):
        trace(Decoder(1), {"ids": torch.zeros(2, 5)})
