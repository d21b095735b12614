"""Small helpers that every pass uses: new nodes with metadata, functions turned into nodes, facts about values."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.fx import Graph, Node, Proxy
from torch.fx.proxy import GraphAppendingTracer

from tedcompile.layouts import aten
from tedcompile.ops import ops

# ted op -> the kind of collective that a reader knows
KINDS = {
    "all_reduce": "all_reduce", "all_max": "all_reduce", "gather": "all_gather", "exchange_counts": "all_to_all",
    "all_to_all": "all_to_all", "all_to_all_like": "all_to_all", "start_all_to_all": "all_to_all",
    "gather_enter": "all_gather",
    "reduce_scatter": "reduce_scatter", "gather_rows": "all_gather", "gather_rows_like": "all_gather",
    "scatter_rows": "reduce_scatter", "own_experts": "all_to_all", "part_of_experts": "all_to_all",
}  # fmt: skip

KEPT = ("nn_module_stack", "stack_trace", "autocast", "pinned")


# moves between layouts, which change where a value is and not what it is
PLACES = {ops.slice.default, ops.gather.default, ops.gather_enter.default, ops.reduce_scatter.default,
          ops.gather_rows.default, ops.scatter_rows.default, ops.own_experts.default}  # fmt: skip

# namespaces of ops that run no user's Python, have no backward of a user's, and say in their schemas what is a view
NAMESPACES = {"aten", "prims", "ted", "_operator"}

# ops whose number of rows depends on data, and which of several results has them
RAGGED = {ops.all_to_all.default: 0, ops.select.default: 0, ops.gather_rows.default: 0, ops.route_some.default: 2}


def namespace(node: Node) -> str:
    """Of the op that a node calls; of a plain function its module."""
    return str(getattr(node.target, "namespace", None) or getattr(node.target, "__module__", ""))


def rows(node: Node) -> Any:
    """The number of rows of a ragged op's result."""
    value = node.meta["val"]
    return (value[RAGGED[node.target]] if isinstance(value, (tuple, list)) else value).shape[0]


def value_of(node: Node) -> Any:
    """The fake *global* value of a node from those of its arguments; a move between layouts does not change it."""
    if node.target in PLACES:
        return node.args[0].meta["val"]
    args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    return node.target(*args, **kwargs)


def call(graph: Graph, target: Any, args: tuple, like: Node, val: Any = None) -> Node:
    """A new node that belongs to the same module and source line as `like`."""
    node = graph.call_function(target, args)
    node.meta = {k: like.meta[k] for k in KEPT if k in like.meta}
    node.meta["val"] = value_of(node) if val is None else val
    set_facts(node)
    return node


@contextlib.contextmanager
def after(graph: Graph, node: Node) -> Iterator[None]:
    """New nodes follow `node` in the order they are made."""
    with graph.inserting_after(node):
        marker = graph.call_function(operator.add, (1, 1))
    with graph.inserting_before(marker):
        yield
    graph.erase_node(marker)


def set_args(node: Node, args: tuple) -> None:
    """Other arguments for a node of a joint graph, also in what tells Inductor their strides."""
    node.args = args
    if "eager_input_vals" in node.meta:
        node.meta["eager_input_vals"] = (torch.fx.map_arg(args, lambda n: n.meta["val"]), {})


def emit(graph: Graph, function: Callable, args: tuple, kwargs: dict, like: Node) -> Node:
    """The nodes a function makes of its arguments; the last one has the value of `like`."""
    tracer = GraphAppendingTracer(graph)
    proxies = torch.fx.map_arg((args, kwargs), lambda n: Proxy(n, tracer))
    result = function(*proxies[0], **proxies[1]).node
    given: set[Node] = set()
    torch.fx.map_arg((args, kwargs), given.add)

    def annotate(node: Node) -> None:
        if node in given or "val" in node.meta:
            return
        for a in node.all_input_nodes:
            annotate(a)
        node.meta = {k: like.meta[k] for k in KEPT if k in like.meta}
        node.meta["val"] = like.meta["val"] if node is result else value_of(node)
        set_facts(node)

    annotate(result)
    return result


# operands that get no gradient although they are floating (only their size or dtype is read); None stands for all
NO_GRADIENT: dict[Any, tuple[int, ...] | None] = {
    ops.per_expert.default: (1, 2),
    ops.all_to_all_like.default: (1, 2),
    **dict.fromkeys(
        (aten.zeros_like.default, aten.ones_like.default, aten.full_like.default, aten.empty_like.default,
         aten.new_zeros.default, aten.new_ones.default, aten.new_full.default, aten.new_empty.default,
         aten.detach.default, ops.all_max.default, ops.rand.default)
    ),
}  # fmt: skip


def differentiated(node: Node) -> list[Node]:
    """The operands to which autograd passes a gradient, where they have one."""
    skip = NO_GRADIENT.get(node.target, ())
    if skip == ():
        return node.all_input_nodes
    found: list[Node] = []
    if skip is not None:
        torch.fx.map_arg(
            ([a for i, a in enumerate(node.args) if i not in skip], dict(node.kwargs)), lambda n: found.append(n)
        )
    return found


def set_facts(node: Node) -> None:
    """`grad`: a gradient flows through this value. `weights_only`: it is made of parameters alone."""
    role = node.meta.get("role", ("",))
    if node.op == "placeholder":
        node.meta["grad"] = role[0] == "parameter" or node.meta.get("requires_grad", False)
        node.meta["weights_only"] = role[0] == "parameter"
        return
    inputs = node.all_input_nodes
    value = node.meta.get("val")
    floating = not isinstance(value, torch.Tensor) or value.is_floating_point() or value.is_complex()
    node.meta["grad"] = floating and any(a.meta.get("grad") for a in differentiated(node))
    sources = inputs[:1] if node.target is ops.per_expert.default else inputs
    node.meta["weights_only"] = bool(sources) and all(a.meta.get("weights_only") for a in sources)


def collective(node: Node) -> str:
    """The kind of collective that a node is, empty for others."""
    ours = node.op == "call_function" and getattr(node.target, "namespace", "") == "ted"
    return KINDS.get(node.target._schema.name.removeprefix("ted::"), "") if ours else ""


def forward_nodes(graph: Graph, outputs: int | None = None) -> dict[Node, None]:
    """What the first `outputs` outputs are made of, in order: a joint graph's forward."""
    made: set[Node] = set()
    pending = [a for a in graph.output_node().args[0][:outputs] if isinstance(a, Node)]
    while pending:
        node = pending.pop()
        if node not in made:
            made.add(node)
            pending += node.all_input_nodes
    return {n: None for n in graph.nodes if n in made}


def join_equal(graph: Graph) -> None:
    """What a functional graph computes twice, it computes once; random numbers are drawn as often as before."""
    seen: dict[tuple, Node] = {}
    for node in list(graph.nodes):
        if node.op != "call_function" or torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            continue
        key = (node.target, repr(node.args), repr(node.kwargs))
        if key in seen:
            node.replace_all_uses_with(seen[key])
            graph.erase_node(node)
        else:
            seen[key] = node


def erase_unused(graph: Graph) -> None:
    """Dead code of a functional graph, random ops and reads of sizes too."""
    graph.eliminate_dead_code(lambda n: n.op in ("placeholder", "output"))


class Unknown(Exception):
    """The value of a node depends on something that is not given."""


def evaluate(node: Node, values: dict[Node, Any]) -> Any:
    """The real value of a node that depends on nothing but the nodes in `values`, to which it adds. Else `Unknown`."""
    pending = [node]
    while pending:
        n = pending[-1]
        if n in values:
            pending.pop()
            continue
        if n.op != "call_function" or torch.Tag.nondeterministic_seeded in getattr(n.target, "tags", ()):
            raise Unknown(n.name)
        missing = [a for a in n.all_input_nodes if a not in values]
        if missing:
            pending.extend(missing)
            continue
        args, kwargs = torch.fx.map_arg((n.args, n.kwargs), values.__getitem__)
        values[n] = STABLE.get(n.target, n.target)(*args, **kwargs)
    return values[node]


# any order that an unstable sort may give is right: the stable one is taken, so that two sorts agree
STABLE = {
    aten.argsort.default: lambda x, dim=-1, descending=False: x.argsort(dim=dim, descending=descending, stable=True),
    aten.sort.default: lambda x, dim=-1, descending=False: x.sort(dim=dim, descending=descending, stable=True),
}


def sort_nodes(graph: Graph) -> None:
    """Moves nodes behind what they read, and leaves the order as it is otherwise."""
    pending, ready = list(reversed(graph.nodes)), set()
    waiting: dict[Node, list[Node]] = {}
    last: Node | None = None
    while pending:
        node = pending.pop()
        missing = [a for a in node.all_input_nodes if a not in ready]
        if missing:
            waiting.setdefault(missing[-1], []).append(node)
            continue
        ready.add(node)
        if last is not None and last.next is not node:
            last.append(node)
        last = node
        pending.extend(reversed(waiting.pop(node, [])))
