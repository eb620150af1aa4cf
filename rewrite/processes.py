"""N gloo ranks as processes of this machine, watched so that one failure ends all of them."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore

from colrow.cost_models.errors import ColrowError, RankError, UsageError

GRACE_S = 1.0  # a first failure breaks the connections of the others; their reports arrive within this


@dataclass(frozen=True)
class Failure:
    """How a rank ended: ``at`` is monotonic seconds, the same clock in all processes of a machine."""

    at: float
    rank: int
    message: str
    exit_code: int
    trace: str = ""


def exit_code_of(error: BaseException) -> int:
    """The exit code a failing rank stands for: ``SystemExit`` and colrow's errors have their own, else 3."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    return error.exit_code if isinstance(error, ColrowError) else 3


def described(error: BaseException) -> str:
    """What the rank said: colrow's own errors as they are, others with their type."""
    return str(error) if isinstance(error, ColrowError) else f"{type(error).__name__}: {error}"


def rank_error(failure: Failure) -> RankError:
    """The parent's error for a rank's failure, with its message, ``exit_code`` and (as a note) traceback."""
    error = RankError(f"rank {failure.rank}", failure.message.rstrip("."))
    error.exit_code = failure.exit_code
    if failure.trace:
        error.add_note(f"On rank {failure.rank}:\n{failure.trace}")
    return error


def can_fork() -> bool:
    """Forking is safe: no CUDA context and no other Python thread whose locks a child would inherit.

    The monitor thread that a progress bar leaves behind (transformers shows them) sleeps, and does not count.
    """
    awake = [thread for thread in threading.enumerate() if type(thread).__module__ != "tqdm._monitor"]
    has_cuda: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return sys.platform == "linux" and not has_cuda and len(awake) == 1


def run_processes(fn: Callable[..., Any], size: int, args: Sequence[Any], timeout_s: float) -> list[Any]:
    """Call ``fn(*args)`` in ``size`` processes inside a gloo group; the results by rank (see ``ranks.run_ranks``).

    Raises:
        RankError: A rank raised, exited, was killed or outlived ``timeout_s``.
        UsageError: Forking is not safe here and ``fn`` or ``args`` cannot be pickled.
    """
    method = "fork" if can_fork() else "spawn"
    if method == "spawn":
        try:
            pickle.dumps((fn, args))
        except Exception as error:
            raise UsageError(
                "ranks",
                f"the function or its arguments cannot be sent to spawned processes: {error}",
                remedy="Use a function of a module, or start before CUDA and threads so that ranks can be forked.",
            ) from error
    context = multiprocessing.get_context(method)
    with tempfile.TemporaryDirectory(prefix="colrow-ranks-") as folder:
        readers: list[Connection] = []
        processes: list[Any] = []
        try:
            for rank in range(size):
                reader, writer = context.Pipe(duplex=False)
                process = context.Process(  # type: ignore[attr-defined]
                    target=_child,
                    args=(fn, tuple(args), rank, size, str(Path(folder) / "store"), writer, timeout_s),
                    daemon=True,
                )
                process.start()
                writer.close()  # so that the reader sees the end when the child dies
                readers.append(reader)
                processes.append(process)
            return _collect(readers, processes, timeout_s)
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
            for process in processes:
                process.join()
            for reader in readers:
                reader.close()


def _collect(readers: list[Connection], processes: list[Any], timeout_s: float) -> list[Any]:
    """Wait for every rank's result; the earliest failure wins, a rank that died silently before one that reported."""
    results: dict[int, Any] = {}
    failures: list[Failure] = []
    pending = dict(enumerate(readers))
    deadline = time.monotonic() + timeout_s
    while pending:
        ready = wait(list(pending.values()), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for rank in [rank for rank, reader in pending.items() if reader in ready]:
            try:
                result = pickle.loads(pending.pop(rank).recv_bytes())
            except EOFError:
                processes[rank].join(GRACE_S)
                result = _died(rank, processes[rank].exitcode)
            if isinstance(result, Failure):
                failures.append(result)
                deadline = min(deadline, time.monotonic() + GRACE_S)
            else:
                (results[rank],) = result
    if failures:
        raise rank_error(min(failures, key=lambda failure: failure.at))
    if pending:
        raise rank_error(Failure(0.0, min(pending), f"ranks {sorted(pending)} did not end within {timeout_s:g} s", 1))
    return [results[rank] for rank in range(len(readers))]


def _died(rank: int, code: int | None) -> Failure:
    if code is not None and code < 0:
        return Failure(0.0, rank, f"killed by {signal.Signals(-code).name}", 128 - code)
    return Failure(0.0, rank, f"exited with code {code} without a result", code or 3)


def _child(
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    rank: int,
    size: int,
    store: str,
    writer: Connection,
    timeout_s: float,
) -> None:
    """One rank: join the group, call, report, and leave without clean-up (a broken group would hang it)."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all ranks are on this machine; name look-ups can take seconds
    torch.set_num_threads(1)
    code = 0
    try:
        dist.init_process_group(
            "gloo",
            store=FileStore(store, size),
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=timeout_s),
        )
        report = pickle.dumps((fn(*args),))
        dist.barrier()  # no rank closes its connections while another still needs them
    except BaseException as error:  # SystemExit too: a rank that exits has failed
        code = exit_code_of(error) or 1
        trace = "".join(traceback.format_exception(error))
        report = pickle.dumps(Failure(time.monotonic(), rank, described(error), code, trace))
    writer.send_bytes(report)
    writer.close()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
