"""Processes of one world on this machine: kept for many tasks, ended when one of them crashes or hangs.

A task is any picklable object with `run()`, called on every rank, and `timeout`, in seconds.

    with Pool(4) as pool:
        replies = pool.call(task)  # what run() returned, by rank, or a Failure
"""

from __future__ import annotations

import contextlib
import datetime
import faulthandler
import multiprocessing
import multiprocessing.connection
import os
import pathlib
import signal
import socket
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist

SLOW_IMPORTS = [
    "torch.distributed.tensor",
    "torch.export",
    "torch._inductor.compile_fx",
    "transformers.modeling_utils",
    "transformers.models.auto.modeling_auto",
]


class Task(Protocol):
    @property
    def timeout(self) -> float: ...

    def run(self) -> Any: ...


@dataclass(frozen=True)
class Failure:
    """A rank without a result: it "died", "raised" or "hung". `text`: how, with tracebacks; `refused`: the text of
    a ValueError or TypeError, which is for the user."""

    kind: str
    text: str
    refused: str = ""


def start_method() -> str:
    """How processes start: from a server that has imported the slow modules, seconds less for each of them."""
    if torch.cuda.is_available():
        return "spawn"
    multiprocessing.set_forkserver_preload(SLOW_IMPORTS)
    return "forkserver"


class Pool:
    """`world_size` processes: gloo, with NCCL for GPUs where each rank has one. A task that raises or hangs on any rank
    is reported with tracebacks, and the next task gets new processes."""

    GRACE = 5.0  # seconds that the other ranks get after the first one failed

    def __init__(self, world_size: int, device: str = "", timeout: float = 900.0):
        self.world_size, self.timeout = world_size, timeout  # the latter of collectives, should this process be gone
        self.on_gpus = device != "cpu" and torch.cuda.device_count() >= world_size
        self.workers: list[tuple[Any, multiprocessing.connection.Connection]] = []

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    def start(self) -> None:
        context = multiprocessing.get_context(start_method())
        self.stacks = tempfile.TemporaryDirectory()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        for rank in range(self.world_size):
            here, there = context.Pipe()
            process = context.Process(  # type: ignore[attr-defined]
                target=worker,
                args=(rank, self.world_size, port, there, self._stack(rank), self.on_gpus, self.timeout),
                daemon=True,
            )
            process.start()
            there.close()
            self.workers.append((process, here))

    def stop(self, patience: float = 5.0) -> None:
        """Workers end when their pipe does; those that cannot, hanging in a collective, are killed."""
        for _, connection in self.workers:
            connection.close()
        deadline = time.monotonic() + patience
        for process, _ in self.workers:
            process.join(max(0.0, deadline - time.monotonic()))
        for process, _ in self.workers:
            process.kill()
            process.join()
        if self.workers:
            self.stacks.cleanup()
        self.workers = []

    def call(self, task: Task) -> dict[int, Any]:
        """What `task.run()` returns, by rank in the order of arrival; a `Failure` for a rank that has nothing."""
        if not self.workers:
            self.start()
        start = time.monotonic()
        for _, connection in self.workers:
            with contextlib.suppress(OSError):  # a process that ended between two tasks is noticed below
                connection.send(task)
        replies: dict[int, Any] = {}
        deadline = start + task.timeout
        waiting: dict[Any, int] = {connection: rank for rank, (_, connection) in enumerate(self.workers)}
        while waiting and time.monotonic() < deadline:
            ready: Any
            for ready in multiprocessing.connection.wait(list(waiting), deadline - time.monotonic()):
                rank = waiting.pop(ready)
                try:
                    replies[rank] = ready.recv()
                except (EOFError, OSError):
                    replies[rank] = Failure("died", self._death(rank))
                if isinstance(replies[rank], Failure):
                    deadline = min(deadline, time.monotonic() + self.GRACE)
        for rank in waiting.values():
            replies[rank] = Failure("hung", f"no answer; it was at\n{self._where(rank)}")
        if any(isinstance(reply, Failure) for reply in replies.values()):
            self.stop(patience=0)
        return replies

    def _stack(self, rank: int) -> pathlib.Path:
        return pathlib.Path(self.stacks.name, f"{rank}.txt")

    def _where(self, rank: int) -> str:
        os.kill(self.workers[rank][0].pid, signal.SIGUSR1)
        time.sleep(0.3)
        return self._stack(rank).read_text() if self._stack(rank).exists() else ""

    def _death(self, rank: int) -> str:
        process = self.workers[rank][0]
        process.join(1.0)
        code = process.exitcode
        by = f" by signal {signal.Signals(-code).name}" if code and code < 0 else ""
        return f"the process died{by}" + (" (out of memory?)" if code == -signal.SIGKILL else "")


def worker(
    rank: int, world_size: int, port: int, connection, stack_file: pathlib.Path, on_gpus: bool, timeout: float
) -> None:
    if sys.platform == "linux":  # whatever the machine's own name resolves to
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to answer
    torch.set_num_threads(1)
    if on_gpus:
        torch.cuda.set_device(rank)
    with contextlib.suppress(EOFError), stack_file.open("w") as stacks:
        faulthandler.register(signal.SIGUSR1, file=stacks)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpus else "gloo",
            init_method=f"tcp://127.0.0.1:{port}",
            rank=rank,
            world_size=world_size,
            timeout=datetime.timedelta(seconds=timeout),
        )
        while True:
            task = connection.recv()
            try:
                connection.send(task.run())
            except Exception as error:
                refused = str(error) if isinstance(error, (ValueError, TypeError)) else ""
                connection.send(Failure("raised", traceback.format_exc(), refused))
