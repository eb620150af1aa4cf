"""What ``colrow calibrate`` measures, on every rank at once: collectives as the runtime calls them, and compute.

Collectives are the functional operators that rewritten models call (`collectives`), over gloo or NCCL. Ranks agree on
how often to repeat, so they never wait for each other; they compute at the same time, as in a step, because cores share
caches and memory. Machines do other things as well: see `typical`.
"""

from __future__ import annotations

import contextlib
import glob
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from colrow.cost_models.calibration import MatmulRow, RankMeasurements
from colrow.cost_models.communication import COLLECTIVE_KINDS, CollectiveKind
from colrow.cost_models.measured_curve import Row

SMALLEST_BYTES, STEP_BYTES, LARGEST_BYTES = 256, 4096, 32 * 2**20
"""The smallest message, the next one, and the last; twice as large each time. Between the first two a machine's noise
would be larger than anything a byte could cost."""
ROUNDS = 3
LEAST_CALLS, MOST_CALLS = 4, 60
COLLECTIVES_S, MATMULS_S = 30.0, 10.0  # all of it, in under two minutes with starting and fitting
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MATMUL_ROWS = (1, 16, 128, 512, 2048, 8192)
MATMUL_WIDTHS = (256, 1024, 2048, 8192)
LARGEST_WEIGHT_BYTES = 2**28
LONGEST_MATMUL_S = 0.05
WIDTH = 8  # of a block that takes no time but to call
STREAM_BYTES = 64 * 2**20  # of one operand; no cache holds three of them
_functional = torch.ops._c10d_functional


@dataclass(frozen=True)
class Reading:
    """Seconds of one rank: from the same moment, or between two.

    Attributes:
        wall_s: Wall clock.
        busy_s: On a processor, all threads; of a GPU, wall clock.
        waited_s: Threads could have run and did not, because others had the processors (Linux; elsewhere 0).
    """

    wall_s: float
    busy_s: float
    waited_s: float

    @staticmethod
    def begin() -> Reading:
        """Of this process; the clocks last, because the scheduler's account takes a while to read."""
        waited_s = _waited_s()
        return Reading(time.perf_counter(), time.process_time(), waited_s)

    def end(self, calls: int = 1) -> Reading:
        """What passed since this beginning, per call; the clocks first."""
        wall_s, busy_s = time.perf_counter() - self.wall_s, time.process_time() - self.busy_s
        waited_s = max(0.0, _waited_s() - self.waited_s)
        return Reading(wall_s / calls, busy_s / calls, waited_s / calls)


def _waited_s() -> float:
    whole_ns = 0
    for path in glob.glob("/proc/self/task/*/schedstat"):
        with contextlib.suppress(OSError), open(path) as file:  # a thread may have ended
            whole_ns += int(file.read().split()[1])
    return whole_ns * 1e-9


def typical(readings: Sequence[Reading], together: bool, group: dist.ProcessGroup | None = None) -> float:
    """What a call takes on ranks that have their processors to themselves, of the slower rank.

    Where ranks do not wait for each other, what it was busy. Where they do, wall clock: what a rank waits for a
    processor may pass while bytes are on their way, so it cannot be taken off. In either case the readings count in
    which the ranks waited least, a quarter of them, and of these the median.

    Args:
        readings: Taken by all ranks at the same time.
        together: Ranks wait for each other in the call.
        group: The ranks; they agree over gloo.
    """
    columns = ([r.wall_s for r in readings], [r.busy_s for r in readings], [r.waited_s for r in readings])
    wall_s, busy_s, waited_s = (torch.tensor(column, dtype=torch.float64) for column in columns)
    dist.all_reduce(wall_s, dist.ReduceOp.MAX, group=group)
    dist.all_reduce(busy_s, dist.ReduceOp.MAX, group=group)
    dist.all_reduce(waited_s, group=group)
    least = waited_s.argsort(stable=True)[: -(-len(readings) // 4)]
    return float((wall_s if together else busy_s)[least].median())


@dataclass(frozen=True)
class Clock:
    """Times calls on one device, and agrees on seconds with the other ranks.

    Attributes:
        device: Where tensors live.
        calls_at_a_time: Calls between two readings: GPUs queue work, and a reading waits for the queue.
    """

    device: torch.device
    calls_at_a_time: int

    def reading(self, call: Callable[[], object]) -> Reading:
        """``calls_at_a_time`` calls."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            begin_s = time.perf_counter()
            for _ in range(self.calls_at_a_time):
                call()
            torch.cuda.synchronize(self.device)
            each_s = (time.perf_counter() - begin_s) / self.calls_at_a_time
            return Reading(each_s, each_s, 0.0)
        begin = Reading.begin()
        for _ in range(self.calls_at_a_time):
            call()
        return begin.end(self.calls_at_a_time)

    def once(self, call: Callable[[], object], group: dist.ProcessGroup, together: bool = False) -> float:
        """One reading after a call to warm up."""
        call()
        return typical([self.reading(call)], together, group)

    def repeated(
        self,
        call: Callable[[], object],
        once_s: float,
        budget_s: float,
        group: dist.ProcessGroup,
        together: bool = False,
    ) -> float:
        """As many readings as the budget allows; ranks agreed that a call takes ``once_s``."""
        count = min(MOST_CALLS, max(LEAST_CALLS, int(budget_s / (once_s * self.calls_at_a_time))))
        return typical([self.reading(call) for _ in range(count)], together, group)


def group_sizes(ranks: int) -> list[int]:
    """Powers of two, and all ranks."""
    return sorted({2**n for n in range(1, ranks.bit_length()) if 2**n <= ranks} | {ranks})


def measure_on_rank(
    uses_cuda: bool, collectives_s: float | None = None, matmuls_s: float | None = None
) -> RankMeasurements:
    """Measure, on every rank of the default (gloo) group together; every rank gets the same.

    Args:
        uses_cuda: Measure NCCL and this rank's GPU (already the current device), else gloo and the CPU.
        collectives_s: About as long as all collectives may take; None for `COLLECTIVES_S`.
        matmuls_s: The same of matmuls; None for `MATMULS_S`.
    """
    clock = Clock(torch.device("cuda", torch.cuda.current_device()), 10) if uses_cuda else Clock(torch.device("cpu"), 1)
    world = dist.group.WORLD
    assert world is not None
    ranks = dist.get_world_size()
    groups = {size: list(range(size)) for size in group_sizes(ranks)}
    talking = {size: dist.new_group(members, backend="nccl") if uses_cuda else dist.new_group(members)
               for size, members in groups.items()}  # fmt: skip
    agreeing = {size: dist.new_group(members) for size, members in groups.items()}
    _say(f"measuring {dist.get_backend(talking[ranks])} on {ranks} ranks, under two minutes")
    collectives: dict[CollectiveKind, dict[int, list[Row]]] = {kind: {} for kind in COLLECTIVE_KINDS}
    budget_s = (collectives_s or COLLECTIVES_S) / len(COLLECTIVE_KINDS) / len(groups)
    for size in groups:
        for kind in COLLECTIVE_KINDS:
            _say(f"  {kind}, {size} ranks")
            if dist.get_rank() < size:
                collectives[kind][size] = _curve(kind, size, talking[size], agreeing[size], clock, budget_s)
            dist.barrier()  # who is not in a group waits for it
    _say("  matmuls, memory, launches")
    matmuls = _matmuls(clock, world, matmuls_s or MATMULS_S)
    streams = _streams(clock, world)
    launch_s, eager_dispatch_s = _launch(clock, world)
    units = torch.cuda.get_device_properties(clock.device).multi_processor_count if uses_cuda else 1
    memory = torch.cuda.get_device_properties(clock.device).total_memory if uses_cuda else _host_bytes() // ranks
    found = RankMeasurements(
        collectives,
        matmuls,
        streams,
        launch_s,
        eager_dispatch_s,
        units,
        memory,
        _device_text(clock.device),
        _implementation(uses_cuda),
    )
    everyone = [found]
    dist.broadcast_object_list(everyone, src=0)  # rank 0 was in every group
    return everyone[0]


def _say(text: str) -> None:
    if dist.get_rank() == 0:
        print(text, file=sys.stderr, flush=True)


def _curve(
    kind: CollectiveKind,
    size: int,
    talking: dist.ProcessGroup,
    agreeing: dist.ProcessGroup,
    clock: Clock,
    budget_s: float,
) -> list[Row]:
    """Times of one kind by size, up to where one call takes the share of several.

    Slow calls are repeated less: once the budget is spent no further round begins, at twice the budget the sizes end.
    """
    sizes = [SMALLEST_BYTES, *(STEP_BYTES << n for n in range((LARGEST_BYTES // STEP_BYTES).bit_length()))]
    share_s = budget_s / len(sizes) / ROUNDS
    best: dict[int, float] = {}
    begin_s = time.monotonic()
    for _ in range(ROUNDS):
        if _agreed_since_s(begin_s, agreeing) > budget_s and best:
            break
        for nbytes in sizes:
            call, whole = _call(kind, nbytes, size, talking.group_name, clock.device)
            once_s = clock.once(call, agreeing, together=True)
            slow = once_s > 2 * share_s  # the link is: once is enough, and larger messages say no more
            seconds = once_s if slow else clock.repeated(call, once_s, share_s, agreeing, together=True)
            best[whole] = min(seconds, best.get(whole, seconds))
            late = _agreed_since_s(begin_s, agreeing) > 2 * budget_s
            if (slow or late) and len(best) >= 4:
                sizes = [n for n in sizes if n <= nbytes]
                break
    return sorted(best.items())


def _agreed_since_s(begin_s: float, group: dist.ProcessGroup) -> float:
    """Wall seconds since then, of the slowest rank: what ranks decide by must be the same on all."""
    passed_s = torch.tensor([time.monotonic() - begin_s], dtype=torch.float64)
    dist.all_reduce(passed_s, dist.ReduceOp.MAX, group=group)
    return float(passed_s)


def _call(
    kind: CollectiveKind, nbytes: int, size: int, group: str, device: torch.device
) -> tuple[Callable[[], Tensor], int]:
    """A call of ``kind`` on about ``nbytes`` of whole tensor, and how many bytes exactly (see `traffic_share`)."""
    per_rank = max(1, nbytes // 4 // size)
    part = torch.zeros(per_rank, device=device)
    whole = torch.zeros(per_rank * size, device=device)
    wait = _functional.wait_tensor
    match kind:
        case "all_reduce":
            return lambda: wait(_functional.all_reduce(whole, "sum", group)), whole.nbytes
        case "all_gather":
            return lambda: wait(_functional.all_gather_into_tensor(part, size, group)), whole.nbytes
        case "reduce_scatter":
            return lambda: wait(_functional.reduce_scatter_tensor(whole, "sum", size, group)), whole.nbytes
        case "broadcast":
            return lambda: wait(_functional.broadcast(whole, 0, group)), whole.nbytes
        case "all_to_all":
            # Each rank holds 1/size of the tensor and sends equal shares of that.
            held = torch.zeros(max(size, per_rank // size * size), device=device)
            counts = [held.numel() // size] * size
            return lambda: wait(_functional.all_to_all_single(held, counts, counts, group)), held.nbytes * size


def _matmuls(clock: Clock, group: dist.ProcessGroup, budget_s: float) -> dict[str, list[MatmulRow]]:
    """Rates of ``F.linear`` by dtype and shape; shapes that take too long on this device are left out."""
    rows: dict[str, list[MatmulRow]] = {}
    share_s = budget_s / len(DTYPES) / len(MATMUL_ROWS) / len(MATMUL_WIDTHS)
    for dtype in DTYPES:
        found = rows[str(dtype).removeprefix("torch.")] = []
        for width in MATMUL_WIDTHS:
            if width * width * dtype.itemsize > LARGEST_WEIGHT_BYTES:
                continue
            weight = torch.ones(width, width, dtype=dtype, device=clock.device)
            for m in MATMUL_ROWS:
                x = torch.ones(m, width, dtype=dtype, device=clock.device)
                if found and 2.0 * m * width * width / max(row.flops_per_s for row in found) > LONGEST_MATMUL_S:
                    continue

                def call(x: Tensor = x, weight: Tensor = weight) -> Tensor:
                    return F.linear(x, weight)

                once_s = clock.once(call, group)
                found.append(MatmulRow(m, width, width, clock.repeated(call, once_s, share_s / 2, group)))
    return rows


def _streams(clock: Clock, group: dist.ProcessGroup) -> list[float]:
    """Bytes per second of an addition, a copy and a matrix-vector product that no cache holds."""
    count = STREAM_BYTES // 4
    a, b = torch.ones(count, device=clock.device), torch.ones(count, device=clock.device)
    out = torch.empty_like(a)
    matrix, vector = a.view(-1, 4096), torch.ones(1, 4096, device=clock.device)
    calls: list[tuple[int, Callable[[], object]]] = [
        (3 * STREAM_BYTES, lambda: torch.add(a, b, out=out)),
        (2 * STREAM_BYTES, lambda: out.copy_(a)),
        (STREAM_BYTES, lambda: F.linear(vector, matrix)),
    ]
    return [nbytes / clock.repeated(call, clock.once(call, group), 0.5, group) for nbytes, call in calls]


class _Block(nn.Module):
    """A pre-norm transformer block: what code between operators is like."""

    OPERATORS = 14  # that a plan prices; views are free there, so their time is part of the others'

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.gate, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.activation = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        """[1, tokens, WIDTH] -> the same."""
        y = self.attention_norm(x)
        q, k, v = (part(y).view(1, -1, 2, WIDTH // 2).transpose(1, 2) for part in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(1, -1, WIDTH)
        x = x + self.o(mixed)
        y = self.norm(x)
        return x + self.down(self.activation(self.gate(y)) * self.up(y))  # type: ignore[no-any-return]


def _launch(clock: Clock, group: dist.ProcessGroup) -> tuple[float, float | None]:
    """Seconds an operator takes whatever its size, in a block of few elements: on the device, and on the host."""
    block, x = _Block().to(clock.device), torch.ones(1, 4, WIDTH, device=clock.device)

    def blocks() -> None:
        for _ in range(20):
            block(x)

    with torch.no_grad():
        once_s = clock.once(blocks, group)
        eager_s = clock.repeated(blocks, once_s, 1.0, group) / 20 / _Block.OPERATORS
        if clock.device.type != "cuda":
            return eager_s, None
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            blocks()
        return clock.repeated(graph.replay, once_s, 1.0, group) / 20 / _Block.OPERATORS, eager_s


def _host_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _device_text(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
    return f"CPU ({torch.backends.cpu.get_cpu_capability()}), {torch.get_num_threads()} thread a rank"


def _implementation(uses_cuda: bool) -> str:
    if uses_cuda:
        version: tuple[int, ...] = torch.cuda.nccl.version()  # type: ignore[no-untyped-call]
        return f"nccl {'.'.join(map(str, version))}, torch {torch.__version__}"
    return f"gloo, torch {torch.__version__}"
