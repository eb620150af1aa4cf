"""Tasks in children forked from this warmed process, each with limits of CPU time, wall time and memory.

A child that hangs, crashes or eats memory costs its own result only. Imports are made once, in the parent.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import resource
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from typing import Any

from .coverage_rows import StageResult, Status

WALL = 6.0  # wall seconds allowed per CPU second: the machine may be busy with other things
Task = Callable[[], StageResult]


@dataclass(frozen=True)
class Limits:
    """Of one child: CPU seconds, and bytes of memory it may allocate."""

    cpu_s: float
    memory_bytes: int


@dataclass
class _Child:
    index: int
    process: Any
    reader: Connection
    deadline: float


def run_limited(tasks: Sequence[Task], limits: Limits, jobs: int) -> Iterator[tuple[int, StageResult]]:
    """Run every task in a forked child, ``jobs`` at a time; yields ``(index, result)`` as they end.

    A task that fails to return is a result too: timed out, out of memory, or crashed.
    """
    context = multiprocessing.get_context("fork")
    waiting = list(enumerate(tasks))[::-1]
    running: list[_Child] = []
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                index, task = waiting.pop()
                reader, writer = context.Pipe(duplex=False)
                process = context.Process(target=_child, args=(task, writer, limits), daemon=False)
                process.start()
                writer.close()
                running.append(_Child(index, process, reader, time.monotonic() + limits.cpu_s * WALL))
            soonest = min(child.deadline for child in running)
            ready = wait([child.reader for child in running], max(0.0, soonest - time.monotonic()))
            for child in list(running):
                if child.reader in ready or time.monotonic() >= child.deadline:
                    running.remove(child)
                    yield child.index, _ended(child, child.reader in ready, limits)
    finally:
        for child in running:
            _kill(child)


def _ended(child: _Child, ready: bool, limits: Limits) -> StageResult:
    if not ready:
        _kill(child)
        return StageResult(Status.TIMED_OUT, f"no result within {limits.cpu_s * WALL:g} s of wall time")
    try:
        result: StageResult = child.reader.recv()
        child.process.join(5)
        _kill(child)  # its simulated ranks may still wait for each other
        return result
    except EOFError:
        child.process.join(5)
        code = child.process.exitcode
        _kill(child)
    if code == -signal.SIGXCPU:
        return StageResult(Status.TIMED_OUT, f"no result within {limits.cpu_s:g} CPU s", cpu_s=limits.cpu_s)
    ended = f"killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"exited with code {code}"
    return StageResult(Status.CRASHED, f"the process was {ended}" if code and code < 0 else f"the process {ended}")


def _kill(child: _Child) -> None:
    if child.process.is_alive():
        child.process.kill()
    child.process.join()
    child.reader.close()


def _child(task: Task, writer: Connection, limits: Limits) -> None:
    seconds = int(limits.cpu_s) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
    resource.setrlimit(resource.RLIMIT_DATA, (limits.memory_bytes, limits.memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    faulthandler.disable()  # a crash is a result
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)  # models print and warn as they like
    os.dup2(quiet, 2)
    start = time.process_time()
    result = replace(task(), cpu_s=round(time.process_time() - start, 2))
    writer.send(result)
    writer.close()
    os._exit(0)  # threads of failed simulated ranks are not waited for
