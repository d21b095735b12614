"""Layouts are types on values over the tp axis, and a table says how each op moves them.

    R     the same value on all ranks, and its cotangent is the same too
    E     entered: the same value, but each rank's cotangent is a part of the sum
    S(d)  split on dim d; with sections, each of them is split (a fused [gate; up])
    P     partial: the value is the sum (or the maximum) over the ranks
    D     own rows: each row, of a token that this rank keeps, is on one rank (after tokens were dropped to S(0))

A rule reads a `Call` (the node, its operands' layouts), says by `call.need(operand, layout)` what it must be given, may
set local arguments or emit other ops, and returns the layout of the result. `plan_tensors` uses the table to decide,
`passes/check.py` to verify: one table, so a graph is right when both agree.

Every rule keeps this true: where the operands have the needed layouts, the op on local values gives the local part of
the op on global values, forward and backward. Moves between layouts, with their VJPs, are in `MOVES`.
"""

from tedcompile.layouts import elementwise, moves, products, reductions, tokens, views, vocabulary  # noqa: F401 (register)
from tedcompile.layouts.core import (
    FACTORIES,
    MOVES,
    OWN_ROWS,
    PMAX,
    RULES,
    Call,
    D,
    Dispatch,
    E,
    Layout,
    NoRule,
    P,
    R,
    S,
    Sections,
    Whole,
    apply,
    aten,
    differentiable,
    ndim,
    own_rows,
    rule,
    shape,
    val,
)  # fmt: skip

__all__ = [
    "Call", "D", "Dispatch", "E", "FACTORIES", "Layout", "MOVES", "NoRule", "OWN_ROWS", "P", "PMAX", "R",
    "RULES", "S", "Sections", "Whole", "apply", "aten", "differentiable", "ndim", "own_rows", "rule", "shape",
    "val",
]  # fmt: skip
