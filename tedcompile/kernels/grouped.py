"""Products of rows sorted by expert: rows times their expert's matrix, and rows times rows for each expert.

N rows, E experts, H and I features. Both kernels may read their rows from tokens while they load (`source`),
so that no permuted copy of x exists; accumulators are fp32. A tile has rows of one expert only (`routing.Plan`), tiles
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
def _matrix(
    b, e, k, n, K: tl.constexpr, WIDTH: tl.constexpr, HALVES: tl.constexpr, B_TMA: tl.constexpr,
    B_KLAST: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A (BLOCK_K, HALVES * BLOCK_N) block of expert e's matrix: columns from n on of each half, zeros outside."""
    if B_TMA:
        if B_KLAST:
            return b.load([e, 0, n, k]).reshape(HALVES * BLOCK_N, BLOCK_K).T
        else:
            tl.static_assert(HALVES == 1)
            return b.load([e, k, n]).reshape(BLOCK_K, BLOCK_N)
    else:
        ks, i = k + tl.arange(0, BLOCK_K), tl.arange(0, HALVES * BLOCK_N)
        ns = n + i % BLOCK_N
        mask = (ks < K)[:, None] & (ns < WIDTH)[None, :]
        ns += i // BLOCK_N * WIDTH
        at = e.to(tl.int64) * K * (HALVES * WIDTH)
        if B_KLAST:
            return tl.load(b + (at + ks[:, None] + ns.to(tl.int64)[None, :] * K), mask=mask, other=0)
        else:
            return tl.load(b + (at + ks.to(tl.int64)[:, None] * (HALVES * WIDTH) + ns[None, :]), mask=mask, other=0)


@triton.jit
def _gate_vjp(
    p, first, row, end, pre, order, weights, c, c2, WIDTH: tl.constexpr, ACT: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The end "gate_vjp" of `_rows_mm` for columns from `first` on, a few at a time so that they stay in registers."""
    if BLOCK_N > 32:
        left, right = p.reshape(BLOCK_M, 2, BLOCK_N // 2).permute(0, 2, 1).split()
        total = _gate_vjp(left, first, row, end, pre, order, weights, c, c2, WIDTH, ACT, BLOCK_M, BLOCK_N // 2)
        first += BLOCK_N // 2
        return total + _gate_vjp(
            right, first, row, end, pre, order, weights, c, c2, WIDTH, ACT, BLOCK_M, BLOCK_N // 2
        )  # fmt: skip
    else:
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
    a, b, pre, source, order, weights, c, c2, parts, offsets, tiles,
    K: tl.constexpr, WIDTH: tl.constexpr, END: tl.constexpr, ACT: tl.constexpr, LONG: tl.constexpr,
    A_TMA: tl.constexpr, B_TMA: tl.constexpr, B_KLAST: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    """p = a @ b[e], then, by END:

    "none": c (N, WIDTH) = p
    "gate": p = [gate, up]; c2 (N, 2*WIDTH) = p, c (N, WIDTH) = act(gate) * up
    "gate_vjp": for h = act(gate) * up, of pre = [gate, up], and w, the row's entry of weights:
        parts (N, n_tiles) = sums of p * h, c = w * h, c2 = the cotangent of pre for h's cotangent w * p
    """
    HALVES: tl.constexpr = 2 if END == "gate" else 1
    m_tiles = tl.load(tiles)
    n_tiles: tl.constexpr = (WIDTH + BLOCK_N - 1) // BLOCK_N
    for tile in tl.range(tl.program_id(0), m_tiles * n_tiles, tl.num_programs(0), flatten=FLATTEN):
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
            if source is not None:
                read = tl.load(source + rows, mask=valid, other=0)
            else:
                read = tl.where(valid, rows, row)
            at = a + (read.to(tl.int64) if LONG else read)[:, None] * K + ks[None, :]
        acc = tl.zeros((BLOCK_M, HALVES * BLOCK_N), tl.float32)
        for k in range(0, K, BLOCK_K):
            if A_TMA:
                x = a.load([row, k])
            elif K % BLOCK_K == 0:
                x = tl.load(at + k)
            else:
                x = tl.load(at + k, mask=(ks < K - k)[None, :], other=0)
            y = _matrix(b, e, k, n * BLOCK_N, K, WIDTH, HALVES, B_TMA, B_KLAST, BLOCK_N, BLOCK_K)
            acc = tl.dot(x, y, acc, input_precision=PRECISION)
        columns = n * BLOCK_N + tl.arange(0, BLOCK_N)
        mask = valid[:, None] & (columns < WIDTH)[None, :]
        there = rows.to(tl.int64)[:, None] * WIDTH + columns[None, :]
        dtype = c.dtype.element_ty
        if END == "none":
            tl.store(c + there, acc.to(dtype), mask=mask)
        elif END == "gate":
            both = rows.to(tl.int64)[:, None] * (2 * WIDTH) + columns[None, :]
            gate, up = acc.to(dtype).reshape(BLOCK_M, 2, BLOCK_N).permute(0, 2, 1).split()
            tl.store(c2 + both, gate, mask=mask)
            tl.store(c2 + both + WIDTH, up, mask=mask)
            y, _ = activate(gate.to(tl.float32), ACT)
            tl.store(c + there, (y * up.to(tl.float32)).to(dtype), mask=mask)
        else:
            total = _gate_vjp(acc, n * BLOCK_N, row, end, pre, order, weights, c, c2, WIDTH, ACT, BLOCK_M, BLOCK_N)
            if parts is not None:
                tl.store(parts + rows.to(tl.int64) * n_tiles + n, total, mask=valid)


@triton.jit
def _columns(
    x, source, k, end, m, WIDTH: tl.constexpr, LONG: tl.constexpr, TMA: tl.constexpr, MASKED: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Rows k to k + BLOCK_K, columns m to m + BLOCK; MASKED: rows from `end` on are zeros."""
    if TMA and not MASKED:
        return x.load([k, m])
    else:
        rows, columns = k + tl.arange(0, BLOCK_K), m + tl.arange(0, BLOCK)
        if source is not None:
            read = tl.load(source + rows, mask=rows < end, other=0) if MASKED else tl.load(source + rows)
        else:
            read = rows
        at = x + (read.to(tl.int64) if LONG else read)[:, None] * WIDTH + columns[None, :]
        if MASKED:
            return tl.load(at, mask=(rows < end)[:, None] & (columns < WIDTH)[None, :], other=0)
        elif WIDTH % BLOCK == 0:
            return tl.load(at)
        else:
            return tl.load(at, mask=(columns < WIDTH)[None, :], other=0)


@triton.jit
def _outer(
    a, b, a_desc, b_desc, a_source, b_source, c, offsets, by_size,
    M: tl.constexpr, N: tl.constexpr, A_LONG: tl.constexpr, B_LONG: tl.constexpr,
    A_TMA: tl.constexpr, B_TMA: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """c (E, M, N): of each expert's rows, a (., M) transposed times b (., N); experts with many rows come first."""
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
    for k in range(start, whole, BLOCK_K):
        x = _columns(a_desc if A_TMA else a, a_source, k, end, m, M, A_LONG, A_TMA, False, BLOCK_M, BLOCK_K)
        y = _columns(b_desc if B_TMA else b, b_source, k, end, n, N, B_LONG, B_TMA, False, BLOCK_N, BLOCK_K)
        acc = tl.dot(x.T, y, acc, input_precision=PRECISION)
    if whole < end:
        x = _columns(a, a_source, whole, end, m, M, A_LONG, False, True, BLOCK_M, BLOCK_K)
        y = _columns(b, b_source, whole, end, n, N, B_LONG, False, True, BLOCK_N, BLOCK_K)
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


def _by_tma(x: Tensor, wanted: bool, block: int) -> bool:
    """Whether the tensor memory accelerator takes these strides, and a block so wide (both multiples of 16 bytes)."""
    size = x.element_size()
    return (
        wanted and has_tma(x.device) and x.numel() > 0 and x.data_ptr() % 16 == 0
        and all(s * size % 16 == 0 for s in x.stride()[:-1]) and block * size >= 16
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
    source: Tensor | None = None, pre: Tensor | None = None, order: Tensor | None = None,
    weights: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """`rows` rows of a, or of its tokens a[source] (int32), each times its expert's matrix of weight (E, K, J).

    What comes back depends on `end`: (c,) for "none", (c, pre) for "gate", and (c, cotangent of pre, parts) for
    "gate_vjp", where parts is None without weights (T, K), which `order` reads. Rows of no expert stay as they are.
    """
    a = a.contiguous()
    b, last = memory_order(weight)
    depth, columns = weight.shape[1:]
    halves = 2 if end == "gate" else 1
    width = columns // halves
    n_tiles = triton.cdiv(width, config.n)
    c = a.new_empty(rows, width)
    c2 = None if end == "none" else a.new_empty(rows, 2 * width)
    parts = a.new_empty(rows, n_tiles, dtype=torch.float32) if end == "gate_vjp" and weights is not None else None
    if rows and width:
        assert plan.block_m == config.m
        if last:
            b, block = b.view(-1, halves, width, depth), [1, halves, config.n, config.k]
        else:
            block = [1, config.k, config.n]
        a_tma = source is None and _by_tma(a, config.a_tma, config.k)
        b_tma = (last or halves == 1) and _by_tma(b, config.b_tma, block[-1])
        tiles = plan.max_tiles * n_tiles
        programs = min(tiles, config.programs * multiprocessors(a.device)) if config.programs else tiles
        options = {"maxnreg": config.registers} if config.registers else {}
        _rows_mm[(programs,)](
            TensorDescriptor.from_tensor(a, [config.m, config.k]) if a_tma else a,
            TensorDescriptor.from_tensor(b, block) if b_tma else b,
            pre, source, order, weights, c, c2, parts, plan.offsets, plan.tiles,
            K=depth, WIDTH=width, END=end, ACT=act, LONG=a.numel() >= 2**31, A_TMA=a_tma, B_TMA=b_tma,
            B_KLAST=last, PRECISION=_precision(a.dtype), BLOCK_M=config.m, BLOCK_N=config.n, BLOCK_K=config.k,
            GROUP_M=config.group, FLATTEN=config.flatten, num_warps=config.warps, num_stages=config.stages, **options,
        )  # fmt: skip
    return (c,) if end == "none" else (c, c2) if end == "gate" else (c, c2, parts)


def outer(
    a: Tensor, b: Tensor, plan: Plan, config: Config, dtype: torch.dtype, *, a_source: Tensor | None = None,
    b_source: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """a (N, M), b (N, J) -> (E, M, J): a transposed times b over each expert's rows, zeros for none.

    With a_source (N,) int32, a holds tokens, and its rows are a[a_source]; likewise b.
    """
    a, b = a.contiguous(), b.contiguous()
    experts, m, n = plan.by_size.shape[0], a.shape[1], b.shape[1]
    c = a.new_empty(experts, m, n, dtype=dtype)
    if c.numel():
        a_tma = a_source is None and _by_tma(a, config.a_tma, config.m)
        b_tma = b_source is None and _by_tma(b, config.b_tma, config.n)
        _outer[(experts * triton.cdiv(m, config.m) * triton.cdiv(n, config.n),)](
            a, b,
            TensorDescriptor.from_tensor(a, [config.k, config.m]) if a_tma else None,
            TensorDescriptor.from_tensor(b, [config.k, config.n]) if b_tma else None,
            a_source, b_source, c, plan.offsets, plan.by_size,
            M=m, N=n, A_LONG=a.numel() >= 2**31, B_LONG=b.numel() >= 2**31, A_TMA=a_tma, B_TMA=b_tma,
            PRECISION=_precision(a.dtype), BLOCK_M=config.m, BLOCK_N=config.n, BLOCK_K=config.k,
            GROUP_M=config.group, num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
    return c
