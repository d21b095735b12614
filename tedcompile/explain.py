"""`explain`: what the compiler makes of a model on a mesh, without weights, devices or processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.fx import GraphModule, Node

from tedcompile import cost, frontends, layouts, machines, pipeline
from tedcompile.capture import Captured, bind, capture, module_path
from tedcompile.listing import Line, Listing
from tedcompile.load import from_config, load
from tedcompile.mesh import MeshShape, shape_of
from tedcompile.options import Options
from tedcompile.runtime import plain, select_outputs
from tedcompile.traffic import collectives, local_shape, parameters_of, pattern, placements_of

BATCH, SEQ = 1, 2048


def explain(
    model: Any,
    mesh: DeviceMesh | MeshShape | str | dict,
    *,
    example_inputs: dict[str, Any] | tuple | None = None,
    batch: int = BATCH,
    seq: int = SEQ,
    dtype: torch.dtype = torch.bfloat16,
    off: Sequence[str] = (),
    plan: Mapping[str, str] | None = None,
    checkpoint: str = "none",
    memory_budget: float | None = None,
    machine: str = "",
) -> dict[str, Any]:
    """What `parallelize` would do with a model on a mesh; the object that `tedcompile explain --json` prints.

    Args:
        model: an nn.Module (its weights may be on the meta device), a transformers configuration, or what the command
            line takes: a model type, a config.json or its folder, `file.py:function`.
        mesh: sizes of the axes, as "ep=4,tp=2", a dict or a DeviceMesh; no process group is needed.
        example_inputs: the arguments of one rank's training step; Hugging Face models need none.
        batch, seq: sequences, and positions in each, of one rank's batch, where no example inputs are given.
        dtype: of the parameters of a model that is built here, from a configuration or a type.
        off, plan, checkpoint, memory_budget, machine: as for `parallelize`.

    Returns a dict with the keys `model`, `mesh`, `passes`, `collectives`, `letters` (of the collectives' formulas, with
    their values), `savings` (of each optimisation: calls, and bytes that a rank sends over ep and tp, with it left out
    and with it), `parameters`, `replicated`, `machine` and `choices` (the candidates of each kind of MoE block, with
    predicted seconds, the best first). In each collective `bytes_per_rank` is the op's input on one rank and
    `wire_bytes` what that rank sends in a ring, both of one call; `count` is over the whole model; experts get as many
    rows as with balanced routing. The axis `data` is dp and ep together.

    Raises ValueError and TypeError as `parallelize` does.
    """
    options = Options.of(off, plan, checkpoint, memory_budget, machine)
    return analyse(model, mesh, example_inputs=example_inputs, batch=batch, seq=seq, dtype=dtype, options=options).facts


@dataclass
class Explanation:
    """`facts` is what `explain` returns; `lines` the rewritten graph; `pair` the graph before and after one pass."""

    facts: dict[str, Any]
    lines: list[Line]
    pair: tuple[list[Line], list[Line]] | None


def analyse(
    model: Any,
    mesh: DeviceMesh | MeshShape | str | dict,
    *,
    example_inputs: dict[str, Any] | tuple | None = None,
    batch: int = BATCH,
    seq: int = SEQ,
    dtype: torch.dtype = torch.bfloat16,
    dump: str = "",
    options: Options = Options(),  # noqa: B008 (frozen)
) -> Explanation:
    """`explain` with the rewritten graph, and, for the pass named `dump`, the graph before and after it."""
    shape = shape_of(mesh)
    names = [name for name, _ in pipeline.FORWARD]
    if dump and dump not in names:
        raise ValueError(f"unknown pass {dump!r}: the passes are {', '.join(names)}")
    for what, size in (("batch", batch), ("seq", seq)):
        if size < 1:
            raise ValueError(f"{what} must be at least 1, got {size}")
    if isinstance(model, str):
        model, given = load(model, dtype)
        example_inputs = given if example_inputs is None else example_inputs
    elif not isinstance(model, torch.nn.Module):
        model = from_config(model, dtype)
    listing = Listing(shape)
    training = model.training
    model.train()
    try:
        with plain(model):
            name = type(model).__name__
            captured = capture(model, _example(model, example_inputs, batch, seq))
            select_outputs(captured, model, True, ())
    finally:
        model.train(training)
    machine = machines.load(options.machine) if options.machine else machines.default("cuda")
    ctx = pipeline.Context(shape, dump=dump, show=listing.lines, options=options, machine=machine)
    again = [] if dump or shape["ept"] == 1 else [p for p in REWRITES if p not in options.off]
    copies = {p: _copy(captured) for p in again if p != "save_collectives"}
    gm = pipeline.run_forward(captured, ctx)
    pipeline.require_axes(gm, ctx)
    blocks = [block for _, block, _ in ctx.choices]
    rows, letters = collectives(gm, shape, options, blocks)
    savings = [_saving(p, gm, ctx, rows, copies.get(p)) for p in again]
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
        "collectives": rows,
        "letters": letters,
        "savings": savings,
        "parameters": [_parameter(n, shape) for n in parameters_of(gm)],
        "replicated": replicated(ctx.replicated),
        "machine": machine.name,
        "choices": _choices(ctx),
    }
    pairs = [(r.before, r.after) for r in ctx.records if r.name == dump]
    return Explanation(facts, listing.lines(gm), pairs[0] if pairs else None)


def _example(model: torch.nn.Module, given: dict[str, Any] | tuple | None, batch: int, seq: int) -> dict[str, Any]:
    if given is None:
        given = frontends.example_inputs(model)
        if given is None:
            raise TypeError(
                f"{type(model).__name__} needs example inputs: explain(model, mesh, example_inputs=dict(...)), the "
                "arguments of one training step (only shapes and dtypes count)"
            )
        given = {k: torch.empty(batch, seq, dtype=v.dtype, device="meta") for k, v in given.items()}
    args, kwargs = ((), given) if isinstance(given, dict) else (tuple(given), {})
    named = bind(model.forward, args, kwargs)
    return torch.utils._pytree.tree_map(lambda x: torch.tensor(x) if type(x) in (int, float) else x, named)


# ---- what each optimisation saves -----------------------------------------------------------------------------------

# optimisations by the name of their pass: what it makes of what
REWRITES = {
    "drop_duplicates": "permute(x) -> permute(drop(x)): each tp rank sends its own 1/tp of the tokens, not all of them",
    "simplify_collectives": "slice(all_reduce(x)) -> reduce_scatter(x), gathers move behind what is done to each token",
    "save_collectives": "y = all_reduce(x) -> y is kept: a replayed layer starts there and sends nothing again",
}


def _copy(captured: Captured) -> Captured:
    graph, known = torch.fx.Graph(), dict[Node, Node]()
    graph.output(graph.graph_copy(captured.gm.graph, known))
    graph.output_node().meta = dict(captured.gm.graph.output_node().meta)
    return replace(captured, gm=GraphModule(captured.gm, graph))


def _saving(name: str, gm: GraphModule, ctx: pipeline.Context, rows: list[dict], again: Captured | None) -> dict:
    """Calls and bytes with one optimisation left out and with it; where a checkpoint plays a part, of "full"."""
    options, machine, note = ctx.options, ctx.machine, ""
    off = replace(options, off=options.off | {name})
    if again is None:
        if options.checkpoint != "full":
            options, off = (replace(o, checkpoint="full", memory_budget=None) for o in (options, off))
            rows = collectives(gm, ctx.shape, options, [block for _, block, _ in ctx.choices])[0]
            note = "with checkpoint=full"
        before = collectives(gm, ctx.shape, off, [block for _, block, _ in ctx.choices])[0]
    else:
        other = pipeline.Context(ctx.shape, options=off, machine=machine)
        try:
            graph = pipeline.run_forward(again, other)
        except ValueError as error:
            return {"pass": name, "rewrite": REWRITES[name], "note": str(error), "before": None, "after": _sent(rows)}
        before = collectives(graph, ctx.shape, off, [block for _, block, _ in other.choices])[0]
        plans = [[cost.choose(b, ctx.shape, machine, p, c.options.off).best.candidate for _, b, p in c.choices]
                 for c in (other, ctx)]  # fmt: skip
        changed = next(((a, b) for a, b in zip(*plans) if (a.experts, a.dispatch) != (b.experts, b.dispatch)), None)
        note = f"another plan without it: {changed[0]}" if changed else ""
    return {"pass": name, "rewrite": REWRITES[name], "note": note, "before": _sent(before), "after": _sent(rows)}


def _sent(rows: list[dict]) -> dict[str, int]:
    found = {"calls": 0, "ep": 0, "tp": 0}
    for row in rows:
        if row["axis"] in ("ep", "ept", "tp"):
            found["calls"] += row["count"]
            found["tp" if row["axis"] == "tp" else "ep"] += row["count"] * row["wire_bytes"]
    return found


def _parameter(node: Node, mesh: MeshShape) -> dict[str, Any]:
    placements = placements_of(node, mesh)
    shape = layouts.shape(node)
    texts = []
    for axis in ("ep", "tp"):
        if axis in placements:
            parts = len(placements[axis].sections)
            texts.append(f"{axis}: Shard({placements[axis].dim})" + (f" of {parts} sections" if parts > 1 else ""))
    return {
        "name": node.meta["role"][1],
        "layout": ", ".join(texts) or "replicated",
        "shape": list(shape),
        "local_shape": list(local_shape(shape, placements, mesh)),
    }


def replicated(found: list[tuple[Node, str]]) -> list[dict[str, str]]:
    merged: dict[tuple[str, str], None] = {}
    for node, reason in found:
        role = node.meta.get("role")
        merged[pattern(role[1] if role else module_path(node)), reason] = None
    return [{"module": module, "reason": reason} for module, reason in merged]


def _choices(ctx: pipeline.Context) -> list[dict[str, Any]]:
    """The candidates for each kind of MoE block, the best first, with what the cost model predicts of them."""
    alike: dict[tuple, Any] = {}
    for node, block, plan in ctx.choices:
        alike.setdefault((pattern(module_path(node)), block), plan)
    return [
        {"module": module, "candidates": cost.table(block, ctx.shape, ctx.machine, plan, ctx.options.off)}
        for (module, block), plan in alike.items()
    ]
