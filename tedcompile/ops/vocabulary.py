"""Embedding and loss over a vocabulary that is split over tp."""

from __future__ import annotations

import torch
from torch import Tensor

from tedcompile.ops.define import define, ops


def _local_ids(ids: Tensor, size: int, axis: str) -> tuple[Tensor, Tensor]:
    return within(ids - ops.rank(ids, axis) * size, size)


def within(ids: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The ids that are below size, 0 for the others; and which they are."""
    inside = (ids >= 0) & (ids < size)
    return torch.where(inside, ids, 0), inside


def _embedding_shard_vjp(ctx, g):
    weight, ids = ctx.saved_tensors
    local, inside = _local_ids(ids, weight.shape[0], ctx.axis)
    if ctx.padding_idx >= 0:
        inside = inside & (ids != ctx.padding_idx)
    grad = g * inside[..., None]
    return torch.ops.aten.embedding_dense_backward(grad, local, weight.shape[0], -1, False), None, None, None


def _save_embedding(ctx, inputs, output):
    ctx.save_for_backward(inputs[0], inputs[1])
    ctx.padding_idx, ctx.axis = inputs[2:]


@define(
    "embedding_shard(Tensor weight, Tensor ids, int padding_idx, str axis) -> Tensor",
    lambda weight, ids, padding_idx, axis: weight.new_empty((*ids.shape, weight.shape[1])),
    (_save_embedding, _embedding_shard_vjp),
)
def embedding_shard(weight, ids, padding_idx, axis):
    """weight (V/size, H) of this rank, ids (...) -> (..., H), partial: zeros for ids of other ranks' rows."""
    local, inside = _local_ids(ids, weight.shape[0], axis)
    return weight[local] * inside[..., None]


def _pick_vjp(ctx, g):
    x, target = ctx.saved_tensors
    local, inside = _local_ids(target, x.shape[-1], ctx.axis)
    columns = torch.arange(x.shape[-1], device=g.device)
    return torch.where((columns == local[..., None]) & inside[..., None], g[..., None], 0), None, None


def _save_pick(ctx, inputs, output):
    ctx.save_for_backward(inputs[0], inputs[1])
    ctx.axis = inputs[2]


@define(
    "pick(Tensor x, Tensor target, str axis) -> Tensor",
    lambda x, target, axis: x.new_empty(tuple(target.shape)),
    (_save_pick, _pick_vjp),
)
def pick(x, target, axis):
    """x (..., V/size), target (...) global indices -> (...), partial: x at the target, zero where others have it."""
    local, inside = _local_ids(target, x.shape[-1], axis)
    return x.gather(-1, local[..., None])[..., 0] * inside
