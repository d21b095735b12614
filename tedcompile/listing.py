"""A rewritten graph as readable code, module by module."""

from __future__ import annotations

import operator
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from tedcompile import graphs
from tedcompile.capture import layer_of, module_path
from tedcompile.layouts import aten
from tedcompile.mesh import MeshShape
from tedcompile.ops import ops
from tedcompile.traffic import BACKWARD, Shapes, cotangents, ted_name


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
        self.shapes = Shapes(gm, self.mesh)
        self.received = cotangents(gm)
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
        if ted_name(node) in graphs.KINDS:
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
