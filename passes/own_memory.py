"""What a backward returns, and what is summed in place, is memory that nothing else reads.

Before:  g = mm(d, x);  s = all_reduce(g, "data");  return (s, g, g, expand(tangent))
After:   g = mm(d, x);  s = all_reduce(g, "data");  return (s, g, clone(g), clone(expand(tangent)))

A parameter keeps what the backward returns as its `.grad`, and adds the next one in place. `meta["own"]` is true of a
sum whose operand has no other reader, here or outside: `lower` does it in place.

Needs: the graph that will run, collectives named by axis: what merges equal nodes comes before.
"""

from __future__ import annotations

import operator

import torch
from torch.fx import GraphModule, Node

from tedcompile import graphs
from tedcompile.layouts import aten
from tedcompile.ops import ops

# parts of a base that others may have other parts of
PARTS = {aten.slice.Tensor, aten.select.int, aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int,
         aten.chunk.default}  # fmt: skip
COPIES = {aten._unsafe_view.default, aten.reshape.default}  # views, or so, which their schemas do not tell


def run(gm: GraphModule) -> None:
    for node in gm.graph.find_nodes(op="call_function", target=ops.all_reduce.default):
        operand = node.args[0]
        node.meta["own"] = len(operand.users) == 1 and fresh(operand)
    output = gm.graph.output_node()
    results, taken = list(output.args[0]), set[Node]()
    for i, value in enumerate(results):
        if not isinstance(value, Node) or not isinstance(value.meta.get("val"), torch.Tensor):
            continue
        base, part, spread = value, False, False
        while not fresh(base) and base.op == "call_function":
            part, spread = part or base.target in PARTS, spread or base.target is aten.expand.default
            base = base.all_input_nodes[0]
        if spread or not fresh(base) or value in taken or (base in taken and not part):
            with gm.graph.inserting_before(output):
                results[i] = graphs.call(gm.graph, aten.clone.default, (value,), value)
            results[i].meta["segment"] = "views"
        taken |= {base, value}
    output.args = (tuple(results),)


def fresh(node: Node) -> bool:
    """Whether a node's result is memory of its own."""
    if node.op != "call_function":
        return False
    if node.target is operator.getitem:
        return fresh(node.args[0])
    schema = getattr(node.target, "_schema", None)
    if schema is None or graphs.namespace(node) not in graphs.NAMESPACES or node.target in COPIES:
        return False
    return not any(r.alias_info for r in schema.returns)
