"""The ordered list of passes and their runner: lints, checks layouts, times, counts nodes and collectives."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch.fx import GraphModule, Node

from tedcompile import graphs
from tedcompile.capture import Captured
from tedcompile.layouts import Layout
from tedcompile.mesh import MeshShape
from tedcompile.passes import causal_mask, check, functionalise, randomness, recognise_sorted, shard_experts, shard_tensors, sum_buffers

# ted op -> the kind of collective that a reader knows
KINDS = {
    "all_reduce": "all_reduce", "all_max": "all_reduce", "gather": "all_gather", "exchange_counts": "all_to_all",
    "all_to_all": "all_to_all", "all_to_all_like": "all_to_all",
}  # fmt: skip

FORWARD: list[tuple[str, Callable[[GraphModule, Any], None]]] = [
    ("functionalise", functionalise.run),
    ("recognise_sorted", recognise_sorted.run),
    ("causal_mask", causal_mask.run),
    ("expand_random", randomness.expand),
    ("shard_tensors", shard_tensors.run),
    ("shard_experts", shard_experts.run),
    ("randomness", randomness.run),
    ("sum_buffers", sum_buffers.run),
]
CHECKED_FROM = "shard_tensors"


@dataclass
class Record:
    """What one pass did."""

    name: str
    seconds: float
    nodes_before: int
    nodes_after: int
    inserted: dict[str, int]
    removed: dict[str, int]
    before: str = ""
    after: str = ""


@dataclass
class Context:
    """What passes know and leave behind. `fixed`: layouts by parameter name that an earlier signature has decided."""

    shape: MeshShape
    decided: dict[str, dict[str, Layout]] | None = None
    dump: str = ""
    mutations: dict[Node, Node] = field(default_factory=dict)
    replicated: list[tuple[Node, str]] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)
    gradients: dict[int, dict[str, Layout]] = field(default_factory=dict)
    fixed: dict[Node, Layout] | None = None

    def mutated(self, gm: GraphModule) -> dict[Node, Node]:
        """The last value of each buffer that the forward changes: the graph's last outputs."""
        values = gm.graph.output_node().args[0]
        return dict(zip(self.mutations, values[len(values) - len(self.mutations) :], strict=True))

    def fixed_axis(self, weight: Node, axis: str) -> bool | None:
        """Whether an earlier signature split the weight over the axis; None when nothing is decided yet."""
        return None if self.decided is None else axis in self.decided.get(weight.meta["role"][1], {})


def collectives(gm: GraphModule) -> Counter[str]:
    names = (n.target._schema.name.removeprefix("ted::") for n in gm.graph.nodes if _ours(n))
    return Counter(KINDS[name] for name in names if name in KINDS)


def _ours(node: Node) -> bool:
    return node.op == "call_function" and getattr(node.target, "namespace", "") == "ted"


def run_forward(captured: Captured, ctx: Context) -> GraphModule:
    """Captured graph to distributed forward graph, in place."""
    gm = captured.gm
    for node in gm.graph.nodes:
        graphs.set_facts(node)
    if ctx.decided is not None:
        ctx.fixed = {
            n: ctx.decided.get(n.meta["role"][1], {}).get("tp", Layout("R"))
            for n in gm.graph.nodes
            if n.meta.get("role", ("",))[0] == "parameter"
        }
    output = gm.graph.output_node()
    checked = False
    for name, run in FORWARD:
        checked = checked or name == CHECKED_FROM
        run_pass(name, run, gm, ctx)
        if name == "functionalise" and ctx.mutations:
            # the last values of buffers are outputs too, so that no pass takes them for dead
            output.args = ((*output.args[0], *ctx.mutations.values()),)
        if checked:
            check.run(gm, ctx)
    return gm


def run_pass(name: str, run: Callable, gm: GraphModule, ctx: Context) -> None:
    nodes, before = len(gm.graph.nodes), collectives(gm)
    text = str(gm.graph) if ctx.dump == name else ""
    start = time.perf_counter()
    run(gm, ctx)
    seconds = time.perf_counter() - start
    gm.graph.lint()
    after = collectives(gm)
    ctx.records.append(
        Record(name, seconds, nodes, len(gm.graph.nodes), dict(after - before), dict(before - after), text)
    )
    if ctx.dump == name:
        ctx.records[-1].after = str(gm.graph)
