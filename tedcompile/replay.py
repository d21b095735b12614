"""CUDA graphs: the launches of a compiled graph recorded once and replayed as one, where launching is what takes long.

What a recorded graph gives lies in the same memory at every replay, and stays allocated. So only a graph is recorded
whose host time is most of its device time, and whose memory is little; and it is replayed only when nobody holds a
result of the last time (of two forwards before a backward, or of gradients that are being summed) and arguments lie
where they lay. Any other call runs as without recording: what is computed is always the same.
"""

from __future__ import annotations

import threading
import time
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from tedcompile import compat, graphs, kernels
from tedcompile.ops import ops

WARM, SAMPLES = 2, 3  # calls before the measured ones (kernels are loaded, memory is found), and those
ROUNDS = 3  # of samples, after which a graph that is not slow to launch is left alone
BOUND = 0.9  # part of the device's time that launching takes, from which on the device waits for the host
LARGEST = 1 / 8  # of the device's memory: what all recordings of a process may keep
MISSES = 16  # calls in a row that could not be replays, after which the memory is given back


def recordable(gm: GraphModule) -> bool:
    """Whether a graph runs on one GPU alone: no collective, no value on the host, no size that only a run knows, and
    no op whose kernel may ask for one, or that runs a user's Python."""
    for node in gm.graph.nodes:
        value = node.meta.get("val")
        for v in value if isinstance(value, (tuple, list)) else [value]:
            if isinstance(v, Tensor) and (v.device.type != "cuda" or not all(type(s) is int for s in v.shape)):
                return False
            if isinstance(v, (torch.SymInt, torch.SymFloat, torch.SymBool)):
                return False
        if node.op == "call_function" and (graphs.collective(node) or not _runs_alone(node)):
            return False
    return True


def _runs_alone(node: Node) -> bool:
    space = graphs.namespace(node)
    if space != "ted":
        return space in graphs.NAMESPACES
    dtypes = {v.dtype for a in node.all_input_nodes if isinstance(v := a.meta.get("val"), Tensor)}
    floating = {d for d in dtypes if d.is_floating_point}
    products = node.target in (ops.grouped_mm.default, ops.grouped_outer.default)
    by_kernels = kernels.installed() and floating <= set(kernels.DTYPES) and (len(floating) == 1 or not products)
    return by_kernels and node.target is not ops.segment_sum.default  # the references read sizes on the host


def record(run: Callable[[list], Any], args: list) -> tuple[Any, Callable[[], None], int]:
    """Records `run(args)` without running it: its results' memory, what computes them, and the bytes it keeps."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads may load data meanwhile
            results = run(args)
    finally:
        torch.cuda.set_stream(stream)  # a recording that fails leaves its own
    return results, graph.replay, torch.cuda.memory_reserved() - before


def recorded(compiler: Callable, moving: set[int] | None, visible: int) -> Callable:
    """A compiler of graphs, what it makes recorded where it can be; `moving` None: the gradients of the results."""

    def compile_graph(gm: GraphModule, example_inputs: list) -> Callable:
        if not recordable(gm):
            return compiler(gm, example_inputs)
        inputs = gm.graph.find_nodes(op="placeholder")
        moves = {i for i, n in enumerate(inputs) if n.name.startswith("tangents")} if moving is None else moving
        return Recorded(compiler(gm, example_inputs), moves, visible)

    return compile_graph


class Recorded:
    """A compiled graph that takes a list of tensors, replayed where that is the same and faster.

    `moving`: the arguments that lie elsewhere at every call; they are copied. The first `visible` results go to the
    user, who may keep them: they are copies.
    """

    _boxed_call = True
    _alive: weakref.WeakSet[Recorded] = weakref.WeakSet()  # those that have a recording

    def __init__(self, run: Callable[[list], Any], moving: set[int], visible: int, record: Callable = record):
        self.run, self.moving, self.visible, self.record = run, moving, visible, record
        self.calls, self.misses, self.rounds, self.off = 0, 0, 0, False
        self.samples: list[tuple[float, Any, Any]] = []
        self.addresses: list[int] = []
        self.replay: Callable[[], None] | None = None
        self.bytes, self.used = 0, 0.0
        self.lock = threading.Lock()

    def __call__(self, args: list) -> Any:
        if self.off or compat.capturing() or not all(isinstance(a, Tensor) for a in args):
            return self.run(args)
        if not self.lock.acquire(blocking=False):  # another thread is at it
            return self.run(args)
        try:
            if self._fits(args):
                return self._replay(args)
            measure = self.replay is None
        finally:
            self.lock.release()
        return self._measure(args) if measure else self.run(args)

    def _fits(self, args: list) -> bool:
        """Whether a replay is what this call is; records where it is time to."""
        addresses = [a.data_ptr() for i, a in enumerate(args) if i not in self.moving]
        addresses.append(compat.stream())  # another one would not wait for this one
        same, self.addresses = addresses == self.addresses, addresses
        if self.replay is None and same and self._slow():
            self._record(args)
        if self.replay is None:
            return False
        if addresses == self.at and all(compat.storage_uses(s) == n for s, n in self.held.items()):
            self.misses = 0
            return True
        self.misses += 1
        if self.misses > MISSES:
            self._forget()
        return False

    # ---- deciding

    def _measure(self, args: list) -> Any:
        self.calls += 1
        if self.calls <= WARM or self.off or len(self.samples) == SAMPLES:
            return self.run(args)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        begin = time.perf_counter()
        results = self.run(args)
        host = time.perf_counter() - begin
        end.record()
        self.samples.append((host, start, end))
        return results

    def _slow(self) -> bool:
        """Whether the device waited for the host in most of the measured calls; waits for neither."""
        if len(self.samples) < SAMPLES or not self.samples[-1][2].query():
            return False
        bound = [host * 1e3 > BOUND * start.elapsed_time(end) for host, start, end in self.samples]
        self.samples = []
        self.rounds += 1
        slow = sum(bound) > SAMPLES / 2
        self.off = not slow and self.rounds == ROUNDS
        return slow

    # ---- recording

    @torch.inference_mode(False)
    @torch.no_grad()
    def _record(self, args: list) -> None:
        self.inputs = {i: args[i].detach().clone() for i in self.moving}
        given = [self.inputs.get(i, a) for i, a in enumerate(args)]
        fixed = {id(a): i for i, a in enumerate(args) if i not in self.moving}
        try:
            results, self.replay, self.bytes = self.record(self.run, given)
        except RuntimeError as error:
            self._forget()
            warnings.warn(f"a graph could not be recorded as a CUDA graph and runs without: {error}", stacklevel=2)
            return
        self.at = self.addresses
        # what a result is: an argument's number, or memory of the recording
        self.results = [fixed.get(id(r), r) for r in results]
        theirs = {compat.storage(a) for i, a in enumerate(args) if i not in self.moving}
        kept = [r for r in self.results[self.visible :] if isinstance(r, Tensor)]
        storages = {compat.storage(t) for t in (*kept, *self.inputs.values())}
        del results, given, kept
        self.held = {s: compat.storage_uses(s) for s in storages - theirs}
        self._make_room(LARGEST * compat.device_memory())

    def _make_room(self, limit: float) -> None:
        """The recordings that have not been replayed for longest give their memory back."""
        Recorded._alive.add(self)
        self.used = time.monotonic()
        for oldest in sorted(Recorded._alive, key=lambda r: r.used):
            if sum(r.bytes for r in Recorded._alive) <= limit:
                break
            if oldest is self:  # whose lock is held
                self._forget()
            elif oldest.lock.acquire(blocking=False):
                oldest._forget()
                oldest.lock.release()

    def _replay(self, args: list) -> list:
        assert self.replay is not None
        self.used = time.monotonic()
        for i, mine in self.inputs.items():
            mine.copy_(args[i])
        self.replay()
        found = []
        for i, r in enumerate(self.results):
            if isinstance(r, Tensor):
                r = r.clone() if i < self.visible else r.detach()
            elif isinstance(r, int):
                r = args[r]
            found.append(r)
        args.clear()
        return found

    def _forget(self) -> None:
        self.off, self.replay, self.bytes = True, None, 0
        self.inputs, self.results, self.held = {}, [], {}
        Recorded._alive.discard(self)
