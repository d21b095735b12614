"""Tokens from their rows: sums in slot order, so results are bit-equal from run to run and on all ranks."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _gather_sum(rows, perm, weights, limit, out, H, K: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < H
    end = tl.load(limit) if limit is not None else 2**31 - 1
    total = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(K):
        row = tl.load(perm + token * K + k).to(tl.int64)
        there = (row >= 0) & (row < end)
        value = tl.load(rows + row * H + column, mask=inside & there, other=0).to(tl.float32)
        if WEIGHTED:
            value = tl.where(there, value * tl.load(weights + token * K + k).to(tl.float32), 0)
        total += value
    tl.store(out + token * H + column, total.to(out.dtype.element_ty), mask=inside)


def gather_sum(rows: Tensor, perm: Tensor, limit: Tensor | None, weights: Tensor | None, dtype: torch.dtype) -> Tensor:
    """rows (N, H), perm (T, K), weights (T, K) -> (T, H): sums of each token's rows, in slot order.

    A slot whose perm is negative, or not below `limit` (an int32 tensor), adds nothing.
    """
    rows, perm = rows.contiguous(), perm.contiguous()
    out = rows.new_empty(perm.shape[0], rows.shape[1], dtype=dtype)
    if out.numel():
        width = min(1024, triton.next_power_of_2(rows.shape[1]))
        grid = (perm.shape[0], triton.cdiv(rows.shape[1], width))
        weights = weights if weights is None else weights.contiguous()
        _gather_sum[grid](
            rows, perm, weights, limit, out, rows.shape[1], K=perm.shape[1], WEIGHTED=weights is not None, BLOCK=width,
            num_warps=4,
        )  # fmt: skip
    return out


@triton.jit
def _slot_sums(parts, perm, limit, out, N, P: tl.constexpr, P2: tl.constexpr, BLOCK: tl.constexpr):
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(perm + slot, mask=slot < N, other=-1)
    there = (row >= 0) & (row < tl.load(limit))
    part = tl.arange(0, P2)
    mask = there[:, None] & (part < P)[None, :]
    value = tl.load(parts + row[:, None] * P + part[None, :], mask=mask, other=0)
    tl.store(out + slot, tl.sum(value, 1).to(out.dtype.element_ty), mask=slot < N)


def slot_sums(parts: Tensor, perm: Tensor, limit: Tensor, dtype: torch.dtype) -> Tensor:
    """parts (N, P) fp32, perm (T, K) -> (T, K): the sum of each slot's row of parts, zero for rows from `limit` on."""
    out = parts.new_empty(tuple(perm.shape), dtype=dtype)
    n, width = perm.numel(), parts.shape[1]
    if n:
        lanes = triton.next_power_of_2(width)
        block = max(1, min(256, 4096 // lanes))
        _slot_sums[(triton.cdiv(n, block),)](
            parts, perm.contiguous(), limit, out, n, P=width, P2=lanes, BLOCK=block
        )  # fmt: skip
    return out
