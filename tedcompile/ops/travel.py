"""Rows between ranks: to those that hold their experts, and back; sizes depend on data."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tedcompile.ops import groups
from tedcompile.ops.define import NO_GRADIENT, define, keep, ops, same


@define(
    "exchange_counts(Tensor counts, int size, str axis) -> Tensor",
    lambda counts, size, axis: counts.new_empty(size, counts.shape[0] // size),
)
def exchange_counts(counts, size, axis):
    """counts (E,) of this rank's rows -> (size, E/size): the rows each rank sends for each expert held here."""
    out = torch.empty_like(counts)
    dist.all_to_all_single(out, counts.contiguous(), group=groups.group_of(axis))
    return out.view(size, -1)


@define(
    "splits(Tensor sent, Tensor received) -> Tensor",
    lambda sent, received: torch.empty(2, received.shape[0], dtype=torch.int64),
)
def splits(sent, received):
    """sent (E,), received (size, E/size) -> (2, size) on the host: rows to and from each rank (the step's one sync)."""
    return torch.stack([sent.view(received.shape).sum(1), received.sum(1)]).cpu()


def _all_to_all_vjp(ctx, g):
    x, splits = ctx.saved_tensors
    return ops.all_to_all_like(g, ops.way_back(splits), x, ctx.axis), None, None


def _save_all_to_all(ctx, inputs, output):
    ctx.save_for_backward(inputs[0], inputs[1])
    ctx.axis = inputs[-1]


@define("way_back(Tensor splits) -> Tensor", same)
def way_back(splits):
    """splits (2, size) [to, from] -> [from, to]; an op of ours, for ATen's would be a C++ kernel to compile."""
    return splits.flip(0)


@define(
    "all_to_all(Tensor x, Tensor splits, str axis) -> Tensor",
    lambda x, splits, axis: x.new_empty((torch.library.get_ctx().new_dynamic_size(), *x.shape[1:])),
    (_save_all_to_all, _all_to_all_vjp),
)
def all_to_all(x, splits, axis):
    """x (N, H) ordered by destination, splits (2, size) [to, from] -> (N', H). VJP: the counts swapped.

    Rows of x beyond the counts are no rows (padding), and stay.
    """
    return _send(x, splits, None, axis)[0]


def _send(x: Tensor, splits: Tensor, like: Tensor | None, axis: str, async_op: bool = False) -> tuple[Tensor, Any]:
    """What arrives, with as many rows as `like` where it is given (padding gets zeros), and what to wait for."""
    to, from_ = splits.tolist()
    got = sum(from_)
    out = x.new_empty(got if like is None else like.shape[0], *x.shape[1:])
    work = _exchange(x[: sum(to)], out[:got], to, from_, axis, async_op)
    out[got:] = 0
    return out, work


def _exchange(x: Tensor, out: Tensor, to: list[int], from_: list[int], axis: str, async_op: bool = False) -> Any:
    return dist.all_to_all_single(out, x.contiguous(), from_, to, group=groups.group_of(axis), async_op=async_op)


def _all_to_all_like_vjp(ctx, g):
    x, splits = ctx.saved_tensors
    return ops.all_to_all_like(g, ops.way_back(splits), x, ctx.axis), None, None, None


@define(
    "all_to_all_like(Tensor x, Tensor splits, Tensor like, str axis) -> Tensor",
    lambda x, splits, like, axis: x.new_empty((like.shape[0], *x.shape[1:])),
    (_save_all_to_all, _all_to_all_like_vjp),
)
def all_to_all_like(x, splits, like, axis):
    """`all_to_all` whose result has as many rows as `like`: the way back, whose size is known. Padding gets zeros."""
    return _send(x, splits, like, axis)[0]


@define("arrive(Tensor out, Tensor x, Tensor? order) -> Tensor", lambda out, x, order: (
    torch.empty_like(out) if order is None else out.new_empty((order.shape[0], *out.shape[1:]))
))  # fmt: skip
def arrive(out, x, order):
    """What `start_all_to_all` has sent, out[order] where an order is given; its operand x lives until here."""
    for work in _on_their_way.pop(out.data_ptr(), ()):
        work.wait()
    return out.clone() if order is None else out[order]


_on_their_way: dict[int, list] = {}  # by the address of what is received


@define(
    "start_all_to_all(Tensor x, Tensor splits, Tensor? like, str axis) -> Tensor",
    lambda x, splits, like, axis: x.new_empty(
        (torch.library.get_ctx().new_dynamic_size() if like is None else like.shape[0], *x.shape[1:])
    ),
)
def start_all_to_all(x, splits, like, axis):
    """`all_to_all`, or `all_to_all_like` where `like` is given, that is waited for by `arrive`."""
    out, work = _send(x, splits, like, axis, async_op=True)
    _on_their_way.setdefault(out.data_ptr(), []).append(work)
    return out


@define("row_marks(Tensor x) -> Tensor", lambda x: x.new_empty(x.shape[0], dtype=torch.uint8), NO_GRADIENT)
def row_marks(x):
    """x (N, ...) -> (N,) bytes of zero: what is kept where only the number of rows is needed again."""
    return x.new_zeros(x.shape[0], dtype=torch.uint8)


@define(
    "row_sizes(Tensor received, int size) -> Tensor",
    lambda received, size: torch.empty(size, dtype=torch.int64),
)
def row_sizes(received, size):
    """received (size*R, n): what R sources sent to each of `size` ranks for n experts -> (size,) rows, on the host."""
    return received.view(size, -1).sum(1).cpu()


def _save_rows(ctx, inputs, output):
    ctx.save_for_backward(inputs[0], inputs[1])
    ctx.axis = inputs[-1]


def _fake_gather_rows(x, sizes, axis):
    return x.new_empty((torch.library.get_ctx().new_dynamic_size(), *x.shape[1:]))


@define(
    "gather_rows(Tensor x, Tensor sizes, str axis) -> Tensor",
    _fake_gather_rows,
    (
        _save_rows,
        lambda ctx, g: (ops.scatter_rows(g, ctx.saved_tensors[1], ctx.saved_tensors[0], ctx.axis), None, None),
    ),
)
def gather_rows(x, sizes, axis):
    """D to E: own rows x (n, H), sizes (size,) of all ranks -> all ranks' rows, in rank order. VJP: `scatter_rows`."""
    counts = sizes.tolist()
    own = x[: counts[groups.index_in(axis)]]
    out = x.new_empty(sum(counts), *x.shape[1:])
    _exchange(torch.cat([own] * len(counts)), out, [own.shape[0]] * len(counts), counts, axis)
    return out


@define(
    "gather_rows_like(Tensor x, Tensor sizes, Tensor like, str axis) -> Tensor",
    lambda x, sizes, like, axis: x.new_empty((like.shape[0], *x.shape[1:])),
)
def gather_rows_like(x, sizes, like, axis):
    """`gather_rows` whose result has as many rows as `like`."""
    return gather_rows(x, sizes, axis)


def _scatter_rows_vjp(ctx, g):
    y, sizes = ctx.saved_tensors
    return ops.gather_rows_like(g, sizes, y, ctx.axis), None, None, None


@define(
    "scatter_rows(Tensor y, Tensor sizes, Tensor like, str axis) -> Tensor",
    lambda y, sizes, like, axis: y.new_empty((like.shape[0], *y.shape[1:])),
    (_save_rows, _scatter_rows_vjp),
)
def scatter_rows(y, sizes, like, axis):
    """P to D: partial y (N, H) of all ranks' rows -> (n, H), own rows' sums; `like` gives n. VJP: `gather_rows`.

    A reduce-scatter of unequal parts: an all-to-all, and a sum in rank order, so that it is deterministic.
    """
    counts = sizes.tolist()
    own, size = counts[groups.index_in(axis)], len(counts)
    parts = y.new_empty(size * own, *y.shape[1:])
    _exchange(y, parts, counts, [own] * size, axis)
    out = y.new_empty(like.shape[0], *y.shape[1:])
    out[:own] = parts.view(size, own, *y.shape[1:]).sum(0)
    out[own:] = 0
    return out


@define(
    "regroup(Tensor received, Tensor rows) -> (Tensor, Tensor)",
    lambda received, rows: (received.new_empty(rows.shape[0]), received.new_empty(rows.shape[0])),
    NO_GRADIENT,
)
def regroup(received, rows):
    """received (size, n) counts, rows (N', H) by source then expert -> order, inverse (N',): by expert, then source."""
    size, n = received.shape
    experts = torch.arange(n, device=received.device).repeat(size)
    experts = torch.repeat_interleave(experts, received.reshape(-1), output_size=rows.shape[0])
    order = torch.argsort(experts, stable=True)
    return order, torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))


@define(
    "own_experts(Tensor x, int dim, int size, str axis) -> Tensor",
    lambda x, dim, size, axis: x.new_empty(
        tuple(s // size if i == 0 else s * size if i == dim else s for i, s in enumerate(x.shape))
    ),
    (
        keep("dim", "size", "axis"),
        lambda ctx, g: (ops.part_of_experts(g, ctx.dim, ctx.size, ctx.axis), None, None, None),
    ),
)
def own_experts(x, dim, size, axis):
    """x: S(dim) of all E experts -> S(0): E/size experts whole. An all-to-all; VJP: `part_of_experts`."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    dist.all_to_all_single(out, x.contiguous(), group=groups.group_of(axis))
    return torch.cat(out.chunk(size, 0), dim)


@define(
    "part_of_experts(Tensor x, int dim, int size, str axis) -> Tensor",
    lambda x, dim, size, axis: x.new_empty(
        tuple(s * size if i == 0 else s // size if i == dim else s for i, s in enumerate(x.shape))
    ),
)
def part_of_experts(x, dim, size, axis):
    """The inverse of `own_experts`."""
    sent = torch.cat(x.chunk(size, dim), 0)
    out = torch.empty_like(sent)
    dist.all_to_all_single(out, sent, group=groups.group_of(axis))
    return out
