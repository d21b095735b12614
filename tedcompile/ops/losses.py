"""The output head and its cross-entropy as one op: a chunk of the logits exists at a time (Liger, arXiv 2410.10989)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tedcompile.ops.define import define, ops

CHUNK = 1 << 30  # bytes of logits that exist at a time


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def chunk_rows(rows: int, columns: int, itemsize: int) -> int:
    """How many rows a chunk has: a power of two, for products of such sizes are fastest, of at most `CHUNK` bytes."""
    fit = max(CHUNK // (columns * itemsize), 1)
    return max(min(rows, 1 << fit.bit_length() - 1), 1)


@define(
    "loss_rows(Tensor logits, Tensor target, int ignore, float scale) -> (Tensor, Tensor)",
    lambda logits, target, ignore, scale: (
        logits.new_empty(len(logits), dtype=_wide(logits.dtype)),
        logits.new_empty(len(logits), dtype=_wide(logits.dtype)),
    ),
)
def loss_rows(logits, target, ignore, scale):
    """logits (N, V), target (N,) -> (N,), (N,): cross-entropy of scale * logits, 0 where ignored, and log-sum-exp."""
    z = logits.to(_wide(logits.dtype)) * scale
    total, valid = z.logsumexp(-1), target != ignore
    picked = z.gather(-1, torch.where(valid, target, 0)[:, None])[:, 0]
    return torch.where(valid, total - picked, 0), total


@define(
    "loss_gradient_(Tensor(a!) logits, Tensor target, Tensor total, int ignore, float scale) -> ()",
    lambda logits, target, total, ignore, scale: None,
)
def loss_gradient_(logits, target, total, ignore, scale):
    """Overwrites logits (N, V) by the gradient that the sum of `loss_rows` has for them; `total` is its log-sum-exp."""
    p = torch.exp(logits.to(total.dtype) * scale - total[:, None])
    valid = target != ignore
    index = torch.where(valid, target, 0)[:, None]
    p.scatter_add_(-1, index, p.new_full((), -1.0).expand_as(index))
    logits.copy_(torch.where(valid[:, None], p * scale, 0))


def _fake(x, weight, bias, target, ignore, scale, gradients):
    wide = _wide(x.dtype)
    like = lambda t: t.new_empty(t.shape if gradients and t is not None else (0,))
    return (
        x.new_empty((), dtype=wide),
        like(x),
        weight.new_empty(weight.shape if gradients else (0,), dtype=wide),
        x.new_empty(weight.shape[:1] if gradients and bias is not None else (0,), dtype=wide),
    )


def _setup(ctx, inputs, output):
    x, weight, bias = inputs[:3]
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[1:])
    ctx.dtypes = x.dtype, weight.dtype, None if bias is None else bias.dtype


def _vjp(ctx, g, *_):
    found = [
        (g * saved).to(dtype) if dtype is not None and needed else None
        for saved, dtype, needed in zip(ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad, strict=False)
    ]
    return *found, None, None, None, None


@define(
    "linear_loss(Tensor x, Tensor weight, Tensor? bias, Tensor target, int ignore, float scale, bool gradients)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _fake,
    (_setup, _vjp),
)
def linear_loss(x, weight, bias, target, ignore, scale, gradients):
    """The cross-entropy of scale * (x weight^T + bias), summed over the rows whose target is not `ignore`.

    x (N, H), weight (V, H), bias (V,), target (N,) -> the sum (fp32, or fp64 for fp64), and its gradients for x, weight
    (fp32) and bias (fp32), made along with it; empty without `gradients`.
    """
    wide = _wide(x.dtype)
    loss = x.new_zeros((), dtype=wide)
    if gradients:
        grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
        grad_weight = torch.zeros_like(weight, dtype=wide, memory_format=torch.contiguous_format)
        grad_bias = x.new_zeros(weight.shape[0] if bias is not None else 0, dtype=wide)
    else:
        grad_x, grad_weight, grad_bias = x.new_empty(0), x.new_empty(0, dtype=wide), x.new_empty(0, dtype=wide)
    rows = chunk_rows(len(x), weight.shape[0], x.element_size())
    for start in range(0, len(x), rows):
        part, to = x[start : start + rows], target[start : start + rows]
        logits = F.linear(part, weight, bias)
        losses, total = ops.loss_rows(logits, to, ignore, scale)
        loss += losses.sum()
        if gradients:
            ops.loss_gradient_(logits, to, total, ignore, scale)
            torch.mm(logits, weight, out=grad_x[start : start + rows])
            _add_product(grad_weight, logits.t(), part)
            if bias is not None:
                grad_bias += logits.sum(0, dtype=wide)
        del logits  # before there are others
    return loss, grad_x, grad_weight, grad_bias


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b, in the precision of `total`."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += a.to(total.dtype) @ b.to(total.dtype)
