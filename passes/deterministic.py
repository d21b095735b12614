"""What tp ranks hold alike is added up in one order: sums into indexed places become ops that sort, not atomic adds.

Before:  y = index_put(x, (i,), values, accumulate=True);  z = scatter_add(x, 0, i, values)
After:   y = sum_into(x, (i,), values);                    z = sum_along(x, 0, i, values)

On CUDA the left ones add in the order in which threads come; one bit that differs may flip a top-k, and ranks that
route apart exchange garbage. Sums of integers are exact in any order and stay. Data ranks that exchange an embedding's
rows add up its gradient alike (`reduce_gradients`).

Needs: a joint graph, after decomposition. Refuses: nothing.
"""

from __future__ import annotations

from torch.fx import Graph, GraphModule, Node

from tedcompile import graphs
from tedcompile.layouts import aten, ndim, val
from tedcompile.ops import ops


def run(gm: GraphModule, ctx) -> None:
    rules = RULES if ctx.shape.tp > 1 else EMBEDDING if ctx.shape["data"] > 1 else {}
    for node in list(gm.graph.nodes):
        if node.target not in rules or not val(node).is_floating_point():
            continue
        with gm.graph.inserting_before(node):
            found = rules[node.target](gm.graph, node)
            if found:
                target, args = found
                new = graphs.call(gm.graph, target, args, node, val(node))
                node.replace_all_uses_with(new)
                gm.graph.erase_node(node)


def _index_put(graph: Graph, node: Node):
    x, indices, values, *accumulate = node.args
    return (ops.sum_into.default, (x, indices, values)) if accumulate and accumulate[0] else None


def _scatter_add(graph: Graph, node: Node):
    return ops.sum_along.default, node.args


def _scatter_reduce(graph: Graph, node: Node):
    *args, reduce = node.args
    return (ops.sum_along.default, tuple(args)) if reduce == "sum" and node.kwargs.get("include_self", True) else None


def _index_add(graph: Graph, node: Node):
    x, dim, index, values = node.args
    alpha = node.kwargs.get("alpha", 1)
    if alpha != 1:
        values = graphs.call(graph, aten.mul.Tensor, (values, alpha), values)
    return ops.sum_into.default, (x, [*[None] * (dim % ndim(x)), index], values)


def _embedding(graph: Graph, node: Node):
    return ops.embedding_vjp.default, node.args


EMBEDDING = {aten.embedding_dense_backward.default: _embedding}
RULES = EMBEDDING | {
    aten.index_put.default: _index_put,
    aten._unsafe_index_put.default: _index_put,
    aten.scatter_add.default: _scatter_add,
    aten.scatter_reduce.two: _scatter_reduce,
    aten.index_add.default: _index_add,
}
