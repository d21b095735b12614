"""Experts held as separate modules, or packed along one dim: one parameter (E, ...) in the graph, others in the model.

Before:  w = placeholder("experts.*.w1.weight") (E, I, H), which `stack` made of E parameters (I, H)
After:   w = own_experts(stack([experts.0.w1.weight, ...]), dim, ep, "ep")

Before:  w = placeholder("w1.*") (E, I, H), which `unpack` made of view(w1 (E*I, H), [E, I, H])
After:   w = view(w1, [E/ep, I, H]);  where tp splits I, w = slice(view(...), 1, "tp") of a parameter whole over tp

Every pass in between sees one parameter whose first dim are the experts. The model keeps its E parameters under their
own names. No placement of DTensors says "whole, on one rank", so over ep each of them is split on a dim of its own
that ep divides and tp has left (`Shard`, like FSDP: state_dict, optimizers, clipping and full_tensor work), and a step
exchanges weights for weights: every rank sends its part of each expert to the rank that computes it, and in the
backward the gradients travel back. That moves the size of one rank's experts a step; stacked experts move nothing.
A parameter that no dim can split stays whole over ep, and each rank reads the experts it computes.
Parameters that something else reads too, such as a penalty on weights, are not taken: nothing would gather them for it.
"""

from __future__ import annotations

import os.path
from collections.abc import Sequence

import torch
from torch.fx import Graph, GraphModule, Node

from tedcompile import graphs
from tedcompile.layouts import R, S, aten, shape
from tedcompile.ops import ops

VIEWS = {aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.unflatten.int}


def stack(graph: Graph, ctx, parameters: Sequence[Node]) -> Node:
    """One placeholder (E, ...) for E parameters of one shape, in the order of the experts."""
    for node in graph.nodes:
        if node.meta.get("separate") == list(parameters):
            return node
    size = (len(parameters), *parameters[0].meta["val"].shape)
    return _parameter(graph, ctx, _common([p.meta["role"][1] for p in parameters]), size, "separate", list(parameters))


def _parameter(graph: Graph, ctx, name: str, size: tuple, kind: str, of: list[Node]) -> Node:
    with graph.inserting_before(next(iter(graph.nodes))):
        node = graph.placeholder("stacked_" + name.replace(".", "_").replace("*", "e"))
    node.meta = {"role": ("parameter", name), kind: of, "val": of[0].meta["val"].new_empty(size)}
    graphs.set_facts(node)
    if ctx.fixed is not None:
        ctx.fixed[node] = (ctx.decided or {}).get(name, {}).get("tp", R)
    return node


def unpack(gm: GraphModule, ctx) -> None:
    """Packed parameters become one (E, ...) each; stacked ones that are read by something else are stacked in full."""
    graph = gm.graph
    graph.eliminate_dead_code()
    numbers = {n.args[2] for n in graph.nodes if n.target is ops.permute.default}
    for node in list(graph.nodes):
        if any(p.users for p in node.meta.get("separate", ())):
            parameters = node.meta["separate"]
            last = max(parameters, key=list(graph.nodes).index)
            with graph.inserting_before(_after_placeholders(graph, last)):
                whole = graphs.call(graph, aten.stack.default, (parameters,), last)
            node.replace_all_uses_with(whole)
            graph.erase_node(node)
        elif node.op == "placeholder" and node.meta["role"][0] == "parameter" and node.users:
            views = list(node.users)
            sizes = {tuple(shape(v)) for v in views if v.target in VIEWS}
            if len(sizes) == 1 and all(v.target in VIEWS for v in views):
                ((experts, *rest),) = sizes
                if experts in numbers and rest and (experts * rest[0], *rest[1:]) == shape(node) != (experts, *rest):
                    new = _parameter(graph, ctx, f"{node.meta['role'][1]}.*", (experts, *rest), "packed", [node])
                    for view in views:
                        view.replace_all_uses_with(new)
                        graph.erase_node(view)


def _common(names: Sequence[str]) -> str:
    """`experts.0.w1`, `experts.1.w1` to `experts.*.w1`."""
    start = os.path.commonprefix(list(names)).rpartition(".")[0]
    end = os.path.commonprefix([n[::-1] for n in names])[::-1].partition(".")[2]
    return ".".join(filter(None, (start, "*", end)))


def run(gm: GraphModule, ctx) -> None:
    graph = gm.graph
    for node in list(graph.nodes):
        if "packed" in node.meta:
            _pack(graph, ctx, node)
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


def _pack(graph: Graph, ctx, node: Node) -> None:
    (parameter,) = node.meta["packed"]
    placements = dict(node.meta.get("placements", {}))
    ctx.stacked[node.meta["role"][1]] = placements
    inner = {axis: p for axis, p in placements.items() if p.dim == 1}
    held = {axis: S(max(p.dim - 1, 0), p.sections) for axis, p in placements.items() if axis not in inner}
    local = list(shape(node))
    for axis, p in placements.items():
        local[p.dim] //= 1 if axis in inner else ctx.shape[axis]
    with graph.inserting_before(_after_placeholders(graph, parameter)):
        value = graphs.call(graph, aten.view.default, (parameter, local), parameter, node.meta["val"])
        value.meta["layout"] = R if inner else node.meta.get("layout", R)
        for axis, p in inner.items():
            args = (value, 1, ctx.shape[axis], list(p.sections), axis)
            value = graphs.call(graph, ops.slice.default, args, parameter, node.meta["val"])
            value.meta["layout"] = p
    parameter.meta |= {"placements": held, "layout": held.get("tp", R)}
    node.replace_all_uses_with(value)
    graph.erase_node(node)


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
