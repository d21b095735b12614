"""Tensor parallelism of small modules: pinned graphs, layouts, reasons, and parity in fp64."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tedcompile.layouts import R, S
from tedcompile.mesh import MeshShape
from tedcompile.passes import shard_tensors
from tedcompile.pipeline import Context
from tests.lockstep import captured, distributed, parity, placements, targets, text

TP = MeshShape(tp=2)


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up, self.down = nn.Linear(8, 24, bias=False), nn.Linear(12, 8)

    def forward(self, x):
        gate, up = self.gate_up(x).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


def test_mlp_pinned(monkeypatch):
    module, batch = Mlp().double(), dict(x=torch.randn(5, 8, dtype=torch.float64))
    gm, ctx = made = distributed(module, batch, TP)
    assert text(gm).split("\n") == [
        "linear: S(1 of 12+12) = aten.linear(x, p_gate_up_weight)",  # an input has no gradient: nothing to enter
        "split_with_sizes: (S(1), S(1)) = aten.split_with_sizes(linear, [6, 6], 1)",
        "getitem: S(1) = getitem(split_with_sizes_default, 0)",
        "getitem_1: S(1) = getitem(split_with_sizes_default, 1)",
        "silu: S(1) = aten.silu(getitem)",
        "mul: S(1) = aten.mul.Tensor(silu, getitem_1)",
        "share: P = ted.share(p_down_bias, 2, tp)",
        "linear_1: P = aten.linear(mul, p_down_weight, share_default)",
        "all_reduce: R = ted.all_reduce(linear_1, tp)",
        "add: R = aten.add.Tensor(x, all_reduce_default)",
    ]
    assert placements(gm) == {"gate_up.weight": {"tp": "S(0 of 12+12)"}, "down.weight": {"tp": "S(1)"}}
    assert not ctx.replicated
    parity(module, [batch], TP, monkeypatch, graph=made)


class Attention(nn.Module):
    def __init__(self, heads, kv_heads, fused=False):
        super().__init__()
        self.sizes = [4 * heads, 4 * kv_heads, 4 * kv_heads]
        self.inner = nn.Linear(8, 8)  # before, so that the input of q, k and v has a gradient
        if fused:
            self.qkv = nn.Linear(8, sum(self.sizes))
        else:
            self.q, self.k, self.v = (nn.Linear(8, n) for n in self.sizes)
        self.fused, self.o = fused, nn.Linear(4 * heads, 8)

    def forward(self, x):
        x = F.layer_norm(self.inner(x), (8,))
        q, k, v = self.qkv(x).split(self.sizes, -1) if self.fused else (self.q(x), self.k(x), self.v(x))
        q, k, v = (t.unflatten(-1, (-1, 4)).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o(y.transpose(1, 2).flatten(2))


QKV = ("q.weight", "k.weight", "v.weight")


@pytest.mark.parametrize(
    "heads, kv_heads, fused, split",
    [
        (4, 4, False, {"q.weight": "S(0)", "k.weight": "S(0)", "v.bias": "S(0)", "o.weight": "S(1)"}),
        (6, 2, False, {"q.weight": "S(0)", "k.weight": "S(0)", "v.weight": "S(0)", "o.weight": "S(1)"}),
        (4, 4, True, {"qkv.weight": "S(0 of 16+16+16)", "qkv.bias": "S(0 of 16+16+16)", "o.weight": "S(1)"}),
        (4, 2, True, {"qkv.weight": None, "o.weight": "S(1)"}),  # sections of unequal size: stored whole, used split
        (3, 3, False, dict.fromkeys(QKV)),
        (6, 3, False, dict.fromkeys(QKV)),
    ],
    ids=["equal", "grouped", "fused", "fused grouped", "three heads", "three kv heads"],
)
def test_attention(heads, kv_heads, fused, split, monkeypatch):
    module, batch = Attention(heads, kv_heads, fused).double(), dict(x=torch.randn(2, 5, 8, dtype=torch.float64))
    gm, ctx = made = distributed(module, batch, TP)
    found = placements(gm)
    assert {name: found.get(name, {}).get("tp") for name in split} == split
    reasons = {node.meta["role"][1]: reason for node, reason in ctx.replicated}
    for name, layout in split.items():
        assert (name in reasons) == (layout is None)
    if heads % 2 or kv_heads % 2:
        assert all("attention" in reasons[name] and "test_shard_tensors.py" in reasons[name] for name in QKV)
    else:
        assert "ted::gather" not in targets(gm)
    parity(module, [batch], TP, monkeypatch, graph=made)


class Language(nn.Module):
    def __init__(self, tied, vocab=12):
        super().__init__()
        self.table, self.head = nn.Embedding(vocab, 6), nn.Linear(6, vocab, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, ids):
        logits = self.head(F.rms_norm(self.table(ids), (6,)))
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


@pytest.mark.parametrize("tied", [False, True])
def test_vocabulary(tied, monkeypatch):
    """Table and head are split over the vocabulary, and the logits are never whole."""
    module, batch = Language(tied).double(), dict(ids=torch.arange(20).view(2, 10) % 12)
    gm, ctx = made = distributed(module, batch, TP)
    assert {p["tp"] for p in placements(gm).values()} == {"S(0)"}
    assert {"ted::embedding_shard", "ted::pick", "ted::all_max"} <= set(targets(gm))
    assert "ted::gather" not in targets(gm) and not ctx.replicated
    parity(module, [batch], TP, monkeypatch, graph=made)


def test_tied_weight_whose_uses_disagree(monkeypatch):
    """The head cannot be split over the vocabulary here, so the table, which is the same parameter, is not either."""

    class Smooth(Language):
        def forward(self, ids):
            logits = self.head(F.rms_norm(self.table(ids), (6,)))
            return F.cross_entropy(logits.flatten(0, 1), ids.flatten(), label_smoothing=0.1)

    module, batch = Smooth(True).double(), dict(ids=torch.arange(20).view(2, 10) % 12)
    parity(module, [batch], TP, monkeypatch)


def test_odd_vocabulary_is_reported(monkeypatch):
    module, batch = Language(False, vocab=11).double(), dict(ids=torch.arange(20).view(2, 10) % 11)
    gm, ctx = made = distributed(module, batch, TP)
    assert {n.meta["role"][1] for n, _ in ctx.replicated} == {"table.weight", "head.weight"}
    assert all("11 does not divide over tp=2" in reason for _, reason in ctx.replicated)
    parity(module, [batch], TP, monkeypatch, graph=made)


def test_one_rank_changes_nothing():
    module, batch = Mlp(), dict(x=torch.randn(5, 8))
    gm, _ = distributed(module, batch, MeshShape())
    assert not any(t.startswith("ted::") for t in targets(gm)) and not placements(gm)


@pytest.mark.parametrize("up, down", [(R, R), (S(0, (12, 12)), R), (R, S(1)), (S(0), S(0)), (S(1), S(1))], ids=str)
def test_given_layouts_are_kept(up, down, monkeypatch):
    """A second signature takes the layouts of the first as they are, whatever they are, and moves values instead."""
    module = Mlp().double()
    batch = dict(x=torch.randn(3, 8, dtype=torch.float64))
    ctx = Context(TP)
    gm = captured(module, batch).gm
    weights = {
        n.meta["role"][1]: n for n in gm.graph.nodes if n.op == "placeholder" and n.meta["role"][0] == "parameter"
    }
    ctx.fixed = {**dict.fromkeys(weights.values(), R), weights["gate_up.weight"]: up, weights["down.weight"]: down}
    shard_tensors.run(gm, ctx)
    kept = {n: p["tp"] for n, p in placements(gm).items()}
    assert kept == {n: str(p) for n, p in (("gate_up.weight", up), ("down.weight", down)) if p != R}
    parity(module, [batch], TP, monkeypatch, graph=(gm, ctx))
