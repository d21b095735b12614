"""The op vocabulary `torch.ops.ted`: the canonical MoE ops and the moves between layouts, each with its VJP.

Shapes: T tokens, K experts a token, E experts, N rows (token copies, sorted by expert), H and I features.
Backward passes are derived from the VJPs here (TED's drop and gather: arXiv 2303.06318, section 5;
the cotangent conventions are in `layouts.py`). Nothing here adds atomically, so replicated values stay bit-equal.

The `axis` of a collective is a mesh axis in every graph that people read; `passes/lower.py` turns it into the name of
a process group just before a graph is run.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from tedcompile import kernels

LIBRARY = torch.library.Library("ted", "DEF")
ops = torch.ops.ted


def define(schema: str, fake: Callable | None = None, vjp: tuple[Callable, Callable] | None = None):
    """Registers `ted::schema` with the decorated function as its kernel; `vjp` is (setup_context, backward)."""

    def register(kernel: Callable) -> Callable:
        name = LIBRARY.define(schema)
        LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
        torch.library.register_fake(f"ted::{name}", fake or kernel, lib=LIBRARY)
        if vjp:
            torch.library.register_autograd(f"ted::{name}", vjp[1], setup_context=vjp[0], lib=LIBRARY)
        return kernel

    return register


def _keep(*names: str):
    """A setup_context that keeps the named arguments (after the inputs' order) as ctx attributes, saving no tensor."""

    def setup(ctx, inputs, output):
        for name, value in zip(names, inputs[-len(names) :] if names else (), strict=True):
            setattr(ctx, name, value)

    return setup


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


# for ops that read a differentiable tensor and whose result has no gradient
NO_GRADIENT = (lambda ctx, inputs, output: setattr(ctx, "count", len(inputs)), lambda ctx, *_: (None,) * ctx.count)


def same(x: Tensor, *_) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


# ---- process groups -------------------------------------------------------------------------------------------------


def group_of(axis: str) -> dist.ProcessGroup | None:
    """The process group a lowered graph names; an axis of size 1 is never lowered, so it must exist."""
    return torch._C._distributed_c10d._resolve_process_group(axis)


def index_in(axis: str) -> int:
    return dist.get_rank(group_of(axis))


# ---- moves between layouts ------------------------------------------------------------------------------------------


@define(
    "enter(Tensor x, str axis) -> Tensor",
    same,
    (_keep("axis"), lambda ctx, g: (ops.all_reduce(g, ctx.axis), None)),
)
def enter(x, axis):
    """R to E. Identity; the cotangents, partial on each rank, are summed."""
    return x.clone()


@define(
    "share(Tensor x, int size, str axis) -> Tensor",
    same,
    (_keep("size", "axis"), lambda ctx, g: (g, None, None)),
)
def share(x, size, axis):
    """R to P: 1/size on each rank. The cotangent of a partial value is whole on every rank, so the VJP is identity."""
    return x / size


@define(
    "all_reduce(Tensor x, str axis) -> Tensor",
    same,
    (_keep("axis"), lambda ctx, g: (g, None)),
)
def all_reduce(x, axis):
    """P to R. Sum over the axis; the cotangent is the same on all ranks already."""
    out = x.contiguous().clone()
    dist.all_reduce(out, group=group_of(axis))
    return out


@define("all_max(Tensor x, str axis) -> Tensor", same, (_keep("axis"), lambda ctx, g: (None, None)))
def all_max(x, axis):
    """Partial maxima to R, without a gradient (for a stable softmax)."""
    out = x.contiguous().clone()
    dist.all_reduce(out, op=dist.ReduceOp.MAX, group=group_of(axis))
    return out


def _sections(size: int, sections: list[int]) -> list[int]:
    return list(sections) or [size]


def _fake_slice(x, dim, size, sections, axis):
    shape = list(x.shape)
    shape[dim] //= size
    return x.new_empty(shape)


@define(
    "slice(Tensor x, int dim, int size, int[] sections, str axis) -> Tensor",
    _fake_slice,
    (
        _keep("dim", "size", "sections", "axis"),
        lambda ctx, g: (ops.gather(g, ctx.dim, ctx.size, ctx.sections, ctx.axis), None, None, None, None),
    ),
)
def slice_(x, dim, size, sections, axis):
    """R to S(dim): this rank's part, of each section for a fused dim. VJP: gather (the cotangents are disjoint)."""
    index = index_in(axis)
    parts = [s.chunk(size, dim)[index] for s in x.split(_sections(x.shape[dim], sections), dim)]
    return torch.cat(parts, dim) if len(parts) > 1 else parts[0].clone(memory_format=torch.contiguous_format)


def _fake_gather(x, dim, size, sections, axis):
    shape = list(x.shape)
    shape[dim] *= size
    return x.new_empty(shape)


@define(
    "gather(Tensor x, int dim, int size, int[] sections, str axis) -> Tensor",
    _fake_gather,
    (
        _keep("dim", "size", "sections", "axis"),
        lambda ctx, g: (ops.slice(g, ctx.dim, ctx.size, ctx.sections, ctx.axis), None, None, None, None),
    ),
)
def gather(x, dim, size, sections, axis):
    """S(dim) to R: all-gather. VJP: a local slice, for the cotangent is replicated (a sum would be tp too large)."""
    out = x.new_empty((size * x.shape[0], *x.shape[1:]) if x.dim() else (size,))
    dist.all_gather_into_tensor(out, x.contiguous(), group=group_of(axis))
    return ungather(out, dim, size, sections)


@define(
    "gather_enter(Tensor x, int dim, int size, int[] sections, str axis) -> Tensor",
    _fake_gather,
    (
        _keep("dim", "size", "sections", "axis"),
        lambda ctx, g: (ops.reduce_scatter(g, ctx.dim, ctx.size, ctx.sections, ctx.axis), None, None, None, None),
    ),
)
def gather_enter(x, dim, size, sections, axis):
    """S(dim) to E: enter(gather(x)). All-gather; the cotangents are partial, so the VJP is a reduce-scatter."""
    return gather(x, dim, size, sections, axis)


@define(
    "whole_of(Tensor part, Tensor whole, int dim, int size, str axis) -> Tensor",
    lambda part, whole, dim, size, axis: torch.empty_like(whole),
    (
        _keep("dim", "size", "axis"),
        lambda ctx, g: (ops.reduce_scatter(g, ctx.dim, ctx.size, [], ctx.axis), None, None, None, None),
    ),
)
def whole_of(part, whole, dim, size, axis):
    """`whole`, of which `part` is this rank's part on `dim`: gather_enter(part) that is there already."""
    return whole.clone()


@define(
    "reduce_scatter(Tensor x, int dim, int size, int[] sections, str axis) -> Tensor",
    _fake_slice,
    (
        _keep("dim", "size", "sections", "axis"),
        lambda ctx, g: (ops.gather(g, ctx.dim, ctx.size, ctx.sections, ctx.axis), None, None, None, None),
    ),
)
def reduce_scatter(x, dim, size, sections, axis):
    """P to S(dim): slice(all_reduce(x)). VJP: gather, for every rank's part of x has the whole cotangent."""
    blocks = rank_major(x, dim, size, sections)
    out = x.new_empty((blocks.shape[0] // size, *blocks.shape[1:]))
    dist.reduce_scatter_tensor(out, blocks.contiguous(), group=group_of(axis))
    return out


def rank_major(x: Tensor, dim: int, size: int, sections: list[int]) -> Tensor:
    """The inverse of `ungather`: the parts of all ranks, stacked on dim 0 as a collective takes them."""
    if dim == 0 and not sections:
        return x
    parts = [s.chunk(size, dim) for s in x.split(_sections(x.shape[dim], sections), dim)]
    return torch.cat([torch.cat(each, dim) if len(each) > 1 else each[0] for each in zip(*parts, strict=True)])


@define(
    "drop(Tensor x) -> Tensor",
    same,
    (lambda ctx, inputs, output: None, lambda ctx, g: g),
)
def drop(x):
    """Asks for tokens (T, ...) as S(0): each rank keeps its own (TED's duplicate token dropping). Identity, planned."""
    return x.clone()


def ungather(out: Tensor, dim: int, size: int, sections: list[int]) -> Tensor:
    """Rank-major blocks, stacked on dim 0 as a collective delivers them, to one tensor whole on `dim`."""
    if dim == 0 and not sections:
        return out
    blocks = out.chunk(size, 0)
    if not sections:
        return torch.cat(blocks, dim)
    local = [s // size for s in sections]
    return torch.cat([part for each in zip(*(b.split(local, dim) for b in blocks), strict=True) for part in each], dim)


@define("rank(Tensor like, str axis) -> Tensor", lambda like, axis: like.new_empty((), dtype=torch.int64), NO_GRADIENT)
def rank(like, axis):
    """This rank's index on the axis, a 0-d int64 tensor on the device of `like`: graphs hold no rank as a constant."""
    return torch.full((), index_in(axis), dtype=torch.int64, device=like.device)


@define(
    "portions(Tensor x, int n) -> Tensor[]",
    None,
    (
        lambda ctx, inputs, output: None,
        lambda ctx, grads: (ops.join(grads), None),
    ),
)
def portions(x, n):
    """x (T, ...) -> n parts of its rows, in order and as equal as they can be. Of a split x each rank's own rows."""
    return [part.clone() for part in x.tensor_split(n)]


@define(
    "join(Tensor[] parts) -> Tensor",
    None,
    (
        lambda ctx, inputs, output: setattr(ctx, "n", len(inputs[0])),
        lambda ctx, g: ops.portions(g, ctx.n),
    ),
)
def join(parts):
    """The inverse of `portions`."""
    return torch.cat(parts)


# ---- tokens over experts --------------------------------------------------------------------------------------------


def _fake_permute(x, index, experts, rows=None):
    n = index.shape[0] * index.shape[1] if rows is None else rows
    return (
        x.new_empty(n, x.shape[1]),
        index.new_empty(experts, dtype=torch.int64),
        index.new_empty(tuple(index.shape), dtype=torch.int64),
        index.new_empty(n, dtype=torch.int64),
    )


@define(
    "permute(Tensor x, Tensor index, int experts) -> (Tensor, Tensor, Tensor, Tensor)",
    _fake_permute,
    (
        lambda ctx, inputs, output: ctx.save_for_backward(*output[2:]),
        lambda ctx, rows, counts, perm, order: (ops.gather_sum(rows, *ctx.saved_tensors), None, None),
    ),
)
def permute(x, index, experts):
    """Copies tokens into rows sorted by expert, stable in the token order.

    x (T, H), index (T, K) int, experts E -> rows (T*K, H), counts (E,) rows of each expert, perm (T, K) the row of each
    slot, order (T*K,) the slot (t*K+k) of each row. Slots with index -1 are no rows: they come last and no count has
    them. VJP: a gather-sum over `perm`.
    """
    counts, perm, order = _route(index, experts)
    return x[order // index.shape[1]], counts, perm, order


def _route(index: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    flat = index.reshape(-1)
    flat = torch.where(flat < 0, experts, flat)
    order = torch.argsort(flat, stable=True)
    perm = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
    counts = torch.zeros(experts + 1, dtype=torch.int64, device=flat.device)
    counts.scatter_add_(0, flat.long(), torch.ones_like(flat, dtype=torch.int64))
    return counts[:experts].clone(), perm.view(index.shape), order


@define(
    "route(Tensor index, int experts) -> (Tensor, Tensor, Tensor)",
    lambda index, experts: _fake_permute(index.new_empty(index.shape[0], 0), index, experts)[1:],
)
def route(index, experts):
    """`permute` without its rows: index (T, K) int, experts E -> counts (E,), perm (T, K), order (T*K,)."""
    return _route(index, experts)


# of a sum over each token's rows: every row gets its token's cotangent
SUM_OF_ROWS = (
    lambda ctx, inputs, output: ctx.save_for_backward(*inputs[1:]),
    lambda ctx, g: (g[ctx.saved_tensors[1] // ctx.saved_tensors[0].shape[1]], None, None),
)


@define(
    "gather_sum(Tensor rows, Tensor perm, Tensor order) -> Tensor",
    lambda rows, perm, order: rows.new_empty(perm.shape[0], rows.shape[1]),
    SUM_OF_ROWS,
)
def gather_sum(rows, perm, order):
    """rows (N, H), perm (T, K), order (N,) -> (T, H): the sum of each token's K rows, in slot order (no atomic add)."""
    return rows[perm].sum(1)


def _unpermute_vjp(ctx, g):
    rows, perm, order, weights = ctx.saved_tensors
    grad_rows = g[order // perm.shape[1]] * weights.reshape(-1)[order, None].to(g.dtype)
    grad_weights = (rows[perm] * g[:, None]).sum(-1).to(weights.dtype)
    return grad_rows.to(rows.dtype), None, None, grad_weights


@define(
    "unpermute(Tensor rows, Tensor perm, Tensor order, Tensor weights) -> Tensor",
    lambda rows, perm, order, weights: rows.new_empty(
        (perm.shape[0], rows.shape[1]), dtype=torch.promote_types(rows.dtype, weights.dtype)
    ),
    (_save, _unpermute_vjp),
)
def unpermute(rows, perm, order, weights):
    """rows (N, H), perm (T, K), order (N,), weights (T, K) -> (T, H): weighted sum of each token's rows."""
    return (rows[perm] * weights[..., None]).sum(1)


def _picked(rows: Tensor, perm: Tensor) -> Tensor:
    """rows (N, H), perm (T, K) -> (T, K, H); zeros where perm is -1."""
    if rows.shape[0] == 0:
        return rows.new_zeros(*perm.shape, *rows.shape[1:])
    return rows[perm.clamp(min=0)] * (perm >= 0)[..., None].to(rows.dtype)


def _fake_select(x, index, experts):
    return _fake_permute(x, index, experts, torch.library.get_ctx().new_dynamic_size())


@define(
    "select(Tensor x, Tensor index, int experts) -> (Tensor, Tensor, Tensor, Tensor)",
    _fake_select,
    (
        lambda ctx, inputs, output: ctx.save_for_backward(*output[2:]),
        lambda ctx, rows, counts, perm, order: (ops.gather_sum_some(rows, *ctx.saved_tensors), None, None),
    ),
)
def select(x, index, experts):
    """`permute` without the slots of index -1: rows (N, H) are as many as have an expert; perm is -1 for the others."""
    counts, perm, order = route_some(index, experts)
    return x[order // index.shape[1]], counts, perm, order


@define(
    "route_some(Tensor index, int experts) -> (Tensor, Tensor, Tensor)",
    lambda index, experts: _fake_select(index.new_empty(index.shape[0], 0), index, experts)[1:],
)
def route_some(index, experts):
    """`select` without its rows: index (T, K) int, experts E -> counts (E,), perm (T, K), order (N,)."""
    counts, perm, order = ops.route(index, experts)
    return counts, torch.where(index < 0, -1, perm), order[: int(counts.sum())].clone()


@define(
    "gather_sum_some(Tensor rows, Tensor perm, Tensor order) -> Tensor",
    lambda rows, perm, order: rows.new_empty(perm.shape[0], rows.shape[1]),
    SUM_OF_ROWS,
)
def gather_sum_some(rows, perm, order):
    """`gather_sum` over the slots whose perm is not -1."""
    return _picked(rows, perm).sum(1)


def _unpermute_some_vjp(ctx, g):
    rows, perm, order, weights = ctx.saved_tensors
    grad_rows = g[order // perm.shape[1]] * weights.reshape(-1)[order, None].to(g.dtype)
    return grad_rows.to(rows.dtype), None, None, ops.slot_products(rows, perm, g).to(weights.dtype)


@define(
    "slot_products(Tensor rows, Tensor perm, Tensor g) -> Tensor",
    lambda rows, perm, g: g.new_empty(tuple(perm.shape)),
)
def slot_products(rows, perm, g):
    """rows (N, H), perm (T, K), g (T, H) -> (T, K): each slot's row times its token's g, zero where perm is -1."""
    return (_picked(rows, perm) * g[:, None]).sum(-1)


@define(
    "unpermute_some(Tensor rows, Tensor perm, Tensor order, Tensor weights) -> Tensor",
    lambda rows, perm, order, weights: rows.new_empty(
        (perm.shape[0], rows.shape[1]), dtype=torch.promote_types(rows.dtype, weights.dtype)
    ),
    (_save, _unpermute_some_vjp),
)
def unpermute_some(rows, perm, order, weights):
    """`unpermute` over the slots whose perm is not -1: of each token what its experts here make of it."""
    return (_picked(rows, perm) * weights[..., None]).sum(1)


@define(
    "spread(Tensor x, Tensor perm, Tensor order) -> Tensor",
    lambda x, perm, order: x.new_empty((order.shape[0], *x.shape[1:])),
    (
        lambda ctx, inputs, output: ctx.save_for_backward(*inputs[1:]),
        lambda ctx, g: (ops.gather_sum_some(g, *ctx.saved_tensors), None, None),
    ),
)
def spread(x, perm, order):
    """x (T, ...), perm (T, K), order (N,) -> (N, ...): each row its token's entry."""
    return x[order // perm.shape[1]]


@define(
    "destinations(Tensor index, int n, int size) -> Tensor",
    lambda index, n, size: index.new_empty(index.shape[0], size),
)
def destinations(index, n, size):
    """index (T, K) of experts, n on each of `size` ranks -> (T, size): d at d where a token has an expert there."""
    ranks = torch.arange(size, device=index.device)
    there = (torch.where(index < 0, -1, index // n)[..., None] == ranks).any(1)
    return torch.where(there, ranks, -1).to(index.dtype)


@define("localize(Tensor index, int n, str axis) -> Tensor", lambda index, n, axis: torch.empty_like(index))
def localize(index, n, axis):
    """index (..., K) of experts, n on each rank -> their numbers on this rank, -1 for those of other ranks."""
    local = index - index_in(axis) * n
    return torch.where((local >= 0) & (local < n) & (index >= 0), local, -1)


@define(
    "take(Tensor x, Tensor order, Tensor inverse) -> Tensor",
    lambda x, order, inverse: x.new_empty((order.shape[0], *x.shape[1:])),
    (
        lambda ctx, inputs, output: ctx.save_for_backward(inputs[1], inputs[2]),
        lambda ctx, g: (ops.take(g, ctx.saved_tensors[1], ctx.saved_tensors[0]), None, None),
    ),
)
def take(x, order, inverse):
    """x[order] for a permutation and its inverse, so that the VJP is a take as well."""
    return x[order]


def _offsets(counts: Tensor) -> Tensor:
    return counts.cumsum(0).to(torch.int32)


def _grouped(a: Tensor, b: Tensor, counts: Tensor) -> bool:
    """Whether ATen's grouped kernel takes these operands (dtype; strides a multiple of 16 bytes)."""
    fits = {"cpu": (torch.float32, torch.bfloat16, torch.float16), "cuda": (torch.bfloat16,)}
    if a.dtype not in fits.get(a.device.type, ()) or a.shape[0] == 0 or a.shape[1] == 0 or a.dtype != b.dtype:
        return False
    # one stride of 1 in each: of several, the kernel would take one for the row's
    return all(t.stride().count(1) == 1 for t in (a, b)) and all(
        s * t.element_size() % 16 == 0 for t in (a, b) for s in t.stride() if s != 1
    )


def _grouped_mm_vjp(ctx, g):
    rows, weight, counts = ctx.saved_tensors
    needs_rows, needs_weight, _ = ctx.needs_input_grad
    grad_rows = ops.grouped_mm(g, weight.transpose(1, 2), counts) if needs_rows else None
    grad_weight = ops.grouped_outer(rows, g, counts).to(weight.dtype) if needs_weight else None
    return grad_rows, grad_weight, None


@define(
    "grouped_mm(Tensor rows, Tensor weight, Tensor counts) -> Tensor",
    lambda rows, weight, counts: rows.new_empty(rows.shape[0], weight.shape[2]),
    (_save, _grouped_mm_vjp),
)
def grouped_mm(rows, weight, counts):
    """rows (N, H) sorted by expert, weight (E, H, I), counts (E,) -> (N, I): each row times its expert's matrix."""
    rows = rows.contiguous()
    if _grouped(rows, weight, counts):
        return torch._grouped_mm(rows, weight, offs=_offsets(counts)).contiguous()  # its rows may be padded
    *parts, rest = rows.split(_sizes(rows, counts))
    return torch.cat([*(part @ weight[e] for e, part in enumerate(parts)), rest.new_zeros(len(rest), weight.shape[2])])


def _sizes(rows: Tensor, counts: Tensor) -> list[int]:
    """The rows of each expert, and those behind them, which are no one's."""
    sizes = counts.tolist()
    return [*sizes, rows.shape[0] - sum(sizes)]


@define(
    "grouped_outer(Tensor rows, Tensor g, Tensor counts) -> Tensor",
    lambda rows, g, counts: rows.new_empty(counts.shape[0], rows.shape[1], g.shape[1]),
)
def grouped_outer(rows, g, counts):
    """rows (N, H), g (N, I), counts (E,) -> (E, H, I): rows' transposed times g, for each expert; zeros for no rows."""
    rows, g = rows.contiguous(), g.contiguous()
    if _grouped(rows, g, counts):
        return torch._grouped_mm(rows.t(), g, offs=_offsets(counts)).contiguous()
    sizes = _sizes(rows, counts)
    return torch.stack([a.t() @ b for a, b in zip(rows.split(sizes)[:-1], g.split(sizes)[:-1], strict=True)])


@define(
    "segment_sum(Tensor rows, Tensor counts) -> Tensor",
    lambda rows, counts: rows.new_empty((counts.shape[0], *rows.shape[1:])),
)
def segment_sum(rows, counts):
    """rows (N, ...), counts (E,) -> (E, ...): the sum of each expert's rows, in row order."""
    return torch.stack([part.sum(0) for part in rows.split(_sizes(rows, counts))[:-1]])


@define(
    "per_expert(Tensor x, Tensor counts, Tensor rows) -> Tensor",
    lambda x, counts, rows: x.new_empty((rows.shape[0], *x.shape[1:])),
    (
        lambda ctx, inputs, output: ctx.save_for_backward(inputs[1]),
        lambda ctx, g: (ops.segment_sum(g, ctx.saved_tensors[0]), None, None),
    ),
)
def per_expert(x, counts, rows):
    """x (E, ...), counts (E,), rows (N, ...) for its length -> (N, ...): each row its expert's entry."""
    place = torch.arange(rows.shape[0], device=x.device)
    expert = torch.searchsorted(counts.cumsum(0), place, right=True)
    return x[expert.clamp(max=x.shape[0] - 1)]  # rows behind the last expert's are no one's


# ---- gated experts --------------------------------------------------------------------------------------------------

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
    out = (_picked(y, torch.where(perm < n, perm, -1)) * weights[..., None]).sum(1)
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
    grad_weights = _picked(products, torch.where(perm < n, perm, -1))[..., 0].to(weights.dtype)
    return pad(grad_pre), pad(h * w), grad_weights


@define(
    "gated_vjp_x(Tensor g, Tensor counts, Tensor perm, Tensor up) -> Tensor",
    lambda g, counts, perm, up: g.new_empty(perm.shape[0], up.shape[1]),
)
def gated_vjp_x(g, counts, perm, up):
    """g (N, 2I), the cotangent of pre, up (E, H, 2I) -> (T, H), that of x: a sum over each token's rows."""
    n = int(counts.sum())
    return _picked(grouped_mm(g[:n], up.transpose(1, 2), counts), torch.where(perm < n, perm, -1)).sum(1)


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


# ---- expert parallelism ---------------------------------------------------------------------------------------------


@define(
    "exchange_counts(Tensor counts, int size, str axis) -> Tensor",
    lambda counts, size, axis: counts.new_empty(size, counts.shape[0] // size),
)
def exchange_counts(counts, size, axis):
    """counts (E,) of this rank's rows -> (size, E/size): the rows each rank sends for each expert held here."""
    out = torch.empty_like(counts)
    dist.all_to_all_single(out, counts.contiguous(), group=group_of(axis))
    return out.view(size, -1)


@define(
    "splits(Tensor sent, Tensor received) -> Tensor",
    lambda sent, received: torch.empty(2, received.shape[0], dtype=torch.int64),
)
def splits(sent, received):
    """sent (E,), received (size, E/size) -> (2, size) on the host: rows to and from each rank (the step's one sync)."""
    return torch.stack([sent.view(received.shape).sum(1), received.sum(1)]).cpu()


def _all_to_all_vjp(ctx, g):
    x, splits = ctx.saved_tensors
    return ops.all_to_all_like(g, ops.way_back(splits), x, ctx.axis), None, None


def _save_all_to_all(ctx, inputs, output):
    ctx.save_for_backward(inputs[0], inputs[1])
    ctx.axis = inputs[-1]


@define("way_back(Tensor splits) -> Tensor", same)
def way_back(splits):
    """splits (2, size) [to, from] -> [from, to]; an op of ours, for ATen's would be a C++ kernel to compile."""
    return splits.flip(0)


@define(
    "all_to_all(Tensor x, Tensor splits, str axis) -> Tensor",
    lambda x, splits, axis: x.new_empty((torch.library.get_ctx().new_dynamic_size(), *x.shape[1:])),
    (_save_all_to_all, _all_to_all_vjp),
)
def all_to_all(x, splits, axis):
    """x (N, H) ordered by destination, splits (2, size) [to, from] -> (N', H). VJP: the counts swapped.

    Rows of x beyond the counts are no rows (padding), and stay.
    """
    to, from_ = splits.tolist()
    return _exchange(x[: sum(to)], x.new_empty(sum(from_), *x.shape[1:]), to, from_, axis)


def _exchange(x: Tensor, out: Tensor, to: list[int], from_: list[int], axis: str) -> Tensor:
    dist.all_to_all_single(out, x.contiguous(), from_, to, group=group_of(axis))
    return out


def _all_to_all_like_vjp(ctx, g):
    x, splits = ctx.saved_tensors
    return ops.all_to_all_like(g, ops.way_back(splits), x, ctx.axis), None, None, None


@define(
    "all_to_all_like(Tensor x, Tensor splits, Tensor like, str axis) -> Tensor",
    lambda x, splits, like, axis: x.new_empty((like.shape[0], *x.shape[1:])),
    (_save_all_to_all, _all_to_all_like_vjp),
)
def all_to_all_like(x, splits, like, axis):
    """`all_to_all` whose result has as many rows as `like`: the way back, whose size is known. Padding gets zeros."""
    to, from_ = splits.tolist()
    out, got = x.new_empty(like.shape[0], *x.shape[1:]), sum(from_)
    _exchange(x[: sum(to)], out[:got], to, from_, axis)
    out[got:] = 0
    return out


@define("arrive(Tensor out, Tensor x, Tensor? order) -> Tensor", lambda out, x, order: (
    torch.empty_like(out) if order is None else out.new_empty((order.shape[0], *out.shape[1:]))
))  # fmt: skip
def arrive(out, x, order):
    """What `start_all_to_all` has sent, out[order] where an order is given; its operand x lives until here."""
    for work in _on_their_way.pop(out.data_ptr(), ()):
        work.wait()
    return out.clone() if order is None else out[order]


_on_their_way: dict[int, list] = {}  # by the address of what is received


@define(
    "start_all_to_all(Tensor x, Tensor splits, Tensor? like, str axis) -> Tensor",
    lambda x, splits, like, axis: x.new_empty(
        (torch.library.get_ctx().new_dynamic_size() if like is None else like.shape[0], *x.shape[1:])
    ),
)
def start_all_to_all(x, splits, like, axis):
    """`all_to_all`, or `all_to_all_like` where `like` is given, that is waited for by `arrive`."""
    to, from_ = splits.tolist()
    got = sum(from_)
    out = x.new_empty(got if like is None else like.shape[0], *x.shape[1:])
    work = dist.all_to_all_single(out[:got], x[: sum(to)].contiguous(), from_, to, group=group_of(axis), async_op=True)
    out[got:] = 0
    _on_their_way.setdefault(out.data_ptr(), []).append(work)
    return out


@define("row_marks(Tensor x) -> Tensor", lambda x: x.new_empty(x.shape[0], dtype=torch.uint8), NO_GRADIENT)
def row_marks(x):
    """x (N, ...) -> (N,) bytes of zero: what is kept where only the number of rows is needed again."""
    return x.new_zeros(x.shape[0], dtype=torch.uint8)


@define(
    "row_sizes(Tensor received, int size) -> Tensor",
    lambda received, size: torch.empty(size, dtype=torch.int64),
)
def row_sizes(received, size):
    """received (size*R, n): what R sources sent to each of `size` ranks for n experts -> (size,) rows, on the host."""
    return received.view(size, -1).sum(1).cpu()


def _save_rows(ctx, inputs, output):
    ctx.save_for_backward(inputs[0], inputs[1])
    ctx.axis = inputs[-1]


def _fake_gather_rows(x, sizes, axis):
    return x.new_empty((torch.library.get_ctx().new_dynamic_size(), *x.shape[1:]))


@define(
    "gather_rows(Tensor x, Tensor sizes, str axis) -> Tensor",
    _fake_gather_rows,
    (
        _save_rows,
        lambda ctx, g: (ops.scatter_rows(g, ctx.saved_tensors[1], ctx.saved_tensors[0], ctx.axis), None, None),
    ),
)
def gather_rows(x, sizes, axis):
    """D to E: own rows x (n, H), sizes (size,) of all ranks -> all ranks' rows, in rank order. VJP: `scatter_rows`."""
    counts = sizes.tolist()
    own = x[: counts[index_in(axis)]]
    out = x.new_empty(sum(counts), *x.shape[1:])
    return _exchange(torch.cat([own] * len(counts)), out, [own.shape[0]] * len(counts), counts, axis)


@define(
    "gather_rows_like(Tensor x, Tensor sizes, Tensor like, str axis) -> Tensor",
    lambda x, sizes, like, axis: x.new_empty((like.shape[0], *x.shape[1:])),
)
def gather_rows_like(x, sizes, like, axis):
    """`gather_rows` whose result has as many rows as `like`."""
    return gather_rows(x, sizes, axis)


def _scatter_rows_vjp(ctx, g):
    y, sizes = ctx.saved_tensors
    return ops.gather_rows_like(g, sizes, y, ctx.axis), None, None, None


@define(
    "scatter_rows(Tensor y, Tensor sizes, Tensor like, str axis) -> Tensor",
    lambda y, sizes, like, axis: y.new_empty((like.shape[0], *y.shape[1:])),
    (_save_rows, _scatter_rows_vjp),
)
def scatter_rows(y, sizes, like, axis):
    """P to D: partial y (N, H) of all ranks' rows -> (n, H), own rows' sums; `like` gives n. VJP: `gather_rows`.

    A reduce-scatter of unequal parts: an all-to-all, and a sum in rank order, so that it is deterministic.
    """
    counts = sizes.tolist()
    own, size = counts[index_in(axis)], len(counts)
    parts = _exchange(y, y.new_empty(size * own, *y.shape[1:]), counts, [own] * size, axis)
    out = y.new_empty(like.shape[0], *y.shape[1:])
    out[:own] = parts.view(size, own, *y.shape[1:]).sum(0)
    out[own:] = 0
    return out


@define(
    "regroup(Tensor received, Tensor rows) -> (Tensor, Tensor)",
    lambda received, rows: (received.new_empty(rows.shape[0]), received.new_empty(rows.shape[0])),
    NO_GRADIENT,
)
def regroup(received, rows):
    """received (size, n) counts, rows (N', H) by source then expert -> order, inverse (N',): by expert, then source."""
    size, n = received.shape
    experts = torch.arange(n, device=received.device).repeat(size)
    experts = torch.repeat_interleave(experts, received.reshape(-1), output_size=rows.shape[0])
    order = torch.argsort(experts, stable=True)
    return order, torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))


@define(
    "own_experts(Tensor x, int dim, int size, str axis) -> Tensor",
    lambda x, dim, size, axis: x.new_empty(
        tuple(s // size if i == 0 else s * size if i == dim else s for i, s in enumerate(x.shape))
    ),
    (
        _keep("dim", "size", "axis"),
        lambda ctx, g: (ops.part_of_experts(g, ctx.dim, ctx.size, ctx.axis), None, None, None),
    ),
)
def own_experts(x, dim, size, axis):
    """x: S(dim) of all E experts -> S(0): E/size experts whole. An all-to-all; VJP: `part_of_experts`."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    dist.all_to_all_single(out, x.contiguous(), group=group_of(axis))
    return torch.cat(out.chunk(size, 0), dim)


@define(
    "part_of_experts(Tensor x, int dim, int size, str axis) -> Tensor",
    lambda x, dim, size, axis: x.new_empty(
        tuple(s * size if i == 0 else s // size if i == dim else s for i, s in enumerate(x.shape))
    ),
)
def part_of_experts(x, dim, size, axis):
    """The inverse of `own_experts`."""
    sent = torch.cat(x.chunk(size, dim), 0)
    out = torch.empty_like(sent)
    dist.all_to_all_single(out, sent, group=group_of(axis))
    return out


# ---- sums in one order ----------------------------------------------------------------------------------------------


@define("sum_into(Tensor x, Tensor?[] indices, Tensor values) -> Tensor", same)
def sum_into(x, indices, values):
    """x.index_put(indices, values, accumulate=True), which sorts on CUDA; Inductor's own adds atomically."""
    return torch.ops.aten.index_put(x, indices, values, True)


@define("sum_along(Tensor x, int dim, Tensor index, Tensor src) -> Tensor", same)
def sum_along(x, dim, index, src):
    """x.scatter_add(dim, index, src), by `sum_into`."""
    places = [torch.arange(n, device=x.device).view(-1, *[1] * (x.dim() - 1 - d)) for d, n in enumerate(index.shape)]
    places[dim] = index
    return sum_into(x, places, src[tuple(slice(n) for n in index.shape)])


@define(
    "embedding_vjp(Tensor g, Tensor ids, int rows, int padding_idx, bool scale) -> Tensor",
    lambda g, ids, rows, padding_idx, scale: g.new_empty(rows, g.shape[-1]),
)
def embedding_vjp(g, ids, rows, padding_idx, scale):
    """An embedding's gradient by ATen's kernel, which sorts on CUDA: g (..., H), ids (...) -> (rows, H)."""
    return torch.ops.aten.embedding_dense_backward(g, ids, rows, padding_idx, scale)


# ---- vocabulary parallelism -----------------------------------------------------------------------------------------


def _local_ids(ids: Tensor, size: int, axis: str) -> tuple[Tensor, Tensor]:
    local = ids - ops.rank(ids, axis) * size
    inside = (local >= 0) & (local < size)
    return torch.where(inside, local, 0), inside


def _embedding_shard_vjp(ctx, g):
    weight, ids = ctx.saved_tensors
    local, inside = _local_ids(ids, weight.shape[0], ctx.axis)
    if ctx.padding_idx >= 0:
        inside = inside & (ids != ctx.padding_idx)
    grad = g * inside[..., None]
    return torch.ops.aten.embedding_dense_backward(grad, local, weight.shape[0], -1, False), None, None, None


def _save_embedding(ctx, inputs, output):
    ctx.save_for_backward(inputs[0], inputs[1])
    ctx.padding_idx, ctx.axis = inputs[2:]


@define(
    "embedding_shard(Tensor weight, Tensor ids, int padding_idx, str axis) -> Tensor",
    lambda weight, ids, padding_idx, axis: weight.new_empty((*ids.shape, weight.shape[1])),
    (_save_embedding, _embedding_shard_vjp),
)
def embedding_shard(weight, ids, padding_idx, axis):
    """weight (V/size, H) of this rank, ids (...) -> (..., H), partial: zeros for ids of other ranks' rows."""
    local, inside = _local_ids(ids, weight.shape[0], axis)
    return weight[local] * inside[..., None]


def _pick_vjp(ctx, g):
    x, target = ctx.saved_tensors
    local, inside = _local_ids(target, x.shape[-1], ctx.axis)
    columns = torch.arange(x.shape[-1], device=g.device)
    return torch.where((columns == local[..., None]) & inside[..., None], g[..., None], 0), None, None


def _save_pick(ctx, inputs, output):
    ctx.save_for_backward(inputs[0], inputs[1])
    ctx.axis = inputs[2]


@define(
    "pick(Tensor x, Tensor target, str axis) -> Tensor",
    lambda x, target, axis: x.new_empty(tuple(target.shape)),
    (_save_pick, _pick_vjp),
)
def pick(x, target, axis):
    """x (..., V/size), target (...) global indices -> (...), partial: x at the target, zero where others have it."""
    local, inside = _local_ids(target, x.shape[-1], axis)
    return x.gather(-1, local[..., None])[..., 0] * inside


# ---- random numbers -------------------------------------------------------------------------------------------------


@define("site(Tensor seed, int number) -> Tensor", lambda seed, number: torch.empty_like(seed), NO_GRADIENT)
def site(seed, number):
    """The seed of one random op, from that of the call: its own node, so that equal layers differ by an input only."""
    return torch.tensor((int(seed) * 0x9E3779B1 + number * 0x85EBCA77) % 2**62)


@define(
    "rand(Tensor like, Tensor seed, str kind, str axis) -> Tensor",
    lambda like, seed, kind, axis: like.new_empty(tuple(like.shape), dtype=torch.float32),
    NO_GRADIENT,
)
def rand(like, seed, kind, axis):
    """fp32 in the shape of `like`, "uniform" in [0, 1) or "normal", from a seed and the rank on `axis` if named.

    seed is a 0-d int64 tensor on the host. Replay with the same seed gives the same numbers (recomputation).
    """
    value = (int(seed) + (index_in(axis) + 1 if axis else 0) * 0xC2B2AE3D) % 2**63
    generator = torch.Generator(device=like.device).manual_seed(value)
    draw = torch.randn if kind == "normal" else torch.rand
    return draw(like.shape, dtype=torch.float32, device=like.device, generator=generator)


# ---- CUDA -----------------------------------------------------------------------------------------------------------

if torch.cuda.is_available() and kernels.installed():
    kernels.register(LIBRARY)
