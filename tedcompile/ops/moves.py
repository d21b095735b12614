"""Moves between layouts, each with its VJP (cotangent conventions: `tedcompile.layouts`)."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from tedcompile.ops import groups
from tedcompile.ops.define import NO_GRADIENT, define, keep, ops, same


@define(
    "enter(Tensor x, str axis) -> Tensor",
    same,
    (keep("axis"), lambda ctx, g: (ops.all_reduce(g, ctx.axis), None)),
)
def enter(x, axis):
    """R to E. Identity; the cotangents, partial on each rank, are summed."""
    return x.clone()


@define(
    "share(Tensor x, int size, str axis) -> Tensor",
    same,
    (keep("size", "axis"), lambda ctx, g: (g, None, None)),
)
def share(x, size, axis):
    """R to P: 1/size on each rank. The cotangent of a partial value is whole on every rank, so the VJP is identity."""
    return x / size


@define(
    "all_reduce(Tensor x, str axis) -> Tensor",
    same,
    (keep("axis"), lambda ctx, g: (g, None)),
)
def all_reduce(x, axis):
    """P to R. Sum over the axis; the cotangent is the same on all ranks already."""
    out = x.contiguous().clone()
    dist.all_reduce(out, group=groups.group_of(axis))
    return out


@define("all_max(Tensor x, str axis) -> Tensor", same, (keep("axis"), lambda ctx, g: (None, None)))
def all_max(x, axis):
    """Partial maxima to R, without a gradient (for a stable softmax)."""
    out = x.contiguous().clone()
    dist.all_reduce(out, op=dist.ReduceOp.MAX, group=groups.group_of(axis))
    return out


def _sections(size: int, sections: list[int]) -> list[int]:
    return list(sections) or [size]


def _fake_slice(x, dim, size, sections, axis):
    shape = list(x.shape)
    shape[dim] //= size
    return x.new_empty(shape)


@define(
    "slice(Tensor x, int dim, int size, int[] sections, str axis) -> Tensor",
    _fake_slice,
    (
        keep("dim", "size", "sections", "axis"),
        lambda ctx, g: (ops.gather(g, ctx.dim, ctx.size, ctx.sections, ctx.axis), None, None, None, None),
    ),
)
def slice_(x, dim, size, sections, axis):
    """R to S(dim): this rank's part, of each section for a fused dim. VJP: gather (the cotangents are disjoint)."""
    index = groups.index_in(axis)
    parts = [s.chunk(size, dim)[index] for s in x.split(_sections(x.shape[dim], sections), dim)]
    return torch.cat(parts, dim) if len(parts) > 1 else parts[0].clone(memory_format=torch.contiguous_format)


def _fake_gather(x, dim, size, sections, axis):
    shape = list(x.shape)
    shape[dim] *= size
    return x.new_empty(shape)


@define(
    "gather(Tensor x, int dim, int size, int[] sections, str axis) -> Tensor",
    _fake_gather,
    (
        keep("dim", "size", "sections", "axis"),
        lambda ctx, g: (ops.slice(g, ctx.dim, ctx.size, ctx.sections, ctx.axis), None, None, None, None),
    ),
)
def gather(x, dim, size, sections, axis):
    """S(dim) to R: all-gather. VJP: a local slice, for the cotangent is replicated (a sum would be tp too large)."""
    out = x.new_empty((size * x.shape[0], *x.shape[1:]) if x.dim() else (size,))
    dist.all_gather_into_tensor(out, x.contiguous(), group=groups.group_of(axis))
    return ungather(out, dim, size, sections)


@define(
    "gather_enter(Tensor x, int dim, int size, int[] sections, str axis) -> Tensor",
    _fake_gather,
    (
        keep("dim", "size", "sections", "axis"),
        lambda ctx, g: (ops.reduce_scatter(g, ctx.dim, ctx.size, ctx.sections, ctx.axis), None, None, None, None),
    ),
)
def gather_enter(x, dim, size, sections, axis):
    """S(dim) to E: enter(gather(x)). All-gather; the cotangents are partial, so the VJP is a reduce-scatter."""
    return gather(x, dim, size, sections, axis)


@define(
    "whole_of(Tensor part, Tensor whole, int dim, int size, str axis) -> Tensor",
    lambda part, whole, dim, size, axis: torch.empty_like(whole),
    (
        keep("dim", "size", "axis"),
        lambda ctx, g: (ops.reduce_scatter(g, ctx.dim, ctx.size, [], ctx.axis), None, None, None, None),
    ),
)
def whole_of(part, whole, dim, size, axis):
    """`whole`, of which `part` is this rank's part on `dim`: gather_enter(part) that is there already."""
    return whole.clone()


@define(
    "reduce_scatter(Tensor x, int dim, int size, int[] sections, str axis) -> Tensor",
    _fake_slice,
    (
        keep("dim", "size", "sections", "axis"),
        lambda ctx, g: (ops.gather(g, ctx.dim, ctx.size, ctx.sections, ctx.axis), None, None, None, None),
    ),
)
def reduce_scatter(x, dim, size, sections, axis):
    """P to S(dim): slice(all_reduce(x)). VJP: gather, for every rank's part of x has the whole cotangent."""
    blocks = rank_major(x, dim, size, sections)
    out = x.new_empty((blocks.shape[0] // size, *blocks.shape[1:]))
    dist.reduce_scatter_tensor(out, blocks.contiguous(), group=groups.group_of(axis))
    return out


def rank_major(x: Tensor, dim: int, size: int, sections: list[int]) -> Tensor:
    """The inverse of `ungather`: the parts of all ranks, stacked on dim 0 as a collective takes them."""
    if dim == 0 and not sections:
        return x
    parts = [s.chunk(size, dim) for s in x.split(_sections(x.shape[dim], sections), dim)]
    return torch.cat([torch.cat(each, dim) if len(each) > 1 else each[0] for each in zip(*parts, strict=True)])


@define(
    "drop(Tensor x) -> Tensor",
    same,
    (lambda ctx, inputs, output: None, lambda ctx, g: g),
)
def drop(x):
    """Asks for tokens (T, ...) as S(0): each rank keeps its own (TED's duplicate token dropping). Identity, planned."""
    return x.clone()


def ungather(out: Tensor, dim: int, size: int, sections: list[int]) -> Tensor:
    """Rank-major blocks, stacked on dim 0 as a collective delivers them, to one tensor whole on `dim`."""
    if dim == 0 and not sections:
        return out
    blocks = out.chunk(size, 0)
    if not sections:
        return torch.cat(blocks, dim)
    local = [s // size for s in sections]
    return torch.cat([part for each in zip(*(b.split(local, dim) for b in blocks), strict=True) for part in each], dim)


@define("rank(Tensor like, str axis) -> Tensor", lambda like, axis: like.new_empty((), dtype=torch.int64), NO_GRADIENT)
def rank(like, axis):
    """This rank's index on the axis, a 0-d int64 tensor on the device of `like`: graphs hold no rank as a constant."""
    return torch.full((), groups.index_in(axis), dtype=torch.int64, device=like.device)


@define(
    "portions(Tensor x, int n) -> Tensor[]",
    None,
    (
        lambda ctx, inputs, output: None,
        lambda ctx, grads: (ops.join(grads), None),
    ),
)
def portions(x, n):
    """x (T, ...) -> n parts of its rows, in order and as equal as they can be. Of a split x each rank's own rows."""
    return [part.clone() for part in x.tensor_split(n)]


@define(
    "join(Tensor[] parts) -> Tensor",
    None,
    (
        lambda ctx, inputs, output: setattr(ctx, "n", len(inputs[0])),
        lambda ctx, g: ops.portions(g, ctx.n),
    ),
)
def join(parts):
    """The inverse of `portions`."""
    return torch.cat(parts)
