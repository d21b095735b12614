"""A loop over experts, each on the tokens that chose it, becomes the canonical MoE ops.

What a user writes (x (T, H), weights and index (T, K) from a top-k):

    out = torch.zeros_like(x)
    for e, expert in enumerate(experts):
        token, slot = torch.where(index == e)                    # or a boolean mask
        out.index_add_(0, token, expert(x[token]) * weights[token, slot, None])     # or out[token] += ...

After:  rows, counts, perm, order = permute(x, index);  y = expert(rows), with grouped_mm;  unpermute(y, perm, ...)

There are many ways to write the positions, so they are not matched: they are evaluated on routings that reach every
expert, and must be, on each, those of the tokens (or slots) of one expert, in one order for all that enters and leaves.
Tokens that they leave out (over an expert's capacity) are rows of weight 0. The experts' code is merged by
`merge_experts`. A loop that is anything else stays as written.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections import Counter

import torch
from torch.fx import GraphModule, Node

from tedcompile import graphs
from tedcompile.capture import module_path, source_line
from tedcompile.layouts import aten, shape
from tedcompile.ops import ops
from tedcompile.passes.merge_experts import Differs, Merge
from tedcompile.passes.recognise_sorted import _static, _zeros, combine

READS = {aten.index.Tensor, aten.index_select.default}
WRITES = {aten.index_add.default, aten.index_put.default, aten.index_copy.default}
BY_DIM = {aten.index_select.default, aten.index_add.default, aten.index_copy.default}  # (values, dim, positions, ...)
FOUND = {aten.nonzero.default, aten.nonzero_numpy.default, aten.where.default}
STEPS = {operator.getitem, aten.select.int, aten.squeeze.dim, aten.squeeze.default, aten.view.default,
         aten.reshape.default, aten.unbind.int, aten.flatten.using_ints, aten.detach.default}  # fmt: skip
ONE = {aten.argmax.default, aten.max.dim}  # choices of one expert, without a dim for it
EMPTY = {aten.empty_like.default, aten.empty.memory_format, aten.new_empty.default}


def run(gm: GraphModule, ctx) -> None:
    if not any(n.target in READS and _of_data(n) for n in gm.graph.nodes):
        return
    graphs.join_equal(gm.graph)
    tried: set[Node] = set()
    while True:
        node = next((n for n in gm.graph.nodes if n.target in READS and n not in tried and _of_data(n)), None)
        if node is None:
            break
        loop = _Loop(gm, ctx, node)
        try:
            loop.rewrite()
        except Differs as error:
            at = source_line(node) or module_path(node)
            ctx.replicated.append((node, f"the loop at {at} is not one over experts: {error}"))
            ctx.unfit.append(str(error))
            tried |= {node, *loop.reads}
        graphs.erase_unused(gm.graph)


def _of_data(node: Node) -> bool:
    """Whether a read takes the rows that a mask, or the positions where something holds, say."""
    if not isinstance(node.meta.get("val"), torch.Tensor) or not node.meta["val"].is_floating_point():
        return False
    pending, seen = _positions(node), set()
    while pending:
        n = pending.pop()
        value = n.meta.get("val")
        if n in seen or isinstance(value, torch.Tensor) and value.is_floating_point():
            continue
        seen.add(n)
        if n.target in FOUND or (
            n.op == "call_function" and getattr(value, "dtype", None) == torch.bool and len(seen) == 1
        ):
            return True
        pending.extend(a for a in n.all_input_nodes if n.target in STEPS)
    return False


def _positions(node: Node) -> list[Node]:
    if node.target in BY_DIM:
        return [node.args[2]]
    return [i for i in node.args[1] if i is not None]


class _Loop:
    """One loop, found from the first read of some expert's tokens."""

    def __init__(self, gm: GraphModule, ctx, node: Node):
        self.gm, self.ctx, self.node = gm, ctx, node
        self.reads: dict[Node, int] = {}  # the expert of each read
        self.order: dict[int, list[list[int]]] = {}  # the slots of each expert's rows, by trial
        self.kind: dict[Node, str] = {}

    def rewrite(self) -> None:
        self.find_choice()
        writes = self.find_writes()
        if self.ctx.prove and (
            reason := self.ctx.prove([self.index, *self.reads, *(w[1] for w in writes)], self.experts)
        ):
            raise Differs(reason)
        self.replace(writes)

    def find_choice(self) -> None:
        problem = Differs("its tokens do not come from a choice of experts")
        for index, experts in itertools.product(self.choices(), self.numbers()):
            self.index, self.experts = index, experts
            tokens = shape(self.index)
            made_by = self.index.args[0] if self.index.target is operator.getitem else self.index
            one = made_by.target in ONE and True not in made_by.args[2:] and not made_by.kwargs.get("keepdim")
            self.k = tokens[-1] if len(tokens) > 1 and not one else 1
            self.tokens = math.prod(tokens) // self.k
            try:
                self.trials = [self.trial(seed) for seed in range(4)]
                self.find_reads()
                if self.drops and self.k == self.experts:  # a mask of experts is no choice of them
                    raise Differs(f"{self.index.name} sends every token to every expert, and some are left out")
                return
            except Differs as error:
                problem = error
        raise problem

    def choices(self) -> list[Node]:
        """The integer values that decide the tokens, the nearest first: one of them says which experts each goes to."""
        pending, found = list(_positions(self.node)), dict[Node, None]()
        seen: set[Node] = set()
        while pending:
            n = pending.pop(0)
            value = n.meta.get("val")
            if n in seen or (isinstance(value, torch.Tensor) and value.is_floating_point()):
                continue
            seen.add(n)
            number = isinstance(value, torch.Tensor) and value.dtype != torch.bool and _static(value)
            if number and value.numel() > 1:
                found[n] = None
            pending.extend(n.all_input_nodes)
        return list(found)

    def numbers(self) -> list[int]:
        """How many experts there may be: so many times the loop reads the same value, or more often by a factor, as a
        loop for each slot does."""
        counts = Counter(n.args[0] for n in self.gm.graph.nodes if n.target in READS and _of_data(n))
        found = sorted({d for c in counts.values() for d in range(2, c + 1) if c % d == 0}, reverse=True)
        if not found:
            raise Differs("nothing is read by more than one expert")
        return found

    def trial(self, seed: int) -> dict[Node, torch.Tensor]:
        """A routing that reaches every expert, balanced or (the odd ones) with most tokens alike; a token's experts
        are different."""
        if self.k > self.experts:
            raise Differs(f"{self.index.name} has more entries for a token than there are experts")
        generator = torch.Generator().manual_seed(seed)
        each = -(-self.experts // self.k)  # tokens that reach every expert, in a row
        base = torch.arange(each * self.k).reshape(each, self.k) % self.experts
        more = torch.rand(max(self.tokens - each, 0), self.experts, generator=generator).argsort(1)[:, : self.k]
        base = torch.cat([base, more[:1].expand_as(more) if seed % 2 else more])[: self.tokens]
        if self.tokens * self.k < self.experts:
            raise Differs(f"the example inputs have {self.tokens} tokens, too few to reach {self.experts} experts")
        relabel = torch.randperm(self.experts, generator=generator)
        base = relabel[base[torch.randperm(self.tokens, generator=generator)]]
        return {self.index: base.reshape(shape(self.index)).to(self.index.meta["val"].dtype)}

    def slots(self, node: Node) -> tuple[int, list[list[int]], str] | None:
        """The expert of a read or write, the slots of its rows on each trial, and whether it is of tokens or slots."""
        kind, flats, experts = "", [], set(range(self.experts))
        for values in self.trials:
            index = values[self.index].reshape(self.tokens, self.k)
            try:
                found = [graphs.evaluate(p, values) for p in _positions(node)]
            except (graphs.Unknown, RuntimeError, IndexError):
                return None
            parts: list[torch.Tensor] = []
            for f in found:
                parts.extend(f.nonzero().unbind(1) if f.dtype == torch.bool else [f.reshape(-1)])
            dims = self.lead(node, len(parts))
            if dims is None or math.prod(dims) not in (self.tokens, self.tokens * self.k):
                return None
            flat = torch.zeros_like(parts[0])
            for p, d in zip(parts, dims):
                flat = flat * d + p
            kind = "token" if math.prod(dims) == self.tokens else "slot"
            places = index if kind == "token" else index.reshape(-1, 1)
            ordered = flat.sort().values
            if ordered.unique().numel() != ordered.numel():
                return None
            experts &= set(places[ordered[0]].tolist()) if len(ordered) else set()
            experts = {e for e in experts if (places == e).any(1)[ordered].all()}
            flats.append((index, flat))
        if len(experts) != 1:
            return None
        (e,) = experts
        self.drops |= any(f.numel() < (i == e).sum() for i, f in flats)
        lists = [(f if kind == "slot" else f * self.k + (i[f] == e).int().argmax(1)).tolist() for i, f in flats]
        return e, lists, kind

    def lead(self, node: Node, number: int) -> list[int] | None:
        """The sizes of the dims that are indexed."""
        size = shape(node.args[0])
        if node.target in BY_DIM:
            return [size[0]] if node.args[1] == 0 else None
        given = list(node.args[1])
        skip = 0
        while given and given[0] is None and size[skip] == 1:
            given, skip = given[1:], skip + 1
        return None if None in given else list(size[skip : skip + number])

    def find_reads(self) -> None:
        self.reads, self.order, self.kind, self.drops = {}, {}, {}, False
        for n in list(self.gm.graph.nodes):
            if n.target in READS and _of_data(n):
                found = self.slots(n)
                if found:
                    e, lists, self.kind[n] = found
                    if self.order.setdefault(e, lists) != lists:
                        raise Differs(f"{n.name} reads an expert's tokens in another order", n)
                    self.reads[n] = e
        if set(self.order) != set(range(self.experts)):
            raise Differs(f"{len(self.order)} of {self.experts} parts read the tokens of one expert each")

    def find_writes(self) -> list[tuple[int, Node, Node]]:
        """(expert, write, the rows that it adds or puts), one after the other."""
        writes = []
        for n in self.gm.graph.nodes:
            if n.target in WRITES and (found := self.slots(n)):
                e, lists, kind = found
                if self.order.get(e) != lists:
                    raise Differs(f"{n.name} writes an expert's tokens in another order than they are read", n)
                writes.append((e, n, self.added(n, kind)))
                self.kind[n] = kind
        if sorted(e for e, _, _ in writes) != list(range(self.experts)):
            raise Differs(f"{len(writes)} results are written back for {self.experts} experts")
        for (_, a, _), (_, b, _) in zip(writes, writes[1:]):
            again = {u for u in a.users if self.reads.get(u) is not None and u.args[0] is a}
            if b.args[0] is not a or set(a.users) - again != {b}:
                raise Differs(f"{b.name} does not follow the result of the expert before", b)
        return writes

    def added(self, write: Node, kind: str) -> Node:
        if write.target is aten.index_add.default:
            if write.args[1] != 0 or write.kwargs:
                raise Differs(f"{write.name} scales what it adds", write)
            return write.args[3]
        copies = write.target is aten.index_copy.default
        value, adds = write.args[3 if copies else 2], not copies and len(write.args) > 3 and write.args[3]
        if adds:
            return value
        if value.target is aten.add.Tensor and not value.kwargs:
            old = [a for a in value.args if isinstance(a, Node) and a.target in READS and a.args[0] is write.args[0]]
            if len(old) == 1 and self.reads.get(old[0]) == self.slots(write)[0]:  # type: ignore[index]
                return value.args[1 - value.args.index(old[0])]
        base = write
        while base.target in (aten.index_put.default, aten.index_copy.default):
            base = base.args[0]
        if base.target not in EMPTY and not _zeros(base):
            raise Differs(f"{write.name} overwrites a value that is not empty", write)
        return self.put(value, kind)

    def put(self, value: Node, kind: str) -> Node:
        self.puts = True
        if kind != "slot" and self.k > 1:
            raise Differs("it overwrites the result of another expert's token")
        return value

    puts = False
    drops = False  # some tokens are over an expert's capacity

    def kept(self, merge: Merge, index: Node, like: Node) -> Node:
        """1 for each slot (T*K, 1) whose token the loop reads, 0 where its masks leave the token out."""
        firsts = {e: n for n, e in reversed(self.reads.items())}
        masks, limits = zip(*(self.mask(_positions(firsts[e])[0]) for e in range(self.experts)))
        if len(set(masks)) == 1 and len(set(limits)) == 1 and self.of_experts(masks[0]):
            rows = merge.add(aten.reshape.default, (masks[0], [self.experts, self.tokens]))
            table = merge.add(aten.ne.Scalar, (merge.add(aten.transpose.int, (rows, 0, 1)), 0))
        elif len(set(limits)) == 1 and all(_static(m.meta["val"]) and shape(m) == (self.tokens,) for m in masks):
            table = merge.add(aten.ne.Scalar, (merge.add(aten.stack.default, (list(masks), 1)), 0))
        else:
            raise Differs(
                f"it leaves tokens out, and {masks[0].name} {list(shape(masks[0]))} is not a mask of {self.experts} "
                f"experts and {self.tokens} tokens"
            )
        if limits[0] is not None:  # the first ones of each expert
            place = merge.add(aten.cumsum.default, (table, 0))
            table = merge.add(aten.logical_and.default, (table, merge.add(aten.le.Scalar, (place, limits[0]))))
        found = merge.add(aten.gather.default, (table, 1, merge.add(aten.to.dtype, (index, torch.int64))))
        return merge.add(
            aten.to.dtype, (merge.add(aten.reshape.default, (found, [self.tokens * self.k, 1])), like.meta["val"].dtype)
        )

    def mask(self, positions: Node) -> tuple[Node, int | None]:
        """What an expert's positions are found in, and how many of the first ones are taken."""
        limit = None
        while positions.target in STEPS | FOUND | READS | {aten.slice.Tensor} and not self.of_experts(positions):
            if positions.target is aten.slice.Tensor:
                if limit is not None or positions.args[1:3] != (0, 0) or positions.args[4:] not in ((), (1,)):
                    break
                limit = positions.args[3]
            value = positions.meta["val"]
            if _static(value) and value.dtype == torch.bool and value.shape == (self.tokens,):
                break
            positions = positions.args[0]
        return positions, limit

    def of_experts(self, mask: Node) -> bool:
        value = mask.meta["val"]
        return _static(value) and value.shape[0] == self.experts and value.numel() == self.experts * self.tokens

    def replace(self, writes: list[tuple[int, Node, Node]]) -> None:
        graph, last = self.gm.graph, writes[-1][1]
        writes = sorted(writes, key=lambda w: w[0])
        groups = self.corresponding([w[2] for w in writes])
        x = next((self.source(g) for g in groups if self.tokens_of(g) is not None), None)
        if x is None:
            raise Differs("its rows are not tokens taken in the order of their experts")
        base = min((w[1] for w in writes), key=list(graph.nodes).index).args[0]
        with graph.inserting_before(last):
            entries: dict = {}
            merge = Merge(self.gm, self.ctx, self.experts, entries, writes[0][2])
            index = merge.add(aten.reshape.default, (self.index, [self.tokens, self.k]))
            flat = x if len(shape(x)) == 2 else merge.add(aten.reshape.default, (x, [self.tokens, -1]))
            dispatch = merge.add(ops.permute.default, (flat, index, self.experts))
            rows, counts, perm, order = (merge.add(operator.getitem, (dispatch, i)) for i in range(4))
            back = merge.add(aten.reshape.default, (perm, [-1]))
            merge.rows, merge.counts = rows, counts
            merge.numbers = tuple(shape(n)[0] for n in groups[0])

            def enter(group):
                def make() -> Node:
                    if self.tokens_of(group) is x:
                        value, wide = rows, shape(group[0])
                        return value if len(wide) == 2 else merge.add(aten.unsqueeze.default, (value, 0))
                    return merge.add(ops.take.default, (self.per_slot(merge, group, index), order, back))

                return make

            for group in groups:
                entries[group] = enter(group)
            y = merge.value(tuple(w[2] for w in writes))
            if self.drops:
                y = merge.add(
                    aten.mul.Tensor, (y, merge.add(ops.take.default, (self.kept(merge, index, y), order, back)))
                )
            if self.puts:
                out = merge.add(ops.take.default, (y, back, order))
            else:
                out = combine(merge.add, y, perm, order)
            if shape(out) != shape(last):
                out = merge.add(aten.reshape.default, (out, list(shape(last))))
            if out.meta["val"].dtype != last.meta["val"].dtype:
                out = merge.add(aten.to.dtype, (out, last.meta["val"].dtype))
            if not (self.puts or _zeros(base)):
                out = merge.add(aten.add.Tensor, (base, out))
        last.replace_all_uses_with(out)

    def corresponding(self, results: list[Node]) -> list[tuple[Node, ...]]:
        """The reads that each expert's result is made of, those in the same place together."""
        lists = []
        for e, result in enumerate(results):
            found: dict[Node, None] = {}
            seen: set[Node] = set()

            def walk(n: Node) -> None:
                if n in seen or n.meta.get("weights_only"):  # noqa: B023
                    return
                seen.add(n)  # noqa: B023
                if self.reads.get(n) is not None:
                    found[n] = None  # noqa: B023
                    return
                for a in n.all_input_nodes:
                    walk(a)

            walk(result)
            if any(self.reads[n] != e for n in found):
                raise Differs(f"{result.name} mixes the tokens of several experts", result)
            lists.append(list(found))
        if len({len(found) for found in lists}) != 1:
            raise Differs("the experts do not read alike")
        return list(zip(*lists))

    def source(self, group: tuple[Node, ...]) -> Node | None:
        sources = {n.args[0] for n in group}
        return self.tokens_of(group) if len(sources) == 1 else None

    def tokens_of(self, group: tuple[Node, ...]) -> Node | None:
        """The tokens (T, H) whose rows a group of reads is; of slots that repeat tokens, those."""
        sources = {n.args[0] for n in group}
        if len(sources) != 1:
            return None
        (source,) = sources
        if self.kind[group[0]] == "token":
            if source.target is aten.unsqueeze.default and source.args[1] == 0:
                source = source.args[0]
            return source if math.prod(shape(source)[:-1]) == self.tokens and len(shape(source)) > 1 else None
        repeats = source.target is aten.repeat_interleave.self_int
        along = repeats and (source.args[2] if len(source.args) > 2 else source.kwargs.get("dim")) == 0
        if along and source.args[1] == self.k and len(shape(source)) == 2:
            return source.args[0]
        return None

    def per_slot(self, merge: Merge, group: tuple[Node, ...], index: Node) -> Node:
        """What a group of reads reads, for every slot (T*K, ...)."""
        sources = list(dict.fromkeys(n.args[0] for n in group))
        slots = self.tokens * self.k
        if self.kind[group[0]] == "slot":
            if len(sources) > 1:
                raise Differs(f"{group[0].name} reads slots of its own for each expert")
            rest = list(shape(group[0]))[1:]
            return merge.add(aten.reshape.default, (sources[0], [slots, *rest]))
        if len(sources) == 1:
            value = merge.add(aten.reshape.default, (sources[0], [self.tokens, *shape(group[0])[1:]]))
            return merge.add(aten.repeat_interleave.self_int, (value, self.k, 0))
        rest = list(shape(sources[0])[1:])
        if math.prod(rest) != 1 or len(sources) != self.experts:
            raise Differs(f"{group[0].name} reads wide values of its own for each expert")
        flat = [merge.add(aten.reshape.default, (s, [self.tokens])) for s in (n.args[0] for n in group)]
        table = merge.add(aten.stack.default, (flat, 1))
        value = merge.add(aten.gather.default, (table, 1, merge.add(aten.to.dtype, (index, torch.int64))))
        return merge.add(aten.reshape.default, (value, [slots, *rest]))
