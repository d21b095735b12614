"""Backward passes that a captured graph cannot see: `torch.autograd.Function` is kept whole, hooks are refused by name.

`torch.export` traces through `Function.apply` and silently drops the class's own backward. While `keep_functions` is
active, apply becomes one node instead, with the ints of the call and which tensors need a gradient:

    tedfn.forward("router.TopK(Tensor, int, 'softmax')", [x], [2], [True], "") -> [*outputs, *what it saves beside x]

Its VJP is one `tedfn.backward` node that calls the class's backward. Both run the user's Python when the graph runs;
the name finds the class and its other arguments in a registry. The last argument is the autocast state in its region.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import functools
import itertools
import sys
import threading
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import FunctionCtx
from torch.distributed.tensor import DTensor
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils.checkpoint import CheckpointFunction

LIBRARY = torch.library.Library("tedfn", "DEF")
LIBRARY.define("forward(str function, Tensor[] tensors, SymInt[] ints, bool[] needs, str autocast) -> Tensor[]")
LIBRARY.define(
    "backward(str function, int plan, Tensor?[] grads, Tensor[] saved, SymInt[] ints, SymInt[] sizes) -> Tensor[]"
)


# ---- what users call ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def keep_functions() -> Iterator[None]:
    """Around `torch.export.export(..., strict=False)`: Functions defined outside torch become `tedfn` nodes.

    Which tensors need a gradient, and every argument that is no tensor or int, are those of the capture. Raises
    ValueError for what export would drop (tensor hooks, reentrant checkpointing) and for a Function that writes to its
    inputs, whose forward needs values to run, or which reaches parameters that are not among its arguments.
    """
    base: Any = Function.__base__  # Function.apply calls its apply, also where a model holds `MyFunction.apply`

    def kept_apply(cls, *args, **kwargs):
        if cls is CheckpointFunction and not _thread.inside:
            raise ValueError(
                "checkpoint(..., use_reentrant=True) cannot be captured; pass use_reentrant=False (Hugging Face: "
                'gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False}))'
            )
        _, tensors, ints = _split(args)
        if _thread.inside or cls.__module__.startswith("torch.") or kwargs or not tensors:
            return super(base, cls).apply(*args, **kwargs)
        needs = [position is not None and t.requires_grad for position, t in zip(_positions(args), tensors)]
        outputs = torch.ops.tedfn.forward(_register(cls, args), tensors, ints, needs, "")
        run = _thread.run
        return run.output.fill([outputs[i] for i in run.order], run.output_ints)

    with contextlib.ExitStack() as stack:
        stack.enter_context(_replaced(base, "apply", classmethod(kept_apply)))
        for hook, cure in {
            "register_hook": "write it as a torch.autograd.Function that returns its input and does this in backward",
            "register_post_accumulate_grad_hook": "register it on a parameter of the model that parallelize returns",
        }.items():
            stack.enter_context(_replaced(Tensor, hook, _refused(hook, getattr(Tensor, hook), cure)))
        yield


def _refused(name: str, original: Any, cure: str) -> Any:
    def refuse(self, hook):
        if _thread.inside:
            return original(self, hook)
        caller = sys._getframe(1)
        where = f"{caller.f_code.co_filename}:{caller.f_lineno}"
        raise ValueError(f"{where}: {name} in a forward is lost when the forward is captured; {cure}")

    return refuse


def find_hooks(model: torch.nn.Module) -> None:
    """Raises ValueError that names the parameters and modules with backward hooks, which no captured graph calls."""
    parameters = [
        f"parameter {name}"
        for name, parameter in model.named_parameters()
        if not isinstance(parameter, DTensor)  # whose gradients come from outside of the graph, to any hook
        and (parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None))
    ]
    modules = [
        f"module {name or type(module).__name__}"
        for name, module in model.named_modules()
        if module._backward_hooks or module._backward_pre_hooks
    ]
    shared = torch.nn.modules.module
    if shared._global_backward_hooks or shared._global_backward_pre_hooks:
        modules.append("all modules (register_module_full_backward_hook)")
    if parameters:
        cure = "register them on the parameters of the model that parallelize returns"
        raise ValueError(f"gradient hooks would be lost: {', '.join(parameters)}; {cure}")
    if modules:
        raise ValueError(f"module backward hooks are not supported: {', '.join(modules)}; remove them")


# ---- values without their tensors -----------------------------------------------------------------------------------


class _Slot(enum.Enum):
    TENSOR = "Tensor"
    INT = "int"


@dataclass
class _Template:
    """A nested value whose tensors and ints are kept apart: ints may be symbols. A torch.Size is a range of ints."""

    spec: pytree.TreeSpec
    leaves: list[Any]

    def fill(self, tensors: Sequence[Tensor], ints: Sequence[int]) -> Any:
        next_tensor, next_int = iter(tensors), iter(ints)

        def value(leaf: Any) -> Any:
            if leaf is _Slot.TENSOR:
                return next(next_tensor)
            if leaf is _Slot.INT:
                return next(next_int)
            return torch.Size([next(next_int) for _ in leaf]) if isinstance(leaf, range) else leaf

        return pytree.tree_unflatten([value(leaf) for leaf in self.leaves], self.spec)

    def identity(self, owner: str) -> Any:
        """Hashable, and equal for templates that mean the same."""
        return repr(self.spec), tuple(_identity(leaf, owner) for leaf in self.leaves)


def _split(value: Any) -> tuple[_Template, list[Tensor], list[int]]:
    leaves, spec = pytree.tree_flatten(value, is_leaf=lambda v: isinstance(v, torch.Size))
    tensors: list[Tensor] = []
    ints: list[Any] = []
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor):
            tensors.append(leaf)
            leaves[i] = _Slot.TENSOR
        elif isinstance(leaf, torch.SymInt) or (type(leaf) is int and -(2**63) <= leaf < 2**63):
            ints.append(leaf)
            leaves[i] = _Slot.INT
        elif isinstance(leaf, torch.Size):
            ints.extend(leaf)
            leaves[i] = range(len(leaf))
    return _Template(spec, leaves), tensors, ints


def _positions(values: tuple) -> tuple[int | None, ...]:
    """Of each tensor in `values`: which of them it is, or None inside a list, where autograd does not look."""
    found: list[int | None] = []
    for position, value in enumerate(values):
        found += [position] if isinstance(value, Tensor) else [None] * len(_split(value)[1])
    return tuple(found)


def _identity(value: Any, owner: str, seen: frozenset[int] = frozenset()) -> Any:
    if id(value) in seen:
        return id(value)
    again = functools.partial(_identity, owner=owner, seen=seen | {id(value)})
    if isinstance(value, torch.nn.Module) and any(True for _ in itertools.chain(value.parameters(), value.buffers())):
        raise ValueError(f"{owner} is given the module {type(value).__name__}; pass its parameters instead")
    if isinstance(value, Tensor):
        raise ValueError(f"{owner} is given a function that holds a tensor; pass the tensor as an argument instead")
    if isinstance(value, (torch.SymFloat, torch.SymBool)):
        raise ValueError(f"{owner} is given or keeps a number made from a size that depends on data")
    if isinstance(value, types.MethodType):
        return again(value.__func__), again(value.__self__)
    if isinstance(value, functools.partial):
        return functools.partial, again((value.func, value.args, value.keywords))
    if isinstance(value, types.FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        return value.__code__, again((cells, value.__defaults__, value.__kwdefaults__))
    leaves, spec = pytree.tree_flatten(value)
    if len(leaves) != 1 or leaves[0] is not value:
        return repr(spec), tuple(again(leaf) for leaf in leaves)
    if isinstance(value, float):
        return float, repr(value)
    return (type(value), value) if type(value).__hash__ not in (None, object.__hash__) else id(value)


# ---- the registry ---------------------------------------------------------------------------------------------------


@dataclass
class _Plan:
    """How the results of a forward become the arguments of its backward."""

    state: _Template = field(compare=False)  # (the tensors of save_for_backward, the other attributes of ctx)
    kinds: tuple[Any, ...]  # the leaves of state that are not constants
    constants: Any
    sources: tuple[int, ...]  # of each saved tensor in [*tensors, *outputs of the op]
    likes: tuple[tuple[torch.dtype, torch.device, int], ...]  # of each input tensor; the last is ndim
    positions: tuple[int | None, ...]  # of each output tensor among the outputs
    arity: int
    differentiable: tuple[bool, ...]  # for each output tensor
    materialize: bool
    needs: tuple[bool, ...]
    foreign: tuple[bool, ...] = field(default=(), compare=False)  # for each output of the op: not made by the forward
    absent: tuple[bool, ...] = field(default=(), compare=False)  # for each input tensor: backward gives None
    copied: tuple[bool, ...] = field(default=(), compare=False)  # for each gradient and saved tensor: it is written to

    def wanted(self) -> list[int]:
        """The input tensors that the backward op returns a gradient of."""
        return [i for i, need in enumerate(self.needs) if need and not self.absent[i]]


@dataclass
class _Function:
    """A class, and what a call of it is given beside tensors and ints."""

    cls: type[Function]
    arguments: _Template
    positions: tuple[int | None, ...]
    arity: int
    plans: list[_Plan] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{self.cls.__module__}.{self.cls.__qualname__}"


_FUNCTIONS: dict[str, _Function] = {}
_NAMES: dict[Any, str] = {}


def _register(cls: type[Function], args: tuple) -> str:
    """The name of the class with these constants; a new one only if it has not been seen."""
    function = _Function(cls, _split(args)[0], _positions(args), len(args))
    key = cls, function.arguments.identity(function.name)
    if key not in _NAMES:
        text = f"{function.name}({', '.join(map(_text, function.arguments.leaves))})"
        others = (f"{text} #{i}" for i in itertools.count(2))
        _NAMES[key] = next(name for name in itertools.chain([text], others) if name not in _FUNCTIONS)
        _FUNCTIONS[_NAMES[key]] = function
    return _NAMES[key]


def _text(leaf: Any) -> str:
    if isinstance(leaf, _Slot):
        return leaf.value
    plain = leaf is None or isinstance(leaf, (bool, int, float, str, torch.dtype))
    return repr(leaf) if plain else getattr(leaf, "__qualname__", type(leaf).__name__)


# ---- calling the class ----------------------------------------------------------------------------------------------


class _Context(FunctionCtx):
    def __init__(self, function: _Function, needs: Sequence[bool]):
        wanted = {position for position, need in zip(function.positions, needs) if need}
        self.needs_input_grad = tuple(position in wanted for position in range(function.arity))
        self.to_save: tuple[Any, ...] = ()
        self.dirty_tensors: tuple[Any, ...] = ()
        self.non_differentiable: tuple[Any, ...] = ()
        self.materialize_grads = True

    @property
    def saved_tensors(self) -> tuple[Any, ...]:
        return self.to_save


# The attributes of a ctx that are torch's; all others are the class's own.
_TORCHS = {
    "needs_input_grad",
    "to_save",
    "dirty_tensors",
    "non_differentiable",
    "materialize_grads",
    "saved_for_forward",
}


@dataclass
class _Run:
    """What a forward leaves beside its tensors."""

    plan: int
    ints: list[int]
    shapes: list[torch.Size | None]  # that the saved tensors are reshaped to
    output: _Template
    output_ints: list[int]
    order: list[int]  # of the op's outputs in it: a tensor returned twice has all its gradient in the last


class _Thread(threading.local):
    def __init__(self) -> None:
        self.inside = False  # a method of a class runs, and captures nothing
        self.run: _Run  # the last forward's: the ops carry only tensors and ints


_thread = _Thread()
_MISSING = object()


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    saved = vars(owner).get(name, _MISSING)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if saved is _MISSING:
            delattr(owner, name)
        else:
            setattr(owner, name, saved)


@contextlib.contextmanager
def _as_apply_does(autocast: str = "") -> Iterator[None]:
    """Autograd as `Function.apply` sets it for the methods of a class: off, but it can be enabled.

    A kernel runs below autograd: `inference_mode(False)` brings that back, but not the tracking of views and writes.
    """
    tracking = torch._C.DispatchKey.ADInplaceOrView
    with contextlib.ExitStack() as stack:
        stack.enter_context(_replaced(_thread, "inside", True))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        excluded = torch._C._dispatch_tls_is_dispatch_key_excluded(tracking)
        stack.callback(torch._C._dispatch_tls_set_dispatch_key_excluded, tracking, excluded)
        torch._C._dispatch_tls_set_dispatch_key_excluded(tracking, False)
        if autocast:
            device, dtype = autocast.split()
            stack.enter_context(torch.autocast(device, getattr(torch, dtype), cache_enabled=False))
        yield


@contextlib.contextmanager
def _without_values(tensors: Sequence[Tensor]) -> Iterator[None]:
    """For fakes: tensors from elsewhere may join, Triton launches do nothing, reading a value raises.

    Without this it would make a symbol that no node of the graph defines.
    """
    with contextlib.ExitStack() as stack:
        mode = next((t.fake_mode for t in tensors if hasattr(t, "fake_mode")), None)
        if mode is not None:
            stack.enter_context(_replaced(mode, "allow_non_fake_inputs", True))
        if env := getattr(mode, "shape_env", None):
            blind = dataclasses.replace(env.settings, allow_scalar_outputs=False, allow_dynamic_output_shape_ops=False)
            stack.enter_context(_replaced(env, "settings", blind))
        if triton := sys.modules.get("triton.runtime.jit"):
            nothing = lambda kernel, grid: lambda *args, **kwargs: None
            stack.enter_context(_replaced(triton.KernelInterface, "__getitem__", nothing))
        yield


def _sets_up_context(cls: type[Function]) -> bool:
    return cls.setup_context is not Function.setup_context


def _call_forward(function: _Function, inputs: list[Tensor], ints: list[int], needs: Sequence[bool], autocast: str):
    ctx = _Context(function, needs)
    with _as_apply_does(autocast):
        for tensor, need in zip(inputs, needs):
            tensor.requires_grad_(need and not tensor.is_inference())
        args = function.arguments.fill(inputs, ints)
        if _sets_up_context(function.cls):
            output = function.cls.forward(*args)
            function.cls.setup_context(ctx, args, output)
        else:
            output = function.cls.forward(ctx, *args)
    return output, ctx


def _call_backward(function: _Function, plan: _Plan, grads: Sequence, saved: Sequence[Tensor], ints: list[int]):
    """The class's gradient of each input tensor, as the class gives it."""
    cls: Any = function.cls
    ctx = _Context(function, plan.needs)
    with _as_apply_does():
        needs = [source < len(plan.needs) and plan.needs[source] for source in plan.sources]
        saved = [t.detach().requires_grad_(need and not t.is_inference()) for t, need in zip(saved, needs)]
        ctx.to_save, attributes = plan.state.fill(saved, ints)
        ctx.__dict__.update(attributes)
        method = cls.backward if cls.vjp is Function.vjp else cls.vjp
        results = method(ctx, list(grads)) if getattr(cls, "boxed_grads_call", False) else method(ctx, *grads)
    results = results if isinstance(results, tuple) else (results,)
    if len(results) < function.arity:
        raise RuntimeError(f"{function.name}.backward: {len(results)} gradients for {function.arity} arguments")
    return [None if position is None else results[position] for position in function.positions]


# ---- the forward op -------------------------------------------------------------------------------------------------


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _equal(xs: Sequence[int], ys: Sequence[int]) -> bool:
    return len(xs) == len(ys) and all(statically_known_true(x == y) for x, y in zip(xs, ys))


def _same_values(a: Tensor, b: Tensor) -> bool:
    """Whether a is b, or a reshape of it without a copy."""
    if _storage(a) != _storage(b) or a.dtype != b.dtype or a.is_conj() != b.is_conj() or a.is_neg() != b.is_neg():
        return False
    if not _equal([a.storage_offset()], [b.storage_offset()]):
        return False
    if _equal(a.shape, b.shape) and _equal(a.stride(), b.stride()):
        return True
    return _equal([a.numel()], [b.numel()]) and a.is_contiguous() and b.is_contiguous()


def _own(tensors: Sequence[Tensor], others: Sequence[Tensor], foreign: Sequence[bool]) -> list[Tensor]:
    """The tensors, cloned where foreign or sharing memory with one another or `others`: an op's outputs may not."""
    taken, results = {_storage(t) for t in others}, []
    for tensor, other in zip(tensors, foreign):
        copy = other or _storage(tensor) in taken or not _equal([tensor.storage_offset()], [0])
        results.append(tensor.detach().clone() if copy else tensor.detach())
        taken.add(_storage(tensor))
    return results


def _keep(function: _Function, inputs: list[Tensor], needs: Sequence[bool], output: Any, ctx: _Context):
    """A finished forward's plan, output tensors, saved tensors, and both without repeats; sets `_thread.run`."""
    template, outputs, output_ints = _split(output)
    attributes = {name: value for name, value in vars(ctx).items() if name not in _TORCHS}
    state, saved, ints = _split((tuple(ctx.to_save), attributes))
    known, sources = [*inputs, *outputs], []
    for tensor in saved:
        sources.append(next((i for i, other in enumerate(known) if _same_values(tensor, other)), len(known)))
        if sources[-1] == len(known):
            known.append(tensor)
    top = output if isinstance(output, tuple) else (output,)
    positions, constant = _positions(top), {id(t) for t in ctx.non_differentiable}
    plan = _Plan(
        state=state,
        kinds=tuple(leaf if isinstance(leaf, (_Slot, range)) else None for leaf in state.leaves),
        constants=state.identity(function.name),
        sources=tuple(sources),
        likes=tuple((t.dtype, t.device, t.ndim) for t in inputs),
        positions=positions,
        arity=len(top),
        differentiable=tuple(
            position is not None and id(t) not in constant and (t.is_floating_point() or t.is_complex())
            for position, t in zip(positions, outputs)
        ),
        materialize=ctx.materialize_grads,
        needs=tuple(needs),
    )
    last = {id(t): i for i, t in enumerate(outputs)}
    shapes = [None if _equal(t.shape, known[i].shape) else t.shape for t, i in zip(saved, sources)]
    _thread.run = _Run(-1, ints, shapes, template, output_ints, [last[id(t)] for t in outputs])
    return plan, outputs, saved, known[len(inputs) :]


def _forward(name: str, tensors: list[Tensor], ints: list[int], needs: list[bool], autocast: str) -> list[Tensor]:
    function, inputs = _FUNCTIONS[name], [t.detach() for t in tensors]
    plan, _, _, results = _keep(function, inputs, needs, *_call_forward(function, inputs, ints, needs, autocast))
    traced = [p for p in function.plans if p == dataclasses.replace(plan, constants=p.constants, likes=p.likes)]
    if not traced:
        raise RuntimeError(f"{function.name} saves other tensors than it did when it was captured")
    traced.sort(key=lambda p: p.constants != plan.constants)
    plan = dataclasses.replace(traced[0], likes=plan.likes)  # another device or dtype; no constants but those captured
    if plan not in function.plans:
        function.plans.append(plan)
    _thread.run.plan = function.plans.index(plan)
    return _own(results, inputs, plan.foreign)


def _forward_fake(name: str, tensors: list[Tensor], ints: list[int], needs: list[bool], autocast: str) -> list[Tensor]:
    function, inputs = _FUNCTIONS[name], [t.detach() for t in tensors]
    versions = [t._version for t in inputs]
    with _without_values(tensors):
        try:
            output, ctx = _call_forward(function, inputs, ints, needs, autocast)
        except Exception as error:
            raise ValueError(
                f"{function.name}.forward must run on tensors without values to be captured, but it raised "
                f"{type(error).__name__}: {error}"
            ) from error
        if ctx.dirty_tensors or versions != [t._version for t in inputs]:
            raise ValueError(f"{function.name}.forward writes to its input (mark_dirty); return a new tensor instead")
        plan, outputs, saved, results = _keep(function, inputs, needs, output, ctx)
        if plan not in function.plans:
            plan.foreign = tuple(hasattr(inputs[0], "fake_mode") and not hasattr(t, "fake_mode") for t in results)
            if any(needs):
                plan.absent, plan.copied = _try_backward(function, plan, outputs, saved)
            function.plans.append(plan)
        _thread.run.plan = index = function.plans.index(plan)
        return _own(results, inputs, function.plans[index].foreign)


def _forward_autocast(device: str):
    def forward(name: str, tensors: list[Tensor], ints: list[int], needs: list[bool], autocast: str) -> list[Tensor]:
        """Autocast is off when a compiled graph runs: it becomes an argument."""
        autocast = autocast or f"{device} {torch.get_autocast_dtype(device)}".replace("torch.", "")
        with torch.autocast(device, enabled=False):
            return torch.ops.tedfn.forward(name, tensors, ints, needs, autocast)

    return forward


def _try_backward(function: _Function, plan: _Plan, outputs: list[Tensor], saved: list[Tensor]):
    """`absent` and `copied` of a plan, from a backward on fakes; when that needs values, the safe answer."""
    grads: list[Tensor | None] = [None] * plan.arity
    for position, output, differentiable in zip(plan.positions, outputs, plan.differentiable):
        if position is not None and (differentiable or plan.materialize):
            grads[position] = torch.zeros_like(output)
    copies = [t.detach().clone() for t in saved]
    given = [t for t in (*grads, *copies) if t is not None]
    versions = {id(t): t._version for t in given}
    try:
        results = _call_backward(function, plan, grads, copies, _thread.run.ints)
    except Exception:
        return (False,) * len(plan.needs), (True,) * (plan.arity + len(saved))
    returned = {_storage(t) for t in results if t is not None}
    touched = {id(t) for t in given if _storage(t) in returned or versions[id(t)] != t._version}
    return tuple(t is None for t in results), tuple(id(t) in touched for t in (*grads, *copies))


# ---- the backward op ------------------------------------------------------------------------------------------------


def _setup_context(ctx, inputs, output) -> None:
    name, tensors, ints, _, _ = inputs
    plan = _FUNCTIONS[name].plans[_thread.run.plan]
    ctx.name, ctx.run, ctx.has_ints = name, _thread.run, bool(ints)
    ctx.sizes = [size for i in plan.wanted() for size in tensors[i].shape]
    ctx.outputs = [(t.shape, t.dtype, t.device) for t in output[: len(plan.positions)]]
    known = [*tensors, *output]
    ctx.save_for_backward(*(known[source] for source in plan.sources))
    ctx.mark_non_differentiable(*(t for t, d in itertools.zip_longest(output, plan.differentiable) if not d))
    ctx.set_materialize_grads(False)


def _vjp(ctx, output_grads):
    if torch.is_grad_enabled():
        raise RuntimeError(f"{ctx.name}: a captured autograd.Function can be differentiated only once")
    run, plan = ctx.run, _FUNCTIONS[ctx.name].plans[ctx.run.plan]
    grads: list[Tensor | None] = [None] * plan.arity
    for position, grad, (shape, dtype, device) in zip(plan.positions, output_grads, ctx.outputs):
        if position is not None:
            zeros = grad is None and plan.materialize
            grads[position] = torch.zeros(shape, dtype=dtype, device=device) if zeros else grad
    saved = [t if shape is None else t.reshape(shape) for t, shape in zip(ctx.saved_tensors, run.shapes)]
    results = torch.ops.tedfn.backward(ctx.name, run.plan, grads, saved, run.ints, ctx.sizes)
    tensor_grads: list[Tensor | None] = [None] * len(plan.needs)
    for i, result in zip(plan.wanted(), results):
        tensor_grads[i] = result
    return None, tensor_grads, None if ctx.has_ints else [], None, None


def _gradient_likes(plan: _Plan, sizes: Sequence[int]) -> Iterator[tuple[int, list[int], torch.dtype, torch.device]]:
    rest = iter(sizes)
    for i in plan.wanted():
        dtype, device, ndim = plan.likes[i]
        yield i, list(itertools.islice(rest, ndim)), dtype, device


def _backward(name: str, plan_index: int, grads, saved, ints: list[int], sizes: list[int]) -> list[Tensor]:
    function = _FUNCTIONS[name]
    plan = function.plans[plan_index]
    given = [t.clone() if t is not None and copy else t for t, copy in zip((*grads, *saved), plan.copied)]
    gradients = _call_backward(function, plan, given[: plan.arity], given[plan.arity :], ints)
    results = []
    for i, shape, dtype, device in _gradient_likes(plan, sizes):
        grad = gradients[i]
        if grad is None:
            results.append(torch.zeros(shape, dtype=dtype, device=device))
        else:
            results.append(grad.detach().sum_to_size(shape).to(dtype).contiguous())
    return _own(results, [t for t in (*grads, *saved) if t is not None], [False] * len(results))


def _backward_fake(name: str, plan_index: int, grads, saved, ints: list[int], sizes: list[int]) -> list[Tensor]:
    plan = _FUNCTIONS[name].plans[plan_index]
    return [torch.empty(shape, dtype=dtype, device=device) for _, shape, dtype, device in _gradient_likes(plan, sizes)]


for _name, _kernel, _fake in (("forward", _forward, _forward_fake), ("backward", _backward, _backward_fake)):
    LIBRARY.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"tedfn::{_name}", _fake, lib=LIBRARY)
for _device in ("cpu", "cuda", "xpu"):
    LIBRARY.impl("forward", _forward_autocast(_device), f"Autocast{_device.upper()}")
torch.library.register_autograd("tedfn::forward", _vjp, setup_context=_setup_context, lib=LIBRARY)
