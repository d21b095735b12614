"""Duplicate token dropping: fewer rows travel, and values and gradients stay those of the plain module (fp64)."""

import pytest
import torch

from tedcompile import pipeline
from tedcompile.mesh import MeshShape
from tedcompile.ops import ops
from tests.lockstep import distributed, parity, placements, targets
from tests.passes.test_shard_experts import SKEWS, Experts, H, batches

FOLDED = dict(plan={"experts": "folded"})
MESHES = [MeshShape(ep=2, tp=2), MeshShape(ep=2, tp=4), MeshShape(dp=2, ep=2, tp=2)]  # 6 tokens: tp=4 needs padding


def sums(self, x, y, perm, order, weights):
    """The combine as hand-written models have it: rows scaled, then added to their tokens."""
    scaled = y * ops.take(weights.reshape(-1), order, perm.reshape(-1))[:, None]
    return x + ops.gather_sum(scaled, perm, order)


def slots(self, x, y, perm, order, weights):
    back = ops.take(y, perm.reshape(-1), order).view(*weights.shape, H)
    return x + (back * weights[..., None]).sum(1)


def normed(self, x, y, perm, order, weights):
    """Not linear after the second product: partial sums cannot wait for the way back."""
    return x + ops.unpermute(y / (1 + y.square().mean(-1, keepdim=True)), perm, order, weights)


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("skew", SKEWS.values(), ids=SKEWS)
@pytest.mark.parametrize("experts_plan", ["tensor", "folded"])
@pytest.mark.parametrize("kind", ["all_to_all", "dedup", "all_gather"])
def test_parity(mesh, skew, experts_plan, kind, monkeypatch):
    experts = 4 if mesh.tp == 2 else 8
    skew = None if skew is None else torch.tensor(skew * (experts // 4), dtype=torch.float64)
    data = batches(mesh["data"], skew, experts)
    plan = {"experts": experts_plan, "dispatch": kind}
    graph = distributed(Experts(experts=experts), data[0], mesh, plan=plan)
    gm = parity(Experts(experts=experts), data, mesh, monkeypatch, graph)
    assert "ted::drop" not in targets(gm)
    assert targets(gm).count("ted::all_to_all") == {"all_to_all": 1, "dedup": 3, "all_gather": 0}[kind]
    rows = [n for n in gm.graph.nodes if n.target is ops.all_to_all.default]
    assert {str(n.meta["layout"]) for n in rows} <= {"D"}


@pytest.mark.parametrize("kind", ["dedup", "all_gather"])
@pytest.mark.parametrize("mesh", [MeshShape(ep=2), MeshShape(dp=2, ep=4), MeshShape(ep=2, tp=2)], ids=str)
@pytest.mark.parametrize("skew", SKEWS.values(), ids=SKEWS)
def test_tokens_without_dropping(mesh, kind, skew, monkeypatch):
    skew = None if skew is None else torch.tensor(skew, dtype=torch.float64)
    data = batches(mesh["data"], skew)
    graph = distributed(Experts(), data[0], mesh, plan={"dispatch": kind}, off=["drop_duplicates"])
    parity(Experts(), data, mesh, monkeypatch, graph)


@pytest.mark.parametrize("combine", [sums, slots, normed])
@pytest.mark.parametrize("options", [{}, FOLDED], ids=["tensor", "folded"])
@pytest.mark.parametrize("mesh", [MeshShape(ep=2, tp=2), MeshShape(ep=1, tp=4), MeshShape(ep=2, tp=4)], ids=str)
def test_every_combine(combine, options, mesh, monkeypatch):
    data = batches(mesh.ep, experts=8)
    graph = distributed(Experts(combine, experts=8), data[0], mesh, **options)
    parity(Experts(combine, experts=8), data, mesh, monkeypatch, graph)


def test_folded_experts_are_whole():
    gm, _ = distributed(Experts(), batches(1)[0], MeshShape(ep=2, tp=2), **FOLDED)
    assert placements(gm) == {n: {"tp": "S(0)", "ep": "S(0)"} for n in ("up", "up_bias", "down", "down_bias")}
    assert "ted::gather_rows" not in targets(gm)


def test_experts_that_cannot_fold_are_refused_by_their_sizes():
    with pytest.raises(ValueError, match="6 experts do not divide over ep x tp = 4"):
        distributed(Experts(experts=6), batches(1, experts=6)[0], MeshShape(ep=2, tp=2), **FOLDED)


def test_what_cannot_wait_for_the_sum_is_computed_on_own_rows():
    gm, _ = distributed(Experts(normed), batches(1)[0], MeshShape(ep=2, tp=2))
    assert placements(gm)["up"] == {"ep": "S(0)"}
    assert "ted::gather_rows" not in targets(gm)


def test_the_tokens_are_gathered_once_and_not_their_rows():
    gm, _ = distributed(Experts(), batches(1)[0], MeshShape(ep=2, tp=2))
    gathers = [n for n in gm.graph.nodes if n.target is ops.gather.default and n.meta["val"].is_floating_point()]
    assert [tuple(n.meta["val"].shape) for n in gathers] == [(6, H)]


def test_off():
    gm, ctx = distributed(Experts(), batches(1)[0], MeshShape(ep=2, tp=2), off=["drop_duplicates"])
    assert "drop_duplicates" not in [r.name for r in ctx.records]
    assert pipeline.collectives(gm)["all_gather"] == 0


@pytest.mark.parametrize("mesh", [MeshShape(ep=2, tp=2), MeshShape(dp=2, ep=2, tp=2)], ids=str)
@pytest.mark.parametrize("experts_plan", ["tensor", "folded"])
@pytest.mark.parametrize("off", [[], ["simplify_collectives"]], ids=["algebra", "no algebra"])
@pytest.mark.parametrize("point", ["before_gate", "after_gate"])
def test_tokens_are_dropped_before_or_after_the_gate(point, off, experts_plan, mesh, monkeypatch):
    data = batches(mesh["data"])
    plan = {"experts": experts_plan, "drop_point": point, "drop": "yes"}
    graph = distributed(Experts(), data[0], mesh, plan=plan, off=off)
    gm = parity(Experts(), data, mesh, monkeypatch, graph)
    (gate,) = (n for n in gm.graph.nodes if n.target is torch.ops.aten.linear.default)
    assert str(gate.meta["layout"]) == ("S(0)" if point == "before_gate" else "R")


@pytest.mark.parametrize("kind", ["dedup", "all_gather"])
def test_before_the_gate_whatever_travels(kind, monkeypatch):
    mesh = MeshShape(ep=2, tp=2)
    data = batches(mesh["data"])
    plan = {"dispatch": kind, "drop_point": "before_gate"}
    graph = distributed(Experts(), data[0], mesh, plan=plan, off=["simplify_collectives"])
    parity(Experts(), data, mesh, monkeypatch, graph)


def test_a_drop_before_the_gate_that_cannot_be_is_refused_by_its_sizes():
    plan = {"drop_point": "before_gate"}
    with pytest.raises(ValueError, match="6 tokens do not divide over tp=4"):
        distributed(Experts(experts=8), batches(1, experts=8)[0], MeshShape(ep=2, tp=4), plan=plan)


class RoutedByOthers(Experts):
    def forward(self, x, skew):
        weights, index = (self.router(x.flip(0) * 2) + skew).softmax(-1).topk(2)
        rows, counts, perm, order = ops.permute(x * 3, index, self.experts)
        y = ops.grouped_mm(rows, self.up, counts)
        y = ops.grouped_mm(y[:, : y.shape[1] // 2].tanh(), self.down, counts)
        return x + ops.unpermute(y, perm, order, weights)


def test_tokens_routed_by_other_values_are_dropped_after_the_gate(monkeypatch):
    mesh = MeshShape(ep=2, tp=2)
    data = batches(mesh["data"])
    with pytest.raises(ValueError, match="routed by other values"):
        distributed(RoutedByOthers(), data[0], mesh, plan={"drop_point": "before_gate"})
    parity(RoutedByOthers(), data, mesh, monkeypatch, distributed(RoutedByOthers(), data[0], mesh))
