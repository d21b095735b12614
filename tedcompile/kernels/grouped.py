"""Products of rows sorted by expert: rows times their expert's matrix, and rows times rows for each expert.

N rows, E experts, H and I features. Both kernels may read their rows from tokens while they load (`order`,
`per_token`), so that no permuted copy of x exists; accumulators are fp32. A tile has rows of one expert only (`routing.Plan`), tiles
that read the same weights are neighbours in time, and nothing is read back to the host.

`rows_mm` ends in one of three ways: the products themselves; a gated activation of two of them (`gate`); or the
derivative of that activation (`gate_vjp`), from the saved pre-activation halves.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from tedcompile.kernels.activations import activate
from tedcompile.kernels.configs import Config
from tedcompile.kernels.routing import Plan


@triton.jit
def _matrix(b, e, k, n, K: tl.constexpr, COLUMNS: tl.constexpr, B_TMA: tl.constexpr, B_KLAST: tl.constexpr,
            BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """A (BLOCK_K, BLOCK_N) block of expert e's matrix at (k, n); zeros outside."""
    if B_TMA:
        if B_KLAST:
            return b.load([e, n, k]).reshape(BLOCK_N, BLOCK_K).T
        else:
            return b.load([e, k, n]).reshape(BLOCK_K, BLOCK_N)
    else:
        ks, ns = k + tl.arange(0, BLOCK_K), n + tl.arange(0, BLOCK_N)
        mask = (ks < K)[:, None] & (ns < COLUMNS)[None, :]
        at = e.to(tl.int64) * K * COLUMNS
        if B_KLAST:
            return tl.load(b + (at + ks[:, None] + ns.to(tl.int64)[None, :] * K), mask=mask, other=0)
        else:
            return tl.load(b + (at + ks.to(tl.int64)[:, None] * COLUMNS + ns[None, :]), mask=mask, other=0)


@triton.jit
def _gate_vjp(p, first, row, end, pre, order, weights, c, c2, WIDTH: tl.constexpr, ACT: tl.constexpr,
              BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """The end "gate_vjp" of `_rows_mm` for BLOCK_N columns: few at a time stay in registers."""
    rows, columns = row + tl.arange(0, BLOCK_M), first + tl.arange(0, BLOCK_N)
    valid = rows < end
    mask = valid[:, None] & (columns < WIDTH)[None, :]
    both = rows.to(tl.int64)[:, None] * (2 * WIDTH) + columns[None, :]
    there = rows.to(tl.int64)[:, None] * WIDTH + columns[None, :]
    dtype = c.dtype.element_ty
    gate = tl.load(pre + both, mask=mask, other=0).to(tl.float32)
    up = tl.load(pre + both + WIDTH, mask=mask, other=0).to(tl.float32)
    y, slope = activate(gate, ACT)
    h = y * up
    total = tl.sum(p * h, 1)
    if weights is not None:
        w = tl.load(weights + tl.load(order + rows, mask=valid, other=0), mask=valid, other=0).to(tl.float32)
        p, h = p * w[:, None], h * w[:, None]
    tl.store(c + there, h.to(dtype), mask=mask)
    tl.store(c2 + both, (p * up * slope).to(dtype), mask=mask)
    tl.store(c2 + both + WIDTH, (p * y).to(dtype), mask=mask)
    return total


@triton.jit
def _rows_mm(
    a, b, pre, order, weights, c, c2, parts, offsets, tiles,
    K: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, END: tl.constexpr, ACT: tl.constexpr,
    PER_TOKEN: tl.constexpr, A_TMA: tl.constexpr, B_TMA: tl.constexpr, B_KLAST: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr, FLATTEN: tl.constexpr, SPECIALIZE: tl.constexpr,
):  # fmt: skip
    """p = a @ b[e], then, by END:

    "none": c (N, WIDTH) = p
    "gate": p = [gate, up]; c2 (N, 2*WIDTH) = p, c (N, WIDTH) = act(gate) * up
    "gate_vjp": for h = act(gate) * up, of pre = [gate, up], and w, the row's entry of weights:
        parts (N, n_tiles) = sums of p * h, c = w * h, c2 = the cotangent of pre for h's cotangent w * p
    """
    m_tiles = tl.load(tiles)
    n_tiles: tl.constexpr = (WIDTH + BLOCK_N - 1) // BLOCK_N
    for tile in tl.range(
        tl.program_id(0), m_tiles * n_tiles, tl.num_programs(0), flatten=FLATTEN, warp_specialize=SPECIALIZE
    ):
        group = tile // (GROUP_M * n_tiles)
        size = tl.minimum(m_tiles - group * GROUP_M, GROUP_M)
        within = tile % (GROUP_M * n_tiles)
        m, n = group * GROUP_M + within % size, within // size
        e, row = tl.load(tiles + 1 + 2 * m), tl.load(tiles + 2 + 2 * m)
        end = tl.load(offsets + e + 1)
        rows = row + tl.arange(0, BLOCK_M)
        valid = rows < end
        ks = tl.arange(0, BLOCK_K)
        if not A_TMA:
            if PER_TOKEN > 0:
                source = tl.load(order + rows, mask=valid, other=0).to(tl.int64) // PER_TOKEN
            else:
                source = tl.where(valid, rows, row).to(tl.int64)
            at = a + source[:, None] * K + ks[None, :]
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        acc2 = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, K, BLOCK_K):
            if A_TMA:
                x = a.load([row, k])
            elif K % BLOCK_K == 0:
                x = tl.load(at + k)
            else:
                x = tl.load(at + k, mask=(ks < K - k)[None, :], other=0)
            y = _matrix(b, e, k, n * BLOCK_N, K, COLUMNS, B_TMA, B_KLAST, BLOCK_N, BLOCK_K)
            acc = tl.dot(x, y, acc, input_precision=PRECISION)
            if END == "gate":
                y = _matrix(b, e, k, WIDTH + n * BLOCK_N, K, COLUMNS, B_TMA, B_KLAST, BLOCK_N, BLOCK_K)
                acc2 = tl.dot(x, y, acc2, input_precision=PRECISION)
        columns = n * BLOCK_N + tl.arange(0, BLOCK_N)
        mask = valid[:, None] & (columns < WIDTH)[None, :]
        there = rows.to(tl.int64)[:, None] * WIDTH + columns[None, :]
        both = rows.to(tl.int64)[:, None] * (2 * WIDTH) + columns[None, :]
        dtype = c.dtype.element_ty
        if END == "none":
            tl.store(c + there, acc.to(dtype), mask=mask)
        elif END == "gate":
            gate, up = acc.to(dtype), acc2.to(dtype)
            tl.store(c2 + both, gate, mask=mask)
            tl.store(c2 + both + WIDTH, up, mask=mask)
            y, _ = activate(gate.to(tl.float32), ACT)
            tl.store(c + there, (y * up.to(tl.float32)).to(dtype), mask=mask)
        elif BLOCK_N <= 64:
            total = _gate_vjp(acc, n * BLOCK_N, row, end, pre, order, weights, c, c2, WIDTH, ACT, BLOCK_M, BLOCK_N)
            if parts is not None:
                tl.store(parts + rows.to(tl.int64) * n_tiles + n, total, mask=valid)
        else:
            total = tl.zeros((BLOCK_M,), tl.float32)
            left, right = acc.reshape(BLOCK_M, 2, BLOCK_N // 2).permute(0, 2, 1).split()
            for half in tl.static_range(2):
                p = left if half == 0 else right
                first = n * BLOCK_N + half * (BLOCK_N // 2)
                if BLOCK_N <= 128:
                    total += _gate_vjp(
                        p, first, row, end, pre, order, weights, c, c2, WIDTH, ACT, BLOCK_M, BLOCK_N // 2
                    )
                else:
                    p0, p1 = p.reshape(BLOCK_M, 2, BLOCK_N // 4).permute(0, 2, 1).split()
                    total += _gate_vjp(
                        p0, first, row, end, pre, order, weights, c, c2, WIDTH, ACT, BLOCK_M, BLOCK_N // 4
                    )
                    first += BLOCK_N // 4
                    total += _gate_vjp(
                        p1, first, row, end, pre, order, weights, c, c2, WIDTH, ACT, BLOCK_M, BLOCK_N // 4
                    )
            if parts is not None:
                tl.store(parts + rows.to(tl.int64) * n_tiles + n, total, mask=valid)


@triton.jit
def _columns(x, order, k, end, m, WIDTH: tl.constexpr, PER_TOKEN: tl.constexpr, TMA: tl.constexpr,
             MASKED: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """Rows k to k + BLOCK_K, columns m to m + BLOCK; MASKED: rows from `end` on are zeros."""
    if TMA and not MASKED:
        return x.load([k, m])
    else:
        rows, columns = k + tl.arange(0, BLOCK_K), m + tl.arange(0, BLOCK)
        mask = (columns < WIDTH)[None, :]
        if PER_TOKEN > 0:
            slot = tl.load(order + rows, mask=rows < end, other=0) if MASKED else tl.load(order + rows)
            source = slot.to(tl.int64) // PER_TOKEN
        else:
            source = rows.to(tl.int64)
        if MASKED:
            mask = mask & (rows < end)[:, None]
        at = x + source[:, None] * WIDTH + columns[None, :]
        if WIDTH % BLOCK == 0 and not MASKED:
            return tl.load(at)
        else:
            return tl.load(at, mask=mask, other=0)


@triton.jit
def _outer(
    a, b, a_desc, b_desc, order, c, offsets, by_size,
    M: tl.constexpr, N: tl.constexpr, A_PER_TOKEN: tl.constexpr, B_PER_TOKEN: tl.constexpr,
    A_TMA: tl.constexpr, B_TMA: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    SPECIALIZE: tl.constexpr,
):  # fmt: skip
    """c (E, M, N): of each expert's rows, a (N, M) transposed times b (N, N); experts with many rows come first."""
    m_tiles: tl.constexpr = (M + BLOCK_M - 1) // BLOCK_M
    n_tiles: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    e = tl.load(by_size + tl.program_id(0) // (m_tiles * n_tiles))
    tile = tl.program_id(0) % (m_tiles * n_tiles)
    group = tile // (GROUP_M * n_tiles)
    size = tl.minimum(m_tiles - group * GROUP_M, GROUP_M)
    within = tile % (GROUP_M * n_tiles)
    m, n = (group * GROUP_M + within % size) * BLOCK_M, within // size * BLOCK_N
    start, end = tl.load(offsets + e), tl.load(offsets + e + 1)
    whole = start + (end - start) // BLOCK_K * BLOCK_K
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if whole < end:
        x = _columns(a, order, whole, end, m, M, A_PER_TOKEN, False, True, BLOCK_M, BLOCK_K)
        y = _columns(b, order, whole, end, n, N, B_PER_TOKEN, False, True, BLOCK_N, BLOCK_K)
        acc = tl.dot(x.T, y, acc, input_precision=PRECISION)
    for k in tl.range(start, whole, BLOCK_K, warp_specialize=SPECIALIZE):
        x = _columns(a_desc if A_TMA else a, order, k, end, m, M, A_PER_TOKEN, A_TMA, False, BLOCK_M, BLOCK_K)
        y = _columns(b_desc if B_TMA else b, order, k, end, n, N, B_PER_TOKEN, B_TMA, False, BLOCK_N, BLOCK_K)
        acc = tl.dot(x.T, y, acc, input_precision=PRECISION)
    ms, ns = m + tl.arange(0, BLOCK_M), n + tl.arange(0, BLOCK_N)
    at = c + e.to(tl.int64) * M * N + ms.to(tl.int64)[:, None] * N + ns[None, :]
    tl.store(at, acc.to(c.dtype.element_ty), mask=(ms < M)[:, None] & (ns < N)[None, :])


@functools.cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


@functools.cache
def has_tma(device: torch.device) -> bool:
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (9, 0)


def _by_tma(x: Tensor, wanted: bool, block: list[int]) -> bool:
    """Whether the tensor memory accelerator takes these strides (16 bytes) and this block."""
    size = x.element_size()
    return (
        wanted and has_tma(x.device) and x.numel() > 0 and x.data_ptr() % 16 == 0
        and all(s * size % 16 == 0 for s in x.stride()[:-1]) and block[-1] * size >= 16
    )  # fmt: skip


def _precision(dtype: torch.dtype) -> str:
    return "tf32" if dtype != torch.float32 or torch.backends.cuda.matmul.allow_tf32 else "ieee"


def memory_order(weight: Tensor) -> tuple[Tensor, bool]:
    """weight (E, K, N) as contiguous memory: itself, or (E, N, K) and True."""
    if weight.transpose(1, 2).is_contiguous() and not weight.is_contiguous():
        return weight.transpose(1, 2), True
    return weight.contiguous(), False


def rows_mm(
    a: Tensor, weight: Tensor, plan: Plan, config: Config, *, rows: int, end: str = "none", act: str = "silu",
    order: Tensor | None = None, per_token: int = 0, pre: Tensor | None = None, weights: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """`rows` rows of a, or of its tokens a[order // per_token], each times its expert's matrix of weight (E, K, J).

    What comes back depends on `end`: (c,) for "none", (c, pre) for "gate", and (c, cotangent of pre, parts) for
    "gate_vjp", where parts is None without weights (T, K). Rows of no expert are left as they are.
    """
    a = a.contiguous()
    b, last = memory_order(weight)
    depth, columns = weight.shape[1:]
    width = columns // 2 if end == "gate" else columns
    n_tiles = triton.cdiv(width, config.n)
    c = a.new_empty(rows, width)
    c2 = None if end == "none" else a.new_empty(rows, 2 * width)
    parts = a.new_empty(rows, n_tiles, dtype=torch.float32) if end == "gate_vjp" and weights is not None else None
    if rows and width:
        a_tma = not per_token and _by_tma(a, config.a_tma, [config.m, config.k])
        block = [1, config.n, config.k] if last else [1, config.k, config.n]
        b_tma = _by_tma(b, config.b_tma, block)
        tiles = plan.max_tiles * n_tiles
        programs = min(tiles, config.programs * multiprocessors(a.device)) if config.programs else tiles
        assert plan.block_m == config.m
        _rows_mm[(programs,)](
            TensorDescriptor.from_tensor(a, [config.m, config.k]) if a_tma else a,
            TensorDescriptor.from_tensor(b, block) if b_tma else b,
            pre, order, weights, c, c2, parts, plan.offsets, plan.tiles,
            K=depth, WIDTH=width, COLUMNS=columns, END=end, ACT=act, PER_TOKEN=per_token, A_TMA=a_tma, B_TMA=b_tma,
            B_KLAST=last, PRECISION=_precision(a.dtype), BLOCK_M=config.m, BLOCK_N=config.n, BLOCK_K=config.k,
            GROUP_M=config.group, FLATTEN=config.flatten, SPECIALIZE=config.specialize and a_tma and b_tma, num_warps=config.warps,
            num_stages=config.stages,
        )  # fmt: skip
    return (c,) if end == "none" else (c, c2) if end == "gate" else (c, c2, parts)


def outer(
    a: Tensor, b: Tensor, plan: Plan, config: Config, dtype: torch.dtype, *, order: Tensor | None = None,
    a_per_token: int = 0, b_per_token: int = 0,
) -> Tensor:  # fmt: skip
    """a (N, M), b (N, J) -> (E, M, J): a transposed times b over each expert's rows, zeros for none.

    With a_per_token, a holds tokens, and its rows are a[order // a_per_token]; likewise b.
    """
    a, b = a.contiguous(), b.contiguous()
    experts, m, n = plan.by_size.shape[0], a.shape[1], b.shape[1]
    c = a.new_empty(experts, m, n, dtype=dtype)
    if c.numel():
        a_tma = not a_per_token and _by_tma(a, config.a_tma, [config.k, config.m])
        b_tma = not b_per_token and _by_tma(b, config.b_tma, [config.k, config.n])
        _outer[(experts * triton.cdiv(m, config.m) * triton.cdiv(n, config.n),)](
            a, b,
            TensorDescriptor.from_tensor(a, [config.k, config.m]) if a_tma else None,
            TensorDescriptor.from_tensor(b, [config.k, config.n]) if b_tma else None,
            order, c, plan.offsets, plan.by_size,
            M=m, N=n, A_PER_TOKEN=a_per_token, B_PER_TOKEN=b_per_token, A_TMA=a_tma, B_TMA=b_tma,
            PRECISION=_precision(a.dtype), BLOCK_M=config.m, BLOCK_N=config.n, BLOCK_K=config.k,
            GROUP_M=config.group, SPECIALIZE=config.specialize and a_tma and b_tma, num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
    return c
