"""Papers' results beside what the cost model predicts for their settings: python -m benchmarks.paper

Nothing is run and no constant is fitted to a paper: machines are entries of tedcompile/machines.toml, bytes the
formulas of tedcompile/volumes.py. What a paper does not say, or is not known to us, is listed as an assumption.
Writes benchmarks/results/paper.json; python -m benchmarks.readme puts the tables into the README.
"""

from __future__ import annotations

import json
import pathlib
from typing import Any

from tedcompile import volumes
from tedcompile.cost import Block, Candidate, choose, predict
from tedcompile.machines import Link, Machine, load, place
from tedcompile.mesh import MeshShape
from tedcompile.volumes import evaluate

RESULTS = pathlib.Path(__file__).parent / "results" / "paper.json"

# ---- DeepSpeed-TED's 40B model (arXiv 2303.06318): 26 % with DTD and CAC ---------------------------------------------

PAPER_GAIN = 26.0  # per cent, from the abstract; which tp it was is not known to us
TED = dict(layers=32, H=4096, heads=32, S=2048, E=16, K=1, V=50257, G=128)
TED_ASSUMPTIONS = (
    "1,024 sequences a step (GPT-3 6.7B's 2M tokens), in micro-batches of one sequence, gradients accumulated",
    "top-1 gate, capacity factor 1, balanced routing, ep = 16, plain FFN of 4 x hidden, vocabulary 50,257",
    "4 ranks a node for tp 4 (groups of 4 do not fill nodes of 6), 6 for tp 2; both also the other way",
    "no overlap of communication with compute or of collectives with each other",
    "memory-bound work: the activations of Korthikanti et al. (arXiv 2205.05198, section 4), written and read once",
    "the gain is time before / time after - 1",
)


def ted_step(tp: int, drop: bool, save: bool, ranks_per_node: int, micro: int = 1) -> dict[str, float]:
    """Predicted seconds of one training step by term; `micro`: sequences in a micro-batch of one data rank."""
    machine = load("v100", ranks_per_node=ranks_per_node)
    mesh = MeshShape(TED["G"] // (tp * TED["E"]), TED["E"], tp)
    H, S, T = TED["H"], TED["S"], micro * TED["S"]
    values = dict(T=T, K=TED["K"], H=H, I=4 * H, E=TED["E"], bytes=2) | mesh.as_dict()
    half = TED["layers"] // 2

    # products: 4 forwards' worth with full checkpointing, 3 of the head, which is not recomputed
    attention = 4 * machine.product(8 * H * H * T / tp, T, H / tp, 2) + 4 * machine.product(
        4 * S * H * T / tp, S, 128, 2
    )
    ffn = 4 * machine.product(16 * H * H * T / tp, T, H, 2)  # an expert's rows: T, with one expert on a rank
    head = 3 * machine.product(2 * H * TED["V"] * T / tp, T, H, 2)
    gemm = TED["layers"] * (attention + ffn) + head
    kept = S * H * micro * (10 + 24 / tp) + 5 * TED["heads"] * S * S * micro / tp
    memory = TED["layers"] * 4 * 2 * kept / machine.copy

    terms = dict(gemm=gemm, memory=memory, all_to_all=0.0, all_reduce=0.0, all_gather=0.0, latency=0.0)
    for layer in (volumes.ted_layer(drop, save, moe=False), volumes.ted_layer(drop, save, moe=True)):
        for c in layer:
            start, transfer = machine.collective(c.kind, evaluate(c.bytes, values), place(c.axis, mesh, machine))
            terms[c.kind] += half * transfer
            terms["latency"] += half * (start + machine.launch)
    steps = 1024 // (mesh["data"] * micro)
    terms = {name: steps * seconds for name, seconds in terms.items()}

    # once a step: gradients (ZeRO-1: reduce-scatter and all-gather of parameters, as many bytes as an all-reduce)
    dense = (TED["layers"] * 4 * H * H + half * 8 * H * H + TED["V"] * H) / tp
    expert = half * 8 * H * H * TED["E"] / (mesh.ep * tp)
    gradients = 0.0
    for axis, parameters in (("data", dense), ("dp", expert)):
        gradients += sum(machine.collective("all_reduce", 2 * parameters, place(axis, mesh, machine)))
    optimizer = 28 * (dense / mesh["data"] + expert / mesh.dp) / machine.copy
    return terms | dict(gradients=gradients, optimizer=optimizer)


def ted() -> list[dict[str, Any]]:
    rows = []
    for tp, ranks, micro in ((2, 6, 1), (4, 4, 1), (2, 4, 1), (4, 6, 1), (2, 6, 4), (4, 4, 4)):
        before = ted_step(tp, False, False, ranks, micro)
        after = ted_step(tp, True, True, ranks, micro)
        plain, both = sum(before.values()), sum(after.values())
        gain = 100 * (plain / both - 1)
        rows.append({
            "tp": tp, "ranks_per_node": ranks, "micro_batch": micro, "without_s": plain, "with_s": both,
            "drop_only_s": sum(ted_step(tp, True, False, ranks, micro).values()),
            "save_only_s": sum(ted_step(tp, False, True, ranks, micro).values()),
            "all_to_all_pct": _change("all_to_all", tp), "all_reduce_pct": _change("all_reduce", tp),
            "gain_pct": gain, "paper_pct": PAPER_GAIN, "residual_points": gain - PAPER_GAIN,
            "terms_without_s": before, "terms_with_s": after,
        })  # fmt: skip
    return rows


def _change(kind: str, tp: int) -> float:
    """Per cent by which DTD and CAC change a layer's bytes."""
    before, after = (volumes.total(volumes.ted_layer(on, on), kind) for on in (False, True))
    return 100 * (evaluate(after / before, dict(tp=tp)) - 1)


# ---- DeepSpeed-TED's memory bound -----------------------------------------------------------------------------------


def memory() -> list[dict[str, Any]]:
    values = dict(P=6.7e9, E=16, G=128)
    return [{"tp": tp, "gb": evaluate(volumes.MEMORY, values | {"tp": tp}) / 1e9} for tp in (1, 2, 4, 8)]


# ---- Parm (arXiv 2407.00599): slice tokens before or after the gate --------------------------------------------------

PARM_ASSUMPTIONS = (
    "only the abstract was at hand: one 8-GPU server and a 32-GPU cluster; the schedules' formulas are inferred",
    "machine a100, nodes of 8, tp 2, ep the rest; T 2,048 tokens, H 1,024, E 32; rows: k x capacity factor x T",
    "the gather of rows (after the gate) runs under the last all-to-all where they use different links",
)


def parm_times(mesh: MeshShape, machine: Machine, rows: float, T: int = 2048, H: int = 1024, E: int = 32) -> dict:
    """Predicted forward seconds of both schedules; `rows` = k x capacity factor."""
    values = dict(T=T, K=rows, H=H, I=4 * H, E=E, bytes=2) | mesh.as_dict()
    found = {}
    for name, before in (("before", True), ("after", False)):
        tokens = T / mesh.tp if before else T
        gate = machine.product(2 * H * E * tokens, tokens, E, 2)
        to, home, gather = (
            sum(machine.collective(c.kind, evaluate(c.bytes, values), place(c.axis, mesh, machine)))
            for c in volumes.parm_layer(before)
        )
        ep = place("ep", mesh, machine)
        apart = not before and ep.inside < ep.size
        found[name] = gate + to + (max(home, gather) if apart else home + gather)
    return found


def parm() -> list[dict[str, Any]]:
    machine = load("a100")
    rows = []
    for gpus in (8, 32):
        mesh = MeshShape(1, gpus // 2, 2)
        for factor in (0.5, 1, 2, 4):
            times = parm_times(mesh, machine, factor)
            row = {"gpus": gpus, "rows": factor, "before_ms": 1e3 * times["before"], "after_ms": 1e3 * times["after"]}
            row["chosen"] = min(times, key=times.__getitem__)
            row["ours"] = "-"
            if factor >= 1:
                block = Block(2048, int(factor), 1024, 4096, 32, matrices=2, aux=True)
                plan = {"experts": "tensor", "dispatch": "all_to_all"}
                dropped = [p for p in choose(block, mesh, machine, plan).all if p.candidate.drop]
                row["ours"] = dropped[0].candidate.drop_point.removesuffix("_gate")
            rows.append(row)
    return rows


# ---- MoNTA (arXiv 2411.00662): chunks of all-to-all between and all-gather inside nodes ------------------------------

MONTA_ASSUMPTIONS = (
    "only the abstract was at hand: 2 x 70B on 16 A800, 8K sequence, tp 8, all-to-all 8 x faster, step 13 % shorter",
    "H 8,192, I 28,672, 2 experts, top-1, one sequence; ep 2 across two nodes of 8",
    "A800: a100 with NVLink of 200 GB/s per direction (datasheet), 77 % of it; the network as a100's",
)


def monta_machine() -> Machine:
    return load("a100", intra=Link(5e-6, 0.77 * 200e9))


def monta() -> list[dict[str, Any]]:
    machine, mesh, rows = monta_machine(), MeshShape(1, 2, 8), []
    plan = {"experts": "tensor", "dispatch": "all_to_all"}
    for T in (256, 2048, 8192, 32768):
        block = Block(T, 1, 8192, 28672, 2)
        whole = predict(block, Candidate(), mesh, machine)
        cut = {n: predict(block, Candidate(drop=True, chunks=n), mesh, machine) for n in (1, 2, 4, 8)}
        moved = lambda p: 1e3 * sum(p.term(name) for name in ("all_to_all", "tp", "latency", "hidden"))
        best = choose(block, mesh, machine, plan).best
        rows.append({
            "T": T, "all_to_all_ratio": whole.term("all_to_all") / cut[1].term("all_to_all"),
            "moved_ratio": moved(whole) / min(map(moved, cut.values())), "whole_ms": moved(whole),
            **{f"chunks_{n}_ms": moved(p) for n, p in cut.items()},
            "chosen_chunks": best.candidate.chunks if best.candidate.drop else 0,
            "block_gain_pct": 100 * (whole.seconds / best.seconds - 1),
        })  # fmt: skip
    return rows


def main() -> None:
    found = {
        "ted": {"assumptions": TED_ASSUMPTIONS, "rows": ted()},
        "memory": {"assumptions": ("6.7B base, 16 experts, 128 devices, ZeRO-1",), "rows": memory()},
        "parm": {"assumptions": PARM_ASSUMPTIONS, "rows": parm()},
        "monta": {"assumptions": MONTA_ASSUMPTIONS, "rows": monta()},
    }
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
