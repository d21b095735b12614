"""A buffer that the forward increments counts over all data ranks.

Before:  counts' = add(counts, delta);  the graph's last value of the buffer is counts'
After:   counts' = add(counts, all_reduce(delta, "data"))

What depends on no input, parameter or random number is the same on all ranks already, and stays as it is: a step
counter counts steps, and a temperature that decays by itself decays once a step.
Comes before the layouts over tp are decided: a delta that tensor parallelism splits or leaves partial is whole by then.
Refuses any other change of a buffer by name: which rank's value would be right is not for a compiler to guess.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from tedcompile import graphs
from tedcompile.capture import source_line
from tedcompile.layouts import aten, shape
from tedcompile.ops import ops

COPIES = {aten.expand.default, aten.to.dtype, aten.alias.default, aten.detach.default, aten.clone.default}


def run(gm: GraphModule, ctx) -> None:
    if ctx.shape["data"] == 1:
        return
    alike = _alike_on_all_ranks(gm)
    for buffer, value in ctx.mutated(gm).items():
        if value not in alike:
            _sum(gm, buffer, value, alike)


def _alike_on_all_ranks(gm: GraphModule) -> set[Node]:
    found: set[Node] = set()
    for node in gm.graph.nodes:
        known = node.op == "placeholder" and node.meta["role"][0] in ("buffer", "constant")
        random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
        if known or node.op == "call_function" and not random and found.issuperset(node.all_input_nodes):
            found.add(node)
    return found


def _sum(gm: GraphModule, buffer: Node, value: Node, alike: set[Node]) -> None:
    node = value
    while node is not buffer:
        if node.target in COPIES and _alike(node, node.args[0]):  # buffer += x is an addition and a copy of its result
            node = node.args[0]
            continue
        adds = node.target is aten.add.Tensor and not node.kwargs
        operands = [a for a in node.args if isinstance(a, Node)] if adds else []
        chain = [a for a in operands if _reaches(a, buffer)]
        deltas = [a for a in operands if a not in chain]
        if adds and len(chain) == 1 and alike.issuperset(deltas):
            node = chain[0]
            continue
        if len(chain) != 1 or len(deltas) != 1:
            raise ValueError(
                f"the forward changes the buffer {buffer.meta['role'][1]} by {node.target} at {source_line(node)}: "
                "under data parallelism only additions (buffer.add_(x), buffer += x) have one meaning on all ranks"
            )
        with gm.graph.inserting_before(node):
            total = graphs.call(gm.graph, ops.all_reduce.default, (deltas[0], "data"), node)
        node.replace_input_with(deltas[0], total)
        node = chain[0]


def _reaches(node: Node, buffer: Node) -> bool:
    return node is buffer or any(_reaches(a, buffer) for a in node.all_input_nodes)


def _alike(a: Node, b: Node) -> bool:
    return shape(a) == shape(b) and a.meta["val"].dtype == b.meta["val"].dtype
