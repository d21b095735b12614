"""What is summed in place, and what a backward returns, is read by nobody else: in the graph, and in numbers."""

import pytest
import torch
from torch import nn
from torch.fx import Graph, GraphModule

from tedcompile import graphs, watch
from tedcompile.layouts import aten
from tedcompile.mesh import MeshShape
from tedcompile.ops import ops
from tedcompile.passes import lower, own_memory, reduce_gradients
from tests import joint

c10d = torch.ops._c10d_functional


def graph_of(build):
    """A backward of x (4, 4) and a tangent (), after the pass."""
    graph = Graph()
    x, tangent = graph.placeholder("x"), graph.placeholder("tangents_1")
    x.meta["val"], tangent.meta["val"] = torch.empty(4, 4, device="meta"), torch.empty((), device="meta")
    graph.output(tuple(build(lambda target, *args: graphs.call(graph, target, args, x), x, tangent)))
    gm = GraphModule(nn.Module(), graph)
    own_memory.run(gm)
    gm.graph.lint()
    return gm


def owned(build):
    return [n.meta["own"] for n in graph_of(build).graph.nodes if n.target is ops.all_reduce.default]


def test_sums_of_what_nobody_else_reads():
    assert owned(lambda add, x, _: [add(ops.all_reduce.default, add(aten.mm.default, x, x), "data")]) == [True]
    assert owned(lambda add, x, _: [add(ops.all_reduce.default, x, "data")]) == [False]
    assert owned(lambda add, x, _: [add(ops.all_reduce.default, add(aten.t.default, x), "data")]) == [False]


def test_sums_of_what_others_read():
    def twice(add, x, _):
        y = add(aten.mm.default, x, x)
        return [add(ops.all_reduce.default, y, "data") for _ in range(2)]

    def returned(add, x, _):
        y = add(aten.mm.default, x, x)
        return [add(ops.all_reduce.default, y, "data"), y]

    assert owned(twice) == [False, False] and owned(returned) == [False]


def test_what_is_returned():
    def build(add, x, tangent):
        y, z = add(aten.mm.default, x, x), add(aten.neg.default, x)
        bucket = add(aten.cat.default, [x, x])
        parts = [add(aten.slice.Tensor, bucket, 0, i, i + 4) for i in (0, 4)]
        return [y, y, add(aten.t.default, y), x, add(aten.expand.default, tangent, [4, 4]), z, *parts, parts[0]]

    results = graph_of(build).graph.output_node().args[0]
    copied = [n.target is aten.clone.default for n in results]
    assert copied == [False, True, True, True, True, False, False, False, True]


class Block(nn.Module):
    """`a` and `b` have equal gradients, which are one node once equal nodes are merged."""

    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.a, self.b, self.d = nn.Linear(width, width), nn.Linear(width, width, bias=False), nn.Linear(width, width)

    def forward(self, x):
        h = self.norm(x)
        return torch.relu(self.d(torch.nn.functional.gelu(self.a(h) + self.b(h)))) + x


class Alike(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.layers = nn.ModuleList(Block(width) for _ in range(4))
        self.c = nn.Parameter(torch.zeros(()))  # its gradient is the loss's

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x.pow(2).mean() + self.c


@pytest.mark.parametrize("off", [[], ["cut_layers"]], ids=["layers", "whole"])
def test_the_same_gradients_in_place(off, monkeypatch):
    """Two ranks with one batch have its gradients, unless a sum writes over what another one reads."""
    monkeypatch.setattr(reduce_gradients, "BUCKET", 256)
    original, kinds = lower.run, []
    doubled = {
        c10d.all_reduce_.default: lambda x, *_: x.mul_(2),  # both have the same
        c10d.all_reduce.default: lambda x, *_: x * 2,
        c10d.wait_tensor.default: lambda x: x,
    }

    def run(gm, names, in_place=False):
        original(gm, {"data": "data"}, in_place=True)
        for node in gm.graph.nodes:
            kinds.append(node.target)
            node.target = doubled.get(node.target, node.target)
        gm.recompile()

    monkeypatch.setattr(lower, "run", run)
    monkeypatch.setattr(watch, "watched", lambda run, *_: run)
    torch.manual_seed(0)
    model, x = Alike(), torch.randn(3, 8)
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    step, inputs = joint.build(model, dict(x=x), MeshShape(dp=2), off=off)
    for _ in range(2):  # the second is added to the first
        model(x).backward()
        step(*inputs)[0].backward()
    learned = [t for t in inputs if t.requires_grad]
    for p in model.parameters():
        (mine,) = [t for t in learned if t.shape == p.shape and t.equal(p)]
        torch.testing.assert_close(mine.grad, p.grad)
    assert len(learned) == len(list(model.parameters()))
    assert {c10d.all_reduce_.default, c10d.all_reduce.default} <= set(kinds)
