"""Rules of matrix products, and of attention."""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from tedcompile.layouts.core import Call, D, E, Layout, NoRule, P, R, S, aten, ndim, rule, shape
from tedcompile.layouts.reductions import along_one
from tedcompile.layouts.tokens import own_rows_of_experts
from tedcompile.ops import ops


def contract(c: Call, x: Node, w: Node, inner: int, outer: int, bias: Any = None) -> Layout:
    """x (..., n) times a weight whose dim `inner` is n and whose dim `outer` becomes the last: column or row."""
    layout, last = c.layout(x), ndim(x) - 1
    if layout.kind == "S" and layout.dim == last:
        if not c.assign(w, S(inner, layout.sections)):
            raise NoRule("its result is needed whole")
        if bias is not None:
            c.need(bias, P)
        return P
    if layout.kind == "S":
        if c.layout(w).kind == "S":
            raise NoRule("a split weight meets a value that is split on another dim")
        c.need(w, E)
        c.need(bias, E)
        return layout
    sections = c.sections(w)
    if c.layout(w) == S(outer, sections) or c.assign(w, S(outer, sections)):
        c.need(x, E)
        c.need(bias, S(0, sections))
        return S(ndim(c.node) - 1, sections)
    if c.layout(w).kind == "S" and c.layout(w).dim == inner:
        c.need(x, S(last, c.layout(w).sections))
        c.need(bias, P)
        return P
    return c.default()


@rule(aten.linear.default)
def _linear(c: Call) -> Layout:
    x, w, bias = c.node.args[0], c.node.args[1], c.arg(2)
    return contract(c, x, w, 1, 0, bias)


@rule(aten.addmm.default)
def _addmm(c: Call) -> Layout:
    if c.node.kwargs:
        return along_one(c)
    bias, x, w = c.node.args
    if shape(bias) != shape(w)[1:]:
        return along_one(c)
    return contract(c, x, w, 0, 1, bias)


@rule(ops.grouped_mm.default)
def _grouped_mm(c: Call) -> Layout:
    rows, weight, counts = c.node.args
    if c.layout(rows).kind == "S" and c.layout(rows).dim == 0:
        raise NoRule("a grouped product of rows that are split")
    if c.layout(rows) == D:
        sections = c.sections(weight)
        return own_rows_of_experts(c, weight, counts, rows, S(2, sections)) or S(1, sections)
    c.need(counts, R)
    return contract(c, rows, weight, 1, 2)


@rule(aten.matmul.default, aten.mm.default, aten.bmm.default)
def _matmul(c: Call) -> Layout:
    a, b = c.node.args
    if ndim(b) == 2 and ndim(a) >= 2 and b.meta.get("weights_only"):
        return contract(c, a, b, 0, 1)
    la, lb = c.layout(a), c.layout(b)
    if not c.sharded():
        return c.default()
    if ndim(a) < 2 or ndim(b) < 2:
        raise NoRule("a matrix-vector product of a split value")
    ra = la.dim - ndim(a) if la.kind == "S" else None
    rb = lb.dim - ndim(b) if lb.kind == "S" else None
    if la.sections or lb.sections:
        raise NoRule("a product of fused sections")
    if ra == -1 and rb in (-2, None):
        c.need(b, S(ndim(b) - 2))
        return P
    if rb == -2 and ra is None:
        c.need(a, S(ndim(a) - 1))
        return P
    if ra == -2 and rb is None:
        c.need(b, E)
        return S(ndim(c.node) - 2)
    if rb == -1 and ra is None:
        c.need(a, E)
        return S(ndim(c.node) - 1)
    rel = ra if ra is not None else rb
    assert rel is not None
    if rel >= -2 or (ra is not None and rb is not None and ra != rb):
        raise NoRule("a product of operands split on different dims")
    for operand, r in ((a, ra), (b, rb)):
        if r is None:
            batched = ndim(operand) >= -rel and shape(operand)[rel] != 1
            c.need(operand, S(ndim(operand) + rel) if batched else E)
    return S(ndim(c.node) + rel)


@rule(aten.scaled_dot_product_attention.default)
def _attention(c: Call) -> Layout:
    q, k, v, mask = c.node.args[0], c.node.args[1], c.node.args[2], c.arg(3)
    sharded = [a for a in (q, k, v) if c.layout(a).kind == "S"]
    if not sharded:
        return c.default()
    layout = c.layout(sharded[0])
    if layout.dim >= ndim(q) - 2 or any(c.layout(a) != layout for a in sharded):
        raise NoRule("attention split on the sequence or the head dim")
    for a in (q, k, v):
        if shape(a)[layout.dim] % c.tp:
            raise NoRule(f"{shape(a)[layout.dim]} heads do not divide over tp={c.tp}")
        c.need(a, layout)
    if isinstance(mask, Node):
        rel = layout.dim - ndim(q)
        of_heads = ndim(mask) >= -rel and shape(mask)[rel] != 1
        c.need(mask, S(ndim(mask) + rel, layout.sections) if of_heads else E)
    return layout
