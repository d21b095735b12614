"""Cuts the tokens of an MoE block in parts: one part travels while the experts compute another.

Before:  rows, ... = permute(x, index);  there = all_to_all(rows);  back = all_to_all(body(there))
         out = unpermute(back, ..., w)
After, 2 chunks:
         x0, x1 = portions(x, 2);  index0, index1 = portions(index, 2);  w0, w1 = portions(w, 2)
         there0 = all_to_all(permute(x0, index0)[0]);  there1 = all_to_all(permute(x1, index1)[0])   # both on their way
         back0 = all_to_all(body(there0));  back1 = all_to_all(body(there1))
         out = join(unpermute(back0, ..., w0), unpermute(back1, ..., w1))

`lower` starts a transfer as soon as its rows are there and waits where they are read. The order of the stages lets the
backward, which autograd derives the other way round, overlap in the same way. A rank cuts its own rows; which tokens
are a part plays no role, for experts compute each row by itself. (FasterMoE, PPoPP 2022, section 4.2; MoNTA, arXiv
2411.00662.)

Needs: dispatched blocks, whose `meta["dispatch"]` says in how many parts; before random ops get their seeds.
Refuses: nothing; `plan_dispatch` cuts only what `cuttable` allows.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import GraphModule, Node

from tedcompile import graphs
from tedcompile.blocks import Block
from tedcompile.ops import ops

TRAVELS = {ops.all_to_all.default, ops.all_to_all_like.default, ops.gather_enter.default, ops.gather.default,
           ops.reduce_scatter.default}  # fmt: skip
# what has as many entries for a part of the tokens as for all of them
COUNTS = {ops.exchange_counts.default, ops.splits.default, ops.row_sizes.default, ops.way_back.default}
GROUPS = {ops.permute.default, ops.select.default}  # their second result is such


def cuttable(block: Block) -> bool:
    """Whether each token of a block is computed by itself, and nobody else asks for the block's counts or rows."""
    inside = {block.permute, *block.outputs.values(), *block.maps, *block.body, *block.leaves}
    made = inside - {block.permute, *block.leaves}
    return block.moves_tokens and not block.stray and all(u in inside for n in made for u in n.users)


def run(gm: GraphModule, ctx) -> None:
    for node in list(gm.graph.nodes):
        dispatch = node.meta.get("dispatch")
        tokens = _tokens(node) if dispatch is not None and dispatch.chunks > 1 else None
        if tokens:
            _cut(gm, node, tokens, dispatch.chunks, dispatch.axis)
    gm.graph.eliminate_dead_code()


def _tokens(end: Node) -> tuple[Node, Node, Node] | None:
    """(x, index, weights) of the block that ends in a node."""
    if end.target is ops.unpermute.default:
        x, index, _ = end.args[1].args[0].args
        return x, index, end.args[3]
    return end.meta.get("tokens")


def _cut(gm: GraphModule, end: Node, tokens: tuple[Node, ...], chunks: int, axis: str) -> None:
    graph, region = gm.graph, _between(gm, tokens, end)
    many = dict.fromkeys(tokens, True)  # what has an entry for each token or row
    stage = dict.fromkeys(tokens, 0)
    for n in region:
        inputs = [a for a in n.all_input_nodes if a in many]
        many[n] = n.target not in COUNTS and any(many[a] for a in inputs)
        if n.target is operator.getitem and n.args[0].target in GROUPS:
            many[n] = n.args[1] != 1
        stage[n] = max(stage[a] + (a.target in TRAVELS and a.args[-1] == axis) for a in inputs)
    env: list[dict[Node, Node]] = [{} for _ in range(chunks)]
    with graph.inserting_before(end):
        for a in dict.fromkeys(tokens):
            parts = graphs.call(graph, ops.portions.default, (a, chunks), end, [_part(a.meta["val"], chunks)] * chunks)
            parts.meta["layout"] = (a.meta["layout"],) * chunks
            for i in range(chunks):
                env[i][a] = graphs.call(graph, operator.getitem, (parts, i), end)
                env[i][a].meta["layout"] = a.meta["layout"]
        for s in range(max(stage.values()) + 1):
            for part in env:
                for n in region:
                    if stage[n] == s:
                        part[n] = graph.node_copy(n, lambda a: part.get(a, a))  # noqa: B023
                        part[n].meta = dict(n.meta)
                        if many[n]:
                            part[n].meta["val"] = _part(n.meta["val"], chunks, n.target in GROUPS)
        out = graphs.call(graph, ops.join.default, ([part[end] for part in env],), end, end.meta["val"])
        out.meta["layout"] = end.meta["layout"]
    end.replace_all_uses_with(out)
    for n in reversed(region):
        graph.erase_node(n)


def _between(gm: GraphModule, tokens: tuple[Node, ...], end: Node) -> list[Node]:
    """What is computed of the tokens on the way to `end`, in the order of the graph."""
    before, pending = set(), [end]
    while pending:
        n = pending.pop()
        if n not in before and n not in tokens:
            before.add(n)
            pending += n.all_input_nodes
    reached = set(tokens)
    region = []
    for n in gm.graph.nodes:
        if n in before and reached.intersection(n.all_input_nodes):
            reached.add(n)
            region.append(n)
    return region


def _part(value: Any, chunks: int, groups: bool = False) -> Any:
    """The fake value of a part of what has an entry for each token or row."""
    if isinstance(value, (tuple, list)):
        return type(value)(v if groups and i == 1 else _part(v, chunks) for i, v in enumerate(value))
    if isinstance(value, torch.Tensor):
        return value.new_empty((-(-value.shape[0] // chunks), *value.shape[1:])) if value.dim() else value
    return -(-value // chunks) if isinstance(value, int) else value
