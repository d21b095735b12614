"""An explanation as text, for people."""

from __future__ import annotations

import difflib
import math
import os
from collections import Counter
from collections.abc import Iterator

import sympy
from tabulate import tabulate

from tedcompile import cost
from tedcompile.capture import layer_of
from tedcompile.explain import Explanation
from tedcompile.listing import Line, layers_of
from tedcompile.traffic import LETTERS, SYMBOLS, pattern


class Style:
    """Colours on a terminal, nothing elsewhere."""

    def __init__(self, colour: bool):
        self.colour = colour

    def __call__(self, text: str, code: str) -> str:
        return f"\033[{code}m{text}\033[0m" if self.colour and text else text

    @staticmethod
    def of(stream) -> Style:
        return Style(stream.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb")


BOLD, DIM, COLLECTIVE, BACK, ADDED, GONE = "1", "2", "1;35", "36", "32", "31"


def choose(lines: list[Line], layer: str | int | None) -> list[str]:
    """The layers that --layer names: "all", a number, or None for the first with an MoE block."""
    known = layers_of(lines)
    if layer == "all" or not known:
        return known or [""]
    if layer is None:
        found = (layer_of(line.module) for line in lines if " = permute(" in line.code and line.code.startswith("rows"))
        return [next((f for f in found if f in known), known[0])]
    numbers = [name.rpartition(".")[2] for name in known]
    if str(layer) not in numbers:
        raise ValueError(f"layer {layer} is out of range: the model has layers {numbers[0]} to {numbers[-1]}")
    return [known[numbers.index(str(layer))]]


def render(found: Explanation, layer: str | int | None = None, colour: bool = False) -> str:
    """An explanation as text, for people."""
    style = Style(colour)
    facts = found.facts
    mesh = ", ".join(f"{axis}={size}" for axis, size in facts["mesh"].items())
    title = lambda text: f"\n{style(text, BOLD)}\n"
    chosen = choose(found.lines, layer)
    parts = [style(f"{facts['model']} on {mesh}", BOLD) + f"  ({math.prod(facts['mesh'].values())} ranks)"]
    if found.pair:
        before, after = (list(_layers(side, chosen, Style(False))) for side in found.pair)
        parts += [title("before (-) and after (+)"), *_difference(before, after, style)]
        return "\n".join(parts) + "\n"
    parts += [title("Passes"), _passes(facts["passes"])]
    parts += [title("Rewritten graph, one rank" + ("" if chosen == [""] else f": {', '.join(chosen)}")), LEGEND, ""]
    parts += _layers(found.lines, chosen, style)
    parts += [title("Parameters"), _parameter_table(facts["parameters"])]
    for choice in facts["choices"]:
        parts += [title(f"How {choice['module']} runs: predicted ms of one block, on {facts['machine']}")]
        parts += [cost.render(choice["candidates"])]
    parts += [title("Left replicated"), _replicated_table(facts["replicated"])]
    if facts["savings"]:
        parts += [title("What each optimisation saves in a step"), _savings_table(facts["savings"])]
    parts += [title("Collectives of one training step"), _collective_table(facts["collectives"], facts["letters"])]
    return "\n".join(parts) + "\n"


LEGEND = """>> collective    << collective in the backward    # dtype [local shape] layout over tp
R same on all ranks   E same, its gradient partial   S(d) split on dim d   P partial sum"""


def _table(rows: list, headers: list[str], **options) -> str:
    return tabulate(rows, headers, tablefmt="simple", disable_numparse=True, **options)


def _passes(passes: list[dict]) -> str:
    def change(p: dict) -> str:
        return ", ".join(
            [f"+{n} {k}" for k, n in p["inserted"].items()] + [f"-{n} {k}" for k, n in p["removed"].items()]
        )

    total: Counter[str] = Counter()
    rows = []
    for p in passes:
        before = sum(total.values())
        total.update(p["inserted"])
        total.subtract(p["removed"])
        rows.append(
            [
                p["name"],
                p["nodes_before"],
                p["nodes_after"],
                before,
                sum(total.values()),
                change(p),
                f"{p['seconds']:.2f} s",
            ]
        )
    headers = ["pass", "nodes before", "after", "collectives before", "after", "", "time"]
    return _table(rows, headers, colalign=("left", "right", "right", "right", "right", "left", "right"))


def _layers(lines: list[Line], chosen: list[str], style: Style) -> Iterator[str]:
    for layer in chosen:
        inside = [x for x in lines if not layer or x.module == layer or x.module.startswith(f"{layer}.")]
        kinds = {line.module: line.kind for line in inside}
        yield style(f"   {layer or 'model'}: {kinds.get(layer, '')}".rstrip(": "), BOLD)
        current = layer
        for i, line in enumerate(inside):
            alone = line.module not in (
                inside[i - 1].module if i else "", inside[i + 1].module if i + 1 < len(inside) else "",
            )  # fmt: skip
            module = line.module.rpartition(".")[0] if alone and line.module != layer else line.module
            if module != current and len(module) > len(layer):
                old, new = (
                    m.removeprefix(layer).strip(".").split(".") if m != layer else [] for m in (current, module)
                )
                same = next((k for k, (a, b) in enumerate(zip(old, new)) if a != b), min(len(old), len(new)))
                for k in range(same, len(new)):
                    kind = kinds.get(".".join([layer, *new[: k + 1]]).strip("."), "")
                    yield style(f"   {'  ' * (k + 1)}{new[k]}" + (f": {kind}" if kind else ""), BOLD)
            current = module
            depth = 1 + (len(module.removeprefix(layer).strip(".").split(".")) if len(module) > len(layer) else 0)
            code = f"{'  ' * depth}{line.code}"
            colour = {">>": COLLECTIVE, "<<": BACK}.get(line.mark, "")
            comment = f"# {line.comment}" if line.comment else ""
            text = style(f"{line.mark:2} {code}", colour) if colour else f"   {code}"
            yield (text + " " * max(2, 88 - len(code)) + style(comment, DIM)).rstrip()


def _difference(before: list[str], after: list[str], style: Style) -> Iterator[str]:
    for line in difflib.unified_diff(before, after, n=len(before) + len(after), lineterm=""):
        if not line.startswith(("---", "+++", "@@")):
            yield style(line, ADDED if line[0] == "+" else GONE) if line[0] in "+-" else line


def _parameter_table(parameters: list[dict]) -> str:
    groups: Counter[tuple] = Counter()
    for p in parameters:
        groups[pattern(p["name"]), p["layout"], str(p["shape"]), str(p["local_shape"])] += 1
    total, local = (sum(math.prod(p[key]) for p in parameters) for key in ("shape", "local_shape"))
    rows = [[name, n, shape, local_shape, layout] for (name, layout, shape, local_shape), n in groups.items()]
    return _table(rows, ["parameter", "times", "shape", "local shape", "layout"]) + (
        f"\n\n{total:,} parameters, {local:,} on each rank ({100 * local / total:.1f} %)"
    )


def _replicated_table(replicated: list[dict]) -> str:
    if not replicated:
        return "nothing that could be split"
    return "\n".join(f"{r['module']}: {r['reason']}" for r in replicated)


def human(size: float) -> str:
    """1536 to '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    raise AssertionError


def _savings_table(savings: list[dict]) -> str:
    rows, rewrites = [], []
    for s in savings:
        before, after, note = s["before"], s["after"], f" ({s['note']})" if s["note"] else ""
        rewrites.append(f"{s['pass']}: {s['rewrite']}{note}")
        if before is None:
            continue
        cells = [s["pass"], f"{before['calls']} -> {after['calls']}"]
        for axis in ("ep", "tp"):
            saved = f" ({100 * (after[axis] / before[axis] - 1):+.0f} %)" if before[axis] else ""
            cells.append(f"{human(before[axis])} -> {human(after[axis])}{saved}")
        more = before["ep"] + before["tp"] - after["ep"] - after["tp"]
        rows.append([*cells, human(more) if more >= 0 else f"-{human(-more)}"])
    headers = ["optimisation", "collectives", "sent over ep (or ep x tp)", "sent over tp", "saved by each rank"]
    return _table(rows, headers) + "\n\n" + "\n".join(rewrites)


def _collective_table(found: list[dict], letters: dict[str, int]) -> str:
    if not found:
        return "none"
    rows = [
        [c["phase"], c["kind"], c["axis"], c["role"], c["module"] or "(model)", c["count"], human(c["bytes_per_rank"]),
         human(c["wire_bytes"]), c["formula"]]
        for c in found
    ]  # fmt: skip
    headers = ["phase", "kind", "axis", "role", "module", "count", "a call", "sent", "bytes a call"]
    text = _table(rows, headers, colalign=("left",) * 5 + ("right",) * 3 + ("left",))
    calls: Counter[str] = Counter()
    sent: Counter[str] = Counter()
    for c in found:
        calls[c["axis"]] += c["count"]
        sent[c["axis"]] += c["count"] * c["wire_bytes"]
    totals = [text, ""]
    for axis in calls:
        where = "data (dp x ep)" if axis == "data" else axis
        totals.append(f"{where}: {calls[axis]} calls, each rank sends {human(sent[axis])}")
    used = {str(x) for c in found for x in sympy.sympify(c["formula"], SYMBOLS).free_symbols}
    totals += ["", *(f"{name} = {letters[name]:,}: {LETTERS[name]}" for name in LETTERS if name in used)]
    return "\n".join(totals)
