"""E copies of one expert's code become one, over the rows of all experts: what recognisers of loops share.

Before:  y0 = linear(silu(linear(x0, w1_0)), w2_0);  y1 = linear(silu(linear(x1, w1_1)), w2_1);  ...
After:   y = grouped_mm(silu(grouped_mm(rows, stacked_w1.T, counts)), stacked_w2.T, counts)

The copies are walked together from their results back; ops, constants and shapes must be the same in all of them, only
what enters and the weights differ. Weights are parameters of their own (`separate_experts.stack`), or entries of one
parameter in the order of the experts. `Batched` makes (E, n, ...) of values (n, ...), with bmm in place of grouped_mm.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable

import torch
from torch.fx import GraphModule, Node

from tedcompile import graphs
from tedcompile.capture import source_line
from tedcompile.layouts import aten, shape
from tedcompile.ops import ops
from tedcompile.passes.separate_experts import stack


class Differs(Exception):
    """The copies are not the same code, or an op in them has no form over the rows of all experts. `node`: which op."""

    def __init__(self, problem: str, node: Node | None = None):
        line = source_line(node) if node is not None else ""
        super().__init__(f"{problem}, at {line}" if line else problem)


# ops of rows whose arguments at these positions are dims, counted from the end in both forms
DIMS: dict[object, tuple[int, ...]] = {
    aten.chunk.default: (2,), aten.split.Tensor: (2,), aten.split_with_sizes.default: (2,), aten.slice.Tensor: (1,),
    aten.select.int: (1,), aten.softmax.int: (1,), aten.sum.dim_IntList: (1,), aten.mean.dim: (1,),
    aten.cat.default: (1,), aten.transpose.int: (1, 2), aten.stack.default: (1,), aten.amax.default: (1,),
    aten.glu.default: (1,),
}  # fmt: skip
DEFAULT_DIM = {aten.chunk.default: 0, aten.split.Tensor: 0, aten.split_with_sizes.default: 0, aten.slice.Tensor: 0,
               aten.cat.default: 0, aten.stack.default: 0, aten.glu.default: -1}  # fmt: skip
SAME = {aten.dropout.default, aten.to.dtype, aten._to_copy.default, aten.clone.default, aten.contiguous.default,
        aten.rms_norm.default, aten.layer_norm.default, aten.detach.default, operator.getitem}  # fmt: skip
VIEWS = {aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.expand.default}


class Merge:
    """Rows of all experts, sorted by expert: (N, ...) for values (n, ...)."""

    def __init__(
        self, gm: GraphModule, ctx, experts: int, entries: dict[tuple[Node, ...], Callable[[], Node]], like: Node
    ):
        self.graph, self.ctx, self.experts, self.entries, self.like = gm.graph, ctx, experts, entries, like
        self.counts: Node | None = None
        self.rows: Node | None = None
        self.done: dict[tuple[Node, ...], Node] = {}
        self.numbers: tuple = ()  # of rows of each expert, where values hold an example's

    def add(self, target, args, like: Node | None = None) -> Node:
        if target is aten.reshape.default and list(args[1]) == list(shape(args[0])):
            return args[0]
        return graphs.call(self.graph, target, args, like or self.like)

    # ---- values

    def value(self, nodes: tuple[Node, ...]) -> Node:
        """The merged value of E corresponding values, at least one of them of rows."""
        if nodes not in self.done:
            self.done[nodes] = self.entries[nodes]() if nodes in self.entries else self.merge(nodes)
        return self.done[nodes]

    def of_rows(self, nodes: tuple[Node, ...]) -> bool:
        pending, seen = [nodes[0]], set()
        firsts = {e[0] for e in self.entries}
        while pending:
            n = pending.pop()
            if n in firsts:
                return True
            if n not in seen and not n.meta.get("weights_only"):
                seen.add(n)
                pending.extend(n.all_input_nodes)
        return False

    def merge(self, nodes: tuple[Node, ...]) -> Node:
        first = nodes[0]
        if any(
            n.op != "call_function" or n.target is not first.target or len(n.args) != len(first.args) for n in nodes
        ):
            other = next((n for n in nodes if n.target is not first.target), nodes[-1])
            what = (
                f"{first.target} and {other.target}"
                if other.target is not first.target
                else f"two kinds of {first.target}"
            )
            raise Differs(f"the experts are not the same code: {what}", other)
        if any(n.kwargs != first.kwargs for n in nodes):
            raise Differs(f"{first.name} has other options for each expert", first)
        target, args = first.target, list(zip(*(n.args for n in nodes)))
        if target in (aten.linear.default, aten.mm.default, aten.matmul.default, aten.addmm.default):
            return self.product(target, args, first)
        if target is aten.unsqueeze.default:
            dim = args[1][0]
            return self.add(target, (self.value(args[0]), dim if dim < 0 else dim - first.meta["val"].dim()), first)
        if target is aten.squeeze.dim:
            dim = args[1][0]
            return self.add(
                target, (self.value(args[0]), dim if dim < 0 else dim - args[0][0].meta["val"].dim()), first
            )
        if target in VIEWS:
            x = self.value(args[0])
            view = self.add(target, (x, self.sizes(args[1], nodes)), first)
            before = x.args[0] if x.target is aten.unsqueeze.default else x
            return before if shape(before) == shape(view) else view
        if target in DIMS:
            return self.with_dims(target, args, first)
        if target in (aten.rms_norm.default, aten.layer_norm.default) and len(args) > 2:
            x = (
                self.add(target, (self.value(args[0]), args[1][0], *(None,) * (len(args) - 2), *args[4][:1]), first)
                if target is aten.layer_norm.default and len(args) > 4
                else self.add(
                    target,
                    (
                        self.value(args[0]),
                        args[1][0],
                        None,
                        *(a[0] for a in args[3 if target is aten.rms_norm.default else 4 :]),
                    ),
                    first,
                )
                if target is aten.rms_norm.default
                else self.add(target, (self.value(args[0]), args[1][0]), first)
            )
            for position, op in ((2, aten.mul.Tensor), (3, aten.add.Tensor)):
                if (
                    target is aten.rms_norm.default
                    and position == 3
                    or len(args) <= position
                    or args[position][0] is None
                ):
                    continue
                x = self.add(op, (x, self.operand(args[position], shape(first))), first)
            return x
        pointwise = torch.Tag.pointwise in getattr(target, "tags", ())
        if target not in SAME and not pointwise:
            raise Differs(f"{target} of an expert's rows has no form over the rows of all experts", first)
        made = []
        for each in args:
            if isinstance(each[0], Node):
                made.append(self.operand(each, shape(first)) if pointwise else self.value(each))
            elif any(a != each[0] for a in each):
                raise Differs(f"{first.name} has other constants for each expert", first)
            else:
                made.append(each[0])
        node = self.graph.call_function(target, tuple(made), dict(first.kwargs))
        node.meta = {k: first.meta[k] for k in graphs.KEPT if k in first.meta}
        node.meta["val"] = graphs.value_of(node)
        graphs.set_facts(node)
        return node

    def with_dims(self, target, args, first: Node) -> Node:
        positions = DIMS[target]
        args = [list(a) for a in args]
        for p in positions:
            if len(args) <= p:
                if target not in DEFAULT_DIM or len(args) < p:
                    raise Differs(f"{first.name} is over all dims of an expert's rows", first)
                args.append([DEFAULT_DIM[target]] * self.experts)
        joined = target in (aten.cat.default, aten.stack.default)
        dims = first.meta["val"].dim() if joined else args[0][0].meta["val"].dim()
        made = []
        for p, each in enumerate(args):
            if p in positions:
                given = each[0] if isinstance(each[0], (list, tuple)) else [each[0]]
                moved = [d if d < 0 else d - dims for d in given]
                if any(d == -dims for d in moved) and not self.keeps_rows(target):
                    raise Differs(f"{first.name} mixes an expert's rows", first)
                made.append(moved if isinstance(each[0], (list, tuple)) else moved[0])
            elif p == 0 and joined:
                made.append([self.value(tuple(part)) for part in zip(*each)])
            elif p == 0:
                made.append(self.value(tuple(each)))
            elif any(a != each[0] for a in each):
                raise Differs(f"{first.name} has other constants for each expert", first)
            else:
                made.append(each[0])
        node = self.add(target, tuple(made), first)
        return node

    def keeps_rows(self, target) -> bool:
        return False

    def sizes(self, given: tuple, nodes: tuple[Node, ...]) -> list:
        """The sizes of a view; the number of an expert's rows becomes that of all."""
        made: list = []
        for each in zip(*given):
            known = isinstance(each[0], int) and not (len(made) == 0 and each == self.numbers)
            if known and any(s != each[0] for s in each):
                raise Differs(f"{nodes[0].name} has other sizes for each expert")
            made.append(each[0] if known else shape(self.rows)[0])
        return made

    # ---- weights

    def weight(self, nodes: tuple[Node, ...]) -> Node:
        """(E, ...) for E values made of parameters alone."""
        if nodes in self.done:
            return self.done[nodes]
        first = nodes[0]
        roles = [n.meta.get("role", ("",))[0] for n in nodes]
        if all(r == "parameter" for r in roles) and len(set(nodes)) == len(nodes):
            if len({tuple(shape(n)) for n in nodes}) > 1:
                raise Differs(f"the experts' parameters {first.meta['role'][1]} have other shapes")
            made = stack(self.graph, self.ctx, nodes)
        elif all(n.op == "call_function" and n.target is first.target for n in nodes):
            made = self.entries_of(nodes) or self.along(nodes)
        else:
            raise Differs(f"{first.name} is not a weight of every expert", first)
        self.done[nodes] = made
        return made

    def entries_of(self, nodes: tuple[Node, ...]) -> Node | None:
        """One parameter whose entries the nodes are, in order."""
        sources = {n.args[0] for n in nodes}
        if len(sources) > 1:
            return None
        (source,) = sources
        if nodes[0].target is aten.select.int:
            dims, order = {n.args[1] for n in nodes}, [n.args[2] for n in nodes]
            if dims == {0} and order == list(range(self.experts)) and shape(source)[0] == self.experts:
                return source
        unbound = nodes[0].target is operator.getitem and source.target is aten.unbind.int
        parts = nodes[0].target is operator.getitem and source.target in (aten.chunk.default, aten.split.Tensor)
        if (unbound or parts) and [n.args[1] for n in nodes] == list(range(self.experts)):
            whole, dim = source.args[0], (*source.args[2 if parts else 1 :], 0)[0]
            if dim == 0 and shape(whole)[0] == self.experts:
                return self.add(aten.unsqueeze.default, (whole, 1), nodes[0]) if parts else whole
        return None

    def along(self, nodes: tuple[Node, ...]) -> Node:
        first, rest = nodes[0], nodes[0].args[1:]
        if any(n.args[1:] != rest for n in nodes):
            raise Differs(f"{first.name} is not the same op for each expert's weight", first)
        x = self.weight(tuple(n.args[0] for n in nodes))
        ndim = first.args[0].meta["val"].dim() if isinstance(first.args[0].meta["val"], torch.Tensor) else 0
        up = lambda d: d if d < 0 else d + 1
        if first.target is aten.t.default:
            return self.add(aten.transpose.int, (x, 1, ndim), first)
        if first.target is aten.squeeze.dim and x.target is aten.unsqueeze.default and x.args[1] == up(rest[0]):
            return x.args[0]
        if first.target in (aten.transpose.int, aten.squeeze.dim, aten.select.int):
            return self.add(
                first.target,
                (x, up(rest[0]), *(up(d) if first.target is aten.transpose.int else d for d in rest[1:])),
                first,
            )
        if first.target is aten.unsqueeze.default:
            return self.add(first.target, (x, up(rest[0])), first)
        if first.target is aten.permute.default:
            return self.add(first.target, (x, [0, *(d % ndim + 1 for d in rest[0])]), first)
        if first.target in VIEWS:
            return self.add(aten.reshape.default, (x, [-1, *rest[0]]), first)
        if first.target in (aten.chunk.default, aten.split.Tensor):
            return self.add(first.target, (x, rest[0], up(rest[1] if len(rest) > 1 else 0)), first)
        if first.target is aten.slice.Tensor:
            return self.add(first.target, (x, up(rest[0] if rest else 0), *rest[1:]), first)
        if first.target in (
            aten.to.dtype,
            aten._to_copy.default,
            aten.contiguous.default,
            aten.clone.default,
            operator.getitem,
        ):
            return self.add(first.target, (x, *rest), first)
        raise Differs(f"{first.target} of an expert's weight")

    def operand(self, nodes: tuple[Node, ...], result: tuple) -> Node:
        """An operand that broadcasts against rows."""
        if all(isinstance(n, Node) for n in nodes) and self.of_rows(nodes):
            return self.value(nodes)
        if len(set(nodes)) == 1:
            if nodes[0].meta["val"].dim() >= len(result):
                raise Differs(f"{nodes[0].name} meets the rows of every expert")
            return nodes[0]
        return self.spread(self.weight(nodes), len(result))

    def spread(self, weight: Node, dims: int) -> Node:
        """A weight (E, ...) of each row, against a result of so many dims."""
        assert self.counts is not None and self.rows is not None
        x = self.add(ops.per_expert.default, (weight, self.counts, self.rows))
        missing = dims - x.meta["val"].dim()
        if missing < 0 and shape(weight)[1] == 1:  # a bias (E, 1, I)
            return self.add(aten.squeeze.dim, (x, 1))
        return self.add(aten.reshape.default, (x, [shape(x)[0], *[1] * missing, *shape(x)[1:]])) if missing > 0 else x

    def product(self, target, args, first: Node) -> Node:
        bias = None
        if target is aten.linear.default:
            x, w, *rest = args
            bias = rest[0] if rest and rest[0][0] is not None else None
        elif target is aten.addmm.default:
            bias, x, w = args
        else:
            x, w = args
        if any(not isinstance(n, Node) for n in w) or self.of_rows(w):
            raise Differs(f"{first.name} is no product with a weight", first)
        rows = self.value(x)
        if len(set(w)) == 1 and len(set(bias or (None,))) == 1:
            raise Differs(f"{first.name} has one weight for all experts", first)
        weight = self.weight(w)
        if target is aten.linear.default:
            weight = self.add(aten.transpose.int, (weight, 1, 2), first)
        y = self.matmul(rows, weight, first)
        if bias is not None:
            y = self.add(aten.add.Tensor, (y, self.operand(bias, shape(first))), first)
        return y

    def matmul(self, rows: Node, weight: Node, first: Node) -> Node:
        x, lead = rows, list(shape(rows))
        if len(lead) != 2:
            if any(s != 1 for s in lead[:-2]):
                raise Differs(f"{first.name} is a product of more than rows", first)
            x = self.add(aten.reshape.default, (x, lead[-2:]), first)
        y = self.add(ops.grouped_mm.default, (x, weight, self.counts), first)
        return y if len(lead) == 2 else self.add(aten.reshape.default, (y, [*lead[:-1], shape(y)[1]]), first)


class Batched(Merge):
    """(E, n, ...) for values (n, ...) of each expert."""

    def sizes(self, given: tuple, nodes: tuple[Node, ...]) -> list:
        return [self.experts, *super().sizes(given, nodes)]

    def spread(self, weight: Node, dims: int) -> Node:
        missing = dims + 1 - weight.meta["val"].dim()
        return self.add(aten.reshape.default, (weight, [self.experts, *[1] * missing, *shape(weight)[1:]]))

    def matmul(self, rows: Node, weight: Node, first: Node) -> Node:
        size = list(shape(rows))
        if len(size) == 3:
            return self.add(aten.bmm.default, (rows, weight), first)
        flat = self.add(aten.reshape.default, (rows, [size[0], math.prod(size[1:-1]), size[-1]]), first)
        y = self.add(aten.bmm.default, (flat, weight), first)
        return self.add(aten.reshape.default, (y, [*size[:-1], shape(y)[-1]]), first)
