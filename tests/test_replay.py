"""Recorded graphs on the CPU: a recording that a test makes stands for CUDA's; what is replayed, and what is not."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from tedcompile import replay


class Recorded(replay.Recorded):
    """Records at the second call, without a look at the clock."""

    def _slow(self):
        return True

    def _measure(self, args):
        return self.run(args)


class Graph:
    """A compiled graph of (weight, x): a loss, two values that are kept, and the weight; counts its own runs."""

    def __init__(self):
        self.runs = 0

    def __call__(self, args):
        self.runs += 1
        weight, x = args
        args.clear()
        kept = weight * x
        return [kept.sum(), kept, x, weight]


def record(run, args):
    """As a CUDA graph: reads and writes the same memory each time."""
    results = run(list(args))

    def again():
        for mine, new in zip(results, run(list(args)), strict=True):
            mine.copy_(new)

    return results, again, 100


@pytest.fixture
def made():
    graph = Graph()
    return graph, Recorded(graph, moving={1}, visible=1, record=record), torch.full((3,), 2.0)


def check(found, weight, x):
    for got, want in zip(found, Graph()([weight, x]), strict=True):
        assert torch.equal(got, want)


def replays(recorded):
    """How often `_replay` ran, from now on."""
    calls, real = [], recorded._replay
    recorded._replay = lambda args: calls.append(1) or real(args)
    return calls


def test_replayed(made):
    _, run, weight = made
    calls = replays(run)
    losses = []
    for step in range(6):
        weight += 1  # in place, as an optimizer does
        x = torch.full((3,), float(step))
        found = run([weight, x])
        check(found, weight, x)
        losses.append((found[0], found[0].clone()))  # the user may keep them
        del found
    assert len(calls) == 5
    assert all(torch.equal(kept, then) for kept, then in losses)


def test_who_holds_a_result_keeps_it(made):
    _, run, weight = made
    calls, held = replays(run), []
    for step in range(4):
        x = torch.full((3,), float(step))
        held.append((run([weight, x]), x))
        check(*held[-1][:1], weight, x)
    assert len(calls) == 1  # what the first replay gave is held
    for found, x in held:
        check(found, weight, x)
    held.clear()
    del found
    part = run([weight, x])[1][1:].view(-1)  # also a view of a result
    assert len(calls) == 2
    run([weight, x + 1])
    assert len(calls) == 2 and torch.equal(part, (weight * x)[1:])


def test_an_argument_that_lies_elsewhere(made):
    graph, run, weight = made
    x = torch.ones(3)
    for _ in range(3):
        run([weight, x])
    calls = replays(run)
    other = torch.full((3,), 7.0)
    check(run([other, x]), other, x)
    assert not calls and run.replay
    check(run([weight, x]), weight, x)
    assert len(calls) == 1
    for _ in range(replay.MISSES + 1):
        check(run([other, x]), other, x)
    assert run.replay is None and not run.results and not run.inputs  # its memory is free again
    check(run([weight, x]), weight, x)


def test_the_oldest_recordings_make_room(monkeypatch):
    monkeypatch.setattr(replay.compat, "device_memory", lambda: 250 / replay.LARGEST)  # for two of 100 bytes
    runs = [Recorded(Graph(), moving={1}, visible=1, record=record) for _ in range(3)]
    weight, x = torch.ones(3), torch.ones(3)
    for run in runs:
        for _ in range(3):
            check(run([weight, x]), weight, x)
    assert [run.replay is None for run in runs] == [True, False, False]
    check(runs[0]([weight, x]), weight, x)
    big = Recorded(Graph(), moving={1}, visible=1, record=lambda *a: (*record(*a)[:2], 300))
    for _ in range(3):
        check(big([weight, x]), weight, x)
    assert big.replay is None


def test_a_recording_that_another_thread_uses_is_not_used(made):
    _, run, weight = made
    x = torch.ones(3)
    for _ in range(3):
        run([weight, x])
    calls = replays(run)
    with run.lock:
        check(run([weight, x]), weight, x)
    assert not calls
    check(run([weight, x]), weight, x)
    assert calls


def test_what_cannot_be_recorded_runs():
    def fails(run, args):
        raise RuntimeError("no capture here")

    run = Recorded(Graph(), moving={1}, visible=1, record=fails)
    weight, x = torch.ones(3), torch.ones(3)
    run([weight, x])
    with pytest.warns(UserWarning, match="no capture here"):
        check(run([weight, x]), weight, x)
    check(run([weight, x]), weight, x)


def test_recordable():
    aten, mode = torch.ops.aten, FakeTensorMode(shape_env=ShapeEnv())

    def graph(*values):
        made = torch.fx.Graph()
        x = made.placeholder("x")
        made.output([made.call_function(aten.relu.default, (x,)) for _ in values])
        for node, value in zip(made.find_nodes(op="call_function", target=aten.relu.default), values, strict=True):
            node.meta["val"] = value
        return torch.fx.GraphModule({}, made)

    def value(*sizes, device="cuda"):
        with mode:
            return FakeTensor(mode, torch.empty(sizes, device="meta"), torch.device(device))

    size = mode.shape_env.create_unbacked_symint()
    assert replay.recordable(graph(value(3), [value(2), None]))
    other = graph(value(3))
    other.graph.find_nodes(op="call_function", target=aten.relu.default)[0].target = torch.relu  # a user's, perhaps
    assert not replay.recordable(other)
    for one in (value(3, device="cpu"), value(size), size, [value(3), value(3, device="cpu")]):
        assert not replay.recordable(graph(value(3), one))
