"""Data parallelism: parameter gradients are averaged over the data axes that replicate the parameter.

Before:  return (loss, grad_w1, grad_w2, ...)                        # a joint graph: outputs, then gradients
After:   bucket = all_reduce(cat(flat grad_w1, flat grad_w2) / (dp*ep), "data");  return (loss, view of bucket, ...)

Dense parameters are reduced over dp x ep; experts, which are split over ep, over dp; both are divided by dp * ep, for a
step is the step on the mean of the dp x ep losses (DeepSpeed-TED, arXiv 2303.06318, section 3). Never over tp: there a
gradient is either this rank's own part or whole already. A bucket is sent as soon as its last gradient exists.
Under ZeRO-2 and 3 the VJPs of `gather_parameters` have summed them already; what is left is to divide.

Needs: `ctx.gradients`, for each output of the joint graph that is a parameter's gradient, the parameter's placements;
`ctx.shares`, of those that ZeRO splits, how.
"""

from __future__ import annotations

import math

from torch.fx import GraphModule, Node

from tedcompile import graphs, zero
from tedcompile.layouts import aten, shape
from tedcompile.ops import ops

BUCKET = 25 << 20  # bytes


def run(gm: GraphModule, ctx) -> None:
    shape_of_mesh = ctx.shape
    copies = shape_of_mesh["data"]
    if copies == 1:
        return
    output = gm.graph.output_node()
    results = list(output.args[0])
    order = {node: i for i, node in enumerate(gm.graph.nodes)}
    families: dict[tuple, list[tuple[int, Node]]] = {}
    for i, placements in ctx.gradients.items():
        grad = results[i]
        if grad is None:
            continue
        share = ctx.shares.get(i)
        if share is not None:
            with graphs.after(gm.graph, grad):
                results[i] = graphs.call(gm.graph, aten.mul.Tensor, (grad, 1 / copies), grad)
            continue
        axis = zero.family(placements)
        families.setdefault((axis, grad.meta["val"].dtype), []).append((i, grad))
    for (axis, _), members in families.items():
        members.sort(key=lambda m: order[m[1]])
        bucket: list[tuple[int, Node]] = []
        size = 0
        for k, (i, grad) in enumerate(members):
            bucket.append((i, grad))
            size += grad.meta["val"].numel() * grad.meta["val"].element_size()
            if size >= BUCKET or k == len(members) - 1:
                reduced = _reduce(gm, bucket, axis if shape_of_mesh[axis] > 1 else None, 1 / copies, output)
                for (position, _), node in zip(bucket, reduced, strict=True):
                    results[position] = node
                bucket, size = [], 0
    output.args = (tuple(results),)


def _reduce(
    gm: GraphModule, bucket: list[tuple[int, Node]], axis: str | None, scale: float, output: Node
) -> list[Node]:
    graph = gm.graph
    last = bucket[-1][1]
    grads = [g for _, g in bucket]
    with graph.inserting_after(last):
        marker = graph.call_function(min, (0, 1))
    with graph.inserting_before(marker):
        if axis is None:
            reduced = [graphs.call(graph, aten.mul.Tensor, (g, scale), g) for g in grads]
        else:
            flat = [graphs.call(graph, aten.reshape.default, (g, [-1]), g) for g in grads]
            whole = graphs.call(graph, aten.cat.default, (flat,), last) if len(flat) > 1 else flat[0]
            scaled = graphs.call(graph, aten.mul.Tensor, (whole, scale), last)
            summed = graphs.call(graph, ops.all_reduce.default, (scaled, axis), last)
    graph.erase_node(marker)
    if axis is None:
        return reduced
    for node in (*flat, whole, scaled):
        if node not in grads:
            node.meta["segment"] = "bucket"
    parts, start = [], 0
    with graph.inserting_before(output):
        for g in grads:
            n = math.prod(shape(g))
            part = graphs.call(graph, aten.slice.Tensor, (summed, 0, start, start + n), g) if len(grads) > 1 else summed
            parts.append(graphs.call(graph, aten.reshape.default, (part, list(shape(g))), g))
            for node in (part, parts[-1]):
                node.meta["segment"] = "views"
            start += n
    return parts
