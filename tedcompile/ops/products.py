"""Products of rows, sorted by expert, with the weights of the experts."""

from __future__ import annotations

import torch
from torch import Tensor

from tedcompile.ops.define import define, ops, save


def _offsets(counts: Tensor) -> Tensor:
    return counts.cumsum(0).to(torch.int32)


def aten_takes(a: Tensor, b: Tensor, counts: Tensor) -> bool:
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
    (save, _grouped_mm_vjp),
)
def grouped_mm(rows, weight, counts):
    """rows (N, H) sorted by expert, weight (E, H, I), counts (E,) -> (N, I): each row times its expert's matrix."""
    rows = rows.contiguous()
    if aten_takes(rows, weight, counts):
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
    if aten_takes(rows, g, counts):
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
