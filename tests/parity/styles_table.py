"""Every way to write an MoE block, as a table: python -m tests.parity.styles_table [--write tests/parity/STYLES.md]

All ranks of each mesh run in one process, in fp64 (tests/lockstep.py). The exit code is 1 when a style is not captured,
not recognised, not split over ep and tp, or not the plain module.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import io
import pathlib
import sys
import time

import pytest
import torch
from tabulate import tabulate

from tedcompile import layouts
from tedcompile.mesh import MeshShape
from tests import routers, styles
from tests.lockstep import distributed, parity, placements, targets
from tests.test_styles import BESIDE, batches

SIZES = [(1, 2, 2), (1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 1), (2, 1, 2), (1, 4, 1)]
MESHES = {sizes: MeshShape(*sizes) for sizes in SIZES}
HEADERS = ["", "style", "written as", "captured", "recognised", "experts split over", "parity", "dispatch", "reason"]
TITLES = {1: "loop", 2: "loop with control flow", 3: "capacity", 4: "dense", 5: "sorted, grouped products",
          6: "gathered weights", 7: "shapes, shared experts", 8: "routers"}  # fmt: skip


def row(name: str, make, meshes: list[tuple[int, int, int]]) -> tuple[list[str], bool]:
    """The cells of a style after its number, and whether all is well."""
    found: dict[str, list[str]] = {k: [] for k in ("captured", "recognised", "split", "parity", "dispatch", "reason")}
    text = (make.__doc__ or "").strip().split("\n")[0].rstrip(".") if isinstance(make, type) else ""
    for sizes in meshes:
        mesh, where = MESHES[sizes], "x".join(map(str, sizes))
        module = styles.build(make).double()
        inputs = batches(mesh["data"], module)
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                gm, ctx = distributed(module, inputs[0], mesh)
                other = distributed(module, inputs[0], mesh, own_plan=True)[0] if sizes == meshes[0] else gm
        except Exception as error:
            found["reason"].append(f"{where}: {str(error).splitlines()[0]}")
            continue
        found["captured"].append(where)
        why = [reason for n, reason in ctx.replicated if n.op != "placeholder"]
        found["reason"] += why
        if {"ted::permute", "ted::select"} & set(targets(gm)) and not why:
            found["recognised"].append(where)
        kinds = [n.meta["dispatch"] for n in other.graph.nodes if isinstance(n.meta.get("dispatch"), layouts.Dispatch)]
        found["dispatch"] += [k.kind for k in kinds if other is not gm]
        split = placements(gm)
        experts = {n for n, p in module.named_parameters() if not n.startswith(BESIDE) and "bias" not in n}
        for axis in ("ep", "tp"):
            if mesh[axis] > 1 and {n for n in experts if n != "scale"} <= {n for n, s in split.items() if axis in s}:
                found["split"].append(axis)
        patch = pytest.MonkeyPatch()
        try:
            parity(module, inputs, mesh, patch, (gm, ctx))
            found["parity"].append(where)
        except Exception as error:
            found["reason"].append(f"{where}: {str(error).splitlines()[0]}")
        patch.undo()
    good = all(len(found[k]) == len(meshes) for k in ("captured", "recognised", "parity")) and "ep" in found["split"]
    count = lambda k: "yes" if len(found[k]) == len(meshes) else f"{len(found[k])} of {len(meshes)}"
    unique = lambda k: ", ".join(dict.fromkeys(found[k]))
    cells = [name, text, count("captured"), count("recognised"), unique("split"), count("parity"), unique("dispatch")]
    return [*cells, "; ".join(dict.fromkeys(found["reason"]))], good


def markdown(rows: list[list[str]], failed: int, meshes: list[str], seconds: float) -> str:
    return "\n".join([
        "# Styles",
        "",
        f"{len(rows)} ways to write an MoE block, {failed} failed, in {seconds / 60:.0f} minutes on "
        f"{datetime.date.today()}; torch {torch.__version__}, all ranks of (dp, ep, tp) = {', '.join(meshes)} in "
        "one process, fp64: outputs within 1e-10, every gradient within 1e-9 of the plain module's. Made by `python "
        "-m tests.parity.styles_table --write tests/parity/STYLES.md`; each is in [styles.py](../styles.py) or "
        "[routers.py](../routers.py).",
        "",
        tabulate(rows, HEADERS, tablefmt="github", disable_numparse=True),
        "",
    ])  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--styles", nargs="+", metavar="STYLE", help="some of them only")
    parser.add_argument("--meshes", nargs="+", metavar="DPxEPxTP", default=["x".join(map(str, m)) for m in MESHES])
    parser.add_argument("--write", type=pathlib.Path, metavar="FILE", help="the markdown file to write")
    options = parser.parse_args()
    everything = {n: (styles.NUMBERS[n], m) for n, m in styles.STYLES.items()}
    everything |= {n: (8, m) for n, m in routers.ROUTERS.items()}
    meshes = [tuple(map(int, m.split("x"))) for m in options.meshes]
    rows, failed, start = [], 0, time.monotonic()
    for name, (number, make) in sorted(everything.items(), key=lambda item: item[1][0]):
        if options.styles and name not in options.styles:
            continue
        cells, good = row(name, make, meshes)
        rows.append([f"{number}. {TITLES[number]}", *cells])
        failed += not good
        print("  ".join(rows[-1]), flush=True)
        if options.write:
            options.write.write_text(markdown(rows, failed, options.meshes, time.monotonic() - start))
    print(f"{len(rows)} styles, {failed} failed, {time.monotonic() - start:.0f} s")
    return 1 if failed or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
