"""Our collectives become torch's, named by process group instead of mesh axis: the last step before a graph is run.

Before:  y = ted.all_reduce(x, "tp")
After:   y = wait_tensor(_c10d_functional.all_reduce(x, "sum", "ted_tp"))  # started here, waited for at its use

Inductor schedules and buckets `_c10d_functional`; what it has no counterpart for stays our op, with the group's name.
A sum that owns its operand (`own_memory`) is done in place where the graph runs node by node; Inductor does so itself.

Needs: a functional graph with local fake values (after autograd); `names`, the process group's name of each axis.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from tedcompile.layouts import aten
from tedcompile.ops import ops

c10d = torch.ops._c10d_functional


def run(gm: GraphModule, names: dict[str, str], in_place: bool = False) -> None:
    for node in list(gm.graph.nodes):
        if node.op != "call_function" or getattr(node.target, "namespace", "") != "ted":
            continue
        schema = node.target._schema.arguments
        if schema[-1].name != "axis":
            continue
        axis = node.args[-1]
        node.args = (*node.args[:-1], names[axis] if axis else "")
        if node.target in LOWERED:
            with gm.graph.inserting_before(node):
                new = LOWERED[node.target](gm, node)
            if in_place and node.meta.get("own"):
                new.args[0].target = c10d.all_reduce_.default
            node.replace_all_uses_with(new)
            gm.graph.erase_node(node)
    _overlap(gm)
    _products_late(gm)
    _wait_late(gm)
    _start_early(gm)
    _wait_at_once(gm)
    gm.graph.lint()
    gm.recompile()


def _add(gm: GraphModule, target, args: tuple) -> Node:
    node = gm.graph.call_function(target, args)
    values = torch.fx.map_arg(args, lambda n: n.meta["val"])
    node.meta["val"] = target(*values)
    return node


def _wait(gm: GraphModule, started: Node) -> Node:
    return _add(gm, c10d.wait_tensor.default, (started,))


def _reduce(op: str):
    def lower(gm: GraphModule, node: Node) -> Node:
        return _wait(gm, _add(gm, c10d.all_reduce.default, (node.args[0], op, node.args[1])))

    return lower


def _gather(gm: GraphModule, node: Node) -> Node:
    x, dim, size, sections, group = node.args
    x = _add(gm, aten.clone.default, (x,))
    x.kwargs = {"memory_format": torch.contiguous_format}
    x.meta["val"] = x.meta["val"].contiguous()
    whole = _wait(gm, _add(gm, c10d.all_gather_into_tensor.default, (x, size, group)))
    if dim == 0 and not sections:
        return whole
    rows = x.meta["val"].shape[0]
    blocks = [_add(gm, aten.slice.Tensor, (whole, 0, i * rows, (i + 1) * rows)) for i in range(size)]
    if sections:
        local = [s // size for s in sections]
        starts = [sum(local[:i]) for i in range(len(local))]
        blocks = [
            _add(gm, aten.slice.Tensor, (b, dim, s, s + n)) for s, n in zip(starts, local, strict=True) for b in blocks
        ]
    return _add(gm, aten.cat.default, (blocks, dim))


def _reduce_scatter(gm: GraphModule, node: Node) -> Node:
    x, dim, size, sections, group = node.args
    if dim != 0 or sections:
        parts = sections or [x.meta["val"].shape[dim]]
        starts = [sum(parts[:i]) for i in range(len(parts))]
        blocks = [
            [
                _add(gm, aten.slice.Tensor, (x, dim, s + r * (n // size), s + (r + 1) * (n // size)))
                for s, n in zip(starts, parts)
            ]
            for r in range(size)
        ]
        x = _add(
            gm, aten.cat.default, ([_add(gm, aten.cat.default, (b, dim)) if len(b) > 1 else b[0] for b in blocks],)
        )
    x = _add(gm, aten.clone.default, (x,))
    x.kwargs = {"memory_format": torch.contiguous_format}
    return _wait(gm, _add(gm, c10d.reduce_scatter_tensor.default, (x, "sum", size, group)))


def _identity(gm: GraphModule, node: Node) -> Node:
    return node.args[0]


def _share(gm: GraphModule, node: Node) -> Node:
    return _add(gm, aten.mul.Tensor, (node.args[0], 1 / node.args[1]))


LOWERED = {
    ops.whole_of.default: lambda gm, node: node.args[1],
    ops.enter.default: _identity,
    ops.share.default: _share,
    ops.all_reduce.default: _reduce("sum"),
    ops.all_max.default: _reduce("max"),
    ops.gather.default: _gather,
    ops.gather_enter.default: _gather,
    ops.reduce_scatter.default: _reduce_scatter,
}


STARTS = {c10d.all_reduce.default, c10d.all_gather_into_tensor.default, c10d.reduce_scatter_tensor.default}
PRODUCTS = {
    aten.mm.default, aten.bmm.default, aten.addmm.default, aten.baddbmm.default, aten.linear.default,
    ops.grouped_mm.default, ops.grouped_outer.default, ops.tokens_outer.default, ops.gated_experts.default,
    ops.gated_vjp.default, ops.gated_vjp_x.default,
}  # fmt: skip


def _meta(node: Node) -> dict:
    """What holds for an op with other arguments that gives the same."""
    return {k: v for k, v in node.meta.items() if k not in ("eager_input_vals", "arg_kwarg_vals")}


def _overlap(gm: GraphModule) -> None:
    """An all-to-all starts when its rows are there and is waited for where they are read, if a product is between."""
    graph, order = gm.graph, {n: float(i) for i, n in enumerate(gm.graph.nodes)}
    first = next((n for n in graph.nodes if n.op != "placeholder"), None)
    products = [order[n] for n in graph.nodes if n.target in PRODUCTS]
    for node in list(graph.nodes):
        if node.target not in (ops.all_to_all.default, ops.all_to_all_like.default):
            continue
        readers = [u for u in node.users if u.target is not ops.regroup.default]  # it reads the number of rows
        if not readers:
            continue
        ready, reader = max(node.all_input_nodes, key=order.__getitem__), min(readers, key=order.__getitem__)
        if not any(order[ready] < at < order[reader] for at in products):
            continue
        x, splits, *like, axis = node.args
        with graph.inserting_before(first) if ready.op == "placeholder" else graph.inserting_after(ready):
            out = graph.call_function(ops.start_all_to_all.default, (x, splits, *(like or [None]), axis))
        out.meta, order[out] = _meta(node), order[ready]
        taken = reader.target is ops.take.default and reader.args[0] is node and len(readers) == 1
        with graph.inserting_before(reader):
            there = graph.call_function(ops.arrive.default, (out, x, reader.args[1] if taken else None))
        old = reader if taken else node
        there.meta = {k: v for k, v in _meta(old).items() if k != "unbacked_bindings"}
        order[there] = order[reader] - (not taken) / 2
        for user in set(node.users) - set(readers):
            user.replace_input_with(node, out)
        old.replace_all_uses_with(there)
        for n in (old, node) if taken else (node,):
            graph.erase_node(n)


def _products_late(gm: GraphModule) -> None:
    """Products that the next collective does not need (weight gradients) come behind its start: they hide it.

    Each is moved behind one collective only; what reads it and stands before that goes with it.
    """
    before: list[Node] = []  # since the last start
    for node in list(gm.graph.nodes):
        if node.target in (ops.start_all_to_all.default, ops.arrive.default):  # has its own products to hide it
            before = []
            continue
        if node.target not in STARTS:
            before.append(node)
            continue
        here, needed, ahead = set(before), set[Node](), [node]
        while ahead:
            found = [a for a in ahead.pop().all_input_nodes if a in here and a not in needed]
            needed.update(found)
            ahead += found
        late: dict[Node, None] = {}
        for n in before:
            if n not in needed and (n.target in PRODUCTS or any(a in late for a in n.all_input_nodes)):
                late[n] = None
        for n in reversed(late):
            node.append(n)
        before = []


AHEAD = 64 << 20  # bytes of gathered parameters that are on their way at once


def _start_early(gm: GraphModule) -> None:
    """Gathers of parameters (ZeRO-3) start while the ones before are still to be used: one ahead, or more small ones.

    They wait for nothing but a placeholder, so any place is right; all ranks have the same graph, so the same order.
    """
    started = [n for n in gm.graph.find_nodes(op="call_function", target=c10d.all_gather_into_tensor.default)
               if n.args[0].target is aten.clone.default and n.args[0].args[0].op == "placeholder"]  # fmt: skip
    order = {n: i for i, n in enumerate(gm.graph.nodes)}
    waits = {n: min(n.users, key=order.__getitem__) for n in started}
    started.sort(key=lambda n: order[waits[n]])
    sizes = [n.meta["val"].numel() * n.meta["val"].element_size() for n in started]
    for k in range(1, len(started)):
        j, size = k - 1, sizes[k]
        while j and size + sizes[j] <= AHEAD:
            size += sizes[j]
            j -= 1
        waits[started[j]].prepend(started[k].args[0])
        waits[started[j]].prepend(started[k])


def _wait_at_once(gm: GraphModule) -> None:
    """A gather between CPUs is over before anything else is done.

    Gloo's thread makes views of its operand, and where Python lets go of that meanwhile, or of other gathers' operands,
    the heap is corrupt soon (torch 2.11 and 2.13; a race as in pytorch issue 75529). Other collectives make none.
    """
    for node in gm.graph.find_nodes(op="call_function", target=c10d.all_gather_into_tensor.default):
        if node.meta["val"].device.type == "cpu":
            for user in [u for u in node.users if u.target is c10d.wait_tensor.default]:
                node.append(user)


def _wait_late(gm: GraphModule) -> None:
    """Each wait goes right before the first use of its result, so that what follows the start overlaps with it."""
    order = {n: i for i, n in enumerate(gm.graph.nodes)}
    for node in list(gm.graph.nodes):
        if node.target is c10d.wait_tensor.default and node.users:
            min(node.users, key=order.__getitem__).prepend(node)
