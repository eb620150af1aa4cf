"""``colrow run``: a model on N ranks, started here or by torchrun; each rank reads only its slices of a checkpoint."""

from __future__ import annotations

import os
import resource
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from colrow.cost_models.errors import UsageError
from colrow.planner.plan_model import Plan
from colrow.planner.planning import plan as make_plan
from colrow.planner.sources import DTYPES, Source, load_source

from .checkpoint import read_report
from .comparison import Count
from .counting import recorded_collectives
from .generation import greedy
from .parallel import parallelize
from .random_inputs import call
from .ranks import run_ranks

TOKENS = 32
PROMPT_LENGTH = 8
LONGEST_RUN_S = 24 * 3600.0  # a rank that fails or dies ends the run at once; this is for ranks that hang


@dataclass(frozen=True)
class RankUse:
    """What the run took of one rank.

    Attributes:
        bytes_held: Of the parameters, on this rank.
        bytes_total: Of all parameters.
        bytes_read: Of the checkpoint, by this rank; None where weights came from nowhere.
        bytes_stored: Of all that the model takes from the checkpoint.
        peak_bytes: The most memory the process had, PyTorch itself included (resident set; 1 KiB resolution).
    """

    bytes_held: int
    bytes_total: int
    bytes_read: int | None
    bytes_stored: int | None
    peak_bytes: int

    def __str__(self) -> str:
        read = (
            "" if self.bytes_read is None else f"read {self.bytes_read:,} of {self.bytes_stored:,} bytes of the files, "
        )
        held = f"holds {self.bytes_held:,} of {self.bytes_total:,} bytes of weights"
        return f"{read}{held}, peak memory {self.peak_bytes / 1e6:,.0f} MB"


@dataclass(frozen=True)
class RunResult:
    """What a run gave, as rank 0 saw it.

    Attributes:
        prompt: Token ids.
        tokens: Those generated; empty for a model that does not generate.
        outputs: ``(path, dtype, shape, mean)`` of the outputs of one forward, for such a model.
        collectives: Executed, of the whole run.
        seconds: Of generation, or of the forward.
        uses: What it took of every rank.
    """

    prompt: list[int]
    tokens: list[int]
    outputs: tuple[tuple[str, str, tuple[int, ...], float], ...]
    collectives: tuple[Count, ...]
    seconds: float
    uses: tuple[RankUse, ...]


def run(
    source: str,
    tp: int | None = None,
    plan: Plan | None = None,
    prompt_ids: list[int] | None = None,
    tokens: int | None = None,
) -> RunResult | None:
    """Run a model on N ranks, generate greedily with the KV cache, and print the tokens.

    Under torchrun (``RANK`` and ``WORLD_SIZE`` set) this process becomes one of the ranks, on its GPU where there is
    one; otherwise ``tp`` gloo ranks are started on this machine's CPU.

    Args:
        source: A SOURCE; the weights of a model directory, else random ones.
        tp: Ranks; may be left out where the plan or torchrun says it.
        plan: Made for this model; None: it is planned here.
        prompt_ids: The prompt; None: random ids.
        tokens: How many to generate, at most.

    Returns:
        What rank 0 found; None on torchrun's other ranks.

    Raises:
        UsageError: Wrong arguments, or another number of ranks than the plan was made for.
        SourceError: The source or its checkpoint cannot be read.
        RankError: A rank failed, with its message and exit code.
    """
    joined = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    size = tp or (plan.tp if plan else int(os.environ["WORLD_SIZE"]) if joined else 0)
    if size < 1 or (plan is not None and plan.tp != size):
        need = f"{plan.tp}, which the plan was made for" if plan else "1 or more"
        raise UsageError("--tp", "not a number of ranks to run on", got=size, need=need)
    loaded = load_for_running(source, plan, prompt_ids)
    made = plan or make_plan(loaded.model, loaded.example_inputs, tp=size, hardware="gloo-cpu")
    arguments = (source, made, prompt_ids, tokens or TOKENS)
    result = _join(size, arguments) if joined else run_ranks(run_on_rank, size, "gloo", arguments, LONGEST_RUN_S)[0]
    if result is not None:
        print(summary(result, made), file=sys.stderr)
        print(described(result), flush=True)
    return result


def load_for_running(source: str, plan: Plan | None, prompt_ids: list[int] | None) -> Source:
    """The source in the plan's dtype, else its own, with the prompt as its example input.

    Raises:
        UsageError: The prompt is empty or has ids outside the vocabulary.
    """
    if prompt_ids is not None and not prompt_ids:
        raise UsageError("--prompt-ids", "empty", need="at least one token id")
    length = len(prompt_ids) if prompt_ids is not None else PROMPT_LENGTH
    loaded = load_source(source, seq=length, dtype=_dtype_of(plan) if plan else "fp32")
    own = getattr(loaded.config, "dtype", None)  # as the checkpoint was saved
    own_name = next((name for name, dtype in DTYPES.items() if dtype == own), "fp32")
    if plan is None and loaded.checkpoint is not None and own_name != "fp32":
        loaded = load_source(source, seq=length, dtype=own_name)
    if prompt_ids is None:
        return loaded
    if loaded.config is None or not isinstance(loaded.example_inputs, dict) or "input_ids" not in loaded.example_inputs:
        raise UsageError("--prompt-ids", f"{loaded.name} does not read token ids", remedy="Leave the option out.")
    config: Any = loaded.config
    vocab = config.get_text_config().vocab_size
    outside = [i for i in prompt_ids if not 0 <= i < vocab]
    if outside:
        raise UsageError("--prompt-ids", "not in the vocabulary", got=outside[0], need=f"0 to {vocab - 1}")
    ids = torch.tensor([prompt_ids])
    return replace(loaded, example_inputs={**loaded.example_inputs, "input_ids": ids})


def _dtype_of(plan: Plan) -> str:
    """What most of the plan's weights are."""
    names = [str(p.dtype) for p in plan.parameters if p.is_weight] or ["float32"]
    most = max(sorted(set(names)), key=names.count)
    return next((name for name, dtype in DTYPES.items() if dtype == getattr(torch, most)), "fp32")


def run_on_rank(source: str, plan: Plan, prompt_ids: list[int] | None, tokens: int) -> RunResult | None:
    """One rank of ``run``, inside a process group; None but on rank 0."""
    loaded = load_for_running(source, plan, prompt_ids)
    model = load_model(loaded, plan)
    inputs = _on_device(loaded.example_inputs, _device())
    started = time.perf_counter()
    with recorded_collectives() as recorder:
        generated, outputs = _generated(model, inputs, tokens)
    seconds = time.perf_counter() - started
    uses = all_uses(model)
    if dist.get_rank() != 0:
        return None
    ids = inputs.get("input_ids") if isinstance(inputs, dict) else None
    return RunResult(
        prompt=ids[0].tolist() if ids is not None else [],
        tokens=generated,
        outputs=outputs,
        collectives=tuple((c.kind, c.nbytes, c.direction) for c in recorder.found),
        seconds=seconds,
        uses=uses,
    )


def load_model(loaded: Source, plan: Plan) -> nn.Module:
    """This rank's part of the model: slices read from its checkpoint, or of the same random weights on every rank."""
    if loaded.checkpoint is None:
        return parallelize(loaded.build().to(_device()), plan).eval()
    model = parallelize(loaded.model, plan, checkpoint=loaded.checkpoint).eval()
    if (loaded.checkpoint / "generation_config.json").is_file():  # which tokens end a text
        from transformers import GenerationConfig

        model.generation_config = GenerationConfig.from_pretrained(str(loaded.checkpoint))  # type: ignore[assignment]
    return model


def use_of(model: nn.Module) -> RankUse:
    """What a rewritten model took of this rank until now."""
    parameters = [p for p in model.parameters() if isinstance(p, DTensor)]
    report = read_report(model)
    return RankUse(
        sum(p.to_local().nbytes for p in parameters),
        sum(p.nbytes for p in parameters),
        report.bytes_read if report else None,
        report.bytes_total if report else None,
        peak_bytes(),
    )


def all_uses(model: nn.Module) -> tuple[RankUse, ...]:
    """That of every rank, by rank; a collective."""
    uses: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(uses, use_of(model))
    return tuple(uses)


def peak_bytes() -> int:
    """The most memory this process had so far; of a forked one, what it shares with its parent included."""
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage would count what a spawned process was before it became one
        (line,) = [line for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
        return 1024 * int(line.split()[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _generated(model: nn.Module, inputs: Any, tokens: int) -> tuple[list[int], tuple[Any, ...]]:
    """New tokens, or the outputs of one forward of a model that does not generate."""
    from .verification import named_tensors

    can_generate: Any = getattr(model, "can_generate", None)
    if can_generate is not None and can_generate() and isinstance(inputs, dict):
        prompt = {name: inputs[name] for name in _prompt_names(model) if name in inputs}
        return greedy(model, prompt, tokens).tokens[0].tolist(), ()
    with torch.no_grad():
        outputs = list(named_tensors(call(model, inputs)))
    return [], tuple(
        (path, str(v.dtype).removeprefix("torch."), tuple(v.shape), float(v.double().mean())) for path, v in outputs
    )


def _prompt_names(model: nn.Module) -> tuple[str, ...]:
    """Inputs of the first forward; generation makes the others itself."""
    main = str(getattr(model, "main_input_name", "input_ids"))
    return ("input_ids", "attention_mask", "pixel_values") if main == "input_ids" else (main,)


def _on_device(inputs: Any, device: torch.device) -> Any:
    if isinstance(inputs, dict):
        return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
    return tuple(value.to(device) if isinstance(value, Tensor) else value for value in inputs)


def _device() -> torch.device:
    """Of this rank: its GPU under NCCL, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


def _join(size: int, arguments: tuple[Any, ...]) -> RunResult | None:
    """Be one of torchrun's ranks."""
    world = int(os.environ["WORLD_SIZE"])
    if world != size:
        raise UsageError(
            "--tp",
            "torchrun started another number of ranks",
            got=world,
            need=size,
            remedy=f"Use torchrun --nproc-per-node {size}.",
        )
    backend: Literal["nccl", "gloo"] = "nccl" if torch.cuda.is_available() else "gloo"
    if backend == "nccl":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    else:
        torch.set_num_threads(1)
    dist.init_process_group(backend)
    result = run_on_rank(*arguments)
    dist.destroy_process_group()  # not after a failure: it would wait for the others
    return result


def summary(result: RunResult, plan: Plan) -> str:
    """What it took: one line, and one for each rank."""
    did = f"{len(result.tokens)} tokens" if result.tokens else "one forward"
    made = f"{did} on {plan.tp} ranks in {result.seconds:.2f} s, {len(result.collectives)} collectives"
    return "\n".join([made, *(f"rank {rank} {use}" for rank, use in enumerate(result.uses))])


def described(result: RunResult) -> str:
    """The tokens on a line of their own, or one line for each output."""
    if result.outputs:
        return "\n".join(
            f"{path}: {dtype} {list(shape)}, mean {mean:.6g}" for path, dtype, shape, mean in result.outputs
        )
    return " ".join(str(token) for token in result.tokens)
