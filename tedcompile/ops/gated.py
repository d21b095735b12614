"""Gated experts as one op, from tokens to tokens: what the fused kernels compute."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tedcompile.ops.define import define, ops
from tedcompile.ops.products import grouped_mm, grouped_outer
from tedcompile.ops.tokens import picked

# the activations that the fused kernels know (`kernels/activations.py`)
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "relu": torch.relu,
}


def _gated_experts_vjp(ctx, g, _):
    x, weights, counts, perm, order, up, down, pre = ctx.saved_tensors
    g, k = g.to(x.dtype), perm.shape[1]
    grad_pre, h, grad_weights = ops.gated_vjp(g, weights, counts, perm, order, down, pre, ctx.act)
    grad_x = ops.gated_vjp_x(grad_pre, counts, perm, up)
    grad_up = ops.tokens_outer(x, grad_pre, counts, order, k, not up.is_contiguous())
    grad_down = ops.tokens_outer(g, h, counts, order, k, down.is_contiguous()).transpose(1, 2)
    return grad_x, grad_weights, None, None, None, grad_up, grad_down, None, None


def _save_gated(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:7], output[1])
    ctx.act = inputs[7]


@define(
    "gated_experts(Tensor x, Tensor weights, Tensor counts, Tensor perm, Tensor order, Tensor up, Tensor down, str act,"
    " ScalarType dtype) -> (Tensor, Tensor)",
    lambda x, weights, counts, perm, order, up, down, act, dtype: (
        x.new_empty(perm.shape[0], down.shape[2], dtype=dtype),
        x.new_empty(order.shape[0], up.shape[2]),
    ),
    (_save_gated, _gated_experts_vjp),
)
def gated_experts(x, weights, counts, perm, order, up, down, act, dtype):
    """Each token's experts `(act(gate) * value) @ down`, [gate, value] = x @ up, summed by weight: a whole MoE block.

    x (T, H), weights (T, K), counts, perm, order of `route`, up (E, H, 2I), down (E, I, H) -> (T, H) in `dtype`, and
    what the backward needs beside the inputs: [gate, value] (T*K, 2I). Slots without an expert add nothing.
    """
    n = int(counts.sum())
    rows = x[order[:n] // perm.shape[1]]
    pre = grouped_mm(rows, up, counts)
    y = grouped_mm(_gated(pre, act), down, counts)
    out = (picked(y, torch.where(perm < n, perm, -1)) * weights[..., None]).sum(1)
    return out.to(dtype), torch.cat([pre, pre.new_zeros(order.shape[0] - n, pre.shape[1])])


def _gated(pre: Tensor, act: str) -> Tensor:
    gate, value = pre.chunk(2, -1)
    return ACTIVATIONS[act](gate) * value


@define(
    "gated_vjp(Tensor g, Tensor weights, Tensor counts, Tensor perm, Tensor order, Tensor down, Tensor pre, str act)"
    " -> (Tensor, Tensor, Tensor)",
    lambda g, weights, counts, perm, order, down, pre, act: (
        torch.empty_like(pre),
        pre.new_empty(pre.shape[0], down.shape[1]),
        torch.empty_like(weights, memory_format=torch.contiguous_format),
    ),
)
def gated_vjp(g, weights, counts, perm, order, down, pre, act):
    """g (T, H), the cotangent of `gated_experts` -> that of pre (N, 2I), weighted hidden rows (N, I), that of weights.

    A weight's cotangent, <g, h @ down>, is <g @ down', h>, so the experts' outputs are needed no more.
    """
    n = int(counts.sum())
    w = weights.reshape(-1)[order[:n], None].to(pre.dtype)
    grad_h = grouped_mm(g[order[:n] // perm.shape[1]], down.transpose(1, 2), counts)
    with torch.enable_grad():
        leaf = pre[:n].detach().requires_grad_()
        h = _gated(leaf, act)
        (grad_pre,) = torch.autograd.grad(h, leaf, grad_h * w)
    h, products = h.detach(), (grad_h * h.detach()).sum(-1, keepdim=True)
    pad = lambda t: torch.cat([t, t.new_zeros(order.shape[0] - n, t.shape[1])])
    grad_weights = picked(products, torch.where(perm < n, perm, -1))[..., 0].to(weights.dtype)
    return pad(grad_pre), pad(h * w), grad_weights


@define(
    "gated_vjp_x(Tensor g, Tensor counts, Tensor perm, Tensor up) -> Tensor",
    lambda g, counts, perm, up: g.new_empty(perm.shape[0], up.shape[1]),
)
def gated_vjp_x(g, counts, perm, up):
    """g (N, 2I), the cotangent of pre, up (E, H, 2I) -> (T, H), that of x: a sum over each token's rows."""
    n = int(counts.sum())
    return picked(grouped_mm(g[:n], up.transpose(1, 2), counts), torch.where(perm < n, perm, -1)).sum(1)


def _fake_tokens_outer(x, rows, counts, order, k, transposed):
    shape = (counts.shape[0], x.shape[1], rows.shape[1])
    return x.new_empty(shape[0], shape[2], shape[1]).transpose(1, 2) if transposed else x.new_empty(shape)


@define(
    "tokens_outer(Tensor x, Tensor rows, Tensor counts, Tensor order, int k, bool transposed) -> Tensor",
    _fake_tokens_outer,
)
def tokens_outer(x, rows, counts, order, k, transposed):
    """x (T, H) by token, rows (N, I) -> (E, H, I): `grouped_outer` of x[order // k]; transposed: memory (E, I, H)."""
    n = int(counts.sum())
    out = grouped_outer(x[order[:n] // k], rows[:n], counts)
    return out.transpose(1, 2).contiguous().transpose(1, 2) if transposed else out
