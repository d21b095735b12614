"""Writes the README's tables from benchmarks/results/*.json and tests/parity/*.md: python -m benchmarks.readme

The table of NAME.json goes between <!-- NAME --> and <!-- /NAME -->, that of styles and families between
<!-- recognised --> and <!-- /recognised -->.
"""

from __future__ import annotations

import functools
import json
import pathlib
import re

from tabulate import tabulate

HERE = pathlib.Path(__file__).parent
NAMES = {"forward_backward_ms": "forward + backward, ms", "step_ms": "step, ms",
         "tokens_per_s_per_gpu": "tokens/s per GPU", "of_one_gpu": "of one GPU's", "calls": "collectives a step",
         "ep_gib": "sent over ep (or ep x tp), GiB", "tp_gib": "sent over tp, GiB", "peak_gib": "peak memory, GiB",
         "first_step_s": "first step, s", "second_step_s": "second step, s",
         "fastest_ms": "fastest, ms", "predicted_ms": "predicted, ms", "time_ratio": "measured / predicted",
         "link_mib": "sent by a host, MiB", "predicted_link_mib": "predicted, MiB",
         "bytes_ratio": "bytes measured / predicted",
         "worst_loss_difference": "loss, 20 steps, against the first"}  # fmt: skip
# of mesh_runs.json, for the runs of one layer with options: measured, and predicted
OPTIONS = {"forward_backward_ms": "forward + backward, ms", "peak_gib": "peak memory, GiB",
           "communication_ms": "predicted: collectives, ms", "block_ms": "MoE block, ms", "replay_ms": "replay, ms",
           "saved_gib": "kept for the backward, GiB"}  # fmt: skip
# of many_gpus.json, after those of NAMES
MANY = ("step_ms", "tokens_per_s_per_gpu", "peak_gib", "worst_loss_difference")
MANY_GPUS = {name: NAMES[name] for name in MANY} | {
    "tflops_per_gpu": "TFLOP/s per GPU", "mfu": "MFU", "forward_backward_ms": NAMES["forward_backward_ms"],
    "predicted_ms": NAMES["predicted_ms"], "nccl_ms": "in NCCL, ms", "communication_ms": "collectives, predicted, ms",
    "bytes_ratio": NAMES["bytes_ratio"],
}  # fmt: skip
# of train_step.json
TRAIN = {name: NAMES[name] for name in ("forward_backward_ms", "peak_gib")} | {
    "step_ms": "step with AdamW, ms", "step_peak_gib": "its peak memory, GiB",
} | {name: NAMES[name] for name in ("tokens_per_s_per_gpu", "first_step_s", "worst_loss_difference")}  # fmt: skip
# of zero.json
STAGES = {name: NAMES[name] for name in ("step_ms", "forward_backward_ms")} | {
    "held_gib": "kept, GiB", "formula_gib": "by the formula, GiB", "peak_gib": NAMES["peak_gib"],
    "worst_loss_difference": "loss, 10 steps, against zero=0",
}  # fmt: skip
LAYERS = ("qwen3_layer", "mixtral_layer")
SYSTEMS = {"hf_eager": "Hugging Face, grouped_mm", "hf_compile": "Hugging Face, grouped_mm + torch.compile"}


def steps(name: str, columns: dict[str, str] = NAMES, layers: bool = False) -> str:
    rows: dict[tuple[str, str], dict[str, float]] = {}
    for entry in json.loads((HERE / "results" / f"{name}.json").read_text()):
        if (entry["case"] in LAYERS) == layers:
            rows.setdefault((entry["case"], entry["system"]), {})[entry["metric"]] = entry["value"]
    metrics = [metric for metric in columns if any(metric in found for found in rows.values())]
    lines = [
        [case, SYSTEMS.get(system, system), *map(_show, map(found.get, metrics))]
        for (case, system), found in rows.items()
    ]
    return tabulate(lines, ["model", "system", *map(columns.get, metrics)], tablefmt="github", disable_numparse=True)


def moe_layer() -> str:
    rows: dict[str, dict[tuple[str, str], float]] = {}
    for entry in json.loads((HERE / "results" / "moe_layer.json").read_text()):
        rows.setdefault(entry["case"], {})[entry["system"], entry["metric"]] = entry["value"]
    names = list(dict.fromkeys(system for found in rows.values() for system, _ in found))
    saved = [n for n in names if any((n, "saved") in found for found in rows.values())]
    lines = [
        [*case.split(), *(_show(found.get((n, "throughput"))) for n in names)]
        + [_show(found.get((n, "saved"))) for n in saved]
        for case, found in rows.items()
    ]
    headers = ["layer", "tokens", "routing", *names, *(f"kept, GiB: {n}" for n in saved)]
    return tabulate(lines, headers, tablefmt="github", disable_numparse=True)


def many_gpus() -> str:
    entries = json.loads((HERE / "results" / "many_gpus.json").read_text())
    failed = [f"`{e['case']} {e['system']}`: {e['value'].strip().splitlines()[-1]}" for e in entries
              if e["metric"] == "error"]  # fmt: skip
    intro = "On four and eight GPUs (`python -m benchmarks.many_gpus`; its first lines say what is checked):"
    return "\n\n".join([intro, steps("many_gpus", MANY_GPUS), *(["Failed: " + "; ".join(failed) + "."] * bool(failed))])


def train_gpu() -> str:
    found = json.loads((HERE / "results" / "train_gpu.json").read_text())
    lines = [[what, f"{check['value']:.2g}", f"{check['limit']:g}"] for what, check in found["checks"].items()]
    return tabulate(lines, ["checked", "found", "at most"], tablefmt="github", disable_numparse=True)


# column of the optimizer's table -> metric and format
STEP = {"step, ms": ("step_ms", "{:.1f}"), "of copy bandwidth": ("of_copy", "{:.0%}"),
        "extra memory, GiB": ("extra_gib", "{:.2f}"), "CPU time, ms": ("cpu_ms", "{:.1f}")}  # fmt: skip


def optimizer() -> str:
    rows: dict[tuple[str, str], dict[str, float]] = {}
    for entry in json.loads((HERE / "results" / "optimizer.json").read_text()):
        rows.setdefault((entry["case"], entry["system"]), {})[entry["metric"]] = entry["value"]
    lines = [
        [case, system, *(form.format(found[metric]) for metric, form in STEP.values())]
        for (case, system), found in rows.items()
        if "cpu_ms" in found
    ]
    return tabulate(lines, ["parameters", "system", *STEP], tablefmt="github", disable_numparse=True)


def _show(value: float | None) -> str:
    if value is None:
        return "-"
    return (
        f"{value:,.0f}" if value >= 1000 or isinstance(value, int) else f"{value:.1f}" if value >= 1 else f"{value:.2g}"
    )


# column of the table -> format of a row of paper.json
PAPER: dict[str, dict[str, str]] = {
    "ted": {
        "tp": "{tp}", "ranks a node": "{ranks_per_node}", "micro-batch": "{micro_batch}",
        "without, s": "{without_s:.1f}", "DTD, s": "{drop_only_s:.1f}", "CAC, s": "{save_only_s:.1f}",
        "both, s": "{with_s:.1f}",
        "all-to-all bytes": "{all_to_all_pct:+.1f} %", "all-reduce bytes": "{all_reduce_pct:+.1f} %",
        "predicted gain": "{gain_pct:.1f} %", "paper": "{paper_pct:.0f} %",
        "residual, points": "{residual_points:+.1f}",
    },
    "parm": {
        "GPUs": "{gpus}", "k x capacity": "{rows}", "before the gate, ms": "{before_ms:.3f}",
        "after, ms": "{after_ms:.3f}", "Parm's schedules: faster": "{chosen}", "tedcompile's block: faster": "{ours}",
    },
    "monta": {
        "tokens": "{T}", "all-to-all alone, faster by": "{all_to_all_ratio:.1f}",
        "with its gathers, best chunks": "{moved_ratio:.1f}", "not dropped, ms": "{whole_ms:.2f}",
        "1 chunk": "{chunks_1_ms:.2f}", "2": "{chunks_2_ms:.2f}", "4": "{chunks_4_ms:.2f}", "8": "{chunks_8_ms:.2f}",
        "chunks chosen": "{chosen_chunks}",
    },
}  # fmt: skip


def paper(part: str) -> str:
    found = json.loads((HERE / "results" / "paper.json").read_text())[part]
    rows = [[form.format(**row) for form in PAPER[part].values()] for row in found["rows"]]
    text = tabulate(rows, list(PAPER[part]), tablefmt="github", disable_numparse=True)
    return f"{text}\n\nAssumed: {'; '.join(found['assumptions'])}."


PARITY = HERE.parent / "tests" / "parity"
COLUMNS = ["", "number", "captured", "recognised", "experts split over ep", "same losses and gradients"]


def written(name: str) -> list[dict[str, str]]:
    """The rows of the table of a markdown file."""
    lines = [line for line in (PARITY / name).read_text().splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [dict(zip(cells[0], row, strict=True)) for row in cells[2:]]


def recognised() -> str:
    """Styles by kind and families, in numbers; the families by name, and those that fail, by reason."""
    kinds: dict[str, list[dict[str, str]]] = {}
    for row in written("STYLES.md"):
        kinds.setdefault(row[""].partition(". ")[2], []).append(row)
    lines = [
        [kind, len(rows), *(sum(r[k] == "yes" for r in rows) for k in ("captured", "recognised")),
         sum("ep" in r["experts split over"] for r in rows), sum(r["parity"] == "yes" for r in rows)]
        for kind, rows in kinds.items()
    ]  # fmt: skip
    families = written("FAMILIES.md")
    trained = [r for r in families if r["result"] != "cannot"]
    passed = [r for r in trained if r["result"].startswith("pass")]
    split = sum(r["captured"] == "yes" and len(set(r["experts over ep"].split(" of "))) == 1 for r in trained)
    lines.append(["families of transformers", len(trained), *(sum(r[k] == "yes" for r in trained)
                  for k in ("captured", "recognised")), split, len(passed)])  # fmt: skip
    names = ", ".join(r["model type"] for r in passed)
    text = [
        tabulate(lines, COLUMNS, tablefmt="github"),
        "",
        f"{len(passed)} of {len(trained)} families pass: {names}.",
        "",
    ]
    for what, verdict in (("Those that do not", "FAILED"), ("transformers itself cannot train", "cannot")):
        if rows := [r for r in families if r["result"] == verdict]:
            text += [f"{what}:", "", *(f"- {r['model type']}: {r['reason']}" for r in rows), ""]
    return "\n".join(text).rstrip()


def main() -> None:
    readme = HERE.parent / "README.md"
    text = readme.read_text()
    tables = {
        name: functools.partial(steps, name) for name in ("mesh_runs", "communication", "slow_link", "compile_time")
    }
    tables["train_step"] = functools.partial(steps, "train_step", TRAIN)
    tables["optimizer"] = optimizer
    tables["train_gpu"] = train_gpu
    tables["many_gpus"] = many_gpus
    tables["moe_layer"] = moe_layer
    tables["zero"] = functools.partial(steps, "zero", STAGES)
    tables["mesh_runs_options"] = functools.partial(steps, "mesh_runs", OPTIONS, layers=True)
    tables["recognised"] = recognised
    tables |= {f"paper_{part}": functools.partial(paper, part) for part in PAPER}
    for name, table in tables.items():
        files = {"paper": "paper", "mesh": "mesh_runs"}
        source = HERE / "results" / f"{files.get(name.partition('_')[0], name)}.json"
        if (source if name != "recognised" else PARITY / "FAMILIES.md").exists():
            begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
            text = re.sub(f"(?s){begin}.*{end}", lambda _: f"{begin}\n{table()}\n{end}", text)  # noqa: B023
    readme.write_text(text)


if __name__ == "__main__":
    main()
