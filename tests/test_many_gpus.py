"""The table of benchmarks/many_gpus.py is well formed, and DeepSpeed-TED's model is what the paper says."""

import pytest
import torch

from benchmarks import many_gpus, mesh_runs, ted, train_step
from tedcompile import prove
from tedcompile.cost import Block, candidates
from tedcompile.options import Options

# K, H, I, E, matrices of the experts of each case
EXPERTS = {
    "qwen3_4layers": (8, 2048, 768, 128, 3),
    "mixtral_layer": (2, 4096, 14336, 8, 3),
    "ted": (1, 4096, 16384, 16, 2),
}


@pytest.mark.parametrize("gpus", [4, 8])
def test_rows(gpus):
    rows, kinds = many_gpus.rows(gpus), {}
    assert len(rows) == len(set(rows)) > 30
    for row in [*rows, *map(many_gpus.tiny, rows)]:
        shape, chosen = mesh_runs.parse(row.system)
        kind, sizes, (batch, seq) = train_step.case_of(row.case.replace("?", "2"))
        assert all(hasattr(kinds.setdefault(kind, kind()), size) for size in sizes if size != "head_dim"), row
        assert shape.world <= gpus and (gpus == 8 or shape.world in (1, 4)), row
        assert batch * seq % shape.tp == 0 and sizes.get("num_hidden_layers", 2) % 2 == 0
        if row.peer:
            continue
        optimizer = {key: chosen.pop(key) for key in ("master", "moments") if key in chosen}
        assert set(optimizer.values()) <= {"fp32", "split"}
        options = Options.of(**chosen)
        K, H, I, E, matrices = EXPERTS[row.case.partition(":")[0]]
        assert candidates(Block(batch * seq, K, H, I, E, matrices), shape, options.plan, options.off), row


def test_each_optimisation_is_switched_alone():
    """From row to row of TED's plan one thing changes: CAC, DTD, the algebra."""
    rows = [Options.of(**mesh_runs.parse(f"ep=2,tp=2 {text}")[1]) for _, text in many_gpus.OPTIONS[1:5]]
    changes = [
        (a.off - b.off, {k for k in a.plan if a.plan[k] != b.plan[k]}) for a, b in zip(rows, rows[1:], strict=False)
    ]
    assert changes == [({"save_collectives"}, set()), (set(), {"drop"}), ({"simplify_collectives"}, set())]


def test_search_of_the_largest(monkeypatch):
    row = many_gpus.Row("ted:num_hidden_layers=?", "ep=8 zero=1 checkpoint=full")
    monkeypatch.setattr(many_gpus, "predicted_bytes", lambda case, *_: 1e9 * int(case.rpartition("=")[2]))
    for limit in (4, 10, 14, 40):
        results, tried = {}, []
        while step := many_gpus.largest(row, results, 15.1e9, ""):
            tried.append(int(step.case.rpartition("=")[2]))
            results[step] = {"step_ms": 1.0} if tried[-1] <= limit else {"error": "out of memory"}
        assert len(tried) == len(set(tried)) and tried[0] == 14
        assert {limit, limit + 2} <= set(tried)
    assert (
        many_gpus.largest(row, {many_gpus.Row("ted:num_hidden_layers=14", row.system): {"error": "x"}}, 1, "") is None
    )


def test_ted_parameters():
    """6.7B base, 40B with 16 experts in every second layer."""
    with torch.device("meta"):
        assert sum(p.numel() for p in ted.GPT(ted.Config()).parameters()) / 1e9 == pytest.approx(40, rel=0.03)
        assert sum(p.numel() for p in ted.GPT(ted.Config(num_experts=1)).parameters()) / 1e9 == pytest.approx(
            6.7, abs=0.1
        )


def test_predicted_memory_of_a_block_that_is_proven_narrow(monkeypatch):
    """Parameters and gradients (4 bytes), states (12) over the copies; and full widths, gigabytes, are never made: a
    cast that the proof's copy in fp32 does not need is no other code."""
    copied, copy = [], prove._copy
    monkeypatch.setattr(prove, "_copy", lambda *args: copied.append(args[2]) or copy(*args))
    case = "ted:num_hidden_layers=2,vocab_size=256,batch=1"
    found = many_gpus.predicted_bytes(case, "ep=2,tp=2 zero=1", "NVIDIA H100 80GB HBM3")
    assert copied and all(copied), "proven at full width"
    H = 4096
    experts, dense = 16 * 8 * H * H, (2 * 4 + 8) * H * H
    inputs, tables = 2048 * 2 * 2 * H, 2048 * H * 10
    assert found == pytest.approx(experts / 4 * 16 + dense / 2 * (4 + 12 / 2) + inputs + tables, rel=0.01)
