"""Tokens over experts: copied into rows that are sorted by expert, and summed back; all of them, or some."""

from __future__ import annotations

import torch
from torch import Tensor

from tedcompile.ops import groups
from tedcompile.ops.define import define, ops, save


def _fake_permute(x, index, experts, rows=None):
    n = index.shape[0] * index.shape[1] if rows is None else rows
    return (
        x.new_empty(n, x.shape[1]),
        index.new_empty(experts, dtype=torch.int64),
        index.new_empty(tuple(index.shape), dtype=torch.int64),
        index.new_empty(n, dtype=torch.int64),
    )


@define(
    "permute(Tensor x, Tensor index, int experts) -> (Tensor, Tensor, Tensor, Tensor)",
    _fake_permute,
    (
        lambda ctx, inputs, output: ctx.save_for_backward(*output[2:]),
        lambda ctx, rows, counts, perm, order: (ops.gather_sum(rows, *ctx.saved_tensors), None, None),
    ),
)
def permute(x, index, experts):
    """Copies tokens into rows sorted by expert, stable in the token order.

    x (T, H), index (T, K) int, experts E -> rows (T*K, H), counts (E,) rows of each expert, perm (T, K) the row of each
    slot, order (T*K,) the slot (t*K+k) of each row. Slots with index -1 are no rows: they come last and no count has
    them. VJP: a gather-sum over `perm`.
    """
    counts, perm, order = _route(index, experts)
    return x[order // index.shape[1]], counts, perm, order


def _route(index: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    flat = index.reshape(-1)
    flat = torch.where(flat < 0, experts, flat)
    order = torch.argsort(flat, stable=True)
    perm = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
    counts = torch.zeros(experts + 1, dtype=torch.int64, device=flat.device)
    counts.scatter_add_(0, flat.long(), torch.ones_like(flat, dtype=torch.int64))
    return counts[:experts].clone(), perm.view(index.shape), order


@define(
    "route(Tensor index, int experts) -> (Tensor, Tensor, Tensor)",
    lambda index, experts: _fake_permute(index.new_empty(index.shape[0], 0), index, experts)[1:],
)
def route(index, experts):
    """`permute` without its rows: index (T, K) int, experts E -> counts (E,), perm (T, K), order (T*K,)."""
    return _route(index, experts)


# of a sum over each token's rows: every row gets its token's cotangent
SUM_OF_ROWS = (
    lambda ctx, inputs, output: ctx.save_for_backward(*inputs[1:]),
    lambda ctx, g: (g[ctx.saved_tensors[1] // ctx.saved_tensors[0].shape[1]], None, None),
)


@define(
    "gather_sum(Tensor rows, Tensor perm, Tensor order) -> Tensor",
    lambda rows, perm, order: rows.new_empty(perm.shape[0], rows.shape[1]),
    SUM_OF_ROWS,
)
def gather_sum(rows, perm, order):
    """rows (N, H), perm (T, K), order (N,) -> (T, H): the sum of each token's K rows, in slot order (no atomic add)."""
    return rows[perm].sum(1)


def _unpermute_vjp(ctx, g):
    rows, perm, order, weights = ctx.saved_tensors
    grad_rows = g[order // perm.shape[1]] * weights.reshape(-1)[order, None].to(g.dtype)
    grad_weights = (rows[perm] * g[:, None]).sum(-1).to(weights.dtype)
    return grad_rows.to(rows.dtype), None, None, grad_weights


@define(
    "unpermute(Tensor rows, Tensor perm, Tensor order, Tensor weights) -> Tensor",
    lambda rows, perm, order, weights: rows.new_empty(
        (perm.shape[0], rows.shape[1]), dtype=torch.promote_types(rows.dtype, weights.dtype)
    ),
    (save, _unpermute_vjp),
)
def unpermute(rows, perm, order, weights):
    """rows (N, H), perm (T, K), order (N,), weights (T, K) -> (T, H): weighted sum of each token's rows."""
    return (rows[perm] * weights[..., None]).sum(1)


def picked(rows: Tensor, perm: Tensor) -> Tensor:
    """rows (N, H), perm (T, K) -> (T, K, H); zeros where perm is -1."""
    if rows.shape[0] == 0:
        return rows.new_zeros(*perm.shape, *rows.shape[1:])
    return rows[perm.clamp(min=0)] * (perm >= 0)[..., None].to(rows.dtype)


def _fake_select(x, index, experts):
    return _fake_permute(x, index, experts, torch.library.get_ctx().new_dynamic_size())


@define(
    "select(Tensor x, Tensor index, int experts) -> (Tensor, Tensor, Tensor, Tensor)",
    _fake_select,
    (
        lambda ctx, inputs, output: ctx.save_for_backward(*output[2:]),
        lambda ctx, rows, counts, perm, order: (ops.gather_sum_some(rows, *ctx.saved_tensors), None, None),
    ),
)
def select(x, index, experts):
    """`permute` without the slots of index -1: rows (N, H) are as many as have an expert; perm is -1 for the others."""
    counts, perm, order = route_some(index, experts)
    return x[order // index.shape[1]], counts, perm, order


@define(
    "route_some(Tensor index, int experts) -> (Tensor, Tensor, Tensor)",
    lambda index, experts: _fake_select(index.new_empty(index.shape[0], 0), index, experts)[1:],
)
def route_some(index, experts):
    """`select` without its rows: index (T, K) int, experts E -> counts (E,), perm (T, K), order (N,)."""
    counts, perm, order = ops.route(index, experts)
    return counts, torch.where(index < 0, -1, perm), order[: int(counts.sum())].clone()


@define(
    "gather_sum_some(Tensor rows, Tensor perm, Tensor order) -> Tensor",
    lambda rows, perm, order: rows.new_empty(perm.shape[0], rows.shape[1]),
    SUM_OF_ROWS,
)
def gather_sum_some(rows, perm, order):
    """`gather_sum` over the slots whose perm is not -1."""
    return picked(rows, perm).sum(1)


def _unpermute_some_vjp(ctx, g):
    rows, perm, order, weights = ctx.saved_tensors
    grad_rows = g[order // perm.shape[1]] * weights.reshape(-1)[order, None].to(g.dtype)
    return grad_rows.to(rows.dtype), None, None, ops.slot_products(rows, perm, g).to(weights.dtype)


@define(
    "slot_products(Tensor rows, Tensor perm, Tensor g) -> Tensor",
    lambda rows, perm, g: g.new_empty(tuple(perm.shape)),
)
def slot_products(rows, perm, g):
    """rows (N, H), perm (T, K), g (T, H) -> (T, K): each slot's row times its token's g, zero where perm is -1."""
    return (picked(rows, perm) * g[:, None]).sum(-1)


@define(
    "unpermute_some(Tensor rows, Tensor perm, Tensor order, Tensor weights) -> Tensor",
    lambda rows, perm, order, weights: rows.new_empty(
        (perm.shape[0], rows.shape[1]), dtype=torch.promote_types(rows.dtype, weights.dtype)
    ),
    (save, _unpermute_some_vjp),
)
def unpermute_some(rows, perm, order, weights):
    """`unpermute` over the slots whose perm is not -1: of each token what its experts here make of it."""
    return (picked(rows, perm) * weights[..., None]).sum(1)


@define(
    "spread(Tensor x, Tensor perm, Tensor order) -> Tensor",
    lambda x, perm, order: x.new_empty((order.shape[0], *x.shape[1:])),
    (
        lambda ctx, inputs, output: ctx.save_for_backward(*inputs[1:]),
        lambda ctx, g: (ops.gather_sum_some(g, *ctx.saved_tensors), None, None),
    ),
)
def spread(x, perm, order):
    """x (T, ...), perm (T, K), order (N,) -> (N, ...): each row its token's entry."""
    return x[order // perm.shape[1]]


@define(
    "destinations(Tensor index, int n, int size) -> Tensor",
    lambda index, n, size: index.new_empty(index.shape[0], size),
)
def destinations(index, n, size):
    """index (T, K) of experts, n on each of `size` ranks -> (T, size): d at d where a token has an expert there."""
    ranks = torch.arange(size, device=index.device)
    there = (torch.where(index < 0, -1, index // n)[..., None] == ranks).any(1)
    return torch.where(there, ranks, -1).to(index.dtype)


@define("localize(Tensor index, int n, str axis) -> Tensor", lambda index, n, axis: torch.empty_like(index))
def localize(index, n, axis):
    """index (..., K) of experts, n on each rank -> their numbers on this rank, -1 for those of other ranks."""
    local = index - groups.index_in(axis) * n
    return torch.where((local >= 0) & (local < n) & (index >= 0), local, -1)


@define(
    "take(Tensor x, Tensor order, Tensor inverse) -> Tensor",
    lambda x, order, inverse: x.new_empty((order.shape[0], *x.shape[1:])),
    (
        lambda ctx, inputs, output: ctx.save_for_backward(inputs[1], inputs[2]),
        lambda ctx, g: (ops.take(g, ctx.saved_tensors[1], ctx.saved_tensors[0]), None, None),
    ),
)
def take(x, order, inverse):
    """x[order] for a permutation and its inverse, so that the VJP is a take as well."""
    return x[order]
