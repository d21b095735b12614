"""ZeRO-2 and 3: a parameter's gradient is a part, its rank's, of the sum over the copies; under 3 the parameter too.

Before:  y = linear(x, w)                                            # w: (O, I)
After 3: y = linear(x, gather_enter(w, 0, 2, [], "data"))            # w: (O/2, I), this rank's part
After 2: y = linear(x, whole_of(w, whole, 0, 2, "data"))             # the same, but `whole` is there: nothing is sent

The VJP of both is a reduce-scatter: the sum over the copies of a data-parallel gradient, each rank keeping its part
(Rajbhandari et al., arXiv 1910.02054, section 5). `free` sees to it that under ZeRO-3 the backward gathers once more:
in the joint graph the gathered parameter, and what is made of it alone (a transposed view, a cast), is recomputed,
never kept. `lower` starts each gather ahead of its use.

Needs: a distributed forward graph that has been checked: these moves are over data axes, of which layouts know nothing.
Leaves true: under ZeRO-2 the placeholder of role "parameter" is the part, the whole one has the role "whole".
"""

from __future__ import annotations

from torch.fx import GraphModule, Node
from torch.utils.checkpoint import CheckpointPolicy

from tedcompile import graphs
from tedcompile.ops import ops

LAST = 1 << 30  # after all layers of checkpointing


def run(gm: GraphModule, ctx) -> None:
    order = {n: i for i, n in enumerate(gm.graph.nodes)}
    for node in list(gm.graph.nodes):
        share = ctx.share(node) if node.op == "placeholder" and node.users else None
        if share is None:
            continue
        first, size = min(node.users, key=order.__getitem__), ctx.shape[share.axis]
        if share.stage == 2:
            with gm.graph.inserting_before(node):
                part = gm.graph.placeholder(f"part_{node.name}")
            part.meta = dict(node.meta)
            node.meta["role"] = ("whole", node.meta["role"][1])
            target, args = ops.whole_of.default, (part, node, share.dim, size, share.axis)
        else:
            target, args = ops.gather_enter.default, (node, share.dim, size, [], share.axis)
        with gm.graph.inserting_before(first):
            whole = graphs.call(gm.graph, target, args, first, node.meta["val"])
        node.replace_all_uses_with(whole, delete_user_cb=lambda user: user is not whole)  # noqa: B023


def is_gather(node: Node) -> bool:
    """Whether this gathers a parameter: nothing else is gathered over the data axes."""
    return node.target is ops.gather_enter.default and node.args[-1] in ("data", "dp")


def free(gm: GraphModule, ctx) -> None:
    for node in gm.graph.find_nodes(op="call_function", target=ops.whole_of.default):
        node.replace_all_uses_with(node.args[1])
        gm.graph.erase_node(node)
    gathered: set[Node] = set()
    for node in graphs.forward_nodes(gm.graph, ctx.outputs):
        inputs = node.all_input_nodes
        if is_gather(node) or len(inputs) == 1 and inputs[0] in gathered:
            gathered.add(node)
            node.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
            node.meta["ac_graph_id"] = LAST
