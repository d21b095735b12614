"""The output head and the cross-entropy after it become one op, which never holds all logits.

Before:  logits = linear(h, w).float();  loss = cross_entropy(logits.view(-1, V), labels.view(-1), reduction="mean")
After:   total, ... = linear_loss(h.view(-1, H), w, labels.view(-1));  loss = total / (labels != -100).sum()

What is between the two (casts, views, shifts of positions, a constant factor) moves to the head's input.

Needs: a forward graph with local values, all moves between ranks in it already.
Refuses: logits that something else reads, soft labels, weights of classes, smoothing, losses token by token, any
other op in between: they stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.fx import Graph, GraphModule, Node

from tedcompile import graphs
from tedcompile.layouts import aten, shape, val
from tedcompile.ops import ops

CASTS = {aten.to.dtype, aten._to_copy.default}
SAME = {aten.contiguous.default, aten.clone.default, aten.alias.default}
VIEWS = {aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints}


def run(gm: GraphModule, ctx, gradients: bool = True) -> None:
    """`gradients`: whether there will be a backward."""
    for node in gm.graph.find_nodes(op="call_function", target=aten.cross_entropy_loss.default):
        _fuse(gm.graph, node, gradients)
    gm.graph.eliminate_dead_code()
    gm.recompile()


def _fuse(graph: Graph, loss: Node, gradients: bool) -> None:
    given: tuple[Any, ...] = (*loss.args, *(None, 1, -100, 0.0)[len(loss.args) - 2 :])
    logits, target, weights, reduction, ignore, smoothing = given
    if loss.kwargs or weights is not None or smoothing or reduction not in (1, 2):
        return
    if len(shape(logits)) != 2 or len(shape(target)) != 1 or val(target).is_floating_point():
        return
    head, steps, scale = logits, [], 1.0
    while head.target is not aten.linear.default:
        if head.op != "call_function" or len(head.users) > 1:
            return
        if head.target in (aten.mul.Tensor, aten.div.Tensor) and isinstance(head.args[1], (int, float)):
            scale = scale * head.args[1] if head.target is aten.mul.Tensor else scale / head.args[1]
        elif (step := _on_rows(head)) is not None:
            steps.append((head, step))
        elif head.target not in CASTS or not val(head).is_floating_point():
            return
        head = head.args[0]
    if len(head.users) > 1:
        return
    x, weight, *bias = head.args
    computed = val(head).dtype  # also under autocast
    with graph.inserting_before(loss):
        for like, step in reversed(steps):
            x = step(graph, x, like)
        x, weight, bias = (
            a if a is None or val(a).dtype == computed else graphs.call(graph, aten.to.dtype, (a, computed), head)
            for a in (x, weight, *(bias or [None]))
        )
        args = (x, weight, bias, target, ignore, scale, gradients)
        fused = graphs.call(graph, ops.linear_loss.default, args, loss)
        fused.meta.pop("autocast", None)
        out = graphs.emit(graph, _finish(reduction, ignore, val(loss).dtype), (fused, target), {}, loss)
    loss.replace_all_uses_with(out)
    graph.erase_node(loss)


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
