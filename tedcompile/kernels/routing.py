"""Rows by expert, without a sort: histograms of blocks of slots, their sums, and each slot's place.

T tokens, K slots a token, E experts, N = T*K slots. A slot's row is: the rows of earlier experts, and of earlier slots
with the same expert. Slots of expert -1 are no rows and come last. Nothing is added atomically.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

SCAN = 1024


@triton.jit
def _histograms(index, hist, N, E: tl.constexpr, E2: tl.constexpr, BLOCK: tl.constexpr):
    """hist (E+1, blocks): the slots of each block by expert; the last row is of those without one."""
    block, blocks = tl.program_id(0), tl.num_programs(0)
    slot = block * BLOCK + tl.arange(0, BLOCK)
    e = tl.load(index + slot, mask=slot < N, other=E).to(tl.int32)
    experts = tl.arange(0, E2)
    counts = tl.sum((e[:, None] == experts[None, :]).to(tl.int32), 0)
    tl.store(hist + experts.to(tl.int64) * blocks + block, counts, mask=experts < E)
    tl.store(hist + E * blocks.to(tl.int64) + block, tl.sum((e < 0).to(tl.int32)))


@triton.jit
def _prefixes(hist, counts, blocks, SCAN: tl.constexpr):
    """Each row of hist becomes its exclusive prefix sums, in place; counts (E+1,) their totals."""
    e = tl.program_id(0)
    hist += e.to(tl.int64) * blocks
    total = tl.zeros((), tl.int32)
    for start in range(0, blocks, SCAN):
        at = start + tl.arange(0, SCAN)
        value = tl.load(hist + at, mask=at < blocks, other=0)
        tl.store(hist + at, total + tl.cumsum(value, 0) - value, mask=at < blocks)
        total += tl.sum(value)
    tl.store(counts + e, total.to(tl.int64))


@triton.jit
def _places(index, hist, counts, perm, order, N, E: tl.constexpr, E2: tl.constexpr, BLOCK: tl.constexpr):
    block, blocks = tl.program_id(0), tl.num_programs(0)
    slot = block * BLOCK + tl.arange(0, BLOCK)
    e = tl.load(index + slot, mask=slot < N, other=E).to(tl.int32)
    experts = tl.arange(0, E2)
    count = tl.load(counts + experts, mask=experts < E, other=0).to(tl.int32)
    start = tl.cumsum(count, 0) - count + tl.load(hist + experts.to(tl.int64) * blocks + block, experts < E, 0)
    here = (e[:, None] == experts[None, :]).to(tl.int32)
    row = tl.sum(here * (tl.cumsum(here, 0) - 1 + start[None, :]), 1)
    none = (e < 0).to(tl.int32)
    last = tl.sum(count) + tl.load(hist + E * blocks.to(tl.int64) + block) + tl.cumsum(none, 0) - 1
    row = tl.where(e < 0, last, row)
    tl.store(perm + slot, row.to(tl.int64), mask=slot < N)
    tl.store(order + row, slot.to(tl.int64), mask=slot < N)


def route(index: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """index (T, K) int -> counts (E,), perm (T, K), order (T*K,), int64: `ted::route`."""
    n, lanes = index.numel(), triton.next_power_of_2(max(experts, 2))
    block = max(16, min(512, 16384 // lanes))
    blocks = max(1, triton.cdiv(n, block))
    hist = index.new_empty(experts + 1, blocks, dtype=torch.int32)
    counts = index.new_empty(experts + 1, dtype=torch.int64)
    perm = index.new_empty(tuple(index.shape), dtype=torch.int64)
    order = index.new_empty(n, dtype=torch.int64)
    index = index.contiguous()
    _histograms[(blocks,)](index, hist, n, E=experts, E2=lanes, BLOCK=block)
    _prefixes[(experts + 1,)](hist, counts, blocks, SCAN=SCAN)
    _places[(blocks,)](index, hist, counts, perm, order, n, E=experts, E2=lanes, BLOCK=block)
    return counts[:experts], perm, order


@triton.jit
def _plan(counts, offsets, by_size, tiles, E: tl.constexpr, E2: tl.constexpr, BLOCK_M: tl.constexpr):
    e = tl.program_id(0)
    experts = tl.arange(0, E2)
    count = tl.load(counts + experts, mask=experts < E, other=-1).to(tl.int32)
    own = tl.load(counts + e).to(tl.int32)
    before = experts < e
    start = tl.sum(tl.where(before, count, 0))
    tl.store(offsets + e, start)
    larger = (count > own) | ((count == own) & before)
    tl.store(by_size + tl.sum(larger.to(tl.int32)), e)
    tile = tl.sum(tl.where(before, (count + BLOCK_M - 1) // BLOCK_M, 0))
    number = (own + BLOCK_M - 1) // BLOCK_M
    for first in range(0, number, 128):
        i = first + tl.arange(0, 128)
        at = tiles + 1 + 2 * (tile + i)
        tl.store(at, e + tl.zeros_like(i), mask=i < number)
        tl.store(at + 1, start + i * BLOCK_M, mask=i < number)
    if e == E - 1:
        tl.store(offsets + E, start + own)
        tl.store(tiles, tile + number)


class Plan:
    """Where each expert's rows are, and the tiles of BLOCK_M rows that have only one expert's.

    offsets (E+1,) int32; by_size (E,) int32, experts by falling number of rows; tiles (1 + 2*max_tiles,) int32: their
    number, then expert and first row of each.
    """

    def __init__(self, counts: Tensor, rows: int, block_m: int):
        experts = counts.shape[0]
        self.block_m, self.max_tiles = block_m, rows // block_m + min(experts, rows)
        self.offsets = counts.new_empty(experts + 1, dtype=torch.int32)
        self.by_size = counts.new_empty(experts, dtype=torch.int32)
        self.tiles = counts.new_empty(1 + 2 * self.max_tiles, dtype=torch.int32)
        lanes = triton.next_power_of_2(max(experts, 2))
        _plan[(experts,)](counts, self.offsets, self.by_size, self.tiles, E=experts, E2=lanes, BLOCK_M=block_m)
