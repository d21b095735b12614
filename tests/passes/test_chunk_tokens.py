"""Tokens in parts: parity for every way that tokens travel, what is in flight while another part is computed."""

import pytest
import torch

from tedcompile import pipeline
from tedcompile.layouts import aten
from tedcompile.mesh import MeshShape
from tedcompile.ops import ops
from tedcompile.passes import lower
from tests.lockstep import distributed, parity, targets
from tests.passes.test_shard_experts import MESHES, SKEWS, Experts, batches

WAYS = [("tensor", "all_to_all"), ("tensor", "dedup"), ("tensor", "all_gather"), ("folded", "all_to_all"),
        ("folded", "dedup"), ("folded", "all_gather")]  # fmt: skip


def plan(experts: str, dispatch: str, chunks: int) -> dict[str, str]:
    return dict(experts=experts, dispatch=dispatch, chunks=str(chunks))


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("way", WAYS, ids="-".join)
def test_parity(mesh, way, monkeypatch):
    if way[0] == "folded" and (mesh.tp == 1 or mesh["ept"] > 4):
        pytest.skip("the same as split experts")
    for chunks, skew in [(2, None), (4, SKEWS["all rows to the last two"])]:
        skew = None if skew is None else torch.tensor(skew, dtype=torch.float64)
        made = batches(mesh["data"], skew)
        found = distributed(Experts().double(), made[0], mesh, plan=plan(*way, chunks))
        gm = parity(Experts(), made, mesh, monkeypatch, found)
        assert targets(gm).count("ted::join") == 1 and targets(gm).count("ted::grouped_mm") == 2 * chunks


def test_all_parts_leave_before_the_first_is_computed():
    gm, _ = distributed(Experts(), batches(1)[0], MeshShape(ep=2), plan=plan("tensor", "all_to_all", 2))
    moved = {"ted::all_to_all": "there", "ted::grouped_mm": "compute", "ted::all_to_all_like": "back"}
    assert [moved[t] for t in targets(gm) if t in moved] == [
        "there", "there", "compute", "compute", "back", "compute", "compute", "back",
    ]  # fmt: skip
    assert pipeline.collectives(gm)["all_to_all"] == 6


def test_lowered_transfers_overlap_with_products():
    gm, _ = distributed(Experts(), batches(1)[0], MeshShape(ep=2), plan=plan("tensor", "all_to_all", 2))
    lower.run(gm, {"ep": "group_ep"})
    found = [n.target for n in gm.graph.nodes]
    starts = [i for i, t in enumerate(found) if t is ops.start_all_to_all.default]
    arrivals = [i for i, t in enumerate(found) if t is ops.arrive.default]
    products = [i for i, t in enumerate(found) if t is ops.grouped_mm.default]
    # the second part is under way during the products of the first, whose results are during those of the second
    assert starts[0] < products[0] < products[1] < arrivals[0]
    assert starts[1] < products[2] < products[3] < arrivals[1]
    assert (
        found.count(ops.all_to_all.default) == 1
    )  # the first part's way there, and the last one's back, are waited for
    assert found.count(ops.all_to_all_like.default) == 1
    assert ops.regroup.default in found and aten.cat.default not in found


def test_what_others_read_stays_whole():
    """Counts that leave the block are those of all its tokens."""

    class Counts(Experts):
        def forward(self, x, skew):
            weights, index = (self.router(x) + skew).softmax(-1).topk(2)
            rows, counts, perm, order = ops.permute(x, index, self.experts)
            y = ops.grouped_mm(ops.grouped_mm(rows, self.up, counts)[:, : self.down.shape[1]], self.down, counts)
            return ops.unpermute(y, perm, order, weights).sum() * (counts * counts).sum()

    gm, _ = distributed(Counts(), batches(1)[0], MeshShape(ep=2), plan=plan("tensor", "all_to_all", 2))
    assert "ted::join" not in targets(gm)


def test_off():
    gm, _ = distributed(
        Experts(), batches(1)[0], MeshShape(ep=2), plan=plan("tensor", "dedup", 4), off=["chunk_tokens"]
    )
    assert "ted::join" not in targets(gm)
