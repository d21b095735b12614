"""The checker of layouts: runs after every pass and raises where a graph breaks the rules of `tedcompile.layouts`.

Caught: a replicated op that reads an entered value, an operand that is split or partial where the rule needs it whole,
a value with a gradient that is read as entered without `enter` (its gradient would stay a part), a partial, split or
entered value that leaves the graph, a parameter's placement that is not the layout it is read with.
"""

from __future__ import annotations

from torch.fx import GraphModule, Node

from tedcompile import layouts
from tedcompile.capture import module_path
from tedcompile.layouts import Call, E, Layout, NoRule, R, Sections, differentiable


class LayoutError(AssertionError):
    """A rewritten graph that would compute a wrong value or a wrong gradient."""


def run(gm: GraphModule, ctx) -> None:
    if ctx.shape.tp > 1:
        check(gm, ctx.shape.tp)


def check(gm: GraphModule, tp: int) -> dict[Node, Layout]:
    """Layouts of all values by the table; raises LayoutError with the node, what it needs and what it gets."""
    known: dict[Node, Layout] = {}
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            known[node] = node.meta.get("placements", {}).get("tp", R)
            continue
        call = Call(node, known, tp)
        if node.op == "output":
            for a in node.all_input_nodes:
                # without a gradient an entered value is just a value
                if known[a] != R and not (known[a] == E and not differentiable(a)):
                    raise LayoutError(f"{a.name} leaves the graph as {known[a]}, not as R")
            break
        try:
            result = layouts.apply(call)
        except (NoRule, Sections) as error:
            raise LayoutError(f"{_name(node)}: {error}") from None
        for a, want in call.needs.items():
            have = known[a]
            if have != want and not ({have.kind, want.kind} == {"R", "E"} and not differentiable(a)):
                raise LayoutError(f"{_name(node)} needs {a.name} as {want}, and it is {have}")
        known[node] = result
    return known


def _name(node: Node) -> str:
    operands = ", ".join(a.name for a in node.all_input_nodes)
    return f"{node.name} = {node.target}({operands}) in {module_path(node) or 'model'}"
