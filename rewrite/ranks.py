"""Runs a function on N ranks: threads of this process ("simulated"), or processes that talk gloo.

Every failure of a rank ends the run: the parent raises ``RankError`` with the rank's own message and exit code, and
waits for nobody.
"""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any, Literal

import torch.distributed as dist
from torch._C._distributed_c10d import Store

from colrow.cost_models.errors import RankError, UsageError

from .groups import TpGroup
from .processes import Failure, described, exit_code_of, rank_error, run_processes

Backend = Literal["simulated", "gloo"]
STRAGGLING_S = 45.0  # once a rank is through, the others are at most a few collectives behind it
_one_simulation = threading.Lock()  # the threaded process group keeps its rendezvous in class attributes


def run_ranks(
    fn: Callable[..., Any],
    size: int,
    backend: Backend = "simulated",
    args: Sequence[Any] = (),
    timeout_s: float = 600.0,
) -> list[Any]:
    """Call ``fn(*args)`` once per rank inside an initialised default process group.

    Simulated ranks share the process: random state is shared, so seed and build models before, and copy them per
    rank. Gloo ranks are forked where that is safe (no CUDA context, no other thread), else spawned; then ``fn``,
    ``args`` and results must pickle.

    Args:
        fn: What every rank runs; it finds its rank with ``torch.distributed.get_rank()``.
        size: Number of ranks.
        backend: "simulated" (threads) or "gloo" (processes).
        args: Arguments, the same for every rank.
        timeout_s: Longest run, in seconds.

    Returns:
        The results by rank.

    Raises:
        RankError: A rank raised, exited or died, or the run took longer than ``timeout_s``.
        UsageError: ``size`` is not positive, or a process group exists already (simulated ranks replace it).
    """
    if size < 1:
        raise UsageError("ranks", "a group needs at least one rank", got=size, need="1 or more")
    if backend == "gloo":
        return run_processes(fn, size, args, timeout_s)
    return _run_threads(fn, size, args, timeout_s)


def _run_threads(fn: Callable[..., Any], size: int, args: Sequence[Any], timeout_s: float) -> list[Any]:
    if dist.is_initialized():
        raise UsageError(
            "ranks", "simulated ranks cannot start inside a process group", remedy="Use gloo ranks, or destroy it."
        )
    results: list[Any] = [None] * size
    failures: list[tuple[int, BaseException]] = []
    ended = threading.Semaphore(0)

    with _one_simulation, _threaded_groups() as (store, wake):

        def run(rank: int) -> None:
            try:
                dist.init_process_group(backend="threaded", rank=rank, world_size=size, store=store)
                results[rank] = fn(*args)
            except BaseException as error:  # SystemExit too: a rank that exits has failed
                failures.append((rank, error))
                wake(error)
            finally:
                ended.release()

        threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(size)]
        for thread in threads:
            thread.start()
        late = _late(threads, ended, timeout_s)
        if late:
            wake(TimeoutError())
            for thread in threads:
                thread.join(5)
    if failures:
        rank, error = failures[0]
        trace = "".join(traceback.format_exception(error))
        raise rank_error(Failure(0.0, rank, described(error), exit_code_of(error) or 1, trace)) from error
    if late:
        raise RankError(
            f"rank {late[0]}",
            "did not end",
            got=f"ranks {late} still running",
            remedy="Do all ranks make the same collectives?",
        )
    return results


@contextmanager
def _threaded_groups() -> Iterator[tuple[Store, Callable[[BaseException], None]]]:
    """Process groups of threads while the body runs: their store, and what ends the waiting of all ranks in a
    collective."""
    from torch._C._distributed_c10d import HashStore, _set_thread_isolation_mode  # type: ignore[attr-defined]

    threaded: Any = import_module("torch.testing._internal.distributed.multi_threaded_pg")  # private, hence late
    hooks = sys.excepthook, threading.excepthook  # init_process_group puts its own around sys.excepthook, every time
    _set_thread_isolation_mode(True)
    threaded._install_threaded_pg()
    try:
        yield HashStore(), threaded.ProcessLocalGroup.exception_handle
    finally:
        threaded.ProcessLocalGroup.reset()
        threaded._uninstall_threaded_pg()
        _set_thread_isolation_mode(False)
        sys.excepthook, threading.excepthook = hooks


def _late(threads: list[threading.Thread], ended: threading.Semaphore, timeout_s: float) -> list[int]:
    """Waits for all ranks; those that still run after ``timeout_s``, or well after the first one ended."""
    deadline = time.monotonic() + timeout_s
    for _ in threads:
        if not ended.acquire(timeout=max(0.0, deadline - time.monotonic())):
            break
        deadline = min(deadline, time.monotonic() + STRAGGLING_S)
    return [rank for rank, thread in enumerate(threads) if thread.is_alive() and not _joined(thread)]


def _joined(thread: threading.Thread) -> bool:
    thread.join(1)
    return not thread.is_alive()


def agree(store: Store, digest: str, group: TpGroup, timeout_s: float = 30.0) -> None:
    """Check through the store, before any collective, that all ranks of ``group`` start the same thing.

    Args:
        store: The store the ranks met at.
        digest: What must be equal: the plan's digest.
        group: The group; its size must be equal too.
        timeout_s: How long to wait for the others.

    Raises:
        RankError: On every rank: some digest or size differs, or a rank did not come.
    """
    turn = store.add(f"colrow/agree/{group.name}/{group.rank}", 1)  # a process may agree several times
    key = f"colrow/agree/{group.name}/{turn}"
    mine = f"{group.size} {digest}"
    store.set(f"{key}/{group.rank}", mine)
    others = [rank for rank in range(group.size) if rank != group.rank]
    missing = others
    deadline = time.monotonic() + timeout_s
    while missing and time.monotonic() < deadline:
        missing = [rank for rank in missing if not store.check([f"{key}/{rank}"])]
        if missing:
            time.sleep(0.01)
    said = {rank: store.get(f"{key}/{rank}").decode() for rank in others if rank not in missing}
    different = {rank: text for rank, text in said.items() if text != mine}
    if different:
        rank, text = next(iter(different.items()))
        size, _, theirs = text.partition(" ")
        raise RankError(
            f"rank {group.rank}",
            f"rank {rank} starts something else",
            got=f"{size} ranks and digest {theirs[:12]} there, {group.size} and {digest[:12]} here",
            need="the same group size and plan on every rank",
            remedy="Load one plan file on all ranks.",
        )
    if missing:
        raise RankError(
            f"rank {group.rank}",
            f"ranks {missing} of {group.size} did not come within {timeout_s:g} s",
            remedy="Start as many ranks as the plan was made for, or plan for the group's size.",
        )
