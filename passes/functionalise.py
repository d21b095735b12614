"""In-place ops become values.

Before:  b = clone(a);  v = select(b, 0, 1);  v.add_(c);  return b
After:   b = clone(a);  v = select(b, 0, 1);  w = add(v, c);  b1 = select_scatter(b, w, 0, 1);  return b1

Needs: a captured graph with fake values, in program order.
Leaves true: no node mutates another; a mutated buffer's last value is in `ctx.mutations[buffer placeholder]`.
Refuses: mutation of a parameter or an input, writing through a view whose inverse is not known, and changing a value
behind autograd's back (under no_grad, or through detach), whose gradient would no longer be the user's.
"""

from __future__ import annotations

import itertools

import torch
from torch.fx import Graph, GraphModule, Node

from tedcompile import graphs

aten = torch.ops.aten


def run(gm: GraphModule, ctx) -> None:
    if not any(_written(n) for n in gm.graph.nodes):
        return
    _split_into_slices(gm.graph)
    state = _Aliases(gm.graph, ctx)
    for node in list(gm.graph.nodes):
        state.visit(node)
    for node in reversed(gm.graph.nodes):
        if _written(node):
            gm.graph.erase_node(node)
        elif node.target is aten.view.default:  # of a value that may have other strides than what was written to
            node.target = aten.reshape.default
    kept = set(ctx.mutations.values())
    gm.graph.eliminate_dead_code(lambda n: n in kept or n.is_impure())


SPLITS = {aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int}


def _split_into_slices(graph: Graph) -> None:
    """The parts of a value that is written to become slices or selects: views of one value each."""
    changed = {_storage(n.args[0]) for n in graph.nodes if _written(n) and n.args and isinstance(n.args[0], Node)}
    for node in list(graph.nodes):
        if node.target not in SPLITS or _storage(node.args[0]) not in changed:
            continue
        unbind, parts = node.target is aten.unbind.int, node.meta["val"]
        dims = node.args[1 if unbind else 2 :] or (node.kwargs.get("dim", 0),)
        dim = dims[0] % node.args[0].meta["val"].dim()
        edges = [0, *itertools.accumulate(1 if unbind else part.shape[dim] for part in parts)]
        for user in list(node.users):
            i = user.args[1] % len(parts)
            at = (edges[i],) if unbind else (edges[i], edges[i + 1])
            with graph.inserting_after(node):
                target = aten.select.int if unbind else aten.slice.Tensor
                view = graph.call_function(target, (node.args[0], dim, *at))
            view.meta = dict(user.meta)
            user.replace_all_uses_with(view)
            graph.erase_node(user)
        graph.erase_node(node)


def _written(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return node.op == "call_function" and schema is not None and schema.is_mutable


def _storage(node: Node):
    value = node.meta.get("val")
    return value.untyped_storage()._cdata if isinstance(value, torch.Tensor) else None


# view op -> (graph, base value, new view value, view node) -> new base value
INVERSE = {
    aten.select.int: lambda g, b, v, n: g.call_function(aten.select_scatter.default, (b, v, *n.args[1:])),
    aten.slice.Tensor: lambda g, b, v, n: g.call_function(aten.slice_scatter.default, (b, v, *n.args[1:])),
    aten.narrow.default: lambda g, b, v, n: g.call_function(
        aten.slice_scatter.default, (b, v, n.args[1], n.args[2], n.args[2] + n.args[3])
    ),
    aten.diagonal.default: lambda g, b, v, n: g.call_function(aten.diagonal_scatter.default, (b, v, *n.args[1:])),
    aten.transpose.int: lambda g, b, v, n: g.call_function(aten.transpose.int, (v, *n.args[1:])),
    aten.t.default: lambda g, b, v, n: g.call_function(aten.t.default, (v,)),
    aten.unsqueeze.default: lambda g, b, v, n: g.call_function(aten.squeeze.dim, (v, n.args[1])),
    aten.permute.default: lambda g, b, v, n: g.call_function(
        aten.permute.default, (v, [list(n.args[1]).index(i) for i in range(len(n.args[1]))])
    ),
}
RESHAPES = {
    aten.view.default, aten.reshape.default, aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default,
    aten.flatten.using_ints, aten.unflatten.int,
}  # fmt: skip
SAME = {aten.alias.default, aten.detach.default, aten.contiguous.default, aten.to.dtype, aten._to_copy.default}
FUNCTIONAL = {
    aten.copy_.default: lambda g, v, n: g.call_function(
        aten.expand.default,
        (g.call_function(aten.to.dtype, (n.args[1], v.meta["val"].dtype)), list(v.meta["val"].shape)),
    ),
    aten.zero_.default: lambda g, v, n: g.call_function(aten.zeros_like.default, (v,)),
    aten.fill_.Scalar: lambda g, v, n: g.call_function(aten.full_like.default, (v, n.args[1])),
    aten.detach_.default: lambda g, v, n: g.call_function(aten.detach.default, (v,)),
}


class _Aliases:
    def __init__(self, graph: Graph, ctx):
        self.graph, self.ctx = graph, ctx
        self.parent: dict[Node, Node] = {}
        self.value: dict[Node, Node] = {}
        self.version: dict[Node, int] = {}
        self.seen: dict[Node, int] = {}
        self.owner: dict[Node, Node] = {}

    def set(self, node: Node, value: Node, version: int) -> None:
        self.value[node], self.seen[node], self.owner[value] = value, version, node

    def base(self, node: Node) -> Node:
        while node in self.parent:
            node = self.parent[node]
        return node

    def current(self, node: Node) -> Node:
        """The value of `node` now, after the writes so far."""
        base = self.base(node)
        version = self.version.get(base, 0)
        if node is not base and self.seen.get(node, 0) != version:
            parent = self.current(self.parent[node])
            if _written(node):  # an in-place op returns what it wrote to
                again = parent
            else:
                again = self.graph.call_function(node.target, (parent, *node.args[1:]), dict(node.kwargs))
                again.meta = dict(node.meta)
            self.set(node, again, version)
        return self.value.get(node, node)

    def visit(self, node: Node) -> None:
        with self.graph.inserting_before(node):
            if node.op == "output":
                node.args = torch.fx.map_arg(node.args, self.current)
                return
            if _written(node):
                self.write(node)
                return
            node.args = torch.fx.map_arg(node.args, self.current)
            node.kwargs = torch.fx.map_arg(node.kwargs, self.current)
        if node.target is aten.lift_fresh_copy.default:  # a copy, although its fake shares storage
            return
        source = next(
            (a for a in node.all_input_nodes if _storage(a) is not None and _storage(a) == _storage(node)), None
        )
        if source is not None:
            self.parent[node] = original = self.owner.get(source, source)
            self.seen[node] = self.version.get(self.base(original), 0)

    def write(self, node: Node) -> None:
        target = node.args[0]
        if not isinstance(target, Node) or node.target._schema.arguments[0].alias_info is None:
            raise ValueError(f"{node.target} writes into something other than its first argument{_where(node)}")
        old = self.current(target)
        new = self.functional(node, old)
        new.meta = dict(node.meta)
        base = self.base(target)
        self.version[base] = self.version.get(base, 0) + 1
        child, value = target, new
        self.set(target, new, self.version[base])
        while child in self.parent:
            parent = self.parent[child]
            if child.target is aten.detach.default and parent.meta.get("grad"):
                raise ValueError(f"a write through detach(){_where(node)} has no gradient; write it out of place")
            value = self.inverse(child, parent, value, node)
            value.meta = {**node.meta, "val": parent.meta["val"]}
            self.set(parent, value, self.version[base])
            child = parent
        if node.meta.get("no_grad") and old.meta.get("grad") and base.op != "placeholder":
            raise ValueError(f"a write under no_grad{_where(node)} to a value with a gradient; write it out of place")
        role = base.meta.get("role")
        if role and role[0] == "buffer":
            self.ctx.mutations[base] = value
        elif base.op == "placeholder":
            what = f"the {role[0]} {role[1]}" if role else base.name
            raise ValueError(f"the forward writes into {what}{_where(node)}; only buffers may change in a forward")
        self.parent[node] = target
        self.value[node], self.seen[node] = new, self.version[base]

    def functional(self, node: Node, old: Node) -> Node:
        args = (old, *torch.fx.map_arg(node.args[1:], self.current))
        kwargs = torch.fx.map_arg(node.kwargs, self.current)
        if node.target in FUNCTIONAL:
            stand_in = type("Call", (), {"args": args})
            new = FUNCTIONAL[node.target](self.graph, old, stand_in)
            for made in new.all_input_nodes:
                if "val" not in made.meta:  # the cast of a copy
                    made.meta = {**node.meta, "val": made.args[0].meta["val"].to(made.args[1])}
            return new
        name, overload = node.target._schema.name.split("::")[1], node.target._overloadname
        packet = getattr(getattr(torch.ops, node.target.namespace), name.rstrip("_"), None)
        if not name.endswith("_") or packet is None or overload not in packet.overloads():
            raise ValueError(f"{node.target} has no form without a write{_where(node)}; write it out of place")
        new = self.graph.call_function(getattr(packet, overload), args, kwargs)
        dtype = old.meta["val"].dtype
        if any(isinstance(v := a.meta["val"], torch.Tensor) and v.dtype != dtype for a in new.all_input_nodes):
            value = graphs.value_of(new)
            if value.dtype != dtype:  # a write keeps the dtype, the op without a write promotes it
                new.meta = {**node.meta, "val": value}
                new = self.graph.call_function(aten.to.dtype, (new, dtype))
        return new

    def inverse(self, child: Node, parent: Node, value: Node, node: Node) -> Node:
        if child.target in SAME or _written(child):
            return value
        if child.target in INVERSE:
            return INVERSE[child.target](self.graph, self.value.get(parent, parent), value, child)
        if child.target in RESHAPES:
            return self.graph.call_function(aten.reshape.default, (value, list(parent.meta["val"].shape)))
        raise ValueError(f"a write through {child.target}{_where(node)} is not supported; write it out of place")


def _where(node: Node) -> str:
    from tedcompile.capture import source_line

    line = source_line(node)
    return f" at {line}" if line else ""
