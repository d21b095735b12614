"""Experts held as separate modules: one stacked parameter in the graph, E parameters in the model.

Before:  w = placeholder("experts.*.w1.weight") (E, I, H), which `stack` made of E parameters (I, H)
After:   w = own_experts(stack([experts.0.w1.weight, ...]), dim, ep, "ep")

Every pass in between sees one parameter whose first dim are the experts. The model keeps its E parameters under their
own names. No placement of DTensors says "whole, on one rank", so over ep each of them is split on a dim of its own
that ep divides and tp has left (`Shard`, like FSDP: state_dict, optimizers, clipping and full_tensor work), and a step
exchanges weights for weights: every rank sends its part of each expert to the rank that computes it, and in the
backward the gradients travel back. That moves the size of one rank's experts a step; stacked experts move nothing.
A parameter that no dim can split stays whole over ep, and each rank reads the experts it computes.
"""

from __future__ import annotations

import os.path
from collections.abc import Sequence

import torch
from torch.fx import Graph, GraphModule, Node

from tedcompile import graphs
from tedcompile.layouts import R, S, aten
from tedcompile.ops import ops


def stack(graph: Graph, ctx, parameters: Sequence[Node]) -> Node:
    """One placeholder (E, ...) for E parameters of one shape, in the order of the experts."""
    names = [p.meta["role"][1] for p in parameters]
    name = _common(names)
    for node in graph.nodes:
        if node.meta.get("separate") == list(parameters):
            return node
    first = next(iter(graph.nodes))
    with graph.inserting_before(first):
        node = graph.placeholder("stacked_" + name.replace(".", "_").replace("*", "e"))
    value = parameters[0].meta["val"]
    node.meta = {
        "role": ("parameter", name), "separate": list(parameters),
        "val": value.new_empty((len(parameters), *value.shape)),
    }  # fmt: skip
    graphs.set_facts(node)
    if ctx.fixed is not None:
        ctx.fixed[node] = (ctx.decided or {}).get(name, {}).get("tp", R)
    return node


def _common(names: Sequence[str]) -> str:
    """`experts.0.w1`, `experts.1.w1` to `experts.*.w1`."""
    start = os.path.commonprefix(list(names)).rpartition(".")[0]
    end = os.path.commonprefix([n[::-1] for n in names])[::-1].partition(".")[2]
    return ".".join(filter(None, (start, "*", end)))


def run(gm: GraphModule, ctx) -> None:
    graph = gm.graph
    for node in list(graph.nodes):
        parameters = node.meta.get("separate")
        if parameters is None:
            continue
        placements = dict(node.meta.get("placements", {}))
        ctx.stacked[node.meta["role"][1]] = placements
        inner = {a: S(p.dim - 1, p.sections) for a, p in placements.items() if p.dim > 0}
        over = [a for a in ("ep", "tp") if a in placements and placements[a].dim == 0]
        last = max(parameters, key=list(graph.nodes).index)
        local = list(node.meta["val"].shape)
        for a, p in inner.items():
            local[p.dim + 1] //= ctx.shape[a]
        with graph.inserting_before(_after_placeholders(graph, last)):
            value = graphs.call(graph, aten.stack.default, (parameters,), last)
            value.meta["layout"] = node.meta.get("layout", R)
            for axis in over:
                dim = _free(local, {p.dim + 1 for p in inner.values()}, ctx.shape[axis])
                size = ctx.shape[axis]
                if dim is None:
                    value = _read(graph, value, len(parameters) // size, axis, last)
                else:
                    args = (value, dim, size, axis)
                    inner[axis] = S(dim - 1)
                    value = graphs.call(graph, ops.own_experts.default, args, last, value.meta["val"])
                value.meta["layout"] = node.meta.get("layout", R)
        for p in parameters:
            p.meta["placements"] = dict(inner)
            p.meta["layout"] = inner.get("tp", R)
        node.replace_all_uses_with(value)
        graph.erase_node(node)
    graph.lint()


def _read(graph: Graph, value: Node, number: int, axis: str, like: Node) -> Node:
    """This rank's experts of all; their gradient is zero for the others, for ranks' gradients are summed."""
    fake = value.meta["val"].new_empty((number,), dtype=torch.int64)
    here = graphs.call(graph, aten.arange.default, (number,), like, fake)
    rank = graphs.call(graph, ops.rank.default, (here, axis), like)
    here = graphs.call(graph, aten.add.Tensor, (here, graphs.call(graph, aten.mul.Tensor, (rank, number), like)), like)
    for n in (rank, here, *here.all_input_nodes):
        n.meta["layout"] = R
    return graphs.call(graph, aten.index_select.default, (value, 0, here), like, value.meta["val"])


def _free(local: list[int], taken: set[int], size: int) -> int | None:
    """A dim of the parameters, not of the stack, that the axis can split."""
    return next((d for d in range(1, len(local)) if d not in taken and local[d] % size == 0), None)


def _after_placeholders(graph: Graph, last: Node) -> Node:
    node = last
    while node.op == "placeholder":
        node = node.next
    return node
