"""Rules of elementwise ops."""

from __future__ import annotations

import math

import torch
from torch.fx import Node

from tedcompile.layouts.core import (
    FACTORIES,
    Call,
    E,
    Layout,
    NoRule,
    P,
    R,
    S,
    aten,
    differentiable,
    ndim,
    rule,
    shape,
    val,
)
from tedcompile.ops import ops

LINEAR = {aten.neg.default, aten.add.Tensor, aten.sub.Tensor}


@rule(torch.Tag.pointwise)
def pointwise(c: Call) -> Layout:
    sharded = c.sharded()
    tensors = c.tensors()
    if not sharded:
        partial = [a for a in tensors if c.layout(a) == P]
        others = [a for a in tensors if a not in partial]
        if c.node.target in LINEAR and partial and all(a.meta.get("weights_only") and c.layout(a) == R for a in others):
            scalars = [a for a in c.node.args if not isinstance(a, Node)]
            if not scalars and not (c.node.kwargs.get("alpha", 1) != 1 and others):
                for a in others:
                    c.need(a, P)
                return P
        if c.node.target is aten.mul.Tensor and len(partial) == 1 and len(others) == 1:
            small = math.prod(shape(others[0])) * 2 <= math.prod(shape(partial[0]))
            alone = len(partial[0].users) == 1  # else the sum is needed anyway, as in a norm
            if small and alone and c.layout(others[0]).kind in "RE" and shape(partial[0]) == shape(c.node):
                c.need(others[0], E)  # linear in the partial operand, so its sum can wait
                return P
        return c.default()
    first = c.layout(sharded[0])
    rel = first.dim - ndim(sharded[0])
    for a in tensors:
        layout = c.layout(a)
        if layout.kind == "S":
            if layout.dim - ndim(a) != rel or layout.sections != first.sections:
                raise NoRule(f"{c.node.target} meets operands split on different dims")
        elif ndim(a) >= -rel and shape(a)[rel] != 1:
            whole = differentiable(a) and not a.meta.get("weights_only") and shape(a) == shape(c.node)
            if (
                c.node.target in LINEAR and whole and not c.residuals_follow
            ):  # a residual: what follows it would be split along the features
                raise NoRule("its result is added to a value that is whole")
            c.need(a, S(ndim(a) + rel, first.sections))
        else:
            c.need(a, E)
    return S(ndim(c.node) + rel, first.sections)


rule(aten.to.dtype, aten._to_copy.default, aten.clone.default, aten.contiguous.default, aten.alias.default)(
    lambda c: (
        c.layout(c.node.args[0])
        if c.layout(c.node.args[0]).kind == "S" or val(c.node).dtype == val(c.node.args[0]).dtype
        else c.default()
    )
)
rule(aten.detach.default, aten.zeros_like.default, aten.ones_like.default)(
    lambda c: c.layout(c.node.args[0]) if c.layout(c.node.args[0]).kind == "S" else c.default()
)
rule(aten.masked_fill.Scalar, aten.masked_fill.Tensor, aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf)(
    pointwise
)


@rule(aten.dropout.default)
def _dropout(c: Call) -> Layout:
    layout = c.layout(c.node.args[0])
    return layout if layout.kind == "S" else c.default()  # `randomness` draws the numbers


@rule(ops.rand.default)
def _rand(c: Call) -> Layout:
    layout = c.layout(c.node.args[0])
    if (layout.kind == "S") != (c.node.args[3] == "tp"):
        raise NoRule("random numbers of tp ranks must differ exactly where the value is split")
    return layout if layout.kind == "S" else R


@rule(*FACTORIES)
def _factory(c: Call) -> Layout:
    return R  # reads only the dtype and device of its operand
