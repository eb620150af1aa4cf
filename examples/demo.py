"""What ``make demo`` runs: Llama-3.1-8B planned for 8 GPUs, then a small one of its kind run on 2 CPU ranks.

Exits with 1 if the two ranks do anything else than the dense model does, or than the plan says.
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from colrow.planner import Plan, plan
from colrow.planner.sources import load_source
from colrow.rewrite import display, units
from colrow.rewrite.counting import recorded_collectives
from colrow.rewrite.generation import Generated, compare_tokens, greedy
from colrow.rewrite.ranks import run_ranks
from colrow.rewrite.running import RankUse, load_model, use_of

CONFIG = Path(__file__).parent / "configs" / "llama-3.1-8b.json"
RANKS, TOKENS, PROMPT = 2, 32, [1, 15, 99, 42, 7, 300, 12, 77]
TOLERANCE = 1e-5  # of float32 logits
Counts = Counter[tuple[str, int]]  # kind and bytes of a collective

out, log = Console(), Console(stderr=True)


def main() -> int:
    """Runs the demo; the exit code."""
    torch.set_num_threads(1)
    with log.status("Planning Llama-3.1-8B for 8 ranks of an H100 node"):
        source = load_source(str(CONFIG), phase="prefill", batch=1, seq=2048)
        large = plan(source.model, source.example_inputs, tp=8, hardware="h100-sxm")
    units.console(sys.stdout).print(display.render(large))
    with tempfile.TemporaryDirectory() as folder:
        return run_small(folder)


def run_small(folder: str) -> int:
    """Builds, saves, plans and runs a small model of the same architecture; 0 if all is as it should be."""
    out.rule(f"The same architecture, small, on {RANKS} CPU ranks")
    with log.status("Building and saving a small model"):
        dense = load_source(str(CONFIG), small=True, dtype="fp32").build()
        dense.save_pretrained(folder)  # type: ignore[operator]
        source = load_source(folder, phase="prefill", seq=len(PROMPT), dtype="fp32")
        small = plan(source.model, source.example_inputs, tp=RANKS, hardware="gloo-cpu")
    log.print(f"Generating {TOKENS} tokens on {RANKS} ranks, each with its slices alone")  # a spinner bars forking
    results: list[tuple[Generated, Counts, int, RankUse]] = run_ranks(on_rank, RANKS, "gloo", (folder, small))
    with log.status("Generating them with the dense model"):
        true = greedy(dense, prompt(), TOKENS, keep_logits=True, eos_token_id=None)
    report = compare_tokens([generated for generated, *_ in results], true)
    for rank, (*_, use) in enumerate(results):
        out.print(f"rank {rank} {use}", highlight=False)
    generated, executed, in_all, _ = results[0]
    out.print(f"prompt  {PROMPT}")
    out.print(f"ranks   {generated.tokens[0].tolist()}")
    out.print(f"dense   {true.tokens[0].tolist()}")
    planned: Counts = Counter((c.kind, c.nbytes) for c in small.collectives if c.direction == "forward")
    out.print(table(planned, executed, in_all))
    checks = {
        f"{report.num_compared} tokens are the dense model's": not report.wrong and report.num_compared == TOKENS,
        "both ranks chose the same tokens": not report.unequal_ranks,
        f"logits differ by {report.logits_error:.1e} at most": report.logits_error <= TOLERANCE,
        "the prompt's forward executed the planned collectives": executed == planned,
        "and so did every forward of the generation": in_all == TOKENS * planned.total(),
        "each rank read and holds its slices alone": all(_is_share(use) for *_, use in results),
    }
    for what, is_so in checks.items():
        out.print(f"[green]✓[/] {what}" if is_so else f"[red]✗ not so: {what}[/]")
    return 0 if all(checks.values()) else 1


def on_rank(folder: str, small: Plan) -> tuple[Generated, Counts, int, RankUse]:
    """One rank: load its slices, run the prompt, generate. Returns tokens, collectives, and what it took."""
    model = load_model(load_source(folder, phase="prefill", seq=len(PROMPT), dtype="fp32"), small)
    with torch.no_grad(), recorded_collectives() as of_prompt:
        model(**prompt(), logits_to_keep=1)
    with recorded_collectives() as of_all:
        generated = greedy(model, prompt(), TOKENS, keep_logits=True, eos_token_id=None)
    return generated, Counter((c.kind, c.nbytes) for c in of_prompt.found), len(of_all.found), use_of(model)


def _is_share(use: RankUse) -> bool:
    """About half of the weights, read and held."""
    read, stored = use.bytes_read or 0, use.bytes_stored or 0
    return 0 < read < 0.6 * stored and use.bytes_held < 0.6 * use.bytes_total


def prompt() -> dict[str, Any]:
    """The prompt's ids and mask, [1, length]."""
    ids = torch.tensor([PROMPT])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def table(planned: Counts, executed: Counts, in_all: int) -> Table:
    """Planned against executed collectives."""
    made = Table("collective", "bytes", "planned", "executed")
    for kind, nbytes in sorted(planned.keys() | executed.keys()):
        key = (kind, nbytes)
        made.add_row(kind, f"{nbytes:,}", str(planned[key]), str(executed[key]))
    made.add_section()
    made.add_row(f"in {TOKENS} forwards", "", str(TOKENS * planned.total()), str(in_all))
    return made


if __name__ == "__main__":
    sys.exit(main())
