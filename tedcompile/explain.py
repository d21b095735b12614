"""`explain`: what the compiler makes of a model on a mesh, without weights, devices or processes.

The forward's facts are read from the rewritten graph; the backward's collectives follow from the VJPs of `ops.py` (a
test compares them with the graph that autograd makes), and the reduction of gradients from `reduce_gradients`.

Letters in formulas: B sequences, S positions, T = B*S tokens of one rank's batch, K experts a token, E experts,
H hidden, I expert, V vocabulary size, `bytes` of one element.
"""

from __future__ import annotations

import difflib
import math
import operator
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from tabulate import tabulate
from torch.distributed.device_mesh import DeviceMesh
from torch.fx import GraphModule, Node

from tedcompile import frontends, layouts, pipeline
from tedcompile.capture import bind, capture, module_path
from tedcompile.layouts import Call, Layout, R, aten
from tedcompile.mesh import MeshShape, shape_of
from tedcompile.ops import ops
from tedcompile.passes import reduce_gradients
from tedcompile.plan import CHAIN
from tedcompile.runtime import plain, select_outputs

BATCH, SEQ = 1, 2048

# ops whose VJP is a collective: the kind, and whether its input has the shape of the op's result or of its operand
BACKWARD = {
    ops.enter.default: "all_reduce",
    ops.slice.default: "all_gather",
    ops.all_to_all.default: "all_to_all",
    ops.all_to_all_like.default: "all_to_all",
}
# operands that get no gradient, by position, beside those that are not floating
NO_GRADIENT = {ops.per_expert.default: (2,), ops.all_to_all_like.default: (2,)}
CONSTANTS = {
    getattr(getattr(aten, f"{prefix}{name}"), "default")
    for name in ("zeros", "ones", "empty", "full")
    for prefix in ("new_", "")
    if hasattr(aten, f"{prefix}{name}") and "default" in getattr(aten, f"{prefix}{name}").overloads()
} | {aten.zeros_like.default, aten.ones_like.default, aten.full_like.default, aten.empty_like.default}


def explain(
    model: Any,
    mesh: DeviceMesh | MeshShape | str | dict,
    *,
    example_inputs: dict[str, Any] | tuple | None = None,
    batch: int = BATCH,
    seq: int = SEQ,
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, Any]:
    """What `parallelize` would do with a model on a mesh; the object that `tedcompile explain --json` prints.

    Args:
        model: an nn.Module (its weights may be on the meta device), a transformers configuration, or what the command
            line takes: a model type, a config.json or its folder, `file.py:function`.
        mesh: sizes of the axes, as "ep=4,tp=2", a dict or a DeviceMesh; no process group is needed.
        example_inputs: the arguments of one rank's training step; Hugging Face models need none.
        batch, seq: sequences, and tokens in each, of one rank's batch, where no example inputs are given.
        dtype: of the parameters of a model that is built here, from a configuration or a type.

    Returns a dict with the keys `model`, `mesh`, `passes`, `collectives`, `parameters` and `replicated`. In each
    collective `bytes_per_rank` is the op's input on one rank and `wire_bytes` what that rank sends in a ring, both of
    one call; `count` is over the whole model; rows of experts are as many as with balanced routing.

    Raises ValueError and TypeError as `parallelize` does.
    """
    return analyse(model, mesh, example_inputs=example_inputs, batch=batch, seq=seq, dtype=dtype).facts


def analyse(
    model: Any,
    mesh: DeviceMesh | MeshShape | str | dict,
    *,
    example_inputs: dict[str, Any] | tuple | None = None,
    batch: int = BATCH,
    seq: int = SEQ,
    dtype: torch.dtype = torch.bfloat16,
    dump: str = "",
) -> Explanation:
    """`explain` with the rewritten graph, and, for the pass named `dump`, the graph before and after it."""
    shape = shape_of(mesh)
    names = [name for name, _ in pipeline.FORWARD]
    if dump and dump not in names:
        raise ValueError(f"unknown pass {dump!r}: the passes are {', '.join(names)}")
    if isinstance(model, str):
        model, given = load(model, dtype)
        example_inputs = given if example_inputs is None else example_inputs
    elif not isinstance(model, torch.nn.Module):
        model = from_config(model, dtype)
    name = type(model).__mro__[2].__name__ if hasattr(model, "_ted") else type(model).__name__
    listing = Listing(shape)
    training = model.training
    model.train()
    try:
        with plain(model):
            captured = capture(model, _example(model, example_inputs, batch, seq))
            select_outputs(captured, model, True, ())
    finally:
        model.train(training)
    ctx = pipeline.Context(shape, dump=dump, show=listing.lines)
    gm = pipeline.run_forward(captured, ctx)
    facts = {
        "model": name,
        "mesh": shape.as_dict(),
        "passes": [
            {
                "name": r.name,
                "seconds": round(r.seconds, 4),
                "nodes_before": r.nodes_before,
                "nodes_after": r.nodes_after,
                "inserted": r.inserted,
                "removed": r.removed,
            }
            for r in ctx.records
        ],
        "collectives": collectives(gm, shape),
        "parameters": [_parameter(n, shape) for n in _parameters(gm)],
        "replicated": _replicated(ctx.replicated),
    }
    record = next((r for r in ctx.records if r.name == dump), None)
    return Explanation(facts, listing.lines(gm), (record.before, record.after) if record else None)


def _example(model: torch.nn.Module, given: dict[str, Any] | tuple | None, batch: int, seq: int) -> dict[str, Any]:
    if given is None:
        given = frontends.example_inputs(model)
        if given is None:
            raise TypeError(
                f"{type(model).__name__} needs example inputs: explain(model, mesh, example_inputs=dict(...)), with the "
                "arguments of one training step (only shapes and dtypes count)"
            )
        for what, size in (("batch", batch), ("seq", seq)):
            if size < 1:
                raise ValueError(f"{what} must be at least 1, got {size}")
        # a language model's inputs are all (batch, seq)
        given = {k: torch.empty(batch, seq, dtype=v.dtype, device="meta") for k, v in given.items()}
    args, kwargs = ((), given) if isinstance(given, dict) else (tuple(given), {})
    named = bind(model.forward, args, kwargs)
    return torch.utils._pytree.tree_map(lambda x: torch.tensor(x) if type(x) in (int, float) else x, named)


# ---- models by name -------------------------------------------------------------------------------------------------


def load(spec: str, dtype: torch.dtype) -> tuple[torch.nn.Module, Any]:
    """A model on the meta device and its example inputs (None for a transformers model), from what a user types.

    `spec` is a transformers model type, a config.json or a folder with one, or `file.py:function`, a function of no
    arguments that returns `(model, example_inputs)`. Raises ValueError that says what is wrong with it.
    """
    from tedcompile import sources

    return sources.load(spec, dtype)


def from_config(config: Any, dtype: torch.dtype) -> torch.nn.Module:
    from tedcompile import sources

    return sources.from_config(config, dtype)
