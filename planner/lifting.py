"""The FX trace -> `Graph`: noise dropped, folded blocks unfolded, call sites attached."""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.fx
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from .block_copies import Template, append_copy, template_of
from .block_markers import block_marker
from .blocks import block_paths
from .call_record import TAG, CallRecorder
from .called_apart import CALLED_APART, CalledApart
from .completed_graph import no_gradient_without_readers, record_blocks
from .folding import Folding
from .graph import VIEWS, Call, Graph, Node, Ref
from .head_groups import fuse_repeats
from .held_values import HeldValues
from .measured import Measured, Reading
from .opaque import NO_GRADIENT
from .rules.base import wrapped
from .sites import Site, frame_of

_NOISE = frozenset(
    {"_assert_tensor_metadata", "_set_grad_enabled", "_assert_scalar", "_assert_async", "sym_constrain_range_for_size"}
)
_SAME = frozenset({"contiguous", "alias", "lift_fresh_copy", "lift_fresh", "lift", "detach_"})
_SAME_IF_UNCHANGED = frozenset({"to", "_to_copy", "type_as", "contiguous_"})
_NO_GRADIENT = frozenset({"detach", "argmax", "argmin", "argsort", "one_hot", "bucketize"})
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64, torch.complex128)


@dataclass(frozen=True)
class Traced:
    """A model that was traced.

    Attributes:
        module: By make_fx, from ``state`` and ``inputs``.
        recorder: Has the API calls that the nodes' tags index.
        model: Whose forward was traced.
        modules: Its modules, by name, each once.
        parameters: Its parameters, under all their names.
        state: What of it was traced as inputs.
        inputs: What it was called with.
        folding: Which of its blocks were traced once.
    """

    module: torch.fx.GraphModule
    recorder: CallRecorder
    model: nn.Module
    modules: Mapping[str, nn.Module]
    parameters: Mapping[str, Tensor]
    state: Mapping[str, Tensor]
    inputs: Any
    folding: Folding


def graph_of(traced: Traced) -> Graph:
    """Turns a traced model into a `Graph`."""
    return _Lifting(traced).run()


class _Lifting:
    """The state of one conversion; `run` is its only entry."""

    def __init__(self, traced: Traced) -> None:
        recorder = traced.recorder
        self.traced, self.raw_calls, self.folding = traced.module, recorder.calls, traced.folding
        self.measured, self.held = recorder.measured, HeldValues(recorder.let_go)
        self.graph = Graph()
        self.parameters = traced.parameters
        self.leaf_names = _leaf_names(self.parameters, traced.state, traced.inputs)
        self.value: dict[torch.fx.Node, Ref | list[Ref]] = {}
        self.sharing: dict[torch.fx.Node, list[torch.fx.Node]] = {}  # node -> all seen that may share its storage
        self.done: set[torch.fx.Node] = set()
        self.paths = {id(module): name for name, module in traced.modules.items()}
        self.call_index: dict[int, int] = {}
        self.tensor_nodes: dict[int, list[int]] = {}
        self.leaf_index: dict[str, int] = {}
        self.open_blocks: dict[str, tuple[int, list[int]]] = {}
        self.templates: dict[str, Template] = {}
        self.read_inside: dict[str, list[set[Reading]]] = {}
        self.block_starts = block_paths(traced.modules.items())
        self.apart = CalledApart(traced.model, self.block_starts, self.parameters)

    def run(self) -> Graph:
        names = iter(self.leaf_names)
        for node in self.traced.graph.nodes:
            if node.op == "placeholder":
                kind, name = next(names)
                self._placeholder(node, kind, name)
            elif node.op == "get_attr":
                self.value[node] = self._constant(node.target, getattr(self.traced, node.target))
                self.folding.refuse_read(getattr(self.traced, node.target))
            elif node.op == "call_function":
                self._operator(node)
            elif node.op == "output":
                returned = pytree.tree_leaves(node.args[0], is_leaf=_is_fx)
                self.graph.outputs = [cast(Ref, self.value[leaf]).index for leaf in returned]
            self.done.add(node)
        self._unread_parameters()
        fuse_repeats(self.graph, 0, self.graph.outputs)
        self.held.settle(self.graph, 0)
        no_gradient_without_readers(self.graph)
        record_blocks(self.graph, self.block_starts)
        if self.apart.blocks:
            self.graph.assumptions[CALLED_APART] = ", ".join(self.apart.blocks)
        return self.graph

    def _unread_parameters(self) -> None:
        """Parameters that no traced operator reads are leaves all the same: they have to be stored somehow."""
        for name, parameter in self.parameters.items():
            self.graph.parameters.append(name)
            if name not in self.leaf_index:
                self._leaf("parameter", name, tuple(parameter.shape), parameter.dtype)

    def _placeholder(self, node: torch.fx.Node, kind: str, name: str) -> None:
        val = node.meta.get("val")
        if not isinstance(val, Tensor):
            return
        if kind == "buffer" and not node.users:
            return
        self.value[node] = self._leaf(kind, name, tuple(val.shape), val.dtype)

    def _constant(self, target: str, value: Tensor) -> Ref:
        """A tensor that the code made of nothing traced; named by its content, which validation then compares too."""
        while torch._C._functorch.is_functorch_wrapped_tensor(value):  # made inside of vmap
            value = torch._C._functorch.get_unwrapped(value)
        name = target if isinstance(value, FakeTensor) or value.is_meta else f"constant {_content(value)}"
        if name in self.leaf_index:
            return Ref(self.leaf_index[name])
        return self._leaf("constant", name, tuple(value.shape), value.dtype)

    def _leaf(self, kind: str, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Ref:
        floating = dtype in _FLOATS
        trained = kind == "parameter" and (name not in self.parameters or self.parameters[name].requires_grad)
        differentiable = floating and (kind == "input" or trained)
        node = Node(len(self.graph.nodes), kind, (), {}, shape, dtype, fqn=name, differentiable=differentiable)
        self.graph.nodes.append(node)
        self.leaf_index[name] = node.index
        return Ref(node.index)

    def _operator(self, node: torch.fx.Node) -> None:
        self._share(node)
        if node.target is operator.getitem:
            source, position = node.args
            made = self.value[source]  # type: ignore[index]
            if isinstance(made, list):
                self.value[node] = made[position]  # type: ignore[index]
                return
            if _only_first_read(source):  # type: ignore[arg-type]
                self.value[node] = made
                return
            self._append(node, "getitem", (made, position), {}, "")
            return
        if node.target is block_marker:
            self._block(node)
            return
        if not isinstance(node.target, torch._ops.OpOverload):
            return  # _set_grad_enabled and other context markers
        name = node.target._schema.name.split("::")[1]
        if name in _NOISE:
            return
        if name == "copy_" and self._written_slice(node):
            return
        args = pytree.tree_map_only(torch.fx.Node, lambda n: self.value[n], tuple(node.args))
        kwargs = pytree.tree_map_only(torch.fx.Node, lambda n: self.value[n], dict(node.kwargs))
        val = node.meta.get("val")
        if args and isinstance(args[0], Ref) and isinstance(val, Tensor):
            source_node = self.graph.nodes[args[0].index]
            same = source_node.shape == tuple(val.shape) and source_node.dtype == val.dtype
            if name in _SAME or (same and name in _SAME_IF_UNCHANGED):
                self.value[node] = args[0]
                self._measure(args[0], self.measured.get(node, ()))
                return
        if name == "cat":
            args = (self._without_empty_vectors(args[0]), *args[1:])
        if name == "type_as":  # of the second operand nothing is read but its dtype
            name, args = "to", args[:1]
        self._append(node, name, args, kwargs, node.target._overloadname)
        if name.endswith("_") and not name.endswith("__"):
            self._changed_in_place(node)

    def _without_empty_vectors(self, operands: list[Any]) -> list[Any]:
        """``cat`` takes an empty vector beside anything and adds nothing: what a cache holds before its first token."""
        shapes = [self.graph.nodes[r.index].shape for r in operands]
        return [r for r, shape in zip(operands, shapes, strict=True) if shape != (0,)] or operands

    def _written_slice(self, node: torch.fx.Node) -> bool:
        """``base[.., a:b, ..].copy_(source)`` as a value: from here on, ``base`` is what it has become."""
        view, source = node.args[0], node.args[1]
        if not isinstance(view, torch.fx.Node) or view.target is not torch.ops.aten.slice.Tensor:
            return False
        base = view.args[0]
        if not isinstance(base, torch.fx.Node) or not isinstance(self.value.get(base), Ref):
            return False
        held = cast(Ref, self.value[base])
        shape = self.graph.nodes[held.index].shape
        dim, start, stop = (*view.args[1:4], None, None, None)[:3]
        arguments = (held, self.value[source], wrapped(dim, len(shape)), start, stop)  # type: ignore[index,arg-type]
        self._append(node, "slice_scatter", arguments, {}, "")
        self.graph.nodes[-1].shape = shape
        self.value[base] = Ref(self.graph.nodes[-1].index)
        self._written(node, [n for n in self.sharing.get(base, ()) if n is not base])
        return True

    def _changed_in_place(self, node: torch.fx.Node) -> None:
        """What an in-place operator on a view touches beside its result cannot be moved or split."""
        view = node.args[0] if node.args else None
        chain = []
        while isinstance(view, torch.fx.Node) and _is_view(view):
            if self.value.get(view) != self.value.get(view.args[0]):  # type: ignore[arg-type]
                chain.append(view)
            view = view.args[0]
        if chain:
            touched = [self.value.get(n) for n in (node, *chain, view) if isinstance(n, torch.fx.Node)]
            self.graph.whole |= {r.index for r in touched if isinstance(r, Ref)}
        self._written(node, self.sharing.get(node, []))

    def _share(self, node: torch.fx.Node) -> None:
        """A view and what it looks at share a storage; so do an argument and what it is changed to in place."""
        source = node.args[0] if node.args else None
        if isinstance(source, torch.fx.Node) and _shares(node, source):
            self.sharing[node] = self.sharing.setdefault(source, [source])
            self.sharing[node].append(node)

    def _written(self, node: torch.fx.Node, sharing: Iterable[torch.fx.Node]) -> None:
        """What shares the storage that ``node`` has written to is, for later readers, what that made of it."""
        made = self.value[node]
        for other in sharing:
            before = self.value.get(other)
            is_read = any(user not in self.done and user is not node for user in other.users)
            if other is node or not is_read or not isinstance(before, Ref) or not isinstance(made, Ref):
                continue
            held = self.graph.nodes[before.index]
            if held.outputs:
                continue
            self._append(node, "changed_in_place", (before, made), {}, "")
            after = self.graph.nodes[-1]
            after.shape, after.dtype, after.measured = held.shape, held.dtype, held.measured
            self.graph.whole |= {before.index, made.index, after.index}
            self.value[other], self.value[node] = Ref(after.index), made

    def _append(
        self, node: torch.fx.Node, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], overload: str
    ) -> None:
        val = node.meta.get("val")
        val = val[0] if _only_first_read(node) else val  # type: ignore[index]
        outputs: tuple[tuple[tuple[int, ...], torch.dtype], ...] = ()
        if isinstance(val, (tuple, list)):
            outputs = tuple((tuple(v.shape), v.dtype) for v in val if isinstance(v, Tensor))
            shape, dtype = outputs[0] if outputs else ((), torch.float32)
        elif isinstance(val, Tensor):
            shape, dtype = tuple(val.shape), val.dtype
        else:
            self.graph.findings.append(f"{name} returns {type(val).__name__}, which the trace fixes")
            shape, dtype = (), torch.float32
        made = Node(len(self.graph.nodes), name, args, kwargs, shape, dtype, outputs, overload=overload)
        made.differentiable = (
            dtype in _FLOATS
            and name not in _NO_GRADIENT
            and not node.meta.get(NO_GRADIENT)
            and any(self.graph.nodes[i].differentiable for i in made.operands)
        )
        running = [path for path, *_ in (node.meta.get("nn_module_stack") or {}).values()]
        made.module = running[-1] if running else ""
        read = (self.graph.nodes[i] for i in made.operands)
        self.apart.note(running, [leaf.fqn for leaf in read if leaf.op == "parameter"])
        made.call = self._call(node)
        made.measured = frozenset(self.measured.get(node, ()))
        self.graph.nodes.append(made)
        self.value[node] = Ref(made.index)
        self.held.add(node, made.index)

    def _measure(self, value: Ref, readings: Iterable[Reading]) -> None:
        self.graph.nodes[value.index].measured |= frozenset(readings)

    def _call(self, node: torch.fx.Node) -> int:
        tag = (node.meta.get("custom") or {}).get(TAG)
        if tag is None:
            return -1
        if tag not in self.call_index:
            raw = self.raw_calls[tag]
            path = self.paths.get(id(raw.module), "") if raw.module is not None else ""
            frames = tuple(frame_of(code, lasti) for code, lasti in raw.frames)
            self.call_index[tag] = len(self.graph.calls)
            name = getattr(raw.function, "__name__", str(raw.function))
            self.graph.calls.append(Call(Site(path, frames), name, tuple(map(self._resolve, raw.leaves))))
        return self.call_index[tag]

    def _resolve(self, leaf: Any) -> Any:
        """A recorded argument: tensors as the values they are, measured lengths with the value they were read from."""
        if isinstance(leaf, Measured):
            return leaf.resolved(self._origin)
        found = self.value.get(leaf) if isinstance(leaf, torch.fx.Node) else leaf
        return found if not isinstance(found, list) else None

    def _origin(self, read_from: Any) -> Ref | None:
        found = self.value.get(read_from) if isinstance(read_from, torch.fx.Node) else read_from
        return found if isinstance(found, Ref) else None

    def _block(self, node: torch.fx.Node) -> None:
        tensors, key, part = node.args
        refs: list[Ref] = [self.value[t] for t in tensors]  # type: ignore[union-attr,misc,index]
        call = self.folding.calls[key]  # type: ignore[index]
        indices = [r.index for r in refs]
        self.held.forget(indices)
        if part == "enter":
            self.open_blocks[call.fqn] = (len(self.graph.nodes), indices)
            self.read_inside[call.fqn] = self._read_of(node, len(refs))
        elif part == "exit":
            start, entries = self.open_blocks.pop(call.fqn)
            fuse_repeats(self.graph, start, indices)
            self.held.settle(self.graph, start)
            self.templates[call.fqn] = template_of(self.graph, call.fqn, start, entries, indices)
        else:
            for entry, dims in zip(refs, self.read_inside[call.template], strict=True):
                self._measure(entry, dims)
            refs = append_copy(self.graph, self.templates[call.template], call.fqn, indices, self._leaf_like)
        for value, dims in zip(refs, self._read_of(node, len(refs)), strict=True):
            self._measure(value, dims)
        self.value[node] = refs[0] if len(refs) == 1 else refs

    def _read_of(self, marker: torch.fx.Node, count: int) -> list[set[Reading]]:
        """The dims that the code reads of each of the values that a marker stands for."""
        if count == 1:
            return [self.measured.get(marker, set())]
        taken = {user.args[1]: user for user in marker.users if user.target is operator.getitem}
        return [self.measured.get(taken[at], set()) if at in taken else set() for at in range(count)]

    def _leaf_like(self, outer: Node, name: str) -> int:
        """The leaf of this name: a template's, in a copy."""
        if name not in self.leaf_index:
            made = self._leaf(outer.op, name, outer.shape, outer.dtype)
            self.graph.nodes[made.index].template = outer.template
        return self.leaf_index[name]


def _content(value: Tensor) -> str:
    described = f"{value.dtype} {tuple(value.shape)} ".encode()
    content = value.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(described + content).hexdigest()[:12]


def _leaf_names(parameters: Container[str], state: Mapping[str, Tensor], inputs: Any) -> list[tuple[str, str]]:
    """Kind and name of each placeholder, in make_fx's order."""
    names = [("parameter" if name in parameters else "buffer", name) for name in state]
    for path, leaf in pytree.tree_flatten_with_path(inputs)[0]:
        del leaf
        names.append(
            ("input", pytree.keystr(path).strip("[]'\"").replace("']['", ".").replace("'][", ".").replace("][", "."))
        )
    return names


def _name(node: torch.fx.Node) -> str:
    return node.target._schema.name.split("::")[1] if isinstance(node.target, torch._ops.OpOverload) else ""


def _only_first_read(node: torch.fx.Node) -> bool:
    """Whether the call that made several values returns the first of them."""
    return _name(node) == "embedding_bag" and not any(user.users for user in node.users if user.args[1] != 0)


def _shares(node: torch.fx.Node, source: torch.fx.Node) -> bool:
    """Whether an operator returns its first argument, or views of it: by their storages where both have one."""
    made, given = node.meta.get("val"), source.meta.get("val")
    if isinstance(made, Tensor) and isinstance(given, Tensor):
        return torch._C._is_alias_of(made, given)  # type: ignore[attr-defined,no-any-return]
    return _name(source if node.target is operator.getitem else node) in VIEWS


def _is_view(node: torch.fx.Node) -> bool:
    """Whether an operator shows its first argument in another form, and does not change it."""
    source, name = node.args[0] if node.args else None, _name(node)
    return isinstance(source, torch.fx.Node) and not name.endswith("_") and _shares(node, source)


def _is_fx(leaf: Any) -> bool:
    return isinstance(leaf, torch.fx.Node)
