"""Collectives of a joint graph simplified in place, where two of them meet (the second half of `simplify_collectives`).

    slice(all_reduce(p)) = reduce_scatter(p)     if nothing else reads the sum
    slice(gather(x)) = x                         of the same parts
    gather(slice(x)) = x
    f(a) + f(b) = f(a + b)                       for f an all-reduce, reduce-scatter or gather that nothing else reads
    a collective that nothing reads is removed

Each identity leaves fewer collectives or smaller ones, so they end, and none takes from another what it matches, so
their order does not matter. Then small all-reduces over one axis whose results leave the graph (the gradients of norm
weights under sequence parallelism) become one: `merge`.

Needs: a joint graph, where every value is local and autograd is done. Refuses: nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch.fx import Graph, GraphModule, Node

from tedcompile import graphs
from tedcompile.layouts import aten, shape, val
from tedcompile.ops import ops

MERGED = 1 << 20  # bytes of all-reduces that become one
GATHERS = (ops.gather.default, ops.gather_enter.default)
LINEAR = (ops.all_reduce.default, ops.reduce_scatter.default, *GATHERS)


def run(gm: GraphModule, ctx) -> None:
    simplify(gm.graph, IDENTITIES)
    merge(gm.graph)


def simplify(graph: Graph, identities: Sequence[Callable[[Graph, Node], bool]]) -> None:
    """Applies the identities until none matches."""
    changed = True
    while changed:
        changed = False
        for node in reversed(graph.nodes):
            changed = any(identity(graph, node) for identity in identities) or changed


def _becomes(node: Node, new: Node) -> bool:
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)
    return True


def _reads(node: Node, *targets) -> Node | None:
    """What a node reads first, if that is a result of one of the ops."""
    a = node.args[0] if node.args else None
    return a if isinstance(a, Node) and a.target in targets else None


def slice_of_all_reduce(graph: Graph, node: Node) -> bool:
    whole = _reads(node, ops.all_reduce.default) if node.target is ops.slice.default else None
    if whole is None or whole.args[-1] != node.args[-1] or len(whole.users) > 1:
        return False
    with graph.inserting_before(node):
        args = (whole.args[0], *node.args[1:])
        return _becomes(node, graphs.call(graph, ops.reduce_scatter.default, args, node, val(node)))


def slice_of_gather(graph: Graph, node: Node) -> bool:
    whole = _reads(node, *GATHERS) if node.target is ops.slice.default else None
    return whole is not None and whole.args[1:] == node.args[1:] and _becomes(node, whole.args[0])


def gather_of_slice(graph: Graph, node: Node) -> bool:
    part = _reads(node, ops.slice.default) if node.target in GATHERS else None
    return part is not None and part.args[1:] == node.args[1:] and _becomes(node, part.args[0])


def sum_of_results(graph: Graph, node: Node) -> bool:
    if node.target is not aten.add.Tensor or node.kwargs or len(set(node.all_input_nodes)) != 2:
        return False
    a, b = node.args
    alike = a.target in LINEAR and a.target is b.target and a.args[1:] == b.args[1:]
    if not alike or str(shape(a)) != str(shape(b)) or val(a).dtype != val(b).dtype or len(a.users) + len(b.users) > 2:
        return False
    with graph.inserting_before(node):
        total = graphs.call(graph, aten.add.Tensor, (a.args[0], b.args[0]), a.args[0])
        return _becomes(node, graphs.call(graph, a.target, (total, *a.args[1:]), node, val(node)))


def unused(graph: Graph, node: Node) -> bool:
    if not graphs.collective(node) and node.target is not ops.slice.default or node.users:
        return False
    graph.erase_node(node)
    return True


IDENTITIES = (slice_of_all_reduce, slice_of_gather, gather_of_slice, sum_of_results, unused)


def merge(graph: Graph) -> None:
    """Small all-reduces that only outputs of the graph read become one, where the last of them is."""
    families: dict[tuple, list[list[Node]]] = {}
    for node in graph.find_nodes(op="call_function", target=ops.all_reduce.default):
        if not _leaves(node) or not isinstance(size(node), int) or size(node) > MERGED:
            continue
        groups = families.setdefault((node.args[1], val(node).dtype), [[]])
        if sum(map(size, groups[-1])) + size(node) > MERGED:
            groups.append([])
        groups[-1].append(node)
    several = [(axis, members) for (axis, _), groups in families.items() for members in groups if len(members) > 1]
    for axis, members in several:
        _together(graph, members, axis)
    if several:
        graphs.sort_nodes(graph)  # what one op made of an earlier one waits for all


def _leaves(node: Node) -> bool:
    """Whether a value, or what one op each makes of it, is read by nothing but the output."""
    return all(u.op == "output" or all(v.op == "output" for v in u.users) for u in node.users)


def size(node: Node) -> int:
    return math.prod(shape(node)) * val(node).element_size()


def _together(graph: Graph, members: list[Node], axis: str) -> None:
    last = members[-1]
    with graph.inserting_before(last):
        flat = [graphs.call(graph, aten.reshape.default, (m.args[0], [-1]), m) for m in members]
        whole = graphs.call(graph, aten.cat.default, (flat,), last)
        summed = graphs.call(graph, ops.all_reduce.default, (whole, axis), last)
        for node in (*flat, whole, summed):
            node.meta["segment"] = "sums"
        start = 0
        for member in members:
            n = math.prod(shape(member))
            part = graphs.call(graph, aten.slice.Tensor, (summed, 0, start, start + n), member)
            whole = graphs.call(graph, aten.reshape.default, (part, list(shape(member))), member)
            for node in (part, whole, *(u for u in member.users if u.op != "output")):
                node.meta["segment"] = "sums"
            member.replace_all_uses_with(whole)
            start += n
    for member in members:
        graph.erase_node(member)
