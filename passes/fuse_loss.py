"""The output head and the cross-entropy after it become one op, which never holds all logits.

Before:  logits = linear(h, w).float();  loss = cross_entropy(logits.view(-1, V), labels.view(-1), reduction="mean")
After:   total, ... = linear_loss(h.view(-1, H), w, labels.view(-1));  loss = total / (labels != -100).sum()

Where tp splits the vocabulary, what each rank has of a row becomes one op, and what is between the ranks stays:

Before:  z = logits - all_max(amax(logits));  all_reduce(sum(exp(z))), all_reduce(pick(z, labels))
After:   own, picked = linear_rows(h.view(-1, H), w, labels)  # log-sum-exp; the backward makes the logits again
         m = all_max(own);  all_reduce(exp(own - m)), all_reduce(picked) - m

What is between the two (casts, views, shifts of positions, a constant factor) moves to the head's input.

Needs: a forward graph with local values, all moves between ranks in it already.
Refuses: logits that something else reads, soft labels, weights of classes, smoothing, losses token by token, any
other op in between: they stay as they are. So do split logits that are no more than a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from tedcompile import graphs
from tedcompile.layouts import aten, shape, val
from tedcompile.ops import losses, ops

CASTS = {aten.to.dtype, aten._to_copy.default}
SAME = {aten.contiguous.default, aten.clone.default, aten.alias.default}
VIEWS = {aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints}


def run(gm: GraphModule, ctx, gradients: bool = True) -> None:
    """`gradients`: whether there will be a backward."""
    for node in gm.graph.find_nodes(op="call_function", target=aten.cross_entropy_loss.default):
        _fuse(gm.graph, node, gradients)
    for node in gm.graph.find_nodes(op="call_function", target=ops.pick.default):
        _fuse_shard(gm.graph, node)
    gm.graph.eliminate_dead_code()
    gm.recompile()


def _fuse(graph: Graph, loss: Node, gradients: bool) -> None:
    given: tuple[Any, ...] = (*loss.args, *(None, 1, -100, 0.0)[len(loss.args) - 2 :])
    logits, target, weights, reduction, ignore, smoothing = given
    if loss.kwargs or weights is not None or smoothing or reduction not in (1, 2):
        return
    if len(shape(target)) != 1 or val(target).is_floating_point() or (head := _head(logits, 1)) is None:
        return
    with graph.inserting_before(loss):
        args = (*head.inputs(graph), target, ignore, head.scale, gradients)
        fused = graphs.call(graph, ops.linear_loss.default, args, loss)
        fused.meta.pop("autocast", None)
        out = graphs.emit(graph, _finish(reduction, ignore, val(loss).dtype), (fused, target), {}, loss)
    loss.replace_all_uses_with(out)
    graph.erase_node(loss)


def _fuse_shard(graph: Graph, pick: Node) -> None:
    """The form of `layouts.vocabulary`, in which the largest of all columns serves as well as that of log-sum-exps."""
    z, target, axis = pick.args
    if z.target is not aten.sub.Tensor or len(z.users) != 2 or z.args[1].target is not ops.all_max.default:
        return
    logits, biggest = z.args
    own_biggest = biggest.args[0]
    power = next(u for u in z.users if u is not pick)
    order = {n: i for i, n in enumerate(graph.nodes)}
    first = own_biggest.args[0]  # logits without a gradient
    if power.target is not aten.exp.default or set(logits.users) != {first, z} or order[target] > order[first]:
        return
    head = _head(logits, 2)
    if len(power.users) != 1 or len(pick.users) != 1 or head is None:
        return
    if math.prod(shape(logits)) * head.itemsize <= losses.CHUNK:
        return
    (added,), (reduced,) = power.users, pick.users
    with graph.inserting_before(first):
        fused = graphs.call(graph, ops.linear_rows.default, (*head.inputs(graph), target, head.scale, axis), pick)
        fused.meta.pop("autocast", None)
        own, picked = (graphs.emit(graph, _part(i, val(pick).dtype), (fused,), {}, pick) for i in range(2))
        alone = graphs.emit(
            graph, lambda x: aten.unsqueeze.default(aten.detach.default(x), -1), (own,), {}, own_biggest
        )
    with graph.inserting_after(biggest):
        most = graphs.call(graph, aten.squeeze.dim, (biggest, -1), pick)
    with graph.inserting_before(added):
        share = graphs.emit(graph, lambda x, m: aten.exp.default(aten.sub.Tensor(x, m)), (own, most), {}, added)
    with graph.inserting_after(reduced):
        below = graphs.call(graph, aten.sub.Tensor, (reduced, most), reduced)
    for old, new in ((own_biggest, alone), (added, share), (pick, picked)):
        old.replace_all_uses_with(new)
    reduced.replace_all_uses_with(below, lambda user: user is not below)


def _part(i: int, dtype: torch.dtype) -> Callable:
    return lambda fused: aten.to.dtype(fused[i], dtype)


@dataclass
class _Head:
    """linear(x, weight, bias), what is done to its rows, the factor, and the dtype it computes in."""

    x: Node
    weight: Node
    bias: Node | None
    steps: list[tuple[Node, Callable]]
    scale: float
    like: Node

    @property
    def itemsize(self) -> int:
        return val(self.like).dtype.itemsize

    def inputs(self, graph: Graph) -> tuple[Node | None, ...]:
        """x with what is done to the rows, weight and bias, in the dtype of the product (also under autocast)."""
        x = self.x
        for like, step in reversed(self.steps):
            x = step(graph, x, like)
        dtype = val(self.like).dtype
        return tuple(
            a if a is None or val(a).dtype == dtype else graphs.call(graph, aten.to.dtype, (a, dtype), self.like)
            for a in (x, self.weight, self.bias)
        )


def _head(logits: Node, readers: int) -> _Head | None:
    """The output head that makes logits (N, V) for so many readers; None where something else is in between."""
    if len(shape(logits)) != 2 or len(logits.users) != readers:
        return None
    head: Node = logits
    steps: list[tuple[Node, Callable]] = []
    scale = 1.0
    while head.target is not aten.linear.default:
        if head.op != "call_function" or (head is not logits and len(head.users) > 1):
            return None
        if head.target in (aten.mul.Tensor, aten.div.Tensor) and isinstance(head.args[1], (int, float)):
            scale = scale * head.args[1] if head.target is aten.mul.Tensor else scale / head.args[1]
        elif (step := _on_rows(head)) is not None:
            steps.append((head, step))
        elif head.target not in CASTS or not val(head).is_floating_point():
            return None
        head = head.args[0]
    if head is not logits and len(head.users) > 1:
        return None
    x, weight, *bias = head.args
    return _Head(x, weight, bias[0] if bias else None, steps, scale, head)


def _finish(reduction: int, ignore: int, dtype) -> Callable:
    def finish(fused, target):
        total = fused[0]
        if reduction == 1:
            total = aten.div.Tensor(total, aten.sum.default(aten.ne.Scalar(target, ignore)))
        return aten.to.dtype(total, dtype)

    return finish


def _on_rows(node: Node) -> Callable | None:
    """What does to rows (..., H) the same as the node does to rows (..., V); None where it mixes columns."""
    source = node.args[0]
    columns = shape(source)[-1:]
    if node.target in SAME:
        return lambda graph, x, like: x
    if shape(node)[-1:] != columns:
        return None
    if node.target in VIEWS:
        rows = [*shape(node)[:-1]]
        return lambda graph, x, like: graphs.call(graph, aten.reshape.default, (x, [*rows, shape(x)[-1]]), like)
    if node.target is aten.slice.Tensor and _dim(node) != len(shape(source)) - 1:
        return lambda graph, x, like: graphs.call(graph, aten.slice.Tensor, (x, *like.args[1:]), like)
    return None


def _dim(node: Node) -> int:
    return (node.args[1] if len(node.args) > 1 else 0) % len(shape(node))
