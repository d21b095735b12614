"""Tensors that are read in part: a rank's part of a parameter, through whatever makes the parameter from files.

A `Region` is a rectangle, (start, stop) of every dim; a `Part` has several ranges of a dim, in order, as a rank's part
of a fused [gate; up] weight has.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree

Region = tuple[tuple[int, int], ...]
Part = list[list[tuple[int, int]]]
Reader = Callable[[Region], torch.Tensor]


class Lazy(torch.Tensor):
    """A tensor on the meta device whose values `read` brings, all of them or a region.

    Joining, splitting and transposing turns regions into regions (`VIEWS`), so only what is asked for is read. Any
    other op is done, whole, when its result is read.
    """

    reader: Reader
    sliced = True  # whether a region is read without the rest

    @staticmethod
    def of(shape: Sequence[int], dtype: torch.dtype, reader: Reader) -> Lazy:
        tensor = torch.empty(tuple(shape), dtype=dtype, device="meta").as_subclass(Lazy)
        tensor.reader = reader
        return tensor

    def read(self, region: Region | None = None) -> torch.Tensor:
        return self.reader(everything(self.shape) if region is None else region)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if name.endswith("_") and not name.endswith("__"):
            raise NotImplementedError(f"{name} changes a tensor in place that is not read yet")
        made = super().__torch_function__(func, types, args, kwargs)
        results = list(made) if isinstance(made, (tuple, list)) else [made]
        if any(isinstance(r, Lazy) for r in results):
            rule = VIEWS.get(name)
            readers = rule(results, *args, **kwargs) if rule else _computed(func, args, kwargs, results)
            operands = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Lazy)]
            sliced = rule is not None and all(t.sliced for t in operands)
            for result, reader in zip(results, readers, strict=True):
                result.reader, result.sliced = reader, sliced
        return made


def everything(shape: Sequence[int]) -> Region:
    return tuple((0, n) for n in shape)


def cut(tensor: torch.Tensor, region: Region) -> torch.Tensor:
    """A view of a region."""
    return tensor[tuple(slice(a, b) for a, b in region)]


def _with(region: Region, dim: int, *ranges: tuple[int, int]) -> Region:
    return (*region[:dim], *ranges, *region[dim + 1 :])


def _joined(parts: list[tuple[Reader, int]], dim: int) -> Reader:
    """Parts of known sizes, one after the other on a dim."""

    def read(region: Region) -> torch.Tensor:
        (low, high), start, found = region[dim], 0, []
        for reader, size in parts:
            a, b = max(low, start) - start, min(high, start + size) - start
            if a < b:
                found.append(reader(_with(region, dim, (a, b))))
            start += size
        return found[0] if len(found) == 1 else torch.cat(found, dim)

    return read


def _cat(results, tensors, dim=0):
    dim %= results[0].dim()
    return [_joined([(t.reader, t.shape[dim]) for t in tensors], dim)]


def _stack(results, tensors, dim=0):
    dim %= results[0].dim()

    def one(reader: Reader) -> Reader:
        return lambda region: reader(_with(region, dim)).unsqueeze(dim)

    return [_joined([(one(t.reader), 1) for t in tensors], dim)]


def _split(results, tensor, _, dim=0):
    dim %= tensor.dim()
    reader = tensor.reader
    starts = itertools.accumulate((r.shape[dim] for r in results[:-1]), initial=0)

    def shifted(start: int) -> Reader:
        return lambda region: reader(_with(region, dim, (region[dim][0] + start, region[dim][1] + start)))

    return [shifted(start) for start in starts]


def _transpose(results, tensor, dim0, dim1):
    dim0, dim1, reader = dim0 % tensor.dim(), dim1 % tensor.dim(), tensor.reader

    def read(region: Region) -> torch.Tensor:
        swapped = _with(_with(region, dim0, region[dim1]), dim1, region[dim0])
        return reader(swapped).transpose(dim0, dim1)

    return [read]


def _squeeze(results, tensor, *dim):
    reader = tensor.reader
    if len(dim) != 1 or not isinstance(dim[0], int) or tensor.shape[dim[0]] != 1:
        return _computed(torch.squeeze, (tensor, *dim), {}, results)
    d = dim[0] % tensor.dim()
    return [lambda region: reader((*region[:d], (0, 1), *region[d:])).squeeze(d)]


def _same(results, tensor, *args, **kwargs):
    return [tensor.reader]


VIEWS: dict[str, Callable[..., list[Reader]]] = {
    "cat": _cat,
    "stack": _stack,
    "chunk": _split,
    "split": _split,
    "transpose": _transpose,
    "squeeze": _squeeze,
    "contiguous": _same,
    "detach": _same,
}


def _computed(func: Callable, args: tuple, kwargs: dict, results: list) -> list[Reader]:
    operands = pytree.tree_map_only(
        Lazy, lambda t: functools.partial(t.reader, everything(t.shape)), (args, kwargs)
    )  # readers as they are now

    @torch.no_grad()
    def read(region: Region, i: int) -> torch.Tensor:
        real_args, real_kwargs = pytree.tree_map_only(functools.partial, lambda whole: whole(), operands)
        made = func(*real_args, **real_kwargs)
        return cut(made[i] if isinstance(made, (tuple, list)) else made, region)

    return [functools.partial(read, i=i) for i in range(len(results))]


# ---- parts ----------------------------------------------------------------------------------------------------------


def part(shape: Sequence[int], placements: Iterable[Any], at: Iterable[int], sizes: Iterable[int]) -> Part:
    """What the rank at the coordinates `at` of a mesh holds of a tensor with these DTensor placements."""
    ranges: Part = [[(0, n)] for n in shape]
    for placement, index, size in zip(placements, at, sizes, strict=True):
        if size == 1 or placement.is_replicate():
            continue
        sections, held = getattr(placement, "split_factor", 1), ranges[placement.dim]
        section = sum(b - a for a, b in held) // sections
        length = section // size
        starts = [s * section + index * length for s in range(sections)]
        ranges[placement.dim] = [r for start in starts for r in _within(held, start, start + length)]
    return ranges


def _within(ranges: list[tuple[int, int]], low: int, high: int) -> list[tuple[int, int]]:
    """Positions low to high of what the ranges hold together."""
    found, start = [], 0
    for a, b in ranges:
        first, last = max(low, start), min(high, start + b - a)
        if first < last:
            found.append((a + first - start, a + last - start))
        start += b - a
    return found


def read_part(read: Reader, ranges: Part, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A part, contiguous, in memory of its own; one region at a time is read and cast."""
    shape = [sum(b - a for a, b in held) for held in ranges]
    whole = torch.empty(shape, dtype=dtype, device=device)
    for region, place in _regions(ranges):
        cut(whole, place).copy_(read(region))
    return whole


def write_part(whole: torch.Tensor, ranges: Part, values: torch.Tensor) -> None:
    """Puts a part to its place in the whole tensor."""
    for region, place in _regions(ranges):
        cut(whole, region).copy_(cut(values, place))


def _regions(ranges: Part) -> Iterable[tuple[Region, Region]]:
    """The rectangles of a part: in the whole tensor, and in the part itself."""
    dims = []
    for held in ranges:
        ends = list(itertools.accumulate(b - a for a, b in held))
        dims.append([((a, b), (end - (b - a), end)) for (a, b), end in zip(held, ends, strict=True)])
    for choice in itertools.product(*dims):
        yield tuple(c[0] for c in choice), tuple(c[1] for c in choice)


def spans(shape: Sequence[int], low: int, high: int) -> Iterator[Region]:
    """The rectangles that hold the elements [low, high) of a tensor in row-major order, in that order."""
    if low >= high:
        return
    if high - low == math.prod(shape):
        yield everything(shape)
        return
    inner = math.prod(shape[1:])
    first, last = -(-low // inner), high // inner  # the whole rows
    ends = [(first - 1, low, min(first * inner, high)), (last, max(last * inner, low), high)]
    if first > last:
        ends = ends[:1]
    for row, a, b in ends[:1]:
        yield from (((row, row + 1), *rest) for rest in spans(shape[1:], a - row * inner, b - row * inner))
    if first < last:
        yield ((first, last), *everything(shape[1:]))
    for row, a, b in ends[1:]:
        yield from (((row, row + 1), *rest) for rest in spans(shape[1:], a - row * inner, b - row * inner))


def overlap(one: Region, other: Region) -> Region | None:
    """The rectangle that two have in common."""
    both = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(one, other, strict=True))
    return both if all(a < b for a, b in both) else None


def within(region: Region, outer: Region) -> Region:
    """A region in the coordinates of another that holds it."""
    return tuple((a - c, b - c) for (a, b), (c, _) in zip(region, outer, strict=True))


def places(ranges: Part, region: Region) -> Iterator[tuple[Region, Region]]:
    """The rectangles of a region of a part: in the whole tensor, and in the region itself."""
    for there, here in _regions(ranges):
        common = overlap(here, region)
        if common is not None:
            inside = within(common, here)
            yield tuple((a + c, b + c) for (a, b), (c, _) in zip(inside, there, strict=True)), within(common, region)
