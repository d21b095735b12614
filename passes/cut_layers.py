"""Equal layers compile once: a graph is cut into segments, and equal segments are one function.

Before:  a = x @ w1; b = relu(a); c = b @ w2; d = relu(c); g = all_reduce(d, "data")      # layers.0, layers.1
After:   (b,) = layer(x, w1);  (d,) = layer(b, w2);  g = all_reduce(d, "data")            # layer compiled once

A segment is what one numbered module (`layers.3`) computes, or what lies between them. Sums of gradients and gathers of
parameters (over data axes) stay outside, where they overlap with the segments that follow them; a layer's backward ends
with its large gradients and goes on as another segment, beside which these travel. Segments are equal when their ops,
constants, sizes and strides are, up to the names of sizes that only a run knows.

Needs: a partitioned graph, collectives still named by axis; module paths on its nodes, forward ones on those of a
backward. Leaves true: `run` changes no node of the graph it is given. Refuses: a graph in which no segment repeats, and
one whose segments need a size that no input tells (None: it is compiled whole).
"""

from __future__ import annotations

import operator
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from tedcompile import compat, graphs
from tedcompile.capture import layer_of, module_path
from tedcompile.passes import reduce_gradients

OUTSIDE = "outside"  # `meta["segment"]` of a node that is no part of a segment
DATA_AXES = ("data", "dp")
LEAST = 8  # nodes: a smaller segment is not worth a cut


@dataclass
class Cut:
    """`outer` calls `names[i]` as modules; `segments` are the distinct ones; `form` says which one each name is."""

    outer: GraphModule
    segments: list[GraphModule]
    form: dict[str, int]


def run(gm: GraphModule) -> Cut | None:
    steps = _steps(gm.graph)
    step = {n: i for i, (_, nodes) in enumerate(steps) for n in nodes}
    reads: list[list[Node]] = []
    for i, (_, nodes) in enumerate(steps):
        used = dict.fromkeys(a for n in nodes for a in n.all_input_nodes if step.get(a) != i)
        sizes = _sizes(gm.graph, list(used), nodes, step, i)
        if sizes is None:
            return None
        reads.append([*used, *sizes])
    wanted = {a for r in reads for a in r} | set(gm.graph.output_node().all_input_nodes)
    writes = [[n for n in nodes if n in wanted and not _tuple(n)] for _, nodes in steps]
    keys = [_key(n, r, w) if label != OUTSIDE else "" for (label, n), r, w in zip(steps, reads, writes)]
    again = Counter(k for k, (_, nodes) in zip(keys, steps) if k and len(nodes) >= LEAST)
    if not any(times > 1 for times in again.values()):
        return None

    outer, env, forms, form = Graph(), {}, {}, {}
    segments: list[GraphModule] = []
    for node in gm.graph.find_nodes(op="placeholder"):
        env[node] = outer.node_copy(node)
    for i, ((label, nodes), read, write, key) in enumerate(zip(steps, reads, writes, keys)):
        if label == OUTSIDE:
            for n in nodes:
                env[n] = outer.node_copy(n, lambda a: env[a])
            continue
        if key not in forms:
            forms[key] = len(segments)
            segments.append(_segment(gm, nodes, read, write))
        form[f"segment_{i}"] = forms[key]
        called = outer.create_node("call_module", f"segment_{i}", tuple(env[a] for a in read))
        for k, n in enumerate(write):
            env[n] = outer.call_function(operator.getitem, (called, k))
            env[n].meta = dict(n.meta)
    outer.output(torch.fx.map_arg(gm.graph.output_node().args[0], lambda a: env[a]))
    holder = torch.nn.Module()
    for name, n in form.items():
        holder.add_module(name, segments[n])
    for node in outer.find_nodes(op="get_attr"):
        setattr(holder, node.target, getattr(gm, node.target))
    return Cut(GraphModule(holder, outer), segments, form)


def _tuple(node: Node) -> bool:
    return isinstance(node.meta.get("val"), (tuple, list))


# ---- which nodes go together


def _steps(graph: Graph) -> list[tuple[str, list[Node]]]:
    """Segments and nodes outside, in an order in which each has what it reads."""
    labels = _labels(graph)
    steps: list[tuple[str, list[Node]]] = []
    step: dict[Node, int] = {}
    made: dict[str, list[int]] = {}  # the steps of each label
    # a gather of a parameter may be anywhere: in the middle of a layer it would part it
    outside = [n for n in graph.nodes if labels[n] == OUTSIDE and graphs.collective(n)]
    free = {n: None for n in outside if n.args[0].op == "placeholder"}
    for node in graph.nodes:
        if node.op in ("placeholder", "output") or node in free:
            continue
        need = max((step[a] for a in node.all_input_nodes if a in step), default=-1)
        label = labels[node]
        if label is None:  # autograd's own sums: with the value that comes last
            label = steps[need][0] if need >= 0 and steps[need][0] != OUTSIDE else ""
        at = None
        if node.target is operator.getitem and _tuple(node.args[0]):
            at = step[node.args[0]]
        elif label != OUTSIDE:
            at = next((i for i in made.get(label, ()) if i >= need), None)
        if at is None:
            at = len(steps)
            steps.append((label, []))
            made.setdefault(label, []).append(at)
        steps[at][1].append(node)
        step[node] = at
    reader = lambda n: min((step[u] for u in n.users if u in step), default=len(steps))
    places = [(reader(n), (OUTSIDE, [n])) for n in free] + list(enumerate(steps))
    return [
        one for _, one in sorted(places, key=lambda place: place[0])
    ]  # a gather before its reader: it is listed first


def _labels(graph: Graph) -> dict[Node, str | None]:
    labels: dict[Node, str | None] = {}
    layers: dict[Node, str] = {}
    for node in graph.nodes:
        axis = node.args[-1] if graphs.collective(node) else ""
        if "segment" in node.meta:
            labels[node] = node.meta["segment"]
        elif axis in DATA_AXES or node.op == "get_attr" or _writes(node):
            labels[node] = OUTSIDE
        elif node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack"):
            labels[node] = layers[node] = layer_of(module_path(node))
        else:
            labels[node] = None
    # what one layer makes for others too, of what no layer has made, is nobody's
    early = {n for n in layers if not layers[n]}
    for node in graph.nodes:
        shared = node.op == "placeholder" and len({layers.get(u) for u in node.users}) > 1
        if shared or (node in layers and early.issuperset(node.all_input_nodes)):
            early.add(node)
    for node in reversed(graph.nodes):
        if node in early and layers.get(node) and any(layers.get(u, layers[node]) != layers[node] for u in node.users):
            labels[node] = layers[node] = ""
    _end_early(graph, labels)
    return labels


def _end_early(graph: Graph, labels: dict[Node, str | None]) -> None:
    """Parts a layer behind the last of its large gradients, which are at least half as large as the largest."""
    order = {n: i for i, n in enumerate(graph.nodes)}
    members: dict[str, list[Node]] = {}
    for node, label in labels.items():
        if label and label != OUTSIDE:
            members.setdefault(label, []).append(node)
    sent: dict[str, list[Node]] = {}
    for node in graph.nodes:
        label = labels.get(node.args[0]) if graphs.collective(node) and labels[node] == OUTSIDE else None
        if label in members:
            sent.setdefault(label, []).append(node.args[0])
    for label, grads in sent.items():
        size = {g: g.meta["val"].nbytes for g in grads}
        largest = max(size.values())
        last = max(order[g] for g in grads if 2 * size[g] >= largest)
        rest = [n for n in members[label] if order[n] > last]
        if largest >= reduce_gradients.BUCKET and len(rest) >= LEAST:
            labels |= dict.fromkeys(rest, f"{label}, the rest")


def _writes(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


# ---- sizes that only a run knows

SYMBOL = re.compile(r"\b[us]\d+\b")


def _symbols(value: Any) -> set[str]:
    values = value if isinstance(value, (tuple, list)) else [value]
    found: set[str] = set()
    for v in values:
        if isinstance(v, torch.Tensor):
            found |= {s for d in (*v.shape, *v.stride()) if not isinstance(d, int) for s in SYMBOL.findall(str(d))}
        elif isinstance(v, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            found |= set(SYMBOL.findall(str(v)))
    return found


def _told(node: Node) -> set[str]:
    """The symbols that an input of a segment tells: the sizes of a tensor that are one, or a number that is one."""
    value = node.meta.get("val")
    sizes = value.shape if isinstance(value, torch.Tensor) else [value]
    return {str(s) for s in sizes if isinstance(s, torch.SymInt) and SYMBOL.fullmatch(str(s))}


def _sizes(graph: Graph, reads: list[Node], nodes: list[Node], step: dict[Node, int], at: int) -> list[Node] | None:
    """Further inputs that tell the sizes of those a segment reads; None where there are none."""
    needed = {s for n in reads for s in _symbols(n.meta.get("val"))}
    missing = needed - {s for n in reads for s in _told(n)}
    found = []
    for symbol in sorted(missing):
        teller = next((n for n in graph.nodes if symbol in _told(n) and step.get(n, -1) < at), None)
        if teller is None:
            return None
        found.append(teller)
    return found


# ---- equal segments


def _key(nodes: list[Node], reads: list[Node], writes: list[Node]) -> str:
    """The same text for segments that compute the same."""
    number = {n: f"%{i}" for i, n in enumerate([*reads, *nodes])}
    symbols: dict[str, str] = {}

    def renamed(text: Any) -> str:
        return SYMBOL.sub(lambda m: symbols.setdefault(m[0], f"n{len(symbols)}"), str(text))

    def describe(value: Any) -> str:
        if isinstance(value, (tuple, list)):
            return ",".join(map(describe, value))
        if isinstance(value, torch.Tensor):
            return renamed((value.dtype, value.device, tuple(value.shape), value.stride(), value.storage_offset()))
        if isinstance(value, torch.SymInt):
            return renamed((value, compat.range_of(value)))
        return type(value).__name__

    lines = [describe(n.meta.get("val")) for n in reads]
    for n in nodes:
        args, kwargs = torch.fx.map_arg((n.args, n.kwargs), lambda a: _Name(number[a]))
        lines.append(f"{n.op} {n.target} {renamed((args, kwargs))} : {describe(n.meta.get('val'))}")
    return "\n".join([*lines, *(number[n] for n in writes)])


class _Name(str):
    __repr__ = str.__str__


def _segment(gm: GraphModule, nodes: list[Node], reads: list[Node], writes: list[Node]) -> GraphModule:
    graph, env = Graph(), {}
    for n in reads:
        env[n] = graph.placeholder(n.name)
        env[n].meta = {"val": n.meta["val"]}
    for n in nodes:
        env[n] = graph.node_copy(n, lambda a: env[a])
    output = graph.output(tuple(env[n] for n in writes))
    output.meta["user_visible_output_idxs"] = list(
        range(len(writes))
    )  # the strides that their readers are compiled for
    graph.lint()
    return GraphModule(gm, graph)


# ---- running


class Outer:
    """Runs an outer graph; a value is let go before the call that reads it last."""

    _boxed_call = True

    def __init__(self, gm: GraphModule, segments: dict[str, Callable[[list], Any]]):
        self.gm, self.segments = gm, segments
        self.inputs = gm.graph.find_nodes(op="placeholder")
        last = {a: n for n in gm.graph.nodes for a in n.all_input_nodes}
        self.steps = [
            (n, [a for a in n.all_input_nodes if last[a] is n]) for n in gm.graph.nodes if n.op != "placeholder"
        ]
        self.unused = [n for n in self.inputs if n not in last]

    def __call__(self, args: list) -> Any:
        env: dict[Node, Any] = dict(zip(self.inputs, args, strict=True))
        args.clear()
        for node in self.unused:
            del env[node]
        for node, dying in self.steps:
            if node.op == "call_module":
                given: Any = [env[a] for a in node.args]
                run = self.segments[node.target]
                for a in dying:
                    del env[a]
                env[node] = run(given)
                continue
            if node.op == "get_attr":
                env[node] = getattr(self.gm, node.target)
                continue
            if node.op == "output":
                return torch.fx.map_arg(node.args[0], env.__getitem__)
            given = torch.fx.map_arg((node.args, node.kwargs), env.__getitem__)
            for a in dying:
                del env[a]
            env[node] = node.target(*given[0], **given[1])
            given = None
