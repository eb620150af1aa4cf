"""What ``colrow calibrate`` measures, on every rank at once: collectives as the runtime calls them, and compute.

Collectives are the functional operators that rewritten models call (`collectives`), over gloo or NCCL. Machines do
other things as well, and that only adds: a reading is the slower rank's, readings during which the system preempted a
rank are left out where others remain, and a figure is the lower quartile of the rest and the least of the rounds.
Compute on a CPU is timed in CPU seconds. Ranks agree on how often to repeat, so they never wait for each other; they
compute at the same time, as in a step, because cores share caches and memory.
"""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from colrow.cost_models.calibration import MatmulRow
from colrow.cost_models.communication import COLLECTIVE_KINDS, CollectiveKind
from colrow.cost_models.measured_curve import Row

SMALLEST_BYTES, LARGEST_BYTES = 256, 64 * 2**20
ROUNDS = 3
LEAST_CALLS, MOST_CALLS = 3, 60
COLLECTIVES_S, MATMULS_S = 35.0, 15.0  # all of it, in under two minutes with starting and fitting
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MATMUL_ROWS = (1, 16, 128, 512, 2048, 8192)
MATMUL_WIDTHS = (256, 1024, 2048, 8192)
LARGEST_WEIGHT_BYTES = 2**28
LONGEST_MATMUL_S = 0.05
STREAM_BYTES = 64 * 2**20  # of one operand; no cache holds three of them
_functional = torch.ops._c10d_functional


@dataclass(frozen=True)
class RankMeasurements:
    """What all ranks agree on after measuring; the fields are those of `calibration.Measurements`."""

    collectives: dict[CollectiveKind, dict[int, list[Row]]]
    matmuls: dict[str, list[MatmulRow]]
    stream_bytes_per_s: list[float]
    launch_s: float
    eager_dispatch_s: float | None
    units: int
    memory_bytes: int
    device: str
    implementation: str


@dataclass(frozen=True)
class Clock:
    """Times calls on one device, and agrees on seconds with the other ranks.

    Attributes:
        device: Where tensors live.
        calls_at_a_time: Calls between two readings: GPUs queue work, and a reading waits for the queue.
        read: Seconds now.
    """

    device: torch.device
    calls_at_a_time: int
    read: Callable[[], float] = time.perf_counter

    def now(self) -> float:
        """Seconds, once all work on the device is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return self.read()

    def once(self, call: Callable[[], object], group: dist.ProcessGroup) -> float:
        """One call after a first one to warm up, of the slower rank."""
        call()
        begin = self.now()
        call()
        return typical([self.now() - begin], [0], group)

    def repeated(self, call: Callable[[], object], once_s: float, budget_s: float, group: dist.ProcessGroup) -> float:
        """Seconds of a call, from as many readings as the budget allows; ranks agreed that one takes ``once_s``."""
        readings = min(MOST_CALLS, max(LEAST_CALLS, int(budget_s / (once_s * self.calls_at_a_time))))
        seconds, preempted = [], []
        for _ in range(readings):
            before, begin = preemptions(), self.now()
            for _ in range(self.calls_at_a_time):
                call()
            seconds.append((self.now() - begin) / self.calls_at_a_time)
            preempted.append(preemptions() - before)
        return typical(seconds, preempted, group)


def preemptions() -> int:
    """How often the system took the processor from this process while it could have gone on."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def typical(seconds: Sequence[float], preempted: Sequence[int], group: dist.ProcessGroup | None = None) -> float:
    """Of readings that all ranks of a group took together (module docstring); agreed over gloo."""
    slower, disturbed = torch.tensor([seconds, preempted], dtype=torch.float64)
    dist.all_reduce(slower, dist.ReduceOp.MAX, group=group)
    dist.all_reduce(disturbed, group=group)
    kept = sorted(slower[disturbed == 0].tolist()) or [float(slower.min())]
    return float(kept[(len(kept) - 1) // 4])


def group_sizes(ranks: int) -> list[int]:
    """Powers of two, and all ranks."""
    return sorted({2**n for n in range(1, ranks.bit_length()) if 2**n <= ranks} | {ranks})


def measure_on_rank(uses_cuda: bool) -> RankMeasurements:
    """Measure, on every rank of the default (gloo) group together; every rank gets the same.

    Args:
        uses_cuda: Measure NCCL and this rank's GPU (already the current device), else gloo and the CPU.
    """
    if uses_cuda:
        clock = computing = Clock(torch.device("cuda", torch.cuda.current_device()), 10)
    else:
        clock = Clock(torch.device("cpu"), 1)
        computing = Clock(torch.device("cpu"), 1, time.process_time)
    world = dist.group.WORLD
    assert world is not None
    ranks = dist.get_world_size()
    groups = {size: list(range(size)) for size in group_sizes(ranks)}
    talking = {size: dist.new_group(members, backend="nccl") if uses_cuda else dist.new_group(members)
               for size, members in groups.items()}  # fmt: skip
    agreeing = {size: dist.new_group(members) for size, members in groups.items()}
    _say(f"measuring {dist.get_backend(talking[ranks])} on {ranks} ranks, under two minutes")
    collectives: dict[CollectiveKind, dict[int, list[Row]]] = {kind: {} for kind in COLLECTIVE_KINDS}
    budget_s = COLLECTIVES_S / len(COLLECTIVE_KINDS) / len(groups)
    for size in groups:
        for kind in COLLECTIVE_KINDS:
            _say(f"  {kind}, {size} ranks")
            if dist.get_rank() < size:
                collectives[kind][size] = _curve(kind, size, talking[size], agreeing[size], clock, budget_s)
            dist.barrier()  # who is not in a group waits for it
    _say("  matmuls, memory, launches")
    matmuls = _matmuls(computing, world)
    streams = _streams(computing, world)
    launch_s, eager_dispatch_s = _launch(computing, world)
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
    """Times of one kind by size, up to where one call takes the share of several."""
    sizes = [SMALLEST_BYTES << n for n in range((LARGEST_BYTES // SMALLEST_BYTES).bit_length())]
    share_s = budget_s / len(sizes) / ROUNDS
    best: dict[int, float] = {}
    for _ in range(ROUNDS):
        for nbytes in sizes:
            call, whole = _call(kind, nbytes, size, talking.group_name, clock.device)
            once_s = clock.once(call, agreeing)
            seconds = clock.repeated(call, once_s, share_s, agreeing)
            best[whole] = min(seconds, best.get(whole, seconds))
            if seconds > 2 * share_s and len(best) >= 4:
                sizes = [n for n in sizes if n <= nbytes]
                break
    return sorted(best.items())


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


def _matmuls(clock: Clock, group: dist.ProcessGroup) -> dict[str, list[MatmulRow]]:
    """Rates of ``F.linear`` by dtype and shape; shapes that take too long on this device are left out."""
    rows: dict[str, list[MatmulRow]] = {}
    share_s = MATMULS_S / len(DTYPES) / len(MATMUL_ROWS) / len(MATMUL_WIDTHS)
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


def _launch(clock: Clock, group: dist.ProcessGroup) -> tuple[float, float | None]:
    """Median seconds of operators on four elements: on the device, and (where that is another) on the host."""
    x, weight = torch.ones(4, device=clock.device), torch.ones(4, 4, device=clock.device)
    calls: list[Callable[[], object]] = [
        lambda: x + x,
        lambda: F.linear(x, weight),
        lambda: F.silu(x),
        lambda: x.transpose(0, -1).contiguous(),
        lambda: torch.softmax(x, -1),
    ]

    def many(call: Callable[[], object]) -> Callable[[], None]:
        def hundred() -> None:
            for _ in range(100):
                call()

        return hundred

    def of_one(hundred: Callable[[], None]) -> float:
        return clock.repeated(hundred, 1e-3, 0.05, group) / 100

    eager_s = median(of_one(many(call)) for call in calls)
    if clock.device.type != "cuda":
        return eager_s, None
    replays = []
    for call in calls:
        many(call)()  # what is made on first use cannot be captured
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            many(call)()
        replays.append(of_one(graph.replay))
    return median(replays), eager_s


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
