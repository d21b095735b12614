"""Tensor parallelism: the plan of `plan_tensors` becomes ops of the graph.

Before:  q = linear(x, wq);  o = linear(attention(q, ...), wo);  return o
After:   x' = enter(x, "tp");  q = linear(x', wq[this rank's rows])
         o = all_reduce(linear(attention(q, ...), wo[this rank's columns]), "tp")

Needs: canonical graph with `grad` and `weights_only` on every node; `ctx.fixed` layouts of parameters, if any.
Leaves true: `meta["layout"]` on every node, `meta["placements"]["tp"]` on split parameters; local sizes in arguments.
Refuses: nothing; what has no rule stays whole and `ctx.replicated` says why.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from tedcompile import graphs
from tedcompile.layouts import MOVES, Call, D, E, Layout, R, differentiable
from tedcompile.ops import ops
from tedcompile.plan import plan_tensors


def _counts(value: Node) -> tuple[Node, Node]:
    """The counts and the rows of the dispatch that rows come from."""
    pending, seen = [value], set()
    while pending:
        node = pending.pop()
        if node.target is operator.getitem and node.args[0].target is ops.permute.default:
            out = {u.args[1]: u for u in node.args[0].users if u.target is operator.getitem}
            return out[1], out[0]
        if node not in seen:
            seen.add(node)
            pending.extend(node.all_input_nodes)
    raise AssertionError(f"{value.name} comes from no dispatch")


LEFT = {"enter": E, "gather_enter": E, "gather_rows": E, "scatter_rows": D}  # the layouts that moves lead to


class Moves:
    """Brings values to the layouts that ops need, each value once to each."""

    def __init__(self, graph: Graph, tp: int):
        self.graph, self.tp = graph, tp
        self.moved: dict[tuple[Node, Layout], Node] = {}

    def to(self, a: Node, want: Layout, like: Node) -> Node:
        have, tp = a.meta["layout"], self.tp
        if have == want or (want == E and have == R and not differentiable(a)):
            return a
        if (a, want) not in self.moved:
            value = a
            steps = ("all_max",) if have.op == "max" else MOVES[have.kind, want.kind]
            for step in steps:
                args: tuple = (value, "tp")
                if step in ("slice", "reduce_scatter"):
                    args = (value, want.dim, tp, list(want.sections), "tp")
                elif step in ("gather", "gather_enter"):
                    args = (value, have.dim, tp, list(have.sections), "tp")
                elif step == "share":
                    args = (value, tp, "tp")
                elif step in ("gather_rows", "scatter_rows"):
                    args = (value, *_counts(value)[: 1 if step == "gather_rows" else 2], "tp")
                value = graphs.call(self.graph, getattr(ops, step).default, args, a if a.op != "placeholder" else like)
                value.meta["layout"] = LEFT.get(step, want if step in ("slice", "share", "reduce_scatter") else R)
            self.moved[a, want] = value
        return self.moved[a, want]

    def scatter(self, a: Node, want: Layout, like: Node) -> Node:
        """P to S at once."""
        if (a, want) not in self.moved:
            args = (a, want.dim, self.tp, list(want.sections), "tp")
            self.moved[a, want] = graphs.call(self.graph, ops.reduce_scatter.default, args, like)
            self.moved[a, want].meta["layout"] = want
        return self.moved[a, want]

    def rewrite(self, node: Node, call: Call, layout: Any, renamed: dict[Node, Node]) -> None:
        """The node as its rule has it: operands moved, local sizes in its arguments, or other ops in its place."""
        with self.graph.inserting_before(node):
            inputs = {a: self.to(renamed.get(a, a), want, node) for a, want in call.needs.items()}
            args, kwargs = torch.fx.map_arg(
                (node.args if call.args is None else call.args, {} if call.args is not None else node.kwargs),
                lambda a: inputs.get(a) or renamed.get(a, a),
            )
            new = None if call.emit is None else graphs.emit(self.graph, call.emit, args, kwargs, node)
        (new or node).meta["layout"] = layout
        if new is None:
            if call.args is not None:
                node.meta["global_args"] = (None, *node.args[1:])
            node.args, node.kwargs = args, kwargs
        else:
            renamed[node] = new


def run(gm: GraphModule, ctx) -> None:
    tp = ctx.shape.tp
    for node in gm.graph.nodes:
        graphs.set_facts(node)
        node.meta["layout"] = R
    if tp == 1:
        return
    plan = plan_tensors(gm.graph, tp, ctx.fixed)
    moves = Moves(gm.graph, tp)
    renamed: dict[Node, Node] = {}
    for node in list(gm.graph.nodes):
        if node.op == "placeholder":
            if node in plan.weights:
                node.meta.setdefault("placements", {})["tp"] = plan.weights[node]
            node.meta["layout"] = plan.layouts[node]
            continue
        moves.rewrite(node, plan.calls[node], plan.layouts.get(node, R), renamed)
    for node in reversed(renamed):
        gm.graph.erase_node(node)
    ctx.replicated.extend((w, reason) for w, reason in plan.reasons.items())
