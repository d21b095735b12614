"""Writes the README's table of measured numbers from benchmarks/results/*.json: python -m benchmarks.readme"""

from __future__ import annotations

import json
import pathlib
import re

from tabulate import tabulate

HERE = pathlib.Path(__file__).parent
NAMES = {"forward_backward_ms": "forward + backward, ms", "tokens_per_s_per_gpu": "tokens/s per GPU",
         "peak_gib": "peak memory, GiB", "first_step_s": "first step, s",
         "worst_loss_difference": "loss, 20 steps, against HF eager"}  # fmt: skip
SYSTEMS = {"hf_eager": "Hugging Face, grouped_mm", "hf_compile": "Hugging Face, grouped_mm + torch.compile"}


def table() -> str:
    rows: dict[tuple[str, str], dict[str, float]] = {}
    for entry in json.loads((HERE / "results" / "train_step.json").read_text()):
        rows.setdefault((entry["case"], entry["system"]), {})[entry["metric"]] = entry["value"]
    lines = [
        [case, SYSTEMS.get(system, system), *map(_show, map(found.get, NAMES))]
        for (case, system), found in rows.items()
    ]
    return tabulate(lines, ["model", "system", *NAMES.values()], tablefmt="github", disable_numparse=True)


def _show(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if value >= 1 else f"{value:.2g}"


def main() -> None:
    readme = HERE.parent / "README.md"
    begin, end = "<!-- train_step -->", "<!-- /train_step -->"
    text = re.sub(f"(?s){begin}.*{end}", lambda _: f"{begin}\n{table()}\n{end}", readme.read_text())
    readme.write_text(text)


if __name__ == "__main__":
    main()
