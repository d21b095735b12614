"""Activation checkpointing: which values of a layer are kept for the backward, and which are computed again there.

Before:  a joint graph; the partitioner keeps what is cheapest to keep, and recomputes no product and no op of ours
After:   every forward node of a layer is tagged: kept or recomputed. Layers are the numbered modules (`layers.3`)
         rows = permute(x, index)  ->  order = route(index) [kept];  rows = x[order // K] [recomputed]

"full" keeps what crosses from one layer to the next, what routing decided (top-k, orders, counts, splits, all
data-dependent sizes: never drawn twice, so a replay sends the same rows) and what `save_collectives` has marked.
"selective" keeps of what "none" would keep the values that cost most to recompute for their bytes: it drops the
cheapest, one after the other, until `memory_budget` holds (never below what "full" keeps).

Random numbers are drawn again from their seed. The partitioner takes a recomputed op to where the backward first needs
it, so one layer is replayed at a time. `replay` mends the partitioned backward: an all-to-all that is sent again takes
its size from a kept order, for it has no new one.

Needs: module paths on forward nodes; `ctx.outputs`. Leaves true: `meta["recompute"]`, `meta["ac_graph_id"]`.
"""

from __future__ import annotations

import functools
import heapq
import math
import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.utils.checkpoint import CheckpointPolicy

from tedcompile import compat, graphs
from tedcompile.capture import layer_of, module_path
from tedcompile.layouts import aten, shape
from tedcompile.ops import ops

# ops that decide where rows go
ROUTING = {aten.topk.default, aten.sort.default, aten.sort.stable, aten.argsort.default, aten.argsort.stable,
           aten.max.dim, aten.argmax.default, ops.route.default, ops.regroup.default, ops.exchange_counts.default,
           ops.splits.default, ops.row_sizes.default, ops.select.default,
           ops.route_some.default, ops.localize.default, ops.destinations.default, ops.gather_rows.default}  # fmt: skip

# products, and their operand whose last dim is contracted
PRODUCTS = {aten.mm.default: 0, aten.bmm.default: 0, aten.addmm.default: 1, aten.baddbmm.default: 1,
            ops.grouped_mm.default: 0}  # fmt: skip
FLOPS_PER_BYTE = 200  # of a GPU: what it multiplies while it moves a byte


def run(gm: GraphModule, ctx) -> None:
    _split_permutes(gm.graph)
    gm.graph.eliminate_dead_code()
    gm.graph = compat.cse(gm.graph)  # as the partitioner does, but before layers are told apart
    forward = graphs.forward_nodes(gm.graph, ctx.outputs)
    layers = {n: layer_of(module_path(n)) for n in forward}
    keep = kept(forward)
    if ctx.options.checkpoint == "selective":
        keep = _worth_keeping(gm, ctx, forward, keep)
    number: dict[str, int] = {}
    for node in forward:
        if node.op == "placeholder" or isinstance(node.meta.get("val"), (torch.SymInt, torch.SymBool)):
            continue
        if node in keep or (node.target is operator.getitem and node.args[0] in keep):
            node.meta["recompute"] = CheckpointPolicy.MUST_SAVE
        elif layers[node]:
            node.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
        else:
            continue
        node.meta["ac_graph_id"] = number.setdefault(layers[node], len(number))
    for node in gm.graph.find_nodes(op="call_function", target=ops.row_marks.default):  # no output is made of them
        node.meta["recompute"] = CheckpointPolicy.MUST_SAVE
        node.meta["ac_graph_id"] = number.setdefault(layer_of(module_path(node)), len(number))


def kept(forward: Iterable[Node]) -> set[Node]:
    """What a replay starts from: layer inputs, routing, and what is marked already. Views stand for what they view."""
    keep = set()
    for node in forward:
        layer = layer_of(module_path(node))
        crosses = any(u in forward and layer_of(module_path(u)) not in ("", layer) for u in node.users)
        leaves = layer and any(u in forward and not layer_of(module_path(u)) for u in node.users)
        marked = node.meta.get("recompute") is CheckpointPolicy.MUST_SAVE
        if crosses or leaves or marked or is_routing(node):
            keep.add(base(node))
    return {n for n in keep if n.op != "placeholder"}


def is_routing(node: Node) -> bool:
    """Whether a node decides where rows go, or how many they are: recomputing it could decide otherwise."""
    if node.target in ROUTING:
        return True
    return bool(node.meta.get("unbacked_bindings")) and not graphs.collective(node)


def base(node: Node) -> Node:
    """What a view or an identity shows, and the op that a getitem takes a result of."""
    while node.target in (operator.getitem, ops.enter.default) or getattr(node.target, "is_view", False):
        node = node.args[0]
    return node


def _split_permutes(graph: Graph) -> None:
    """Routing and rows are kept and recomputed apart."""
    for node in graph.find_nodes(op="call_function", target=ops.permute.default):
        x, index, experts = node.args
        used = {u.args[1]: u for u in node.users}
        with graph.inserting_before(node):
            routed = graphs.call(graph, ops.route.default, (index, experts), node)
            results = {i: graphs.call(graph, operator.getitem, (routed, i - 1), node) for i in (1, 2, 3)}
            token = functools.partial(aten.div.Tensor_mode, rounding_mode="floor")
            tokens = graphs.emit(graph, token, (results[3], shape(index)[1]), {}, results[3])
            results[0] = graphs.call(graph, aten.index.Tensor, (x, [tokens]), node)
        for i, old in used.items():
            old.replace_all_uses_with(results[i])
            graph.erase_node(old)
        graph.erase_node(node)


def replay(joint: GraphModule, backward: GraphModule) -> None:
    """In the partitioned backward, an all-to-all that is sent again brings as many rows as the kept order has.

    All-to-alls with the same splits bring as many, though each has a symbol of its own for it.
    """
    sizes: dict[str, list[str]] = {}
    for node in joint.graph.find_nodes(op="call_function", target=ops.all_to_all.default):
        sizes.setdefault(node.args[1].name, []).append(str(shape(node)[0]))
    orders: dict[str, Node] = {}
    values = [n for n in backward.graph.find_nodes(op="placeholder") if isinstance(n.meta.get("val"), torch.Tensor)]
    for node in sorted(values, key=lambda n: n.meta["val"].dim() != 1):  # an order, or else rows: only its size counts
        if node.meta["val"].dim():
            orders.setdefault(str(shape(node)[0]), node)
    for node in backward.graph.find_nodes(op="call_function", target=ops.all_to_all.default):
        x, splits, axis = node.args
        order = next((orders[size] for size in sizes[splits.name] if size in orders), None)
        if order is None:
            continue  # nothing kept is of that size: its rows stay a number of their own
        node.target = ops.all_to_all_like.default
        graphs.set_args(node, (x, splits, order, axis))
        node.meta["val"] = graphs.value_of(node)
        node.meta.pop("unbacked_bindings", None)


def costs(joint: GraphModule, forward: GraphModule, backward: GraphModule, outputs: int) -> tuple[int, float]:
    """(bytes that the forward keeps for the backward, work of what the backward recomputes, in bytes moved).

    Bytes beside the inputs, on this rank, with balanced routing.
    """
    sizes = _Sizes(joint.graph)
    made = graphs.forward_nodes(joint.graph, outputs)
    names = {n.name: n for n in made}
    kept = {base(names[n.name]) for n in forward.graph.output_node().args[0][outputs:] if n.name in names}
    again = {names[n.name] for n in backward.graph.nodes if n.op == "call_function" and n.name in names}
    return sum(sizes(n) for n in kept if n.op != "placeholder"), sum(map(sizes.work, again))


# ---- selective ------------------------------------------------------------------------------------------------------


def _worth_keeping(gm: GraphModule, ctx, forward: dict[Node, None], least: set[Node]) -> set[Node]:
    """Of what "none" keeps, what is left when the cheapest to recompute for their bytes are dropped."""
    names = {n.name: n for n in gm.graph.nodes}
    trial = GraphModule(gm, compat.cse(gm.graph))
    for node in trial.graph.nodes:
        node.meta.pop("recompute", None)
    saved = compat.saved_names(trial, ctx.outputs)
    values = {b for name in saved if (b := base(names[name])).op != "placeholder"}
    sizes = _Sizes(gm.graph)
    budget = ctx.options.memory_budget
    limit = budget if budget > 1 else budget * sum(map(sizes, values))

    keep = least | values
    roots = [a for n in gm.graph.nodes if n not in forward for a in n.all_input_nodes if a in forward]
    replayed, held = _walk(roots, keep, set())
    total = sum(map(sizes, held))
    droppable = [n for n in forward if n in keep - least and layer_of(module_path(n))]

    def price(node: Node) -> tuple[float, int, set[Node], set[Node]]:
        """Seconds (in bytes moved) for each byte that dropping a value frees; the bytes; what is run, what is held."""
        if node not in held:
            return math.inf, 0, set(), set()
        more, other = _walk([node], keep - {node}, replayed)
        freed = sizes(node) - sum(map(sizes, other - held))
        return (sum(map(sizes.work, more)) / freed if freed > 0 else math.inf), freed, more, other

    heap = [(price(n)[0], i) for i, n in enumerate(droppable)]
    heapq.heapify(heap)
    while heap and total > limit:
        _, i = heapq.heappop(heap)
        node = droppable[i]
        cost, freed, more, other = price(node)
        if cost == math.inf:
            continue
        if heap and cost > heap[0][0]:  # its neighbours were dropped since
            heapq.heappush(heap, (cost, i))
            continue
        keep.discard(node)
        replayed |= more
        held = (held | other) - {node}
        total -= freed
    return keep


def _walk(roots: Iterable[Node], keep: set[Node], replayed: set[Node]) -> tuple[set[Node], set[Node]]:
    """What must be run to have the roots, beside what is `replayed`, and the kept values it starts from."""
    run, held, pending = set(), set(), list(roots)
    while pending:
        node = pending.pop()
        if node in keep:
            held.add(node)
        elif node.op != "placeholder" and node not in run and node not in replayed:
            run.add(node)
            pending += node.all_input_nodes
    return run, held


class _Sizes:
    """Bytes of values, those with a number of rows that depends on data with balanced routing (`meta["custom"]`)."""

    def __init__(self, graph: Graph):
        self.hints: dict[Any, int] = {}
        for n in graph.nodes:
            if n.target in graphs.RAGGED and "rows" in n.meta.get("custom", {}):
                rows = graphs.rows(n)
                if not isinstance(rows, int):
                    self.hints[compat.expression(rows)] = n.meta["custom"]["rows"]

    def numel(self, sizes: Iterable[Any]) -> int:
        return math.prod(s if isinstance(s, int) else int(compat.expression(s).subs(self.hints)) for s in sizes)

    def __call__(self, node: Node) -> int:
        value = node.meta.get("val")
        tensors = value if isinstance(value, (tuple, list)) else [value]
        return sum(self.numel(t.shape) * t.element_size() for t in tensors if isinstance(t, torch.Tensor))

    def work(self, node: Node) -> float:
        """What an op costs, in bytes moved."""
        if base(node) is not node:
            return 0
        return max(sum(map(self, (node, *node.all_input_nodes))), self.flops(node) / FLOPS_PER_BYTE)

    def flops(self, node: Node) -> float:
        name = getattr(getattr(node.target, "_schema", None), "name", "")
        if name.startswith("aten::_scaled_dot_product"):  # q k^T and its product with v
            q, k = node.args[:2]
            return 4 * self.numel(shape(q)) * self.numel(shape(k)[-2:-1])
        if node.target is ops.gated_experts.default:
            order, up, down = node.args[4:7]
            return 2 * self.numel(shape(order)) * (self.numel(shape(up)[1:]) + self.numel(shape(down)[1:]))
        operand = PRODUCTS.get(node.target)
        return 0 if operand is None else 2 * self.numel(shape(node)) * self.numel(shape(node.args[operand])[-1:])
