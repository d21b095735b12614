"""Expert parallelism: where rows travel, what stays whole and why, and parity over ep x tp x dp in fp64."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tedcompile import pipeline
from tedcompile.capture import capture
from tedcompile.mesh import MeshShape
from tedcompile.ops import ops
from tests.lockstep import distributed, parity, placements, text

T, H, I, E = 6, 4, 8, 4


class Experts(nn.Module):
    """A router, gated experts with biases, and a combine; `combine(self, y, ...)` is what tests vary."""

    def __init__(self, combine=None, experts=E):
        super().__init__()
        torch.manual_seed(0)
        self.combine, self.experts = combine, experts
        self.router = nn.Linear(H, experts, bias=False)
        self.up, self.down = nn.Parameter(torch.randn(experts, H, 2 * I)), nn.Parameter(torch.randn(experts, I, H))
        self.up_bias, self.down_bias = nn.Parameter(torch.randn(experts, 2 * I)), nn.Parameter(torch.randn(experts, H))

    def forward(self, x, skew):
        scores = self.router(x) + skew  # with the skew, one expert has all rows or none
        weights, index = scores.softmax(-1).topk(2)
        rows, counts, perm, order = ops.permute(x, index, self.experts)
        gate, up = (ops.grouped_mm(rows, self.up, counts) + ops.per_expert(self.up_bias, counts, rows)).chunk(2, -1)
        y = ops.grouped_mm(F.silu(gate) * up, self.down, counts) + ops.per_expert(self.down_bias, counts, rows)
        if self.combine:
            return self.combine(self, x, y, perm, order, weights)
        return x + ops.unpermute(y, perm, order, weights)


def batches(number, skew=None, experts=E):
    made = []
    for i in range(number):
        generator = torch.Generator().manual_seed(i)
        x = torch.randn(T, H, dtype=torch.float64, generator=generator)
        made.append(dict(x=x, skew=torch.zeros(experts, dtype=torch.float64) if skew is None else skew))
    return made


MESHES = [MeshShape(ep=2), MeshShape(ep=4), MeshShape(ep=2, tp=2), MeshShape(dp=2, ep=2), MeshShape(dp=2, ep=2, tp=2)]
SKEWS = {"balanced": None, "one expert without rows": [0, -99, 0, 0], "all rows to the last two": [0, 0, 99, 99]}


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("skew", SKEWS.values(), ids=SKEWS)
def test_parity(mesh, skew, monkeypatch):
    skew = None if skew is None else torch.tensor(skew, dtype=torch.float64)
    gm = parity(Experts(), batches(mesh["data"], skew), mesh, monkeypatch)
    assert {n for n, p in placements(gm).items() if "ep" in p} == {"up", "down", "up_bias", "down_bias"}
    assert pipeline.collectives(gm)["all_to_all"] == 3  # counts, there, and back


def test_pinned():
    gm, ctx = distributed(Experts(), batches(1)[0], MeshShape(ep=2))
    lines = text(gm).split("\n")
    assert not ctx.replicated
    start = next(i for i, line in enumerate(lines) if "permute" in line)
    assert [line.split(" = ")[1] for line in lines[start + 5 :]] == [
        "ted.exchange_counts(getitem_3, 2, ep)",
        "ted.splits(getitem_3, exchange_counts_default)",
        "aten.sum.dim_IntList(exchange_counts_default, [0])",
        "ted.all_to_all(getitem_2, splits_default, ep)",
        "ted.regroup(exchange_counts_default, all_to_all_default)",
        "getitem(regroup_default, 0)",
        "getitem(regroup_default, 1)",
        "ted.take(all_to_all_default, getitem_8, getitem_9)",
        "ted.grouped_mm(take_default, p_up, sum_dim_int_list)",
        "ted.per_expert(p_up_bias, sum_dim_int_list, take_default)",
        "aten.add.Tensor(grouped_mm, per_expert)",
        "aten.chunk(add_1, 2, -1)",
        "getitem(chunk, 0)",
        "getitem(chunk, 1)",
        "aten.silu(getitem_6)",
        "aten.mul.Tensor(silu, getitem_7)",
        "ted.grouped_mm(mul, p_down, sum_dim_int_list)",
        "ted.per_expert(p_down_bias, sum_dim_int_list, take_default)",
        "aten.add.Tensor(grouped_mm_1, per_expert_1)",
        "ted.take(add_2, getitem_9, getitem_8)",
        "ted.way_back(splits_default)",
        "ted.all_to_all_like(take_default_1, way_back_default, getitem_2, ep)",
        "ted.unpermute(all_to_all_like_default, getitem_4, getitem_5, getitem)",
        "aten.add.Tensor(x, unpermute)",
    ]


def reason(module, mesh, monkeypatch, experts=E):
    """Why the experts stay whole; they must still be right."""
    module = module.double()
    given = batches(mesh["data"], experts=experts)
    gm, ctx = made = distributed(module, given[0], mesh)
    assert not any("ep" in p for p in placements(gm).values())
    assert "all_to_all" not in pipeline.collectives(gm)
    parity(module, given, mesh, monkeypatch, graph=made)
    (found,) = (reason for node, reason in ctx.replicated if node.target is ops.permute.default)
    return found


def test_experts_that_ep_does_not_divide(monkeypatch):
    found = reason(Experts(experts=6), MeshShape(ep=4), monkeypatch, experts=6)
    assert found == "6 experts do not divide over ep=4; ep = 2, 3, 6 would"


def test_combine_by_another_op_stays(monkeypatch):
    """Rows that come back must come back by an op that knows the way."""

    def combine(m, x, y, perm, order, weights):
        y = y * weights.flatten()[order, None]
        return x.index_add(0, order // 2, y)

    assert "in another order" in reason(Experts(combine), MeshShape(ep=2), monkeypatch)


def test_rows_that_are_summed_stay(monkeypatch):
    def combine(m, x, y, perm, order, weights):
        return ops.unpermute(y - y.mean(0), perm, order, weights)

    assert "in another order" in reason(Experts(combine), MeshShape(ep=2), monkeypatch)


def test_rows_that_leave_the_model_stay(monkeypatch):
    def combine(m, x, y, perm, order, weights):
        return ops.unpermute(y, perm, order, weights), y

    assert "in another order" in reason(Experts(combine), MeshShape(ep=2), monkeypatch)


def test_scores_before_the_experts_travel_too(monkeypatch):
    class Scaled(Experts):
        def forward(self, x, skew):
            weights, index = (self.router(x) + skew).softmax(-1).topk(2)
            rows, counts, perm, order = ops.permute(x, index, self.experts)
            scores = ops.take(weights.flatten(), order, perm.view(-1))
            y = ops.grouped_mm(
                F.gelu(ops.grouped_mm(rows * scores[:, None], self.up, counts))[:, :I], self.down, counts
            )
            return ops.gather_sum(y, perm, order)

    gm = parity(Scaled(), batches(2), MeshShape(ep=2), monkeypatch)
    assert pipeline.collectives(gm)["all_to_all"] == 4


class Reshaped(Experts):
    """Sizes of the body written out; the rows are as many as the features."""

    def forward(self, x, skew):
        weights, index = (self.router(x) + skew).softmax(-1).topk(2)
        rows, counts, perm, order = ops.permute(x, index, self.experts)
        y = ops.grouped_mm(rows.view(-1, H), self.up, counts)
        y = F.silu(y.view(rows.shape[0], 2, I).sum(1)) + y.new_zeros(rows.shape[0], I)
        y = ops.grouped_mm(y.view(-1, I), self.down, counts).view(-1, H)
        return x + ops.unpermute(y, perm, order, weights)


@pytest.mark.parametrize("tokens", [H // 2, I // 2, I, T])
def test_sizes_that_equal_the_number_of_rows(tokens, monkeypatch):
    inputs = [{**b, "x": b["x"].repeat(2, 1)[:tokens]} for b in batches(2)]
    gm = parity(Reshaped(), inputs, MeshShape(ep=2), monkeypatch)
    assert {n for n, p in placements(gm).items() if "ep" in p} == {"up", "down"}


@pytest.mark.parametrize("mix", [lambda y: y.cumsum(0), lambda y: y.flip(0), lambda y: y.softmax(-2)])
def test_a_body_that_mixes_rows_stays_whole(mix):
    class Mixed(Experts):
        def forward(self, x, skew):
            weights, index = (self.router(x) + skew).softmax(-1).topk(2)
            rows, counts, perm, order = ops.permute(x, index, self.experts)
            y = ops.grouped_mm(mix(ops.grouped_mm(rows, self.up, counts)[:, :I]), self.down, counts)
            return ops.unpermute(y, perm, order, weights)

    gm, ctx = distributed(Mixed(), batches(1)[0], MeshShape(ep=2))
    assert not any("ep" in p for p in placements(gm).values())
    assert any("in another order than that of the experts" in reason for _, reason in ctx.replicated)


def test_weights_that_an_earlier_signature_split_must_be_split():
    class Sometimes(Experts):
        def forward(self, x, skew):
            if len(x) > 2:
                return super().forward(x, skew)
            return x + (x @ self.up[0]).chunk(2, -1)[0] @ self.down[0]

    gm, _ = distributed(Sometimes(), batches(1)[0], MeshShape(ep=2))
    ctx = pipeline.Context(MeshShape(ep=2), pipeline.placements(gm))
    few = {**batches(1)[0], "x": torch.zeros(1, H, dtype=torch.float64)}
    with pytest.raises(ValueError, match="up is split over ep since an earlier call, and with these inputs"):
        pipeline.run_forward(capture(Sometimes(), few), ctx)
