"""What each optimisation leaves of a training step's communication, by `explain`: python -m benchmarks.communication

Qwen3-30B's type at its default configuration and Mixtral-8x7B on ep=2, tp=2, one sequence of 2,048 tokens in bf16,
every layer replayed in the backward (checkpoint="full"). Bytes that one rank sends in a step, gradients of parameters
aside. Writes benchmarks/results/communication.json; no GPU and no process group is needed.
"""

from __future__ import annotations

import datetime
import json
import pathlib

import torch
import transformers

import tedcompile
from tedcompile.load import load

TED = dict(experts="tensor", dispatch="all_to_all")
OPTIMISATIONS: dict[str, dict] = {  # under TED's plan, each with those before it
    "none of them": dict(plan=TED | {"drop": "no"}, off=["save_collectives", "simplify_collectives"]),
    "+ CAC (save_collectives)": dict(plan=TED | {"drop": "no"}, off=["simplify_collectives"]),
    "+ DTD (drop_duplicates)": dict(plan=TED | {"drop": "yes"}, off=["simplify_collectives"]),
    "+ algebra (simplify_collectives)": dict(plan=TED | {"drop": "yes"}),
}
SYSTEMS = OPTIMISATIONS | {"+ the cost model's plan (H200)": {}}


def main() -> None:
    facts = {
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "gpu": None, "clock_mhz": None, "date": datetime.date.today().isoformat(),
    }  # fmt: skip
    rows = []
    for case in ("qwen3_moe", "mixtral"):
        model, _ = load(case)
        for system, options in SYSTEMS.items():
            found = tedcompile.explain(model, "ep=2,tp=2", checkpoint="full", **options)["collectives"]
            sent = {"tp": 0.0, "ep": 0.0}
            calls = 0
            for row in found:
                if row["role"] != "gradient":
                    axis = "tp" if row["axis"] == "tp" else "ep"
                    sent[axis] += row["count"] * row["wire_bytes"] / 2**30
                    calls += row["count"]
            for metric, value, unit in (
                ("calls", calls, "1"), ("ep_gib", sent["ep"], "GiB"), ("tp_gib", sent["tp"], "GiB"),
            ):  # fmt: skip
                rows.append({"benchmark": "communication", "case": case, "system": system, "metric": metric,
                             "value": value, "unit": unit, **facts})  # fmt: skip
            print(case, system, calls, {k: round(v, 2) for k, v in sent.items()}, flush=True)
    out = pathlib.Path(__file__).parent / "results" / "communication.json"
    out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
