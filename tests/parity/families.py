"""A parity row for every text MoE family of the installed transformers, on (dp, ep, tp) = (1, 2, 2).

python -m tests.parity.families [--models NAME ...] [--write tests/parity/FAMILIES.md]

Prints a row for each family as it ends; the exit code is 1 when more than a tenth of the families that transformers
itself can train does not pass.
"""

from __future__ import annotations

import argparse
import datetime
import pathlib
import re
import sys
import time
from dataclasses import dataclass, field

import torch
from tabulate import tabulate

from tedcompile import compare, shrink
from tests import families, models
from tests.families import Family
from tests.parity import harness
from tests.parity.harness import GRADIENT_TOLERANCE, LEARNING_RATE, LOSS_TOLERANCE, STEPS, Case, Pool

MESH = tuple(families.MESH.as_dict().values())
PART = 0.9  # of the families, which must pass
HEADERS = ["model type", "class", "captured", "recognised", "experts over ep", "dense over tp", "loss", "gradient",
           "update", "s", "result", "reason"]  # fmt: skip
RESULT = HEADERS.index("result")
TEXT = """A family passes where its model is captured, all of its MoE blocks are recognised and proven, every expert
weight is sharded over ep, attention or MLP weights are sharded over tp, and losses (1e-6), gradients (1e-5) and
updates (1e-5) are those of the plain model. Some small models are more sensitive than that: moving every weight of
the plain model by one rounding (2^-24), or computing in fp64, changes its losses, gradients or updates by more than
these limits. There twice the change is the limit (each of two programs may be that far from the exact one), and the
row says "pass (sensitive)" and how large it is. experts over ep: of the experts' weights; dense over tp: the number
of other matrices, embeddings and heads aside. Families are those that transformers' mappings of causal and
sequence-to-sequence language models name, whose configuration counts experts and whose weights grow with their
number, by matrices; they are shrunk by rules on the names of configuration fields. "cannot": transformers cannot
build or train the family from a small configuration; these are not counted."""


@dataclass(frozen=True)
class FamilyCase(Case):
    timeout = 900.0


@dataclass
class Seen:
    """What capture and passes make of a family's model, in one process; `usable` is transformers' own part."""

    usable: bool = False
    captured: bool = False
    recognised: bool = False
    experts: tuple[int, int] = (0, 0)  # weights sharded over ep, of all
    dense: int = 0  # matrices sharded over tp
    reasons: list[str] = field(default_factory=list)

    @property
    def whole(self) -> bool:
        return self.recognised and self.experts[0] == self.experts[1] > 0 and self.dense > 0


def look(family: Family) -> Seen:
    from tedcompile import pipeline
    from tedcompile.capture import bind, capture
    from tedcompile.mesh import MeshShape
    from tedcompile.runtime import plain, select_outputs

    seen = Seen(reasons=[family.unusable])
    if family.unusable:
        return seen
    model, make_batch = families.build(family.name)
    batch = make_batch(0, 0)
    try:
        models.loss_of(models.plain(model)(**batch)).backward()
        seen.usable = True
        with plain(model):
            captured = capture(model, bind(model.forward, (), batch))
            select_outputs(captured, model, True, ())
        seen.captured = captured.refusal is None
        ctx = pipeline.Context(MeshShape(*MESH))
        gm = pipeline.run_forward(captured, ctx)
    except Exception as error:
        seen.reasons = [str(error)]
        return seen
    seen.captured = True
    split = pipeline.placements(gm)
    over_ep = [n for n in family.experts if "ep" in split.get(n, {})]
    seen.experts = (len(over_ep), len(family.experts))
    seen.dense = sum(
        "tp" in split.get(n, {}) and p.dim() == 2 and n not in family.experts and shrink.VOCAB not in p.shape
        for n, p in model.named_parameters()
    )
    # other products than those of the experts, such as those of heads, may stay as written
    stays = [pipeline.where(n) + "." for n, _ in ctx.replicated if n.op != "placeholder"]
    seen.recognised = bool(over_ep) and not any(n.startswith(path) for n in family.experts for path in stays)
    seen.reasons = [] if seen.whole else [f"{pipeline.where(n)}: {r}" for n, r in ctx.replicated]
    return seen


def sensitivity(family: Family) -> dict[str, float]:
    """How much losses, gradients and updates of the plain model change by other rounding."""
    case, data_world = (f"hf:{family.name}", "plain", models.EXPERTS), MESH[0] * MESH[1]
    of = harness.train_plain(*case, data_world)
    own = compare.sensitivity(*harness.build(*case), data_world, STEPS, LEARNING_RATE, of, GRADIENT_TOLERANCE)
    return {"loss": own.loss, "gradient": max(own.gradients.values()), "update": max(own.updates.values())}


def judge(family: Family, seen: Seen, result: dict) -> tuple[str, str]:
    """The verdict, and the reason where it is not plainly a pass."""
    if not seen.usable:
        return "cannot", "; ".join(seen.reasons)
    if seen.whole and result.get("ok"):
        return "pass", ""
    wrong = [
        w for line in result.get("message", "").splitlines() for w in re.sub("^rank [0-9, ]+: ", "", line).split("; ")
    ]
    if seen.whole and wrong and all(re.match("(loss|(gradient|update) of .*) differs by", w) for w in wrong):
        own = sensitivity(family)
        worst = {"loss": result["loss_error"], **{w: result[f"worst_{w}"][1] for w in ("gradient", "update")}}
        limits = {"loss": LOSS_TOLERANCE, "gradient": GRADIENT_TOLERANCE, "update": GRADIENT_TOLERANCE}
        if all(worst[what] <= max(limits[what], 2 * own[what]) for what in worst):
            return "pass (sensitive)", ", ".join(f"{what} {limit:.1e}" for what, limit in own.items())
    return "FAILED", "; ".join(dict.fromkeys([*seen.reasons, *wrong[-3:]]))


def row(family: Family, seen: Seen, result: dict, began: float) -> list[str]:
    numbers = ["", "", ""]
    if "loss_error" in result:
        found = (result["loss_error"], result["worst_gradient"][1], result["worst_update"][1])
        numbers = [f"{e:.1e}" for e in found]
    verdict, reason = judge(family, seen, result)
    return [
        family.name,
        family.title,
        "yes" if seen.captured else "no",
        "yes" if seen.recognised else "no",
        "{} of {}".format(*seen.experts) if seen.captured else "",
        str(seen.dense) if seen.captured else "",
        *numbers,
        f"{time.monotonic() - began:.0f}",
        verdict,
        " ".join(re.sub(r"/\S+/", "", reason).split()).replace("|", "/")[:300],
    ]


def counts(rows: list[list[str]]) -> tuple[int, int, int]:
    """Families that transformers can train, those that pass, and those of them that are sensitive."""
    verdicts = [r[RESULT] for r in rows if r[RESULT] != "cannot"]
    return len(verdicts), sum(v.startswith("pass") for v in verdicts), verdicts.count("pass (sensitive)")


def markdown(rows: list[list[str]], seconds: float) -> str:
    import transformers

    counted, passed, sensitive = counts(rows)
    mesh = " x ".join(map(str, MESH))
    return "\n".join([
        "# MoE families of transformers",
        "",
        f"{len(rows)} families, {len(rows) - counted} of them unusable; of the other {counted}, {passed} pass "
        f"({passed / max(counted, 1):.0%}, {sensitive} of them sensitive). Made in {seconds / 60:.0f} minutes on "
        f"{datetime.date.today()}; "
        f"torch {torch.__version__}, transformers {transformers.__version__}, gloo processes on a CPU, fp32, "
        f"dp x ep x tp = {mesh}, {STEPS} steps of plain SGD, by "
        "`python -m tests.parity.families --write tests/parity/FAMILIES.md`.",
        "",
        " ".join(TEXT.split()),
        "",
        tabulate(rows, HEADERS, tablefmt="github", disable_numparse=True),
        "",
    ])  # fmt: skip


def main() -> int:
    import transformers

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", metavar="NAME", help="model types (all)")
    parser.add_argument("--no-processes", action="store_true", help="capture and passes only, in this process")
    parser.add_argument("--write", type=pathlib.Path, metavar="FILE", help="the markdown file to write")
    options = parser.parse_args()
    if options.write and options.no_processes:
        parser.error("only what has run on processes is written")
    transformers.logging.set_verbosity_error()

    rows, start = [], time.monotonic()
    with Pool(MESH[0] * MESH[1] * MESH[2]) as pool:
        for family in families.discovered(options.models or ()):
            began = time.monotonic()
            seen = look(family)
            result = {"ok": options.no_processes}
            if seen.captured and not options.no_processes:
                (result,) = pool.run([FamilyCase(f"hf:{family.name}", MESH)])
            rows.append(row(family, seen, result, began))
            print("  ".join(rows[-1]), flush=True)
            if options.write:
                options.write.write_text(markdown(rows, time.monotonic() - start))
    counted, passed, _ = counts(rows)
    print(f"{len(rows)} families, {passed} of {counted} pass, {time.monotonic() - start:.0f} s")
    return 0 if passed and passed >= PART * counted else 1


if __name__ == "__main__":
    sys.exit(main())
