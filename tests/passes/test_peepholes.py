"""Every identity of collectives on a joint graph: before and after, what only looks like it, and any order of them."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from torch.fx import Graph, GraphModule, Node

from tedcompile import graphs
from tedcompile.layouts import aten
from tedcompile.ops import ops
from tedcompile.passes import peepholes

SLICE, GATHER, ENTERING, REDUCE, SCATTER = (
    ops.slice.default, ops.gather.default, ops.gather_enter.default, ops.all_reduce.default, ops.reduce_scatter.default
)  # fmt: skip
PART = (0, 2, [], "tp")


class Build:
    """A graph of calls with values in the sizes they have on one of two ranks."""

    def __init__(self):
        self.graph = Graph()

    def input(self, name: str, *shape: int, dtype=torch.float32) -> Node:
        node = self.graph.placeholder(name)
        node.meta["val"] = torch.empty(shape, dtype=dtype, device="meta")
        return node

    def __call__(self, target, *args, **kwargs) -> Node:
        node = self.graph.call_function(target, args, kwargs)
        values = torch.fx.map_arg((args, kwargs), lambda n: n.meta["val"])
        node.meta["val"] = target(*values[0], **values[1])
        return node

    def simplified(self, *outputs: Node, identities=peepholes.IDENTITIES) -> str:
        self.graph.output(outputs)
        peepholes.simplify(self.graph, identities)
        self.graph.lint()
        return text(self.graph)


def text(graph: Graph) -> str:
    """What each output is made of, as one expression: names and order play no part."""

    def show(a) -> str:
        if not isinstance(a, Node):
            return f"({', '.join(map(show, a))})" if isinstance(a, (tuple, list)) else str(a)
        if a.op == "placeholder":
            return a.name
        name = a.target._schema.name.rpartition("::")[2]
        return f"{name}({', '.join(show(x) for x in a.args if x not in (0, 2, [], 'tp'))})"

    return "; ".join(show(a) for a in graph.output_node().args[0])


def case_slice_of_all_reduce(b: Build):
    return [b(SLICE, b(REDUCE, b.input("p", 4, 3), "tp"), *PART)], "reduce_scatter(p)"


def case_slice_of_gather(b: Build):
    return [b(SLICE, b(GATHER, b.input("x", 2, 3), *PART), *PART)], "x"


def case_slice_of_entering_gather(b: Build):
    return [b(SLICE, b(ENTERING, b.input("x", 2, 3), *PART), *PART)], "x"


def case_gather_of_slice(b: Build):
    return [b(GATHER, b(SLICE, b.input("x", 4, 3), *PART), *PART)], "x"


def case_sum_of_all_reduces(b: Build):
    x, y = b.input("x", 4), b.input("y", 4)
    return [b(aten.add.Tensor, b(REDUCE, x, "tp"), b(REDUCE, y, "tp"))], "all_reduce(add(x, y))"


def case_sum_of_reduce_scatters(b: Build):
    x, y = b.input("x", 4), b.input("y", 4)
    return [b(aten.add.Tensor, b(SCATTER, x, *PART), b(SCATTER, y, *PART))], "reduce_scatter(add(x, y))"


def case_sum_of_gathers(b: Build):
    x, y = b.input("x", 4), b.input("y", 4)
    return [b(aten.add.Tensor, b(GATHER, x, *PART), b(GATHER, y, *PART))], "all_gather(add(x, y))".replace("all_", "")


def case_unused(b: Build):
    x = b.input("x", 4)
    b(GATHER, b(SLICE, x, *PART), *PART)
    b(REDUCE, x, "tp")
    return [x], "x"


def case_two_steps(b: Build):
    x, y = b.input("x", 4), b.input("y", 4)
    total = b(aten.add.Tensor, b(REDUCE, x, "tp"), b(REDUCE, y, "tp"))
    return [b(SLICE, total, *PART)], "reduce_scatter(add(x, y))"


CASES = {name.removeprefix("case_"): f for name, f in list(globals().items()) if name.startswith("case_")}


@pytest.mark.parametrize("name", CASES)
def test_becomes(name):
    b = Build()
    outputs, expected = CASES[name](b)
    assert b.simplified(*outputs) == expected


def look_another_axis(b: Build):
    return [b(SLICE, b(REDUCE, b.input("p", 4), "ep"), *PART)]


def look_sum_read_twice(b: Build):
    whole = b(REDUCE, b.input("p", 4), "tp")
    return [b(SLICE, whole, *PART), whole]


def look_maximum(b: Build):
    return [b(SLICE, b(ops.all_max.default, b.input("p", 4), "tp"), *PART)]


def look_another_dim(b: Build):
    x = b.input("x", 4, 4)
    return [b(SLICE, b(GATHER, x, *PART), 1, 2, [], "tp"), b(GATHER, b(SLICE, x, *PART), 1, 2, [], "tp")]


def look_sections(b: Build):
    x = b.input("x", 4)
    return [b(SLICE, b(GATHER, x, *PART), 0, 2, [4, 4], "tp"), b(GATHER, b(SLICE, x, *PART), 0, 2, [2, 2], "tp")]


def look_sum_over_two_axes(b: Build):
    return [b(aten.add.Tensor, b(REDUCE, b.input("x", 4), "tp"), b(REDUCE, b.input("y", 4), "ep"))]


def look_sum_that_is_needed_too(b: Build):
    x = b(REDUCE, b.input("x", 4), "tp")
    return [b(aten.add.Tensor, x, b(REDUCE, b.input("y", 4), "tp")), x]


def look_sum_with_itself(b: Build):
    x = b(REDUCE, b.input("x", 4), "tp")
    return [b(aten.add.Tensor, x, x)]


def look_sum_by_broadcast(b: Build):
    return [b(aten.add.Tensor, b(REDUCE, b.input("x", 4, 4), "tp"), b(REDUCE, b.input("y", 4), "tp"))]


def look_scaled_sum(b: Build):
    return [b(aten.add.Tensor, b(REDUCE, b.input("x", 4), "tp"), b(REDUCE, b.input("y", 4), "tp"), alpha=2)]


def look_product(b: Build):
    return [b(aten.mul.Tensor, b(REDUCE, b.input("x", 4), "tp"), b(REDUCE, b.input("y", 4), "tp"))]


def look_two_dtypes(b: Build):
    x, y = b.input("x", 4), b.input("y", 4, dtype=torch.bfloat16)
    return [b(aten.add.Tensor, b(REDUCE, x, "tp"), b(REDUCE, y, "tp"))]


LOOKS = {name.removeprefix("look_"): f for name, f in list(globals().items()) if name.startswith("look_")}


@pytest.mark.parametrize("name", LOOKS)
def test_what_only_looks_alike_stays(name):
    b = Build()
    b.graph.output(tuple(LOOKS[name](b)))
    before = str(b.graph)
    peepholes.simplify(b.graph, peepholes.IDENTITIES)
    assert str(b.graph) == before


def composite(seed: int) -> tuple[Build, list[Node]]:
    """A random graph of collectives, slices and sums."""
    rng, b = random.Random(seed), Build()
    values = [b.input(f"x{i}", 8) for i in range(4)]
    for _ in range(14):
        a, c = rng.choice(values), rng.choice(values)
        n = a.meta["val"].shape[0]
        kind = rng.choice([SLICE, GATHER, ENTERING, REDUCE, SCATTER, aten.add.Tensor, aten.add.Tensor])
        if kind is aten.add.Tensor:
            if a.meta["val"].shape == c.meta["val"].shape:
                values.append(b(kind, a, c))
        elif kind is REDUCE:
            values.append(b(kind, a, "tp"))
        elif kind in (SLICE, SCATTER) and n > 2 or kind in (GATHER, ENTERING) and n < 32:
            values.append(b(kind, a, *PART))
    return b, values[-3:]


@pytest.mark.parametrize("seed", range(20))
def test_any_order_of_the_identities_leads_to_the_same_graph(seed):
    found = set()
    for order in itertools.islice(itertools.permutations(peepholes.IDENTITIES), 0, None, 17):
        b, outputs = composite(seed)
        found.add(b.simplified(*outputs, identities=order))
    assert len(found) == 1


def test_small_all_reduces_that_leave_the_graph_become_one():
    b = Build()
    x = [b.input(f"x{i}", 4, 2) for i in range(3)]
    large = b.input("large", peepholes.MERGED)
    sums = [b(REDUCE, x[2], "tp")]
    cast = b(aten.neg.default, sums[0])  # before the others are there
    sums = [*(b(REDUCE, a, "tp") for a in (x[0], x[1])), sums[0], b(REDUCE, large, "tp")]
    read = b(aten.mul.Tensor, b(REDUCE, b(aten.neg.default, x[0]), "tp"), x[1])  # read inside: not one of them
    inside = b(aten.sum.default, read)
    other = b(REDUCE, b(aten.neg.default, x[1]), "ep")
    b.graph.output((sums[0], sums[1], cast, sums[3], inside, other))
    gm = GraphModule({}, b.graph)
    peepholes.merge(gm.graph)
    gm.graph.lint()
    reduced = gm.graph.find_nodes(op="call_function", target=REDUCE)
    assert sorted(tuple(n.meta["val"].shape) for n in reduced) == [(4, 2), (4, 2), (24,), (peepholes.MERGED,)]

    def run(graph: Graph) -> list:
        given = [n for n in graph.nodes if n.op == "placeholder"]
        values = {n: torch.arange(1.0 * n.meta["val"].numel()).view(n.meta["val"].shape) for n in given}
        for n in graph.nodes:
            if n.op == "call_function":
                args = torch.fx.map_arg(n.args, values.__getitem__)
                values[n] = 2 * args[0] if n.target is REDUCE else n.target(*args)
        return [values[a] for a in graph.output_node().args[0]]

    got = run(gm.graph)
    base = torch.arange(8, dtype=torch.float32).view(4, 2)
    for have, want in zip(got[:3], (2 * base, 2 * base, -2 * base), strict=True):
        assert torch.equal(have, want)
    assert graphs.collective(reduced[0]) == "all_reduce"
