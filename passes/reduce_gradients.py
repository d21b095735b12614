"""Data parallelism: parameter gradients are averaged over the data axes that replicate the parameter.

Before:  return (loss, grad_w1, grad_w2, ...)                        # a joint graph: outputs, then gradients
After:   d_loss = d_loss / (dp*ep)                                   # a gradient is linear in the loss's
         sum = all_reduce(cat(flat grad_w1, flat grad_w2), "data");  return (loss, view of sum, view of sum, ...)

Dense parameters are reduced over dp x ep; experts, which are split over ep, over dp; both are divided by dp * ep, for a
step is the step on the mean of the dp x ep losses (DeepSpeed-TED, arXiv 2303.06318, section 3). Never over tp: there a
gradient is either this rank's own part or whole already. A bucket is sent as soon as its last gradient exists; one as
large as a bucket goes alone, as it lies in memory. A large embedding's that few tokens look up travels as their rows:

         all_reduce(embedding_vjp(g, ids), "data") = embedding_vjp(gather(g), gather(ids))

Under ZeRO-2 and 3 the VJPs of `gather_parameters` have summed them already; what is left is to divide.

Each gradient is divided by itself, not the loss's, where that is not the same: a user's own backward is any function of
what it is given, or of nothing; fp16 and a low-precision 1 / 3 round; gradients of inputs are this rank's.

Needs: `ctx.gradients`, for each output of the joint graph that is a parameter's gradient, the parameter's placements;
`ctx.shares`, of those that ZeRO splits, how; `ctx.outputs`, how many outputs are no gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch.fx import Graph, GraphModule, Node

from tedcompile import compat, graphs, zero
from tedcompile.layouts import aten, shape
from tedcompile.ops import ops

T = TypeVar("T")
BUCKET = 25 << 20  # bytes
MOVES = {aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.transpose.int, aten.t.default,
         aten.permute.default, aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims}  # fmt: skip


def run(gm: GraphModule, ctx) -> None:
    copies = ctx.shape["data"]
    if copies == 1:
        return
    output = gm.graph.output_node()
    scale = 1.0 if _divide_early(gm.graph, ctx, copies) else 1 / copies
    results = list(output.args[0])
    order = {node: i for i, node in enumerate(gm.graph.nodes)}
    families: dict[tuple, list[tuple[int, Node]]] = {}
    for i, placements in ctx.gradients.items():
        grad = results[i]
        if grad is None:
            continue
        axis = zero.family(placements)
        if i in ctx.shares or ctx.shape[axis] == 1:
            results[i] = _scaled(gm.graph, grad, scale)
        else:
            families.setdefault((axis, grad.meta["val"].dtype), []).append((i, grad))
    for (axis, _), members in families.items():
        members.sort(key=lambda m: order[m[1]])
        for bucket in buckets(members, lambda m: m[1].meta["val"].nbytes):
            i, grad = bucket[0]
            if grad.meta["val"].nbytes >= BUCKET:
                rows = _rows(gm.graph, grad, axis, ctx.shape[axis])
                alone = rows and _scaled(gm.graph, rows, scale)
                results[i] = alone or _alone(gm.graph, grad, axis, scale, output)
            else:
                _together(gm.graph, bucket, axis, scale, output, results)
    output.args = (tuple(results),)


def buckets(gradients: Iterable[T], size: Callable[[T], int]) -> Iterator[list[T]]:
    """What is summed together: one of `BUCKET` bytes alone, others in their order until they have as many."""
    bucket: list[T] = []
    held = 0
    for gradient in gradients:
        if size(gradient) >= BUCKET:
            yield [gradient]
            continue
        bucket.append(gradient)
        held += size(gradient)
        if held >= BUCKET:
            yield bucket
            bucket, held = [], 0
    if bucket:
        yield bucket


# ---- the mean


def _divide_early(graph: Graph, ctx, copies: int) -> bool:
    """Divides what the backward begins with, where this divides all gradients and rounds no more than they do."""
    results = graph.output_node().args[0]
    tangents = [n for n in graph.find_nodes(op="placeholder") if n.name.startswith("tangents")]
    others = any(g is not None for i, g in enumerate(results) if i >= ctx.outputs and i not in ctx.gradients)
    kinds = {v.dtype for n in graph.nodes if isinstance(v := n.meta.get("val"), torch.Tensor)}
    power_of_two = copies & (copies - 1) == 0
    if others or torch.float16 in kinds or not (power_of_two or torch.bfloat16 not in kinds):
        return False
    if not all(graphs.namespace(n) in graphs.NAMESPACES for n in graph.nodes if n.op == "call_function"):
        return False  # a user's own backward need not be linear
    given = set(tangents)
    for node in graph.nodes:
        if not given.isdisjoint(node.all_input_nodes):
            given.add(node)
    if any(results[i] is not None and results[i] not in given for i in ctx.gradients):
        return False
    order = {n: i for i, n in enumerate(graph.nodes)}
    for tangent in tangents:
        if tangent.users:
            first = min(tangent.users, key=order.__getitem__)
            with graph.inserting_before(first):
                part = graphs.call(graph, aten.mul.Tensor, (tangent, 1 / copies), first)
            tangent.replace_all_uses_with(part, delete_user_cb=lambda user: user is not part)  # noqa: B023
    return True


def _scaled(graph: Graph, grad: Node, scale: float) -> Node:
    if scale == 1:
        return grad
    with graphs.after(graph, grad):
        return graphs.call(graph, aten.mul.Tensor, (grad, scale), grad)


# ---- the sum


def _alone(graph: Graph, grad: Node, axis: str, scale: float, output: Node) -> Node:
    """A sum is the same however its terms lie: what the gradient is a view of is sent, and seen so afterwards."""
    moves: list[Node] = []
    base = grad
    while base.target in MOVES and len(base.users) == 1:
        moves.insert(0, base)
        base = base.all_input_nodes[0]
    if not base.meta["val"].is_contiguous():
        with graphs.after(graph, grad):
            base = graphs.call(graph, aten.clone.default, (grad,), grad, grad.meta["val"].contiguous())
        base.kwargs, moves = {"memory_format": torch.contiguous_format}, []
    sent = _scaled(graph, base, scale)
    with graphs.after(graph, sent):
        summed = graphs.call(graph, ops.all_reduce.default, (sent, axis), sent)
    return _seen(graph, summed, [(m.target, m.args[1:], m) for m in moves], output)


def fewer_rows(tokens: int, rows: int, ranks: int) -> bool:
    """Whether the rows of all ranks' tokens are fewer than an embedding has: to sum these sends each of them twice."""
    return tokens * ranks <= rows


def _rows(graph: Graph, grad: Node, axis: str, ranks: int) -> Node | None:
    """An embedding's gradient from all ranks' tokens, added up in one order by each."""
    if grad.target is not aten.embedding_dense_backward.default or len(grad.users) > 1:
        return None
    g, ids, rows, padding, by_frequency = grad.args
    if by_frequency or not fewer_rows(math.prod(shape(ids)), rows, ranks):
        return None
    with graph.inserting_before(grad):
        whole = []
        for value, size in ((g, [-1, shape(g)[-1]]), (ids, [-1])):
            flat = graphs.call(graph, aten.reshape.default, (value, size), grad)
            part = flat.meta["val"]
            val = part.new_empty(ranks * part.shape[0], *part.shape[1:])
            whole.append(graphs.call(graph, ops.gather.default, (flat, 0, ranks, [], axis), grad, val))
            whole[-1].meta |= compat.IN_BACKWARD
        return graphs.call(graph, ops.embedding_vjp.default, (*whole, rows, padding, False), grad)


def _together(
    graph: Graph, bucket: list[tuple[int, Node]], axis: str, scale: float, output: Node, results: list
) -> None:
    last = bucket[-1][1]
    with graphs.after(graph, last):
        flat = [graphs.call(graph, aten.reshape.default, (g, [-1]), g) for _, g in bucket]
        parts = [*flat]
        whole = graphs.call(graph, aten.cat.default, (flat,), last)
        parts.append(whole)
        if scale != 1:
            whole = graphs.call(graph, aten.mul.Tensor, (whole, scale), last)
            parts.append(whole)
        summed = graphs.call(graph, ops.all_reduce.default, (whole, axis), last)
    for node in parts:
        node.meta["segment"] = "bucket"
    start = 0
    for i, g in bucket:
        n = math.prod(shape(g))
        steps = [(aten.slice.Tensor, (0, start, start + n), g), (aten.reshape.default, (list(shape(g)),), g)]
        results[i] = _seen(graph, summed, steps, output)
        start += n


def _seen(graph: Graph, value: Node, views: list[tuple[Any, tuple, Node]], output: Node) -> Node:
    """Views of a sum, at the end of the graph: one before would wait for it."""
    with graph.inserting_before(output):
        for target, args, like in views:
            value = graphs.call(graph, target, (value, *args), like)
            value.meta["segment"] = "views"
    return value
