"""Tensor parallelism: the plan of `plan_tensors` becomes ops of the graph.

Before:  q = linear(x, wq);  o = linear(attention(q, ...), wo);  return o
After:   x' = enter(x, "tp");  q = linear(x', wq[this rank's rows])
         o = all_reduce(linear(attention(q, ...), wo[this rank's columns]), "tp")

Needs: canonical graph with `grad` and `weights_only` on every node; `ctx.fixed` layouts of parameters, if any.
Leaves true: `meta["layout"]` on every node, `meta["placements"]["tp"]` on split parameters; local sizes in arguments.
Refuses: nothing; what has no rule stays whole and `ctx.replicated` says why.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from tedcompile import graphs
from tedcompile.layouts import MOVES, E, Layout, R, differentiable
from tedcompile.ops import ops
from tedcompile.plan import plan_tensors


def run(gm: GraphModule, ctx) -> None:
    tp = ctx.shape.tp
    for node in gm.graph.nodes:
        graphs.set_facts(node)
        node.meta["layout"] = R
    if tp == 1:
        return
    plan = plan_tensors(gm.graph, tp, ctx.fixed)
    moved: dict[tuple[Node, Layout], Node] = {}

    def move(a: Node, want: Layout, like: Node) -> Node:
        have = a.meta["layout"]
        if have == want or (want == E and have == R and not differentiable(a)):
            return a
        if (a, want) not in moved:
            value = a
            steps = ("all_max",) if have.op == "max" else MOVES[have.kind, want.kind]
            for step in steps:
                args: tuple = {
                    "slice": (value, want.dim, tp, list(want.sections), "tp"),
                    "gather": (value, have.dim, tp, list(have.sections), "tp"),
                    "share": (value, tp, "tp"),
                }.get(step, (value, "tp"))
                target = getattr(ops, step).default
                value = graphs.call(gm.graph, target, args, a if a.op != "placeholder" else like)
                value.meta["layout"] = {"enter": E, "slice": want, "share": want}.get(step, R)
            moved[a, want] = value
        return moved[a, want]

    renamed: dict[Node, Node] = {}
    for node in list(gm.graph.nodes):
        if node.op == "placeholder":
            if node in plan.weights:
                node.meta.setdefault("placements", {})["tp"] = plan.weights[node]
            node.meta["layout"] = plan.layouts[node]
            continue
        call = plan.calls[node]
        with gm.graph.inserting_before(node):
            inputs = {a: move(renamed.get(a, a), want, node) for a, want in call.needs.items()}
            args, kwargs = torch.fx.map_arg(
                (node.args if call.args is None else call.args, {} if call.args is not None else node.kwargs),
                lambda a: inputs.get(a) or renamed.get(a, a),  # noqa: B023
            )
            new = None if call.emit is None else graphs.emit(gm.graph, call.emit, args, kwargs, node)
        (new or node).meta["layout"] = plan.layouts.get(node, R)
        if new is None:
            if call.args is not None:
                node.meta["global_args"] = (None, *node.args[1:])
            node.args, node.kwargs = args, kwargs
        else:
            renamed[node] = new
    for node in reversed(renamed):
        gm.graph.erase_node(node)
    ctx.replicated.extend((w, reason) for w, reason in plan.reasons.items())
