"""`parallelize`: the one call that users make."""

from __future__ import annotations

import functools
import logging
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard

from tedcompile import compat, frontends, pipeline
from tedcompile import weights as weights_
from tedcompile import zero as zero_
from tedcompile.capture import bind
from tedcompile.compile import BACKENDS
from tedcompile.layouts import Layout
from tedcompile.lazy import cut, part, read_part
from tedcompile.mesh import Groups, shape_of
from tedcompile.options import Options
from tedcompile.runtime import ParallelModule, Runtime, parallel_class

log = logging.getLogger("tedcompile")


def parallelize(
    model: torch.nn.Module,
    mesh: DeviceMesh,
    *,
    example_inputs: dict[str, Any] | tuple | None = None,
    backend: str = "inductor",
    outputs: Sequence[str] = (),
    off: Sequence[str] = (),
    plan: Mapping[str, str] | None = None,
    checkpoint: str = "none",
    memory_budget: float | None = None,
    machine: str = "",
    zero: int = 0,
    weights: str | os.PathLike | None = None,
) -> torch.nn.Module:
    """Makes a plain single-device model train by tensor, expert and data parallelism.

    Args:
        model: any nn.Module whose training forward returns a loss (a scalar, or an output with `.loss`). Its parameters
            become DTensors under their own names, in place, and the same object is returned.
        mesh: a DeviceMesh whose axes are among "dp", "ep" and "tp". The dp x ep ranks bring their own batches, the tp
            ranks of one of them the same batch. Rank 0's weights are used on all ranks.
        example_inputs: the arguments of one training step (dict or tuple; only shapes and dtypes count). Hugging Face
            models need none.
        backend: "inductor", or "eager" for the rewritten graph, uncompiled.
        outputs: names of outputs, besides the losses, that training returns ("logits": gathered, on all ranks).
        off: optimisations to leave out, by the names of their passes (`options.OPTIONAL`).
        plan: choices to force, as in {"dispatch": "all_gather", "experts": "folded"} (`options.PLANS`); what is not
            named is chosen for each MoE block by the cost model.
        checkpoint: "none"; "full" recomputes every layer in the backward, "selective" what costs least to recompute
            until the activations kept fit `memory_budget` (bytes, or a fraction of those kept by "none").
        machine: whose costs decide: a name of machines.toml (v100, a100, h100, h200, two_slow_hosts, cpu) or a TOML
            file as `tedcompile calibrate` writes it, the same on all ranks; by default that of the devices in use.
        zero: what data-parallel ranks share out (ZeRO, arXiv 1910.02054): 1 optimizer state, 2 also gradients, 3 also
            parameters; `tedcompile.optim` reads it from the parameters. Under 2 `p.grad`, under 3 `p` too, is a DTensor
            that is split over the data axes as well, on a dim that divides (a parameter without one stays whole).
        weights: a folder with model.safetensors, or an index and its files, in the layout that transformers writes. The
            model is built on the meta device (`with torch.device("meta")`), and each rank reads its own slices. A meta
            model without `weights` gets its own initialisation, module by module: by `torch.initial_seed()` of rank 0,
            the same on every mesh of one device type.

    The loss that each rank returns is its local one; gradients are averaged over dp x ep, so a step is the
    single-device step on the mean loss (DeepSpeed-TED, arXiv 2303.06318, section 3).

    Raises TypeError and ValueError, before any communication, for what cannot work: they name the parameter or module,
    the sizes and what to do instead.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if isinstance(model, ParallelModule):
        raise ValueError(f"{type(model).__name__} is parallel already")
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}: choose {' or '.join(BACKENDS)}")
    options = Options.of(off, plan, checkpoint, memory_budget, machine, zero)
    shape_of(mesh)
    if not isinstance(mesh, DeviceMesh):
        raise TypeError("parallelize needs a torch DeviceMesh (init_device_mesh); tedcompile.explain takes plain sizes")
    example = _example(model, example_inputs)
    runtime = Runtime(Groups.of(mesh), backend, tuple([outputs] if isinstance(outputs, str) else outputs), options)
    source = runtime.together(lambda: weights_.plan(model, weights))
    runtime.compare("files of weights", source.digest)
    training = model.training
    model.train()
    try:
        prepared = runtime.together(lambda: runtime.prepare(model, example))
    finally:
        model.train(training)
    captured, ctx, gm, _ = prepared
    for name, value in captured.constants.items():
        if value.is_meta:
            raise ValueError(f"the tensor {name} of the model has no values on the meta device: make it a buffer")
    runtime.decided = pipeline.placements(gm) | ctx.stacked
    pipeline.require_axes(gm, ctx)
    if runtime.groups.rank["data"] == runtime.groups.rank["tp"] == 0:
        for what, reason in dict.fromkeys((re.sub(r"\d+", "*", pipeline.where(n)), r) for n, r in ctx.replicated):
            log.info("%s stays whole: %s", what, reason)
    _place(model, runtime, source)
    model.__class__ = parallel_class(type(model))
    object.__setattr__(model, "_ted", runtime)
    runtime.keep(model, example, prepared)
    return model


def _example(model: torch.nn.Module, given: dict[str, Any] | tuple | None) -> dict[str, Any]:
    if given is None:
        given = frontends.example_inputs(model)
    if given is None:
        raise TypeError(
            f"{type(model).__name__} needs example inputs: parallelize(model, mesh, example_inputs=dict(...)), the "
            "arguments of one training step (only shapes and dtypes count)"
        )
    args, kwargs = ((), given) if isinstance(given, dict) else (tuple(given), {})
    named = bind(model.forward, args, kwargs)
    return torch.utils._pytree.tree_map(lambda x: torch.tensor(x) if type(x) in (int, float) else x, named)


def _place(model: torch.nn.Module, runtime: Runtime, source: weights_.Weights) -> None:
    """Replaces every parameter by the DTensor of its layout, and moves buffers to the device."""
    groups, decided = runtime.groups, runtime.decided or {}
    names: dict[int, dict[str, Layout]] = {}
    first: dict[int, str] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        first.setdefault(id(p), name)
        if decided.get(name):
            names[id(p)] = decided[name]
    shares, placements, parts = {}, {}, {}
    at, sizes = groups.mesh.get_coordinate() or (), groups.mesh.mesh.shape
    for p in model.parameters():
        layouts = names.get(id(p), {})
        share = shares[id(p)] = zero_.share(first[id(p)], runtime.options.zero, p.shape, layouts, groups.shape)
        placements[id(p)] = _placements({**layouts, **share.stored(groups.shape)}, groups)
        parts[id(p)] = part(p.shape, placements[id(p)], at, sizes), p.dtype
    seed = _broadcast(torch.tensor(torch.initial_seed() % 2**62), groups.host)
    given = runtime.together(lambda: weights_.read(model, source, parts, int(seed), groups.device))
    done: dict[int, torch.Tensor] = {}
    for path, module in model.named_modules():
        for slot in (module._parameters, module._buffers):
            for leaf, value in slot.items():
                if value is None:
                    continue
                if id(value) not in done:
                    local = given.pop(id(value), None)
                    if local is None:
                        local = _broadcast(value.detach().to(groups.device), groups.group.get("world"))
                        if id(value) in parts:
                            ranges, dtype = parts[id(value)]
                            local = read_part(functools.partial(cut, local), ranges, dtype, groups.device)
                    if id(value) in parts:
                        local = _parameter(local, value, placements[id(value)], groups)
                        local.ted = shares[id(value)]  # type: ignore[attr-defined]
                    done[id(value)] = local
                slot[leaf] = done[id(value)]
                runtime.slots[f"{path}.{leaf}" if path else leaf] = (slot, leaf)
    if source.mapped is not None:
        source.mapped.loaded()


def _placements(layouts: dict[str, Layout], groups: Groups) -> list[Any]:
    found: list[Any] = []
    for axis in groups.mesh.mesh_dim_names or ():
        layout = layouts.get(axis)
        if layout is None or groups.shape[axis] == 1:
            found.append(Replicate())
        elif len(layout.sections) > 1:
            found.append(compat.strided_shard(layout.dim, len(layout.sections)))
        else:
            found.append(Shard(layout.dim))
    return found


def _broadcast(value: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    if group is not None:
        value = value.contiguous().clone()
        dist.broadcast(value, group_src=0, group=group)
    return value


def _parameter(local: torch.Tensor, old: torch.Tensor, placements: list[Any], groups: Groups) -> torch.Tensor:
    strides = torch.empty(old.shape, device="meta").stride()
    tensor = compat.dtensor(local, groups.mesh, placements, old.shape, strides)
    return compat.parameter(tensor.requires_grad_(old.requires_grad))
