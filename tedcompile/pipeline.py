"""The ordered list of passes and their runner: lints, checks layouts, times, counts nodes and collectives."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch.fx import GraphModule, Node

from tedcompile import cost, graphs, machines, zero
from tedcompile.capture import Captured, module_path
from tedcompile.layouts import Layout
from tedcompile.machines import Machine
from tedcompile.mesh import MeshShape
from tedcompile.ops import ops
from tedcompile.options import Options
from tedcompile.passes import (
    causal_mask,
    check,
    chunk_tokens,
    dispatch_tokens,
    drop_duplicates,
    functionalise,
    gather_parameters,
    plan_dispatch,
    randomness,
    recognise_loop,
    recognise_modules,
    recognise_products,
    recognise_sorted,
    separate_experts,
    shard_experts,
    shard_tensors,
    simplify_collectives,
    sum_buffers,
)
from tedcompile.prove import Prover

FORWARD: list[tuple[str, Callable[[GraphModule, Any], None]]] = [
    ("functionalise", functionalise.run),
    ("recognise_loop", recognise_loop.run),
    ("recognise_modules", recognise_modules.run),
    ("recognise_products", recognise_products.run),
    ("recognise_sorted", recognise_sorted.run),
    ("unpack_experts", separate_experts.unpack),
    ("causal_mask", causal_mask.run),
    ("expand_random", randomness.expand),
    ("sum_buffers", sum_buffers.run),
    ("plan_dispatch", plan_dispatch.run),
    ("drop_duplicates", drop_duplicates.run),
    ("shard_tensors", shard_tensors.run),
    ("simplify_collectives", simplify_collectives.run),
    ("dispatch_tokens", dispatch_tokens.run),
    ("shard_experts", shard_experts.run),
    ("chunk_tokens", chunk_tokens.run),
    ("separate_experts", separate_experts.run),
    ("randomness", randomness.run),
]
RECOGNISERS = ("recognise_loop", "recognise_modules", "recognise_products", "recognise_sorted")
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
    before: Any = ""
    after: Any = ""


@dataclass
class Context:
    """What passes know and leave behind.

    `fixed`: layouts by parameter name that an earlier signature has decided. `show` makes of the graph what the record
    of the pass named `dump` keeps, before and after it. `outputs`: the number of outputs of the
    joint graph that are the forward's; `shares`: of the gradients among them, how ZeRO shares them out. `saved`: bytes
    kept for the backward; `replay`: seconds of recomputation in it, predicted. `stacked`: placements of parameters that
    only the graph has, by name.
    """

    shape: MeshShape
    decided: dict[str, dict[str, Layout]] | None = None
    dump: str = ""
    show: Callable[[GraphModule], Any] = lambda gm: str(gm.graph)
    options: Options = field(default_factory=Options)
    machine: Machine = field(default_factory=lambda: machines.default("cuda"))
    mutations: dict[Node, Node] = field(default_factory=dict)
    replicated: list[tuple[Node, str]] = field(default_factory=list)
    unfit: list[str] = field(default_factory=list)
    choices: list[tuple[Node, cost.Block, dict]] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)
    gradients: dict[int, dict[str, Layout]] = field(default_factory=dict)
    shares: dict[int, zero.Share] = field(default_factory=dict)
    outputs: int = 0
    saved: int = 0
    replay: float = 0.0
    fixed: dict[Node, Layout] | None = None
    prove: Prover | None = None
    stacked: dict[str, dict[str, Layout]] = field(default_factory=dict)

    def mutated(self, gm: GraphModule) -> dict[Node, Node]:
        """The last value of each buffer that the forward changes: the graph's last outputs."""
        values = gm.graph.output_node().args[0]
        return dict(zip(self.mutations, values[len(values) - len(self.mutations) :], strict=True))

    def share(self, node: Node) -> zero.Share | None:
        """How ZeRO splits a parameter's gradient, or the parameter; None when it does not."""
        if self.options.zero < 2 or node.meta["role"][0] != "parameter":
            return None
        shape, placements = node.meta["val"].shape, node.meta.get("placements", {})
        found = zero.share(node.meta["role"][1], self.options.zero, shape, placements, self.shape)
        return found if found.dim is not None else None

    def fixed_axis(self, weight: Node, axis: str) -> bool | None:
        """Whether an earlier signature split the weight over the axis; None when nothing is decided yet."""
        return None if self.decided is None else axis in self.decided.get(weight.meta["role"][1], {})


def collectives(gm: GraphModule) -> Counter[str]:
    return Counter(kind for n in gm.graph.nodes if (kind := graphs.collective(n)))


def recognised(captured: Captured) -> GraphModule:
    """The graph of a capture in its recognised form, on one device and without proof: what a proof looks at."""
    gm, ctx = captured.gm, Context(MeshShape())
    gm.meta["constants"] = captured.constants
    for node in gm.graph.nodes:
        graphs.set_facts(node)
    for name, run in FORWARD:
        if name in ("functionalise", *RECOGNISERS, "separate_experts"):
            run(gm, ctx)
    gm.meta["unfit"] = ctx.unfit
    return gm


def _licensed(captured: Captured, ctx: Context) -> bool:
    """Whether every module in which control flow was assumed is part of a proven block."""
    assert captured.calls is not None
    return ctx.prove is not None and all(map(ctx.prove.covers, captured.calls.assumed))


def run_forward(captured: Captured, ctx: Context) -> GraphModule:
    """Captured graph to distributed forward graph, in place.

    Raises the refusal of a capture that assumed control flow, unless what was assumed is part of a proven block.
    """
    gm = captured.gm
    if captured.model is not None and captured.calls is not None:
        ctx.prove = Prover(captured.model, captured, recognised)
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
        if name in ctx.options.off:
            continue
        checked = checked or name == CHECKED_FROM
        run_pass(name, run, gm, ctx)
        if name == RECOGNISERS[-1] and captured.refusal is not None and not _licensed(captured, ctx):
            why = "; ".join(dict.fromkeys(reason for _, reason in ctx.replicated))
            raise ValueError(f"{captured.refusal}{'; ' if why else ''}{why}") from captured.refusal
        if name == "functionalise" and ctx.mutations:
            # the last values of buffers are outputs too, so that no pass takes them for dead
            output.args = ((*output.args[0], *ctx.mutations.values()),)
        if checked:
            check.run(gm, ctx)
    if ctx.options.zero > 1:
        run_pass("gather_parameters", gather_parameters.run, gm, ctx)
    return gm


def run_pass(name: str, run: Callable, gm: GraphModule, ctx: Context) -> None:
    nodes, before = len(gm.graph.nodes), collectives(gm)
    text = ctx.show(gm) if ctx.dump == name else ""
    start = time.perf_counter()
    run(gm, ctx)
    seconds = time.perf_counter() - start
    gm.graph.lint()
    after = collectives(gm)
    ctx.records.append(
        Record(name, seconds, nodes, len(gm.graph.nodes), dict(after - before), dict(before - after), text)
    )
    if ctx.dump == name:
        ctx.records[-1].after = ctx.show(gm)


def where(node: Node) -> str:
    """How users know a node: the parameter's name, or the module's path."""
    role = node.meta.get("role")
    return role[1] if role else module_path(node)


def placements(gm: GraphModule) -> dict[str, dict[str, Layout]]:
    """The layout over each axis of every parameter that the graph reads, by name."""
    return {
        n.meta["role"][1]: n.meta.get("placements", {})
        for n in gm.graph.nodes
        if n.op == "placeholder" and n.meta["role"][0] == "parameter"
    }


def require_axes(gm: GraphModule, ctx: Context) -> None:
    """ValueError for a tp or ep that splits nothing at all: the mesh would only multiply the work."""
    split = {axis for layouts in placements(gm).values() for axis in layouts}
    for axis in ("tp", "ep"):
        size = ctx.shape[axis]
        if size == 1 or axis in split:
            continue
        found = [(n, r) for n, r in ctx.replicated if (n.op == "placeholder") == (axis == "tp")]
        why = f"{where(found[0][0])}: {found[0][1]}" if found else "the model has no part that it could split"
        sizes = sorted({d for n in gm.graph.nodes for d in _divisors(n, axis)})
        hint = f"; {axis} = {', '.join(map(str, sizes[:8]))} would" if sizes and not why.endswith(" would") else ""
        raise ValueError(f"{axis}={size} cannot work, no parameter divides over it: {why}{hint}")


def _divisors(node: Node, axis: str) -> list[int]:
    if axis == "ep" and node.target is ops.permute.default:
        return [d for d in range(2, node.args[2] + 1) if node.args[2] % d == 0]
    role = node.meta.get("role", ("",))
    if axis == "tp" and role[0] == "parameter" and node.meta["val"].dim() > 1:
        last = node.meta["val"].shape[-1]
        return [d for d in (2, 4, 8) if last % d == 0]
    return []
