"""`parallelize`: the one call that users make."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard

from tedcompile import compat, frontends, pipeline
from tedcompile import zero as zero_
from tedcompile.capture import bind
from tedcompile.compile import BACKENDS
from tedcompile.layouts import Layout
from tedcompile.mesh import Groups, shape_of
from tedcompile.options import Options
from tedcompile.runtime import ParallelModule, Runtime

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
    for name, p in model.named_parameters():
        if p.device.type == "meta":
            raise ValueError(f"parameter {name} is on the meta device: build the model with weights, on the cpu")
    example = _example(model, example_inputs)
    runtime = Runtime(Groups.of(mesh), backend, tuple([outputs] if isinstance(outputs, str) else outputs), options)
    training = model.training
    model.train()
    try:
        prepared = runtime.together(lambda: runtime.prepare(model, example))
    finally:
        model.train(training)
    _, ctx, gm, _ = prepared
    runtime.decided = pipeline.placements(gm)
    pipeline.require_axes(gm, ctx)
    if runtime.groups.rank["data"] == runtime.groups.rank["tp"] == 0:
        for what, reason in dict.fromkeys((re.sub(r"\d+", "*", pipeline.where(n)), r) for n, r in ctx.replicated):
            log.info("%s stays whole: %s", what, reason)
    _place(model, runtime)
    cls = type(model)
    model.__class__ = type(f"Parallel{cls.__name__}", (ParallelModule, cls), {"__module__": cls.__module__})
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


def _place(model: torch.nn.Module, runtime: Runtime) -> None:
    """Replaces every parameter by the DTensor of its layout, and moves buffers to the device."""
    groups, decided = runtime.groups, runtime.decided or {}
    names: dict[int, dict[str, Layout]] = {}
    first: dict[int, str] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        first.setdefault(id(p), name)
        if decided.get(name):
            names[id(p)] = decided[name]
    done: dict[int, torch.Tensor] = {}
    for path, module in model.named_modules():
        for slot, parameters in ((module._parameters, True), (module._buffers, False)):
            for leaf, value in slot.items():
                if value is None:
                    continue
                if id(value) not in done:
                    with torch.no_grad():
                        whole = _broadcast(value.detach().to(groups.device), groups)
                        if parameters:
                            layouts = names.get(id(value), {})
                            share = zero_.share(
                                first[id(value)], runtime.options.zero, whole.shape, layouts, groups.shape
                            )
                            whole = _shard(whole, value, {**layouts, **share.stored(groups.shape)}, groups)
                            whole.ted = share  # type: ignore[attr-defined]
                        done[id(value)] = whole
                slot[leaf] = done[id(value)]
                runtime.slots[f"{path}.{leaf}" if path else leaf] = (slot, leaf)


def _broadcast(value: torch.Tensor, groups: Groups) -> torch.Tensor:
    group = groups.group.get("world")
    if group is not None:
        value = value.contiguous().clone()
        dist.broadcast(value, group_src=0, group=group)
    return value


def _shard(whole: torch.Tensor, old: torch.Tensor, placements: dict[str, Layout], groups: Groups) -> torch.Tensor:
    local = whole
    spec = []
    for axis in groups.mesh.mesh_dim_names or ():
        layout = placements.get(axis)
        size = groups.shape[axis]
        if layout is None or size == 1:
            spec.append(Replicate())
            continue
        sections = layout.sections or (local.shape[layout.dim],)
        parts = [s.chunk(size, layout.dim)[groups.rank[axis]] for s in local.split(sections, layout.dim)]
        local = torch.cat(parts, layout.dim)
        spec.append(compat.strided_shard(layout.dim, len(sections)) if len(sections) > 1 else Shard(layout.dim))
    if local.numel() < whole.numel():
        local = local.clone(memory_format=torch.contiguous_format)  # not a view that keeps the whole alive
    local = local.contiguous()
    tensor = compat.dtensor(local, groups.mesh, spec, whole.shape, whole.contiguous().stride())
    return compat.parameter(tensor.requires_grad_(old.requires_grad))
