"""Many gradients to one flat memory, written or added, with their sums of squares, in one pass and one launch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _deliver(pointers, table, flat, squares, ADD: tl.constexpr, CHUNK: tl.constexpr):
    row = table + tl.program_id(0) * 5
    source = tl.load(pointers + tl.load(row)).to(tl.pointer_type(flat.dtype.element_ty))
    source = tl.multiple_of(source, 16) + tl.load(row + 1) * CHUNK
    target = flat + tl.load(row + 2) * 256
    count = tl.load(row + 3)
    lane = tl.arange(0, CHUNK)
    if count == CHUNK:
        g = tl.load(source + lane)
        if ADD:
            g = (g.to(squares.dtype.element_ty) + tl.load(target + lane)).to(flat.dtype.element_ty)
        tl.store(target + lane, g)
        wide = g.to(squares.dtype.element_ty)
        tl.store(squares + tl.load(row + 4), tl.sum(wide * wide, 0))
    else:
        inside = lane < count
        g = tl.load(source + lane, mask=inside, other=0)
        if ADD:
            g = (g.to(squares.dtype.element_ty) + tl.load(target + lane, mask=inside, other=0)).to(
                flat.dtype.element_ty
            )
        tl.store(target + lane, g, mask=inside)
        wide = g.to(squares.dtype.element_ty)
        tl.store(squares + tl.load(row + 4), tl.sum(wide * wide, 0))


def _table(members: tuple[tuple[int, int, int], ...], chunk: int, device: torch.device) -> Tensor:
    """(programs, 5) int64: gradient, chunk of it, row of flat memory, elements, place of the sum of squares."""
    sizes = torch.tensor([-(-elements // chunk) for _, elements, _ in members])
    which = torch.arange(len(members)).repeat_interleave(sizes)
    number = torch.arange(len(which)) - (sizes.cumsum(0) - sizes)[which]
    start, elements, place = torch.tensor(members).unbind(1)
    count = (elements[which] - number * chunk).clamp(max=chunk)
    rows = [which, number, start[which] + number * (chunk // 256), count, place[which] + number]
    return torch.stack(rows, 1).to(device)


def deliver(
    gradients: Sequence[Tensor],
    places: Sequence[tuple[int, int]],
    flat: Tensor,
    squares: Tensor,
    add: bool,
    chunk: int,
    tables: dict,
) -> None:
    """Gradients of one dtype to flat memory (rows, 256), each from the row of its place on; into `squares` (n,), from
    the second number of its place on, sums of squares of what is then there, one for each `chunk` elements.

    `tables` keeps the last table of this flat memory: equal gradients come each time.
    """
    aligned = [g if g.is_contiguous() and g.data_ptr() % 16 == 0 else g.clone().contiguous() for g in gradients]
    members = tuple((start, g.numel(), place) for g, (start, place) in zip(aligned, places, strict=True))
    addresses = torch.tensor([g.data_ptr() for g in aligned])
    if tables.get("members") != members:
        tables.update(members=members, table=_table(members, chunk, flat.device))
    table = tables["table"]
    if len(table):
        pointers = addresses.pin_memory().to(flat.device, non_blocking=True) if flat.is_cuda else addresses
        _deliver[(len(table),)](pointers, table, flat, squares, ADD=add, CHUNK=chunk, num_warps=8)
