"""Which weights are split over tp: an optimistic fixed point over the layout table. Pure functions, no tensors.

Every linear is tried column-parallel; one whose input is split on the contracted dim becomes row-parallel. A value that
is split remembers the weights it came from; where an op has no rule for it, those weights go back to replicated and the
plan is made again, until nothing changes. Weights of equal shape at the same place of repeated modules go together.
"""

from __future__ import annotations

import operator
import re
from dataclasses import dataclass, field
from typing import Any

from torch.fx import Graph, Node

from tedcompile import layouts
from tedcompile.capture import module_path, source_line
from tedcompile.layouts import Call, D, E, Layout, NoRule, R, S, Sections, Whole, aten, shape
from tedcompile.ops import ops

# ops a weight may pass on its way to the product that decides its layout
CHAIN = {
    aten.transpose.int, aten.t.default, aten.permute.default, aten.to.dtype, aten._to_copy.default, aten.alias.default,
    aten.contiguous.default, aten.view.default, aten.reshape.default, aten.unsqueeze.default, aten.expand.default,
    ops.per_expert.default,
}  # fmt: skip


@dataclass
class TensorPlan:
    """Layouts of all values, what each call needs, and why weights stayed whole."""

    layouts: dict[Node, Any] = field(default_factory=dict)
    calls: dict[Node, Call] = field(default_factory=dict)
    weights: dict[Node, Layout] = field(default_factory=dict)
    reasons: dict[Node, str] = field(default_factory=dict)


class _Retry(Exception):
    pass


def _key(weight: Node) -> tuple:
    """Weights of repeated modules share their fate."""
    return re.sub(r"\d+", "*", weight.meta["role"][1]), shape(weight)


class _PlanCall(Call):
    def __init__(self, node: Node, planner: _Planner):
        super().__init__(node, planner.plan.layouts, planner.tp)
        self.planner = planner
        self.assigned: set[Node] = set()

    def sections(self, a: Node) -> tuple[int, ...]:
        weight = self.planner.weight_of(a)[0]
        return super().sections(a) or (self.planner.sections.get(_key(weight), ()) if weight else ())

    def need(self, a: Any, layout: Layout) -> None:
        if isinstance(a, Node) and layout.kind == "S" and self.layout(a).kind == "R" and a.meta.get("weights_only"):
            self.assign(a, layout)
        super().need(a, layout)

    def assign(self, a: Any, layout: Layout) -> bool:
        return self.layout(a) == layout or self.planner.assign(self, a, layout)


class _Planner:
    def __init__(self, graph: Graph, tp: int, fixed: dict[Node, Layout] | None):
        self.graph, self.tp, self.fixed = graph, tp, fixed or {}
        self.off: dict[tuple, str] = {}
        self.sections: dict[tuple, tuple[int, ...]] = {}

    def run(self) -> TensorPlan:
        while True:
            try:
                return self.attempt()
            except _Retry:
                continue

    def attempt(self) -> TensorPlan:
        self.plan = TensorPlan()
        self.origin: dict[Node, frozenset[Node]] = {}  # weights whose column split a value carries
        self.statistic: dict[Node, frozenset[Node]] = {}  # weights whose split values a statistic was reduced over
        self.normed: dict[Node, frozenset[Node]] = {}
        for node in self.graph.nodes:
            if node.op == "placeholder":
                self.plan.layouts[node] = self.fixed.get(node, R)
                if node in self.fixed and self.fixed[node].kind == "S":
                    self.plan.weights[node] = self.fixed[node]
            elif node.op == "output":
                self.output(node)
            else:
                self.visit(node)
        self._enter_before_dispatch()
        return self.plan

    def output(self, node: Node) -> None:
        call = _PlanCall(node, self)
        for a in node.all_input_nodes:
            call.needs[a] = R
        self.plan.calls[node] = call

    def visit(self, node: Node) -> None:
        call = _PlanCall(node, self)
        sharded = call.sharded()
        origin = frozenset().union(*(self.origin.get(a, frozenset()) for a in sharded))
        try:
            normed = frozenset().union(*(self.normed.get(a, frozenset()) for a in sharded))
            row = node.target in (aten.linear.default, aten.matmul.default)
            if row and sharded and origin and normed >= origin and not origin <= set(self.fixed):
                raise NoRule("its normalised result is a product's input")
            result = layouts.apply(call)
        except Whole as wrong:
            wrong.dispatch.experts = "whole"
            raise _Retry from None
        except Sections as fused:
            weights = [w for w in origin if w not in self.fixed and _key(w) not in self.sections]
            if not weights:
                return self.give_up(node, origin, str(fused))
            self.sections.update({_key(w): fused.sections for w in weights})
            raise _Retry from None
        except NoRule as error:
            return self.give_up(node, origin, str(error))
        self.plan.layouts[node], self.plan.calls[node] = result, call
        if node.target is operator.getitem:
            for facts in (self.origin, self.statistic, self.normed):
                facts[node] = facts.get(node.args[0], frozenset())
            return
        kinds = {r.kind for r in result} if isinstance(result, tuple) else {result.kind}
        inputs = call.tensors()
        statistics = frozenset().union(*(self.statistic.get(a, frozenset()) for a in inputs))
        if "S" in kinds:
            carried = frozenset().union(
                *(self.origin.get(a, frozenset()) for a in inputs if call.layout(a).kind == "S")
            )
            self.origin[node] = carried | call.assigned
            self.normed[node] = frozenset().union(*(self.normed.get(a, frozenset()) for a in inputs)) | (
                statistics & self.origin[node]
            )
            if self.normed[node]:  # the norm's own weight, split along with what it scales
                self.normed[node] |= call.assigned
        elif node.target not in (aten.linear.default, aten.matmul.default, ops.grouped_mm.default):
            self.statistic[node] = statistics | (origin if "P" in kinds else frozenset())

    def give_up(self, node: Node, origin: frozenset[Node], reason: str) -> None:
        weights = [w for w in origin if w not in self.fixed]
        if weights:
            where = source_line(node) or module_path(node)
            for w in weights:
                self.off.setdefault(_key(w), f"{reason}, at {where}" if where else reason)
            raise _Retry
        call = _PlanCall(node, self)
        for a in call.tensors():
            call.needs[a] = R
        self.plan.calls[node] = call
        value = layouts.val(node)
        self.plan.layouts[node] = tuple(R for _ in value) if isinstance(value, (tuple, list)) else R

    # ---- weights

    def weight_of(self, a: Node) -> tuple[Node | None, list[Node]]:
        """The parameter a value is a view of, and the nodes on the way."""
        chain: list[Node] = []
        while a.op == "call_function" and a.target in CHAIN:
            chain.insert(0, a)
            a = a.args[0]
        role = a.meta.get("role", ("",))
        return (a, chain) if role[0] == "parameter" else (None, [])

    def assign(self, call: _PlanCall, a: Node, layout: Layout) -> bool:
        """Splits the parameter behind `a` so that `a` has the layout; False where it must stay whole."""
        weight, chain = self.weight_of(a)
        if weight is None or weight in self.fixed or self.plan.layouts[weight].kind == "S":
            return False
        if _key(weight) in self.off:
            self.plan.reasons.setdefault(weight, self.off[_key(weight)])
            return False
        parts = layout.sections or (shape(a)[layout.dim],)
        if any(s % self.tp for s in parts):
            sizes = "+".join(map(str, parts))
            self.plan.reasons.setdefault(weight, f"a dim of size {sizes} does not divide over tp={self.tp}")
            return False
        on_the_way = [weight, *chain]
        if any(u in self.plan.calls and u not in on_the_way for n in on_the_way for u in n.users):
            return False
        if len(set(parts)) > 1:  # no DTensor placement says this: stored whole, used in parts
            self.plan.reasons.setdefault(weight, f"stored whole, used split: sections {parts} of unequal size")
            call.needs[a] = layout
            call.assigned.add(weight)
            return True
        for dim in range(len(shape(weight))):
            trial: dict[Node, Any] = {weight: S(dim, layout.sections)}
            calls: dict[Node, Call] = {}
            try:
                for n in chain:
                    for other in n.all_input_nodes:
                        trial.setdefault(other, self.plan.layouts.get(other, R))
                    calls[n] = Call(n, trial, self.tp)
                    trial[n] = layouts.apply(calls[n])
            except (NoRule, Sections):
                continue
            if trial[a] == layout and shape(weight)[dim] % self.tp == 0:
                for n, c in calls.items():
                    c.layouts = self.plan.layouts
                    self.plan.calls[n] = c
                    self.plan.layouts[n] = trial[n]
                self.plan.layouts[weight] = self.plan.weights[weight] = trial[weight]
                call.assigned.add(weight)
                for n in (weight, *chain):
                    self.origin[n] = frozenset([weight])
                return True
        return False

    def _enter_before_dispatch(self) -> None:
        """Tokens enter before they are copied to rows, so that T rows of gradient are summed and not T*K."""
        plan = self.plan
        for node in self.graph.nodes:
            if node.target is not ops.permute.default or plan.layouts[node][0] == D:
                continue
            rows = [g for g in node.users if g.args[1] == 0]
            readers = [u for g in rows for u in g.users if not (u.target is ops.per_expert.default and u.args[2] is g)]
            if readers and all(
                plan.calls[u].needs.get(g) == E for g in rows for u in readers if g in u.all_input_nodes
            ):
                plan.calls[node].needs[node.args[0]] = E
                plan.layouts[node] = (E, *plan.layouts[node][1:])
                plan.layouts.update(dict.fromkeys(rows, E))


def plan_tensors(graph: Graph, tp: int, fixed: dict[Node, Layout] | None = None) -> TensorPlan:
    """Plans tensor parallelism of a canonical graph over `tp` ranks.

    `fixed` gives the layouts of parameters that are decided already (a second signature of the same model): then values
    are gathered where an op has no rule, and no weight changes.
    """
    return _Planner(graph, tp, fixed).run()
