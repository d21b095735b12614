"""Buffers that the forward increments are summed over the data ranks; any other change is refused by name."""

import pytest
import torch
from torch import nn

from tedcompile import pipeline
from tedcompile.mesh import MeshShape
from tedcompile.ops import ops
from tests.lockstep import Ranks, distributed

N, DATA = 4, MeshShape(dp=2)


class Counts(nn.Module):
    def __init__(self, change):
        super().__init__()
        self.change = change
        self.linear = nn.Linear(3, N)
        self.register_buffer("seen", torch.arange(float(N)))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        y = self.linear(x)
        with torch.no_grad():
            self.change(self, y.detach())
        return y.sum()


def add(m, y):
    m.seen.add_(y.sum(0))


def add_assign(m, y):
    m.seen += (y > 0).sum(0)


def add_twice(m, y):
    m.seen.add_(y.sum(0))
    m.seen.add_(y.amax(0))


def two_buffers(m, y):
    m.seen.add_(y.sum(0))
    m.steps.add_((y > 0).sum())


@pytest.mark.parametrize("change", [add, add_assign, add_twice, two_buffers], ids=lambda f: f.__name__)
def test_increments_of_all_ranks_are_summed(change, monkeypatch):
    module = Counts(change)
    batches = [torch.randn(5, 3, generator=torch.Generator().manual_seed(s)) for s in range(2)]
    gm, ctx = distributed(module, dict(x=batches[0]), DATA)
    start = {n: b.clone() for n, b in module.named_buffers()}
    want = {n: b.clone() for n, b in module.named_buffers()}
    for x in batches:
        for n, b in module.named_buffers():
            b.copy_(start[n])
        module(x)
        for n, b in module.named_buffers():
            want[n] += b - start[n]
    known = dict(module.named_parameters()) | start
    outputs = Ranks(DATA, monkeypatch).run(
        gm, lambda n, r: batches[r] if n.meta["role"][0] == "input" else known[n.meta["role"][1]]
    )
    assert [b.meta["role"][1] for b in ctx.mutations]
    for values in outputs:
        for buffer, value in zip(ctx.mutations, values[-len(ctx.mutations) :]):
            torch.testing.assert_close(value, want[buffer.meta["role"][1]])


def test_increments_of_a_split_value_are_whole_before_they_are_summed(monkeypatch):
    class Wide(Counts):
        def __init__(self):
            super().__init__(add)
            self.back = nn.Linear(N, 3)

        def forward(self, x):
            y = self.linear(x).relu()
            self.seen += (y > 0).sum(0)
            self.steps.add_(1)
            return self.back(y).sum()

    mesh, module = MeshShape(dp=2, tp=2), Wide()
    batches = [torch.randn(5, 3, generator=torch.Generator().manual_seed(s)) for s in range(2)]
    gm, ctx = distributed(module, dict(x=batches[0]), mesh)
    start = {n: t.clone() for n, t in (*module.named_parameters(), *module.named_buffers())}
    module(torch.cat(batches))

    def value(n, r):
        if n.meta["role"][0] == "input":
            return batches[r // 2]
        whole, split = start[n.meta["role"][1]], n.meta.get("placements", {}).get("tp")
        return whole.chunk(2, split.dim)[r % 2].detach() if split else whole

    assert any("tp" in p for p in pipeline.placements(gm).values())
    for values in Ranks(mesh, monkeypatch).run(gm, value):
        for buffer, found in zip(ctx.mutations, values[-len(ctx.mutations) :]):
            torch.testing.assert_close(found, module.get_buffer(buffer.meta["role"][1]))


def test_nothing_to_sum_without_data_ranks():
    gm, _ = distributed(Counts(add), dict(x=torch.zeros(5, 3)), MeshShape(tp=2))
    assert not any(n.target is ops.all_reduce.default and n.args[1] == "data" for n in gm.graph.nodes)


def copy(m, y):
    m.seen.copy_(y.sum(0))


def average(m, y):
    m.seen.mul_(0.9).add_(y.sum(0))


def lerp(m, y):
    m.seen.lerp_(y.sum(0), 0.1)


def scaled_add(m, y):
    m.seen.add_(m.seen * y.sum())


def step(m, y):
    m.steps.add_(1)


def doubled(m, y):
    m.seen.add_(y.sum(0), alpha=2)


@pytest.mark.parametrize("change", [copy, average, lerp, scaled_add, doubled], ids=lambda f: f.__name__)
def test_refused_by_name(change):
    with pytest.raises(
        ValueError, match=r"changes the buffer seen by .* at .*test_sum_buffers.py:\d+ .*only additions"
    ):
        distributed(Counts(change), dict(x=torch.zeros(5, 3)), DATA)


def decay(m, y):
    m.seen.mul_(0.5)
    m.steps.add_(1)


def warm(m, y):
    m.seen.add_(y.sum(0)).add_(m.steps)
    m.steps.add_(1)


@pytest.mark.parametrize("change", [step, decay, warm], ids=lambda f: f.__name__)
def test_what_no_input_decides_happens_once_a_step(change, monkeypatch):
    module = Counts(change)
    batches = [torch.randn(5, 3, generator=torch.Generator().manual_seed(s)) for s in range(2)]
    gm, ctx = distributed(module, dict(x=batches[0]), DATA)
    known = {n: p.clone() for n, p in (*module.named_parameters(), *module.named_buffers())}
    outputs = Ranks(DATA, monkeypatch).run(
        gm, lambda n, r: batches[r] if n.meta["role"][0] == "input" else known[n.meta["role"][1]]
    )
    module(torch.cat(batches))  # one step on both batches
    for values in outputs:
        for buffer, value in zip(ctx.mutations, values[-len(ctx.mutations) :]):
            torch.testing.assert_close(value, module.get_buffer(buffer.meta["role"][1]))
