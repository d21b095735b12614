"""Layouts are types on values over the tp axis, and a table says how each op moves them.

    R     the same value on all ranks, and its cotangent is the same too
    E     entered: the same value, but each rank's cotangent is a part of the sum
    S(d)  split on dim d; with sections, each of them is split (a fused [gate; up])
    P     partial: the value is the sum (or the maximum) over the ranks
    D     own rows: each row, of a token that this rank keeps, is on one rank (after tokens were dropped to S(0))

A rule reads a `Call` (the node, its operands' layouts), says by `call.need(operand, layout)` what it must be given, may
set local arguments or emit other ops, and returns the layout of the result. `plan_tensors` uses the table to decide,
`passes/check.py` to verify: one table, so a graph is right when both agree.

Every rule keeps this true: where the operands have the needed layouts, the op on local values gives the local part of
the op on global values, forward and backward. Moves between layouts, with their VJPs, are in `MOVES`.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from tedcompile.ops import ops

aten = torch.ops.aten


@dataclass(frozen=True)
class Layout:
    kind: str
    dim: int = -1
    sections: tuple[int, ...] = ()
    op: str = "sum"

    def __str__(self) -> str:
        if self.kind == "S":
            parts = f" of {'+'.join(map(str, self.sections))}" if self.sections else ""
            return f"S({self.dim}{parts})"
        return self.kind + ("(max)" if self.op == "max" else "")

    def local(self, shape: tuple[int, ...] | torch.Size, size: int) -> tuple[int, ...]:
        """The shape of one rank's part; of own rows with an equal number on each rank."""
        if self.kind not in "SD":
            return tuple(shape)
        dim = 0 if self.kind == "D" else self.dim
        return tuple(s // size if i == dim else s for i, s in enumerate(shape))


R, E, P, PMAX, D = Layout("R"), Layout("E"), Layout("P"), Layout("P", op="max"), Layout("D")


def S(dim: int, sections: tuple[int, ...] = ()) -> Layout:
    return Layout("S", dim, tuple(sections))


# (from, to) -> the ops of the move, first to last; R to E costs nothing for a value without a gradient
MOVES: dict[tuple[str, str], tuple[str, ...]] = {
    ("R", "E"): ("enter",),
    ("R", "S"): ("slice",),
    ("R", "P"): ("share",),
    ("P", "R"): ("all_reduce",),
    ("P", "E"): ("all_reduce", "enter"),
    ("P", "S"): ("all_reduce", "slice"),
    ("S", "R"): ("gather",),
    ("S", "E"): ("gather_enter",),
    ("D", "E"): ("gather_rows",),
    ("P", "D"): ("scatter_rows",),
}


@dataclass
class Dispatch:
    """How the tokens of one `permute` meet their experts: `meta["dispatch"]` of its ops.

    tensor: experts are split over tp, and the rows of all tp ranks are gathered for them (TED's expert tensor
    parallelism). folded: experts are whole, spread over ep x tp ranks. whole: experts are replicated over tp, and each
    tp rank computes its own rows.
    kind: what travels over ep. all_to_all: T*K rows. dedup: a token once to each rank that holds any of its experts.
    all_gather: all tokens to all ranks, and partial sums back by reduce-scatter.
    point: where tokens that all tp ranks hold are dropped: before_gate, after_gate, or empty, where bytes decide.
    chunks: parts of the tokens, of which one travels while another is computed.
    """

    experts: str = "tensor"
    kind: str = "all_to_all"
    drop: bool = False
    point: str = ""
    chunks: int = 1

    @property
    def axis(self) -> str:
        """The ranks among which the experts are shared out."""
        return "ept" if self.experts == "folded" else "ep"


class NoRule(Exception):
    """No rule keeps the operands as they are; the message says why."""


class Sections(Exception):
    """The sharded dim is a fused one: it must be split section by section."""

    def __init__(self, sections: tuple[int, ...]):
        super().__init__(f"fused sections {sections}")
        self.sections = sections


class Whole(Exception):
    """The experts of a dispatch cannot be split as its plan says; each tp rank computes its own rows."""

    def __init__(self, dispatch: Dispatch):
        super().__init__(dispatch.experts)
        self.dispatch = dispatch


class Call:
    """One node with the layouts of its operands, as a rule sees it."""

    residuals_follow = False  # whether a whole residual is split along with what is added to it

    def __init__(self, node: Node, layouts: dict[Node, Any], tp: int):
        self.node, self.layouts, self.tp = node, layouts, tp
        self.needs: dict[Node, Layout] = {}
        self.args: tuple | None = None
        self.emit: Callable | None = None

    def layout(self, a: Any) -> Layout:
        return self.layouts[a] if isinstance(a, Node) else R

    def arg(self, i: int, default: Any = None) -> Any:
        """An argument as the global op has it, also where the node holds a local one already."""
        args = self.node.meta.get("global_args", self.node.args)
        return args[i] if len(args) > i else default

    def need(self, a: Any, layout: Layout) -> None:
        if isinstance(a, Node):
            self.needs[a] = layout

    def assign(self, a: Any, layout: Layout) -> bool:
        """Whether the weight `a` has this layout, or is given it now (only a planner gives layouts)."""
        return self.layout(a) == layout

    def sections(self, a: Node) -> tuple[int, ...]:
        """The sections a column-split weight must respect."""
        layout = self.layout(a)
        return layout.sections if layout.kind == "S" else ()

    def tensors(self) -> list[Node]:
        return [a for a in self.node.all_input_nodes if isinstance(val(a), torch.Tensor)]

    def sharded(self) -> list[Node]:
        return [a for a in self.tensors() if self.layout(a).kind == "S"]

    def default(self) -> Layout:
        """All operands whole: R, or E where one is entered (the others must be, too)."""
        entered = [a for a in self.tensors() if self.layout(a) == E]
        for a in self.tensors():
            if entered or self.layout(a).kind != "R":
                self.need(a, E if entered else R)
        return E if entered else R


def val(a: Node) -> Any:
    return a.meta.get("val")


def shape(a: Node) -> tuple[int, ...]:
    return tuple(val(a).shape)


def ndim(a: Node) -> int:
    return val(a).dim()


def differentiable(a: Node) -> bool:
    return a.meta.get("grad", False)


RULES: dict[Any, Callable[[Call], Any]] = {}
# what reads only the dtype, the device and perhaps the number of rows of its operand
FACTORIES = {aten.new_zeros.default, aten.new_ones.default, aten.new_empty.default, aten.new_full.default}
# ops whose rules know own rows; the others work on them row by row
OWN_ROWS = {
    ops.permute.default, ops.unpermute.default, ops.gather_sum.default, ops.grouped_mm.default, ops.per_expert.default,
    ops.take.default, ops.regroup.default, ops.exchange_counts.default, ops.splits.default, ops.row_sizes.default,
    ops.all_to_all.default, ops.all_to_all_like.default, ops.gather_rows.default, ops.scatter_rows.default,
    ops.gather.default, ops.gather_enter.default, ops.reduce_scatter.default, ops.select.default,
    ops.unpermute_some.default, ops.gather_sum_some.default, ops.spread.default, ops.localize.default,
    ops.portions.default, ops.join.default,
}  # fmt: skip


def rule(*targets: Any):
    def register(f: Callable[[Call], Any]):
        RULES.update(dict.fromkeys(targets, f))
        return f

    return register


def apply(call: Call) -> Any:
    """The layout of a call's result (a tuple for several results), by the table."""
    node = call.node
    if node.target is operator.getitem:
        layouts = call.layouts[node.args[0]]
        return layouts[node.args[1]] if isinstance(layouts, tuple) else layouts
    tensors = call.tensors()
    found = RULES.get(node.target)
    if found is None and torch.Tag.pointwise in getattr(node.target, "tags", ()):
        found = pointwise
    if node.target not in OWN_ROWS and any(call.layout(a) == D for a in tensors):
        result = own_rows(call)
    elif found in (pointwise, None) and all(call.layout(a).kind in "RE" for a in tensors) or not tensors:
        result = call.default()
    elif found is None:
        raise NoRule(f"{node.target} has no rule for a split or partial operand")
    else:
        result = found(call)
    value = val(node)
    if isinstance(value, (tuple, list)) and not isinstance(result, tuple):
        return tuple(result for _ in value)
    return result


def own_rows(c: Call) -> Any:
    """An op on own rows works row by row, which is what the table says of rows split on dim 0; parameters enter.

    Where the experts are split over tp, the rows of all tp ranks are gathered before anything is done with them.
    """
    own = {a for a in c.tensors() if c.layout(a) == D}
    value = val(c.node)
    if not any(v.is_floating_point() for v in (*map(val, own), *(value if isinstance(value, tuple) else [value]))):
        return D  # counts and orders: their own rank's bookkeeping
    probe = Call(c.node, {a: S(0) if a in own else R for a in c.tensors()}, 1)
    result = apply(probe)
    results = result if isinstance(result, tuple) else (result,)
    if any(r != S(0) for r in results) and c.node.target not in FACTORIES:
        raise NoRule(f"{c.node.target} mixes the rows of experts")
    dispatch = c.node.meta.get("dispatch")
    after = E if dispatch and dispatch.experts == "tensor" else D
    for a in c.tensors():
        if a not in own and probe.needs.get(a, R).kind == "S":
            raise NoRule(f"{c.node.target} joins own rows with rows that are whole")
        c.need(a, after if a in own else E)
    return tuple(after for _ in result) if isinstance(result, tuple) else after


# ---- elementwise ----------------------------------------------------------------------------------------------------

LINEAR = {aten.neg.default, aten.add.Tensor, aten.sub.Tensor}


def pointwise(c: Call) -> Layout:
    sharded = c.sharded()
    tensors = c.tensors()
    if not sharded:
        partial = [a for a in tensors if c.layout(a) == P]
        others = [a for a in tensors if a not in partial]
        if c.node.target in LINEAR and partial and all(a.meta.get("weights_only") and c.layout(a) == R for a in others):
            scalars = [a for a in c.node.args if not isinstance(a, Node)]
            if not scalars and not (c.node.kwargs.get("alpha", 1) != 1 and others):
                for a in others:
                    c.need(a, P)
                return P
        if c.node.target is aten.mul.Tensor and len(partial) == 1 and len(others) == 1:
            small = math.prod(shape(others[0])) * 2 <= math.prod(shape(partial[0]))
            alone = len(partial[0].users) == 1  # else the sum is needed anyway, as in a norm
            if small and alone and c.layout(others[0]).kind in "RE" and shape(partial[0]) == shape(c.node):
                c.need(others[0], E)  # linear in the partial operand, so its sum can wait
                return P
        return c.default()
    first = c.layout(sharded[0])
    rel = first.dim - ndim(sharded[0])
    for a in tensors:
        layout = c.layout(a)
        if layout.kind == "S":
            if layout.dim - ndim(a) != rel or layout.sections != first.sections:
                raise NoRule(f"{c.node.target} meets operands split on different dims")
        elif ndim(a) >= -rel and shape(a)[rel] != 1:
            whole = differentiable(a) and not a.meta.get("weights_only") and shape(a) == shape(c.node)
            if (
                c.node.target in LINEAR and whole and not c.residuals_follow
            ):  # a residual: what follows it would be split along the features
                raise NoRule("its result is added to a value that is whole")
            c.need(a, S(ndim(a) + rel, first.sections))
        else:
            c.need(a, E)
    return S(ndim(c.node) + rel, first.sections)


rule(aten.to.dtype, aten._to_copy.default, aten.clone.default, aten.contiguous.default, aten.alias.default)(
    lambda c: (
        c.layout(c.node.args[0])
        if c.layout(c.node.args[0]).kind == "S" or val(c.node).dtype == val(c.node.args[0]).dtype
        else c.default()
    )
)
rule(aten.detach.default, aten.zeros_like.default, aten.ones_like.default)(
    lambda c: c.layout(c.node.args[0]) if c.layout(c.node.args[0]).kind == "S" else c.default()
)
rule(aten.masked_fill.Scalar, aten.masked_fill.Tensor, aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf)(
    pointwise
)


@rule(aten.dropout.default)
def _dropout(c: Call) -> Layout:
    layout = c.layout(c.node.args[0])
    return layout if layout.kind == "S" else c.default()  # `randomness` draws the numbers


@rule(ops.rand.default)
def _rand(c: Call) -> Layout:
    layout = c.layout(c.node.args[0])
    if (layout.kind == "S") != (c.node.args[3] == "tp"):
        raise NoRule("random numbers of tp ranks must differ exactly where the value is split")
    return layout if layout.kind == "S" else R


@rule(*FACTORIES)
def _factory(c: Call) -> Layout:
    return R  # reads only the dtype and device of its operand


# ---- views ----------------------------------------------------------------------------------------------------------


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
                if math.prod(after[: j + 2]) > prefix * before[d] or after[j + 1] % tp:
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
    result = S(layout.dim + ndim(c.node) - ndim(a), layout.sections)
    if c.node.args[1][result.dim] != 1:
        raise NoRule("repeat along the dim that is split")
    return result


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


# ---- reductions and what runs along one dim -------------------------------------------------------------------------


def _dims(c: Call, a: Node) -> set[int]:
    dims = c.arg(1)
    if dims is None or isinstance(dims, (list, tuple)) and not dims:
        dims = range(ndim(a))
    return {d % ndim(a) for d in (dims if isinstance(dims, (list, tuple, range)) else [dims])}


@rule(aten.sum.dim_IntList, aten.mean.dim, aten.sum.default, aten.mean.default)
def _reduce(c: Call) -> Layout:
    a = c.node.args[0]
    layout = c.layout(a)
    whole = c.node.target in (aten.sum.default, aten.mean.default)
    dims = set(range(ndim(a))) if whole else _dims(c, a)
    if layout.kind != "S":
        if layout == P:
            return P
        return c.default()
    if layout.dim not in dims:
        keep = c.arg(2, False)
        return S(layout.dim - (0 if keep else sum(d < layout.dim for d in dims)), layout.sections)
    if c.node.target in (aten.mean.dim, aten.mean.default):
        mean, tp = c.node.target, c.tp
        c.emit = lambda x, *args, **kw: aten.div.Scalar(mean(x, *args, **kw), tp)
    return P


rule(aten.div.Scalar, aten.mul.Scalar)(lambda c: P if c.layout(c.node.args[0]) == P else pointwise(c))


@rule(aten.amax.default, aten.amin.default)
def _extreme(c: Call) -> Layout:
    a = c.node.args[0]
    layout = c.layout(a)
    if layout.kind != "S":
        return c.default()
    if layout.dim in _dims(c, a):
        if c.node.target is aten.amin.default or differentiable(c.node):
            raise NoRule("a maximum with a gradient along the dim that is split")
        return PMAX
    return S(layout.dim - (0 if c.arg(2, False) else sum(d < layout.dim for d in _dims(c, a))), layout.sections)


@rule(aten.softmax.int, aten._softmax.default, aten.log_softmax.int, aten.cumsum.default)
def _softmax(c: Call) -> Layout:
    a, dim = c.node.args[0], c.node.args[1] % ndim(c.node.args[0])
    layout = c.layout(a)
    if layout.kind != "S":
        return c.default()
    if dim == layout.dim:
        raise NoRule(f"{c.node.target} along the dim that is split")
    return layout


@rule(aten.var.correction, aten.topk.default, aten.sort.default, aten.argsort.default, aten.argmax.default)
def _along_one(c: Call) -> Any:
    for a in c.sharded():
        at = {aten.topk.default: 2, aten.sort.default: 1, aten.argsort.default: 1}.get(c.node.target)
        if at is None or c.arg(at, -1) % ndim(a) == c.layout(a).dim:
            raise NoRule(f"{c.node.target} of a split value")
        return c.layout(a)
    return c.default()


@rule(aten.max.dim)
def _max(c: Call) -> Any:
    a, dim = c.node.args[0], c.node.args[1] % ndim(c.node.args[0])
    layout = c.layout(a)
    if layout.kind != "S":
        return c.default()
    if dim == layout.dim:
        raise NoRule("max along the dim that is split")
    return S(layout.dim - (not c.arg(2, False) and dim < layout.dim), layout.sections)


@rule(aten.rms_norm.default)
def _rms_norm(c: Call) -> Layout:
    a, normalized, weight = c.node.args[0], c.node.args[1], c.arg(2)
    layout = c.layout(a)
    if layout.kind != "S":
        return c.default()
    if layout.dim < ndim(a) - len(normalized):
        c.need(weight, E)
        return layout
    raise NoRule("rms_norm over the dim that is split")


@rule(aten.layer_norm.default, aten.group_norm.default)
def _layer_norm(c: Call) -> Layout:
    a = c.node.args[0]
    layout = c.layout(a)
    if layout.kind != "S":
        return c.default()
    if c.node.target is aten.layer_norm.default and layout.dim < ndim(a) - len(c.node.args[1]):
        c.need(c.arg(2), E)
        c.need(c.arg(3), E)
        return layout
    raise NoRule("a norm over the dim that is split")


# ---- products -------------------------------------------------------------------------------------------------------


def contract(c: Call, x: Node, w: Node, inner: int, outer: int, bias: Any = None) -> Layout:
    """x (..., n) times a weight whose dim `inner` is n and whose dim `outer` becomes the last: column or row."""
    layout, last = c.layout(x), ndim(x) - 1
    if layout.kind == "S" and layout.dim == last:
        if not c.assign(w, S(inner, layout.sections)):
            raise NoRule("its result is needed whole")
        if bias is not None:
            c.need(bias, P)
        return P
    if layout.kind == "S":
        if c.layout(w).kind == "S":
            raise NoRule("a split weight meets a value that is split on another dim")
        c.need(w, E)
        c.need(bias, E)
        return layout
    sections = c.sections(w)
    if c.layout(w) == S(outer, sections) or c.assign(w, S(outer, sections)):
        c.need(x, E)
        c.need(bias, S(0, sections))
        return S(ndim(c.node) - 1, sections)
    if c.layout(w).kind == "S" and c.layout(w).dim == inner:
        c.need(x, S(last, c.layout(w).sections))
        c.need(bias, P)
        return P
    return c.default()


@rule(aten.linear.default)
def _linear(c: Call) -> Layout:
    x, w, bias = c.node.args[0], c.node.args[1], c.arg(2)
    return contract(c, x, w, 1, 0, bias)


@rule(aten.addmm.default)
def _addmm(c: Call) -> Layout:
    if c.node.kwargs:
        return _along_one(c)
    bias, x, w = c.node.args
    if shape(bias) != shape(w)[1:]:
        return _along_one(c)
    return contract(c, x, w, 0, 1, bias)


@rule(ops.grouped_mm.default)
def _grouped_mm(c: Call) -> Layout:
    rows, weight, counts = c.node.args
    if c.layout(rows).kind == "S" and c.layout(rows).dim == 0:
        raise NoRule("a grouped product of rows that are split")
    if c.layout(rows) == D:
        sections = c.sections(weight)
        return _own_rows_of_experts(c, weight, counts, rows, S(2, sections)) or S(1, sections)
    c.need(counts, R)
    return contract(c, rows, weight, 1, 2)


@rule(aten.matmul.default, aten.mm.default, aten.bmm.default)
def _matmul(c: Call) -> Layout:
    a, b = c.node.args
    if ndim(b) == 2 and ndim(a) >= 2 and b.meta.get("weights_only"):
        return contract(c, a, b, 0, 1)
    la, lb = c.layout(a), c.layout(b)
    if not c.sharded():
        return c.default()
    if ndim(a) < 2 or ndim(b) < 2:
        raise NoRule("a matrix-vector product of a split value")
    ra = la.dim - ndim(a) if la.kind == "S" else None
    rb = lb.dim - ndim(b) if lb.kind == "S" else None
    if la.sections or lb.sections:
        raise NoRule("a product of fused sections")
    if ra == -1 and rb in (-2, None):
        c.need(b, S(ndim(b) - 2))
        return P
    if rb == -2 and ra is None:
        c.need(a, S(ndim(a) - 1))
        return P
    if ra == -2 and rb is None:
        c.need(b, E)
        return S(ndim(c.node) - 2)
    if rb == -1 and ra is None:
        c.need(a, E)
        return S(ndim(c.node) - 1)
    rel = ra if ra is not None else rb
    assert rel is not None
    if rel >= -2 or (ra is not None and rb is not None and ra != rb):
        raise NoRule("a product of operands split on different dims")
    for operand, r in ((a, ra), (b, rb)):
        if r is None:
            batched = ndim(operand) >= -rel and shape(operand)[rel] != 1
            c.need(operand, S(ndim(operand) + rel) if batched else E)
    return S(ndim(c.node) + rel)


@rule(aten.scaled_dot_product_attention.default)
def _attention(c: Call) -> Layout:
    q, k, v, mask = c.node.args[0], c.node.args[1], c.node.args[2], c.arg(3)
    sharded = [a for a in (q, k, v) if c.layout(a).kind == "S"]
    if not sharded:
        return c.default()
    layout = c.layout(sharded[0])
    if layout.dim >= ndim(q) - 2 or any(c.layout(a) != layout for a in sharded) or layout.sections:
        raise NoRule("attention split on the sequence or the head dim")
    for a in (q, k, v):
        if shape(a)[layout.dim] % c.tp:
            raise NoRule(f"{shape(a)[layout.dim]} heads do not divide over tp={c.tp}")
        c.need(a, layout)
    if isinstance(mask, Node):
        rel = layout.dim - ndim(q)
        c.need(mask, S(ndim(mask) + rel) if ndim(mask) >= -rel and shape(mask)[rel] != 1 else E)
    return layout


# ---- vocabulary -----------------------------------------------------------------------------------------------------


@rule(aten.embedding.default)
def _embedding(c: Call) -> Layout:
    weight, _ids, padding = c.node.args[0], c.node.args[1], c.arg(2, -1)
    if not any(c.node.args[3:]) and c.assign(weight, S(0)):
        c.emit = lambda w, i, *rest: ops.embedding_shard.default(w, i, padding, "tp")
        return P
    if c.layout(weight) == S(1):
        return S(ndim(c.node) - 1)
    return c.default()


def _cross_entropy_shard(x, target, weight=None, reduction=1, ignore=-100, smoothing=0.0):
    """Cross-entropy over a vocabulary split over tp; the logits are never whole on any rank."""
    biggest = ops.all_max.default(aten.amax.default(aten.detach.default(x), [-1], True), "tp")
    z = aten.sub.Tensor(x, biggest)
    total = ops.all_reduce.default(aten.sum.dim_IntList(aten.exp.default(z), [-1]), "tp")
    valid = aten.ne.Scalar(target, ignore)
    zeros = aten.zeros_like.default(target)
    picked = ops.all_reduce.default(ops.pick.default(z, aten.where.self(valid, target, zeros), "tp"), "tp")
    losses = aten.sub.Tensor(aten.log.default(total), picked)
    losses = aten.where.self(valid, losses, aten.zeros_like.default(losses))
    if reduction == 0:
        return losses
    loss = aten.sum.default(losses)
    return aten.div.Tensor(loss, aten.sum.default(valid)) if reduction == 1 else loss


@rule(aten.cross_entropy_loss.default)
def _cross_entropy(c: Call) -> Layout:
    x, target, weight, smoothing = c.node.args[0], c.node.args[1], c.arg(2), c.arg(5, 0.0)
    layout = c.layout(x)
    if layout.kind != "S":
        return c.default()
    if layout != S(1) or ndim(x) != 2 or weight is not None or smoothing or ndim(target) != 1 or c.node.kwargs:
        raise NoRule("a weighted, smoothed or probabilistic cross-entropy of split logits")
    if val(target).is_floating_point():
        raise NoRule("a cross-entropy with class probabilities of split logits")
    c.emit = _cross_entropy_shard
    return R


@rule(ops.pick.default)
def _pick(c: Call) -> Layout:
    return P if c.layout(c.node.args[0]) == S(ndim(c.node.args[0]) - 1) else c.default()


@rule(ops.embedding_shard.default)
def _embedding_shard(c: Call) -> Layout:
    c.need(c.node.args[0], S(0))
    return P


# ---- tokens over experts --------------------------------------------------------------------------------------------


@rule(ops.permute.default)
def _permute(c: Call) -> Any:
    x, index, _ = c.node.args
    layout = c.layout(x)
    if S(0) in (layout, c.layout(index)):
        c.need(x, S(0))
        c.need(index, S(0))
        return (D, P, D, D)
    c.need(index, R)
    if layout == P:
        c.need(x, R)
        layout = R
    if layout.kind == "S" and layout.dim != 1:
        raise NoRule("dispatch of tokens that are split")
    return (layout, R, R, R)


@rule(ops.unpermute.default)
def _unpermute(c: Call) -> Layout:
    rows, perm, _, weights = c.node.args
    layout = c.layout(rows)
    if c.layout(perm) == D:
        _need_own(c, rows)
        c.need(weights, S(0))
        return S(0)
    if layout.kind == "S" and layout.dim != 1:
        raise NoRule("combine of rows that are split")
    if layout.kind == "R":
        return c.default()
    c.need(weights, E)
    return layout


@rule(ops.gather_sum.default)
def _gather_sum(c: Call) -> Layout:
    if c.layout(c.node.args[1]) == D:
        _need_own(c, c.node.args[0])
        return S(0)
    return _rows(c)


def _need_own(c: Call, rows: Node) -> None:
    if c.layout(rows) not in (D, P):
        raise Whole(c.node.meta["dispatch"])
    c.need(rows, D)


def _own_rows_of_experts(c: Call, weight: Node, counts: Node, rows: Node, columns: Layout) -> Layout | None:
    """Own rows and a weight of each expert, by the plan of their dispatch; None: the rows are gathered first."""
    dispatch = c.node.meta.get("dispatch")
    layout = c.layout(weight)
    if layout == S(0) or (dispatch and dispatch.experts == "folded"):
        if not c.assign(weight, S(0)):
            raise Whole(c.node.meta["dispatch"])
        return D
    if dispatch and dispatch.experts == "tensor":
        if not c.assign(weight, columns):
            raise Whole(dispatch)
        c.need(rows, E)
        c.need(counts, R)
        return None
    c.need(weight, E)
    return D


@rule(ops.per_expert.default)
def _per_expert(c: Call) -> Layout:
    if c.layout(c.node.args[2]) == D:
        x, counts, rows = c.node.args
        own = _own_rows_of_experts(c, x, counts, rows, c.layout(x) if c.layout(x).kind == "S" else R)
        if own:
            return own
    else:
        c.need(c.node.args[1], R)
    layout = c.layout(c.node.args[0])
    if layout == P or (layout.kind == "S" and layout.dim == 0):
        raise NoRule("a per-expert value that is partial or split over experts")
    return layout  # the rows give only their number


def permute_output(a: Node) -> int | None:
    """Which result of a permute a node is, or is a view of."""
    while a.target in (aten.view.default, aten.reshape.default):
        a = a.args[0]
    ours = a.target is operator.getitem and a.args[0].target is ops.permute.default
    return a.args[1] if ours else None


@rule(ops.take.default)
def _take(c: Call) -> Layout:
    """Between slots and rows, or, sorted again after a dispatch, rows and rows."""
    x, order, _ = c.node.args
    result = permute_output(order) if c.layout(order) == D else None
    if result == 3:
        c.need(x, S(0))
        return D
    if result == 2:
        _need_own(c, x)
        return S(0)
    return _rows(c)


@rule(ops.drop.default)
def _drop(c: Call) -> Layout:
    c.need(c.node.args[0], S(0))
    c.emit = lambda x: x
    return S(0)


@rule(ops.gather_rows.default)
def _gather_rows(c: Call) -> Layout:
    c.need(c.node.args[0], D)
    return E if val(c.node.args[0]).is_floating_point() else R


@rule(ops.scatter_rows.default)
def _scatter_rows(c: Call) -> Layout:
    c.need(c.node.args[0], P)
    return D


@rule(ops.exchange_counts.default)
def _exchange_counts(c: Call) -> Layout:
    return D if c.layout(c.node.args[0]) in (P, D) else c.default()  # own counts


@rule(ops.splits.default, ops.row_sizes.default)
def _splits(c: Call) -> Layout:
    return D if any(c.layout(a) in (P, D) for a in c.tensors()) else c.default()


@rule(ops.all_to_all.default, ops.all_to_all_like.default)
def _rows(c: Call) -> Layout:
    layout = c.layout(c.node.args[0])
    if layout.kind == "S" and layout.dim == 0:
        raise NoRule("dispatch of tokens that are split")
    return layout


@rule(ops.regroup.default)
def _regroup(c: Call) -> Any:
    return (D, D) if c.layout(c.node.args[0]) == D else (R, R)


@rule(ops.portions.default)
def _portions(c: Call) -> Any:
    return (c.layout(c.node.args[0]),) * c.node.args[1]  # of its own rows, where they are split


@rule(ops.join.default)
def _join(c: Call) -> Layout:
    first, *others = map(c.layout, c.node.args[0])
    if any(other != first for other in others):
        raise NoRule("parts that are laid out otherwise than each other")
    return first


@rule(ops.own_experts.default)
def _own_experts(c: Call) -> Layout:
    x, dim, _, axis = c.node.args
    if axis != "tp":
        return c.layout(x)
    c.need(x, S(dim))
    return S(0)


# ---- moves: what the verifier reads ---------------------------------------------------------------------------------


@rule(ops.enter.default)
def _enter(c: Call) -> Layout:
    c.need(c.node.args[0], R)
    return E


@rule(ops.share.default)
def _share(c: Call) -> Layout:
    c.need(c.node.args[0], R)
    return P


@rule(ops.all_reduce.default)
def _all_reduce(c: Call) -> Layout:
    if c.node.args[1] != "tp":  # counts over data ranks: these layouts are about tp
        if differentiable(c.node.args[0]):
            raise NoRule("a sum over data ranks inside the forward has no gradient rule")
        return c.default()
    c.need(c.node.args[0], P)
    return R


@rule(ops.all_max.default)
def _all_max(c: Call) -> Layout:
    c.need(c.node.args[0], PMAX)
    return R


@rule(ops.select.default)
def _select_rows(c: Call) -> Any:
    x, index = c.layout(c.node.args[0]), c.layout(c.node.args[1])
    if index == R:
        return (x, R, R, R)
    if (x, index) not in ((S(0), S(0)), (D, D), (E, D)):
        raise NoRule(f"tokens as {x} with experts as {index}")
    return (D, D, D, D)


@rule(ops.unpermute_some.default)
def _unpermute_some(c: Call) -> Layout:
    rows, perm, _, weights = c.node.args
    layout = c.layout(rows)
    if c.layout(perm) == D:  # of own tokens, or what this rank's experts add to all tokens
        return D if c.layout(weights) == D else P
    if layout.kind != "R":
        c.need(weights, E)
    return layout


@rule(ops.gather_sum_some.default)
def _gather_sum_some(c: Call) -> Layout:
    return S(0) if c.layout(c.node.args[1]) == D else c.layout(c.node.args[0])


@rule(ops.spread.default)
def _spread(c: Call) -> Layout:
    x, perm, _ = c.node.args
    if c.layout(perm) == D:
        c.need(x, S(0))
        return D
    return c.layout(x)


@rule(ops.destinations.default)
def _destinations(c: Call) -> Layout:
    return c.layout(c.node.args[0])


@rule(ops.localize.default)
def _localize(c: Call) -> Layout:
    return D if c.node.args[2] == "ept" else c.layout(c.node.args[0])


def _over_data(c: Call) -> Layout:
    """Moves over ep leave a value where it is over tp; own tokens of several data ranks are in no order of theirs."""
    layout = c.layout(c.node.args[0])
    back = c.node.target is ops.reduce_scatter.default
    if c.node.args[-1] == "ep":
        return {S(0): S(0) if back else D, D: S(0) if back else D}.get(layout, layout)
    c.need(c.node.args[0], P if back else S(0))
    return S(0) if back else R if c.node.target is ops.gather.default else E


@rule(ops.slice.default, ops.reduce_scatter.default)
def _slice_move(c: Call) -> Layout:
    a, dim, _, sections, _ = c.node.args
    if c.node.args[-1] != "tp":
        return _over_data(c)
    c.need(a, R if c.node.target is ops.slice.default else P)
    return S(dim, tuple(sections))


@rule(ops.gather.default, ops.gather_enter.default)
def _gather_move(c: Call) -> Layout:
    a, dim, _, sections, _ = c.node.args
    if c.node.args[-1] != "tp":
        return _over_data(c)
    if c.layout(a) == D:  # own counts or own tokens of all ranks
        return R if c.node.target is ops.gather.default else E
    c.need(a, S(dim, tuple(sections)))
    return R if c.node.target is ops.gather.default else E
