"""Sums in one order, for values that must be bit-equal on several ranks."""

from __future__ import annotations

import torch

from tedcompile.ops.define import define, same


@define("sum_into(Tensor x, Tensor?[] indices, Tensor values) -> Tensor", same)
def sum_into(x, indices, values):
    """x.index_put(indices, values, accumulate=True), which sorts on CUDA; Inductor's own adds atomically."""
    return torch.ops.aten.index_put(x, indices, values, True)


@define("sum_along(Tensor x, int dim, Tensor index, Tensor src) -> Tensor", same)
def sum_along(x, dim, index, src):
    """x.scatter_add(dim, index, src), by `sum_into`."""
    places = [torch.arange(n, device=x.device).view(-1, *[1] * (x.dim() - 1 - d)) for d, n in enumerate(index.shape)]
    places[dim] = index
    return sum_into(x, places, src[tuple(slice(n) for n in index.shape)])


@define(
    "embedding_vjp(Tensor g, Tensor ids, int rows, int padding_idx, bool scale) -> Tensor",
    lambda g, ids, rows, padding_idx, scale: g.new_empty(rows, g.shape[-1]),
)
def embedding_vjp(g, ids, rows, padding_idx, scale):
    """An embedding's gradient by ATen's kernel, which sorts on CUDA: g (..., H), ids (...) -> (rows, H)."""
    return torch.ops.aten.embedding_dense_backward(g, ids, rows, padding_idx, scale)
