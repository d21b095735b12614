"""Experts held as modules that each run on data of a known size become one batched product, or one over sorted rows.

What a user writes:

    y = torch.cat([expert(chunk) for chunk, expert in zip(rows.chunk(E), experts)])     # chunks of places
    for e, expert in enumerate(experts):                                                # every expert on every token
        out = out + scores[:, e, None] * expert(x)
    y = torch.stack([expert(x) for expert in experts], dim=1)
    y = torch.cat([expert(part) for part, expert in zip(rows.split(counts.tolist()), experts)])    # sorted rows

After:  y = bmm(silu(bmm(rows (E, n, H), w1)), w2), with stacked weights, which `recognise_products` reads;
        for sorted rows y = grouped_mm(...), which `recognise_sorted` reads

The modules' code is merged by `merge_experts`; modules that differ stay as written.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator

import torch
from torch.fx import GraphModule, Node

from tedcompile import graphs
from tedcompile.capture import module_path, source_line
from tedcompile.layouts import aten, shape
from tedcompile.passes.merge_experts import Batched, Differs, Merge

CUTS = {aten.chunk.default, aten.split.Tensor, aten.unbind.int, aten.split_with_sizes.default}


def run(gm: GraphModule, ctx) -> None:
    for node in list(gm.graph.nodes):
        if node.target not in (aten.cat.default, aten.stack.default, aten.add.Tensor) or not node.users:
            continue
        for attempt in (_chunks, _sorted, _stack) if node.target is not aten.add.Tensor else (_sum,):
            before = set(gm.graph.nodes)
            try:
                with gm.graph.inserting_before(node):
                    out = attempt(gm, ctx, node)
            except Differs as error:
                for n in reversed(gm.graph.nodes):
                    if n not in before:
                        gm.graph.erase_node(n)
                if str(error) and attempt not in (_sum, _stack):  # sums are everywhere
                    at = source_line(node) or module_path(node)
                    ctx.unfit.append(str(error))
                    ctx.replicated.append((node, f"the modules at {at} are not experts of one form: {error}"))
                continue
            if out is not None:
                node.replace_all_uses_with(out)
                graphs.erase_unused(gm.graph)
                break


def _weights(node: Node) -> frozenset[Node]:
    """The parameters that a value is made of, back to where it enters."""
    return frozenset(_each_weight(node))


def _each_weight(node: Node) -> Iterator[Node]:
    seen, pending = set(), [node]
    while pending:
        n = pending.pop()
        if n in seen:
            continue
        seen.add(n)
        if n.meta.get("weights_only"):
            yield n
        elif not _enters(n):
            pending.extend(n.all_input_nodes)


def _enters(n: Node) -> bool:
    cut = n.target is operator.getitem and n.args[0].target in CUTS
    return cut or n.target is aten.slice.Tensor or (n.target is aten.select.int and n.args[1] == 0)


def _walk(node: Node, stop: Callable[[Node], bool]) -> list[Node]:
    """Where a value enters, in a fixed order."""
    found: dict[Node, None] = {}
    seen: set[Node] = set()

    def visit(n: Node) -> None:
        if n in seen or n.meta.get("weights_only"):
            return
        seen.add(n)
        if stop(n):
            found[n] = None
            return
        for a in n.all_input_nodes:
            visit(a)

    visit(node)
    return list(found)


def _chunks(gm: GraphModule, ctx, node: Node) -> Node | None:
    """cat or stack, on the first dim, of what each module makes of its part of one value."""
    parts = list(node.args[0])
    stacked = node.target is aten.stack.default
    if len(parts) < 2 or (node.args[1] if len(node.args) > 1 else 0) != 0 or not all(_weights(p) for p in parts):
        return None
    entries = [_walk(p, _enters) for p in parts]
    if any(len(e) != 1 for e in entries):
        return None
    pieces = [e[0] for e in entries]
    sources = {p.args[0].args[0] if p.target is operator.getitem else p.args[0] for p in pieces}
    if len(sources) != 1 or not all(isinstance(s, int) for p in pieces for s in (*shape(p), *_bounds(p))):
        return None
    sizes = {tuple(shape(p)) for p in pieces}
    if len(sizes) != 1:
        return None
    (source,), (size,), E = sources, sizes, len(parts)
    ids = torch.arange(shape(source)[0]).reshape(-1, *[1] * (len(shape(source)) - 1)).expand(shape(source))
    try:
        flat = torch.cat([graphs.evaluate(p, {source: ids}).reshape(-1) for p in pieces])
    except (graphs.Unknown, RuntimeError, IndexError):
        return None
    want = ids.reshape(-1)
    if not torch.equal(flat, want):
        return None
    merge = Batched(gm, ctx, E, {}, parts[0])
    whole = merge.add(aten.reshape.default, (source, [E, *size]))
    merge.entries[tuple(pieces)] = lambda: whole
    merge.rows = whole
    y = merge.value(tuple(parts))
    return y if stacked else merge.add(aten.reshape.default, (y, list(shape(node))))


def _sum(gm: GraphModule, ctx, node: Node) -> Node | None:
    """A sum of what every module makes of one value."""
    if any(u.target is aten.add.Tensor for u in node.users) and len(node.users) == 1 and _weights_differ(node):
        (user,) = node.users
        if _weights_differ(user):
            return None  # not the last of the sum
    terms: list[Node] = []
    n = node
    while n.target is aten.add.Tensor and not n.kwargs and all(isinstance(a, Node) for a in n.args):
        terms.insert(0, n.args[1])
        n = n.args[0]
    first = n
    terms = [t for t in (first, *terms)]
    groups: list[frozenset[Node]] = []
    for term in reversed(terms if len(terms) > 1 else []):
        found = _weights(term) if shape(term) == shape(node) else frozenset()
        if not found or (groups and len(found) != len(groups[0])):
            break
        groups.append(found)
    E = len(groups)
    if E < 2 or len(set(groups)) != E:
        return None
    experts, rest = terms[-E:], terms[:-E]
    x = _shared(experts)
    if x is None:
        return None
    merge = Batched(gm, ctx, E, {}, experts[0])
    whole = merge.add(aten.expand.default, (merge.add(aten.unsqueeze.default, (x, 0)), [E, *shape(x)]))
    merge.entries[(x,) * E] = lambda: whole
    merge.rows = whole
    own = [_walk(t, lambda n: n is x or _independent(n, x)) for t in experts]
    for group in zip(*own):
        if len(set(group)) == 1:
            continue
        if any(shape(g) != (*shape(x)[:-1], 1) for g in group):
            raise Differs("")
        merge.entries[group] = lambda group=group: merge.add(aten.stack.default, (list(group), 0))
    y = merge.value(tuple(experts))
    out = merge.add(aten.sum.dim_IntList, (y, [0]))
    for t in rest:
        out = merge.add(aten.add.Tensor, (t, out))
    return out


def _stack(gm: GraphModule, ctx, node: Node) -> Node | None:
    """stack, on any dim, of what every module makes of one value (..., H)."""
    parts = list(node.args[0])
    weights = [_weights(p) for p in parts]
    if node.target is not aten.stack.default or len(parts) < 2 or not all(weights) or len(set(weights)) < len(parts):
        return None
    x = _shared(parts)
    if x is None or any(_walk(p, lambda n: n is x) != [x] for p in parts):
        return None
    merge = Batched(gm, ctx, len(parts), {}, parts[0])
    whole = merge.add(aten.expand.default, (merge.add(aten.unsqueeze.default, (x, 0)), [len(parts), *shape(x)]))
    merge.entries[(x,) * len(parts)] = lambda: whole
    merge.rows = whole
    y = merge.value(tuple(parts))
    at = (*node.args[1:], 0)[0] % len(shape(node))
    for dim in range(at):
        y = merge.add(aten.transpose.int, (y, dim, dim + 1))
    return y


def _weights_differ(node: Node) -> bool:
    a, b = (node.args + (None, None))[:2]
    return isinstance(a, Node) and isinstance(b, Node) and any(True for _ in _each_weight(b))


def _independent(n: Node, x: Node) -> bool:
    """A value, such as a score, that no expert's weights and x have made together."""
    return isinstance(n.meta.get("val"), torch.Tensor) and shape(n) == (*shape(x)[:-1], 1)


def _shared(experts: list[Node]) -> Node | None:
    """The tokens (..., H) that every term multiplies its first weights with."""
    found = []
    for term in experts:
        inputs = set()
        pending, seen = [term], set()
        while pending:
            n = pending.pop()
            if n in seen or n.meta.get("weights_only"):
                continue
            seen.add(n)
            if n.target in (aten.linear.default, aten.matmul.default, aten.mm.default) and n.args[1].meta.get(
                "weights_only"
            ):
                inputs.add(n.args[0])
            pending.extend(n.all_input_nodes)
        found.append(inputs)
    common = set.intersection(*found) if found else set()
    common = {c for c in common if len(shape(c)) > 1}
    return next(iter(common)) if len(common) == 1 else None


def _sorted(gm: GraphModule, ctx, node: Node) -> Node | None:
    """cat of what each module makes of its rows, which were split by the experts' counts."""
    parts = list(node.args[0])
    if len(parts) < 2 or node.target is aten.stack.default or (node.args[1] if len(node.args) > 1 else 0) != 0:
        return None
    entries = [_walk(p, _enters) for p in parts]
    if any(len(e) != 1 for e in entries) or not all(_weights(p) for p in parts):
        return None
    pieces = [e[0] for e in entries]
    sources = {p.args[0].args[0] if p.target is operator.getitem else p.args[0] for p in pieces}
    if len(sources) != 1 or all(isinstance(s, int) for p in pieces for s in _bounds(p)):
        return None
    (source,), E = sources, len(parts)
    counts = _counts(pieces, source)
    if counts is None:
        raise Differs("their rows are not split by the number of each")
    merge = Merge(gm, ctx, E, {}, parts[0])
    merge.entries[tuple(pieces)] = lambda: source
    merge.rows, merge.counts = source, counts
    merge.numbers = tuple(shape(p)[0] for p in pieces)
    y = merge.value(tuple(parts))
    later = [n for n in gm.graph.nodes if n in _after(node)]
    node.replace_all_uses_with(y)
    for n in later:
        if n.op == "call_function":
            n.meta["val"] = graphs.value_of(n)
    return y


def _after(node: Node) -> set[Node]:
    found, pending = set(), list(node.users)
    while pending:
        n = pending.pop()
        if n not in found:
            found.add(n)
            pending.extend(n.users)
    return found


def _bounds(piece: Node) -> list:
    return (
        list(piece.args[2:4])
        if piece.target is aten.slice.Tensor
        else list(piece.args[0].args[1])
        if piece.args[0].target is aten.split_with_sizes.default
        else [0]
    )


def _counts(pieces: list[Node], source: Node) -> Node | None:
    """The numbers (E,) of which the bounds of consecutive pieces are made, as a tensor of the graph."""
    items: list[Node] = []
    pending = [b for p in pieces for b in _bounds(p) if isinstance(b, Node)]
    while pending:
        n = pending.pop()
        if n.target is aten.item.default:
            if n not in items:
                items.append(n)
        else:
            pending.extend(n.all_input_nodes)
    tensors = {
        i.args[0].args[0].args[0]
        for i in items
        if i.args[0].target is operator.getitem and i.args[0].args[0].target is aten.unbind.int
    }
    if len(tensors) != 1:
        return None
    (counts,) = tensors
    E, N = len(pieces), shape(source)[0]
    if counts.meta["val"].numel() != E and isinstance(shape(counts)[0], int):
        return None
    cut = sorted(torch.randint(N + 1, (E - 1,), generator=torch.Generator().manual_seed(0)).tolist())
    sizes = torch.tensor([b - a for a, b in zip([0, *cut], [*cut, N])])
    values: dict = {counts: sizes, source: torch.arange(N)[:, None].expand(N, shape(source)[1])}
    try:
        got = [graphs.evaluate(p, values) for p in pieces]
    except (graphs.Unknown, RuntimeError, IndexError):
        return None
    expected = values[source].split(sizes.tolist())
    if not all(torch.equal(a, b) for a, b in zip(got, expected)):
        return None
    counts.meta["val"] = counts.meta["val"].new_empty((E,))
    return counts
