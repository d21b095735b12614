"""Duplicate token dropping: each tensor-parallel rank dispatches its own 1/tp of the tokens.

Before:  rows, counts, perm, order = permute(x, index, E);  y = body(rows, counts);  out = unpermute(y, perm, order, w)
After:   rows, counts, perm, order = permute(drop(x), drop(index), E)
         y = body(rows, counts);  out = unpermute(y, perm, order, drop(w))

All tp ranks hold the same tokens, so an all-to-all over ep would carry each row tp times (DeepSpeed-TED, arXiv
2303.06318, section 5.1). `drop` asks for tokens split over tp; `shard_tensors` then slices before the dispatch, gathers
the rows of all tp ranks where experts are split over tp, and gathers T tokens, not T*K rows, after the combine.
Where tp does not divide T, tokens of index -1 are added: they are no rows and reach no expert.

Dropped before the gate (Parm, arXiv 2407.00599), the router too sees a rank's own tokens only, and what else reads its
results gathers them. Dropped after it by request, the router is marked (`meta["pinned"]`) to stay whole.

Needs: canonical MoE ops, before layouts, and the plan of each block (`plan_dispatch`).
"""

from __future__ import annotations

from torch.fx import Graph, GraphModule, Node

from tedcompile import graphs
from tedcompile.blocks import Block
from tedcompile.layouts import aten, shape
from tedcompile.ops import ops
from tedcompile.passes import shard_experts


def run(gm: GraphModule, ctx) -> None:
    for node in list(gm.graph.nodes):
        if node.target is ops.permute.default and "dispatch" in node.meta and node.meta["dispatch"].drop:
            block, point = Block.of(node), node.meta["dispatch"].point
            if point == "before_gate":
                _before_gate(gm.graph, block)
            elif point == "after_gate":
                for n in router(block):
                    n.meta["pinned"] = True
            _drop(gm.graph, block, ctx.shape.tp)


def router(block: Block) -> set[Node]:
    """The ops that make indices and weights of a block's own tokens; empty if they are made of other values."""
    x, index, _ = block.permute.args
    made, pending = set(), [index, *(n.args[3] for n in block.leaves if n.target is ops.unpermute.default)]
    while pending:
        node = pending.pop()
        if node is not x and node not in made and node.op == "call_function" and not node.meta["weights_only"]:
            made.add(node)
            pending += node.all_input_nodes
    reached = {x}
    for node in block.permute.graph.nodes:
        if node in made and reached.intersection(node.all_input_nodes):
            reached.add(node)
    return reached - {x} if index in reached else set()


def _before_gate(graph: Graph, block: Block) -> None:
    x = block.permute.args[0]
    with graphs.after(graph, x):
        own = graphs.call(graph, ops.drop.default, (x,), block.permute)
    for node in router(block):
        node.replace_input_with(x, own)


def _drop(graph: Graph, block: Block, tp: int) -> None:
    permute = block.permute
    tokens, slots = shape(permute.args[1])
    pad = -tokens % tp

    def own(a: Node, like: Node, each: int = 1, value: float = 0) -> Node:
        """`a`, `each` entries for each token, with padding, as this rank's part."""
        with graph.inserting_before(like):
            if pad:
                zeros = [0] * (2 * (len(shape(a)) - 1))
                a = graphs.call(graph, aten.constant_pad_nd.default, (a, [*zeros, 0, pad * each], value), like)
            return graphs.call(graph, ops.drop.default, (a,), like)

    x, index, experts = permute.args
    permute.args = (own(x, permute), own(index, permute, value=-1), experts)
    for take in block.enters[1:]:
        take.args = (own(take.args[0], take, slots), *take.args[1:])
    for leave in block.leaves:
        if leave.target is ops.unpermute.default:
            leave.args = (*leave.args[:3], own(leave.args[3], leave))
    if pad:
        _resize(graph, block, tokens * slots, (tokens + pad) * slots)
        for leave in block.leaves:
            count = shape(leave)[0] - (pad * slots if leave.target is ops.take.default else pad)
            with graph.inserting_after(leave):
                kept = graph.call_function(aten.slice.Tensor, (leave, 0, 0, count))
            leave.replace_all_uses_with(kept, delete_user_cb=lambda u: u is not kept)  # noqa: B023
            kept.meta = {k: leave.meta[k] for k in graphs.KEPT if k in leave.meta}
            kept.meta["val"] = graphs.value_of(kept)


def _resize(graph: Graph, block: Block, old: int, new: int) -> None:
    """The values of a block anew, with padding: sizes of arguments that are the number of rows change with it."""
    inside = {block.permute, *block.outputs.values(), *block.maps, *block.enters, *block.body, *block.leaves}
    for node in graph.nodes:
        if node in inside:
            if node.target in shard_experts.SIZED and node.args[1][0] == old:
                node.args = (node.args[0], [new, *node.args[1][1:]], *node.args[2:])
            node.meta["val"] = graphs.value_of(node)
