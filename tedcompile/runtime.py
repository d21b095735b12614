"""`ParallelModule`: the user's module with sharded parameters, whose forward calls compiled graphs.

One `Program` per input signature. Before a program first runs, all ranks compare what they have made; on every call
they compare which signature they are about to run, on the host: a rank that disagrees gets an error, never a hang.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.utils._pytree as pytree

from tedcompile import compat, compile, machines, pipeline, watch, zero
from tedcompile.capture import bind, capture
from tedcompile.gradients import deliver
from tedcompile.layouts import Layout
from tedcompile.mesh import Groups
from tedcompile.options import Options


class _ToLocal(torch.autograd.Function):
    """DTensor parameters to their local shards; in the backward, local gradients to their parameters."""

    @staticmethod
    def forward(ctx, *parameters):
        ctx.parameters = parameters
        ctx.set_materialize_grads(False)  # a parameter that the forward does not use has no gradient
        return tuple(zero.part(p).detach() for p in parameters)

    @staticmethod
    def backward(ctx, *gradients):
        return tuple(deliver(ctx.parameters, gradients, [node for node, _ in ctx.next_functions]))


@dataclass
class Program:
    """A compiled signature: where each placeholder's value comes from, and how outputs go back.

    `saved`: bytes kept for the backward; `replay`: seconds of recomputation in it, predicted (`compile.partition`).
    """

    run: Callable
    sources: list[tuple[str, Any]]
    constants: dict[str, torch.Tensor]
    spec: pytree.TreeSpec
    kept: list[int]
    leaves: int
    buffers: list[str]
    saved: int
    replay: float


class ParallelModule:
    """Mixed into the class of a module that `parallelize` returns."""

    _ted: Runtime


def parallel_class(cls: type) -> type:
    """The class of a module that `parallelize` returns; its forward has the signature that trainers look at."""

    @functools.wraps(cls.forward)  # type: ignore[attr-defined]
    def forward(self: ParallelModule, *args: Any, **kwargs: Any) -> Any:
        return self._ted(self, args, kwargs)

    facts = {"__module__": cls.__module__, "forward": forward}
    return type(f"Parallel{cls.__name__}", (ParallelModule, cls), facts)


@contextlib.contextmanager
def plain(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """The module with its own class, whose forward is the user's code."""
    parallel = type(model)
    if not issubclass(parallel, ParallelModule):
        yield model
        return
    model.__class__ = parallel.__mro__[2]
    try:
        yield model
    finally:
        model.__class__ = parallel


class Runtime:
    def __init__(self, groups: Groups, backend: str, outputs: tuple[str, ...], options: Options):
        self.groups, self.backend, self.outputs, self.options = groups, backend, outputs, options
        name = torch.cuda.get_device_name(groups.device) if groups.device.type == "cuda" else ""
        self.machine = machines.load(options.machine) if options.machine else machines.default(groups.device.type, name)
        self.decided: dict[str, dict[str, Layout]] | None = None
        self.programs: dict[tuple, Program] = {}
        self.ready: dict[tuple, tuple] = {}
        self.replicated: list[tuple[str, str]] = []
        self.slots: dict[str, tuple[dict, str]] = {}

    def __deepcopy__(self, memo: dict) -> Runtime:
        """For a copy of the model: compiled programs and groups are shared, parameters are the copy's own."""
        other = copy.copy(self)
        other.slots = copy.deepcopy(self.slots, memo)
        other.programs, other.ready = dict(self.programs), dict(self.ready)
        return other

    # ---- calling

    def __call__(self, model: torch.nn.Module, args: tuple, kwargs: dict) -> Any:
        try:
            with plain(model):
                named = bind(model.forward, args, kwargs)
        except TypeError as error:
            self.agree(((f"a call that fails: {error}",),))  # the other ranks may have called it well, and wait
            raise
        leaves, spec = pytree.tree_flatten(named)
        leaves = [torch.tensor(x) if type(x) in (int, float) else x for x in leaves]
        leaves = [x.contiguous() if isinstance(x, torch.Tensor) else x for x in leaves]  # what the graphs read
        key = self.signature(model, leaves, spec)
        self.agree(key)
        program = self.programs.get(key)
        if program is None:
            program = self.programs[key] = self.compile(key, model, pytree.tree_unflatten(leaves, spec), leaves)
        return self.run(program, leaves)

    def run(self, program: Program, leaves: list) -> Any:
        parameters = [self.slot("parameter", name) for kind, name in program.sources if kind == "parameter"]
        local = iter(_ToLocal.apply(*parameters) if parameters else ())
        device = self.groups.device
        values: list[torch.Tensor] = []
        for kind, name in program.sources:
            if kind == "parameter":
                values.append(next(local))
            elif kind == "whole":
                values.append(compat.local_tensor(self.slot(kind, name)))
            elif kind == "buffer":
                values.append(self.slot("buffer", name))
            elif kind == "constant":
                values.append(program.constants[name])
            elif kind == "seed":
                values.append(self.seed())
            else:
                values.append(leaves[name].to(device, non_blocking=True))
        results = list(program.run(*values))
        for name in reversed(program.buffers):
            self.slot("buffer", name).copy_(results.pop().detach())
        out = dict(zip(program.kept, results, strict=True))
        return pytree.tree_unflatten([out.get(i) for i in range(program.leaves)], program.spec)

    def seed(self) -> torch.Tensor:
        """One call's seed, 0-d int64: from rank 0's default generator, equal on tp ranks, different on data ranks."""
        seed = torch.randint(2**31, (), dtype=torch.int64)
        if self.groups.host is not None:
            dist.broadcast(seed, group_src=0, group=self.groups.host)
        return seed * self.groups.shape["data"] + self.groups.rank["data"]

    def slot(self, kind: str, name: str) -> torch.Tensor:
        entries, leaf = self.slots[name]
        return entries[leaf]

    # ---- signatures and agreement

    def signature(self, model: torch.nn.Module, leaves: list, spec: pytree.TreeSpec) -> tuple:
        device = self.groups.device.type
        grad = torch.is_grad_enabled()
        facts = tuple(
            (x.dtype, tuple(x.shape), grad and x.requires_grad) if isinstance(x, torch.Tensor) else ("constant", x)
            for x in leaves
        )
        learns = hash(tuple(e[n].requires_grad for e, n in self.slots.values() if e.get(n) is not None))
        weights = tuple(dict.fromkeys(e[n].dtype for e, n in self.slots.values() if e.get(n) is not None))
        training = tuple(m.training for m in model.modules())
        autocast = (torch.get_autocast_dtype(device), True) if torch.is_autocast_enabled(device) else None
        return (facts, str(spec), weights, hash(training), model.training, grad, learns, autocast)

    def agree(self, key: tuple) -> None:
        """All ranks are about to run the same signature; ValueError on all of them otherwise."""
        group = self.groups.host
        if group is None:
            return
        mark = int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:7], "big")
        pair = torch.tensor([mark, -mark])
        with watch.waiting("the ranks' word on the inputs of a call"):
            dist.all_reduce(pair, op=dist.ReduceOp.MAX, group=group)
        if pair[0] != -pair[1]:
            self.compare("inputs", repr((*key[0], *key[3:])))

    def compare(self, what: str, mine: str, same: Callable[[int, int], bool] | None = None) -> None:
        """Raises ValueError on every rank, with the first difference, unless all ranks pass the same text."""
        group = self.groups.host
        if group is None:
            return
        texts: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(texts, mine, group=group)
        for rank, other in enumerate(texts):
            if other != texts[0]:
                pairs = zip(texts[0].split("\n"), other.split("\n"), strict=False)
                a, b = next(((x, y) for x, y in pairs if x != y), (f"{len(texts[0])} characters", f"{len(other)}"))
                raise ValueError(f"ranks disagree on their {what}: rank 0 has {a!r}, rank {rank} has {b!r}")

    def together(self, work: Callable[[], Any]) -> Any:
        """Runs `work` on every rank; when it raises on one, all ranks raise."""
        error: Exception | None = None
        result = None
        try:
            result = work()
        except Exception as e:
            error = e
        group = self.groups.host
        if group is not None:
            failures: list[Any] = [None] * dist.get_world_size(group)
            text = None if error is None else f"{type(error).__name__}: {error}"
            dist.all_gather_object(failures, text, group=group)
            for rank, failure in enumerate(failures):
                if failure and error is None:
                    raise ValueError(f"rank {rank} failed: {failure}")
        if error is not None:
            raise error
        return result

    # ---- compiling

    def keep(self, model: torch.nn.Module, example: dict[str, Any], prepared: tuple) -> None:
        """The example's graph serves the first call with its signature."""
        leaves, spec = pytree.tree_flatten(example)
        if model.training and torch.is_grad_enabled():
            self.ready[self.signature(model, leaves, spec)] = prepared

    def compile(self, key: tuple, model: torch.nn.Module, named: dict[str, Any], leaves: list) -> Program:
        prepared = self.ready.pop(key, None) or self.together(lambda: self.prepare(model, named))
        return self.finish(prepared, leaves)

    def prepare(self, model: torch.nn.Module, named: dict[str, Any]):
        """Capture and rewrite: no communication, so any rank may fail here without the others waiting."""
        device = self.groups.device.type
        inner = contextlib.nullcontext()
        if torch.is_autocast_enabled(device):
            inner = torch.autocast("cpu", dtype=torch.get_autocast_dtype(device), cache_enabled=False)
        with plain(model), torch.enable_grad(), inner:
            captured = capture(model, named)
        ctx = pipeline.Context(self.groups.shape, self.decided, options=self.options, machine=self.machine)
        kept = select_outputs(captured, model, model.training, self.outputs)
        gm = pipeline.run_forward(captured, ctx)
        return captured, ctx, gm, kept

    def finish(self, prepared: tuple, leaves: list) -> Program:
        captured, ctx, gm, kept = prepared
        self.compare("graphs", compile.describe(gm))
        self.check_tensor_parallel_inputs(leaves)
        device = self.groups.device
        placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
        sources, inputs = [], []
        for node in placeholders:
            kind, name = node.meta["role"]
            if kind == "input" and not isinstance(leaves[name], torch.Tensor):
                gm.graph.erase_node(node)
                continue
            sources.append((kind, name))
            if kind == "parameter":
                p = self.slot(kind, name)
                inputs.append(zero.part(p).detach().requires_grad_(p.requires_grad))
            elif kind == "whole":
                inputs.append(compat.local_tensor(self.slot(kind, name)))
            elif kind == "buffer":
                inputs.append(self.slot(kind, name))
            elif kind == "constant":
                captured.constants[name] = captured.constants[name].to(device)
                inputs.append(captured.constants[name])
            elif kind == "seed":
                inputs.append(torch.zeros((), dtype=torch.int64))
            else:
                inputs.append(leaves[name].to(device))
        autocast = None
        if torch.is_autocast_enabled(device.type):
            autocast = (torch.get_autocast_dtype(device.type), True)

        def work():
            return compile.build(gm, ctx, inputs, self.backend, device, self.groups.names, autocast)

        first = self.groups.host is None or dist.get_rank(self.groups.host) == 0
        if self.backend == "inductor":  # one rank compiles, the others then load what it left in the cache
            run = self.together(lambda: work() if first else None)
            run = self.together(lambda: run if first else work())
        else:
            run = self.together(work)
        self.replicated = [(pipeline.where(node), reason) for node, reason in ctx.replicated]
        buffers = [b.meta["role"][1] for b in ctx.mutations]
        spec = captured.out_spec
        return Program(run, sources, captured.constants, spec, kept, spec.num_leaves, buffers, ctx.saved, ctx.replay)

    def check_tensor_parallel_inputs(self, leaves: list) -> None:
        """Tensor-parallel ranks must bring the same batch: other batches would be silent garbage."""
        if self.groups.shape.tp == 1:
            return
        digest = hashlib.sha256()
        for x in leaves:
            if isinstance(x, torch.Tensor):
                raw = x.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
                digest.update(raw.numpy().tobytes())
        mine = (self.groups.rank["data"], digest.hexdigest())
        everyone: list[Any] = [None] * self.groups.shape.world
        dist.all_gather_object(everyone, mine, group=self.groups.host)
        batches = dict(everyone)
        wrong = sorted({data for data, text in everyone if batches[data] != text})
        if wrong:
            raise ValueError(
                f"the tensor-parallel ranks of data rank {wrong[0]} bring different batches: give all tp ranks of one "
                "data rank the same one (tedcompile.data_rank(mesh) and data_world(mesh) are for the sampler)"
            )


def select_outputs(captured, model: torch.nn.Module, training: bool, names: tuple[str, ...]) -> list[int]:
    """Keeps the graph outputs that the contract returns: in training losses and what `names` asks for, else all.

    Raises ValueError for a training forward without a scalar loss, and for a name that the output does not have.
    """
    gm = captured.gm
    output = gm.graph.output_node()
    results = list(output.args[0])
    obj = pytree.tree_unflatten([_Leaf(i) for i in range(len(results))], captured.out_spec)
    loss = obj if isinstance(obj, _Leaf) else _get(obj, "loss")
    scalar = [
        i
        for i, r in enumerate(results)
        if isinstance(r, torch.fx.Node) and r.meta["val"].dim() == 0 and r.meta["val"].is_floating_point()
    ]
    keep = set(range(len(results)))
    if training:
        if not (isinstance(loss, _Leaf) and loss.index in scalar) and not (isinstance(obj, (tuple, list)) and scalar):
            raise ValueError(
                f"{type(model).__name__} returns no loss in training: its forward must return a scalar, or an output "
                "with a scalar .loss (for Hugging Face models pass labels)"
            )
        keep = set(scalar)
        for name in names:
            found = _get(obj, name)
            if found is None:
                raise ValueError(f"outputs: {type(obj).__name__} has no {name!r}; it has {', '.join(_fields(obj))}")
            keep |= {leaf.index for leaf in pytree.tree_leaves(found) if isinstance(leaf, _Leaf)}
    kept = [i for i in sorted(keep) if isinstance(results[i], torch.fx.Node)]
    output.args = (tuple(results[i] for i in kept),)
    gm.graph.eliminate_dead_code()
    return kept


@dataclass(frozen=True)
class _Leaf:
    index: int


def _get(obj: Any, name: str) -> Any:
    return obj.get(name) if isinstance(obj, dict) else getattr(obj, name, None)


def _fields(obj: Any) -> list[str]:
    return list(obj) if isinstance(obj, dict) else [k for k in vars(obj)] if hasattr(obj, "__dict__") else []
