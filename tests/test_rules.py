"""A rule is right because executing it on shards says so.

Every rule is asked for every combination of operand placements (replicated, every dim split in several layouts,
partial). Where it answers, the operator runs on each rank's local operands, edited as a plan would edit its call, and
the results are put together by the placement it claims; then the same for gradients. Padding holds garbage, but zeros
in what stands for a parameter.
"""

from __future__ import annotations

import ast
import inspect
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from case_values import Case
from rule_cases import CASES, NOT_RUN, WHOLE_ONLY
from torch import Tensor

import colrow.planner.head_groups  # noqa: F401  # registers a rule of its own
import colrow.planner.rules as rules
from colrow.planner.call_record import flat
from colrow.planner.edits import CallEdit
from colrow.planner.graph import Call, Node, Ref
from colrow.planner.layout import Layout, balanced, joined, owned_units
from colrow.planner.local_operators import local_form
from colrow.planner.placement import PARTIAL, WHOLE, Partial, Placement, Replicate, Shard
from colrow.planner.rules import RULES, Operation
from colrow.planner.rules.base import RuleFunction
from colrow.planner.sites import Site
from colrow.rewrite.bags import vocab_parallel_embedding_bag
from colrow.rewrite.groups import TpGroup
from colrow.rewrite.slices import local_part
from colrow.rewrite.vocab import mean_of_shard, vocab_parallel_embedding

GARBAGE = 0.7310
BAG = ("ids", "offsets", "_", "mode", "_", "per_sample_weights", "include_last_offset", "padding_idx")
RULE_FILES = str(Path(rules.__file__).parent)
REGISTRATION = frozenset({"rule", "register", "factored", "derived", "alike"})


def layouts(length: int, ranks: int) -> Iterator[Layout]:
    """Even or padded, in units of two, segmented, unequally segmented, with copies, in another order."""
    if length < 2:
        return
    yield balanced(length, ranks)
    if length % 2 == 0:
        yield balanced(length, ranks, 2)
        half = balanced(length // 2, ranks)
        yield joined((half, half))
    if length % 3 == 0 and length > 3:
        yield joined((balanced(length // 3, ranks), balanced(length - length // 3, ranks)))
    if length == 4:
        yield owned_units(4, 1, ((0, 1, 2), (0, 3)) if ranks == 2 else ((0, 1), (0, 2), (0, 3)))
        yield owned_units(4, 1, ((3, 1), (0, 2), ())[:ranks])


def placements(value: Tensor, ranks: int) -> list[Placement]:
    found: list[Placement] = [WHOLE]
    found += [Shard(dim, layout) for dim, length in enumerate(value.shape) for layout in layouts(length, ranks)]
    return found + ([PARTIAL] if _has_gradient(value) else [])


def local_values(value: Tensor, placement: Placement, ranks: int, pad: float) -> list[Tensor]:
    """What each rank holds."""
    match placement:
        case Replicate():
            return [value.clone() for _ in range(ranks)]
        case Partial():
            parts = [torch.randn(value.shape, dtype=value.dtype) for _ in range(ranks - 1)]
            return [*parts, value - sum(parts)]
        case Shard(dim, layout):
            return [_cut(value, dim, layout, rank, pad) for rank in range(ranks)]


def _cut(value: Tensor, dim: int, layout: Layout, rank: int, pad: float) -> Tensor:
    shape = [*value.shape[:dim], layout.local, *value.shape[dim + 1 :]]
    local = torch.full(shape, pad, dtype=value.dtype) if _has_gradient(value) else value.new_zeros(shape)
    for start, at, length in layout.pieces(rank):
        local.narrow(dim, at, length).copy_(value.narrow(dim, start, length))
    return local


def cotangents(value: Tensor, placement: Placement, ranks: int) -> list[Tensor]:
    """What each rank gets as the gradient of a result: where several hold an element, it is split among them."""
    if not isinstance(placement, Shard):
        return [value] * ranks
    counts = torch.zeros(placement.layout.size, dtype=value.real.dtype)
    for rank in range(ranks):
        for start, _, length in placement.layout.pieces(rank):
            counts[start : start + length] += 1
    shape = [-1 if d == placement.dim else 1 for d in range(value.dim())]
    return local_values(value / counts.clamp_min(1).view(shape), placement, ranks, 0.0)


class Wrong(AssertionError):
    """A rule claims what its operator does not do."""


def same(got: Tensor, want: Tensor, what: str, close: float = 1e-9) -> None:
    if got.shape != want.shape or got.dtype != want.dtype:
        raise Wrong(f"{what}: {tuple(got.shape)} {got.dtype}, not {tuple(want.shape)} {want.dtype}")
    close = 1e-5 if want.dtype == torch.float32 else close
    if want.is_complex():
        got, want = torch.view_as_real(got.resolve_conj()), torch.view_as_real(want.resolve_conj())
    if not torch.allclose(got.double(), want.double(), rtol=close, atol=close, equal_nan=True):
        raise Wrong(f"{what} differs")


def compare(locals_: Sequence[Tensor], whole: Tensor, placement: Placement, what: str, *, values: bool = True) -> None:
    """Whether ``locals_`` are ``whole`` in ``placement``; of padding nothing is asked."""
    if not values:
        locals_, whole = [torch.zeros_like(v) for v in locals_], torch.zeros_like(whole)
    match placement:
        case Replicate():
            for local in locals_:
                same(local, whole, what)
        case Partial():
            if not _has_gradient(whole):
                raise Wrong(f"{what}: a partial sum of {whole.dtype}")
            same(torch.stack(list(locals_)).sum(0), whole, what)
        case Shard(dim, layout):
            for rank, local in enumerate(locals_):
                shape = (*whole.shape[:dim], layout.local, *whole.shape[dim + 1 :])
                if layout.size != whole.shape[dim] or local.shape != shape:
                    raise Wrong(f"{what}: rank {rank} holds {tuple(local.shape)}, not {shape}")
                for start, at, length in layout.pieces(rank):
                    same(local.narrow(dim, at, length), whole.narrow(dim, start, length), what)


class Run:
    """A case as a graph of one operator, and its execution on local operands."""

    def __init__(self, name: str, case: Case) -> None:
        self.name, self.case = name, case
        self.tensors: list[Tensor] = []
        seen: dict[int, Ref] = {}

        def leaf(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            if id(value) not in seen:
                seen[id(value)] = Ref(len(self.tensors))
                self.tensors.append(value)
            return seen[id(value)]

        arguments, self.keywords = pytree.tree_map(leaf, (case.arguments, case.keywords))
        self.arguments = tuple(arguments)
        self.whole = self.call(self.arguments, self.keywords, self.tensors)
        made = self.whole if isinstance(self.whole, (tuple, list)) else (self.whole,)
        outputs = tuple((tuple(t.shape), t.dtype) for t in made)
        leaves = [Node(i, "input", (), {}, tuple(t.shape), t.dtype) for i, t in enumerate(self.tensors)]
        several = outputs if isinstance(self.whole, (tuple, list)) else ()
        self.node = Node(len(leaves), name, self.arguments, self.keywords, *outputs[0], several)
        self.nodes = [*leaves, self.node]
        self.record = Call(Site("", ()), name, tuple(flat((self.arguments, self.keywords))))

    def call(self, arguments: Any, keywords: Any, tensors: Sequence[Tensor]) -> Any:
        args, kwargs = pytree.tree_map_only(Ref, lambda ref: tensors[ref.index], (arguments, keywords))
        torch.manual_seed(0)  # the same draws on every rank
        function = self.case.function or getattr(torch.ops.aten, self.name)
        return function(*args, **kwargs)

    def local(self, edit: CallEdit | None, tensors: Sequence[Tensor], rank: int, ranks: int) -> Any:
        """The operator on one rank, as the rewritten call runs it."""
        group = TpGroup("none", rank, ranks)
        if edit is not None and edit.operator is not None:
            args = pytree.tree_map_only(Ref, lambda ref: tensors[ref.index], self.arguments)
            layout = edit.operator.layout
            if edit.operator.name == "vocab_embedding":
                padding = args[2] if len(args) > 2 and args[2] >= 0 else None
                return vocab_parallel_embedding(args[1], args[0], layout, group, padding)
            if edit.operator.name == "norm_of_shard":
                assert layout is not None
                x, weight, bias, mean, var = args[:5]
                mean, var = (local_part(value.detach(), 0, layout, rank) for value in (mean, var))
                return self.call((x, weight, bias, mean, var, *args[5:]), self.keywords, tensors)
            if edit.operator.name == "vocab_embedding_bag":
                assert layout is not None
                given = {name: value for name, value in zip(BAG, args[1:], strict=False) if name != "_"}
                given["mode"] = ("sum", "mean")[given.get("mode", 0)]
                return vocab_parallel_embedding_bag(args[0], layout, group, **given)
            assert edit.operator.name == "mean_of_shard" and layout is not None
            return mean_of_shard(args[0], args[1], edit.operator.dim, layout, group, *args[2:])
        numbers = {leaf: made for leaf, _, made in edit.integers} if edit is not None else {}
        leaves, spec = pytree.tree_flatten((self.arguments, self.keywords))
        changed = [numbers.get(i, leaf) for i, leaf in enumerate(leaves)]
        arguments, keywords = pytree.tree_unflatten(changed, spec)
        return self.call(arguments, keywords, tensors)

    def check(self, rule: RuleFunction, ranks: int) -> tuple[int, int]:
        """Tries every combination; returns how many the rule accepts, and how many of them are not all replicated.

        Raises:
            Wrong: The operator on local operands does not do what the rule says.
        """
        accepted = split = 0
        for combination, results, edit in self.answers(rule, ranks):
            accepted += 1
            split += any(p != WHOLE for p in combination)
            try:
                self._compare(combination, results, edit, ranks)
            except Wrong as error:
                raise Wrong(f"{self.name} {_text(combination)} -> {_text(results)}: {error}") from error
            except (RuntimeError, IndexError, ValueError) as error:
                raise Wrong(f"{self.name} {_text(combination)} -> {_text(results)} fails: {error}") from error
        return accepted, split

    def answers(
        self, rule: RuleFunction, ranks: int
    ) -> Iterator[tuple[tuple[Placement, ...], tuple[Placement, ...], CallEdit | None]]:
        """Every combination that the rule accepts and a call can run: operands, results, the call's edit."""
        for combination in itertools.product(*(placements(t, ranks) for t in self.tensors)):
            placed = dict(enumerate(combination))
            made = rule(Operation(self.node, self.nodes, placed))
            if made is None:
                continue
            results = made if isinstance(made, tuple) else (made,) * max(1, len(self.node.outputs))
            edit = local_form(self.node, self.record, placed, results if self.node.outputs else results[0])
            if isinstance(edit, str) or (edit is not None and edit.operator and edit.operator.name == "rank_random"):
                continue
            yield combination, results, edit

    def _compare(
        self, combination: Sequence[Placement], results: Sequence[Placement], edit: CallEdit | None, ranks: int
    ) -> None:
        pads = [0.0 if i in self.case.zero_pads else GARBAGE for i in range(len(self.tensors))]
        local = [local_values(t, p, ranks, pad) for t, p, pad in zip(self.tensors, combination, pads, strict=True)]
        wanted = [_leaf(t) for t in self.tensors]
        given = [[_leaf(values[rank]) for values in local] for rank in range(ranks)]
        whole = _listed(self.call(self.arguments, self.keywords, wanted))
        made = [_listed(self.local(edit, given[rank], rank, ranks)) for rank in range(ranks)]
        for n, (want, placement) in enumerate(zip(whole, results, strict=True)):
            got = [outputs[n].detach() for outputs in made]
            compare(got, want.detach(), placement, f"result {n}", values=self.case.values)
        if not self.case.values or not any(t.requires_grad for t in whole):
            return
        fixed = [torch.randn(t.shape).to(t.dtype) for t in whole]
        _backward(whole, fixed)
        for rank in range(ranks):
            _backward(made[rank], [cotangents(g, p, ranks)[rank] for g, p in zip(fixed, results, strict=True)])
        is_whole = all(isinstance(p, Replicate) for p in results)
        for n, (want, placement) in enumerate(zip(wanted, combination, strict=True)):
            if want.requires_grad:
                dense = want.grad if want.grad is not None else torch.zeros_like(want)
                got = [
                    t.grad if (t := given[rank][n]).grad is not None else torch.zeros_like(t) for rank in range(ranks)
                ]
                _compare_gradient(got, dense, placement, is_whole, f"gradient of operand {n}")


def _compare_gradient(got: list[Tensor], dense: Tensor, placement: Placement, is_whole: bool, what: str) -> None:
    match placement:
        case Replicate():
            compare(got, dense, WHOLE if is_whole else PARTIAL, what)
        case Partial():
            compare(got, dense, WHOLE, what)
        case Shard(dim, layout):
            added = torch.zeros_like(dense)
            for rank, local in enumerate(got):
                for start, at, length in layout.pieces(rank):
                    added.narrow(dim, start, length).add_(local.narrow(dim, at, length))
            same(_held(added, dim, layout), _held(dense, dim, layout), what, close=1e-6)  # casts round it


def _held(value: Tensor, dim: int, layout: Layout) -> Tensor:
    """``value`` where any rank holds it."""
    index = sorted({i for rank in range(layout.ranks) for s, _, n in layout.pieces(rank) for i in range(s, s + n)})
    return value.index_select(dim, torch.tensor(index))


def _leaf(value: Tensor) -> Tensor:
    return value.detach().clone().requires_grad_(_has_gradient(value))


def _has_gradient(value: Tensor) -> bool:
    return value.is_floating_point() or value.is_complex()


def _listed(result: Any) -> list[Tensor]:
    return list(result) if isinstance(result, (tuple, list)) else [result]


def _backward(outputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
    pairs = [(o, g) for o, g in zip(outputs, gradients, strict=True) if o.requires_grad]
    torch.autograd.backward([o for o, _ in pairs], [g for _, g in pairs])


def _text(placed: Sequence[Placement]) -> str:
    return ", ".join(f"{p} {_map(p.layout)}" if isinstance(p, Shard) else str(p) for p in placed)


def _map(layout: Layout) -> str:
    return "|".join(",".join(f"{s}:{s + n}" for s, _, n in layout.pieces(rank)) for rank in range(layout.ranks))


def test_every_rule_has_a_case() -> None:
    assert set(RULES) == set(CASES) | set(NOT_RUN)
    assert not set(CASES) & set(NOT_RUN)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", CASES)
def test_rule(name: str) -> None:
    split = 0
    for position, case in enumerate(CASES[name]):
        for ranks in (2, 3) if position == 0 else (2,):
            accepted, apart = Run(name, case).check(RULES[name], ranks)
            assert accepted
            split += apart
    assert bool(split) == (name not in WHOLE_ONLY)


Line = tuple[str, int]


def lines_of(rule: RuleFunction, reached: set[Line]) -> RuleFunction:
    """``rule``, which notes in ``reached`` the lines of the rules' files that it ran for its last answer."""

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        if not frame.f_code.co_filename.startswith(RULE_FILES):
            return None
        if event == "line":
            reached.add((Path(frame.f_code.co_filename).name, frame.f_lineno))
        return trace

    def traced(op: Operation) -> Any:
        reached.clear()
        before = sys.gettrace()
        sys.settrace(trace)
        try:
            return rule(op)
        finally:
            sys.settrace(before)

    return traced


def answering_lines() -> set[Line]:
    """Where the rules' files return something that may be an answer: every ``return`` but ``return None``."""
    found: set[Line] = set()
    for path in (*Path(RULE_FILES).glob("*.py"),):
        for function in ast.walk(ast.parse(path.read_text())):
            if isinstance(function, ast.FunctionDef) and function.name not in REGISTRATION:
                returns = [n for n in ast.walk(function) if isinstance(n, ast.Return)]
                answers = [n for n in returns if not (isinstance(n.value, ast.Constant) and n.value.value is None)]
                found |= {(path.name, n.lineno) for n in answers}
    return found


def test_every_answer_of_every_rule_is_executed() -> None:
    """A branch of a rule that no combination of any case reaches, so that `test_rule` cannot prove it, fails here."""
    executed: set[Line] = set()
    for name, cases in CASES.items():
        for case in cases:
            reached: set[Line] = set()
            for _ in Run(name, case).answers(lines_of(RULES[name], reached), 2):
                executed |= reached
    for name in NOT_RUN:
        lines, start = inspect.getsourcelines(RULES[name])
        file = Path(inspect.getfile(RULES[name])).name
        executed |= {(file, line) for line in range(start, start + len(lines))}
    never = sorted(answering_lines() - executed)
    assert not never, f"rules answer here without ever being executed: {never}"


def _accepting(*answers: tuple[type, ...]) -> Callable[[Operation], Any]:
    """A rule that says partial for the given kinds of operands."""

    def rule(op: Operation) -> Any:
        kinds = tuple(type(op.placement(t)) for t in op.tensors)
        return PARTIAL if kinds in answers else None

    return rule


def _passing(op: Operation) -> Any:
    """A rule that hands its first operand's placement on, whatever it is."""
    return op.placement(op.tensors[0])


PLANTED = {
    "gelu passes partial sums": ("gelu", 0, _accepting((Partial,))),
    "softmax along the split dim": ("softmax", 0, _passing),
    "add of one partial summand": ("add", 0, _accepting((Partial, Replicate))),
    "add of a number to a partial sum": ("add", 2, _passing),
    "product of two partial sums": ("mul", 0, _accepting((Partial, Partial))),
    "the square of a partial sum": ("mul", 2, _passing),
    "a row product with a whole bias": (
        "linear",
        1,
        lambda op: PARTIAL if isinstance(op.placement(Ref(0)), Shard) and op.placement(Ref(0)).dim == 1
        and op.placement(Ref(1)) == Shard(1, op.placement(Ref(0)).layout) and op.placement(Ref(2)) == WHOLE else None,
    ),
    "a view that loses its heads": ("view", 3, lambda op: _shard_last(op)),
    "transpose that forgets to move the split": ("transpose", 0, _passing),
    "layer_norm over its split dim": ("layer_norm", 1, _passing),
    "topk along the split dim": ("topk", 0, _passing),
    "a norm of a partial sum": ("linalg_vector_norm", 0, _accepting((Partial,))),
    "a cast to integers of a partial sum": ("to", 1, _accepting((Partial,))),
    "a sum over a split dim called whole": ("sum", 1, lambda op: WHOLE),
    "an embedding with split rows called whole": ("embedding", 0, lambda op: WHOLE),
    "dim 0 for every result of max": ("max", 0, lambda op: (op.placement(Ref(0)),) * 2),
}  # fmt: skip


def _shard_last(op: Operation) -> Any:
    placement = op.placement(op.tensors[0])
    return Shard(3, balanced(3, placement.layout.ranks)) if isinstance(placement, Shard) else None


@pytest.mark.parametrize("planted", PLANTED)
def test_a_wrong_rule_is_caught(planted: str) -> None:
    """The checker can fail, for values, shapes and gradients."""
    name, position, rule = PLANTED[planted]
    with pytest.raises(Wrong):
        Run(name, CASES[name][position]).check(rule, 2)


def test_a_rule_right_forward_and_wrong_backward_is_caught() -> None:
    """Replicated in, replicated out, with a gradient that is not the whole one: only gradients tell."""

    class Half(torch.autograd.Function):
        calls = 0

        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            Half.calls += 1
            ctx.scale = 1.0 if Half.calls <= 2 else 0.5  # the whole runs stay right
            return x * 1

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return gradient * ctx.scale

    with pytest.raises(Wrong, match="gradient"):
        Run("neg", Case((torch.randn(4, dtype=torch.float64),), function=Half.apply)).check(RULES["neg"], 2)


def test_getitem_reads_one_result() -> None:
    run = Run("chunk", CASES["chunk"][0])
    item = Node(2, "getitem", (Ref(1), 1), {}, (4, 4), torch.float64)
    parts = (Shard(0, balanced(4, 2)), PARTIAL)
    assert RULES["getitem"](Operation(item, [*run.nodes, item], {1: parts})) == PARTIAL


def test_a_sum_over_a_padded_dim_leaves_the_padding_out() -> None:
    """``exp(linear(x)).sum(-1)`` with an odd width: a padding of zeros has become ones."""
    Run("sum", Case((torch.randn(4, 7, dtype=torch.float64), [-1], True))).check(RULES["sum"], 2)
