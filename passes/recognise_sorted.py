"""Sorted slots and a grouped product become the canonical MoE ops.

What a user writes (x (T, H), index (T, K) from a top-k, stacked weights (E, H, I)):

    flat = index.flatten();  order = flat.argsort();  offsets = flat.bincount(minlength=E).cumsum(0)
    rows = x[order // K];  h = act(grouped_mm(rows, up, offsets) + up_bias[flat[order]])
    y = grouped_mm(h, down, offsets) * weights.flatten()[order, None]
    out = zeros_like(x).index_add(0, order // K, y)        # or y[order.argsort()].view(T, K, H).sum(1), or a scatter

After:  rows, counts, perm, order = permute(x, index);  grouped_mm(rows, up, counts);  per_expert(up_bias, counts)
        take(weights.flatten(), order);  out = gather_sum(y, perm)

There are many ways to write the integers, so they are not matched: they are evaluated on random and skewed routings,
and an index that equals the token, slot, expert or inverse of each row on all of them is taken for it. Everything
between is left as it is. A grouped product whose integers are something else stays as written, replicated.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable

import torch
from torch.fx import GraphModule, Node

from tedcompile import graphs
from tedcompile.blocks import PER_EXPERT
from tedcompile.capture import module_path, source_line
from tedcompile.layouts import aten, shape
from tedcompile.ops import ops

VIEWS = {aten.unsqueeze.default, aten.reshape.default, aten.view.default}
ZEROS = {aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default, aten.full.default, aten.full_like.default}


def run(gm: GraphModule, ctx) -> None:
    done: set[Node] = set()
    if any(n.target is ops.grouped_mm.default and not _canonical(n.args[2]) for n in gm.graph.nodes):
        graphs.join_equal(gm.graph)
        _gathers(gm.graph)
    for node in list(gm.graph.nodes):
        if node.target is not ops.grouped_mm.default or node.args[2] in done or _canonical(node.args[2]):
            continue
        done.add(node.args[2])
        known = _static(node.args[0].meta["val"])
        reason = _Block(gm, node).rewrite(ctx) if known else "the number of its rows depends on the values of tensors"
        if reason and known:
            reason = _Rows(gm, node, reason).rewrite(ctx)
        if reason:
            at = source_line(node) or module_path(node)
            ctx.unfit.append(reason)
            ctx.replicated.append((node, f"the grouped product at {at} is not a dispatch to experts: {reason}"))
    gm.graph.eliminate_dead_code()


def _zeros(node: Node) -> bool:
    full = node.target in (aten.full.default, aten.full_like.default)
    return node.target in ZEROS and (not full or node.args[1] == 0)


def _canonical(counts: Node) -> bool:
    return counts.target is operator.getitem and counts.args[0].target is ops.permute.default


def _static(value) -> bool:
    """A tensor whose sizes are all numbers (a bincount's are not)."""
    return isinstance(value, torch.Tensor) and all(isinstance(s, int) for s in value.shape)


def _gathers(graph) -> None:
    """gather(x, 0, i.reshape(-1, 1).expand(-1, H)) is x[i]."""
    for node in list(graph.nodes):
        if node.target is not aten.gather.default or node.args[1] != 0 or len(shape(node)) != 2:
            continue
        spread = node.args[2]
        column = spread.args[0] if spread.target is aten.expand.default else spread
        if len(shape(column)) == 2 and shape(column)[1] == 1 and shape(spread)[1] == shape(node.args[0])[1]:
            with graph.inserting_before(node):
                index = graphs.call(graph, aten.reshape.default, (column, [-1]), node)
                new = graphs.call(graph, aten.index.Tensor, (node.args[0], [index]), node)
            node.replace_all_uses_with(new)


def combine(add: Callable, y: Node, perm: Node, order: Node) -> Node:
    """The sum of each token's rows; where they are scaled by a weight of their slot at last, a weighted sum."""
    if y.target is aten.mul.Tensor:
        for a, b in (y.args, y.args[::-1]):
            w = b
            while isinstance(w, Node) and w.target in VIEWS:
                w = w.args[0]
            taken = isinstance(w, Node) and w.target is ops.take.default and w.args[1] is order
            if taken and isinstance(a, Node) and shape(a) == shape(y) and math.prod(shape(b)) == shape(y)[0]:
                weights = add(aten.reshape.default, (w.args[0], list(shape(perm))))
                return add(ops.unpermute.default, (a, perm, order, weights))
    return add(ops.gather_sum.default, (y, perm, order))


class _Block:
    """One MoE block, found from a grouped product."""

    def __init__(self, gm: GraphModule, node: Node):
        self.gm, self.node = gm, node
        self.rows, self.experts = shape(node.args[0])[0], shape(node.args[1])[0]

    def rewrite(self, ctx) -> str:
        problem = "its group sizes do not come from a choice of experts alone"
        for index in self.routings():
            self.k = shape(index)[-1] if len(shape(index)) > 1 else 1
            roles = self.roles(index, self.trials(index))
            width = shape(self.node.args[1])[1]
            tokens = [n for n in self.readers(roles, "token", 0) if list(shape(n.args[0])[1:]) == [width]]
            if tokens:
                break
            problem = "its rows are not tokens taken in the order of their experts"
        else:
            return problem
        if ctx.prove and (reason := ctx.prove([index, tokens[0], self.node], self.experts)):
            return reason
        return self.replace(index, tokens[0], roles)

    def routings(self) -> list[Node]:
        """The integer values, with an entry for each slot, that may decide the group sizes: (T, K) ones first."""
        seen, front, found = set(), [self.node.args[2]], []
        while front:
            n = front.pop(0)
            if n in seen:
                continue
            seen.add(n)
            value = n.meta.get("val")
            if _static(value) and not value.is_floating_point() and value.numel() == self.rows and self.proves(n):
                found.append(n)
            front.extend(a for a in n.all_input_nodes if a.meta.get("val") is not None)
        return sorted(found, key=lambda n: len(shape(n)) < 2)

    def trials(self, index: Node) -> list[dict[Node, torch.Tensor]]:
        """Uniform, skewed and equal routings; a token's experts are different, for counts may be those of a mask."""
        generator = torch.Generator().manual_seed(0)
        size, dtype, k = shape(index), index.meta["val"].dtype, shape(index)[-1] if len(shape(index)) > 1 else 1

        def draw(experts: int) -> torch.Tensor:
            orders = torch.rand(self.rows // k, experts, generator=generator).argsort(1)
            return orders[:, :k].reshape(size)

        if k > self.experts:
            return [{index: torch.zeros(size, dtype=dtype)}]
        some = max(self.experts // 2, k)
        return [
            {index: t.to(dtype).contiguous()}
            for t in (draw(self.experts), draw(some), torch.arange(k).expand(self.rows // k, k).reshape(size))
        ]

    def proves(self, index: Node) -> bool:
        try:
            for values in self.trials(index):
                counts = graphs.evaluate(self.node.args[2], values)
                if not torch.equal(counts.long(), values[index].flatten().long().bincount(minlength=self.experts)):
                    return False
        except (graphs.Unknown, RuntimeError, IndexError):
            return False
        return True

    def roles(self, index: Node, trials: list[dict]) -> dict[Node, str]:
        """Which integer values are, on every trial, the counts, or the token, slot, expert or inverse of the rows."""
        found: dict[Node, set[str]] = {}
        depends = {index}
        for n in self.gm.graph.nodes:
            if n is index or not depends.intersection(n.all_input_nodes):
                continue
            value = n.meta.get("val")
            if not isinstance(value, torch.Tensor):
                depends.add(n)
                continue
            if value.is_floating_point() and not (_static(value) and value.numel() in (self.experts, self.rows)):
                continue  # histograms are counted in floats, of floats; what is larger is activations
            depends.add(n)
            found[n] = {"counts", "token", "slot", "expert", "inverse"}
        for values in trials:
            flat = values[index].flatten().long()
            order = flat.argsort(stable=True)
            truth = {
                "counts": flat.bincount(minlength=self.experts),
                "token": order // self.k,
                "slot": order,
                "expert": flat[order],
                "inverse": order.argsort(),
            }
            for n in list(found):
                try:
                    value = graphs.evaluate(n, values)
                except (graphs.Unknown, RuntimeError, IndexError):
                    del found[n]
                    continue
                found[n] = {r for r in found[n] if value.shape == truth[r].shape and bool((value == truth[r]).all())}
        if self.k == 1:  # a token has one slot
            found = {n: r - {"slot"} if "token" in r else r for n, r in found.items()}
        return {n: next(iter(r)) for n, r in found.items() if len(r) == 1}

    def readers(self, roles: dict[Node, str], role: str, dim: int) -> list[Node]:
        """Nodes `x[i]` whose only index i, on the first dim, has the role."""
        found = []
        for n, r in roles.items():
            if r == role:
                for u in n.users:
                    if (u.target is aten.index.Tensor and list(u.args[1]) == [n]) or (
                        u.target is aten.index_select.default and u.args[1] == 0 and u.args[2] is n
                    ):
                        found.append(u)
        order = {n: i for i, n in enumerate(self.gm.graph.nodes)}
        return sorted(found, key=order.__getitem__)

    def replace(self, index: Node, first: Node, roles: dict[Node, str]) -> str:
        graph = self.gm.graph
        tokens = self.rows // self.k

        def add(target, args, like, val=None):
            return graphs.call(graph, target, args, like, val)

        with graph.inserting_before(first):
            flat = add(aten.reshape.default, (index, [tokens, self.k]), first)
            dispatch = add(ops.permute.default, (first.args[0], flat, self.experts), first)
            rows, counts, perm, order = (add(operator.getitem, (dispatch, i), first) for i in range(4))
            back = add(aten.reshape.default, (perm, [-1]), first)
        late = {n: i for i, n in enumerate(graph.nodes)}
        roles = roles | {self.node.args[2]: "counts"}
        changed: list[tuple[Node, Node]] = [(first, rows)]

        def swap(old: Node, target, args) -> None:
            with graph.inserting_before(old):
                changed.append((old, add(target, args, old, old.meta["val"])))

        for u in self.readers(roles, "token", 0):
            if u is first:
                continue
            if u.args[0] is first.args[0]:
                changed.append((u, rows))
            else:
                with graph.inserting_before(u):
                    slots = add(aten.repeat_interleave.self_int, (u.args[0], self.k, 0), u)
                swap(u, ops.take.default, (slots, order, back))
        for u in self.readers(roles, "slot", 0):
            if u.args[0].meta["val"].is_floating_point():
                swap(u, ops.take.default, (u.args[0], order, back))
        for u in self.readers(roles, "inverse", 0):
            if u.args[0].meta["val"].is_floating_point():
                swap(u, ops.take.default, (u.args[0], back, order))
        for u in self.readers(roles, "expert", 0):
            if u.args[0].meta["val"].is_floating_point():
                swap(u, ops.per_expert.default, (u.args[0], counts, rows))

        def add_to_tokens(u: Node, y: Node) -> None:
            """u adds the rows y to the tokens of u's first operand."""
            source = u.args[0]
            with graph.inserting_before(u):
                total = add(ops.gather_sum.default, (y, perm, order), u, u.meta["val"])
                changed.append(
                    (u, total if _zeros(source) else add(aten.add.Tensor, (source, total), u, u.meta["val"]))
                )

        for n, role in roles.items():
            for u in list(n.users):
                if u.target in PER_EXPERT and u.args[PER_EXPERT[u.target][1]] is n and late[u] > late[back]:
                    u.replace_input_with(n, counts)
                elif u.target is aten.index_add.default and u.args[1:3] == (0, n) and not u.kwargs:
                    if role == "token" and shape(u)[0] == tokens:
                        add_to_tokens(u, u.args[3])
                    elif role == "slot" and shape(u)[0] == self.rows and _zeros(u.args[0]):
                        swap(u, ops.take.default, (u.args[3], back, order))
                elif u.target is aten.index_put.default and list(u.args[1]) == [n]:
                    adds = len(u.args) > 3 and u.args[3]
                    slot = role == "slot" or (role == "token" and self.k == 1)
                    if slot and (_zeros(u.args[0]) or not adds) and shape(u)[0] == self.rows:
                        swap(u, ops.take.default, (u.args[2], back, order))
                    elif role == "token" and adds and shape(u)[0] == tokens:
                        add_to_tokens(u, u.args[2])
        for u in list(graph.nodes):
            adds_rows = u.target is aten.scatter_add.default and u.args[1] == 0 and shape(u)[0] == tokens
            if adds_rows and shape(u.args[2]) == shape(u.args[3]) and self.spreads_tokens(u.args[2], index):
                add_to_tokens(u, u.args[3])
        for old, new in changed:
            old.replace_all_uses_with(new)
        for total in [n for n in graph.nodes if n.target is ops.gather_sum.default and n.args[1] is perm]:
            with graph.inserting_before(total):
                new = combine(lambda target, args: graphs.call(graph, target, args, total), *total.args)  # noqa: B023
            if new.meta["val"].dtype == total.meta["val"].dtype:
                total.replace_all_uses_with(new)
                graph.erase_node(total)
            else:
                graph.erase_node(new)
        graphs.sort_nodes(graph)
        for old, _ in reversed(changed):
            if not old.users:
                graph.erase_node(old)
        return ""

    def spreads_tokens(self, spread: Node, index: Node) -> bool:
        """Whether a value (N, H) is the token of each row, H times."""
        if len(shape(spread)) != 2 or shape(spread)[0] != self.rows:
            return False
        try:
            for values in self.trials(index):
                token = values[index].flatten().long().argsort(stable=True) // self.k
                if not bool((graphs.evaluate(spread, values) == token[:, None]).all()):
                    return False
        except (graphs.Unknown, RuntimeError, IndexError):
            return False
        return True


class _Rows:
    """Grouped products of any rows in the order of the experts, such as padded ones or those that experts choose.

    Their op says which expert each row is for, so the rows themselves are dispatched, as tokens of one slot; rows
    behind the last group are for none. Where the experts' body ends, every row is back in its place.
    """

    def __init__(self, gm: GraphModule, node: Node, problem: str):
        self.gm, self.node, self.problem = gm, node, problem
        self.counts, self.number, self.experts = node.args[2], shape(node.args[0])[0], shape(node.args[1])[0]

    def rewrite(self, ctx) -> str:
        graph, counts = self.gm.graph, self.counts
        products = [u for u in counts.users if u.target is ops.grouped_mm.default and u.args[2] is counts]
        order = {n: i for i, n in enumerate(graph.nodes)}
        products.sort(key=order.__getitem__)
        if not _static(self.node.meta["val"]) or any(shape(p)[0] != self.number for p in products):
            return self.problem
        body = self.body(products)
        entries = [a for n in body for a in n.all_input_nodes if a not in body and self.of_rows(a)]
        entries = list(dict.fromkeys(entries))
        rows = products[0].args[0]
        if rows not in entries or len(shape(rows)) != 2:
            return self.problem
        if ctx.prove and (reason := ctx.prove([rows, *products], self.experts)):
            return reason
        with graph.inserting_before(products[0]):
            add = lambda target, args: graphs.call(graph, target, args, products[0])
            place = add(aten.new_ones.default, (counts, [self.number]))
            place = add(aten.sub.Tensor, (add(aten.cumsum.default, (place, 0)), 1))
            ends = add(aten.cumsum.default, (counts, 0))
            expert = graph.call_function(aten.searchsorted.Tensor, (ends, place), {"right": True})
            expert.meta = dict(place.meta)
            none = add(aten.ge.Scalar, (expert, self.experts))
            index = add(aten.unsqueeze.default, (add(aten.masked_fill.Scalar, (expert, none, -1)), 1))
            dispatch = add(ops.permute.default, (rows, index, self.experts))
            own, counts_, perm, sort = (add(operator.getitem, (dispatch, i)) for i in range(4))
            back = add(aten.reshape.default, (perm, [-1]))
        swapped = {rows: own, counts: counts_}
        for a in entries:
            if a not in swapped:
                with graph.inserting_before(next(n for n in body if a in n.all_input_nodes)):
                    per_expert = self.per_expert(a)
                    swapped[a] = (
                        graphs.call(graph, ops.per_expert.default, (per_expert, counts_, own), a)
                        if per_expert is not None
                        else graphs.call(graph, ops.take.default, (a, sort, back), a)
                    )
        for n in body:
            for old, new in swapped.items():
                n.replace_input_with(old, new)
        for n in body:
            outside = [u for u in n.users if u not in body]
            if outside:
                with graph.inserting_after(n):
                    out = graphs.call(graph, ops.take.default, (n, back, sort), n)
                for u in outside:
                    u.replace_input_with(n, out)
        graphs.sort_nodes(graph)
        return ""

    def of_rows(self, a: Node) -> bool:
        value = a.meta.get("val")
        return _static(value) and shape(a)[:1] == (self.number,) and not a.meta.get("weights_only")

    def body(self, products: list[Node]) -> list[Node]:
        """The products, what is between them, and biases behind the last."""
        after, before = set(products), set(products)
        for n in self.gm.graph.nodes:
            if after.intersection(n.all_input_nodes):
                after.add(n)
        for n in reversed(self.gm.graph.nodes):
            if any(u in before for u in n.users):
                before.add(n)
        body = after & before
        for n in self.gm.graph.nodes:
            others = [a for a in n.all_input_nodes if a not in body]
            adds = n.target is aten.add.Tensor and len(others) == 1 and len(n.all_input_nodes) == 2 and n not in body
            if adds and (others[0].meta.get("weights_only") or self.per_expert(others[0]) is not None):
                body.add(n)
        return [n for n in self.gm.graph.nodes if n in body]

    def per_expert(self, a: Node) -> Node | None:
        """The parameter (E, ...) whose entry each row's expert has in `a`."""
        indexed = a.target is aten.index.Tensor and len(a.args[1]) == 1
        repeated = a.target is aten.repeat_interleave.self_Tensor and (*a.args, None)[2] == 0
        if not (indexed or repeated) or not a.args[0].meta.get("weights_only") or shape(a.args[0])[0] != self.experts:
            return None
        if repeated:
            return a.args[0] if a.args[1] is self.counts else None
        (index,) = a.args[1]
        return a.args[0] if self.names_experts(index) else None

    def names_experts(self, index: Node) -> bool:
        """Whether an index holds the expert of each row, for any counts."""
        generator = torch.Generator().manual_seed(0)
        try:
            for _ in range(3):
                drawn = torch.randint(self.experts, (self.number,), generator=generator)
                counts = drawn.bincount(minlength=self.experts)
                want = torch.arange(self.experts).repeat_interleave(counts)
                if not torch.equal(graphs.evaluate(index, {self.counts: counts}).long(), want):
                    return False
        except (graphs.Unknown, RuntimeError, IndexError):
            return False
        return True
