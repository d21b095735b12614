"""`explain`: what the compiler makes of a model on a mesh, without weights, devices or processes.

The forward's facts are read from the rewritten graph; the backward's collectives follow from the VJPs of `ops.py` (a
test compares them with the graph that autograd makes), and the reduction of gradients from `reduce_gradients`.

Letters in formulas: `LETTERS`. A formula is of one call; numbers in it are sizes of the model that have no letter, and
bytes of elements that are not of the parameters' dtype.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import json
import math
import operator
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import sympy
import torch
from tabulate import tabulate
from torch.distributed.device_mesh import DeviceMesh
from torch.fx import GraphModule, Node

from tedcompile import cost, frontends, graphs, layouts, machines, pipeline
from tedcompile.capture import Captured, bind, capture, layer_of, module_path
from tedcompile.layouts import Call, Layout, NoRule, R, Sections, aten
from tedcompile.mesh import MeshShape, shape_of
from tedcompile.ops import ops
from tedcompile.options import Options
from tedcompile.passes import checkpoint, peepholes, reduce_gradients, small_sizes
from tedcompile.plan import CHAIN
from tedcompile.runtime import plain, select_outputs

BATCH, SEQ = 1, 2048
LETTERS = {
    "B": "sequences of one rank", "S": "positions of a sequence", "T": "tokens of one rank, B*S",
    "K": "experts a token", "E": "experts", "H": "hidden size", "I": "expert size", "V": "vocabulary",
    "d": "head size",
    "U": "(token, rank) pairs, a token going once to each of n ranks with any of its experts: expected, with uniform "
    "routing, T*n*(1 - C(E - E/n, K)/C(E, K)); n = ep, or ep*tp for folded experts",
    "layers": "layers", "bytes": "of one element",
}  # fmt: skip
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DTYPES |= {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


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
        "parameters": [_parameter(n, shape) for n in _parameters(gm)],
        "replicated": _replicated(ctx.replicated),
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


# ---- models by name -------------------------------------------------------------------------------------------------


def load(spec: str, dtype: torch.dtype = torch.bfloat16, weights: bool = False) -> tuple[torch.nn.Module, Any]:
    """A model without weights, and its example inputs (None for a transformers model), from what a user types.

    `weights`: what a function returns keeps its own.

    `spec` is a transformers model type, a config.json or a folder with one, or `file.py:function`, where the function
    takes no arguments and returns `(model, example_inputs)`. Raises ValueError that says what is wrong with it.
    """
    file, colon, function = spec.rpartition(":")
    if colon and file.endswith(".py"):
        return _call(Path(file), function, weights)
    path = Path(spec)
    if spec.endswith(".py"):
        raise ValueError(f"{spec} names no function: write {spec}:FUNCTION, which returns (model, example_inputs)")
    if path.is_dir():
        path = path / "config.json"
        if not path.exists():
            raise ValueError(f"{spec} holds no config.json")
    if path.suffix == ".json" or path.is_file():
        return from_config(_read_config(path), dtype), None
    types = _transformers().CONFIG_MAPPING
    kind = spec.replace("-", "_")
    if kind not in types:
        close = difflib.get_close_matches(kind, list(types), 3)
        hint = f"did you mean {' or '.join(close)}?" if close else "give a transformers model type, as mixtral,"
        rest = "" if close else " a config.json or its folder, or file.py:function"
        raise ValueError(f"unknown model {spec!r}: {hint}{rest}")
    return from_config(types[kind](), dtype), None


def _transformers():
    try:
        import transformers
    except ImportError:
        raise ValueError("this model needs the package transformers: pip install 'tedcompile[hf]'") from None
    return transformers


def _read_config(path: Path) -> Any:
    types = _transformers().CONFIG_MAPPING
    try:
        values = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    kind = values.get("model_type") if isinstance(values, dict) else None
    if kind not in types:
        raise ValueError(f"{path}: model_type {kind!r} is not one of the installed transformers")
    try:
        return types[kind].from_dict(values)
    except Exception as error:
        raise ValueError(f"{path} is not a configuration of {kind}: {_first_line(error)}") from None


def from_config(config: Any, dtype: torch.dtype = torch.bfloat16) -> torch.nn.Module:
    """The causal language model of a transformers configuration, on the meta device."""
    transformers = _transformers()
    if not isinstance(config, getattr(transformers, "PreTrainedConfig", transformers.PretrainedConfig)):
        raise TypeError(
            f"model must be an nn.Module, a transformers configuration or a name, got {type(config).__name__}"
        )
    if type(config) not in transformers.AutoModelForCausalLM._model_mapping:
        raise ValueError(f"transformers has no causal language model of type {config.model_type!r}")
    try:
        with torch.device("meta"):
            return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    except Exception as error:
        raise ValueError(f"a model of type {config.model_type!r} cannot be built: {_first_line(error)}") from error


def _call(file: Path, function: str, weights: bool) -> tuple[torch.nn.Module, Any]:
    if not file.is_file():
        raise ValueError(f"there is no file {file}")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"{file} cannot be imported: {_first_line(error)}") from error
    make = getattr(module, function, None)
    if not callable(make):
        raise ValueError(f"{file} has no function {function!r}")
    try:
        try:
            with torch.device("cpu" if weights else "meta"):
                made = make()
        except Exception:  # what reads values cannot run without them
            made = make()
    except Exception as error:
        raise ValueError(f"{file}:{function} failed: {_first_line(error)}") from error
    if not isinstance(made, tuple) or len(made) != 2 or not isinstance(made[0], torch.nn.Module):
        kinds = f"({', '.join(type(m).__name__ for m in made)})" if isinstance(made, tuple) else type(made).__name__
        raise ValueError(f"{file}:{function} must return (model, example_inputs), an nn.Module and a dict, not {kinds}")
    if not isinstance(made[1], (dict, tuple)):
        raise ValueError(f"{file}:{function}: example_inputs must be a dict or a tuple, not {type(made[1]).__name__}")
    return made


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


# ---- facts ----------------------------------------------------------------------------------------------------------


def _pattern(path: str) -> str:
    """`model.layers.3.mlp` to `model.layers.*.mlp`."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", path)


def _parameters(gm: GraphModule) -> list[Node]:
    return [n for n in gm.graph.nodes if n.op == "placeholder" and n.meta["role"][0] == "parameter"]


def _local(shape: Iterable[int], placements: dict[str, Layout], mesh: MeshShape) -> tuple[int, ...]:
    local = tuple(shape)
    for axis, layout in placements.items():
        local = layout.local(local, mesh[axis])
    return local


def _placements(node: Node, mesh: MeshShape) -> dict[str, Layout]:
    return {axis: p for axis, p in node.meta.get("placements", {}).items() if p.kind == "S" and mesh[axis] > 1}


def _parameter(node: Node, mesh: MeshShape) -> dict[str, Any]:
    placements = _placements(node, mesh)
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
        "local_shape": list(_local(shape, placements, mesh)),
    }


def _replicated(found: list[tuple[Node, str]]) -> list[dict[str, str]]:
    merged: dict[tuple[str, str], None] = {}
    for node, reason in found:
        role = node.meta.get("role")
        merged[_pattern(role[1] if role else module_path(node)), reason] = None
    return [{"module": module, "reason": reason} for module, reason in merged]


def _choices(ctx: pipeline.Context) -> list[dict[str, Any]]:
    """The candidates for each kind of MoE block, the best first, with what the cost model predicts of them."""
    alike: dict[tuple, Any] = {}
    for node, block, plan in ctx.choices:
        alike.setdefault((_pattern(module_path(node)), block), plan)
    return [
        {"module": module, "candidates": cost.table(block, ctx.shape, ctx.machine, plan, ctx.options.off)}
        for (module, block), plan in alike.items()
    ]


def _split_over_experts(gm: GraphModule, ep: int) -> dict[Node, Layout]:
    """Layouts over ep of expert weights and their views, which the graph holds with global sizes."""
    known: dict[Node, Layout] = {}
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            layout = node.meta.get("placements", {}).get("ep")
            if layout is not None and ep > 1:
                known[node] = layout
        elif node.args and node.args[0] in known:
            if node.target in (ops.enter.default, ops.slice.default, ops.share.default):
                known[node] = known[node.args[0]]
            elif node.target in CHAIN and node.target is not ops.per_expert.default:
                with contextlib.suppress(NoRule, Sections):
                    known[node] = layouts.apply(Call(node, {**dict.fromkeys(node.all_input_nodes, R), **known}, ep))
    return known


class _Shapes:
    """Local shapes of the values of a rewritten graph, over both axes that split them."""

    def __init__(self, gm: GraphModule, mesh: MeshShape):
        self.mesh, self.experts = mesh, _split_over_experts(gm, mesh.ep)

    def axes(self, node: Node, index: int | None = None) -> dict[str, Layout]:
        layout = node.meta.get("layout", R)
        layout = layout[index or 0] if isinstance(layout, tuple) else layout
        found = {"ep": self.experts[node]} if node in self.experts else {}
        # own counts are as many on every rank, the rows they count are not
        return found | ({"tp": layout} if layout.kind == "S" or layout.kind == "D" and not _is_counts(node) else {})

    def local(self, node: Node, index: int | None = None) -> tuple[int, ...]:
        value = node.meta["val"]
        value = value if index is None else value[index]
        return _local(value.shape, self.axes(node, index), self.mesh)


def _is_counts(node: Node) -> bool:
    if node.target is operator.getitem:
        return node.args[1] == 1 and node.args[0].target in (ops.permute.default, ops.select.default)
    return node.target in (ops.exchange_counts.default, ops.splits.default, ops.row_sizes.default)


# ops whose VJP is a collective, of as many bytes as the op's result has (an all-to-all's, with balanced routing)
BACKWARD = {
    ops.enter.default: "all_reduce",
    ops.slice.default: "all_gather",
    ops.gather_enter.default: "reduce_scatter",
    ops.reduce_scatter.default: "all_gather",
    ops.gather_rows.default: "reduce_scatter",
    ops.scatter_rows.default: "all_gather",
    ops.all_to_all.default: "all_to_all",
    ops.all_to_all_like.default: "all_to_all",
}


def _cotangents(gm: GraphModule) -> set[Node]:
    """Values that get a gradient in the backward: made from parameters, and a loss is made from them."""
    found: set[Node] = set()
    for node in reversed(gm.graph.nodes):
        if node.op == "output":
            found.update(a for a in node.all_input_nodes if a.meta.get("grad"))
        elif node in found and node.op == "call_function":
            found.update(a for a in graphs.differentiated(node) if a.meta.get("grad"))
    return found


# what the VJP of an op reads of its operands' values, where that is not all of them. It reads none of these
PASSED = {
    operator.getitem, aten.view_as.default, aten.expand_as.default,
    aten.add.Tensor, aten.sub.Tensor, aten.neg.default, aten.view.default, aten.reshape.default,
    aten._unsafe_view.default, aten.flatten.using_ints, aten.transpose.int, aten.permute.default, aten.t.default,
    aten.expand.default, aten.squeeze.dim, aten.unsqueeze.default, aten.slice.Tensor, aten.select.int, aten.cat.default,
    aten.stack.default, aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default, aten.contiguous.default,
    aten.clone.default, aten.alias.default, aten.to.dtype, aten._to_copy.default, aten.sum.default,
    aten.sum.dim_IntList, aten.mean.default, aten.mean.dim, aten.mul.Scalar, aten.div.Scalar, aten.add.Scalar,
    aten.sub.Scalar, aten.constant_pad_nd.default, aten.pad.default, aten.slice_scatter.default,
    aten.repeat_interleave.self_int, aten.topk.default, ops.enter.default, ops.share.default, ops.slice.default,
    ops.gather.default, ops.gather_enter.default, ops.reduce_scatter.default, ops.gather_rows.default,
    ops.scatter_rows.default, ops.all_reduce.default, ops.all_to_all.default, ops.all_to_all_like.default,
}  # fmt: skip
# of these two operands each for the gradient of the other one
MULTIPLIED = {aten.mul.Tensor: (0, 1), aten.matmul.default: (0, 1), aten.mm.default: (0, 1), aten.bmm.default: (0, 1),
              aten.linear.default: (0, 1), ops.grouped_mm.default: (0, 1), ops.unpermute.default: (0, 3),
              ops.unpermute_some.default: (0, 3)}  # fmt: skip
# these operands (indices, masks)
INDEXED = {aten.index.Tensor: (1,), aten.gather.default: (2,), aten.embedding.default: (1,), aten.where.self: (0,),
           aten.masked_fill.Scalar: (1,), ops.embedding_shard.default: (1,), ops.pick.default: (1,),
           ops.permute.default: (1,), ops.take.default: (1, 2), ops.gather_sum.default: (1, 2),
           ops.per_expert.default: (1,), ops.select.default: (1,), ops.gather_sum_some.default: (1, 2),
           ops.spread.default: (1, 2)}  # fmt: skip


def _read(node: Node) -> list[Node]:
    """The operands whose values the backward reads, of an op that gets a gradient."""
    found: list[Node] = []
    if node.target in MULTIPLIED:
        a, b = (node.args[i] for i in MULTIPLIED[node.target])
        return [x for x, y in ((a, b), (b, a)) if isinstance(x, Node) and isinstance(y, Node) and y.meta.get("grad")]
    if node.target not in PASSED:
        torch.fx.map_arg([node.args[i] for i in INDEXED.get(node.target, range(len(node.args)))], found.append)
    return found


def _replayed(gm: GraphModule, got: set[Node], options: Options) -> Iterator[Node]:
    """The collectives that recomputing the layers sends again, in the order of the forward."""
    if options.checkpoint == "none" or options.saves_collectives:
        return
    forward = graphs.forward_nodes(gm.graph)
    kept, run = checkpoint.kept(forward), set()
    pending = [a for n in forward if n in got and n.op == "call_function" for a in _read(n)]
    while pending:
        node = pending.pop()
        routing = node.target is operator.getitem and node.args[0].target is ops.permute.default and node.args[1] > 0
        if node.op == "placeholder" or routing or node in run or node in kept or not layer_of(module_path(node)):
            continue
        run.add(node)
        rows = small_sizes.ROWS.get(node.target)
        pending += [a for a in node.all_input_nodes if rows is None or a is not node.args[rows]]
    same: dict[str, Node] = {}  # what is computed twice is computed once in a joint graph
    first: dict[Node, Node] = {}
    for node in forward:
        args, kwargs = torch.fx.map_arg((node.args, node.kwargs), first.__getitem__)
        key = node.name if node.op == "placeholder" else f"{node.target} {args} {kwargs}"
        first[node] = same.setdefault(key, node)
        if node.target is aten.to.dtype and node.meta["val"].dtype == node.args[0].meta["val"].dtype:
            first[node] = first[node.args[0]]
        if node in run and graphs.collective(node) and first[node] is node:
            yield node


def collectives(
    gm: GraphModule,
    mesh: MeshShape,
    options: Options = Options(),  # noqa: B008 (frozen)
    blocks: Sequence[cost.Block] = (),
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Every collective of a training step, grouped by what it is and by the module pattern it belongs to.

    Also the values of the letters in their formulas.
    """
    shapes, letters = _Shapes(gm, mesh), _Letters(gm, mesh, list(blocks))
    got = _cotangents(gm)
    rows: Counter[tuple] = Counter()
    merged: dict[tuple, list[Node]] = {}

    def add(kind: str, axis: str, role: str, phase: str, module: str, operands: list[Node]) -> None:
        size = sum(_bytes(a.meta["val"], shapes.local(a)) for a in operands)
        if mesh[axis] > 1 and size:
            rows[kind, axis, role, phase, module, size, letters.total(operands, shapes) or str(size)] += 1

    for node in gm.graph.nodes:
        name = _ted(node)
        if name in graphs.KINDS:
            role = "parameter" if node.args[0].meta["weights_only"] else "payload"
            role = role if node.args[0].meta["val"].is_floating_point() else "counts"
            module = _pattern(module_path(node))
            add(graphs.KINDS[name], node.args[-1], role, "forward", module, [node.args[0]])
    for node in _replayed(gm, got, options):
        add(graphs.collective(node), node.args[-1], "payload", "recompute", _pattern(module_path(node)), [node.args[0]])
    for node in reversed(gm.graph.nodes):
        if node in got and node.target in BACKWARD and node.args[0].meta.get("grad"):
            kind, axis = BACKWARD[node.target], node.args[-1]
            small = kind == "all_reduce" and _bytes(node.meta["val"], shapes.local(node)) <= peepholes.MERGED
            if node.meta["weights_only"] and small and "simplify_collectives" not in options.off:
                merged.setdefault((axis, node.meta["val"].dtype), []).append(node)
                continue
            role = "gradient" if node.meta["weights_only"] else "payload"
            add(kind, axis, role, "backward", _pattern(module_path(node)), [node])
    groups = [bucket for nodes in merged.values() for bucket in _filled(nodes, shapes, peepholes.MERGED)]
    for bucket in groups:
        add(
            "all_reduce",
            bucket[0].args[-1],
            "gradient",
            "backward",
            _common([_pattern(module_path(n)) for n in bucket]),
            bucket,
        )
    for axis, members in _buckets(gm, shapes, got, groups):
        module = _common([_pattern(p.meta["role"][1]).rpartition(".")[0] for p in members])
        add("all_reduce", axis, "gradient", "backward", module, members)
    found = [
        {
            "kind": kind, "axis": axis, "role": role, "phase": phase, "module": module, "count": count,
            "bytes_per_rank": size, "wire_bytes": _wire(kind, size, mesh[axis]), "formula": formula,
        }
        for (kind, axis, role, phase, module, size, formula), count in rows.items()
    ]  # fmt: skip
    return found, letters.known


def _ted(node: Node) -> str:
    """The name of one of our ops, else the empty string."""
    ours = node.op == "call_function" and getattr(node.target, "namespace", "") == "ted"
    return node.target._schema.name.removeprefix("ted::") if ours else ""


def _bytes(value: torch.Tensor, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * value.element_size()


def _wire(kind: str, size: int, n: int) -> int:
    """What one rank sends: the ring algorithms of NCCL; an all-to-all keeps its own part."""
    sent = {"all_reduce": 2 * (n - 1) * size / n, "all_gather": (n - 1) * size}
    return round(sent.get(kind, (n - 1) * size / n))


def _common(paths: list[str]) -> str:
    parts = [p.split(".") for p in paths]
    same = 0
    while all(len(p) > same and p[same] == parts[0][same] for p in parts):
        same += 1
    return ".".join(parts[0][:same])


def _buckets(
    gm: GraphModule, shapes: _Shapes, got: set[Node], groups: list[list[Node]]
) -> Iterator[tuple[str, list[Node]]]:
    """Parameters whose gradients are reduced together: those of one kind, from the last used to the first.

    `groups`: parameters entered over tp, or what is made of them, whose gradients come with the last of the group.
    """
    position = {n: i for i, n in enumerate(gm.graph.nodes)}
    members = [p for p in _parameters(gm) if p in got]

    def last(p: Node) -> tuple[int, int]:
        """Autograd runs the last op first; a linear gives its bias a gradient before its weight."""
        found = []
        for user in p.users:
            a = p
            while user.target in (ops.enter.default, ops.share.default, ops.slice.default) and len(user.users) == 1:
                a, user = user, next(iter(user.users))
            found.append((position[user], user.args.index(a) if user.target is aten.linear.default else 0))
        return min(found)

    keys = {p: last(p) for p in members}
    entered = {user: p for p in members for user in p.users if user.target is ops.enter.default}
    first: dict[Node, tuple[int, int]] = {}
    for group in groups:
        parameters = [entered[n] for n in group if n in entered and len(entered[n].users) == 1]
        first |= dict.fromkeys(parameters, min((keys[p] for p in parameters), default=(0, 0)))
    members.sort(key=lambda p: (first.get(p, keys[p]), keys[p]), reverse=True)
    families: dict[tuple, list[Node]] = {}
    for p in members:
        axis = "dp" if "ep" in p.meta.get("placements", {}) else "data"
        families.setdefault((axis, p.meta["val"].dtype), []).append(p)
    for (axis, _), parameters in families.items():
        bucket: list[Node] = []
        size = 0
        for p in parameters:
            bucket.append(p)
            size += _bytes(p.meta["val"], shapes.local(p))
            if size >= reduce_gradients.BUCKET or p is parameters[-1]:
                yield axis, bucket
                bucket, size = [], 0


def _filled(nodes: list[Node], shapes: _Shapes, limit: int) -> Iterator[list[Node]]:
    """The nodes in groups of at most `limit` bytes."""
    bucket: list[Node] = []
    size = 0
    for node in nodes:
        more = _bytes(node.meta["val"], shapes.local(node))
        if bucket and size + more > limit:
            yield bucket
            bucket, size = [], 0
        bucket.append(node)
        size += more
    if bucket:
        yield bucket


class _Letters:
    """Formulas of sizes. A number at a place where a letter is expected, and of its size, is taken for the letter."""

    def __init__(self, gm: GraphModule, mesh: MeshShape, blocks: list[cost.Block]):
        known: dict[str, int] = {}
        for block in blocks[:1]:
            known |= {"H": block.H, "K": block.K, "E": block.E, "I": block.I}
        gathered = False
        for n in gm.graph.nodes:
            value = n.meta.get("val")
            if n.op == "placeholder" and n.meta["role"][0] == "input" and isinstance(value, torch.Tensor):
                if value.dim() == 2 and not value.is_floating_point():
                    known.setdefault("B", value.shape[0])
                    known.setdefault("S", value.shape[1])
            elif n.op == "placeholder" and n.meta["role"][0] == "parameter":
                known.setdefault("bytes", value.element_size())
            elif n.target is ops.grouped_mm.default and layouts.shape(n)[1] == known.get("H"):
                known.setdefault("I", layouts.shape(n.args[0])[1])
            elif n.target in (aten.embedding.default, ops.embedding_shard.default):
                known.setdefault("V", layouts.shape(n.args[0])[0])
                known.setdefault("H", layouts.shape(n.args[0])[1])
            elif n.target is aten.scaled_dot_product_attention.default:
                known.setdefault("d", layouts.shape(n)[-1])
            elif n.target is ops.select.default:
                once = n.args[1].target is ops.destinations.default
                gathered = gathered or not once and "U" not in known
                if once:
                    known.setdefault("U", value[0].shape[0])
        layer_names = {layer_of(module_path(n)) for n in gm.graph.nodes if n.op == "call_function"} - {""}
        known["layers"] = len(layer_names)
        if "B" in known:
            known["T"] = known["B"] * known["S"]
        self.known, axes = known, ("dp", "ep", "tp")
        self.letters = {name: sympy.Symbol(name) for name in (*known, *axes, "bytes")}
        ep, tp = self.letters["ep"], self.letters["tp"]
        pick = lambda *names: [(self.letters[name], known[name]) for name in names if name in known]
        self.sequence = pick("B", "S")
        self.tokens = pick("T")
        if self.tokens:
            everywhere = [(ep * self.letters["T"], mesh.ep * known["T"])] if mesh.ep > 1 else []
            rows = [(self.letters["T"] * self.letters["K"], known["T"] * known["K"])] if "K" in known else []
            self.tokens += everywhere + rows if gathered else rows + everywhere
            self.tokens += pick("U")
        self.counts = [*pick("E"), (ep, mesh.ep), (ep * tp, mesh["ept"])]
        self.experts = pick("E")
        self.sizes = pick("H", "I")
        if "I" in known:
            self.sizes.append((2 * self.letters["I"], 2 * known["I"]))
        self.sizes += pick("V", "E", "K", "d")
        self.made: dict[tuple, sympy.Expr] = {}

    def dim(self, size: int, i: int, of: int, weight: bool) -> sympy.Expr:
        choices = self.sizes
        if weight:
            choices = (self.experts if i == 0 and of != 2 else []) + choices
        elif i < of - 1 or of == 1:
            choices = (self.sequence[min(i, 1) :][:1] if of > 2 else []) + self.tokens + choices
        found = next((letter for letter, value in choices if value == size), None)
        if found is None and size > 1 and size % self.known.get("d", size) == 0 and "d" in self.known:
            found = size // self.known["d"] * self.letters["d"]  # so many heads
        return sympy.Integer(size) if found is None else found

    def product(self, node: Node, axes: dict[str, Layout]) -> sympy.Expr:
        value, shape = node.meta["val"], layouts.shape(node)
        weight = bool(node.meta.get("weights_only"))
        key = shape, value.dtype, weight, tuple(axes)
        if key not in self.made:
            size = value.element_size()
            result = self.letters["bytes"] if size == self.known.get("bytes") else sympy.Integer(size)
            number = math.prod(shape)
            counts = None if value.is_floating_point() else next((c for c, n in self.counts if n == number), None)
            if counts is not None:
                result *= counts
            else:
                for i, size in enumerate(shape):
                    result *= self.dim(size, i, len(shape), weight)
            if self.sequence and {letter for letter, _ in self.sequence} <= result.free_symbols:
                result *= self.letters["T"] / (self.letters["B"] * self.letters["S"])
            for axis in axes:
                result /= self.letters[axis]
            self.made[key] = result
        return self.made[key]

    def total(self, members: list[Node], shapes: _Shapes) -> str | None:
        """The formula of what is sent at once; None where it is too long to say anything."""
        terms = Counter(self.product(m, shapes.axes(m)) for m in members)
        deep = self.known["layers"]
        times = lambda n: n // deep * self.letters["layers"] if deep > 1 and n % deep == 0 else n
        expression = sympy.factor_terms(sum(times(n) * term for term, n in terms.items()))
        return str(expression) if len(terms) < 9 else None


# ---- the graph as code ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """One value of the graph: the module it belongs to, code, what is known about it, `>>` or `<<` for collectives."""

    module: str
    kind: str
    code: str
    comment: str
    mark: str = ""


NAMES = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32", torch.float64: "f64", torch.int64: "i64",
         torch.int32: "i32", torch.bool: "bool"}  # fmt: skip
INFIX = {"add": "+", "sub": "-", "mul": "*", "div": "/", "eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">",
         "ge": ">=", "bitwise_and": "&", "bitwise_or": "|", "__and__": "&", "logical_and": "&"}  # fmt: skip
RESULTS = {ops.permute.default: ("rows", "counts", "perm", "order"), ops.regroup.default: ("order", "inverse"),
           aten.topk.default: ("values", "indices"), aten.max.dim: ("values", "indices")}  # fmt: skip
HIDDEN = {"device", "layout", "pin_memory", "memory_format", "non_blocking", "copy"}


class Listing:
    """Graphs as code, with the same names for the same values in every listing (before and after a pass)."""

    def __init__(self, mesh: MeshShape):
        self.mesh = mesh
        self.names: dict[tuple[str, Node], str] = {}
        self.used: dict[str, Counter[str]] = {}

    def lines(self, gm: GraphModule) -> list[Line]:
        self.shapes = _Shapes(gm, self.mesh)
        self.received = _cotangents(gm)
        return [self.line(n) for n in gm.graph.nodes if n.op == "call_function" and n.target is not operator.getitem]

    def line(self, node: Node) -> Line:
        scope = layer_of(module_path(node))
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        kind = stack[-1][1] if stack else ""
        kind = (kind if isinstance(kind, str) else kind.__name__).rpartition(".")[2]
        code = self.code(node, scope)
        value = node.meta.get("val")
        if isinstance(value, (tuple, list)):
            picks = {u.args[1]: u for u in node.users}
            results = ", ".join(self.name(picks[i], scope) if i in picks else "_" for i in range(len(value)))
            comment = "; ".join(self.comment(node, i) for i in range(len(value)) if i in picks)
        else:
            results, comment = self.name(node, scope), self.comment(node, None)
        mark = ""
        if _ted(node) in graphs.KINDS:
            mark = ">>"
        elif node.target in BACKWARD and node in self.received:
            mark = "<<"
            comment += f", backward: {BACKWARD[node.target]} over {node.args[-1]}"
        return Line(module_path(node), kind, f"{results} = {code}", comment, mark)

    def name(self, node: Node, scope: str) -> str:
        if node.op == "placeholder":
            name = node.meta["role"][1]
            if not isinstance(name, str):
                return node.name
            return name.removeprefix(f"{scope}.") if scope else name
        if (scope, node) not in self.names:
            base = _op(node)
            if node.target is operator.getitem:
                source = node.args[0]
                fixed = RESULTS.get(source.target)
                base = fixed[node.args[1]] if fixed else f"{_op(source)}_{node.args[1]}"
            used = self.used.setdefault(scope, Counter())
            used[base] += 1
            self.names[scope, node] = base if used[base] == 1 else f"{base}_{used[base]}"
        return self.names[scope, node]

    def comment(self, node: Node, index: int | None) -> str:
        value = node.meta.get("val")
        value = value[index] if index is not None and isinstance(value, (tuple, list)) else value
        if not isinstance(value, torch.Tensor):
            return ""
        text = f"{NAMES.get(value.dtype, str(value.dtype))} {list(self.shapes.local(node, index))}"
        layout = node.meta.get("layout")
        layout = layout[index or 0] if isinstance(layout, tuple) else layout
        return text if layout is None or self.mesh.tp == 1 else f"{text} {layout}"

    def code(self, node: Node, scope: str) -> str:
        show = lambda x: self.show(x, scope)
        op, args, kwargs = _op(node), list(node.args), dict(node.kwargs)
        if node.target is aten.slice.Tensor:
            dim, start, end, step = list(args[1:]) + [0, None, None, 1][len(args) - 1 :]
            inside = f"{'' if not start else show(start)}:{'' if end is None or end > 2**60 else show(end)}"
            return (
                f"{show(args[0])}[{':, ' * (dim % args[0].meta['val'].dim())}{inside}{'' if step == 1 else f':{step}'}]"
            )
        if node.target is aten.select.int:
            return f"{show(args[0])}[{':, ' * (args[1] % args[0].meta['val'].dim())}{show(args[2])}]"
        if node.target is aten.index.Tensor:
            return f"{show(args[0])}[{', '.join(':' if i is None else show(i) for i in args[1])}]"
        if op in INFIX and len(args) == 2 and not kwargs:
            return f"{show(args[0])} {INFIX[op]} {show(args[1])}"
        if node.target in (ops.slice.default, ops.gather.default):
            parts = f", sections={show(args[3])}" if args[3] else ""
            return f"{op}({show(args[0])}, dim={args[1]}{parts}, axis={show(args[4])})"
        schema = getattr(node.target, "_schema", None)
        defaults = [a.default_value if a.has_default_value() else ... for a in schema.arguments] if schema else []
        while (
            args
            and len(args) <= len(defaults)
            and not isinstance(args[-1], Node)
            and args[-1] == defaults[len(args) - 1]
        ):
            args.pop()
        shown = [show(a) for a in args]
        shown += [f"{k}={show(v)}" for k, v in kwargs.items() if k not in HIDDEN and v is not None]
        return f"{op}({', '.join(shown)})"

    def show(self, x: Any, scope: str) -> str:
        if isinstance(x, Node):
            return self.name(x, scope)
        if isinstance(x, (list, tuple)):
            return f"[{', '.join(self.show(i, scope) for i in x)}]"
        if isinstance(x, torch.dtype):
            return NAMES.get(x, str(x))
        return f"{x:.6g}" if isinstance(x, float) else repr(x)


def _op(node: Node) -> str:
    schema = getattr(node.target, "_schema", None)
    name = schema.name.rpartition("::")[2] if schema else getattr(node.target, "__name__", node.name)
    return {"scaled_dot_product_attention": "attention", "_to_copy": "to"}.get(name, name)


def layers_of(lines: list[Line]) -> list[str]:
    """Paths of the repeated layers: the numbered modules of the list with the most values."""
    sizes = Counter(scope.rpartition(".")[0] for line in lines if (scope := layer_of(line.module)))
    if not sizes:
        return []
    most = max(sizes, key=sizes.__getitem__)
    found = {layer_of(line.module) for line in lines}
    return sorted((f for f in found if f and f.rpartition(".")[0] == most), key=lambda f: int(f.rpartition(".")[2]))


SYMBOLS = {name: sympy.Symbol(name) for name in (*LETTERS, "dp", "ep", "tp")}


# ---- text -----------------------------------------------------------------------------------------------------------


class Style:
    """Colours on a terminal, nothing elsewhere."""

    def __init__(self, colour: bool):
        self.colour = colour

    def __call__(self, text: str, code: str) -> str:
        return f"\033[{code}m{text}\033[0m" if self.colour and text else text

    @staticmethod
    def of(stream) -> Style:
        return Style(stream.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb")


BOLD, DIM, COLLECTIVE, BACK, ADDED, GONE = "1", "2", "1;35", "36", "32", "31"


def choose(lines: list[Line], layer: str | int | None) -> list[str]:
    """The layers that --layer names: "all", a number, or None for the first with an MoE block."""
    known = layers_of(lines)
    if layer == "all" or not known:
        return known or [""]
    if layer is None:
        found = (layer_of(line.module) for line in lines if " = permute(" in line.code and line.code.startswith("rows"))
        return [next((f for f in found if f in known), known[0])]
    numbers = [name.rpartition(".")[2] for name in known]
    if str(layer) not in numbers:
        raise ValueError(f"layer {layer} is out of range: the model has layers {numbers[0]} to {numbers[-1]}")
    return [known[numbers.index(str(layer))]]


def render(found: Explanation, layer: str | int | None = None, colour: bool = False) -> str:
    """An explanation as text, for people."""
    style = Style(colour)
    facts = found.facts
    mesh = ", ".join(f"{axis}={size}" for axis, size in facts["mesh"].items())
    title = lambda text: f"\n{style(text, BOLD)}\n"
    chosen = choose(found.lines, layer)
    parts = [style(f"{facts['model']} on {mesh}", BOLD) + f"  ({math.prod(facts['mesh'].values())} ranks)"]
    if found.pair:
        before, after = (list(_layers(side, chosen, Style(False))) for side in found.pair)
        parts += [title("before (-) and after (+)"), *_difference(before, after, style)]
        return "\n".join(parts) + "\n"
    parts += [title("Passes"), _passes(facts["passes"])]
    parts += [title("Rewritten graph, one rank" + ("" if chosen == [""] else f": {', '.join(chosen)}")), LEGEND, ""]
    parts += _layers(found.lines, chosen, style)
    parts += [title("Parameters"), _parameter_table(facts["parameters"])]
    for choice in facts["choices"]:
        parts += [title(f"How {choice['module']} runs: predicted ms of one block, on {facts['machine']}")]
        parts += [cost.render(choice["candidates"])]
    parts += [title("Left replicated"), _replicated_table(facts["replicated"])]
    if facts["savings"]:
        parts += [title("What each optimisation saves in a step"), _savings_table(facts["savings"])]
    parts += [title("Collectives of one training step"), _collective_table(facts["collectives"], facts["letters"])]
    return "\n".join(parts) + "\n"


LEGEND = """>> collective    << collective in the backward    # dtype [local shape] layout over tp
R same on all ranks   E same, its gradient partial   S(d) split on dim d   P partial sum"""


def _table(rows: list, headers: list[str], **options) -> str:
    return tabulate(rows, headers, tablefmt="simple", disable_numparse=True, **options)


def _passes(passes: list[dict]) -> str:
    def change(p: dict) -> str:
        return ", ".join(
            [f"+{n} {k}" for k, n in p["inserted"].items()] + [f"-{n} {k}" for k, n in p["removed"].items()]
        )

    total: Counter[str] = Counter()
    rows = []
    for p in passes:
        before = sum(total.values())
        total.update(p["inserted"])
        total.subtract(p["removed"])
        rows.append(
            [
                p["name"],
                p["nodes_before"],
                p["nodes_after"],
                before,
                sum(total.values()),
                change(p),
                f"{p['seconds']:.2f} s",
            ]
        )
    headers = ["pass", "nodes before", "after", "collectives before", "after", "", "time"]
    return _table(rows, headers, colalign=("left", "right", "right", "right", "right", "left", "right"))


def _layers(lines: list[Line], chosen: list[str], style: Style) -> Iterator[str]:
    for layer in chosen:
        inside = [x for x in lines if not layer or x.module == layer or x.module.startswith(f"{layer}.")]
        kinds = {line.module: line.kind for line in inside}
        yield style(f"   {layer or 'model'}: {kinds.get(layer, '')}".rstrip(": "), BOLD)
        current = layer
        for i, line in enumerate(inside):
            alone = line.module not in (
                inside[i - 1].module if i else "", inside[i + 1].module if i + 1 < len(inside) else "",
            )  # fmt: skip
            module = line.module.rpartition(".")[0] if alone and line.module != layer else line.module
            if module != current and len(module) > len(layer):
                old, new = (
                    m.removeprefix(layer).strip(".").split(".") if m != layer else [] for m in (current, module)
                )
                same = next((k for k, (a, b) in enumerate(zip(old, new)) if a != b), min(len(old), len(new)))
                for k in range(same, len(new)):
                    kind = kinds.get(".".join([layer, *new[: k + 1]]).strip("."), "")
                    yield style(f"   {'  ' * (k + 1)}{new[k]}" + (f": {kind}" if kind else ""), BOLD)
            current = module
            depth = 1 + (len(module.removeprefix(layer).strip(".").split(".")) if len(module) > len(layer) else 0)
            code = f"{'  ' * depth}{line.code}"
            colour = {">>": COLLECTIVE, "<<": BACK}.get(line.mark, "")
            comment = f"# {line.comment}" if line.comment else ""
            text = style(f"{line.mark:2} {code}", colour) if colour else f"   {code}"
            yield (text + " " * max(2, 88 - len(code)) + style(comment, DIM)).rstrip()


def _difference(before: list[str], after: list[str], style: Style) -> Iterator[str]:
    for line in difflib.unified_diff(before, after, n=len(before) + len(after), lineterm=""):
        if not line.startswith(("---", "+++", "@@")):
            yield style(line, ADDED if line[0] == "+" else GONE) if line[0] in "+-" else line


def _parameter_table(parameters: list[dict]) -> str:
    groups: Counter[tuple] = Counter()
    for p in parameters:
        groups[_pattern(p["name"]), p["layout"], str(p["shape"]), str(p["local_shape"])] += 1
    total, local = (sum(math.prod(p[key]) for p in parameters) for key in ("shape", "local_shape"))
    rows = [[name, n, shape, local_shape, layout] for (name, layout, shape, local_shape), n in groups.items()]
    return _table(rows, ["parameter", "times", "shape", "local shape", "layout"]) + (
        f"\n\n{total:,} parameters, {local:,} on each rank ({100 * local / total:.1f} %)"
    )


def _replicated_table(replicated: list[dict]) -> str:
    if not replicated:
        return "nothing that could be split"
    return "\n".join(f"{r['module']}: {r['reason']}" for r in replicated)


def human(size: float) -> str:
    """1536 to '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    raise AssertionError


def _savings_table(savings: list[dict]) -> str:
    rows, rewrites = [], []
    for s in savings:
        before, after, note = s["before"], s["after"], f" ({s['note']})" if s["note"] else ""
        rewrites.append(f"{s['pass']}: {s['rewrite']}{note}")
        if before is None:
            continue
        cells = [s["pass"], f"{before['calls']} -> {after['calls']}"]
        for axis in ("ep", "tp"):
            saved = f" ({100 * (after[axis] / before[axis] - 1):+.0f} %)" if before[axis] else ""
            cells.append(f"{human(before[axis])} -> {human(after[axis])}{saved}")
        more = before["ep"] + before["tp"] - after["ep"] - after["tp"]
        rows.append([*cells, human(more) if more >= 0 else f"-{human(-more)}"])
    headers = ["optimisation", "collectives", "sent over ep (or ep x tp)", "sent over tp", "saved by each rank"]
    return _table(rows, headers) + "\n\n" + "\n".join(rewrites)


def _collective_table(found: list[dict], letters: dict[str, int]) -> str:
    if not found:
        return "none"
    rows = [
        [c["phase"], c["kind"], c["axis"], c["role"], c["module"] or "(model)", c["count"], human(c["bytes_per_rank"]),
         human(c["wire_bytes"]), c["formula"]]
        for c in found
    ]  # fmt: skip
    headers = ["phase", "kind", "axis", "role", "module", "count", "a call", "sent", "bytes a call"]
    text = _table(rows, headers, colalign=("left",) * 5 + ("right",) * 3 + ("left",))
    calls: Counter[str] = Counter()
    sent: Counter[str] = Counter()
    for c in found:
        calls[c["axis"]] += c["count"]
        sent[c["axis"]] += c["count"] * c["wire_bytes"]
    totals = [text, ""]
    for axis in calls:
        where = "data (dp x ep)" if axis == "data" else axis
        totals.append(f"{where}: {calls[axis]} calls, each rank sends {human(sent[axis])}")
    used = {str(x) for c in found for x in sympy.sympify(c["formula"], SYMBOLS).free_symbols}
    totals += ["", *(f"{name} = {letters[name]:,}: {LETTERS[name]}" for name in LETTERS if name in used)]
    return "\n".join(totals)
