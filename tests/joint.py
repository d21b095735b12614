"""A module compiled for one rank of a mesh, without processes: its joint graph, and what that is parted into."""

from __future__ import annotations

import contextlib
import unittest.mock
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule, Node

from tedcompile import compile, pipeline
from tedcompile.capture import capture
from tedcompile.mesh import MeshShape
from tedcompile.options import Options
from tedcompile.runtime import select_outputs


class Stop(Exception):
    """Raised where a test has seen enough of a compilation."""


def build(
    model: torch.nn.Module, kwargs: dict[str, Any], mesh: MeshShape, **options
) -> tuple[Callable, list[torch.Tensor]]:
    """The compiled function of a training step (eager backend) and inputs for it; parameters are zeros where split."""
    captured = capture(model.train(), kwargs)
    select_outputs(captured, model, True, ())
    ctx = pipeline.Context(mesh, options=Options.of(**options))
    gm = pipeline.run_forward(captured, ctx)
    inputs = []
    for node in gm.graph.nodes:
        if node.op != "placeholder":
            continue
        kind, name = node.meta["role"]
        if kind in ("parameter", "whole"):
            value = model.get_parameter(name).detach()
            local = tuple(value.shape)
            for axis, layout in node.meta.get("placements", {}).items():
                local = layout.local(local, mesh[axis])
            if share := ctx.share(node):
                local = tuple(n // mesh[share.axis] if d == share.dim else n for d, n in enumerate(local))
            value = value.clone() if local == tuple(value.shape) else torch.zeros(local, dtype=value.dtype)
            inputs.append(value.requires_grad_(kind == "parameter"))
        elif kind == "buffer":
            inputs.append(model.get_buffer(name).clone())
        elif kind == "constant":
            inputs.append(captured.constants[name])
        elif kind == "seed":
            inputs.append(torch.zeros((), dtype=torch.int64))
        else:
            inputs.append(torch.utils._pytree.tree_leaves(kwargs)[name])
    return compile.build(gm, ctx, inputs, "eager", torch.device("cpu"), {}, None), inputs


def parts(
    model: torch.nn.Module, kwargs: dict[str, Any], mesh: MeshShape, **options
) -> tuple[GraphModule, GraphModule]:
    """The forward and backward graphs, collectives still named by axis."""
    partition, found = compile.partition, []

    def look(ctx, joint, inputs, **given):
        found.extend(partition(ctx, joint, inputs, **given))
        raise Stop

    with unittest.mock.patch.object(compile, "partition", look), contextlib.suppress(Stop):
        build(model, kwargs, mesh, **options)
    return found[0], found[1]


def replayed(forward: GraphModule, backward: GraphModule) -> list[Node]:
    """The nodes of the backward graph that the forward graph has run already."""
    names = {n.name for n in forward.graph.nodes if n.op == "call_function"}
    return [n for n in backward.graph.nodes if n.op == "call_function" and n.name in names]
