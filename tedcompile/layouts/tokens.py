"""Rules of the canonical MoE ops and of rows that travel."""

from __future__ import annotations

import operator
from typing import Any

from torch.fx import Node

from tedcompile.layouts.core import Call, D, E, Layout, NoRule, P, R, S, Whole, aten, rule, val
from tedcompile.ops import ops


@rule(ops.permute.default)
def _permute(c: Call) -> Any:
    x, index, _ = c.node.args
    layout = c.layout(x)
    if S(0) in (layout, c.layout(index)):
        c.need(x, S(0))
        c.need(index, S(0))
        return (D, P, D, D)
    c.need(index, R)
    if layout == P:
        c.need(x, R)
        layout = R
    if layout.kind == "S" and layout.dim != 1:
        raise NoRule("dispatch of tokens that are split")
    return (layout, R, R, R)


@rule(ops.unpermute.default)
def _unpermute(c: Call) -> Layout:
    rows, perm, _, weights = c.node.args
    layout = c.layout(rows)
    if c.layout(perm) == D:
        _need_own(c, rows)
        c.need(weights, S(0))
        return S(0)
    if layout.kind == "S" and layout.dim != 1:
        raise NoRule("combine of rows that are split")
    if layout.kind == "R":
        return c.default()
    c.need(weights, E)
    return layout


@rule(ops.gather_sum.default)
def _gather_sum(c: Call) -> Layout:
    if c.layout(c.node.args[1]) == D:
        _need_own(c, c.node.args[0])
        return S(0)
    return _rows(c)


def _need_own(c: Call, rows: Node) -> None:
    if c.layout(rows) not in (D, P):
        raise Whole(c.node.meta["dispatch"])
    c.need(rows, D)


def own_rows_of_experts(c: Call, weight: Node, counts: Node, rows: Node, columns: Layout) -> Layout | None:
    """Own rows and a weight of each expert, by the plan of their dispatch; None: the rows are gathered first."""
    dispatch = c.node.meta.get("dispatch")
    layout = c.layout(weight)
    if layout == S(0) or (dispatch and dispatch.experts == "folded"):
        if not c.assign(weight, S(0)):
            raise Whole(c.node.meta["dispatch"])
        return D
    if dispatch and dispatch.experts == "tensor":
        if not c.assign(weight, columns):
            raise Whole(dispatch)
        c.need(rows, E)
        c.need(counts, R)
        return None
    c.need(weight, E)
    return D


@rule(ops.per_expert.default)
def _per_expert(c: Call) -> Layout:
    if c.layout(c.node.args[2]) == D:
        x, counts, rows = c.node.args
        own = own_rows_of_experts(c, x, counts, rows, c.layout(x) if c.layout(x).kind == "S" else R)
        if own:
            return own
    else:
        c.need(c.node.args[1], R)
    layout = c.layout(c.node.args[0])
    if layout == P or (layout.kind == "S" and layout.dim == 0):
        raise NoRule("a per-expert value that is partial or split over experts")
    return layout  # the rows give only their number


def permute_output(a: Node) -> int | None:
    """Which result of a permute a node is, or is a view of."""
    while a.target in (aten.view.default, aten.reshape.default):
        a = a.args[0]
    ours = a.target is operator.getitem and a.args[0].target is ops.permute.default
    return a.args[1] if ours else None


@rule(ops.take.default)
def _take(c: Call) -> Layout:
    """Between slots and rows, or, sorted again after a dispatch, rows and rows."""
    x, order, _ = c.node.args
    result = permute_output(order) if c.layout(order) == D else None
    if result == 3:
        c.need(x, S(0))
        return D
    if result == 2:
        _need_own(c, x)
        return S(0)
    return _rows(c)


@rule(ops.drop.default)
def _drop(c: Call) -> Layout:
    c.need(c.node.args[0], S(0))
    c.emit = lambda x: x
    return S(0)


@rule(ops.gather_rows.default)
def _gather_rows(c: Call) -> Layout:
    c.need(c.node.args[0], D)
    return E if val(c.node.args[0]).is_floating_point() else R


@rule(ops.scatter_rows.default)
def _scatter_rows(c: Call) -> Layout:
    c.need(c.node.args[0], P)
    return D


@rule(ops.exchange_counts.default)
def _exchange_counts(c: Call) -> Layout:
    return D if c.layout(c.node.args[0]) in (P, D) else c.default()  # own counts


@rule(ops.splits.default, ops.row_sizes.default)
def _splits(c: Call) -> Layout:
    return D if any(c.layout(a) in (P, D) for a in c.tensors()) else c.default()


@rule(ops.all_to_all.default, ops.all_to_all_like.default)
def _rows(c: Call) -> Layout:
    layout = c.layout(c.node.args[0])
    if layout.kind == "S" and layout.dim == 0:
        raise NoRule("dispatch of tokens that are split")
    return layout


@rule(ops.regroup.default)
def _regroup(c: Call) -> Any:
    return (D, D) if c.layout(c.node.args[0]) == D else (R, R)


@rule(ops.portions.default)
def _portions(c: Call) -> Any:
    return (c.layout(c.node.args[0]),) * c.node.args[1]  # of its own rows, where they are split


@rule(ops.join.default)
def _join(c: Call) -> Layout:
    first, *others = map(c.layout, c.node.args[0])
    if any(other != first for other in others):
        raise NoRule("parts that are laid out otherwise than each other")
    return first


@rule(ops.own_experts.default)
def _own_experts(c: Call) -> Layout:
    x, dim, _, axis = c.node.args
    if axis != "tp":
        return c.layout(x)
    c.need(x, S(dim))
    return S(0)
