"""Rules of reductions, and of ops that run along one dim."""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from tedcompile.layouts.core import PMAX, Call, E, Layout, NoRule, P, S, aten, differentiable, ndim, rule
from tedcompile.layouts.elementwise import pointwise


def _dims(c: Call, a: Node) -> set[int]:
    dims = c.arg(1)
    if dims is None or isinstance(dims, (list, tuple)) and not dims:
        dims = range(ndim(a))
    return {d % ndim(a) for d in (dims if isinstance(dims, (list, tuple, range)) else [dims])}


@rule(aten.sum.dim_IntList, aten.mean.dim, aten.sum.default, aten.mean.default)
def _reduce(c: Call) -> Layout:
    a = c.node.args[0]
    layout = c.layout(a)
    whole = c.node.target in (aten.sum.default, aten.mean.default)
    dims = set(range(ndim(a))) if whole else _dims(c, a)
    if layout.kind != "S":
        if layout == P:
            return P
        return c.default()
    if layout.dim not in dims:
        keep = c.arg(2, False)
        return S(layout.dim - (0 if keep else sum(d < layout.dim for d in dims)), layout.sections)
    if c.node.target in (aten.mean.dim, aten.mean.default):
        mean, tp = c.node.target, c.tp
        c.emit = lambda x, *args, **kw: aten.div.Scalar(mean(x, *args, **kw), tp)
    return P


rule(aten.div.Scalar, aten.mul.Scalar)(lambda c: P if c.layout(c.node.args[0]) == P else pointwise(c))


@rule(aten.amax.default, aten.amin.default)
def _extreme(c: Call) -> Layout:
    a = c.node.args[0]
    layout = c.layout(a)
    if layout.kind != "S":
        return c.default()
    if layout.dim in _dims(c, a):
        if c.node.target is aten.amin.default or differentiable(c.node):
            raise NoRule("a maximum with a gradient along the dim that is split")
        return PMAX
    return S(layout.dim - (0 if c.arg(2, False) else sum(d < layout.dim for d in _dims(c, a))), layout.sections)


@rule(aten.softmax.int, aten._softmax.default, aten.log_softmax.int, aten.cumsum.default)
def _softmax(c: Call) -> Layout:
    a, dim = c.node.args[0], c.node.args[1] % ndim(c.node.args[0])
    layout = c.layout(a)
    if layout.kind != "S":
        return c.default()
    if dim == layout.dim:
        raise NoRule(f"{c.node.target} along the dim that is split")
    return layout


@rule(aten.var.correction, aten.topk.default, aten.sort.default, aten.argsort.default, aten.argmax.default)
def along_one(c: Call) -> Any:
    for a in c.sharded():
        at = {aten.topk.default: 2, aten.sort.default: 1, aten.argsort.default: 1}.get(c.node.target)
        if at is None or c.arg(at, -1) % ndim(a) == c.layout(a).dim:
            raise NoRule(f"{c.node.target} of a split value")
        return c.layout(a)
    return c.default()


@rule(aten.max.dim)
def _max(c: Call) -> Any:
    a, dim = c.node.args[0], c.node.args[1] % ndim(c.node.args[0])
    layout = c.layout(a)
    if layout.kind != "S":
        return c.default()
    if dim == layout.dim:
        raise NoRule("max along the dim that is split")
    return S(layout.dim - (not c.arg(2, False) and dim < layout.dim), layout.sections)


@rule(aten.rms_norm.default)
def _rms_norm(c: Call) -> Layout:
    a, normalized, weight = c.node.args[0], c.node.args[1], c.arg(2)
    layout = c.layout(a)
    if layout.kind != "S":
        return c.default()
    if layout.dim < ndim(a) - len(normalized):
        c.need(weight, E)
        return layout
    raise NoRule("rms_norm over the dim that is split")


@rule(aten.layer_norm.default, aten.group_norm.default)
def _layer_norm(c: Call) -> Layout:
    a = c.node.args[0]
    layout = c.layout(a)
    if layout.kind != "S":
        return c.default()
    if c.node.target is aten.layer_norm.default and layout.dim < ndim(a) - len(c.node.args[1]):
        c.need(c.arg(2), E)
        c.need(c.arg(3), E)
        return layout
    raise NoRule("a norm over the dim that is split")
