"""The output head and its cross-entropy as one op: a chunk of the logits exists at a time (Liger, arXiv 2410.10989)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tedcompile.ops.define import define, ops
from tedcompile.ops.vocabulary import within

CHUNK = 1 << 30  # bytes of logits that exist at a time


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def chunk_rows(rows: int, columns: int, itemsize: int) -> int:
    """How many rows a chunk has: a power of two, for products of such sizes are fastest, of at most `CHUNK` bytes."""
    fit = max(CHUNK // (columns * itemsize), 1)
    return max(min(rows, 1 << fit.bit_length() - 1), 1)


@define(
    "loss_rows(Tensor logits, Tensor target, float scale) -> (Tensor, Tensor)",
    lambda logits, target, scale: (
        logits.new_empty(len(logits), dtype=_wide(logits.dtype)),
        logits.new_empty(len(logits), dtype=_wide(logits.dtype)),
    ),
)
def loss_rows(logits, target, scale):
    """logits (N, V), target (N,) -> (N,), (N,): of scale * logits the log-sum-exp, and the value at the target, 0 where
    that is no column."""
    z = logits.to(_wide(logits.dtype)) * scale
    index, inside = within(target, logits.shape[1])
    return z.logsumexp(-1), z.gather(-1, index[:, None])[:, 0] * inside


@define(
    "loss_gradient_(Tensor(a!) logits, Tensor target, Tensor total, Tensor g_total, Tensor g_picked, float scale)"
    " -> ()",
    lambda logits, target, total, g_total, g_picked, scale: None,
)
def loss_gradient_(logits, target, total, g_total, g_picked, scale):
    """Overwrites logits (N, V) by their gradient, of those of what `loss_rows` gives; `total`: the first."""
    p = torch.exp(logits.to(total.dtype) * scale - total[:, None]) * g_total[:, None]
    index, inside = within(target, logits.shape[1])
    p.scatter_add_(-1, index[:, None], (g_picked * inside)[:, None])
    logits.copy_(p * scale)


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
    for part in _chunks(x, weight):
        to = target[part]
        logits = F.linear(x[part], weight, bias)
        total, picked = ops.loss_rows(logits, to, scale)
        valid = to != ignore
        loss += torch.where(valid, total - picked, 0).sum()
        loss += torch.where(
            valid & ((to < 0) | (to >= len(weight))), torch.nan, 0.0
        ).sum()  # a target that is no column
        if gradients:
            ops.loss_gradient_(logits, to, total, valid.to(wide), -valid.to(wide), scale)
            torch.mm(logits, weight, out=grad_x[part])
            _add_product(grad_weight, logits.t(), x[part])
            if bias is not None:
                grad_bias += logits.sum(0, dtype=wide)
        del logits  # before there are others
    return loss, grad_x, grad_weight, grad_bias


def _linear_rows_fake(x, weight, bias, target, scale, axis):
    return tuple(x.new_empty(len(x), dtype=_wide(x.dtype)) for _ in range(2))


def _save_rows(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:4], output[0])
    ctx.scale, ctx.axis = inputs[4:]


def _rows_vjp(ctx, g_total, g_picked):
    x, weight, bias, target, total = ctx.saved_tensors
    found = ops.linear_rows_vjp(x, weight, bias, target, total, g_total, g_picked, ctx.scale, ctx.axis)
    return *found[: 3 if bias is not None else 2], *(None,) * (3 if bias is not None else 4)


@define(
    "linear_rows(Tensor x, Tensor weight, Tensor? bias, Tensor target, float scale, str axis) -> (Tensor, Tensor)",
    _linear_rows_fake,
    (_save_rows, _rows_vjp),
)
def linear_rows(x, weight, bias, target, scale, axis):
    """What a cross-entropy needs of z = scale * (x weight^T + bias), of which this rank has V/size columns.

    x (N, H), weight (V/size, H), bias (V/size,), target (N,) of all columns -> (N,), (N,) fp32: the log-sum-exp of
    the own columns; and z at the target, partial: 0 where another rank has it.
    """
    to = target - ops.rank(target, axis) * len(weight)  # as columns of this rank
    parts = []
    for part in _chunks(x, weight):
        parts.append(ops.loss_rows(F.linear(x[part], weight, bias), to[part], scale))
    return (
        tuple(torch.cat(p) for p in zip(*parts, strict=True)) if parts else _linear_rows_fake(x, weight, *(None,) * 4)
    )


@define(
    "linear_rows_vjp(Tensor x, Tensor weight, Tensor? bias, Tensor target, Tensor total, Tensor g_total,"
    " Tensor g_picked, float scale, str axis) -> (Tensor, Tensor, Tensor)",
    lambda x, weight, bias, *_: (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        torch.empty_like(weight, memory_format=torch.contiguous_format),
        weight.new_empty(len(weight) if bias is not None else 0),
    ),
)
def linear_rows_vjp(x, weight, bias, target, total, g_total, g_picked, scale, axis):
    """The gradients of `linear_rows` for x, weight and bias (empty without one): the logits are made once more."""
    to = target - ops.rank(target, axis) * len(weight)  # as columns of this rank
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    grad_weight = torch.zeros_like(weight, dtype=total.dtype, memory_format=torch.contiguous_format)
    grad_bias = total.new_zeros(len(weight) if bias is not None else 0)
    for part in _chunks(x, weight):
        logits = F.linear(x[part], weight, bias)
        ops.loss_gradient_(logits, to[part], total[part], g_total[part], g_picked[part], scale)
        torch.mm(logits, weight, out=grad_x[part])
        _add_product(grad_weight, logits.t(), x[part])
        if bias is not None:
            grad_bias += logits.sum(0, dtype=total.dtype)
        del logits
    return grad_x, grad_weight.to(weight.dtype), grad_bias.to(weight.dtype)


def _chunks(x: Tensor, weight: Tensor) -> list[slice]:
    rows = chunk_rows(len(x), len(weight), x.element_size())
    return [slice(start, start + rows) for start in range(0, len(x), rows)]


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b, in the precision of `total`."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += a.to(total.dtype) @ b.to(total.dtype)
