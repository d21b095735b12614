"""Which axis each gradient is summed over, by what factor, and in which buckets."""

import pytest
import torch
from torch import nn
from torch.fx import Graph, GraphModule

from tedcompile import graphs
from tedcompile.layouts import S, aten
from tedcompile.mesh import MeshShape
from tedcompile.ops import ops
from tedcompile.passes import reduce_gradients
from tedcompile.pipeline import Context
from tests.lockstep import Ranks, text

DENSE, EXPERT = {}, {"ep": S(0), "tp": S(2)}


def joint(shapes, dtypes=None):
    """A stand-in for a joint graph: a loss, then one gradient for each shape, made in reverse order."""
    graph = Graph()
    inputs = []
    for i, shape in enumerate(shapes):
        node = graph.placeholder(f"g{i}")
        node.meta["val"] = torch.empty(shape, device="meta", dtype=(dtypes or {}).get(i, torch.float64))
        inputs.append(node)
    made = {}
    for i in reversed(range(len(shapes))):
        made[i] = graphs.call(graph, aten.neg.default, (inputs[i],), inputs[i])
    loss = graphs.call(graph, aten.sum.default, (inputs[0],), inputs[0])
    graph.output((loss, *(made[i] for i in range(len(shapes)))))
    return GraphModule(nn.Module(), graph)


def reduced(gm, mesh, placements):
    ctx = Context(mesh)
    ctx.gradients = {i + 1: p for i, p in enumerate(placements)}
    reduce_gradients.run(gm, ctx)
    gm.graph.lint()
    return [(n.args[1], n.args[0].meta["val"].numel()) for n in gm.graph.nodes if n.target is ops.all_reduce.default]


@pytest.mark.parametrize(
    "mesh, collectives",
    [
        (MeshShape(), []),
        (MeshShape(tp=4), []),
        (MeshShape(dp=2), [("dp", 20), ("data", 5)]),
        (MeshShape(ep=2), [("data", 5)]),  # an expert is on one data rank only
        (MeshShape(dp=2, ep=2, tp=2), [("dp", 20), ("data", 5)]),
    ],
    ids=str,
)
def test_axes(mesh, collectives):
    gm = joint([(5,), (2, 10)])
    assert sorted(reduced(gm, mesh, [DENSE, EXPERT])) == sorted(collectives)


@pytest.mark.parametrize(
    "mesh", [MeshShape(dp=2), MeshShape(ep=2), MeshShape(dp=2, ep=2), MeshShape(dp=3, tp=2)], ids=str
)
def test_values(mesh, monkeypatch):
    """The mean over the data ranks for dense gradients; for experts the sum over dp, by the same factor."""
    shapes = [(5,), (2, 3, 4), (), (3, 1)]
    placements = [DENSE, EXPERT, DENSE, EXPERT]
    gm = joint(shapes)
    reduced(gm, mesh, placements)
    ranks = Ranks(mesh, monkeypatch)
    given = [[torch.randn(s, dtype=torch.float64) for s in shapes] for _ in ranks.at]
    results = ranks.run(gm, lambda node, r: given[r][int(node.name[1:])])
    for i, p in enumerate(placements):
        for group in ranks.groups("dp" if p else "data"):
            want = -sum(given[r][i] for r in group) / mesh["data"]
            for r in group:
                torch.testing.assert_close(results[r][1 + i], want)
    for r, values in enumerate(results):
        torch.testing.assert_close(values[0], given[r][0].sum())  # the loss is each rank's own


def test_buckets(monkeypatch):
    """In the order in which gradients come to be; a bucket ends with the gradient that fills it."""
    monkeypatch.setattr(reduce_gradients, "BUCKET", 8 * 10)
    gm = joint([(4,), (6,), (3,), (7,), (20,), (2,)])
    assert reduced(gm, MeshShape(dp=2), [DENSE] * 6) == [("data", 22), ("data", 10), ("data", 10)]
    order = {n: i for i, n in enumerate(gm.graph.nodes)}
    first = next(n for n in gm.graph.nodes if n.target is ops.all_reduce.default)
    last = next(n for n in gm.graph.nodes if n.name == "neg_default_5")  # the gradient of g0, made last
    assert order[first] < order[last]


def test_dtypes_do_not_share_a_bucket():
    gm = joint([(4,), (6,), (3,)], {1: torch.bfloat16})
    assert sorted(reduced(gm, MeshShape(dp=2), [DENSE] * 3)) == [("data", 6), ("data", 7)]


def test_missing_gradient_stays_none():
    gm = joint([(4,), (6,)])
    output = gm.graph.output_node()
    output.args = ((output.args[0][0], None, output.args[0][2]),)
    assert reduced(gm, MeshShape(dp=2), [DENSE, DENSE]) == [("data", 6)]
    assert output.args[0][1] is None


def test_pinned():
    gm = joint([(2,), (3, 1)])
    reduced(gm, MeshShape(ep=2), [DENSE, DENSE])
    assert text(gm).split("\n") == [
        "neg:  = aten.neg(g1)",
        "neg_default_1:  = aten.neg(g0)",
        "reshape:  = aten.reshape(neg_default, [-1])",
        "reshape_default_1:  = aten.reshape(neg_default_1, [-1])",
        "cat:  = aten.cat([reshape_default, reshape_default_1])",
        "mul_tensor:  = aten.mul.Tensor(cat_default, 0.5)",
        "all_reduce:  = ted.all_reduce(mul_tensor, data)",
        "sum:  = aten.sum(g0)",
        "slice_tensor:  = aten.slice.Tensor(all_reduce_default, 0, 0, 3)",
        "reshape_default_2:  = aten.reshape(slice_tensor, [3, 1])",
        "slice_tensor_1:  = aten.slice.Tensor(all_reduce_default, 0, 3, 5)",
        "reshape_default_3:  = aten.reshape(slice_tensor_1, [2])",
    ]
