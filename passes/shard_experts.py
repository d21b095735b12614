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
Refuses: nothing; a block that cannot be dispatched has no plan (`plan_dispatch` says why).
Raises ValueError for a block whose weights an earlier signature has split and that is not a dispatch in this one.
"""

from __future__ import annotations

import operator

import torch
from torch.fx import GraphModule, Node

from tedcompile import graphs
from tedcompile.blocks import LEAVE, Block
from tedcompile.layouts import D, E, R, S, aten, shape
from tedcompile.ops import ops


def run(gm: GraphModule, ctx) -> None:
    for node in list(gm.graph.nodes):
        if node.target is ops.permute.default:
            dispatch = node.meta.get("dispatch")
            if dispatch is not None:
                _dispatch(gm, Block.of(node), ctx.shape, dispatch.axis)
    gm.graph.eliminate_dead_code()
    # what a stacked or packed parameter stands for is laid out with it (`separate_experts`)
    inner = {p for n in gm.graph.nodes for p in (*n.meta.get("separate", ()), *n.meta.get("packed", ()))}
    for node in gm.graph.nodes:
        parameter = node.meta.get("role", ("",))[0] == "parameter" and node not in inner
        if parameter and ctx.fixed_axis(node, "ep") and "ep" not in node.meta.get("placements", {}):
            why = "; ".join(dict.fromkeys(reason for _, reason in ctx.replicated))
            raise ValueError(
                f"{node.meta['role'][1]} is split over ep since an earlier call, and with these inputs it cannot be"
                f"{': ' if why else ''}{why}"
            )


def _dispatch(gm: GraphModule, block: Block, mesh, axis: str) -> None:
    graph, out, size = gm.graph, block.outputs, mesh[axis]
    rows, counts = out[0], out[1]

    def add(target, args, like=rows, val=None, layout=R):
        new = graphs.call(graph, target, args, like, val)
        new.meta["layout"] = layout
        return new

    def pick(value, i, layout=R):
        return add(operator.getitem, (value, i), layout=layout)

    own = D if rows.meta["layout"] == D else R  # of what each rank knows of its own rows
    gathers = {e: g for e in block.enters for g in e.users if g.target is ops.gather_rows.default}
    gathered = bool(gathers)
    order = {n: i for i, n in enumerate(graph.nodes)}
    with graphs.after(graph, max(out.values(), key=order.__getitem__)):
        received = add(ops.exchange_counts.default, (counts, size, axis), layout=own)
        splits = add(ops.splits.default, (counts, received), layout=own)
        known = received
        if gathered:
            known = add(ops.gather.default, (received, 0, mesh.tp, [], "tp"), val=_repeat(received, mesh.tp))
            sizes = add(ops.row_sizes.default, (known, mesh.tp))
        local = add(aten.sum.dim_IntList, (known, [0]), layout=R if gathered else own)
    arrived: list[Node] = []
    anchor = local
    for entering in block.enters:
        value, layout = entering.meta["val"], entering.meta["layout"]
        with graphs.after(graph, max((anchor, entering), key=list(graph.nodes).index)):
            sent = add(ops.all_to_all.default, (entering, splits, axis), entering, value, layout)
            there, now = sent, layout
            if gathered:
                there, now = add(ops.gather_rows.default, (sent, sizes, "tp"), entering, value, E), E
            if not arrived:
                groups = add(ops.regroup.default, (known, there), layout=(own, own) if not gathered else (R, R))
                forth, back = pick(groups, 0, groups.meta["layout"][0]), pick(groups, 1, groups.meta["layout"][1])
                anchor = back
            final = add(ops.take.default, (there, forth, back), entering, value, now)
        arrived.append(sent)
        source = gathers.get(entering, entering)
        keep = {sent, final, *block.leaves}
        source.replace_all_uses_with(final, delete_user_cb=lambda u: u not in keep)  # noqa: B023
        unbake(graph, final, shape(entering)[0])
    for reader in block.readers:
        reread(reader, counts, local)
    for leave in block.leaves:
        y, like = leave.args[0], leave
        scattered = y.target is ops.scatter_rows.default and y.args[1] is counts
        y = y.args[0] if scattered else y
        value, layout = y.meta["val"], y.meta["layout"]
        with graph.inserting_before(leave):
            home = add(ops.take.default, (y, back, forth), like, value, layout)
            if scattered:
                home, layout = add(ops.scatter_rows.default, (home, sizes, arrived[0], "tp"), like, value, D), D
            swapped = add(ops.way_back.default, (splits,), like, layout=own)
            home = add(ops.all_to_all_like.default, (home, swapped, rows, axis), like, value, layout)
        leave.args = (home, *leave.args[1:])
    place(block, mesh)


def place(block: Block, mesh) -> None:
    """The experts are split over ep."""
    for weight in block.weights:
        if mesh.ep > 1 and weight is not None:
            weight.meta.setdefault("placements", {})["ep"] = S(0)


def reread(reader: Node, counts: Node, local: Node) -> None:
    """`reader` reads the counts of the rows that are here, not those of the permute or their sum over tp."""

    def stands_for_counts(a) -> bool:
        return a is counts or isinstance(a, Node) and a.target is ops.all_reduce.default and a.args[0] is counts

    reader.args = tuple(local if stands_for_counts(a) else a for a in reader.args)


def _repeat(a: Node, times: int) -> torch.Tensor:
    value = a.meta["val"]
    return value.new_empty((times * value.shape[0], *value.shape[1:]))


SIZED = {
    aten.view.default, aten.reshape.default, aten.expand.default, aten._unsafe_view.default, aten.new_zeros.default,
    aten.new_ones.default, aten.new_empty.default, aten.new_full.default,
}  # fmt: skip


def unbake(graph, there: Node, number: int) -> None:
    """Sizes of the body that were the static number of rows, always the first, become the dispatched number."""
    reached, size = {there}, None
    for node in graph.nodes:
        if not reached.intersection(node.all_input_nodes) or node.target in LEAVE:
            continue
        reached.add(node)
        if node.target in SIZED and node.args[1][0] == number:  # another size may be the same number by chance
            if size is None:
                with graph.inserting_after(there):
                    size = graphs.call(graph, aten.sym_size.int, (there, 0), there, number)
                    size.meta["layout"] = R
            node.args = (node.args[0], [size, *node.args[1][1:]], *node.args[2:])
