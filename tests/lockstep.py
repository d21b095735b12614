"""Runs a distributed forward graph as all its ranks at once, in one process and without process groups.

Every node is evaluated for each rank before the next one; a collective is one autograd function of all ranks' values,
written from its definition in `tedcompile.layouts`, not from the kernels. So values and gradients of a graph can be
compared with the plain module in fp64, in milliseconds.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from tedcompile import graphs, pipeline
from tedcompile.capture import Captured, capture
from tedcompile.layouts import Layout
from tedcompile.mesh import AXES, MeshShape
from tedcompile.ops import groups, ops
from tedcompile.options import Options
from tedcompile.pipeline import Context


def captured(module: nn.Module, kwargs: dict[str, Any]) -> Captured:
    """A captured module with the facts that passes read, as `run_forward` sets them."""
    result = capture(module, kwargs)
    result.gm.meta["constants"] = result.constants
    for node in result.gm.graph.nodes:
        graphs.set_facts(node)
    return result


def after(
    module: nn.Module, kwargs: dict[str, Any], *passes, mesh: MeshShape | None = None
) -> tuple[GraphModule, Context]:
    """The captured graph of a module after the given passes only."""
    gm, ctx = captured(module, kwargs).gm, Context(mesh or MeshShape())
    for p in passes:
        p.run(gm, ctx)
        gm.graph.lint()
    return gm, ctx


def distributed(
    module: nn.Module, kwargs: dict[str, Any], mesh: MeshShape, own_plan: bool = False, **options
) -> tuple[GraphModule, Context]:
    """The distributed forward graph of a module, by all forward passes; TED's plan, where none is given.

    `own_plan`: the cost model's.
    """
    plan = {} if own_plan else {"experts": "tensor", "dispatch": "all_to_all"} | options.pop("plan", {})
    if not own_plan and mesh.ep > 1 and mesh.tp > 1 and "off" not in options:
        plan.setdefault("drop", "yes")
    ctx = Context(mesh, options=Options.of(plan=plan, **options))
    return pipeline.run_forward(captured(module.train(), kwargs), ctx), ctx


def text(gm: GraphModule) -> str:
    """The graph's calls, one a line, as `name: layout = op(arguments)`."""
    lines = []
    for n in gm.graph.nodes:
        if n.op == "call_function":
            op = str(n.target).removesuffix(".default") if hasattr(n.target, "_schema") else n.target.__name__
            arguments = [*map(str, n.args), *(f"{k}={v}" for k, v in n.kwargs.items())]
            layout = n.meta.get("layout", "")
            layout = "(" + ", ".join(map(str, layout)) + ")" if isinstance(layout, tuple) else layout
            lines.append(f"{n.name.removesuffix('_default')}: {layout} = {op}({', '.join(arguments)})")
    return "\n".join(lines)


def placements(gm: GraphModule) -> dict[str, dict[str, str]]:
    """The layouts of the parameters that are split, by axis."""
    nodes = [n for n in gm.graph.nodes if n.meta.get("placements")]
    return {n.meta["role"][1]: {a: str(p) for a, p in n.meta["placements"].items()} for n in nodes}


def targets(gm: GraphModule) -> list[str]:
    """The names of the graph's ops, without overloads."""
    return [n.target._schema.name for n in gm.graph.nodes if hasattr(n.target, "_schema")]


def shard(whole: Tensor, layout: Layout | None, size: int, index: int) -> Tensor:
    """One rank's part of a tensor."""
    if layout is None or layout.kind != "S":
        return whole
    sections = layout.sections or (whole.shape[layout.dim],)
    return torch.cat([s.chunk(size, layout.dim)[index] for s in whole.split(sections, layout.dim)], layout.dim)


def unshard(parts: Sequence[Tensor], dim: int, sections: Sequence[int]) -> Tensor:
    if not sections:
        return torch.cat(list(parts), dim)
    pieces = [p.split([s // len(parts) for s in sections], dim) for p in parts]
    return torch.cat([piece for each in zip(*pieces) for piece in each], dim)


def _joint(forward: Callable, backward: Callable) -> Callable:
    """Two functions of (all ranks' tensors, the node's other arguments) as one differentiable function."""

    class Joint(torch.autograd.Function):
        @staticmethod
        def forward(ctx, args, *xs):
            ctx.args = args
            return tuple(y.clone() for y in forward(xs, *args))

        @staticmethod
        def backward(ctx, *gs):
            return None, *backward(gs, *ctx.args)

    return Joint.apply


def _total(xs, *_):
    return [sum(xs)] * len(xs)


def _split(xs, dim, size, sections, axis):
    return [shard(x, Layout("S", dim, tuple(sections)), size, i) for i, x in enumerate(xs)]


def _whole(xs, dim, size, sections, axis):
    return [unshard(xs, dim, sections)] * len(xs)


def _scattered(xs, dim, size, sections, axis):
    return _split([sum(xs)] * len(xs), dim, size, sections, axis)


def _padded(x: Tensor, number: int | None) -> Tensor:
    """With zeros to so many rows."""
    return x if number is None else torch.cat([x, x.new_zeros(number - x.shape[0], *x.shape[1:])])


def _travel(xs, splits, lengths=None, *_):
    """splits: of each rank, (2, size): rows to and from each rank; lengths: of the results, with padding."""
    pieces = [x[: int(s[0].sum())].split(s[0].tolist()) for x, s in zip(xs, splits)]
    return [_padded(torch.cat([p[i] for p in pieces]), lengths and lengths[i]) for i in range(len(xs))]


def _all_rows(xs, sizes, *_):
    return [torch.cat([x[:n] for x, n in zip(xs, sizes)])] * len(xs)


def _own_sums(xs, sizes, lengths):
    return [_padded(part, n) for part, n in zip(sum(xs).split(sizes), lengths)]


def _own_experts(xs, dim, size, axis):
    return [torch.cat([x.chunk(size, 0)[r] for x in xs], dim) for r in range(size)]


def _parts_of_experts(gs, dim, size, axis):
    return [torch.cat([g.chunk(size, dim)[r] for g in gs], 0) for r in range(size)]


def random(kind: str, salt: int, data: int, size: Sequence[int]) -> Tensor:
    """The numbers of the random op of this number on a data rank, for the plain module and the graph alike."""
    generator = torch.Generator().manual_seed(1000 * data + salt)
    return (torch.rand if kind == "uniform" else torch.randn)(*size, generator=generator)


class Plain(torch.overrides.TorchFunctionMode):
    """The plain module on one data rank: random functions draw `random`, torch's grouped product takes fp64 too."""

    def __init__(self, data: int):
        super().__init__()
        self.data, self.salt = data, -1

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch._grouped_mm, torch.nn.functional.grouped_mm) and args[0].dtype == torch.float64:
            ends = [0, *kwargs["offs"].tolist()]
            parts = [args[0][a:b] @ args[1][e] for e, (a, b) in enumerate(zip(ends, ends[1:]))]
            return torch.cat([*parts, args[0].new_zeros(args[0].shape[0] - ends[-1], args[1].shape[2])])
        if func not in (torch.rand, torch.rand_like, torch.randn_like, Tensor.uniform_):
            return func(*args, **kwargs)
        self.salt += 1
        like = args[0] if isinstance(args[0], Tensor) else torch.empty(*args)
        drawn = random("normal" if func is torch.randn_like else "uniform", self.salt, self.data, like.shape)
        if func is Tensor.uniform_:
            return like.copy_(drawn * (args[2] - args[1]) + args[1])
        return drawn.to(like.dtype)


COLLECTIVES = {
    ops.enter.default: _joint(lambda xs, *_: xs, _total),
    ops.all_reduce.default: _joint(_total, lambda gs, *_: gs),
    ops.all_max.default: _joint(lambda xs, *_: [torch.stack(xs).amax(0)] * len(xs), lambda gs, *_: [None] * len(gs)),
    ops.slice.default: _joint(_split, _whole),
    ops.gather.default: _joint(_whole, _split),
    ops.gather_enter.default: _joint(_whole, _scattered),
    ops.reduce_scatter.default: _joint(_scattered, _whole),
    ops.own_experts.default: _joint(_own_experts, _parts_of_experts),
}
TRAVEL = _joint(_travel, lambda gs, splits, lengths, sent: _travel(gs, [s.flip(0) for s in splits], sent))
GATHER_ROWS, SCATTER_ROWS = _joint(_all_rows, _own_sums), _joint(_own_sums, _all_rows)


class Ranks:
    """All ranks of a mesh; rank r has the coordinates `self.at[r]`."""

    def __init__(self, mesh: MeshShape, monkeypatch, alike: bool = False):
        """`alike`: random ops draw the numbers that `Plain` draws, not their own."""
        self.mesh, self.alike = mesh, alike
        self.at = [dict(zip(AXES, c)) for c in itertools.product(*(range(mesh[a]) for a in AXES))]
        # local kernels ask for their rank by the axis, which is rewritten to name the rank itself
        monkeypatch.setattr(groups, "index_in", lambda axis: int(axis))

    def groups(self, axis: str) -> list[list[int]]:
        along = {"data": ("dp", "ep"), "ept": ("ep", "tp")}.get(axis, (axis,))
        found: dict[tuple, list[int]] = {}
        for r, at in enumerate(self.at):
            found.setdefault(tuple(v for k, v in at.items() if k not in along), []).append(r)
        return list(found.values())

    def local(self, node, whole: Tensor, r: int) -> Tensor:
        for axis, layout in sorted(node.meta.get("placements", {}).items()):
            whole = shard(whole, layout, self.mesh[axis], self.at[r][axis])
        return whole

    def run(self, gm: GraphModule, values: Callable[[Any, int], Tensor]) -> list[tuple]:
        """The outputs of each rank. `values(placeholder, rank)` are the local inputs."""
        env: dict[Any, list] = {}
        for node in gm.graph.nodes:
            if node.op == "placeholder":
                env[node] = [values(node, r) for r in range(len(self.at))]
                continue
            args = [torch.fx.map_arg(node.args, lambda n: env[n][r]) for r in range(len(self.at))]  # noqa: B023
            if node.op == "output":
                return [a[0] for a in args]
            assert node.op == "call_function"
            kwargs = [torch.fx.map_arg(node.kwargs, lambda n: env[n][r]) for r in range(len(self.at))]  # noqa: B023
            env[node] = self.call(node.target, args, kwargs)
        raise AssertionError("the graph has no output")

    def call(self, target: Any, args: list[tuple], kwargs: list[dict]) -> list:
        schema = getattr(target, "_schema", None)
        axis = args[0][-1] if schema and schema.arguments and schema.arguments[-1].name == "axis" else None
        if self.alike and target is ops.site.default:
            return [torch.tensor(number) for _, number in args]
        if self.alike and target is ops.rand.default:
            return [self.random(r, *a) for r, a in enumerate(args)]
        if target is ops.share.default:
            return [_Share.apply(x, size) for x, size, _ in args]
        if axis and getattr(target, "namespace", "") == "ted":
            for special in (self.collective, self.exchange):
                found = special(target, axis, args)
                if found is not None:
                    return found
            args = [(*a[:-1], str(self.index(axis, r))) for r, a in enumerate(args)]
        return [target(*a, **k) for a, k in zip(args, kwargs)]

    def data(self, r: int) -> int:
        return self.at[r]["dp"] * self.mesh.ep + self.at[r]["ep"]

    def random(self, r: int, like: Tensor, site: Tensor, kind: str, axis: str) -> Tensor:
        if not axis:
            return random(kind, int(site), self.data(r), like.shape)
        size = (like.shape[0] * self.mesh[axis], *like.shape[1:])  # tokens are split
        whole = random(kind, int(site), self.data(r), size)
        return whole.chunk(self.mesh[axis])[self.at[r][axis]]

    def index(self, axis: str, r: int) -> int:
        return next(g.index(r) for g in self.groups(axis) if r in g)

    def collective(self, target, axis: str, args: list[tuple]) -> list | None:
        if target not in COLLECTIVES:
            return None
        results: list = [None] * len(args)
        for group in self.groups(axis):
            for r, y in zip(group, COLLECTIVES[target](args[group[0]][1:], *(args[r][0] for r in group))):
                results[r] = y
        return results

    def exchange(self, target, axis: str, args: list[tuple]) -> list | None:
        results: list = [None] * len(args)
        for group in self.groups(axis):
            if target is ops.exchange_counts.default:
                sent = torch.stack([args[r][0] for r in group]).view(len(group), len(group), -1)  # (from, to, experts)
                made = list(sent.transpose(0, 1))
            elif target in (ops.all_to_all.default, ops.all_to_all_like.default):
                xs, splits = [args[r][0] for r in group], [args[r][1] for r in group]
                back = target is ops.all_to_all_like.default
                lengths = [args[r][2].shape[0] for r in group] if back else None
                made = TRAVEL((splits, lengths, [x.shape[0] for x in xs]), *xs)
            elif target is ops.gather_rows.default:
                xs = [args[r][0] for r in group]
                made = GATHER_ROWS((args[group[0]][1].tolist(), [x.shape[0] for x in xs]), *xs)
            elif target is ops.scatter_rows.default:
                lengths = [args[r][2].shape[0] for r in group]
                made = SCATTER_ROWS((args[group[0]][1].tolist(), lengths), *(args[r][0] for r in group))
            else:
                return None
            for r, y in zip(group, made):
                results[r] = y
        return results


class _Share(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, size):
        return x / size

    @staticmethod
    def backward(ctx, g):
        return g, None


def parity(module: nn.Module, batches: list[dict[str, Any]], mesh: MeshShape, monkeypatch, graph=None) -> GraphModule:
    """Asserts that the distributed graph gives the module's own losses and gradients on every rank.

    The module is fp64 and returns a scalar or tensors; `batches` has one entry for each data rank. A gradient is what
    `reduce_gradients` would make of it: summed over the data axes that replicate the parameter.
    """
    module = module.double().train()
    gm, _ = graph or distributed(module, batches[0], mesh)
    parameters = dict(module.named_parameters())
    first = {id(p): n for n, p in parameters.items()}  # the name of a tied parameter
    names = {n: first[id(p)] for n, p in module.named_parameters(remove_duplicate=False)}
    want: dict[str, Tensor] = {n: torch.zeros_like(p) for n, p in parameters.items()}
    results, weights = [], []
    buffers = {n: b.clone() for n, b in module.named_buffers()}
    for d, batch in enumerate(batches):
        for n, b in module.named_buffers():
            b.copy_(buffers[n])
        with Plain(d):
            out = [t for t in torch.utils._pytree.tree_leaves(module(**batch)) if t.is_floating_point()]
        generator = torch.Generator().manual_seed(7)
        weights.append([torch.randn(t.shape, dtype=torch.float64, generator=generator) for t in out])
        total = sum((t * w).sum() for t, w in zip(out, weights[-1]))
        for n, g in zip(parameters, torch.autograd.grad(total, list(parameters.values()), allow_unused=True)):
            want[n] += 0 if g is None else g
        results.append(out)

    ranks = Ranks(mesh, monkeypatch, alike=True)
    data = [ranks.data(r) for r in range(len(ranks.at))]
    leaves = [torch.utils._pytree.tree_leaves(b) for b in batches]
    local: dict[tuple[str, int], Tensor] = {}
    nodes = {}

    def value(node, r):
        kind, name = node.meta["role"]
        if kind == "input":
            return leaves[data[r]][name]
        if kind == "seed":
            return torch.zeros((), dtype=torch.int64)
        if kind == "buffer":
            return buffers[name].clone()
        if kind == "constant":
            return gm.meta["constants"][name]
        name = names[name]
        if not node.users:  # the other name of a tied parameter
            return parameters[name].detach()
        nodes[name] = node
        return local.setdefault((name, r), ranks.local(node, parameters[name].detach(), r).clone().requires_grad_())

    out = [[t for t in o if isinstance(t, Tensor) and t.is_floating_point()] for o in ranks.run(gm, value)]
    total = torch.zeros((), dtype=torch.float64)
    for r, d in enumerate(data):
        assert len(out[r]) >= len(results[d])
        for got, ref, w in zip(out[r], results[d], weights[d]):
            torch.testing.assert_close(got, ref, rtol=1e-10, atol=1e-12)
            total = total + (got * w).sum()
    keys = list(local)
    grads = dict(zip(keys, torch.autograd.grad(total, [local[k] for k in keys], allow_unused=True)))
    for name, node in nodes.items():
        axis = "dp" if "ep" in node.meta.get("placements", {}) else "data"
        for group in ranks.groups(axis):
            got = sum(g if (g := grads[name, r]) is not None else torch.zeros_like(local[name, r]) for r in group)
            for r in group:
                ref = ranks.local(node, want[name], r)
                torch.testing.assert_close(got, ref, rtol=1e-9, atol=1e-11, msg=lambda m: f"gradient of {name}: {m}")  # noqa: B023
    return gm
