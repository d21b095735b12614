"""The checker: correct graphs pass, and every way of breaking one raises."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Graph, GraphModule

from tedcompile import graphs
from tedcompile.layouts import S, aten
from tedcompile.mesh import MeshShape
from tedcompile.ops import ops
from tedcompile.passes import check
from tedcompile.passes.check import LayoutError
from tests.lockstep import distributed, parity

MOVES = {ops.enter.default, ops.share.default, ops.all_reduce.default, ops.all_max.default, ops.slice.default,
         ops.gather.default, ops.gather_enter.default, ops.reduce_scatter.default}  # fmt: skip


class Block(nn.Module):
    """Attention with an odd norm over split features, a gated MLP with biases, a small MoE and a vocabulary loss."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(12, 8)
        self.norm = nn.RMSNorm(8)
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8, bias=bias) for bias in (True, False, False, True))
        self.q_norm = nn.Parameter(torch.rand(8))
        self.gate_up, self.down = nn.Linear(8, 24), nn.Linear(12, 8)
        self.router = nn.Linear(8, 4, bias=False)
        self.experts_up, self.experts_down = nn.Parameter(torch.randn(4, 8, 6)), nn.Parameter(torch.randn(4, 6, 8))
        self.experts_bias = nn.Parameter(torch.randn(4, 8))
        self.head = nn.Linear(8, 12, bias=False)

    def forward(self, ids, labels):
        x = self.table(ids)
        h = self.norm(x)
        q = self.q(h)
        q = q * torch.rsqrt(q.square().mean(-1, keepdim=True) + 1e-6) * self.q_norm
        q, k, v = (t.view(2, 5, 4, 2).transpose(1, 2) for t in (q, self.k(h), self.v(h)))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 5, 8))
        gate, up = self.gate_up(self.norm(x)).chunk(2, -1)
        x = (x + self.down(F.silu(gate) * up)).view(10, 8)
        weights, index = self.router(x).softmax(-1).topk(2)
        rows, counts, perm, order = ops.permute(x, index, 4)
        y = ops.grouped_mm(F.gelu(ops.grouped_mm(rows, self.experts_up, counts)), self.experts_down, counts)
        x = x + ops.unpermute(y + ops.per_expert(self.experts_bias, counts, rows), perm, order, weights)
        return F.cross_entropy(self.head(x), labels.flatten())


@pytest.fixture(scope="module")
def block():
    batch = dict(ids=torch.arange(10).view(2, 5), labels=torch.arange(10).view(2, 5))
    module = Block().double()
    return module, batch, distributed(module, batch, MeshShape(tp=2))


def test_correct_graph_passes_and_is_correct(block, monkeypatch):
    module, batch, made = block
    parity(module, [batch], MeshShape(tp=2), monkeypatch, graph=made)
    known = check.check(made[0], 2)
    assert all(n.meta.get("layout", layout) == layout for n, layout in known.items())


def test_every_move_is_needed(block):
    """Each inserted move is deleted in turn; not one of the graphs that are left passes."""
    gm, _ = block[2]
    moves = [n.name for n in gm.graph.nodes if n.target in MOVES]
    kinds = {n.target for n in gm.graph.nodes if n.target in MOVES}
    assert len(moves) > 15 and kinds >= {
        ops.enter.default,
        ops.share.default,
        ops.all_reduce.default,
        ops.all_max.default,
    }
    for name in moves:
        broken = copy.deepcopy(gm)
        node = next(n for n in broken.graph.nodes if n.name == name)
        node.replace_all_uses_with(node.args[0])
        broken.graph.erase_node(node)
        with pytest.raises(LayoutError):
            check.check(broken, 2)
            pytest.fail(f"nothing noticed that {name} is missing")


def test_every_placement_is_needed(block):
    gm, _ = block[2]
    split = [n.name for n in gm.graph.nodes if "tp" in n.meta.get("placements", {})]
    assert len(split) >= 12
    for name in split:
        broken = copy.deepcopy(gm)
        node = next(n for n in broken.graph.nodes if n.name == name)
        node.meta["placements"] = {}
        with pytest.raises(LayoutError):
            check.check(broken, 2)
            pytest.fail(f"nothing noticed that {name} is whole")


class Hand:
    """A graph built by hand, over fake cpu values."""

    def __init__(self):
        self.graph = Graph()

    def input(self, *shape, layout=None, role="parameter"):
        node = self.graph.placeholder(f"p{len(self.graph.nodes)}")
        node.meta.update(val=torch.empty(shape, device="meta"), role=(role, node.name))
        if layout:
            node.meta["placements"] = {"tp": layout}
        graphs.set_facts(node)
        return node

    def __call__(self, target, *args, **kwargs):
        node = self.graph.call_function(target, args, kwargs)
        node.meta["val"] = graphs.value_of(node)
        graphs.set_facts(node)
        return node

    def check(self, *outputs):
        self.graph.output(outputs)
        gm = GraphModule(nn.Module(), self.graph)
        gm.graph.lint()
        return check.check(gm, 2)


def enter(g, x):
    return g(ops.enter.default, x, "tp")


def replicated_reads_entered(g):
    x = enter(g, g.input(4, 6))
    return g(aten.softmax.int, g(aten.add.Tensor, x, g.input(4, 6)), -1)


def entered_leaves(g):
    return g(aten.relu.default, enter(g, g.input(4, 6)))


def gather_not_entered(g):
    """A gathered value whose reader is rank-dependent: its gradient would be this rank's part only."""
    whole = g(ops.gather.default, g.input(4, 6, layout=S(0)), 0, 2, [], "tp")
    up = g(aten.linear.default, whole, g.input(8, 6, layout=S(0)))
    return g(ops.all_reduce.default, g(aten.linear.default, up, g.input(6, 8, layout=S(1))), "tp")


def partial_leaves(g):
    return g(aten.linear.default, g.input(4, 6, layout=S(1)), g.input(3, 6, layout=S(1)))


def split_leaves(g):
    return g(aten.relu.default, g.input(4, 6, layout=S(0)))


def partial_into_nonlinear(g):
    return g(ops.all_reduce.default, g(aten.gelu.default, partial_leaves(g)), "tp")


def partial_plus_replicated(g):
    return g(ops.all_reduce.default, g(aten.add.Tensor, partial_leaves(g), g.input(3)), "tp")


def parameter_meets_split(g):
    h = g(aten.mul.Tensor, g.input(4, 6, layout=S(0)), g.input(6))
    return g(ops.gather.default, h, 0, 2, [], "tp")


def norm_weight_meets_split(g):
    h = g(aten.rms_norm.default, g.input(4, 6, layout=S(0)), [6], g.input(6))
    return g(ops.gather.default, h, 0, 2, [], "tp")


def norm_over_split(g):
    h = g(aten.rms_norm.default, g.input(4, 6, layout=S(1)), [6])
    return g(ops.gather.default, h, 1, 2, [], "tp")


def gathered_on_another_dim(g):
    return g(ops.gather.default, g.input(4, 6, layout=S(0)), 1, 2, [], "tp")


def gathered_in_other_sections(g):
    return g(ops.gather.default, g.input(4, 8, layout=S(1, (4, 4))), 1, 2, [], "tp")


def reduced_twice(g):
    return g(ops.all_reduce.default, g(ops.all_reduce.default, partial_leaves(g), "tp"), "tp")


def entered_twice(g):
    h = g(aten.linear.default, enter(g, enter(g, g.input(4, 6))), g.input(8, 6, layout=S(0)))
    return g(ops.gather.default, h, 1, 2, [], "tp")


def row_bias_not_shared(g):
    h = g(aten.linear.default, g.input(4, 6, layout=S(1)), g.input(3, 6, layout=S(1)), g.input(3))
    return g(ops.all_reduce.default, h, "tp")


def column_input_not_entered(g):
    h = g(aten.linear.default, g.input(4, 6), g.input(8, 6, layout=S(0)))
    return g(ops.gather.default, h, 1, 2, [], "tp")


def different_dims_meet(g):
    h = g(aten.mul.Tensor, g.input(4, 6, layout=S(0)), g.input(4, 6, layout=S(1)))
    return g(ops.gather.default, h, 0, 2, [], "tp")


def unknown_op_of_split(g):
    return g(aten.cumprod.default, g.input(4, 6, layout=S(0)), 0)


def router_weights_not_entered(g):
    """Scores that multiply partial rows: each rank's gradient of them is a part."""
    perm, order = g.input(4, 2, role="input"), g.input(8, role="input")
    rows = g(aten.linear.default, g.input(8, 6, layout=S(1)), g.input(3, 6, layout=S(1)))
    return g(ops.all_reduce.default, g(ops.unpermute.default, rows, perm, order, g.input(4, 2)), "tp")


@pytest.mark.parametrize(
    "build, message",
    [
        (replicated_reads_entered, "needs p.* as E, and it is R"),
        (entered_leaves, "leaves the graph as E"),
        (gather_not_entered, "needs gather_default as E, and it is R"),
        (partial_leaves, "leaves the graph as P"),
        (split_leaves, r"leaves the graph as S\(0\)"),
        (partial_into_nonlinear, "needs linear_default as R, and it is P"),
        (partial_plus_replicated, "needs p.* as P, and it is R"),
        (parameter_meets_split, "needs p.* as E, and it is R"),
        (norm_weight_meets_split, "needs p.* as E, and it is R"),
        (norm_over_split, "rms_norm over the dim that is split"),
        (gathered_on_another_dim, r"as S\(1\), and it is S\(0\)"),
        (gathered_in_other_sections, r"as S\(1\), and it is S\(1 of 4\+4\)"),
        (reduced_twice, "as P, and it is R"),
        (entered_twice, "as R, and it is E"),
        (row_bias_not_shared, "as P, and it is R"),
        (column_input_not_entered, "as E, and it is R"),
        (different_dims_meet, "operands split on different dims"),
        (unknown_op_of_split, "cumprod.* has no rule"),
        (router_weights_not_entered, "as E, and it is R"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_caught(build, message):
    g = Hand()
    with pytest.raises(LayoutError, match=message):
        g.check(build(g))


def test_correct_by_hand():
    g = Hand()
    x = g.input(4, 6)
    h = g(aten.linear.default, enter(g, x), g.input(8, 6, layout=S(0)))
    y = g(ops.all_reduce.default, g(aten.linear.default, h, g.input(6, 8, layout=S(1))), "tp")
    known = g.check(g(aten.add.Tensor, x, y))
    assert known[h] == S(1) and known[y].kind == "R"


def test_value_without_gradient_needs_no_enter():
    g = Hand()
    x = g.input(4, 6, role="input")
    h = g(aten.linear.default, x, g.input(8, 6, layout=S(0)))
    g.check(g(ops.gather.default, h, 1, 2, [], "tp"), x)
