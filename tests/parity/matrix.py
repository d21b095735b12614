"""The whole product of models, meshes and scenarios: python -m tests.parity.matrix [--write tests/parity/MATRIX.md]

With --optimisations, that of models and of what can be switched off or forced. Prints a row for each case as it ends;
the exit code is 1 when a case fails.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import pathlib
import sys
import time

import torch
from tabulate import tabulate

from tests import models
from tests.parity.harness import OPTIONS, SCENARIOS, STEPS, Case, Pool

SMALL_MESHES = [mesh for mesh in itertools.product((1, 2), repeat=3) if mesh != (2, 2, 2)]
LARGE_MESHES = [(1, 4, 2), (2, 2, 2), (1, 2, 4)]
LARGE_MODELS = ["qwen3_moe", "deepseek_v3"]
HEADERS = [
    "model",
    "dp x ep x tp",
    "scenario",
    "backend",
    "options",
    "loss",
    "gradient",
    "update",
    "held",
    "experts",
    "s",
    "result",
]
WIDTHS = (18, 12, 17, 8, 12, 8, 8, 8, 5, 7, 6, 6)


def product() -> list[Case]:
    """Every model on every mesh in every scenario that the mesh can show; each option once, for the models in turn."""
    pairs = [(model, mesh) for mesh in SMALL_MESHES for model in models.BASE]
    pairs += [(model, mesh) for mesh in LARGE_MESHES for model in LARGE_MODELS]
    cases = [Case(model, mesh, name) for model, mesh in pairs for name, s in SCENARIOS.items() if s.needs(*mesh)]
    cases += [Case(model, mesh) for mesh in SMALL_MESHES for model in models.VARIANTS]
    cases += [Case(model, (1, 1, 4), "few_tokens") for model in models.BASE]
    cases += [Case(model, (1, 4, 1), "ep_equals_experts") for model in models.BASE]
    cases += [Case("qwen3_moe_kv2", (1, 1, 4))]
    cases += [Case(model, (1, 2, 2), backend="inductor") for model in models.BASE]
    turns = itertools.cycle(models.BASE)
    cases += [Case(next(turns), (1, 2, 2), options=options) for options in filter(None, OPTIONS)]
    return sorted(cases, key=lambda case: case.world)


def optimisations() -> list[Case]:
    """Every option with every model, on the large meshes and compiled with some of them in turn."""
    cases = []
    for i, options in enumerate(filter(None, OPTIONS)):
        combined = len(OPTIONS[options]) > 1 and "off" in OPTIONS[options]  # with what other options show alone
        base = list(models.BASE)[i % 2 :: 2] if combined else models.BASE
        cases += [Case(model, (1, 2, 2), options=options) for model in base]
        if "plan" in OPTIONS[options] and "full" not in options:
            cases += [Case(("nano_moe", "qwen3_moe")[i % 2], (1, 2, 4), "few_tokens", options=options)]
        else:
            cases += [Case(LARGE_MODELS[i % 2], LARGE_MESHES[i % 3], options=options)]
        if i % 6 == 0:
            cases += [Case("qwen3_moe", (1, 2, 2), backend="inductor", options=options)]
    return sorted(cases, key=lambda case: case.world)


def row(case: Case, result: dict) -> list[str]:
    numbers = [""] * 5
    if "loss_error" in result:
        errors = (result["loss_error"], result["worst_gradient"][1], result["worst_update"][1])
        fractions = (result["param_fraction"], result["expert_fraction"])
        numbers = [*(f"{e:.1e}" for e in errors), *(f"{f:.0%}" for f in fractions)]
    name = [case.model, " x ".join(map(str, case.mesh)), case.scenario, case.backend, case.options]
    return [*name, *numbers, f"{result['seconds']:.1f}", "ok" if result["ok"] else "FAILED"]


def line(cells: list[str]) -> str:
    return "  ".join(cell.ljust(width) for cell, width in zip(cells, WIDTHS))


def markdown(rows: list[list[str]], failures: list[str], seconds: float) -> str:
    import transformers

    lines = [
        "# Parity matrix",
        "",
        f"{len(rows)} cases, {len(failures)} failed, in {seconds / 60:.0f} minutes on {datetime.date.today()}; "
        f"torch {torch.__version__}, transformers {transformers.__version__}, gloo processes on a CPU, fp32, "
        f"{STEPS} steps of plain SGD. Made by `python -m tests.parity.matrix --write tests/parity/MATRIX.md`.",
        "",
        "loss, gradient, update: the largest relative errors against the plain model in one process (limits 1e-6, 1e-5,"
        " 1e-5). held, experts: the part of all parameters, and of the experts, that one rank holds.",
        "",
        tabulate(rows, HEADERS, tablefmt="github", disable_numparse=True),
    ]
    if failures:
        lines += ["", "## Failures", "", "```", *failures, "```"]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=models.MODELS, metavar="MODEL", default=list(models.MODELS))
    parser.add_argument("--meshes", nargs="+", metavar="DPxEPxTP", help="such as 1x2x2")
    parser.add_argument("--scenarios", nargs="+", choices=SCENARIOS, metavar="SCENARIO", default=list(SCENARIOS))
    parser.add_argument("--backends", nargs="+", choices=("eager", "inductor"), default=["eager", "inductor"])
    parser.add_argument("--options", nargs="+", choices=OPTIONS, metavar="OPTIONS")
    parser.add_argument("--optimisations", action="store_true", help="the product of options and models instead")
    parser.add_argument("--write", type=pathlib.Path, metavar="FILE", help="the markdown file to write")
    options = parser.parse_args()

    cases = [
        case
        for case in (optimisations() if options.optimisations else product())
        if case.model in options.models
        and (not options.meshes or "x".join(map(str, case.mesh)) in options.meshes)
        and case.scenario in options.scenarios
        and case.backend in options.backends
        and (not options.options or case.options in options.options)
    ]
    rows, failures, start = [], [], time.monotonic()
    print(line(HEADERS), flush=True)
    for world, group in itertools.groupby(cases, key=lambda case: case.world):
        with Pool(world) as pool:
            for case in group:
                (result,) = pool.run([case])
                rows.append(row(case, result))
                print(line(rows[-1]), flush=True)
                if not result["ok"]:
                    failures.append(f"{case}\n{result['message']}\n")
                    print(result["message"], flush=True)
                if options.write:
                    options.write.write_text(markdown(rows, failures, time.monotonic() - start))
    print(f"{len(rows)} cases, {len(failures)} failed, {time.monotonic() - start:.0f} s")
    return 1 if failures or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
