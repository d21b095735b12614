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
import heapq
import operator
from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from tedcompile import graphs, layouts
from tedcompile.layouts import Call, D, E, NoRule, R, S, aten, shape
from tedcompile.ops import ops
from tedcompile.plan import CHAIN

PER_EXPERT = {ops.grouped_mm.default: (1, 2), ops.per_expert.default: (0, 1)}  # (weight, counts) positions

# moves of layouts, which keep each row what it is
ALONG = {ops.slice.default, ops.gather.default, ops.gather_enter.default, ops.reduce_scatter.default}
MOVES_OF_ROWS = ALONG | {ops.enter.default, ops.share.default, ops.gather_rows.default, ops.scatter_rows.default,
                         ops.all_reduce.default}  # fmt: skip
LEAVE = {ops.unpermute.default, ops.gather_sum.default, ops.take.default}  # (rows, their way back, ...)


@dataclass
class Block:
    """One MoE block: its permute and results by position, what enters it as rows, what leaves, what is between."""

    permute: Node
    experts: int
    outputs: dict[int, Node]
    maps: list[Node]  # its perm and order, and views of them
    enters: list[Node]
    leaves: list[Node]
    body: list[Node]  # all that is made of the rows
    readers: list[Node]  # of the counts, beside a weight
    weights: list[Node | None]
    stray: str  # why the rows cannot travel

    @staticmethod
    def of(gm: GraphModule, node: Node) -> Block:
        out = {u.args[1]: u for u in node.users if u.target is operator.getitem}
        rows, counts = out.get(0), out.get(1)
        block = Block(node, node.args[2], out, [], [], [], [], [], [], "")
        if rows is None or counts is None:
            block.stray = "its rows are not used"
            return block
        maps = block.maps = [out[i] for i in (2, 3) if i in out]
        maps += [u for m in maps for u in m.users if u.target in (aten.view.default, aten.reshape.default)]
        mapped = [u for m in maps for u in m.users if u.target in LEAVE and u.args[1] is m]
        taken = [u for u in mapped if u.target is ops.take.default and u.args[1] is out.get(3)]
        block.enters = [rows, *taken]
        block.leaves = [u for u in dict.fromkeys(mapped) if u not in taken]
        counted = {counts, *(u for u in counts.users if u.target is ops.all_reduce.default)}
        block.readers = [u for c in counted for u in c.users if u.target in PER_EXPERT]
        block.weights = [_weight(u.args[PER_EXPERT[u.target][0]]) for u in block.readers]
        block.follow(counted)
        return block

    def follow(self, counted: set[Node]) -> None:
        """Finds the body, or the first op of it that mixes the rows or joins them with rows that stay."""
        number, reached = shape(self.enters[0])[0], set(self.enters)
        pending = [u for e in self.enters for u in e.users]
        heapq.heapify(pending)  # in the order of the graph
        while pending:
            n = heapq.heappop(pending)
            if n in reached or n in self.leaves:
                continue
            if n.target in PER_EXPERT and n.args[PER_EXPERT[n.target][1]] not in counted:
                self.stray = f"{n.name} groups its rows by other counts"
                return
            if n.op == "output" or not _row_by_row(n, reached, number):
                self.stray = f"its rows are used by {n.name} in another order than that of the experts"
                return
            reached.add(n)
            self.body.append(n)
            for user in n.users:
                heapq.heappush(pending, user)


def _row_by_row(node: Node, own: set[Node], number: int) -> bool:
    """Whether an op of rows makes each of its rows of the same row of its operands."""
    values = node.meta.get("val")
    values = [v for v in (values if isinstance(values, (tuple, list)) else [values]) if isinstance(v, torch.Tensor)]
    if any(v.shape[:1] != (number,) for v in values):
        return False
    stays = [a for a in node.all_input_nodes if a not in own and not a.meta.get("weights_only")]
    if node.target in PER_EXPERT or node.target in MOVES_OF_ROWS:
        return node.target not in ALONG or node.args[1] != 0
    if any(isinstance(a.meta["val"], torch.Tensor) and shape(a)[:1] == (number,) for a in stays):
        return False
    if node.target is operator.getitem:
        return True
    try:
        layouts.own_rows(Call(node, {a: D if a in own else R for a in node.all_input_nodes}, 1))
    except NoRule:
        return False
    return True


def run(gm: GraphModule, ctx) -> None:
    for node in list(gm.graph.nodes):
        if node.target is ops.permute.default:
            dispatch = node.meta.get("dispatch")
            axis = "ept" if dispatch and dispatch.experts == "folded" else "ep"
            if ctx.shape[axis] == 1:
                continue
            block = Block.of(gm, node)
            reason = refusal(gm, block, ctx.shape[axis], ctx)
            if not reason:
                _dispatch(gm, block, ctx.shape, axis)
            elif dispatch:
                raise AssertionError(f"{node.name}: tokens were dropped, and {reason}")
            else:
                ctx.replicated.append((node, reason))
    gm.graph.eliminate_dead_code()


def _weight(a: Node) -> Node | None:
    while a.op == "call_function" and a.target in CHAIN | {ops.enter.default, ops.slice.default, ops.share.default}:
        a = a.args[0]
    return a if a.meta.get("role", ("",))[0] == "parameter" else None


def refusal(gm: GraphModule, block: Block, ranks: int, ctx) -> str:
    """Why a block cannot be dispatched over `ranks` ranks; empty where it can."""
    experts = block.experts
    for reader, weight in zip(block.readers, block.weights):
        if weight is None or shape(weight)[0] != experts:
            return f"{reader.name} reads per-expert values that are not a parameter of {experts} experts"
    if experts % ranks:
        sizes = [n for n in range(2, experts + 1) if experts % n == 0]
        return f"{experts} experts do not divide over ep={ranks}; ep = {', '.join(map(str, sizes))} would"
    if any(ctx.fixed_axis(w, "ep") is False for w in block.weights if w is not None) and ctx.shape.ep > 1:
        return "its weights were laid out whole"
    return block.stray


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
    with _after(graph, max(out.values(), key=order.__getitem__)):
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
        with _after(graph, max((anchor, entering), key=list(graph.nodes).index)):
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
        _unbake(graph, final, shape(entering)[0])
    for reader in block.readers:
        reader.args = tuple(local if a is counts or _sum_of(a, counts) else a for a in reader.args)
    for leave in block.leaves:
        y, like = leave.args[0], leave
        scattered = y.target is ops.scatter_rows.default and y.args[1] is counts
        y = y.args[0] if scattered else y
        value, layout = y.meta["val"], y.meta["layout"]
        with graph.inserting_before(leave):
            home = add(ops.take.default, (y, back, forth), like, value, layout)
            if scattered:
                home, layout = add(ops.scatter_rows.default, (home, sizes, arrived[0], "tp"), like, value, D), D
            swapped = add(aten.flip.default, (splits, [0]), like, layout=own)
            home = add(ops.all_to_all_like.default, (home, swapped, rows, axis), like, value, layout)
        leave.args = (home, *leave.args[1:])
    for weight in block.weights:
        if mesh.ep > 1:
            weight.meta.setdefault("placements", {})["ep"] = S(0)


def _sum_of(a, counts: Node) -> bool:
    return isinstance(a, Node) and a.target is ops.all_reduce.default and a.args[0] is counts


def _repeat(a: Node, times: int) -> torch.Tensor:
    value = a.meta["val"]
    return value.new_empty((times * value.shape[0], *value.shape[1:]))


@contextlib.contextmanager
def _after(graph, node: Node):
    """New nodes follow `node` in the order they are made."""
    with graph.inserting_after(node):
        marker = graph.call_function(operator.add, (1, 1))
    with graph.inserting_before(marker):
        yield
    graph.erase_node(marker)


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
