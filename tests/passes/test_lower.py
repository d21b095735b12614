"""Collectives become torch's own, named by process group, and are waited for as late as they can be."""

import pytest
import torch
from torch import nn
from torch.fx import Graph, GraphModule

from tedcompile import graphs
from tedcompile.layouts import S, aten
from tedcompile.ops import ops
from tedcompile.passes import lower
from tests.lockstep import shard

NAMES = {"tp": "group_tp", "ep": "group_ep"}


def graph_of(build, *shapes):
    graph = Graph()
    inputs = []
    for i, shape in enumerate(shapes):
        inputs.append(graph.placeholder(f"x{i}"))
        inputs[-1].meta["val"] = torch.empty(shape, device="meta")

    def add(target, *args):
        return graphs.call(graph, target, args, inputs[0])

    graph.output(build(add, *inputs))
    gm = GraphModule(nn.Module(), graph)
    lower.run(gm, NAMES)
    return gm


def calls(gm):
    return [(n.target._schema.name.split("::")[1], n.args) for n in gm.graph.nodes if n.op == "call_function"]


def test_all_reduce():
    gm = graph_of(lambda add, x: add(ops.all_reduce.default, x, "tp"), (4,))
    assert [(name, args[1:]) for name, args in calls(gm)] == [("all_reduce", ("sum", "group_tp")), ("wait_tensor", ())]


def test_all_max():
    gm = graph_of(lambda add, x: add(ops.all_max.default, x, "tp"), (4,))
    assert calls(gm)[0][1][1:] == ("max", "group_tp")


def test_enter_is_dropped_and_share_is_a_product():
    gm = graph_of(lambda add, x: add(ops.share.default, add(ops.enter.default, x, "tp"), 4, "tp"), (4,))
    assert [(name, args[1:]) for name, args in calls(gm)] == [("mul", (0.25,))]


def test_other_ops_keep_their_name_and_get_the_group():
    gm = graph_of(lambda add, x, s: add(ops.all_to_all_like.default, x, s, x, "ep"), (4, 2), (2, 2))
    assert calls(gm)[0][0] == "all_to_all_like" and calls(gm)[0][1][-1] == "group_ep"


def test_wait_is_late():
    def build(add, x):
        reduced = add(ops.all_reduce.default, x, "tp")
        other = add(aten.relu.default, add(aten.neg.default, x))
        return add(aten.add.Tensor, reduced, other)

    assert [name for name, _ in calls(graph_of(build, (4,)))] == ["all_reduce", "neg", "relu", "wait_tensor", "add"]


def test_products_hide_the_next_collective():
    """The weight's gradient is not needed for the other one's sum: it is computed while that travels, once."""

    def build(add, x, w, g):
        weight = add(aten.t.default, add(aten.mm.default, add(aten.t.default, g), x))
        other = add(aten.mm.default, add(aten.t.default, g), add(aten.neg.default, x))
        first = add(ops.all_reduce.default, add(aten.mm.default, g, w), "tp")
        second = add(ops.all_reduce.default, add(aten.relu.default, first), "tp")
        return second, weight, add(aten.exp.default, other)

    gm = graph_of(build, (4, 3), (5, 3), (4, 5))
    assert [name for name, _ in calls(gm)] == [
        "t", "t", "neg", "mm", "all_reduce", "mm", "t", "mm", "wait_tensor", "relu", "all_reduce", "exp", "wait_tensor",
    ]  # fmt: skip


def test_a_product_that_hides_an_all_to_all_stays_there():
    def build(add, x, w, s):
        there = add(ops.all_to_all_like.default, x, s, x, "ep")
        product = add(aten.mm.default, x, w)
        return add(ops.all_reduce.default, add(aten.relu.default, there), "tp"), product

    names = [name for name, _ in calls(graph_of(build, (4, 3), (3, 5), (2, 2)))]
    assert names == ["start_all_to_all", "mm", "arrive", "relu", "all_reduce", "wait_tensor"]


@pytest.mark.parametrize("dim, sections", [(0, []), (1, []), (0, [2, 6]), (1, [4, 2]), (1, [2, 2, 2])], ids=str)
def test_gather_puts_blocks_where_they_belong(dim, sections, monkeypatch):
    whole = torch.arange(48.0).view(8, 6)
    parts = [shard(whole, S(dim, tuple(sections)), 2, r) for r in range(2)]
    gm = graph_of(lambda add, x: add(ops.gather.default, x, dim, 2, sections, "tp"), tuple(parts[0].shape))
    for n in gm.graph.nodes:  # the collective by its definition: blocks of all ranks, on dim 0
        if n.op == "call_function" and n.target is lower.c10d.all_gather_into_tensor.default:
            n.target, n.args = lambda x: torch.cat(parts), n.args[:1]
        elif n.op == "call_function" and n.target is lower.c10d.wait_tensor.default:
            n.target = lambda x: x
    result = torch.fx.Interpreter(gm).run(parts[0])
    assert torch.equal(result, whole)
