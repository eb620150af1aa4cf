"""Stage 1: an `nn.Module` and example inputs -> `Graph`.

The model's own forward runs once on fake CPU tensors under ``make_fx(pre_dispatch=True)``: ``linear``,
``layer_norm`` and
``scaled_dot_product_attention`` stay whole, nothing is allocated, and every node carries its module path and its
call site. Repeated blocks
run once (`folding`).
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.fx
import torch.fx.traceback
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from colrow.cost_models.errors import TraceError

from .call_record import CallRecorder
from .folding import Folding
from .graph import Graph
from .known_values import KnownValues, unchecked_values, without_known
from .library_caches import no_lengths_remembered
from .lifting import Traced, graph_of
from .opaque import as_operators, findings_of, opaque_modules
from .returned_values import parts_of

Inputs = Mapping[str, Any] | tuple[Any, ...]


def trace(model: nn.Module, example_inputs: Inputs, *, fold: bool = True) -> Graph:
    """Traces ``model`` on ``example_inputs``.

    Args:
        model: Weights may be on meta; they are never read.
        example_inputs: Keyword arguments, or a tuple of positional ones.
        fold: Trace equal blocks once. The result is the same graph.

    Raises:
        TraceError: torch cannot trace the model on these inputs.
    """
    try:
        return _folded(model, example_inputs, fold)
    except TraceError as refused:
        try:
            graph = _folded(model, example_inputs, fold, known_values=True)
        except TraceError as also:
            found = _around_opaque(model, example_inputs, fold, also)
            if found is None:
                raise TraceError(
                    refused.where,
                    f"{refused.wrong}, nor with known values {also.wrong[also.wrong.index('(') :]}",
                    remedy=refused.remedy,
                ) from also.__cause__
            graph = found
    graph.assumptions["route"] = "make_fx with known values: holds for masks and inputs of these values"
    return graph


def _around_opaque(model: nn.Module, example_inputs: Inputs, fold: bool, refused: TraceError) -> Graph | None:
    """The graph with every submodule that cannot be traced as one operator; None if that does not help."""
    made: list[Graph] = []

    def attempt(opaque: Mapping[str, str]) -> TraceError | None:
        try:
            made.append(_folded(model, example_inputs, fold, known_values=True, opaque=opaque))
        except TraceError as error:
            return error
        return None

    left = opaque_modules(model, refused, attempt)
    if not left:
        return None
    graph = made[-1]
    graph.findings += findings_of(left)
    return graph


def _folded(
    model: nn.Module, example_inputs: Inputs, fold: bool, known_values: bool = False, opaque: Iterable[str] = ()
) -> Graph:
    if not fold:
        return _traced(model, example_inputs, Folding(model, enabled=False), known_values, opaque)
    try:
        return _traced(model, example_inputs, Folding(model), known_values, opaque)
    except Exception as error:  # a block that reads what differs between its copies; the unfolded trace decides
        reason = _first_line(error.__cause__ or error)
    graph = _traced(model, example_inputs, Folding(model, enabled=False), known_values, opaque)
    graph.assumptions["folding"] = f"off: {reason}"
    return graph


def _traced(
    model: nn.Module, example_inputs: Inputs, folding: Folding, known_values: bool, opaque: Iterable[str]
) -> Graph:
    fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
    modules = list(model.named_modules())
    with fake_mode:
        state = {
            name: torch.empty(t.shape, dtype=t.dtype, device="cpu")
            for name, t in _named_state(modules)
            if not folding.covers(name)
        }
    inputs = pytree.tree_map_only(Tensor, _on_cpu, example_inputs)
    inputs, known = without_known(inputs) if known_values else (inputs, {})
    paths: list[str] = []

    def run(state: dict[str, Tensor], inputs: Inputs) -> list[Tensor]:
        args, kwargs = (inputs, {}) if isinstance(inputs, tuple) else ((), {**inputs, **known})
        result = torch.func.functional_call(model, state, args, kwargs, tie_weights=False)
        leaves = [
            (path, leaf) for path, leaf in pytree.tree_flatten_with_path(_plain(result))[0] if isinstance(leaf, Tensor)
        ]
        paths[:] = [".".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path) for path, _ in leaves]
        return [leaf for _, leaf in leaves]

    run._orig_mod = model  # type: ignore[attr-defined]  # make_fx reads module paths from it
    left = {path: model.get_submodule(path) for path in opaque}
    recorder = CallRecorder(model, but=frozenset(map(id, left.values())))
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(_without_cache(modules))
        stack.enter_context(_without_stack_traces())
        stack.enter_context(as_operators(left, recorder))
        stack.enter_context(folding.installed())
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.fx.traceback.preserve_node_meta())
        stack.enter_context(unchecked_values())
        stack.enter_context(no_lengths_remembered())
        if known_values:
            stack.enter_context(KnownValues())
        stack.enter_context(recorder)  # asked first: it sees every call
        try:
            traced = make_fx(
                run,
                pre_dispatch=True,
                tracing_mode="fake",
                record_module_stack=True,
                _allow_non_fake_inputs=True,
            )(state, inputs)
        except Exception as error:
            raise TraceError(
                type(model).__name__,
                f"torch cannot trace this model on these inputs ({type(error).__name__}: {_first_line(error)})",
                remedy="Pass other example inputs, or make the data-dependent branch static.",
            ) from error
    parameters = dict(model.named_parameters(remove_duplicate=False))
    graph = graph_of(Traced(traced, recorder, model, dict(modules), parameters, state, inputs, folding))
    graph.ties, graph.output_paths = tied_names(parameters.items()), paths
    graph.assumptions.update(_assumptions(model, graph))
    return graph


def tied_names(parameters: Iterable[tuple[str, Tensor]]) -> dict[str, str]:
    """Alias -> first name, of named parameters that are one under several names."""
    first: dict[int, str] = {}
    ties: dict[str, str] = {}
    for name, parameter in parameters:
        if id(parameter) in first:
            ties[name] = first[id(parameter)]
        else:
            first[id(parameter)] = name
    return ties


def _named_state(modules: Sequence[tuple[str, nn.Module]]) -> list[tuple[str, Tensor]]:
    """Every slot of every module once: a module of several names must not be swapped twice, nor restored wrongly."""
    return [
        (f"{path}.{name}" if path else name, value)
        for slots in ("_parameters", "_buffers")
        for path, module in modules
        for name, value in getattr(module, slots).items()
        if value is not None
    ]


def _on_cpu(tensor: Tensor) -> Tensor:
    """Meta inputs become empty CPU ones: data-dependent preparers want a device that computes."""
    return torch.zeros(tensor.shape, dtype=tensor.dtype) if tensor.device.type == "meta" else tensor.cpu()


def _plain(result: Any) -> Any:
    """Model outputs as plain containers, so that pytree opens them."""
    parts = parts_of(result)
    if parts is not None:
        return (
            [_plain(part) for part in parts.values()]
            if isinstance(result, (tuple, list))
            else {key: _plain(part) for key, part in parts.items()}
        )
    return result if isinstance(result, Tensor) else None  # a cache is the ranks' own, not a result


@contextmanager
def _without_cache(modules: Sequence[tuple[str, nn.Module]]) -> Iterator[None]:
    """Configurations ask for no KV cache while tracing: a cache is written under each block's index, so nothing
    would fold."""
    configs = {id(c): c for _, m in modules for c in [getattr(m, "config", None)] if c is not None}
    asked = [c for c in configs.values() if getattr(c, "use_cache", None) is True]
    for config in asked:
        config.use_cache = False
    try:
        yield
    finally:
        for config in asked:
            config.use_cache = True


@contextmanager
def _without_stack_traces() -> Iterator[None]:
    """Tracing formats no stack trace for every node: the recorder's frames say where a node comes from."""
    before = torch.fx.config.do_not_emit_stack_traces
    torch.fx.config.do_not_emit_stack_traces = True
    try:
        yield
    finally:
        torch.fx.config.do_not_emit_stack_traces = before


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]


def _assumptions(model: nn.Module, graph: Graph) -> dict[str, str]:
    facts = {"mode": "train" if model.training else "eval", "torch": torch.__version__.split("+")[0]}
    dtypes = sorted({str(node.dtype).removeprefix("torch.") for node in graph.nodes if node.op == "parameter"})
    facts["dtype"] = ",".join(dtypes)
    config = getattr(model, "config", None)
    for name in ("_attn_implementation", "_experts_implementation"):
        value = getattr(config, name, None)
        if isinstance(value, str):
            facts[name.strip("_")] = value
    if config is not None and type(model).__module__.startswith("transformers."):
        import transformers

        facts["transformers"] = transformers.__version__
    return copy.copy(facts)
