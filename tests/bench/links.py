"""Predicted against measured: three models at three sizes on 2 gloo ranks, at full speed and on rate-limited links.

For each link the ranks calibrate it (as ``colrow calibrate`` does), plan with that profile, and time forward passes:
the dense model (tp 1), the split one (tp 2), and one whose feed-forward weights stay whole (less communication, more
compute). Nothing is fitted to the steps. Limited links are two network namespaces joined by a veth pair with a token
bucket (``tc ... tbf``) at either end: Linux and root only; elsewhere they are skipped, and said to be.

    python tests/bench/links.py [full] [1gbit] [100mbit]      exits 1 where an ordering is wrong
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import date
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from colrow.cost_models.calibration import Measurements, calibrated
from colrow.cost_models.hardware import Hardware
from colrow.planner import plan
from colrow.rewrite import parallelize
from colrow.rewrite.calibration import Reading, measure_on_rank, typical
from colrow.rewrite.ranks import run_ranks

LINKS = {"full": "", "1gbit": "1gbit", "100mbit": "100mbit"}  # name -> rate, as tc takes it
WIDTHS = (128, 256, 512)
TOKENS, LAYERS = 128, 2
CLEARLY = 1.25  # predictions further apart than this must be in the measured order
READINGS = 30
LONGEST_S = 600.0  # of one link; it takes about three minutes
ADDRESS, DEVICE = "10.77.0", "wire"


@dataclass(frozen=True)
class Step:
    """One plan of one model on one link.

    Attributes:
        link: Which.
        model: Which, with its width.
        plan: ``tp 1``, ``tp 2`` or ``tp 2, ffn whole``.
        predicted_s: The plan's total.
        measured_s: Of a forward pass.
        comm_s: The predicted part in communication.
    """

    link: str
    model: str
    plan: str
    predicted_s: float
    measured_s: float
    comm_s: float

    @property
    def error(self) -> float:
        """Relative."""
        return abs(self.predicted_s / self.measured_s - 1)


class FeedForward(nn.Module):
    """A residual feed-forward block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[tokens, width] -> the same."""
        return x + self.down(torch.relu(self.up(self.norm(x))))


def feed_forward(width: int) -> tuple[nn.Module, dict[str, Any] | tuple[Any, ...], str]:
    """A stack of blocks."""
    blocks = nn.Sequential(*(FeedForward(width) for _ in range(2 * LAYERS)))
    return blocks, (torch.randn(TOKENS, width),), "[13].*"


def gpt2(width: int) -> tuple[nn.Module, dict[str, Any] | tuple[Any, ...], str]:
    """GPT-2, without a head on more than one token."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_embd=width, n_layer=LAYERS, n_head=8, vocab_size=1024, use_cache=False, bos_token_id=None, eos_token_id=None
    )
    return GPT2LMHeadModel(config), {"input_ids": _ids(), "logits_to_keep": 1}, "*.mlp.*"


def llama(width: int) -> tuple[nn.Module, dict[str, Any] | tuple[Any, ...], str]:
    """Llama, grouped kv heads."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=width, intermediate_size=11 * width // 4, num_hidden_layers=LAYERS, num_attention_heads=8,
        num_key_value_heads=4, vocab_size=1024, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config), {"input_ids": _ids(), "logits_to_keep": 1}, "*.mlp.*"


MODELS: dict[str, Callable[[int], tuple[nn.Module, dict[str, Any] | tuple[Any, ...], str]]] = {
    "feed-forward": feed_forward,
    "gpt2": gpt2,
    "llama": llama,
}


def _ids() -> Tensor:
    return torch.arange(TOKENS)[None] * 7 % 1024


def calibrate_here(seconds: float | None) -> Hardware:
    """A profile of the link between these ranks, in about so many seconds; every rank gets the same."""
    found = measure_on_rank(False, seconds, seconds and seconds / 2)
    measured = Measurements(ranks=dist.get_world_size(), date=date.today().isoformat(), **vars(found))
    return calibrated("this link", measured)[1]


def steps_on_rank(link: str, widths: Sequence[int], models: Sequence[str], seconds: float | None) -> list[Step]:
    """On each of two ranks: calibrate, plan, rewrite, time; rank 0's answer is everybody's."""
    torch.set_num_threads(1)
    hardware = calibrate_here(seconds)
    steps = []
    for name in models:
        for width in widths:
            _, inputs, whole = MODELS[name](width)
            options: dict[str, dict[str, Any]] = {
                "tp 1": {"tp": 1},
                "tp 2": {"tp": 2},
                "tp 2, ffn whole": {"tp": 2, "pin": {whole: "replicated"}},
            }
            for label, asked in options.items():
                torch.manual_seed(0)
                model = MODELS[name](width)[0].eval()
                made = plan(model, inputs, hardware=hardware, **asked)
                if made.tp > 1:
                    model = parallelize(model, made)
                measured_s = step_s(model, inputs, made.tp > 1)
                steps.append(Step(link, f"{name} {width}", label, made.cost.total_s, measured_s, made.cost.comm_s))
                if dist.get_rank() == 0:
                    print(".", end="", file=sys.stderr, flush=True)
    return steps


def step_s(model: nn.Module, inputs: dict[str, Any] | tuple[Any, ...], communicates: bool) -> float:
    """Wall seconds of a forward pass on both ranks, read as calibration reads."""

    def forward() -> None:
        with torch.no_grad():
            model(**inputs) if isinstance(inputs, dict) else model(*inputs)

    for _ in range(3):
        forward()
    readings = []
    for _ in range(READINGS):
        dist.barrier()
        begin = Reading.begin()
        forward()
        readings.append(begin.end())
    return typical(readings, communicates)


# ---- links


def refusal() -> str:
    """Why links cannot be limited here; "" where they can."""
    if not sys.platform.startswith("linux"):
        return "network namespaces are Linux's"
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        return f"{' and '.join(missing)} not found (package iproute2)"
    tried = subprocess.run(["ip", "netns", "add", f"colrow{os.getpid()}try"], capture_output=True, text=True)
    if tried.returncode:
        return f"no network namespace may be made: {tried.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", f"colrow{os.getpid()}try"], check=True)
    return ""


@contextmanager
def limited(rate: str) -> Iterator[list[str]]:
    """Two namespaces joined by a link of ``rate``; yields their names."""
    names = [f"colrow{os.getpid()}{side}" for side in "ab"]

    def ip(*arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True, capture_output=True)

    made = []
    try:
        for name in names:
            ip("netns", "add", name)
            made.append(name)
        ip("link", "add", DEVICE, "netns", names[0], "type", "veth", "peer", "name", DEVICE, "netns", names[1])
        for n, name in enumerate(names):
            ip("-n", name, "addr", "add", f"{ADDRESS}.{n + 1}/24", "dev", DEVICE)
            for device in ("lo", DEVICE):
                ip("-n", name, "link", "set", device, "up")
            # A bucket of a few packets: calls that follow each other and calls between compute see the same link.
            bucket = ["root", "tbf", "rate", rate, "burst", "8kb", "latency", "200ms"]
            ip("netns", "exec", name, "tc", "qdisc", "add", "dev", DEVICE, *bucket)
        yield names
    finally:
        for name in made:  # and the devices in it; one that will not go is no reason to leave the other
            subprocess.run(["ip", "netns", "del", name], check=False)


def steps_over(
    link: str, widths: Sequence[int] = WIDTHS, models: Sequence[str] = tuple(MODELS), seconds: float | None = None
) -> list[Step]:
    """Two ranks over one of `LINKS`, each in its own namespace where it is limited.

    Args:
        link: Its name.
        widths: Of the models.
        models: Their names.
        seconds: For calibrating; None for as long as ``colrow calibrate`` takes.
    """
    rate = LINKS[link]
    if not rate:
        return run_ranks(steps_on_rank, 2, "gloo", (link, tuple(widths), tuple(models), seconds), LONGEST_S)[0]
    with limited(rate) as names:
        ranks = []
        for rank, name in enumerate(names):
            environment = os.environ | {
                "RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": f"{ADDRESS}.1", "MASTER_PORT": "29507",
                "GLOO_SOCKET_IFNAME": DEVICE, "OMP_NUM_THREADS": "1",
            }  # fmt: skip
            command = ["ip", "netns", "exec", name, sys.executable, __file__, "--rank", link]
            command += [",".join(map(str, widths)), ",".join(models), str(seconds or "")]
            ranks.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
        try:
            printed = [rank.communicate(timeout=LONGEST_S)[0] for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()  # its namespace goes with the last process in it
        if any(rank.returncode for rank in ranks):
            raise RuntimeError(f"a rank on the {link} link ended with {[rank.returncode for rank in ranks]}")
    return [Step(**step) for step in json.loads(printed[0].splitlines()[-1])]


def join(link: str, widths: str, models: str, seconds: str) -> None:
    """One rank in its namespace: rank 0 prints the steps."""
    dist.init_process_group("gloo")
    asked = float(seconds) if seconds else None
    steps = steps_on_rank(link, [int(width) for width in widths.split(",")], models.split(","), asked)
    if dist.get_rank() == 0:
        print(json.dumps([asdict(step) for step in steps]), flush=True)
    dist.barrier()
    dist.destroy_process_group()


# ---- what it shows


def wrong_orders(steps: Sequence[Step]) -> tuple[list[str], int]:
    """Pairs of plans of a model on a link that are predicted clearly apart and measured the other way; and how many
    pairs were clearly apart."""
    wrong, judged = [], 0
    for one, other in combinations(steps, 2):
        if (one.link, one.model) != (other.link, other.model):
            continue
        fast, slow = sorted((one, other), key=lambda step: step.predicted_s)
        if slow.predicted_s <= CLEARLY * fast.predicted_s:
            continue
        judged += 1
        if fast.measured_s >= slow.measured_s:
            wrong.append(f"{one.model} on {one.link}: {fast.plan} predicted to be faster than {slow.plan}")
    return wrong, judged


def main(links: list[str]) -> int:
    """Measures, prints, and returns the exit code."""
    out = Console(width=max(100, Console().width))
    why = refusal()
    steps: list[Step] = []
    for link in links or list(LINKS):
        if LINKS[link] and why:
            out.print(f"{link}: skipped: {why}")
            continue
        print(f"{link}: calibrating, then {3 * len(WIDTHS) * len(MODELS)} plans to time, a dot each", file=sys.stderr)
        begin_s = time.monotonic()
        steps += steps_over(link)
        print(f"\n{link}: took {time.monotonic() - begin_s:.0f} s", file=sys.stderr)
    if not steps:
        return 0
    table = Table("link", "model", "plan", "predicted", "of that, comm", "measured", "error")
    table.title = "A forward pass on 2 gloo ranks, ms: predicted from a calibrated profile of the link, and measured"
    for step in steps:
        times = [f"{1e3 * seconds:.2f}" for seconds in (step.predicted_s, step.comm_s, step.measured_s)]
        table.add_row(step.link, step.model, step.plan, *times, f"{step.error:.0%}")
    out.print(table)
    for link in dict.fromkeys(step.link for step in steps):
        errors = [step.error for step in steps if step.link == link]
        out.print(f"{link}: median error {statistics.median(errors):.0%}, largest {max(errors):.0%}")
    wrong, judged = wrong_orders(steps)
    busy = f"{os.getloadavg()[0]:.1f} on {os.cpu_count()} processors"
    out.print(f"Load average {busy}: steps that communicate are in wall seconds, and take longer on a busy machine.")
    out.print(f"{judged - len(wrong)} of {judged} orderings right, where predictions differ by more than 25 %")
    for text in wrong:
        out.print(f"WRONG: {text}")
    return 1 if wrong else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        join(*sys.argv[2:])
    else:
        sys.path.insert(0, str(Path(__file__).parent))
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as Ctrl-C: namespaces are taken down
        sys.exit(main(sys.argv[1:]))
