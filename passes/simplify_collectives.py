"""Collectives move past pointwise, norm, router and residual ops where that sends fewer bytes (sequence parallelism).

Before:  h = all_reduce(p) + r;  n = norm(h);  y = f(enter(n));  t = slice(n);  out = gather(experts(t)) + h
After:   h' = reduce_scatter(p) + r';  n' = norm(h');  y = f(gather_enter(n'));  out' = experts(n') + h'

A value that all ranks hold (R) may be computed on each rank's tokens (S) wherever the table of layouts says how. From
every gather, slice and all-reduce over tp the split is carried as far as it goes, then values whose split does not pay
go back; what is kept is cheaper over the whole chain, or as cheap and smaller. Identities used where the two meet:

    slice(all_reduce(p)) = reduce_scatter(p)      slice(gather(x)) = x      enter(gather(x)) = gather_enter(x)
    slice(f(a, b)) = f(slice(a), slice(b))        f(gather(a), b) = gather(f(a, slice(b)))

Costs count bytes of forward and backward in units of one all-gather: a value needed whole that is split (1, forward),
needed split that is whole (1, backward), a gather left where it is (1), a weight that meets a split value (2: its
gradient is all-reduced). An all-reduce and a reduce-scatter with its all-gather in the backward are equal.
(DeepSpeed-TED drops and gathers around each expert only: arXiv 2303.06318, section 5.1.)

Needs: layouts, from `shard_tensors`. Leaves true: layouts. Refuses: nothing.
"""

from __future__ import annotations

import heapq
import math
import operator
from collections import deque
from typing import Any

import torch
from torch.fx import GraphModule, Node

from tedcompile import layouts
from tedcompile.layouts import Call, E, Layout, NoRule, R, S, Sections, Whole, differentiable, ndim, shape, val
from tedcompile.ops import ops
from tedcompile.passes.shard_tensors import Moves


def run(gm: GraphModule, ctx) -> None:
    tp = ctx.shape.tp
    if tp == 1:
        return
    region = _Region(gm, tp)
    region.grow()
    region.shrink()
    if region.split and region.cost() <= _Region(gm, tp).cost():
        region.rewrite()
        gm.graph.eliminate_dead_code()


class _TokenCall(Call):
    """A call of a value split by tokens: residuals are split along, weights stay whole and enter."""

    residuals_follow = True

    def assign(self, a: Any, layout: Layout) -> bool:
        return self.layout(a) == layout


def _over_tp(node: Node, target: Any) -> bool:
    return node.target is target and node.args[-1] == "tp"


class _Region:
    """`split`: the values that are R in the graph and S here, with the layout of each (a tuple for several results)."""

    def __init__(self, gm: GraphModule, tp: int):
        self.gm, self.tp = gm, tp
        self.split: dict[Node, Any] = {}
        self.needs: dict[Node, dict[Node, Layout]] = {}  # of the ops in `split`

    def layout(self, a: Node) -> Any:
        return self.split.get(a, a.meta["layout"])

    # ---- where a split can go

    def grow(self) -> None:
        pending: deque[tuple[Node, Layout]] = deque()
        for n in self.gm.graph.nodes:
            if _over_tp(n, ops.gather.default) and n.meta["layout"] == R and n.args[0].meta["layout"].kind == "S":
                pending.append((n, S(n.args[1], tuple(n.args[3]))))
            elif _over_tp(n, ops.slice.default) and not n.meta.get("weights_only"):
                pending.append((n.args[0], n.meta["layout"]))
        self.spread(pending)
        for n in self.gm.graph.nodes:
            if _over_tp(n, ops.all_reduce.default) and n not in self.split and val(n).is_floating_point():
                dims = [d for d in range(ndim(n) - 1) if isinstance(shape(n)[d], int) and shape(n)[d] % self.tp == 0]
                if dims:
                    self.spread(deque([(n, S(dims[0]))]))

        while wrong := [n for n in self.split if not self.agrees(n)]:
            for n in wrong:
                del self.split[n], self.needs[n]

    def agrees(self, n: Node) -> bool:
        """Whether what an op reads is split as it reads it, or whole, to be sliced."""
        if n.target is operator.getitem and n.args[0] not in self.split:
            return False
        if isinstance(self.split[n], tuple) and any(u not in self.split for u in n.users):
            return False
        return all(self.split.get(a, need) == need for a, need in self.needs[n].items() if need.kind == "S")

    def spread(self, pending: deque) -> None:
        while pending:
            node, wanted = pending.popleft()
            if node in self.split:
                continue
            needs = self.operands(node, wanted)
            if needs is None:
                continue
            self.split[node], self.needs[node] = wanted, needs
            pending.extend((a, need) for a, need in needs.items() if need.kind == "S" and self.whole(a))
            for user in node.users:
                if user not in self.split and self.whole(user):
                    result = self.result(user)
                    if result is not None:
                        pending.append((user, result))

    def whole(self, a: Node) -> bool:
        """Whether a value is R, and made by an op that could as well make it split."""
        layout = a.meta.get("layout")
        kinds = set(layout) if isinstance(layout, tuple) else {layout}
        return a.op == "call_function" and kinds == {R} and not {"dispatch", "pinned"} & a.meta.keys()

    def call(self, node: Node, given: dict[Node, Any]) -> tuple[Any, _TokenCall] | None:
        known = {a: given.get(a, self.layout(a)) for a in node.all_input_nodes}
        call = _TokenCall(node, known, self.tp)
        try:
            result = layouts.apply(call)
        except (NoRule, Sections, Whole):
            return None
        results = result if isinstance(result, tuple) else (result,)
        for a, layout in known.items():  # an operand is read as it is, or moved from R
            layout = layout[0] if isinstance(layout, tuple) else layout
            if call.needs.get(a, layout) != layout and layout != R:
                return None
        if not all(r.kind == "S" for r in results):
            return None
        return result, call

    def result(self, user: Node) -> Any:
        """The layout a user's value has when it reads what is split as it is."""
        if user.target in (ops.all_reduce.default, ops.gather.default, ops.enter.default, ops.slice.default):
            return None
        found = self.call(user, {})
        return found[0] if found else None

    def operands(self, node: Node, wanted: Any) -> dict[Node, Layout] | None:
        """What an op must read for its value to be split as wanted; None where it cannot be."""
        if not self.whole(node):
            return None
        if _over_tp(node, ops.all_reduce.default):
            return {} if not wanted.sections and shape(node)[wanted.dim] % self.tp == 0 else None
        if _over_tp(node, ops.gather.default):
            return {} if node.args[0].meta["layout"] == wanted else None
        if getattr(node.target, "namespace", "") == "ted":
            return None
        trials: list[dict[Node, Any]] = [{}]
        for a in node.all_input_nodes:
            if self.layout(a) == R and isinstance(val(a), torch.Tensor) and not a.meta.get("weights_only"):
                known = [d for d in range(ndim(a)) if isinstance(shape(a)[d], int)]
                trials += [{a: S(d)} for d in known if shape(a)[d] % self.tp == 0 and shape(a)[d] > 1]
        for given in trials:
            found = self.call(node, given)
            if found and found[0] == wanted:
                read = {a: x for a, x in found[1].layouts.items() if isinstance(x, Layout) and x.kind == "S"}
                return {**read, **found[1].needs}
        return None

    # ---- what it costs

    def bytes(self, a: Node) -> int:
        value = val(a)
        return math.prod(value.shape) * value.element_size() if isinstance(value, torch.Tensor) else 0

    def reads(self, user: Node, a: Node) -> str:
        """How a user takes a value: "S", "R", or "" where either costs the same."""
        if _over_tp(user, ops.enter.default):
            return ""
        if _over_tp(user, ops.slice.default):
            return "S" if self.layout(a) in (R, user.meta["layout"]) else "R"
        if user in self.split:
            need = self.needs[user].get(a)
            return "S" if a in self.split or (need is not None and need.kind == "S") else ""
        return "R"

    def share(self, a: Node) -> int:
        """A value's part of the cost."""
        total = 0
        if a in self.split:
            if isinstance(val(a), torch.Tensor) and any(self.reads(u, a) == "R" for u in a.users):
                total += self.bytes(a)
            total += sum(2 * self.bytes(w) for w, need in self.needs[a].items() if need == E and differentiable(w))
        else:
            if differentiable(a) and a.meta.get("layout") == R and any(self.reads(u, a) == "S" for u in a.users):
                total += self.bytes(a)
            if _over_tp(a, ops.gather.default):
                total += self.bytes(a)
        return total

    def cost(self) -> int:
        return sum(self.share(n) for n in self.gm.graph.nodes if n.op != "output")

    def shrink(self) -> None:
        """Values whose split does not pay become whole again, one at a time or all that hang on one whole value."""
        changed = True
        while changed:
            changed = False
            groups = [{n} for n in reversed(list(self.split))]
            groups += [self.hanging(n) for n in self.gm.graph.nodes if n not in self.split and n.meta.get("grad")]
            for group in groups:
                group &= self.split.keys()
                if group and self.pays(group):
                    changed = True

    def hanging(self, a: Node) -> set[Node]:
        """The split values that are made of one whole value and of nothing else that is split."""
        found: set[Node] = set()
        pending = sorted(u for u in a.users if u in self.split)
        while pending:
            n = heapq.heappop(pending)
            if n not in found and all(b in found for b in n.all_input_nodes if b in self.split):
                found.add(n)
                for user in n.users:
                    if user in self.split:
                        heapq.heappush(pending, user)
        return found

    def pays(self, group: set[Node]) -> bool:
        """Makes a group of values whole if that is cheaper."""
        around = {m for n in group for m in (n, *n.all_input_nodes, *self.needs[n])}
        before = sum(map(self.share, around))
        kept = {n: (self.split.pop(n), self.needs.pop(n)) for n in group}
        if all(map(self.consistent, group)) and sum(map(self.share, around)) < before:
            return True
        for n, (label, needs) in kept.items():
            self.split[n], self.needs[n] = label, needs
        return False

    def consistent(self, n: Node) -> bool:
        """Whether a value that became whole can still be sliced or gathered: several results at once cannot be."""
        if n.target is operator.getitem:
            return n.args[0] not in self.split
        return isinstance(val(n), torch.Tensor) or not any(u in self.split for u in n.users)

    # ---- the graph

    def rewrite(self) -> None:
        moves = Moves(self.gm.graph, self.tp)
        renamed: dict[Node, Node] = {}
        for node in list(self.gm.graph.nodes):
            touched = [a for a in node.all_input_nodes if a in self.split or a in renamed]
            if node in self.split:
                self.make(node, moves, renamed)
            elif touched:
                self.read(node, moves, renamed)
        for node in reversed(renamed):
            self.gm.graph.erase_node(node)

    def make(self, node: Node, moves: Moves, renamed: dict[Node, Node]) -> None:
        wanted = self.split[node]
        if _over_tp(node, ops.all_reduce.default):
            operand = renamed.get(node.args[0], node.args[0])
            with self.gm.graph.inserting_before(node):
                renamed[node] = moves.scatter(operand, wanted, node)
            return
        if _over_tp(node, ops.gather.default):
            renamed[node] = renamed.get(node.args[0], node.args[0])
            return
        found = self.call(node, {a: n for a, n in self.needs[node].items() if n.kind == "S"})
        assert found and found[0] == wanted, f"{node.name} as {wanted}"
        call = found[1]
        for a, need in self.needs[node].items():
            call.needs.setdefault(a, need)
        moves.rewrite(node, call, wanted, renamed)

    def read(self, node: Node, moves: Moves, renamed: dict[Node, Node]) -> None:
        """A user that reads its operands as before, of values that are split now."""
        a = node.args[0] if node.args else None
        if isinstance(a, Node) and a in self.split:
            source = renamed.get(a, a)
            with self.gm.graph.inserting_before(node):
                if _over_tp(node, ops.slice.default) and self.split[a] == node.meta["layout"]:
                    renamed[node] = source
                    return
                if _over_tp(node, ops.enter.default):
                    renamed[node] = moves.to(source, E, node)
                    return
        with self.gm.graph.inserting_before(node):
            swap = {
                b: moves.to(renamed.get(b, b), R, node) if b in self.split else renamed[b]
                for b in node.all_input_nodes
                if b in self.split or b in renamed
            }
        node.args, node.kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda b: swap.get(b, b))
