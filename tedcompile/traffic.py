"""The collectives of a training step, from the rewritten forward graph: how many, how large, and their formulas.

The backward's collectives follow from the VJPs of our ops (a test compares them with the graph that autograd makes),
and the reduction of gradients from `reduce_gradients`. Letters in formulas: `LETTERS`. A formula is of one call; the
numbers in it are sizes of the model that have no letter, and bytes of elements that are not of the parameters' dtype.
"""

from __future__ import annotations

import contextlib
import math
import operator
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import sympy
import torch
from torch.fx import GraphModule, Node

from tedcompile import cost, graphs, layouts
from tedcompile.capture import layer_of, module_path
from tedcompile.layouts import Call, Layout, NoRule, R, Sections, aten
from tedcompile.mesh import MeshShape
from tedcompile.ops import ops
from tedcompile.options import Options
from tedcompile.passes import checkpoint, peepholes, reduce_gradients, small_sizes
from tedcompile.plan import CHAIN

LETTERS = {
    "B": "sequences of one rank", "S": "positions of a sequence", "T": "tokens of one rank, B*S",
    "K": "experts a token", "E": "experts", "H": "hidden size", "I": "expert size", "V": "vocabulary",
    "d": "head size",
    "U": "(token, rank) pairs, a token going once to each of n ranks with any of its experts: expected, with uniform "
    "routing, T*n*(1 - C(E - E/n, K)/C(E, K)); n = ep, or ep*tp for folded experts",
    "layers": "layers", "bytes": "of one element",
}  # fmt: skip


SYMBOLS = {name: sympy.Symbol(name) for name in (*LETTERS, "dp", "ep", "tp")}


def pattern(path: str) -> str:
    """`model.layers.3.mlp` to `model.layers.*.mlp`."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", path)


def parameters_of(gm: GraphModule) -> list[Node]:
    return [n for n in gm.graph.nodes if n.op == "placeholder" and n.meta["role"][0] == "parameter"]


def local_shape(shape: Iterable[int], placements: dict[str, Layout], mesh: MeshShape) -> tuple[int, ...]:
    local = tuple(shape)
    for axis, layout in placements.items():
        local = layout.local(local, mesh[axis])
    return local


def placements_of(node: Node, mesh: MeshShape) -> dict[str, Layout]:
    return {axis: p for axis, p in node.meta.get("placements", {}).items() if p.kind == "S" and mesh[axis] > 1}


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


class Shapes:
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
        return local_shape(value.shape, self.axes(node, index), self.mesh)


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


def cotangents(gm: GraphModule) -> set[Node]:
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
    shapes, letters = Shapes(gm, mesh), _Letters(gm, mesh, list(blocks))
    got = cotangents(gm)
    rows: Counter[tuple] = Counter()
    merged: dict[tuple, list[Node]] = {}

    def add(kind: str, axis: str, role: str, phase: str, module: str, operands: list[Node]) -> None:
        size = sum(_bytes(a.meta["val"], shapes.local(a)) for a in operands)
        if mesh[axis] > 1 and size:
            rows[kind, axis, role, phase, module, size, letters.total(operands, shapes) or str(size)] += 1

    for node in gm.graph.nodes:
        name = ted_name(node)
        if name in graphs.KINDS:
            role = "parameter" if node.args[0].meta["weights_only"] else "payload"
            role = role if node.args[0].meta["val"].is_floating_point() else "counts"
            module = pattern(module_path(node))
            add(graphs.KINDS[name], node.args[-1], role, "forward", module, [node.args[0]])
    for node in _replayed(gm, got, options):
        add(graphs.collective(node), node.args[-1], "payload", "recompute", pattern(module_path(node)), [node.args[0]])
    for node in reversed(gm.graph.nodes):
        if node in got and node.target in BACKWARD and node.args[0].meta.get("grad"):
            kind, axis = BACKWARD[node.target], node.args[-1]
            small = kind == "all_reduce" and _bytes(node.meta["val"], shapes.local(node)) <= peepholes.MERGED
            if node.meta["weights_only"] and small and "simplify_collectives" not in options.off:
                merged.setdefault((axis, node.meta["val"].dtype), []).append(node)
                continue
            role = "gradient" if node.meta["weights_only"] else "payload"
            add(kind, axis, role, "backward", pattern(module_path(node)), [node])
    groups = [bucket for nodes in merged.values() for bucket in _filled(nodes, shapes, peepholes.MERGED)]
    for bucket in groups:
        add(
            "all_reduce",
            bucket[0].args[-1],
            "gradient",
            "backward",
            _common([pattern(module_path(n)) for n in bucket]),
            bucket,
        )
    for axis, members in _buckets(gm, shapes, got, groups):
        module = _common([pattern(p.meta["role"][1]).rpartition(".")[0] for p in members])
        looked_up = _as_rows(members, shapes, mesh[axis])
        for operand in looked_up:
            add("all_gather", axis, "gradient", "backward", module, [operand])
        if not looked_up:
            add("all_reduce", axis, "gradient", "backward", module, members)
    found = [
        {
            "kind": kind, "axis": axis, "role": role, "phase": phase, "module": module, "count": count,
            "bytes_per_rank": size, "wire_bytes": _wire(kind, size, mesh[axis]), "formula": formula,
        }
        for (kind, axis, role, phase, module, size, formula), count in rows.items()
    ]  # fmt: skip
    return found, letters.known


def ted_name(node: Node) -> str:
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
    gm: GraphModule, shapes: Shapes, got: set[Node], groups: list[list[Node]]
) -> Iterator[tuple[str, list[Node]]]:
    """Parameters whose gradients are reduced together: those of one kind, from the last used to the first.

    `groups`: parameters entered over tp, or what is made of them, whose gradients come with the last of the group.
    """
    position = {n: i for i, n in enumerate(gm.graph.nodes)}
    members = [p for p in parameters_of(gm) if p in got]

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
        for bucket in reduce_gradients.buckets(parameters, lambda p: _bytes(p.meta["val"], shapes.local(p))):
            yield axis, bucket


def _as_rows(members: list[Node], shapes: Shapes, ranks: int) -> list[Node]:
    """What is gathered in place of an embedding's gradient (`reduce_gradients`): its tokens' rows, and their ids."""
    (p, *others) = members
    large = _bytes(p.meta["val"], shapes.local(p)) >= reduce_gradients.BUCKET
    looked_up = [u for u in p.users if u.target in (aten.embedding.default, ops.embedding_shard.default)]
    if others or not large or not looked_up or len(p.users) > 1 or looked_up[0].args[3:4] == (True,):
        return []
    (node,) = looked_up
    ids = node.args[1]
    few = reduce_gradients.fewer_rows(math.prod(shapes.local(ids)), shapes.local(p)[0], ranks)
    return [node, ids] if few else []


def _filled(nodes: list[Node], shapes: Shapes, limit: int) -> Iterator[list[Node]]:
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
                    known.setdefault("U", value[0].shape[0] * known.get("C", 1))
            elif n.target is ops.portions.default:
                known.setdefault("C", n.args[1])
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
            if "C" in known:  # of a part of the tokens
                self.tokens += [(letter / self.letters["C"], -(-size // known["C"])) for letter, size in self.tokens]
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

    def total(self, members: list[Node], shapes: Shapes) -> str | None:
        """The formula of what is sent at once; None where it is too long to say anything."""
        terms = Counter(self.product(m, shapes.axes(m)) for m in members)
        deep = self.known["layers"]
        times = lambda n: n // deep * self.letters["layers"] if deep > 1 and n % deep == 0 else n
        expression = sympy.factor_terms(sum(times(n) * term for term, n in terms.items()))
        return str(expression) if len(terms) < 9 else None
