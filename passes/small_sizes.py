"""What only gives a number of rows is the smallest value that has it.

Before:  g_back = all_to_all_like(g, splits, back)     # backward: `back` (N, H) is kept for its N
After:   g_back = all_to_all_like(g, splits, order)    # `order` (N,) is kept anyway

Where no such value is, as where rows that arrive are gathered over tp at once, a byte for each row is made.

Needs: a joint graph, whose values have local fake values.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from tedcompile import graphs
from tedcompile.capture import layer_of, module_path
from tedcompile.layouts import shape
from tedcompile.ops import ops

# the operand that only gives the number of rows
ROWS = {ops.all_to_all_like.default: 2, ops.gather_rows_like.default: 2, ops.scatter_rows.default: 2}


def run(gm: GraphModule, ctx) -> None:
    orders: dict[tuple[str, str], Node] = {}  # by layer, or "*", and size: equal layers stay equal
    there = {str(shape(n)[0]) for n in gm.graph.nodes if _is_order(n)}

    def know(node: Node) -> None:
        for key in ((_layer(node), str(shape(node)[0])), ("*", str(shape(node)[0]))):
            if key not in orders or orders[key].meta["val"].dim() > node.meta["val"].dim():
                orders[key] = node

    for node in list(gm.graph.nodes):
        if node.target is ops.all_to_all.default:
            size = str(shape(node)[0])
            if size not in there and ("*", size) not in orders:
                with graphs.after(gm.graph, node):
                    know(graphs.call(gm.graph, ops.row_marks.default, (node,), node))
        at = ROWS.get(node.target)
        if at is not None:
            size = str(shape(node.args[at])[0])
            smallest = orders.get((_layer(node), size)) or orders.get(("*", size), node.args[at])
            graphs.set_args(node, (*node.args[:at], smallest, *node.args[at + 1 :]))
        if _is_order(node):
            know(node)


def _layer(node: Node) -> str:
    return layer_of(module_path(node))


def _is_order(node: Node) -> bool:
    value = node.meta.get("val")
    integers = isinstance(value, torch.Tensor) and value.dim() > 0 and not value.is_floating_point()
    return integers and not graphs.collective(node)
