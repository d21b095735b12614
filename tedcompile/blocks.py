"""MoE blocks of a canonical graph: from the permute to what leaves, and why a block cannot be dispatched over ranks."""

from __future__ import annotations

import heapq
import operator
from dataclasses import dataclass

import torch
from torch.fx import Node

from tedcompile import layouts
from tedcompile.capture import source_line
from tedcompile.layouts import Call, D, NoRule, R, aten, shape
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

    @property
    def moves_tokens(self) -> bool:
        """Whether whole tokens can travel in place of rows: nothing else enters, and one weighted sum leaves."""
        return len(self.enters) == 1 and [n.target for n in self.leaves] == [ops.unpermute.default]

    @staticmethod
    def of(node: Node) -> Block:
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


def _weight(a: Node) -> Node | None:
    while a.op == "call_function" and a.target in CHAIN | {ops.enter.default, ops.slice.default, ops.share.default}:
        a = a.args[0]
    return a if a.meta.get("role", ("",))[0] == "parameter" else None


def _other_reader(weight: Node) -> Node | None:
    """What reads a weight and does not do it expert by expert: it would see this rank's experts for all."""
    pending = list(weight.users)
    while pending:
        n = pending.pop()
        if n.target in PER_EXPERT:
            continue
        if n.target not in CHAIN:
            return n
        pending.extend(n.users)
    return None


def refusal(block: Block, ranks: int, ctx) -> str:
    """Why a block cannot be dispatched over `ranks` ranks; empty where it can."""
    experts = block.experts
    for reader, weight in zip(block.readers, block.weights):
        if weight is None or shape(weight)[0] != experts:
            return f"{reader.name} reads per-expert values that are not a parameter of {experts} experts"
    for weight in block.weights:
        assert weight is not None
        if other := _other_reader(weight):
            at = source_line(other) or other.name
            return f"{weight.meta['role'][1]} is read by something else, too, at {at}"
    if experts % ranks:
        sizes = [n for n in range(2, experts + 1) if experts % n == 0]
        return f"{experts} experts do not divide over ep={ranks}; ep = {', '.join(map(str, sizes))} would"
    if any(ctx.fixed_axis(w, "ep") is False for w in block.weights if w is not None) and ctx.shape.ep > 1:
        return "its weights were laid out whole"
    return block.stray
