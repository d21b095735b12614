"""What only gives a number of rows is the smallest value that has it.

Before:  g_back = all_to_all_like(g, splits, back)     # backward: `back` (N, H) is kept for its N
After:   g_back = all_to_all_like(g, splits, order)    # `order` (N,) is kept anyway

Needs: a joint graph, whose values have local fake values.
"""

from __future__ import annotations

from torch.fx import GraphModule, Node

from tedcompile import graphs
from tedcompile.layouts import shape, val
from tedcompile.ops import ops

# the operand that only gives the number of rows
ROWS = {ops.all_to_all_like.default: 2, ops.gather_rows_like.default: 2, ops.scatter_rows.default: 2}


def run(gm: GraphModule, ctx) -> None:
    orders: dict[str, Node] = {}
    for node in gm.graph.nodes:
        at = ROWS.get(node.target)
        if at is not None:
            smallest = orders.get(str(shape(node.args[at])[0]), node.args[at])
            graphs.set_args(node, (*node.args[:at], smallest, *node.args[at + 1 :]))
        value = node.meta.get("val")
        if hasattr(value, "dim") and value.dim() == 1 and not val(node).is_floating_point():
            orders.setdefault(str(shape(node)[0]), node)
