"""Expert parallelism: rows travel to the rank that holds their expert, and back.

Before:  rows, counts, perm, order = permute(x, index);  y = body(rows, counts);  out = unpermute(y, perm, order, w)
After:   rows, counts, perm, order = permute(x, index)
         received = exchange_counts(counts, "ep");  splits = splits(counts, received)
         there = take(all_to_all(rows, splits, "ep"), regroup(received))        # sorted by local expert
         y = body(there, received.sum(0));  back = all_to_all_like(take(y, ...), splits', rows, "ep")
         out = unpermute(back, perm, order, w)

Sizes are exact and depend on data; no token is dropped. (DeepSpeed-TED, arXiv 2303.06318, section 3.)
Needs: canonical MoE ops; every weight of the body has the experts as its first dim.
Leaves true: `meta["placements"]["ep"]` = Shard(0) on the weights of the body; layouts over tp unchanged.
Refuses: a number of experts that ep does not divide, weights used outside: the block stays whole, and it is reported.
"""

from __future__ import annotations

import contextlib
import operator

import torch
from torch.fx import GraphModule, Node

from tedcompile import graphs
from tedcompile.layouts import R, S, aten, shape
from tedcompile.ops import ops
from tedcompile.plan import CHAIN

PER_EXPERT = {ops.grouped_mm.default: (1, 2), ops.per_expert.default: (0, 1)}  # (weight, counts) positions

LEAVE = {ops.unpermute.default, ops.gather_sum.default, ops.take.default}  # (rows, their way back, ...)


def run(gm: GraphModule, ctx) -> None:
    ep = ctx.shape.ep
    if ep == 1:
        return
    for node in list(gm.graph.nodes):
        if node.target is ops.permute.default:
            reason = _dispatch(gm, node, ep, ctx)
            if reason:
                ctx.replicated.append((node, reason))
    gm.graph.eliminate_dead_code()


def _outputs(node: Node) -> dict[int, Node]:
    return {u.args[1]: u for u in node.users if u.target is operator.getitem}


def _weight(a: Node) -> Node | None:
    while a.op == "call_function" and a.target in CHAIN | {ops.enter.default, ops.slice.default, ops.share.default}:
        a = a.args[0]
    return a if a.meta.get("role", ("",))[0] == "parameter" else None


def _dispatch(gm: GraphModule, node: Node, ep: int, ctx) -> str:
    x, index, experts = node.args
    out = _outputs(node)
    rows, counts = out.get(0), out.get(1)
    if rows is None or counts is None:
        return "its rows are not used"
    readers = [u for u in counts.users if u.target in PER_EXPERT]
    maps = {out[i] for i in (2, 3) if i in out}
    maps |= {u for m in maps for u in m.users if u.target in (aten.view.default, aten.reshape.default)}
    combines = [u for u in gm.graph.nodes if u.target in LEAVE and u.args[1] in maps]
    enters = [rows] + [u for u in gm.graph.nodes if u.target is ops.take.default and u.args[1] is out.get(3)]
    combines = [u for u in combines if u not in enters]
    weights: list[Node] = []
    for reader in readers:
        at, _ = PER_EXPERT[reader.target]
        weight = _weight(reader.args[at])
        if weight is None or shape(weight)[0] != experts:
            return f"{reader.name} reads per-expert values that are not a parameter of {experts} experts"
        weights.append(weight)
    if experts % ep:
        sizes = [n for n in range(2, experts + 1) if experts % n == 0]
        return f"{experts} experts do not divide over ep={ep}; ep = {', '.join(map(str, sizes))} would"
    if any(ctx.fixed_axis(w, "ep") is False for w in weights):
        return "its weights were laid out whole"

    reason = _stray(gm, rows, counts, enters, combines)
    if reason:
        return reason

    graph = gm.graph

    def add(target, args, like=node, val=None, layout=R):
        new = graphs.call(graph, target, args, like, val)
        new.meta["layout"] = layout
        return new

    def pick(value, i, layout=R):
        return add(operator.getitem, (value, i), layout=layout)

    last = max((rows, counts, *out.values()), key=lambda n: _position(graph, n))
    with _after(graph, last):
        received = add(ops.exchange_counts.default, (counts, ep, "ep"))
        splits = add(ops.splits.default, (counts, received))
        local = add(aten.sum.dim_IntList, (received, [0]))
    groups, anchor = None, local
    for entering in enters:
        value, layout = entering.meta["val"], entering.meta["layout"]
        with _after(graph, max((anchor, entering), key=lambda n: _position(graph, n))):
            sent = add(ops.all_to_all.default, (entering, splits, "ep"), entering, value, layout)
            if groups is None:
                groups = add(ops.regroup.default, (received, sent), layout=(R, R))
                order, inverse = pick(groups, 0), pick(groups, 1)
                anchor = inverse
            there = add(ops.take.default, (sent, order, inverse), entering, value, layout)
        kept = {sent, there, *combines}
        entering.replace_all_uses_with(there, delete_user_cb=lambda u: u not in kept)  # noqa: B023
        _unbake(graph, there, shape(entering)[0])
    for reader in readers:
        reader.args = tuple(local if a is counts else a for a in reader.args)
    for combine in combines:
        y = combine.args[0]
        layout = y.meta["layout"]
        with graph.inserting_before(combine):
            back = add(ops.take.default, (y, inverse, order), combine, y.meta["val"], layout)
            swapped = add(aten.flip.default, (splits, [0]), combine)
            home = add(ops.all_to_all_like.default, (back, swapped, rows, "ep"), combine, y.meta["val"], layout)
        combine.args = (home, *combine.args[1:])
    for weight in weights:
        weight.meta.setdefault("placements", {})["ep"] = S(0)
    return ""


def _stray(gm: GraphModule, rows: Node, counts: Node, enters: list[Node], combines: list[Node]) -> str:
    """Why the rows cannot travel: the first op of the body that mixes them, or joins them with rows that stay."""
    number, reached = shape(rows)[0], set(enters)
    for n in gm.graph.nodes:
        if n in reached or n in combines or not reached.intersection(n.all_input_nodes):
            continue
        if n.target in PER_EXPERT and n.args[PER_EXPERT[n.target][1]] is not counts:
            return f"{n.name} groups its rows by other counts"
        values = n.meta.get("val")
        values = [v for v in (values if isinstance(values, (tuple, list)) else [values]) if isinstance(v, torch.Tensor)]
        stays = [
            a
            for a in n.all_input_nodes
            if a not in reached and a is not counts and not a.meta.get("weights_only")
            if isinstance(a.meta["val"], torch.Tensor) and shape(a)[:1] == (number,)
        ]
        if n.op == "output" or stays or any(v.shape[:1] != (number,) for v in values):
            return f"its rows are used by {n.name} in another order than that of the experts"
        reached.add(n)
    return ""


@contextlib.contextmanager
def _after(graph, node: Node):
    """New nodes follow `node` in the order they are made."""
    with graph.inserting_after(node):
        marker = graph.call_function(operator.add, (1, 1))
    with graph.inserting_before(marker):
        yield
    graph.erase_node(marker)


def _position(graph, node: Node) -> int:
    return next(i for i, n in enumerate(graph.nodes) if n is node)


SIZED = {aten.view.default, aten.reshape.default, aten.expand.default, aten._unsafe_view.default}


def _unbake(graph, there: Node, number: int) -> None:
    """Sizes of the body that were the static number of rows become the dispatched number."""
    reached, size = {there}, None
    for node in graph.nodes:
        if not reached.intersection(node.all_input_nodes) or node.target in LEAVE:
            continue
        reached.add(node)
        if node.target in SIZED and number in node.args[1]:
            if size is None:
                with graph.inserting_after(there):
                    size = graphs.call(graph, aten.sym_size.int, (there, 0), there, number)
                    size.meta["layout"] = R
            first = node.args[1].index(number)
            node.args = (node.args[0], [size if i == first else s for i, s in enumerate(node.args[1])])
