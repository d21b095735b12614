"""Tile sizes of the grouped products, chosen from shapes and dtypes when a kernel is first launched: no tuning runs.

The table was measured on Hopper (benchmarks/moe_layer.py); elsewhere it is a guess that is right in any case.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Config:
    """Tiles of `m` by `n`, `k` deep at a time; `group` m-tiles share their columns' weights in the L2 cache.

    `a_tma`, `b_tma`: operands come through the tensor memory accelerator where their strides allow it. `programs`: on
    each multiprocessor, 0 for one a tile. `flatten`: the next tile's loads start in this tile's epilogue.
    `registers`: at most so many for a thread, so that two programs fit on a multiprocessor; 0 for any number.
    """

    m: int
    n: int
    k: int
    warps: int = 8
    stages: int = 3
    group: int = 8
    a_tma: bool = True
    b_tma: bool = True
    programs: int = 0
    flatten: bool = False
    registers: int = 0


# by kernel, for half precision
TABLE = {
    "none": Config(128, 256, 64, programs=1, flatten=True),
    "gate": Config(128, 128, 64, stages=4, group=16),
    "gate_vjp": Config(128, 128, 64, registers=128),
    "outer": Config(128, 128, 32, stages=6),  # gathers
    "outer_rows": Config(128, 256, 64, stages=4),
}


# Above this depth one program a tile is as fast (on an H200, sums of 1,536: 2.49 ms for 2.54, of 768: 1.53 for 1.30)
# and finds the multiprocessors that NCCL leaves: one on each took twice its time beside an all-reduce.
DEEP = 1024


def choose(kind: str, rows: int, width: int, depth: int, dtype: torch.dtype) -> Config:
    """For `rows` rows an expert on average, results `width` wide and sums over `depth`."""
    if dtype == torch.float32:
        return Config(64, 64, 32, warps=4, stages=2, a_tma=False, b_tma=False)
    found = TABLE[kind]
    if kind == "none" and depth > DEEP:
        found = replace(found, programs=0, flatten=False)
    if rows <= 64 and not kind.startswith("outer"):
        return Config(64, min(found.n, 128), 64, warps=4, stages=4)
    return found
