"""Rules of the moves between layouts: what the checker reads."""

from __future__ import annotations

from typing import Any

from tedcompile.layouts.core import PMAX, Call, D, E, Layout, NoRule, P, R, S, differentiable, rule
from tedcompile.ops import ops


@rule(ops.enter.default)
def _enter(c: Call) -> Layout:
    c.need(c.node.args[0], R)
    return E


@rule(ops.share.default)
def _share(c: Call) -> Layout:
    c.need(c.node.args[0], R)
    return P


@rule(ops.all_reduce.default)
def _all_reduce(c: Call) -> Layout:
    if c.node.args[1] != "tp":  # counts over data ranks: these layouts are about tp
        if differentiable(c.node.args[0]):
            raise NoRule("a sum over data ranks inside the forward has no gradient rule")
        return c.default()
    c.need(c.node.args[0], P)
    return R


@rule(ops.all_max.default)
def _all_max(c: Call) -> Layout:
    c.need(c.node.args[0], PMAX)
    return R


@rule(ops.select.default)
def _select_rows(c: Call) -> Any:
    x, index = c.layout(c.node.args[0]), c.layout(c.node.args[1])
    if index == R:
        return (x, R, R, R)
    if (x, index) not in ((S(0), S(0)), (D, D), (E, D)):
        raise NoRule(f"tokens as {x} with experts as {index}")
    return (D, D, D, D)


@rule(ops.unpermute_some.default)
def _unpermute_some(c: Call) -> Layout:
    rows, perm, _, weights = c.node.args
    layout = c.layout(rows)
    if c.layout(perm) == D:  # of own tokens, or what this rank's experts add to all tokens
        return D if c.layout(weights) == D else P
    if layout.kind != "R":
        c.need(weights, E)
    return layout


@rule(ops.gather_sum_some.default)
def _gather_sum_some(c: Call) -> Layout:
    return S(0) if c.layout(c.node.args[1]) == D else c.layout(c.node.args[0])


@rule(ops.spread.default)
def _spread(c: Call) -> Layout:
    x, perm, _ = c.node.args
    if c.layout(perm) == D:
        c.need(x, S(0))
        return D
    return c.layout(x)


@rule(ops.destinations.default)
def _destinations(c: Call) -> Layout:
    return c.layout(c.node.args[0])


@rule(ops.localize.default)
def _localize(c: Call) -> Layout:
    return D if c.node.args[2] == "ept" else c.layout(c.node.args[0])


def _over_data(c: Call) -> Layout:
    """Moves over ep leave a value where it is over tp; own tokens of several data ranks are in no order of theirs."""
    layout = c.layout(c.node.args[0])
    back = c.node.target is ops.reduce_scatter.default
    if c.node.args[-1] == "ep":
        return {S(0): S(0) if back else D, D: S(0) if back else D}.get(layout, layout)
    c.need(c.node.args[0], P if back else S(0))
    return S(0) if back else R if c.node.target is ops.gather.default else E


@rule(ops.slice.default, ops.reduce_scatter.default)
def _slice_move(c: Call) -> Layout:
    a, dim, _, sections, _ = c.node.args
    if c.node.args[-1] != "tp":
        return _over_data(c)
    c.need(a, R if c.node.target is ops.slice.default else P)
    return S(dim, tuple(sections))


@rule(ops.gather.default, ops.gather_enter.default)
def _gather_move(c: Call) -> Layout:
    a, dim, _, sections, _ = c.node.args
    if c.node.args[-1] != "tp":
        return _over_data(c)
    if c.layout(a) == D:  # own counts or own tokens of all ranks
        return R if c.node.target is ops.gather.default else E
    c.need(a, S(dim, tuple(sections)))
    return R if c.node.target is ops.gather.default else E
