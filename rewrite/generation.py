"""Greedy generation with the KV cache, and whether a rewritten model generates what the dense one does."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from colrow.planner.plan_model import Plan
from colrow.planner.random_weights import randomize

from .comparison import error_of
from .parallel import parallelize
from .ranks import Backend, run_ranks

MARGIN = 100.0  # a token counts where the dense top-2 margin is this many times the error of the logits


@dataclass(frozen=True)
class Generated:
    """What a model wrote.

    Attributes:
        tokens: New ones, [batch, steps].
        logits: That each was chosen by, [batch, steps, vocabulary]; None where they were not kept.
    """

    tokens: Tensor
    logits: Tensor | None = None


@torch.no_grad()
def greedy(
    model: nn.Module, inputs: dict[str, Any], tokens: int, keep_logits: bool = False, **options: Any
) -> Generated:
    """Generate up to ``tokens`` tokens by the model's own ``generate``, each the likeliest one.

    Args:
        model: With a ``generate`` method; dense, or rewritten (then every rank of its group calls).
        inputs: The prompt: ``input_ids`` [batch, length] and ``attention_mask``, or what the model reads instead.
        tokens: New ones at most.
        keep_logits: Return logits too.
        options: Passed on, such as ``cache_implementation="static"``.
    """
    generate: Any = model.generate
    made = generate(
        **inputs,
        **{"use_cache": True, "do_sample": False, "num_beams": 1} | options,
        max_new_tokens=tokens,
        return_dict_in_generate=True,
        output_logits=keep_logits,
    )
    config: Any = model.config
    prompt = 0 if config.is_encoder_decoder else inputs["input_ids"].shape[1]
    start = 1 if config.is_encoder_decoder else prompt
    logits = torch.stack(made.logits, 1).cpu() if keep_logits else None
    return Generated(made.sequences[:, start:].cpu(), logits)


@dataclass(frozen=True)
class GenerationReport:
    """What ``compare_generation`` found.

    Attributes:
        num_compared: Tokens compared: up to the first, in each sequence, that a rounding error may flip.
        num_flips: Sequences that part at such a token.
        wrong: ``(sequence, step)`` where tokens differ although the dense model is sure.
        logits_error: Of the logits, as far as tokens are equal.
        unequal_ranks: Ranks that generated other tokens than rank 0.
    """

    num_compared: int
    num_flips: int
    wrong: tuple[tuple[int, int], ...]
    logits_error: float
    unequal_ranks: tuple[int, ...]

    def ok(self, tolerance: float) -> bool:
        """Whether the same was generated, from logits within ``tolerance``."""
        return not self.wrong and not self.unequal_ranks and self.logits_error <= tolerance


def compare_tokens(found: list[Generated], dense: Generated) -> GenerationReport:
    """Compare what the ranks generated with what the dense model did; both with logits.

    Sequences are compared up to where they part: what follows answers another prompt.
    """
    mine, wrong, num_compared, flips, worst = found[0], [], 0, 0, 0.0
    assert mine.logits is not None and dense.logits is not None
    for row in range(dense.tokens.shape[0]):
        for step in range(min(dense.tokens.shape[1], mine.tokens.shape[1])):
            ours, theirs = mine.logits[row, step], dense.logits[row, step]
            worst = max(worst, error_of(ours, theirs))
            num_compared += 1
            if mine.tokens[row, step] != dense.tokens[row, step]:
                best = theirs.double().topk(2).values
                sure = float(best[0] - best[1]) > MARGIN * float((ours.double() - theirs.double()).abs().max())
                wrong += [(row, step)] * sure
                flips += not sure
                break
    if mine.tokens.shape != dense.tokens.shape and not flips:
        wrong.append((0, min(dense.tokens.shape[1], mine.tokens.shape[1])))  # one stopped early
    others = tuple(rank for rank, other in enumerate(found) if not torch.equal(other.tokens, mine.tokens))
    return GenerationReport(num_compared, flips, tuple(wrong), worst, others)


def compare_generation(
    build_model: Callable[[], nn.Module],
    inputs: dict[str, Any],
    p: Plan,
    tokens: int = 16,
    ranks: Backend = "simulated",
    **options: Any,
) -> GenerationReport:
    """Generate greedily with the dense model and with the one rewritten by ``p``, in float64 with random weights.

    Args:
        build_model: Makes the dense model, which has a ``generate`` method.
        inputs: The prompt, as ``greedy`` takes it.
        p: Made for this model.
        tokens: New ones.
        ranks: "simulated" or "gloo".
        options: Of ``generate``.
    """
    dense = randomize(build_model().double()).eval()
    true = greedy(dense, inputs, tokens, True, **options)
    return compare_tokens(run_ranks(_on_rank, p.tp, ranks, (dense, inputs, p, tokens, options)), true)


def _on_rank(dense: nn.Module, inputs: dict[str, Any], p: Plan, tokens: int, options: dict[str, Any]) -> Generated:
    return greedy(parallelize(copy.deepcopy(dense), p), inputs, tokens, True, **options)
