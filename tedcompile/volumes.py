"""What an MoE block sends, as formulas: every collective of a block or a layer, in count and in bytes. No tensors.

Letters: T tokens of one data rank, K experts a token, H hidden, I expert size, E experts, `bytes` of one element, tp,
ep and dp the mesh, `layers` of a model; G devices and P dense parameters of a model. The bytes of a collective are its
operand on one rank, as in `explain`; routing is taken to be uniform, and a slice of T tokens over tp to be T/tp (the
mean where it does not divide).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache

import sympy

from tedcompile.machines import RING

T, K, H, I, E, tp, ep, dp, layers, G, P = sympy.symbols("T K H I E tp ep dp layers G P")
size = sympy.Symbol("bytes")
LETTERS = (T, K, H, I, E, tp, ep, dp, layers, size, G, P)
SIZES = {"tp": tp, "ep": ep, "ept": ep * tp, "dp": dp, "data": dp * ep}
INDEX = 8  # bytes of an index or a count


@dataclass(frozen=True)
class Candidate:
    """One way to run an MoE block.

    experts: "tensor", split over tp, which all tp ranks' tokens visit (DeepSpeed-TED, arXiv 2303.06318, section 3), or
        "folded", whole and spread over ep x tp ranks, each tp rank sending its own slice of tokens.
    dispatch: "all_to_all" of one row per (token, expert), "dedup" of one row per (token, rank with any of its experts),
        or "all_gather" of all tokens, with reduce-scatter back.
    drop: each tp rank sends 1/tp of the tokens (duplicate token dropping, TED section 4); folded experts always do.
    drop_point: tokens are sliced "after_gate" or "before_gate" (Parm, arXiv 2407.00599).
    chunks: parts in which all-to-all and all-gather over tp are pipelined (MoNTA, arXiv 2411.00662).
    """

    experts: str = "tensor"
    dispatch: str = "all_to_all"
    drop: bool = False
    drop_point: str = "after_gate"
    chunks: int = 1

    def __str__(self) -> str:
        parts = [self.experts, self.dispatch]
        if self.drop:
            parts.append(f"drop {self.drop_point}")
        if self.chunks > 1:
            parts.append(f"{self.chunks} chunks")
        return ", ".join(parts)


@dataclass(frozen=True)
class Collective:
    """One collective: `bytes` of its operand on one rank; `phase` "forward", "replay" (checkpointing), "backward"."""

    kind: str
    axis: str
    bytes: sympy.Expr
    phase: str = "forward"
    role: str = "payload"
    why: str = ""

    @property
    def sent(self) -> sympy.Expr:
        """Bytes that one rank sends (ring algorithms)."""
        return RING[self.kind](SIZES[self.axis], self.bytes)[1]


def destinations(ranks: sympy.Expr | int) -> sympy.Expr:
    """Distinct ranks that hold any of a token's K experts, E/ranks on each: expected, with uniform routing."""
    return ranks * (1 - sympy.binomial(E - E / ranks, K) / sympy.binomial(E, K))


@cache
def block(c: Candidate, aux: bool = False) -> tuple[Collective, ...]:
    """The collectives of an MoE block, router to combine, in the order of the forward, then of the backward.

    Backwards follow from the VJPs of our ops: all-to-all to all-to-all, entered all-gather to reduce-scatter and back,
    slice to all-gather, enter to all-reduce. `aux`: a loss reads the logits of all tokens.
    """
    folded = c.experts == "folded"
    sliced = folded or c.drop
    axis, ranks = ("ept", ep * tp) if folded else ("ep", ep)
    tokens = T / tp if sliced else T
    rows = _rows(c.dispatch, tokens, ranks)
    there, tensor = rows * H * size, sliced and not folded
    out: list[Collective] = []

    def add(kind: str, axis: str, of: sympy.Expr, role: str = "payload", why: str = "") -> None:
        out.append(Collective(kind, axis, of, "forward", role, why))

    if sliced and c.drop_point == "before_gate" and aux:
        add("all_gather", "tp", tokens * E * size, "routing", "logits, for the aux loss")
    if c.dispatch == "all_gather":
        add("all_gather", axis, tokens * K * (INDEX + size), "routing", "expert choices")
        add("all_gather", axis, there, why="tokens to the experts")
        if tensor:
            add("all_gather", "tp", ranks * there, why="tokens to the split experts")
            add("reduce_scatter", "tp", tp * ranks * there, why="sums of the split experts")
        add("reduce_scatter", axis, ranks * there, why="results home")
    else:
        add("all_to_all", axis, E * INDEX, "counts", "rows for each expert")
        if c.dispatch == "dedup":
            add("all_to_all", axis, rows * K * (INDEX + size), "routing", "expert choices")
        add("all_to_all", axis, there, why="rows to the experts")
        if tensor:
            add("all_gather", "tp", there, why="rows to the split experts")
            add("reduce_scatter", "tp", tp * there, why="sums of the split experts")
        add("all_to_all", axis, there, why="results home")
    if sliced:
        add("all_gather", "tp", T / tp * H * size, why="slices to whole tokens")
    else:
        add("all_reduce", "tp", T * H * size, why="sums of the split experts")

    backward: list[Collective] = []
    for f in reversed(out):
        if f.role == "payload" and f.why != "slices to whole tokens" and f.kind != "all_reduce":
            backward.append(_vjp(f))
    if sliced:
        backward.append(Collective("all_gather", "tp", T / tp * H * size, "backward", why="gradient of the slice"))
        if c.drop_point == "before_gate":
            backward.append(Collective("all_reduce", "tp", H * E * size, "backward", "gradient", "router weight"))
        else:
            backward.append(Collective("all_gather", "tp", T / tp * K * size, "backward", "routing", "routing weights"))
    else:
        backward.append(Collective("all_reduce", "tp", T * H * size, "backward", why="gradient of the tokens"))
        backward.append(Collective("all_reduce", "tp", T * K * size, "backward", "routing", "routing weights"))
    return (*out, *backward)


def _rows(dispatch: str, tokens: sympy.Expr, ranks: sympy.Expr) -> sympy.Expr:
    return {"all_to_all": K * tokens, "dedup": tokens * destinations(ranks), "all_gather": tokens}[dispatch]


def _vjp(f: Collective) -> Collective:
    n = SIZES[f.axis]
    kind, of = {
        "all_to_all": ("all_to_all", f.bytes),
        "all_gather": ("reduce_scatter", n * f.bytes),
        "reduce_scatter": ("all_gather", f.bytes / n),
    }[f.kind]
    return Collective(kind, f.axis, of, "backward", f.role, f"gradient: {f.why}")


@cache
def copied(c: Candidate) -> sympy.Expr:
    """Bytes of rows written and read in one phase: sorted by destination and by expert, and back."""
    folded = c.experts == "folded"
    ranks, tokens = (ep * tp, T / tp) if folded else (ep, T / tp if c.drop else T)
    at_home = ep * T if c.dispatch == "all_gather" else _rows(c.dispatch, tokens, ranks)
    visiting = K * T / tp if folded else K * T
    return 4 * (at_home + visiting) * H * size


def flops(matrices: int) -> sympy.Expr:
    """Of the experts, forward, on one rank: the same however they are laid out. The backward takes twice as many."""
    return 2 * matrices * K * T * H * I / tp


def weights(matrices: int) -> sympy.Expr:
    """Bytes of expert weights on one rank, tensor or folded."""
    return matrices * E * H * I * size / (ep * tp)


@cache
def saved(c: Candidate, matrices: int) -> sympy.Expr:
    """Bytes that one rank keeps for the backward: the tokens, the experts' rows and their inner values."""
    rows = K * T / tp if c.experts == "folded" else K * T
    inner = I if c.experts == "folded" else I / tp
    return (T * H + rows * H + matrices * rows * inner) * size


# ---- TED on paper ---------------------------------------------------------------------------------------------------


def ted_layer(drop: bool, save: bool, moe: bool = True) -> tuple[Collective, ...]:
    """Payload collectives of one layer of TED's GPT under full checkpointing (arXiv 2303.06318, sections 4 and 5).

    Attention and the (expert) FFN each end in an all-reduce over tp, forward, in the replay and, of the gradients of
    their inputs, backward; an MoE layer has two all-to-alls in each. `drop`: duplicate token dropping, on 1/tp of the
    rows, with an all-gather over tp after each (backward: of the gradient of each drop). `save`: communication-aware
    checkpointing, the replay issues nothing.
    """
    phases = ("forward", "backward") if save else ("forward", "replay", "backward")
    out = []
    for phase in phases:
        out += [Collective("all_reduce", "tp", T * H * size, phase, why=w) for w in ("attention", "FFN")]
        if moe:
            rows = K * T * H * size / (tp if drop else 1)
            for way in ("to the experts", "results home"):
                out.append(Collective("all_to_all", "ep", rows, phase, why=way))
                if drop:
                    out.append(Collective("all_gather", "tp", rows, phase, why=way))
    return tuple(out)


def parm_layer(before_gate: bool) -> tuple[Collective, ...]:
    """Forward payload of Parm's two schedules (arXiv 2407.00599), each tp rank with its slice, K*T rows of capacity.

    Sliced before the gate, the tokens are gathered at the end, T rows; after the gate, the experts' rows are, K*T, and
    that gather can run under the last all-to-all. The formulas are inferred from the description of the schedules.
    """
    rows = K * T * H * size / tp
    gathered = T * H * size / tp if before_gate else rows
    return (
        Collective("all_to_all", "ep", rows, why="to the experts"),
        Collective("all_to_all", "ep", rows, why="results home"),
        Collective("all_gather", "tp", gathered, why="slices to whole tokens" if before_gate else "rows"),
    )


# DeepSpeed-TED, section 3: bytes on one device with ZeRO-1, half-precision parameters and gradients (4 bytes), fp32
# master and two moments (12 bytes over the replicas); P parameters of the dense base model, MoE in every 2nd layer
MEMORY = 4 * P * (1 / tp + (E + 2) / G)
# section 4: what casting a whole expert group's gradients to fp32 adds
OPTIMIZER_SPIKE = 4 * E * P / (3 * G)


# ---- numbers --------------------------------------------------------------------------------------------------------


@cache
def _function(expression: sympy.Expr) -> Callable[..., float]:
    binomial = lambda n, k: math.comb(round(n), round(k))
    return sympy.lambdify(LETTERS, expression, modules=[{"binomial": binomial}, "math"])


def evaluate(expression: sympy.Expr | float, values: Mapping[str, float]) -> float:
    """A formula's value for letters by name, as {"T": 2048, "bytes": 2}. Raises ValueError naming what is missing."""
    expression = sympy.sympify(expression)
    missing = sorted(s.name for s in expression.free_symbols if s.name not in values)
    if missing:
        raise ValueError(f"no value for {', '.join(missing)} in {expression}")
    return float(_function(expression)(*(values.get(s.name, math.nan) for s in LETTERS)))


def total(found: Iterable[Collective], kind: str = "", role: str = "payload") -> sympy.Expr:
    """Operand bytes of all collectives of a kind ("" for any) and role."""
    return sympy.Add(*(c.bytes for c in found if kind in ("", c.kind) and c.role == role))
