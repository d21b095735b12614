"""From the distributed forward graph to callables: autograd, passes on the joint graph, partition, lowering, Inductor.

Autograd derives the backward (AOTAutograd's joint graph) from the rewritten forward; no backward is written by hand.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule, Interpreter, Node

from tedcompile import compat, graphs, kernels, replay, watch
from tedcompile.layouts import D, S
from tedcompile.options import Options
from tedcompile.passes import (
    checkpoint,
    cut_layers,
    deterministic,
    fuse_experts,
    fuse_loss,
    gather_parameters,
    lower,
    own_memory,
    peepholes,
    reduce_gradients,
    save_collectives,
    small_sizes,
)
from tedcompile.pipeline import Context, run_pass

BACKENDS = ("inductor", "eager")


class _Forward(torch.nn.Module):
    """Runs the graph node by node, with the autocast state each node was captured under."""

    def __init__(self, gm: GraphModule, device: torch.device, tp: int):
        super().__init__()
        for node in gm.graph.nodes:
            if node.target in graphs.RAGGED:  # the joint graph has a symbol there; "custom" reaches it
                layout = node.meta["layout"]
                own = (layout[0] if isinstance(layout, tuple) else layout) in (D, S(0))
                node.meta["custom"] = {"rows": graphs.rows(node) // (tp if own else 1)}
        self.run, self.device = _Runner(gm, device).run, device

    def forward(self, *args):
        return self.run(*args)


class _Runner(Interpreter):
    def __init__(self, gm: GraphModule, device: torch.device):
        super().__init__(gm, garbage_collect_values=False)
        self.device = device

    def run_node(self, n: Node) -> Any:
        state = n.meta.get("autocast")
        if state is None:
            return super().run_node(n)
        _, dtype, enabled, _ = state
        with torch.autocast(self.device.type, dtype=dtype, enabled=enabled, cache_enabled=False):
            return super().run_node(n)


def fingerprint(gm: GraphModule) -> str:
    """A hash of a graph's text with all shapes: equal on all ranks, or the ranks must not start."""
    return hashlib.sha256(describe(gm).encode()).hexdigest()


def describe(gm: GraphModule) -> str:
    lines = []
    for n in gm.graph.nodes:
        value = n.meta.get("val")
        shape = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, torch.Tensor) else ""
        lines.append(f"{n.name} = {n.target}{n.args}{n.kwargs} : {shape} {n.meta.get('layout', '')}")
    return "\n".join(lines)


def _move_constants(gm: GraphModule, device: torch.device) -> None:
    """Capture runs on fake cpu tensors; factories in the graph must make theirs on the real device."""
    for node in gm.graph.nodes:
        swap = lambda x: device if isinstance(x, torch.device) else x
        if any(isinstance(x, torch.device) for x in (*node.args, *node.kwargs.values())):
            node.args, node.kwargs = tuple(map(swap, node.args)), {k: swap(v) for k, v in node.kwargs.items()}
        elif node.op == "call_function" and node.target in FACTORIES:
            node.kwargs = {**node.kwargs, "device": device}


aten = torch.ops.aten
FACTORIES = {aten.arange.default, aten.arange.start, aten.arange.start_step, aten.zeros.default, aten.ones.default,
             aten.full.default, aten.empty.memory_format, aten.scalar_tensor.default, aten.eye.default}  # fmt: skip


def build(
    gm: GraphModule,
    ctx: Context,
    inputs: list[torch.Tensor],
    backend: str,
    device: torch.device,
    names: dict[str, str],
    autocast: tuple[torch.dtype, bool] | None,
) -> Callable:
    """Compiles a distributed forward graph.

    `inputs` have the local shapes and dtypes, in the order of the placeholders, and tell which need gradients. Returns
    a function of the same inputs that gives the graph's outputs and takes part in autograd.
    """
    if device.type != "cpu":
        _move_constants(gm, device)
    if device.type == "cuda" and kernels.installed() and "fuse_experts" not in ctx.options.off:
        run_pass("fuse_experts", fuse_experts.run, gm, ctx)
    train = torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
    if "fuse_loss" not in ctx.options.off:
        run_pass("fuse_loss", functools.partial(fuse_loss.run, gradients=train), gm, ctx)
    mode = compat.FakeTensorMode(shape_env=compat.ShapeEnv())
    fakes = []
    for t in inputs:
        with mode:
            fake = torch.empty(t.shape, dtype=t.dtype, device=t.device)
        fakes.append(fake.requires_grad_(t.requires_grad))
    outer = (
        torch.autocast(device.type, dtype=autocast[0], enabled=autocast[1], cache_enabled=False)
        if autocast
        else contextlib.nullcontext()
    )
    deterministic = ctx.shape.tp > 1  # tp ranks hold values alike: they must be bit-equal
    with contextlib.ExitStack() as stack:
        stack.enter_context(mode)
        stack.enter_context(compat.lazy_modules())
        with outer:
            joint = compat.aot_export_joint_with_descriptors(
                stack,
                _Forward(gm, device, ctx.shape.tp),
                tuple(fakes),
                decompositions=compat.select_decomp_table(ctx.shape.world > 1) if backend == "inductor" else None,
            )
        if train:
            graph = joint.graph_module
            _erase_asserts(graph)
            first = len(graph.graph.output_node().args[0]) - len(inputs)
            placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
            ctx.gradients = {
                first + i: n.meta.get("placements", {})
                for i, n in enumerate(placeholders)
                if n.meta["role"][0] == "parameter"
            }
            ctx.shares = {first + i: share for i, n in enumerate(placeholders) if (share := ctx.share(n))}
            ctx.outputs = first
            for name, run in _joint_passes(ctx.options):
                run_pass(name, run, graph, ctx)
        results = first if train else len(joint.graph_module.graph.output_node().args[0])
        compiler = _compiler(backend, names, deterministic, "cut_layers" not in ctx.options.off)
        run_forward, run_backward = compiler(False, not train), compiler(True, False)
        if backend == "inductor" and "cuda_graphs" not in ctx.options.off:
            roles = [n.meta["role"][0] for n in gm.graph.find_nodes(op="placeholder")]
            run_forward = replay.recorded(run_forward, {i for i, r in enumerate(roles) if r == "input"}, results)
            run_backward = replay.recorded(run_backward, None, 0)
        with compat.undonated():
            return compat.aot_compile_joint_with_descriptors(
                joint,
                partition_fn=functools.partial(partition, ctx),
                fw_compiler=run_forward,
                bw_compiler=run_backward,
            )


def _joint_passes(options: Options) -> list[tuple[str, Callable]]:
    passes: list[tuple[str, Callable]] = []
    if "simplify_collectives" not in options.off:
        passes.append(("peepholes", peepholes.run))
    passes += [
        ("reduce_gradients", reduce_gradients.run),
        ("small_sizes", small_sizes.run),
        ("deterministic", deterministic.run),
    ]
    if options.checkpoint != "none":
        if options.saves_collectives:
            passes.append(("save_collectives", save_collectives.run))
        passes.append(("checkpoint", checkpoint.run))
    if options.zero > 1:
        passes.append(("free_parameters", gather_parameters.free))
    return passes


def partition(ctx: Context, joint: GraphModule, inputs: Any, **options: Any) -> tuple[GraphModule, GraphModule]:
    forward, backward = compat.partition(joint, inputs, **options)
    ctx.saved, work = checkpoint.costs(joint, forward, backward, ctx.outputs)
    ctx.replay = work / ctx.machine.copy
    checkpoint.replay(joint, backward)
    backward.recompile()
    return forward, backward


def _erase_asserts(gm: GraphModule) -> None:
    for node in reversed(gm.graph.nodes):
        if node.op == "call_function" and "assert" in str(node.target) and not node.users:
            gm.graph.erase_node(node)


def _compiler(backend: str, names: dict[str, str], deterministic: bool, cut_equal: bool):
    """`deterministic`: what tp ranks hold alike must be bit-equal, and one reduction tuned otherwise is enough."""

    def kind(backward: bool, inference: bool):
        place = "the backward" if backward else "the forward"

        def compile_graph(gm: GraphModule, example_inputs: list) -> Callable:
            if backward:
                own_memory.run(gm)
            found = watch.collectives(gm)
            return watch.watched(compile_layers(gm, example_inputs), found, place, names)

        def compile_layers(gm: GraphModule, example_inputs: list) -> Callable:
            cut = cut_layers.run(gm) if cut_equal else None
            if cut is None:
                return compile_segment(gm, example_inputs)
            lower.run(cut.outer, names, in_place=True)
            with compat.own_tracing():
                runs = [compile_segment(s, [n.meta["val"] for n in s.graph.find_nodes(op="placeholder")])
                        for s in cut.segments]  # fmt: skip
            return cut_layers.Outer(cut.outer, {name: runs[i] for name, i in cut.form.items()})

        def compile_segment(gm: GraphModule, example_inputs: list) -> Callable:
            sends = any(map(graphs.collective, gm.graph.nodes))
            lower.run(gm, names)
            if backend == "inductor":
                options = dict(is_backward=backward, is_inference=inference)
                options |= dict(deterministic=deterministic, ordered=sends)
                return compat.compile_fx_inner(gm, example_inputs, **options)
            for node in gm.graph.nodes:  # a kernel's strides may be others than its fake's: those of gelu on CPUs are
                if node.target is aten.view.default:
                    node.target = aten.reshape.default
            gm.recompile()
            return compat.make_boxed_func(gm.forward)

        return compile_graph

    return kind
