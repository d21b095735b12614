"""Cross-entropy of rows of logits and its gradient, each in one pass over memory; sums in a fixed order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096


@triton.jit
def _rows(logits, target, losses, total, stride, V, ignore, scale, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    lanes = tl.arange(0, BLOCK)
    biggest = tl.full((BLOCK,), float("-inf"), tl.float32)
    sums = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, V, BLOCK):
        inside = start + lanes < V
        z = tl.load(logits + start + lanes, mask=inside, other=0).to(tl.float32) * scale
        z = tl.where(inside, z, float("-inf"))
        new = tl.maximum(biggest, z)
        there = new > float("-inf")
        sums = tl.where(there, sums * tl.exp(biggest - new) + tl.exp(z - new), 0)
        biggest = new
    most = tl.max(biggest, 0)
    lse = most + tl.log(tl.sum(tl.where(biggest > float("-inf"), sums * tl.exp(biggest - most), 0), 0))
    to = tl.load(target + row)
    valid = to != ignore  # a target that is no column's makes the loss nan
    picked = tl.load(logits + to, mask=(to >= 0) & (to < V), other=float("nan")).to(tl.float32) * scale
    tl.store(losses + row, tl.where(valid, lse - picked, 0))
    tl.store(total + row, lse)


@triton.jit
def _gradient(logits, target, total, stride, V, ignore, scale, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    place = logits + row * stride + column
    to = tl.load(target + row)
    p = tl.exp(tl.load(place, mask=column < V, other=0).to(tl.float32) * scale - tl.load(total + row))
    p = tl.where(to != ignore, (p - tl.where(column == to, 1.0, 0.0)) * scale, 0)
    tl.store(place, p.to(logits.dtype.element_ty), mask=column < V)


def loss_rows(logits: Tensor, target: Tensor, ignore: int, scale: float) -> tuple[Tensor, Tensor]:
    """logits (N, V), target (N,) -> (N,), (N,) fp32: each row's loss, 0 where ignored, and its log-sum-exp."""
    losses, total = (logits.new_empty(len(logits), dtype=torch.float32) for _ in range(2))
    if len(logits):
        grid = (len(logits),)
        _rows[grid](
            logits, target.contiguous(), losses, total, logits.stride(0), logits.shape[1], ignore, scale, BLOCK=BLOCK,
            num_warps=8,
        )  # fmt: skip
    return losses, total


def loss_gradient_(logits: Tensor, target: Tensor, total: Tensor, ignore: int, scale: float) -> None:
    """Overwrites logits (N, V) by the gradient that the sum of the losses has for them."""
    if len(logits):
        grid = (len(logits), triton.cdiv(logits.shape[1], BLOCK))
        _gradient[grid](
            logits, target.contiguous(), total, logits.stride(0), logits.shape[1], ignore, scale, BLOCK=BLOCK,
            num_warps=8,
        )  # fmt: skip
