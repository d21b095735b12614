"""Cross-entropy of rows of logits and its gradient, each in one pass over memory; sums in a fixed order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096


@triton.jit
def _rows(logits, target, total, picked, stride, V, scale, BLOCK: tl.constexpr):
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
    to = tl.load(target + row)
    own = tl.load(logits + to, mask=(to >= 0) & (to < V), other=0).to(tl.float32) * scale
    tl.store(picked + row, own)
    tl.store(total + row, most + tl.log(tl.sum(tl.where(biggest > float("-inf"), sums * tl.exp(biggest - most), 0), 0)))


@triton.jit
def _gradient(logits, target, total, g_total, g_picked, stride, V, scale, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    place = logits + row * stride + column
    p = tl.exp(tl.load(place, mask=column < V, other=0).to(tl.float32) * scale - tl.load(total + row))
    p = p * tl.load(g_total + row) + tl.where(column == tl.load(target + row), tl.load(g_picked + row), 0)
    tl.store(place, (p * scale).to(logits.dtype.element_ty), mask=column < V)


def loss_rows(logits: Tensor, target: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """logits (N, V), target (N,) -> (N,), (N,) fp32: each row's log-sum-exp, and its value at the target or 0."""
    total, picked = (logits.new_empty(len(logits), dtype=torch.float32) for _ in range(2))
    if len(logits):
        grid = (len(logits),)
        _rows[grid](
            logits, target.contiguous(), total, picked, logits.stride(0), logits.shape[1], scale, BLOCK=BLOCK,
            num_warps=8,
        )  # fmt: skip
    return total, picked


def loss_gradient_(
    logits: Tensor, target: Tensor, total: Tensor, g_total: Tensor, g_picked: Tensor, scale: float
) -> None:
    """Overwrites logits (N, V) by their gradient, of the gradients (N,) fp32 of what `loss_rows` gives."""
    if len(logits):
        grid = (len(logits), triton.cdiv(logits.shape[1], BLOCK))
        _gradient[grid](
            logits, target.contiguous(), total, g_total.contiguous(), g_picked.contiguous(), logits.stride(0),
            logits.shape[1], scale, BLOCK=BLOCK, num_warps=8,
        )  # fmt: skip
