"""Collectives move past what works token by token, and only there; values and gradients stay (fp64)."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tedcompile import pipeline
from tedcompile.mesh import MeshShape
from tedcompile.ops import ops
from tests.lockstep import distributed, parity, targets
from tests.passes.test_shard_experts import E, I, T

H, MANY = 8, 64
MESH = MeshShape(ep=2, tp=2)


class Layer(nn.Module):
    """An MLP, a residual, a norm, and a small MoE beside another residual: (B, S, H) tokens."""

    def __init__(self, router=lambda scores: scores.softmax(-1), attend=False):
        super().__init__()
        torch.manual_seed(0)
        self.route, self.attend = router, attend
        self.first, self.norm = nn.LayerNorm(H), nn.LayerNorm(H)
        self.wide, self.narrow = nn.Linear(H, 16, bias=False), nn.Linear(16, H)
        self.router = nn.Linear(H, E, bias=False)
        self.up, self.down = nn.Parameter(torch.randn(E, H, I)), nn.Parameter(torch.randn(E, I, H))
        self.head = nn.Linear(H, 16, bias=False)

    def forward(self, x):
        x = self.first(x)
        x = x + self.narrow(F.gelu(self.wide(x)))
        if self.attend:  # mixes the tokens: no rule keeps a split of them
            x = x + x.cumsum(1)
        flat = self.norm(x).flatten(0, 1)
        scores = self.route(self.router(flat))
        weights, index = scores.topk(2)
        rows, counts, perm, order = ops.permute(flat, index, E)
        y = ops.grouped_mm(F.silu(ops.grouped_mm(rows, self.up, counts)), self.down, counts)
        x = x + ops.unpermute(y, perm, order, weights).view(x.shape)
        return self.head(self.norm(x)).square().mean() + scores.mean(0).square().sum()


def inputs(number, batch=1, seq=T):
    return [
        dict(x=torch.randn(batch, seq, H, dtype=torch.float64, generator=torch.Generator().manual_seed(i)))
        for i in range(number)
    ]


def made(module, mesh=MESH, batch=1, seq=T, **options):
    return distributed(module.double(), inputs(1, batch, seq)[0], mesh, **options)


@pytest.mark.parametrize("attend", [False, True])
@pytest.mark.parametrize("batch, seq", [(1, 6), (2, 3), (3, 2), (2, 4), (1, 5), (1, 1)])
@pytest.mark.parametrize("mesh", [MeshShape(ep=2, tp=2), MeshShape(tp=4), MeshShape(dp=2, ep=2, tp=2)], ids=str)
def test_parity(mesh, batch, seq, attend, monkeypatch):
    graph = made(Layer(attend=attend), mesh, batch, seq)
    parity(Layer(attend=attend), inputs(mesh["data"], batch, seq), mesh, monkeypatch, graph)


def test_the_tokens_stay_split_from_the_first_product_to_the_loss():
    gm, ctx = made(Layer(), seq=MANY)
    (record,) = [r for r in ctx.records if r.name == "simplify_collectives"]
    assert record.inserted["reduce_scatter"] == record.removed["all_reduce"] == 1
    kinds = pipeline.collectives(gm)
    tokens = [n for n in gm.graph.nodes if n.target is ops.gather.default and n.meta["val"].shape == (1, MANY, H)]
    assert not tokens and kinds["reduce_scatter"] == 2  # of the MLP, and of the rows of the experts
    routers = [n for n in gm.graph.nodes if str(n.target) == "aten.topk.default"]
    assert [str(n.meta["layout"][0]) for n in routers] == ["S(0)"]


def test_off():
    gm, ctx = made(Layer(), off=["simplify_collectives"], plan={"drop": "yes"})
    assert "simplify_collectives" not in [r.name for r in ctx.records]
    assert "ted::gather_enter" not in targets(gm)


def test_fewer_bytes_than_without():
    def tokens(gm):  # all-gathers of T x H are 1, all-reduces 2, each with what its VJP sends
        costs = {ops.gather.default: 1, ops.gather_enter.default: 2, ops.slice.default: 1, ops.all_reduce.default: 2,
                 ops.enter.default: 2, ops.reduce_scatter.default: 2}  # fmt: skip
        large = [n for n in gm.graph.nodes if n.target in costs and n.meta["val"].numel() == MANY * H]
        return sum(costs[n.target] for n in large if n.args[-1] == "tp")

    without = made(Layer(), seq=MANY, off=["simplify_collectives"], plan={"drop": "yes"})[0]
    assert tokens(made(Layer(), seq=MANY)[0]) < tokens(without)


def test_what_mixes_the_tokens_gets_all_of_them():
    """A look-alike: the same layer with a sum over the tokens where the split would pass."""
    gm, _ = made(Layer(attend=True))
    (mix,) = [n for n in gm.graph.nodes if str(n.target) == "aten.cumsum.default"]
    assert str(mix.meta["layout"]) == "R"


def test_a_router_that_is_not_token_by_token_sees_all_tokens(monkeypatch):
    """Scores balanced over the tokens: top-k of a part would be another one."""
    module = Layer(router=lambda scores: scores.softmax(0))
    gm, _ = graph = made(module)
    (soft,) = [n for n in gm.graph.nodes if str(n.target) == "aten.softmax.int"]
    assert str(soft.meta["layout"]) == "R"
    parity(Layer(router=lambda scores: scores.softmax(0)), inputs(2), MeshShape(ep=2, tp=2), monkeypatch, graph)
