"""Random ops draw from a seed that is an input of the graph.

Before:  y = dropout(x, 0.1, True)
After:   y = x * (rand(x, site(seed, 0), "uniform", axis) >= 0.1) / 0.9

So tp ranks draw the same numbers for a value they replicate (axis "") and different ones for their parts of a split
value (axis "tp"), data ranks draw their own, and a replay draws again what it drew. `expand` writes attention with
dropout out as products before layouts are decided; `run` replaces the random ops once they are.

Needs: layouts. Leaves true: `meta["role"] = ("seed", None)` on a new placeholder when the graph is random.
Refuses: a random op that is not in the table, by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch.fx import Graph, GraphModule, Node

from tedcompile import graphs
from tedcompile.capture import source_line
from tedcompile.layouts import R, aten, ndim, shape, val
from tedcompile.ops import ops


def expand(gm: GraphModule, ctx) -> None:
    for node in list(gm.graph.nodes):
        if node.target is aten.scaled_dot_product_attention.default and len(node.args) > 4 and node.args[4] > 0:
            with gm.graph.inserting_before(node):
                new = graphs.emit(gm.graph, _attention(node), node.args, dict(node.kwargs), node)
            node.replace_all_uses_with(new)
            gm.graph.erase_node(node)


def _attention(node: Node) -> Callable:
    queries, keys, width = shape(node.args[0])[-2], shape(node.args[1])[-2], shape(node.args[0])[-1]
    groups = shape(node.args[0])[-3] // shape(node.args[1])[-3] if ndim(node.args[0]) > 2 else 1
    device = val(node).device

    def attention(q, k, v, mask=None, dropout=0.0, causal=False, scale=None, enable_gqa=False):
        if groups > 1:
            k, v = (aten.repeat_interleave.self_int(t, groups, -3) for t in (k, v))
        products = aten.mul.Tensor(q, 1 / math.sqrt(width) if scale is None else scale)
        scores = aten.matmul.default(products, aten.transpose.int(k, -2, -1))
        if causal:
            ones = aten.new_ones.default(q, [queries, keys], dtype=torch.bool, device=device)
            mask = aten.tril.default(ones)
        if mask is not None:
            if causal or val(node.args[3]).dtype == torch.bool:
                scores = aten.masked_fill.Scalar(scores, aten.logical_not.default(mask), -math.inf)
            else:
                scores = aten.add.Tensor(scores, mask)
        weights = aten.dropout.default(aten.softmax.int(scores, -1), dropout, True)
        return aten.matmul.default(weights, v)

    return attention


# op -> function of draw and the op's arguments; draw(like, "uniform" | "normal") is fp32 in the shape of `like`
TABLE: dict = {
    aten.rand_like.default: lambda draw, x, **kw: draw(x, "uniform"),
    aten.randn_like.default: lambda draw, x, **kw: draw(x, "normal"),
    aten.rand.default: lambda draw, size, **kw: draw(aten.empty.memory_format(size, **kw), "uniform"),
    aten.randn.default: lambda draw, size, **kw: draw(aten.empty.memory_format(size, **kw), "normal"),
    aten.bernoulli.default: lambda draw, p, **kw: aten.lt.Tensor(draw(p, "uniform"), p),
    aten.bernoulli.p: lambda draw, x, p, **kw: aten.lt.Scalar(draw(x, "uniform"), p),
    aten.uniform.default: lambda draw, x, low=0.0, high=1.0, **kw: aten.add.Scalar(
        aten.mul.Scalar(draw(x, "uniform"), high - low), low
    ),
    aten.normal_functional.default: lambda draw, x, mean=0.0, std=1.0, **kw: aten.add.Scalar(
        aten.mul.Scalar(draw(x, "normal"), std), mean
    ),
    aten.exponential.default: lambda draw, x, rate=1.0, **kw: aten.div.Scalar(
        aten.neg.default(aten.log1p.default(aten.neg.default(draw(x, "uniform")))), rate
    ),
    aten.randint.low: lambda draw, low, high, size, **kw: aten.add.Scalar(
        aten.floor.default(aten.mul.Scalar(draw(aten.empty.memory_format(size), "uniform"), high - low)), low
    ),
    aten.randint.default: lambda draw, high, size, **kw: aten.floor.default(
        aten.mul.Scalar(draw(aten.empty.memory_format(size), "uniform"), high)
    ),
}


def _dropout(draw, x, p, train=True):
    keep = aten.ge.Scalar(draw(x, "uniform"), p)
    return aten.mul.Tensor(x, aten.mul.Scalar(keep, 1 / (1 - p) if p < 1 else 0.0))


def run(gm: GraphModule, ctx) -> None:
    graph, seed, number = gm.graph, None, 0
    for node in list(graph.nodes):
        if node.op != "call_function" or torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
            continue
        if node.target is aten.scaled_dot_product_attention.default:
            continue  # without dropout, or `expand` has taken it
        if node.target is aten.dropout.default and (node.args[1] == 0 or not node.args[2]):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
            continue
        replace = _dropout if node.target is aten.dropout.default else TABLE.get(node.target)
        if replace is None:
            raise ValueError(
                f"the random op {node.target} at {source_line(node)} cannot be drawn alike on all tp ranks"
            )
        if seed is None:
            seed = _seed(gm)
        layout = node.meta["layout"]
        axis = "tp" if layout.kind == "S" else ""

        with graphs.after(graph, seed):
            own = graphs.call(graph, ops.site.default, (seed, number), seed)
            own.meta["layout"] = R
        with graph.inserting_before(node):
            new = _emit(graph, replace, node, own, axis)
        node.replace_all_uses_with(new)
        graph.erase_node(node)
        number += 1


def _emit(graph: Graph, replace: Callable, node: Node, seed: Node, axis: str) -> Node:
    dtype = val(node).dtype
    kwargs = {k: v for k, v in node.kwargs.items() if k not in ("generator", "memory_format", "pin_memory", "layout")}
    if node.target in (aten.rand_like.default, aten.randn_like.default):
        kwargs = {}

    def function(source, *args, **kw):
        def draw(like, kind):
            return ops.rand.default(like, source, kind, axis)

        return aten.to.dtype(replace(draw, *args, **kw), dtype)

    new = graphs.emit(graph, function, (seed, *node.args), kwargs, node)
    pending = [new]
    while pending:
        n = pending.pop()
        if "layout" not in n.meta:
            n.meta["layout"] = node.meta["layout"]
            pending.extend(n.all_input_nodes)
    return new


def _seed(gm: GraphModule) -> Node:
    last = [n for n in gm.graph.nodes if n.op == "placeholder"][-1]
    with gm.graph.inserting_after(last):
        seed = gm.graph.placeholder("seed")
    with val(last).fake_mode if hasattr(val(last), "fake_mode") else torch.no_grad():
        seed.meta["val"] = torch.empty((), dtype=torch.int64, device="cpu")
    seed.meta.update(role=("seed", None), layout=R, grad=False, weights_only=False)
    return seed
