"""Layouts, the call that a rule sees, and the table itself."""

from __future__ import annotations

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
    found, pointwise = RULES.get(node.target), RULES[torch.Tag.pointwise]
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
