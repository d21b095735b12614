"""Rules of views, joins and slices."""

from __future__ import annotations

import math
from typing import Any

from tedcompile.layouts.core import Call, E, Layout, NoRule, P, R, S, Sections, aten, ndim, rule, shape, val

MOST_SECTIONS = 64  # of a value: more small pieces than these are not worth a split


def split_dim_after_view(before: tuple[int, ...], after: tuple[int, ...], layout: Layout, tp: int) -> Layout:
    """Where a split dim is after a view. Raises NoRule or Sections when the parts would not be contiguous."""
    d = layout.dim
    prefix = math.prod(before[:d])
    if layout.sections:
        for j, size in enumerate(after):
            if math.prod(after[:j]) == prefix and size == before[d]:
                return S(j, layout.sections)
        count = len(layout.sections)
        for j, size in enumerate(after):
            if math.prod(after[:j]) == prefix and size == count and len(set(layout.sections)) == 1:
                inner, each = after[j + 1], layout.sections[0]
                if (each % inner and inner % each) or inner % tp:
                    break
                return S(j + 1)
        raise NoRule(f"a view of fused sections {layout.sections} as {after}")
    for j, size in enumerate(after):
        if math.prod(after[:j]) != prefix or size == 1:
            continue
        if size % tp == 0 and (before[d] % size == 0 or size % before[d] == 0):
            return S(j)
        if before[d] % size == 0 and j + 1 < len(after) and after[j + 1] % tp == 0 and size < before[d]:
            raise Sections((before[d] // size,) * size)
        raise NoRule(f"a dim of size {size} does not divide over tp={tp}")
    for j, size in enumerate(after):  # joined with dims before it: a section for each of their entries
        lead, rest = divmod(prefix, math.prod(after[:j]))
        if rest or not 1 < lead <= MOST_SECTIONS or size % lead:
            continue
        each = size // lead
        if each % tp == 0 and before[d] % each == 0:
            return S(j, (each,) * lead)
    raise NoRule(f"a view of {before} as {after} mixes the dim that is split")


@rule(aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints, aten.unflatten.int,
      aten.view_as.default, aten.reshape_as.default)  # fmt: skip
def _view(c: Call) -> Layout:
    a = c.node.args[0]
    layout = c.layout(a)
    if layout.kind == "S":
        layout = split_dim_after_view(shape(a), shape(c.node), layout, c.tp)
        c.args, c.emit = (a, list(layout.local(shape(c.node), c.tp))), lambda x, size: aten.reshape.default(x, size)
    return layout


@rule(aten.transpose.int)
def _transpose(c: Call) -> Layout:
    a, i, j = c.node.args[0], *(k % ndim(c.node) for k in c.node.args[1:3])
    layout = c.layout(a)
    if layout.kind != "S":
        return layout
    return S({i: j, j: i}.get(layout.dim, layout.dim), layout.sections)


@rule(aten.t.default)
def _t(c: Call) -> Layout:
    layout = c.layout(c.node.args[0])
    return S(1 - layout.dim, layout.sections) if layout.kind == "S" and ndim(c.node) == 2 else layout


@rule(aten.permute.default)
def _permute_dims(c: Call) -> Layout:
    layout = c.layout(c.node.args[0])
    order = [k % ndim(c.node) for k in c.node.args[1]]
    return S(order.index(layout.dim), layout.sections) if layout.kind == "S" else layout


@rule(aten.view_as_complex.default, aten.view_as_real.default)
def _complex(c: Call) -> Layout:
    layout = c.layout(c.node.args[0])
    if layout.kind == "S" and layout.dim == ndim(c.node):
        raise NoRule("a complex value whose parts are split")
    return layout


@rule(aten.unsqueeze.default)
def _unsqueeze(c: Call) -> Layout:
    layout = c.layout(c.node.args[0])
    if layout.kind != "S":
        return layout
    return S(layout.dim + (c.node.args[1] % ndim(c.node) <= layout.dim), layout.sections)


@rule(aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default)
def _squeeze(c: Call) -> Layout:
    a = c.node.args[0]
    layout = c.layout(a)
    if layout.kind != "S":
        return layout
    dims = c.arg(1, [i for i, s in enumerate(shape(a)) if s == 1])
    dims = {d % ndim(a) for d in (dims if isinstance(dims, (list, tuple)) else [dims])}
    gone = sum(d < layout.dim and shape(a)[d] == 1 for d in dims)
    c.args = (a, sorted(d for d in dims if shape(a)[d] == 1))
    c.emit = lambda x, dims: aten.squeeze.dims(x, dims)
    return S(layout.dim - gone, layout.sections)


@rule(aten.expand.default)
def _expand(c: Call) -> Layout:
    a = c.node.args[0]
    layout = c.layout(a)
    if layout.kind != "S":
        return layout
    result = S(layout.dim + ndim(c.node) - ndim(a), layout.sections)
    c.args = (a, list(result.local(shape(c.node), c.tp)))
    return result


@rule(aten.repeat.default)
def _repeat(c: Call) -> Layout:
    a = c.node.args[0]
    layout = c.layout(a)
    if layout.kind != "S":
        return layout
    dim = layout.dim + ndim(c.node) - ndim(a)
    times = c.node.args[1][dim]
    return S(dim, (layout.sections or (shape(a)[layout.dim],)) * times if times > 1 else layout.sections)


@rule(aten.repeat_interleave.self_int)
def _repeat_interleave(c: Call) -> Layout:
    a, dim = c.node.args[0], c.arg(2, c.node.kwargs.get("dim"))
    layout = c.layout(a)
    if layout.kind == "S" and (dim is None or layout.sections):
        raise NoRule("repeat_interleave of a flattened or fused split dim")
    return layout  # blocks stay contiguous, also along the split dim


@rule(aten.expand_as.default)
def _expand_as(c: Call) -> Layout:
    a, other = c.node.args
    sharded = c.sharded()
    if not sharded:
        return c.default()
    layout = c.layout(sharded[-1])
    rel = layout.dim - ndim(sharded[-1])
    result = S(ndim(c.node) + rel, layout.sections)
    c.need(a, S(ndim(a) + rel, layout.sections) if ndim(a) >= -rel and shape(a)[rel] != 1 else E)
    c.need(other, result)
    if any(c.layout(x) != c.needs[x] for x in sharded):
        raise NoRule("expand_as of operands split on different dims")
    return result


@rule(aten.movedim.int, aten.movedim.intlist)
def _movedim(c: Call) -> Layout:
    layout = c.layout(c.node.args[0])
    sources, targets = (
        [d % ndim(c.node) for d in (ds if isinstance(ds, (list, tuple)) else [ds])] for ds in c.node.args[1:3]
    )
    if layout.kind != "S":
        return layout
    if layout.dim in sources:
        return S(targets[sources.index(layout.dim)], layout.sections)
    free = [d for d in range(ndim(c.node)) if d not in targets]
    return S(free[layout.dim - sum(s < layout.dim for s in sources)], layout.sections)


@rule(aten.slice.Tensor, aten.narrow.default)
def _slice(c: Call) -> Layout:
    a, dim, start, end, step = c.node.args[0], c.arg(1, 0), c.arg(2), c.arg(3), c.arg(4, 1)
    narrow = c.node.target is aten.narrow.default  # has a length in place of an end
    layout = c.layout(a)
    if layout.kind != "S" or dim % ndim(a) != layout.dim:
        return layout
    dim, size = layout.dim, shape(a)[layout.dim]
    start = 0 if start is None else min(max(start + size if start < 0 else start, 0), size)
    end = start + end if narrow else size if end is None else min(max(end + size if end < 0 else end, 0), size)
    if end - start == size and step == 1:
        if narrow:
            c.args = (a, dim, 0, size // c.tp)
        return layout
    if step != 1:
        if layout.sections or end != size or start >= step or (size // c.tp) % step:
            raise NoRule("a strided slice along the dim that is split")
        c.args = (a, dim, start, size // c.tp, step)
        return S(dim)
    if not layout.sections:
        raise Sections(tuple(b - s for s, b in zip((0, start, end), (start, end, size), strict=True) if b > s))
    edges = [sum(layout.sections[:i]) for i in range(len(layout.sections) + 1)]
    if start not in edges or end not in edges:
        raise NoRule(f"a slice [{start}:{end}] across the sections {layout.sections}")
    inside = layout.sections[edges.index(start) : edges.index(end)]
    c.args = (a, dim, start // c.tp, (end - start * narrow) // c.tp)
    return S(dim, inside if len(inside) > 1 else ())


@rule(aten.select.int)
def _select(c: Call) -> Layout:
    a, dim = c.node.args[0], c.node.args[1] % ndim(c.node.args[0])
    layout = c.layout(a)
    if layout.kind != "S":
        return layout
    if dim == layout.dim:
        raise NoRule("select along the dim that is split")
    return S(layout.dim - (dim < layout.dim), layout.sections)


@rule(aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int)
def _split(c: Call) -> Any:
    a = c.node.args[0]
    layout = c.layout(a)
    unbind = c.node.target is aten.unbind.int
    dim = (c.arg(1, 0) if unbind else c.arg(2, 0)) % ndim(a)
    if layout.kind != "S":
        return tuple(layout for _ in val(c.node))
    if dim != layout.dim:
        return tuple(S(layout.dim - (unbind and dim < layout.dim), layout.sections) for _ in val(c.node))
    if unbind:
        raise NoRule("unbind along the dim that is split")
    sizes = tuple(v.shape[dim] for v in val(c.node))
    if len(sizes) == 1:
        return (layout,)
    if layout.sections != sizes:
        if layout.sections:
            raise NoRule(f"a split in {sizes} of the sections {layout.sections}")
        raise Sections(sizes)
    c.args = (a, [s // c.tp for s in sizes], dim)
    c.emit = lambda x, sizes, dim: aten.split_with_sizes.default(x, sizes, dim)
    return tuple(S(dim) for _ in sizes)


@rule(aten.cat.default, aten.stack.default)
def _cat(c: Call) -> Layout:
    parts, stack = c.node.args[0], c.node.target is aten.stack.default
    dim = c.arg(1, 0) % ndim(c.node)
    sharded = c.sharded()
    if not sharded:
        if all(c.layout(a) == P for a in parts):
            return P
        return c.default()
    layout = c.layout(sharded[0])
    result = S(layout.dim + (stack and dim <= layout.dim), layout.sections)
    if not stack and dim == layout.dim:
        raise NoRule("cat along the dim that is split")
    for a in parts:
        if c.layout(a) != layout:
            if c.layout(a).kind == "S":
                raise NoRule("cat of operands split on different dims")
            c.need(a, layout)
    return result


@rule(aten.gather.default, aten.scatter.src, aten.scatter.value)
def _by_index(c: Call) -> Layout:
    """Along one dim, by an index of the same number of dims: all operands are split alike along another."""
    dim = c.node.args[1] % ndim(c.node.args[0])
    sharded = c.sharded()
    if not sharded:
        return c.default()
    layout = c.layout(sharded[0])
    for a in c.tensors():
        if layout.dim == dim or c.layout(a) not in (layout, R) or shape(a)[layout.dim] != shape(c.node)[layout.dim]:
            raise NoRule(f"{c.node.target} along the dim that is split")
        c.need(a, layout)
    return layout


@rule(aten.slice_scatter.default)
def _slice_scatter(c: Call) -> Layout:
    base, part, dim = c.node.args[0], c.node.args[1], c.arg(2, 0) % ndim(c.node)
    sharded = [a for a in (base, part) if c.layout(a).kind == "S"]
    if not sharded:
        return c.default()
    layout = c.layout(sharded[0])
    if dim == layout.dim or any(c.layout(a) != layout for a in sharded):
        raise NoRule("a write along the dim that is split")
    c.need(base, layout)
    c.need(part, layout)
    return layout


@rule(aten.pad.default, aten.constant_pad_nd.default)
def _pad(c: Call) -> Layout:
    a, pads = c.node.args[:2]
    layout = c.layout(a)
    if layout.kind == "S" and layout.dim >= ndim(a) - len(pads) // 2:
        raise NoRule("pad along the dim that is split")
    return layout if layout.kind == "S" else c.default()


@rule(aten.index.Tensor)
def _index(c: Call) -> Layout:
    a, indices = c.node.args[:2]
    layout = c.layout(a)
    given = [i for i, x in enumerate(indices) if x is not None]
    if layout.kind != "S":
        return c.default()
    if layout.dim in given or given != list(range(given[0], given[-1] + 1)):
        raise NoRule("index along the dim that is split")
    width = max(ndim(indices[i]) for i in given)
    return S(layout.dim + (width - len(given) if layout.dim > given[-1] else 0), layout.sections)


@rule(aten.index_select.default, aten.flip.default, aten.roll.default)
def _along(c: Call) -> Layout:
    a, dims = c.node.args[0], c.arg(2 if c.node.target is aten.roll.default else 1)
    layout = c.layout(a)
    if layout.kind != "S":
        return c.default()
    dims = (
        dims or range(ndim(a)) if isinstance(dims, (list, tuple, type(None))) else [dims]
    )  # roll flattens without dims
    if layout.dim in {d % ndim(a) for d in dims}:
        raise NoRule(f"{c.node.target} along the dim that is split")
    return layout
