"""A buffer that the forward increments counts over all data ranks.

Before:  counts' = add(counts, delta);  the graph's last value of the buffer is counts'
After:   counts' = add(counts, all_reduce(delta, "data"))

Refuses any other change of a buffer by name: which rank's value would be right is not for a compiler to guess.
"""

from __future__ import annotations

from torch.fx import GraphModule, Node

from tedcompile import graphs
from tedcompile.capture import source_line
from tedcompile.layouts import R, aten, shape
from tedcompile.ops import ops

COPIES = {aten.expand.default, aten.to.dtype, aten.alias.default, aten.detach.default, aten.clone.default}


def run(gm: GraphModule, ctx) -> None:
    if ctx.shape["data"] == 1:
        return
    for buffer, value in ctx.mutated(gm).items():
        _sum(gm, buffer, value)


def _sum(gm: GraphModule, buffer: Node, value: Node) -> None:
    node = value
    while node is not buffer:
        if node.target in COPIES and _alike(node, node.args[0]):  # buffer += x is an addition and a copy of its result
            node = node.args[0]
            continue
        adds = node.target is aten.add.Tensor and not node.kwargs
        operands = [a for a in node.args if isinstance(a, Node)] if adds else []
        chain = [a for a in operands if _reaches(a, buffer)]
        deltas = [a for a in operands if a not in chain]
        if len(chain) != 1 or len(deltas) != 1:
            raise ValueError(
                f"the forward changes the buffer {buffer.meta['role'][1]} by {node.target} at {source_line(node)}: "
                "under data parallelism only additions (buffer.add_(x), buffer += x) have one meaning on all ranks"
            )
        with gm.graph.inserting_before(node):
            total = graphs.call(gm.graph, ops.all_reduce.default, (deltas[0], "data"), node)
            total.meta["layout"] = R
        node.replace_input_with(deltas[0], total)
        node = chain[0]


def _reaches(node: Node, buffer: Node) -> bool:
    return node is buffer or any(_reaches(a, buffer) for a in node.all_input_nodes)


def _alike(a: Node, b: Node) -> bool:
    return shape(a) == shape(b) and a.meta["val"].dtype == b.meta["val"].dtype
