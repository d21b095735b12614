"""Which axis each gradient is summed over, by what factor, and in which buckets."""

import operator

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
from tests.joint import parts
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
    """In the order in which gradients come to be; a bucket ends with the one that fills it; a large one is alone."""
    monkeypatch.setattr(reduce_gradients, "BUCKET", 8 * 10)
    gm = joint([(4,), (6,), (3,), (7,), (20,), (2,)])
    assert reduced(gm, MeshShape(dp=2), [DENSE] * 6) == [("data", 20), ("data", 12), ("data", 10)]
    order = {n: i for i, n in enumerate(gm.graph.nodes)}
    first = next(n for n in gm.graph.nodes if n.target is ops.all_reduce.default)
    last = next(n for n in gm.graph.nodes if n.name == "neg_default_5")  # the gradient of g0, made last
    assert order[first] < order[last]


def backward(tangents, functions, dtype=torch.float64):
    """A stand-in for a joint graph: gradients as functions of (graph, x, tangent), each of another x (3, 4)."""
    graph = Graph()
    xs = [graph.placeholder(f"x{i}") for i in range(len(functions))]
    given = [graph.placeholder(f"tangents_{i}") for i in range(tangents)]
    for node in (*xs, *given):
        node.meta["val"] = torch.empty((3, 4) if node in xs else (), device="meta", dtype=dtype)
    loss = graphs.call(graph, aten.sum.default, (xs[0],), xs[0])
    graph.output((loss, *(f(graph, x, given[i % tangents]) for i, (f, x) in enumerate(zip(functions, xs)))))
    return GraphModule(nn.Module(), graph)


def times(graph, x, tangent):
    return graphs.call(graph, aten.mul.Tensor, (x, tangent), x)


def turned(graph, x, tangent):
    return graphs.call(graph, aten.t.default, (times(graph, x, tangent),), x)


def itself(graph, x, tangent):
    return graphs.call(graph, aten.expand.default, (tangent, [3, 4]), x)


def tangent(graph, x, tangent):
    return tangent


def reduced_at(gm, mesh, others=0):
    """The graph's text, and its sums."""
    ctx = Context(mesh)
    gradients = range(1, len(gm.graph.output_node().args[0]) - others)
    ctx.outputs, ctx.gradients = 1, dict.fromkeys(gradients, DENSE)
    reduce_gradients.run(gm, ctx)
    gm.graph.lint()
    return text(gm), gm.graph.find_nodes(op="call_function", target=ops.all_reduce.default)


def test_a_large_gradient_goes_as_it_lies(monkeypatch):
    monkeypatch.setattr(reduce_gradients, "BUCKET", 8)
    lines, sums = reduced_at(backward(1, [times, turned, itself]), MeshShape(dp=2))
    assert [n.args[0].target for n in sums] == [aten.mul.Tensor, aten.mul.Tensor, aten.clone.default]
    assert lines.count("aten.t(all_reduce") == 1 and lines.count("aten.mul.Tensor(tangents_0, 0.5)") == 1
    assert "segment" not in {key for n in sums for key in n.meta}  # these stay outside of what is compiled


def looked_up(by_frequency=False, shared=False, rows=24):
    """A gradient of an embedding (rows, 4), padded at 3, that 2 x 3 tokens have looked up."""
    graph = Graph()
    g, ids = graph.placeholder("g"), graph.placeholder("ids")
    g.meta["val"] = torch.empty(2, 3, 4, device="meta", dtype=torch.float64)
    ids.meta["val"] = torch.empty(2, 3, device="meta", dtype=torch.int64)
    grad = graphs.call(graph, aten.embedding_dense_backward.default, (g, ids, rows, 3, by_frequency), g)
    results = (grad, graphs.call(graph, aten.neg.default, (grad,), grad)) if shared else (grad,)
    graph.output((graphs.call(graph, aten.sum.default, (g,), g), *results))
    return GraphModule(nn.Module(), graph)


@pytest.mark.parametrize("mesh", [MeshShape(dp=2), MeshShape(dp=2, ep=2, tp=2), MeshShape(dp=3)], ids=str)
def test_a_large_embedding_travels_as_rows(mesh, monkeypatch):
    monkeypatch.setattr(reduce_gradients, "BUCKET", 8)
    gm = looked_up()
    assert reduced(gm, mesh, [DENSE]) == []
    ranks = Ranks(mesh, monkeypatch)
    given = [{"g": torch.randn(2, 3, 4, dtype=torch.float64), "ids": torch.randint(24, (2, 3))} for _ in ranks.at]
    results = ranks.run(gm, lambda node, r: given[r][node.name])
    alone = [torch.ops.aten.embedding_dense_backward(x["g"], x["ids"], 24, 3, False) for x in given]
    for group in ranks.groups("data"):
        want = sum(alone[r] for r in group) / mesh["data"]
        for r in group:
            torch.testing.assert_close(results[r][1], want)
            assert results[r][1].equal(results[group[0]][1])


@pytest.mark.parametrize(
    "gm",
    [looked_up(rows=11), looked_up(by_frequency=True), looked_up(shared=True)],
    ids=["many", "frequency", "shared"],
)
def test_an_embedding_that_is_summed_as_it_is(gm, monkeypatch):
    """12 tokens for 11 rows; counts of tokens are of one rank; another op reads the gradient of one rank."""
    monkeypatch.setattr(reduce_gradients, "BUCKET", 8)
    assert reduced(gm, MeshShape(dp=2), [DENSE])
    assert not gm.graph.find_nodes(op="call_function", target=ops.gather.default)


@pytest.mark.parametrize("bucket", [8, 8 * 24, 1 << 20])
@pytest.mark.parametrize("mesh", [MeshShape(dp=2), MeshShape(dp=3), MeshShape(dp=2, ep=2)], ids=str)
def test_the_mean_of_a_backward(mesh, bucket, monkeypatch):
    monkeypatch.setattr(reduce_gradients, "BUCKET", bucket)
    functions = [times, turned, itself, turned, tangent]
    gm, plain = backward(2, functions), backward(2, functions)
    reduced_at(gm, mesh)
    ranks = Ranks(mesh, monkeypatch)
    given = [{n.name: torch.randn(n.meta["val"].shape, dtype=torch.float64)
              for n in gm.graph.find_nodes(op="placeholder")} for _ in ranks.at]  # fmt: skip
    results = ranks.run(gm, lambda node, r: given[r][node.name])
    alone = [plain(*(given[r][n.name] for n in plain.graph.find_nodes(op="placeholder"))) for r in range(len(given))]
    for i in range(1, len(functions) + 1):
        for r in range(len(given)):
            torch.testing.assert_close(results[r][i], sum(a[i] for a in alone) / mesh["data"])


def fp16(graph, x, tangent):
    half = graphs.call(graph, aten._to_copy.default, (x,), x, x.meta["val"].half())
    half.kwargs = {"dtype": torch.float16}
    return graphs.call(graph, aten.mul.Tensor, (half, tangent), x, half.meta["val"])


def of_nothing(graph, x, tangent):
    return graphs.call(graph, aten.neg.default, (x,), x)


def own(graph, x, tangent):
    call = graph.call_function(torch.ops.tedfn.backward.default, ("f", 0, [tangent], [x], [], []))
    call.meta["val"] = [x.meta["val"]]
    return graphs.call(graph, operator.getitem, (call, 0), x, x.meta["val"])


@pytest.mark.parametrize(
    "make, mesh, others",
    [
        (lambda: backward(1, [fp16]), MeshShape(dp=2), 0),
        (lambda: backward(1, [times], torch.bfloat16), MeshShape(dp=3), 0),  # 1/3 in bf16
        (lambda: backward(1, [times, times]), MeshShape(dp=2), 1),  # the gradient of an input
        (lambda: backward(1, [times, of_nothing]), MeshShape(dp=2), 0),
        (lambda: backward(1, [own]), MeshShape(dp=2), 0),  # a user's backward gets what autograd gives
    ],
)
def test_what_is_divided_by_itself(make, mesh, others):
    lines, sums = reduced_at(make(), mesh, others)
    assert "mul.Tensor(tangents" not in lines
    assert all(n.args[0].target is aten.mul.Tensor and n.args[0].args[1] == 1 / mesh.dp for n in sums) and sums


@torch.library.custom_op("tedcompile_tests::clipped", mutates_args=())
def clipped(x: torch.Tensor) -> torch.Tensor:
    return x.clone()


clipped.register_fake(torch.empty_like)
clipped.register_autograd(lambda ctx, g: g.clamp(-1e-3, 1e-3))


@pytest.mark.parametrize("own", [False, True], ids=["torch's ops", "an op of the user's"])
def test_an_op_of_the_users_is_given_what_autograd_gives(own):
    """Its backward is traced into torch's ops, and need not be linear: the loss is divided only where there is none."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            y = self.linear(x)
            return (torch.ops.tedcompile_tests.clipped(y) if own else y).sum()

    _, graph = parts(Model(), dict(x=torch.ones(2, 4)), MeshShape(dp=2))
    halves = [n for n in graph.graph.nodes if n.target is aten.mul.Tensor and n.args[1] == 0.5]
    assert [n.args[0].name.startswith("tangents") for n in halves] == [not own]
