"""A gated MLP over rows sorted by expert becomes one op, whose kernels gather, multiply and activate at once.

Before:  rows, counts, perm, order = permute(x, index)
         gate, up = grouped_mm(rows, w1, counts).chunk(2, -1)
         out = unpermute(grouped_mm(act(gate) * up, w2, counts), perm, order, weights)
After:   counts, perm, order = route(index)
         out, pre = gated_experts(x, weights, counts, perm, order, w1, w2, "act")

The same for `select` and `unpermute_some`, where whole tokens went to the ranks of their experts.

Autograd then keeps x, the two halves `pre` and the routing; neither rows nor the experts' outputs outlive the op.
Needs: a forward graph with local values, all moves between ranks in it already.
Refuses: any other body (biases, clamps, interleaved halves, two weights, rows that travel one by one), which stays as
it is; its products and sums have kernels of their own.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

from torch.fx import GraphModule, Node

from tedcompile import graphs
from tedcompile.layouts import aten, shape, val
from tedcompile.ops import ops

ACTIVATIONS = {aten.silu.default: "silu", aten.gelu.default: "gelu", aten.relu.default: "relu"}


# how tokens become rows -> how rows become tokens again, and the routing alone
FORMS = {
    ops.permute.default: (ops.unpermute.default, ops.route.default),
    ops.select.default: (ops.unpermute_some.default, ops.route_some.default),
}


@dataclass(frozen=True)
class Match:
    permute: Node
    unpermute: Node
    pre: Node
    up: Node
    down: Node
    act: str


def run(gm: GraphModule, ctx) -> None:
    for node in list(gm.graph.nodes):
        match = find(node) if node.target in FORMS else None
        if match is not None:
            _fuse(gm, match)
    gm.graph.eliminate_dead_code()
    gm.recompile()


def find(permute: Node) -> Match | None:
    out = {n.args[1]: n for n in permute.users if n.target is operator.getitem}
    if not {0, 1} <= out.keys():
        return None
    first = _only(out[0], ops.grouped_mm.default)
    halves = _halves(first) if first is not None and first.args[2] is out[1] else None
    if first is None or halves is None:
        return None
    gate, value = halves
    activated = _only(gate, *ACTIVATIONS)
    hidden = _only(value, aten.mul.Tensor)
    if activated is None or hidden is None or set(hidden.args) != {activated, value} or _only(activated) is not hidden:
        return None
    second = _only(hidden, ops.grouped_mm.default)
    if second is None or second.args[0] is not hidden or second.args[2] is not out[1]:
        return None
    leave = _only(second, FORMS[permute.target][0])
    if leave is None or leave.args[0] is not second or leave.args[1:3] != (out.get(2), out.get(3)):
        return None
    x, up, down = permute.args[0], first.args[1], second.args[1]
    if len({val(n).dtype for n in (x, up, down)}) > 1 or val(second).dtype != val(x).dtype:
        return None
    act = ACTIVATIONS[activated.target]
    if act == "gelu" and activated.kwargs.get("approximate", "none") == "tanh":
        act = "gelu_tanh"
    return Match(permute, leave, first, up, down, act)


def _only(node: Node, *targets) -> Node | None:
    """The one user of a value, if it is a call of one of the targets."""
    users = list(node.users)
    return users[0] if len(users) == 1 and (not targets or users[0].target in targets) else None


def _halves(pre: Node) -> tuple[Node, Node] | None:
    """The first and second half of the columns, if nothing else is read."""
    width = shape(pre)[1] // 2
    users = list(pre.users)
    if len(users) == 1 and users[0].target in (aten.split.Tensor, aten.chunk.default, aten.split_with_sizes.default):
        parts = {n.args[1]: n for n in users[0].users if n.target is operator.getitem}
        if len(users[0].users) != 2 or parts.keys() != {0, 1}:
            return None
        first, second = parts[0], parts[1]
    elif len(users) == 2 and all(n.target is aten.slice.Tensor for n in users):
        first, second = sorted(users, key=lambda n: n.args[2] if len(n.args) > 2 else 0)
        if [n.args[2] if len(n.args) > 2 else 0 for n in (first, second)] != [0, width]:
            return None
        if any(len(n.args) > 4 and n.args[4] != 1 for n in users):
            return None
    else:
        return None
    return (first, second) if shape(first)[1:] == shape(second)[1:] == (width,) else None


def _fuse(gm: GraphModule, match: Match) -> None:
    permute, leave = match.permute, match.unpermute
    x, index, experts = permute.args
    results = {n.args[1]: n for n in permute.users}
    with gm.graph.inserting_before(permute):
        route = FORMS[permute.target][1]
        routed = graphs.call(gm.graph, route, (index, experts), permute, permute.meta["val"][1:])
        layout = permute.meta["layout"]
        routed.meta["layout"] = layout[1:] if isinstance(layout, tuple) else layout
        routing = [graphs.call(gm.graph, operator.getitem, (routed, i), permute) for i in range(3)]
    for i in (1, 2, 3):
        if i in results:
            results[i].replace_all_uses_with(routing[i - 1])
    with gm.graph.inserting_before(leave):
        args = (x, leave.args[3], *routing, match.up, match.down, match.act, val(leave).dtype)
        pre = val(match.pre)
        fused = graphs.call(gm.graph, ops.gated_experts.default, args, leave, (val(leave), pre))
        out = graphs.call(gm.graph, operator.getitem, (fused, 0), leave)
    leave.replace_all_uses_with(out)
