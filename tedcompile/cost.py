"""How an MoE block is best run on a machine: predicted seconds, bytes and memory of every candidate, and the choice.

Pure functions of integers and a machine's constants, so all ranks of one job choose alike. Bytes come from the formulas
of `volumes`, seconds from the alpha-beta costs and rates of `machines`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from tabulate import tabulate

from tedcompile import volumes
from tedcompile.machines import Machine, place
from tedcompile.mesh import MeshShape
from tedcompile.volumes import Candidate, Collective, evaluate

CHOICES: dict[str, tuple] = {
    "experts": ("tensor", "folded"),
    "dispatch": ("all_to_all", "dedup", "all_gather"),
    "drop": ("yes", "no"),
    "drop_point": ("after_gate", "before_gate"),
    "chunks": (1, 2, 4, 8),
}
TERMS = ("gemm", "all_to_all", "tp", "latency", "gate", "copy", "hidden")
KERNELS = 10  # of a block's forward on one rank: linear, softmax, topk, sort, take, two products, activation, take, sum
SOFTMAX = 4 * 4  # bytes moved for one logit: read and written in fp32 by softmax, and again by topk


@dataclass(frozen=True)
class Block:
    """An MoE block as one data rank sees it.

    T tokens, K experts a token, H hidden, I expert intermediate, E experts; `matrices` of an expert (3 gated, 2 plain);
    `bytes` of an element; `aux`: a loss outside of the block reads the router's logits; `gate`: FLOP of the router for
    one token, forward (default: its product, 2*H*E).
    """

    T: int
    K: int
    H: int
    I: int
    E: int
    matrices: int = 3
    bytes: int = 2
    aux: bool = False
    gate: float | None = None

    def __post_init__(self) -> None:
        for name in ("T", "K", "H", "I", "E", "matrices", "bytes"):
            if not getattr(self, name) >= 1:
                raise ValueError(f"an MoE block needs {name} of at least 1, got {getattr(self, name)}")
        if self.K > self.E:
            raise ValueError(f"a token cannot choose {self.K} of {self.E} experts")

    def values(self, mesh: MeshShape) -> dict[str, float]:
        """The letters of the formulas."""
        return {name: getattr(self, name) for name in ("T", "K", "H", "I", "E", "bytes")} | mesh.as_dict()


@dataclass(frozen=True)
class Prediction:
    """Of one candidate: seconds by term, forward and backward; bytes that one rank sends by axis; bytes of memory.

    Terms: gemm (the experts' products), all_to_all (transfers of the dispatch, of whatever kind), tp (transfers over
    tp), latency (starts of messages and kernels), gate, copy (rows moved in memory), hidden (transfers that chunks run
    at the same time as others, negative). Memory: the expert weights, and what is kept for the backward.
    """

    candidate: Candidate
    forward: Mapping[str, float]
    backward: Mapping[str, float]
    sent: Mapping[str, float]
    weights: float
    activations: float
    fits: bool

    @property
    def seconds(self) -> float:
        return sum(self.forward.values()) + sum(self.backward.values())

    @property
    def memory(self) -> float:
        return self.weights + self.activations

    def term(self, name: str) -> float:
        return self.forward[name] + self.backward[name]


@dataclass(frozen=True)
class Choice:
    """The best candidate, why, and all predictions, the best first."""

    best: Prediction
    reason: str
    all: tuple[Prediction, ...] = field(repr=False)


def candidates(
    block: Block, mesh: MeshShape, plan: Mapping[str, Any] | None = None, off: Collection[str] = ()
) -> list[Candidate]:
    """Every way to run the block that the sizes, `plan` (choices forced) and `off` (passes left out) allow.

    Axes of size 1 leave nothing to choose where they play no part. `plan` may name any of `CHOICES`. Raises ValueError
    that says which sizes or options are in the way if nothing is left.
    """
    plan = dict(plan or {})
    if "chunks" in plan:
        plan["chunks"] = int(plan["chunks"])
    for key, value in plan.items():
        if key not in CHOICES or value not in CHOICES[key]:
            known = ", ".join(f"{k}: {' or '.join(map(str, v))}" for k, v in CHOICES.items())
            raise ValueError(f"plan: {key}={value} is not a choice ({known})")
    found = []
    reasons = [why for experts in CHOICES["experts"] if (why := _refused(block, mesh, off, experts))]
    for experts in CHOICES["experts"]:
        if _refused(block, mesh, off, experts) or plan.get("experts", experts) != experts:
            continue
        if experts == "folded" and mesh.tp == 1 and "experts" not in plan:
            continue  # the same as "tensor"
        travels = mesh.ep > 1 or (experts == "folded" and mesh.tp > 1)
        dispatches = CHOICES["dispatch"] if travels else ("all_to_all",)
        if "dispatch" in plan:
            dispatches = (plan["dispatch"],)
        drops = [False, True] if mesh.ep > 1 and mesh.tp > 1 and "drop_duplicates" not in off else [False]
        if experts == "folded":
            drops = [mesh.tp > 1]
        if mesh.tp > 1 and travels:
            drops = [drop for drop in drops if plan.get("drop", drop) in (drop, "yes" if drop else "no")]
        for dispatch in dispatches:
            for drop in drops:
                points = CHOICES["drop_point"] if drop else ("after_gate",)
                parts = CHOICES["chunks"] if travels else (1,)
                found += [
                    Candidate(experts, dispatch, drop, point, chunks)
                    for point in points
                    if not drop or plan.get("drop_point", point) == point
                    for chunks in parts
                    if len(parts) == 1 or plan.get("chunks", chunks) == chunks
                ]
    if not found:
        reasons += [f"{key}={value} is asked for" for key, value in plan.items()]
        raise ValueError(f"no way to run {block.E} experts on {_sizes(mesh)} is left: {'; '.join(reasons)}")
    return found


def _refused(block: Block, mesh: MeshShape, off: Collection[str], experts: str) -> str:
    """Why a layout of the experts cannot be used; empty if it can."""
    if block.E % mesh.ep:
        return f"{block.E} experts do not divide over ep={mesh.ep}"
    if experts == "tensor":
        return f"expert size {block.I} does not divide over tp={mesh.tp}" if block.I % mesh.tp else ""
    if block.E % (mesh.ep * mesh.tp):
        return f"{block.E} experts do not divide over ep x tp = {mesh.ep * mesh.tp}"
    if mesh.tp > 1 and "drop_duplicates" in off:
        return "folded experts need drop_duplicates, which is off"
    return ""


def _sizes(mesh: MeshShape) -> str:
    return ", ".join(f"{axis}={n}" for axis, n in mesh.as_dict().items())


@cache
def predict(block: Block, c: Candidate, mesh: MeshShape, machine: Machine) -> Prediction:
    """Seconds, bytes and memory of one training step of the block, forward and backward, without recomputation."""
    values = block.values(mesh)
    number = lambda formula: evaluate(formula, values)
    weights = number(volumes.weights(block.matrices))
    rows = block.K * block.T * mesh.ep / block.E  # of one expert on one rank
    width = min(block.H, block.I if c.experts == "folded" else block.I / mesh.tp)
    flops = number(volumes.flops(block.matrices))
    tokens = block.T / mesh.tp if c.drop and c.drop_point == "before_gate" else block.T
    per_token = 2 * block.H * block.E if block.gate is None else block.gate
    gate = machine.product(per_token * tokens, tokens, min(block.H, block.E), block.bytes)
    gate += tokens * block.E * SOFTMAX / machine.copy
    copy = number(volumes.copied(c)) / machine.copy
    sent: dict[str, float] = {}
    phases = {}
    for phase, times in (("forward", 1), ("backward", 2)):
        terms = dict.fromkeys(TERMS, 0.0)
        costs = []
        for collective in volumes.block(c, block.aux):
            where = place(collective.axis, mesh, machine)
            if collective.phase != phase or where.size == 1:
                continue
            start, transfer = machine.collective(collective.kind, number(collective.bytes), where)
            costs.append((collective, start, transfer))
            terms["tp" if collective.axis == "tp" else "all_to_all"] += transfer
            terms["latency"] += start + machine.launch
            axis = collective.axis
            sent[axis] = sent.get(axis, 0.0) + number(collective.sent)
        # a product in the forward; in the backward one for the rows' gradients, one for the weights'
        terms["gemm"] = times * machine.product(flops, rows, width, block.bytes, weights)
        terms["gate"] = times * gate
        terms["copy"] = copy
        terms["latency"] += times * KERNELS * machine.launch
        if c.chunks > 1:
            part = machine.product(flops / c.chunks, rows / c.chunks, width, block.bytes, weights)
            terms["gemm"] = times * c.chunks * part
            terms["copy"] += (times - 1) * (c.chunks - 1) * 3 * weights / machine.copy  # their gradients are added up
            hidden, more = _pipelined(c, costs, mesh, machine, terms["gemm"])
            terms["hidden"] -= hidden
            terms["latency"] += more + (c.chunks - 1) * times * KERNELS * machine.launch
        phases[phase] = terms
    kept = number(volumes.saved(c, block.matrices))
    fits = weights + kept <= machine.memory
    return Prediction(c, phases["forward"], phases["backward"], sent, weights, kept, fits)


def _pipelined(
    c: Candidate, costs: list[tuple[Collective, float, float]], mesh: MeshShape, machine: Machine, gemm: float
) -> tuple[float, float]:
    """(transfer seconds hidden, seconds of further starts) of a phase that is cut in chunks.

    While one part travels between the experts' ranks another is computed (FasterMoE, PPoPP 2022, section 4.2) or, over
    other links, gathered or summed over tp (MoNTA: all-to-all between, all-gather inside nodes). All overlaps but the
    first part's way there and the last one's back.
    """
    axis = "ept" if c.experts == "folded" else "ep"
    far, near = (place(name, mesh, machine) for name in (axis, "tp"))
    apart = far.inside < far.size and near.inside == near.size
    inner = [
        cost
        for cost in costs
        if cost[0].axis == axis or (cost[0].kind != "all_reduce" and cost[0].why.endswith("the split experts"))
    ]
    more = sum(start + machine.launch for _, start, _ in inner)
    travels = sum(transfer for collective, _, transfer in inner if collective.axis == axis)
    under = gemm + sum(transfer for collective, _, transfer in inner if collective.axis == "tp" and apart)
    return (c.chunks - 1) / c.chunks * min(travels, under), (c.chunks - 1) * more


@cache
def _choose(block: Block, mesh: MeshShape, machine: Machine, plan: tuple, off: frozenset[str]) -> Choice:
    found = [predict(block, c, mesh, machine) for c in candidates(block, mesh, dict(plan), off)]
    order = sorted(
        range(len(found)),  # what fits, then the fastest, then the simplest: candidates() lists simple ones first
        key=lambda i: (not found[i].fits, 0 if found[i].fits else found[i].memory, float(f"{found[i].seconds:.9g}"), i),
    )
    ranked = tuple(found[i] for i in order)
    return Choice(ranked[0], _why(ranked, machine), ranked)


def choose(
    block: Block, mesh: MeshShape, machine: Machine, plan: Mapping[str, Any] | None = None, off: Collection[str] = ()
) -> Choice:
    """The candidate that is predicted to be the fastest of those whose memory fits (if none does, the smallest).

    Deterministic: the same arguments give the same choice on every rank. Raises ValueError as `candidates` does.
    """
    return _choose(block, mesh, machine, tuple(sorted((plan or {}).items())), frozenset(off))


def _why(ranked: tuple[Prediction, ...], machine: Machine) -> str:
    best, others = ranked[0], ranked[1:]
    if not best.fits:
        return f"none fits in {_gigabytes(machine.memory)}: this one needs the least"
    if not others:
        return "nothing else to choose"
    other = next((o for o in others if _key(o.candidate) != _key(best.candidate)), others[0])
    return f"fastest; {_compare(other, best)} is the next: {other.candidate}"


def _key(c: Candidate) -> tuple:
    return c.experts, c.dispatch, c.drop


def _compare(p: Prediction, best: Prediction) -> str:
    return f"{100 * (p.seconds / best.seconds - 1):+.1f} %"


def _loses(p: Prediction, best: Prediction, machine: Machine) -> str:
    if not p.fits:
        return f"needs {_gigabytes(p.memory)} of {_gigabytes(machine.memory)}"
    excess = {name: p.term(name) - best.term(name) for name in TERMS}
    most = max(TERMS, key=excess.__getitem__)
    if excess[most] <= 0:
        return "as fast"
    return f"{_compare(p, best)}: {1e3 * excess[most]:.3g} ms more {'lost overlap' if most == 'hidden' else most}"


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.3g} GB"


def table(
    block: Block, mesh: MeshShape, machine: Machine, plan: Mapping[str, Any] | None = None, off: Collection[str] = ()
) -> list[dict[str, Any]]:
    """A row for each candidate, the best first, then one for each layout of the experts that the sizes rule out.

    Keys: experts, dispatch, drop, drop_point, chunks, seconds, forward, backward, `terms` (seconds of both), `sent`
    (bytes of one rank by axis), memory (bytes), chosen, reason. Ruled out: seconds is None. Raises as `choose`.
    """
    choice = choose(block, mesh, machine, plan, off)
    rows: list[dict[str, Any]] = []
    for p in choice.all:
        c = p.candidate
        rows.append({
            "experts": c.experts, "dispatch": c.dispatch, "drop": c.drop, "drop_point": c.drop_point if c.drop else "",
            "chunks": c.chunks, "seconds": p.seconds, "forward": sum(p.forward.values()),
            "backward": sum(p.backward.values()), "terms": {name: p.term(name) for name in TERMS},
            "sent": dict(p.sent), "memory": p.memory, "chosen": p is choice.best,
            "reason": choice.reason if p is choice.best else _loses(p, choice.best, machine),
        })  # fmt: skip
    for experts in CHOICES["experts"]:
        why = _refused(block, mesh, off, experts)
        if why and mesh.tp * mesh.ep > 1:
            rows.append({"experts": experts, "seconds": None, "chosen": False, "reason": why})
    return rows


def render(rows: list[dict[str, Any]], everything: bool = False) -> str:
    """The table as text; without `everything` only the best drop point and chunking of each layout and dispatch."""
    axes = sorted({axis for row in rows for axis in row.get("sent", ())})
    shown: list[list[str]] = []
    seen = set()
    for row in rows:
        key = row["experts"], row.get("dispatch"), row.get("drop")
        if key in seen and not everything:
            continue
        seen.add(key)
        mark = "*" if row["chosen"] else ""
        if row["seconds"] is None:
            shown.append([mark, row["experts"], *[""] * (6 + len(TERMS) + len(axes)), row["reason"]])
            continue
        ms = lambda seconds: f"{1e3 * seconds:.3f}"
        shown.append([
            mark, row["experts"], row["dispatch"], row["drop_point"] or "no", str(row["chunks"]), ms(row["forward"]),
            ms(row["backward"]), *[ms(row["terms"][name]) for name in TERMS],
            *[f"{row['sent'].get(axis, 0) / 1e6:,.1f}" for axis in axes], f"{row['memory'] / 1e9:.2f}", row["reason"],
        ])  # fmt: skip
    headers = ["", "experts", "dispatch", "drop", "chunks", "forward", "backward", *TERMS]
    headers += [f"{axis.replace('_', ' x ')}, MB sent" for axis in axes] + ["GB", "why"]
    align = ("left",) * 4 + ("right",) * (len(headers) - 5) + ("left",)
    text = tabulate(shown, headers, tablefmt="simple", disable_numparse=True, colalign=align)
    return f"{text}\nTimes in ms, predicted; forward and backward together from {TERMS[0]} on."
