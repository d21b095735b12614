"""The cost model: which candidates there are, what is chosen on which machine, and what the table says."""

import re

import pytest

from tedcompile import cost
from tedcompile.cost import Block, Candidate, candidates, choose, predict
from tedcompile.machines import Link, load
from tedcompile.mesh import MeshShape

H200, SLOW = load("h200"), load("two_slow_hosts")
QWEN3 = Block(T=16384, K=8, H=2048, I=768, E=128)
MIXTRAL = Block(T=16384, K=2, H=4096, I=14336, E=8)


def kinds(*args, **kwargs):
    return {(c.experts, c.dispatch, c.drop) for c in candidates(*args, **kwargs)}


def test_candidates_of_a_full_mesh():
    dispatches = ("all_to_all", "dedup", "all_gather")
    expected = {("tensor", d, drop) for d in dispatches for drop in (False, True)} | {
        ("folded", d, True) for d in dispatches
    }
    assert kinds(QWEN3, MeshShape(1, 4, 2)) == expected


def test_axes_of_size_one_leave_nothing_to_choose():
    assert candidates(QWEN3, MeshShape(4, 1, 1)) == [Candidate()]
    assert kinds(QWEN3, MeshShape(1, 4, 1)) == {("tensor", d, False) for d in ("all_to_all", "dedup", "all_gather")}
    assert kinds(QWEN3, MeshShape(1, 1, 4), plan={"experts": "tensor"}) == {("tensor", "all_to_all", False)}


def test_what_is_switched_off_and_what_is_forced():
    mesh = MeshShape(1, 4, 2)
    assert not any(c.drop for c in candidates(QWEN3, mesh, off=["drop_duplicates"]))
    forced = {"experts": "tensor", "dispatch": "dedup", "drop_point": "before_gate", "chunks": "1"}
    assert candidates(QWEN3, mesh, forced) == [
        Candidate("tensor", "dedup", False),
        Candidate("tensor", "dedup", True, "before_gate"),
    ]
    assert kinds(QWEN3, MeshShape(1, 4, 1), {"experts": "folded", "dispatch": "dedup"}) == {("folded", "dedup", False)}


@pytest.mark.parametrize(
    "block, mesh, plan, off, words",
    [
        (MIXTRAL, MeshShape(1, 3, 1), {}, (), "8 experts do not divide over ep=3"),
        (MIXTRAL, MeshShape(1, 8, 2), {"experts": "folded"}, (), "8 experts do not divide over ep x tp = 16"),
        (QWEN3, MeshShape(1, 2, 2), {"experts": "folded"}, ["drop_duplicates"], "folded experts need drop_duplicates"),
        (Block(64, 2, 8, 9, 4), MeshShape(1, 4, 2), {}, (), "expert size 9 does not divide over tp=2"),
        (QWEN3, MeshShape(1, 2, 2), {"dispatch": "pigeon"}, (), "plan: dispatch=pigeon is not a choice"),
        (QWEN3, MeshShape(1, 2, 2), {"layout": "x"}, (), "plan: layout=x is not a choice"),
    ],
)
def test_what_cannot_work_is_named(block, mesh, plan, off, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        candidates(block, mesh, plan, off)


def test_blocks_are_checked():
    with pytest.raises(ValueError, match="cannot choose 9 of 8"):
        Block(1, 9, 8, 8, 8)
    with pytest.raises(ValueError, match="needs T of at least 1, got 0"):
        Block(0, 1, 8, 8, 8)


def test_predictions_by_hand():
    """Mixtral on ep 2: the terms of one candidate from the machine's numbers."""
    p = predict(MIXTRAL, Candidate(), MeshShape(1, 2, 1), H200)
    rows = 2 * 16384 * 4096 * 2  # bytes of K*T rows
    assert p.term("all_to_all") == pytest.approx(4 * rows / 2 / 290e9, rel=1e-3)
    assert p.sent["ep"] == pytest.approx(4 * rows / 2, rel=1e-3)
    work = 18 * 2 * 16384 * 4096 * 14336
    efficiency = 8192 / (8192 + 175) * 4096 / (4096 + 46)  # an expert's rows come from both ranks
    assert p.term("gemm") == pytest.approx(work / (662e12 * efficiency))
    assert p.weights == 3 * 8 * 4096 * 14336 * 2 / 2
    assert p.term("tp") == p.term("hidden") == 0


def test_many_small_experts_are_folded_and_deduplicated():
    """X-MoE's and torchtitan's verdict for fine-grained experts: slice tokens first, keep experts whole."""
    best = choose(QWEN3, MeshShape(1, 2, 2), H200).best.candidate
    assert (best.experts, best.dispatch) == ("folded", "dedup")


def test_few_large_experts_keep_teds_layout_where_folding_does_not_divide():
    choice = choose(MIXTRAL, MeshShape(1, 8, 2), H200)
    assert choice.best.candidate.experts == "tensor"
    assert choice.best.candidate.drop  # ep crosses nodes, tp does not


def test_rows_are_not_dropped_inside_a_node_where_the_gather_costs_as_much():
    best = choose(MIXTRAL, MeshShape(1, 2, 2), H200, {"experts": "tensor"}).best.candidate
    assert not best.drop


def test_a_slow_link_decides_for_fewest_bytes():
    block = Block(T=2048, K=2, H=256, I=512, E=6, bytes=4)  # 6 experts do not fold over 4 ranks
    mesh = MeshShape(1, 2, 2)
    choice = choose(block, mesh, SLOW)
    assert choice.best.candidate.drop
    assert choice.best.sent["ep"] == pytest.approx(min(p.sent["ep"] for p in choice.all), rel=0.05)
    halved = [predict(block, Candidate("tensor", "all_to_all", drop), mesh, SLOW) for drop in (False, True)]
    assert halved[0].term("all_to_all") / halved[1].term("all_to_all") == pytest.approx(2, rel=0.01)


def test_dropping_before_the_gate_pays_where_the_gate_is_dear():
    """Parm's question: T/tp tokens in the gate, against gathering logits and reducing the router's gradient."""
    mesh, plan = MeshShape(1, 4, 2), {"dispatch": "all_to_all", "experts": "folded"}
    few, many = (choose(Block(t, 8, 2048, 768, 128, aux=True), mesh, H200, plan).best.candidate for t in (64, 65536))
    assert (few.drop_point, many.drop_point) == ("after_gate", "before_gate")


def test_chunks_pay_where_there_is_much_to_hide():
    """Transfers under the experts' products, and under gathers over other links, while parts outweigh their starts."""
    plan = {"experts": "tensor", "dispatch": "all_to_all"}
    within, across = MeshShape(1, 2, 4), MeshShape(1, 2, 8)
    hidden = [predict(MIXTRAL, Candidate(drop=True, chunks=2), mesh, H200).term("hidden") for mesh in (within, across)]
    assert hidden[1] < 2 * hidden[0] < 0
    assert choose(MIXTRAL, across, H200, plan).best.candidate.chunks > 1
    few = Block(T=128, K=2, H=4096, I=14336, E=8)
    assert all(choose(few, mesh, H200, plan).best.candidate.chunks == 1 for mesh in (within, across))
    p = predict(MIXTRAL, Candidate(drop=True, chunks=4), across, H200)
    whole = predict(MIXTRAL, Candidate(drop=True), across, H200)
    assert p.term("hidden") < 0 and p.term("all_to_all") == whole.term("all_to_all")


def test_what_does_not_fit_is_not_chosen():
    mesh = MeshShape(1, 4, 2)
    tensor = min(p.memory for p in choose(QWEN3, mesh, H200).all if p.candidate.experts == "tensor")
    fast_tp = load("h200", intra=Link(1e-9, 1e15), memory=tensor * 0.99)
    choice = choose(QWEN3, mesh, fast_tp)
    assert choice.best.candidate.experts == "folded" and choice.best.fits
    none = choose(QWEN3, mesh, load("h200", memory=1e6))
    assert none.reason.startswith("none fits in 0.001 GB")
    assert none.best.memory == min(p.memory for p in none.all)


def test_choices_repeat():
    cost._choose.cache_clear()
    first = choose(QWEN3, MeshShape(1, 4, 2), H200)
    cost._choose.cache_clear()
    cost.predict.cache_clear()
    assert choose(QWEN3, MeshShape(1, 4, 2), H200) == first


def test_table():
    rows = cost.table(MIXTRAL, MeshShape(1, 8, 2), H200)
    chosen = [row for row in rows if row["chosen"]]
    assert len(chosen) == 1 and chosen[0] is rows[0] and chosen[0]["reason"].startswith("fastest; +")
    timed = [row for row in rows if row["seconds"] is not None]
    assert [row["seconds"] for row in timed] == sorted(row["seconds"] for row in timed)
    assert all(sum(row["terms"].values()) == pytest.approx(row["seconds"]) for row in timed)
    ruled_out = [row for row in rows if row["seconds"] is None]
    assert [row["reason"] for row in ruled_out] == ["8 experts do not divide over ep x tp = 16"]
    text = cost.render(rows)
    assert text.count("\n*") == 1 and "8 experts do not divide over ep x tp = 16" in text
    assert len(cost.render(rows, everything=True).splitlines()) == len(rows) + 3
