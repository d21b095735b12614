"""Expert parallelism by whole tokens: each rank makes the rows of its own experts, and the sums of what they give.

Before:  rows, counts, perm, order = permute(x, index);  y = body(rows, counts);  out = unpermute(y, perm, order, w)
After, all_gather:
         x', w', index' = gather_enter(x), gather_enter(w), gather(index)       # all tokens, over ep
         rows, counts, perm, order = select(x', localize(index', E/ep));  y = body(rows, counts)
         out = reduce_scatter(unpermute_some(y, perm, order, w'), "ep")
After, dedup: a token goes once to each rank that holds any of its experts
         pairs, n, at, of = select(x, destinations(index))
         x', w', index' = all_to_all(pairs), all_to_all(spread(w)), all_to_all(spread(index))
         rows, ... = select(x', localize(index', E/ep));  y = body(rows, counts)
         out = gather_sum_some(all_to_all_like(unpermute_some(y, perm, order, w')), at, of)

With K > ep both send less than T*K rows. Where tokens were dropped and experts are split over tp, the tokens of all tp
ranks are gathered as well, and partial sums are scattered.
Needs: layouts, and blocks whose plan says so. Leaves true: as `shard_experts`. Refuses: nothing.
"""

from __future__ import annotations

import math
import operator

import torch
from torch.fx import GraphModule, Node

from tedcompile import graphs
from tedcompile.blocks import Block
from tedcompile.layouts import D, E, P, R, S, shape
from tedcompile.ops import ops
from tedcompile.passes.shard_experts import place, reread, unbake


def run(gm: GraphModule, ctx) -> None:
    for node in list(gm.graph.nodes):
        dispatch = node.meta.get("dispatch") if node.target is ops.permute.default else None
        if dispatch is not None and dispatch.kind != "all_to_all":
            _Tokens(gm, Block.of(node), ctx.shape, dispatch).rewrite()
    gm.graph.eliminate_dead_code()


class _Tokens:
    def __init__(self, gm: GraphModule, block: Block, mesh, dispatch):
        self.graph, self.block, self.mesh = gm.graph, block, mesh
        self.dispatch, self.axis, self.size, self.kind = dispatch, dispatch.axis, mesh[dispatch.axis], dispatch.kind
        self.here = block.experts // self.size  # experts of one rank
        self.rows, self.counts = block.outputs[0], block.outputs[1]
        (self.leave,) = block.leaves
        self.own = self.rows.meta["layout"] == D
        readers = [u for u in self.rows.users if u.target is ops.gather_rows.default]
        self.source = readers[0] if readers else self.rows
        self.over_tp = bool(readers)  # the experts need the tokens of all tp ranks

    def add(self, target, args, layout, val=None, like=None) -> Node:
        new = graphs.call(self.graph, target, args, like or self.rows, val)
        new.meta["layout"] = layout
        return new

    def pick(self, value: Node, i: int) -> Node:
        return self.add(operator.getitem, (value, i), value.meta["layout"][i])

    def sized(self, a: Node, number: int) -> torch.Tensor:
        """The value of `a` for another number of tokens."""
        return a.meta["val"].new_empty((number, *shape(a)[1:]))

    def rewrite(self) -> None:
        x, index, _ = self.block.permute.args
        weights = self.leave.args[3]
        self.tokens_of = (x, index, weights)
        last = max(self.tokens_of, key={n: i for i, n in enumerate(self.graph.nodes)}.__getitem__)
        with graphs.after(self.graph, last):
            come, go = (self.gather, self.scatter) if self.kind == "all_gather" else (self.send, self.send_back)
            x, index, weights = come(x, index, weights)
            index = self.add(
                ops.localize.default, (index, self.here, self.axis), D if self.axis == "ept" else index.meta["layout"]
            )
            inside = D if index.meta["layout"] == D else R
            selected = self.add(
                ops.select.default,
                (x, index, self.here),
                (D if inside == D else x.meta["layout"], inside, inside, inside),
                self.block.permute.meta["val"],
            )
            rows, counts, perm, order = (self.pick(selected, i) for i in range(4))
        self.source.replace_all_uses_with(rows)
        unbake(self.graph, rows, shape(self.rows)[0])
        for reader in self.block.readers:
            reread(reader, self.counts, counts)
        graphs.sort_nodes(self.graph)
        y = self.leave.args[0]
        y = y.args[0] if y.target is ops.scatter_rows.default else y
        with self.graph.inserting_before(self.leave):
            if perm.meta["layout"] == D:
                layout = D if weights.meta["layout"] == D else P
            else:
                layout = y.meta["layout"]
            val = self.sized(self.leave, shape(x)[0])
            part = self.add(ops.unpermute_some.default, (y, perm, order, weights), layout, val, self.leave)
            out = go(part)
        out.meta |= {"dispatch": self.dispatch, "tokens": self.tokens_of}
        self.leave.replace_all_uses_with(out)
        self.graph.erase_node(self.leave)
        place(self.block, self.mesh)

    # ---- all tokens to all ranks

    def gather(self, x: Node, index: Node, weights: Node) -> list[Node]:
        self.tokens = shape(x)[0]

        def everywhere(a: Node) -> Node:
            floating = a.meta["val"].is_floating_point()
            target = ops.gather_enter.default if floating else ops.gather.default
            whole = E if floating else R
            before = a.meta["layout"]
            val = self.sized(a, self.mesh.ep * self.tokens)
            after = whole if self.axis == "ept" else D if before == S(0) else before
            a = self.add(target, (a, 0, self.size, [], self.axis), after, val)
            return self.add(target, (a, 0, self.mesh.tp, [], "tp"), whole, val) if self.over_tp else a

        return [everywhere(a) for a in (x, index, weights)]

    def scatter(self, part: Node) -> Node:
        val = part.meta["val"]
        if self.over_tp:
            part = self.add(ops.reduce_scatter.default, (part, 0, self.mesh.tp, [], "tp"), S(0), val, self.leave)
        layout = S(0) if self.own else part.meta["layout"]
        val = self.leave.meta["val"]
        return self.add(ops.reduce_scatter.default, (part, 0, self.size, [], self.axis), layout, val, self.leave)

    # ---- a token once to each rank that needs it

    def send(self, x: Node, index: Node, weights: Node) -> list[Node]:
        tokens, slots = shape(index)
        number = round(tokens * self.size * (1 - _none(self.block.experts, self.here, slots)))
        own = D if self.own else R
        to = self.add(ops.destinations.default, (index, self.here, self.size), index.meta["layout"])
        layouts = (D if self.own else x.meta["layout"], own, own, own)
        val = tuple(
            v.new_empty((number, *v.shape[1:]) if i in (0, 3) else (self.size,) if i == 1 else (tokens, self.size))
            for i, v in enumerate(self.block.permute.meta["val"])
        )
        pairs = self.add(ops.select.default, (x, to, self.size), layouts, val)
        self.pairs, counts, self.at, self.of = (self.pick(pairs, i) for i in range(4))
        spread = [self.pairs] + [
            self.add(
                ops.spread.default,
                (a, self.at, self.of),
                D if self.own else a.meta["layout"],
                self.sized(a, number),
            )
            for a in (index, weights)
        ]
        received = self.add(ops.exchange_counts.default, (counts, self.size, self.axis), own)
        self.splits = self.add(ops.splits.default, (counts, received), own)
        if self.over_tp:
            val = received.meta["val"].new_empty((self.mesh.tp * self.size, 1))
            known = self.add(ops.gather.default, (received, 0, self.mesh.tp, [], "tp"), R, val)
            self.sizes = self.add(ops.row_sizes.default, (known, self.mesh.tp), R)

        def there(a: Node) -> Node:
            a = self.add(ops.all_to_all.default, (a, self.splits, self.axis), a.meta["layout"], a.meta["val"])
            self.arrived.append(a)
            if not self.over_tp:
                return a
            layout = E if a.meta["val"].is_floating_point() else R
            return self.add(ops.gather_rows.default, (a, self.sizes, "tp"), layout, a.meta["val"])

        self.arrived: list[Node] = []
        return [there(a) for a in spread]

    def send_back(self, part: Node) -> Node:
        val, layout = part.meta["val"], part.meta["layout"]
        if self.over_tp:
            args = (part, self.sizes, self.arrived[0], "tp")
            part, layout = self.add(ops.scatter_rows.default, args, D, val, self.leave), D
        swapped = self.add(ops.way_back.default, (self.splits,), self.splits.meta["layout"])
        args = (part, swapped, self.pairs, self.axis)
        home = self.add(ops.all_to_all_like.default, args, layout, val, self.leave)
        layout = S(0) if self.own else layout
        out = self.leave.meta["val"]
        return self.add(ops.gather_sum_some.default, (home, self.at, self.of), layout, out, self.leave)


def _none(experts: int, here: int, slots: int) -> float:
    """How likely none of a token's experts is on one rank, with uniform routing."""
    return math.comb(experts - here, slots) / math.comb(experts, slots)
