"""nn.Module to a readable forward graph: `torch.export`, non-strict, on fake parameters.

The graph's placeholders are parameters, buffers, constants and inputs, told apart by `node.meta["role"]`; every node
keeps its module path and source line. Regions of `no_grad` and `autocast` are inlined: the first as `detach` on what
leaves them, the second as `node.meta["autocast"]`, which `compile.py` honours when it traces.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import re
import traceback
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch.fx import GraphModule, Node

from tedcompile import compat, frontends
from tedcompile.functions import find_hooks, keep_functions
from tedcompile.hints import Assumed, Calls
from tedcompile.ops import ops

aten = torch.ops.aten


@dataclass
class Captured:
    """A captured forward. `out_spec` rebuilds the model's own output from the graph's outputs."""

    gm: GraphModule
    out_spec: pytree.TreeSpec
    constants: dict[str, torch.Tensor]
    inputs: list[Any]  # the flattened example inputs: fakes and constants
    mutations: dict[Node, Node] = field(default_factory=dict)
    calls: Calls | None = None  # what each module was called with, and in which of them control flow was assumed
    refusal: Exception | None = None  # why the forward has no graph without assumptions
    model: torch.nn.Module | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)  # the arguments, as fakes


def bind(forward, args: tuple, kwargs: dict) -> dict[str, Any]:
    """A call's arguments by name, in the order of the forward's signature; TypeError as the plain call would give."""
    try:
        bound = inspect.signature(forward).bind(*args, **kwargs)
    except TypeError as error:
        name = getattr(forward, "__qualname__", "the forward")
        raise TypeError(f"{name}: {error}") from None
    flat: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = bound.signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            raise TypeError(f"the forward takes *{name}; tedcompile needs arguments that have names")
        flat.update(value if kind is inspect.Parameter.VAR_KEYWORD else {name: value})
    return flat


@contextlib.contextmanager
def fake_weights(model: torch.nn.Module, mode) -> Iterator[None]:
    """Parameters and buffers replaced by fake cpu tensors of their global shapes, tied ones by the same fake."""
    fakes: dict[int, torch.Tensor] = {}
    saved = []
    for module in model.modules():
        for slot in (module._parameters, module._buffers):
            saved.append((slot, dict(slot)))
            for name, value in slot.items():
                if value is None:
                    continue
                if id(value) not in fakes:
                    with mode:
                        fake = torch.empty(value.shape, dtype=value.dtype, device="cpu")
                    compat.set_example(fake, None)
                    if isinstance(value, torch.nn.Parameter):
                        fake = torch.nn.Parameter(fake, requires_grad=value.requires_grad)
                    fakes[id(value)] = fake
                slot[name] = fakes[id(value)]
    try:
        yield
    finally:
        for slot, values in saved:
            slot.update(values)


@contextlib.contextmanager
def _conversions(model: torch.nn.Module) -> Iterator[None]:
    """`module.to(...)` inside a forward: nothing where nothing changes, and refused where it would change weights."""

    def convert(path: str, module: torch.nn.Module, change) -> torch.nn.Module:
        for name, t in (*module.named_parameters(), *module.named_buffers()):
            made = change(t)
            if (made.dtype, made.device) != (t.dtype, t.device):
                raise ValueError(f"the forward converts {path}.{name} from {t.dtype} to {made.dtype}; do it before")
        return module

    modules = dict(model.named_modules())
    for path, module in modules.items():
        module.__dict__["_apply"] = lambda change, *_, path=path, module=module: convert(path, module, change)
    try:
        yield
    finally:
        for module in modules.values():
            module.__dict__.pop("_apply", None)


@contextlib.contextmanager
def _own_hooks_off(model: torch.nn.Module) -> Iterator[None]:
    saved = {name: getattr(model, name) for name in ("_forward_hooks", "_forward_pre_hooks")}
    for name in saved:
        setattr(model, name, OrderedDict())
    try:
        yield
    finally:
        for name, hooks in saved.items():
            setattr(model, name, hooks)


GROUPED = {torch._grouped_mm, getattr(torch.nn.functional, "grouped_mm", None)}


class _GroupedProducts(torch.overrides.TorchFunctionMode):
    """torch's grouped product traces in bf16 only; in the graph it is ours, over the rows of each expert."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in GROUPED:
            given = dict(zip(("input", "mat2", "offs"), args, strict=False)) | kwargs
            rows, weight, offsets = given.pop("input", None), given.pop("mat2", None), given.pop("offs", None)
            plain = offsets is not None and rows is not None and weight is not None and not any(given.values())
            if plain and rows.dim() == 2 and weight.dim() == 3:
                return ops.grouped_mm(rows, weight, torch.diff(offsets, prepend=offsets.new_zeros(1)).long())
        return func(*args, **kwargs)


def capture(model: torch.nn.Module, kwargs: dict[str, Any], assume: bool = False) -> Captured:
    """Captures `model.forward(**kwargs)`; of the tensors only shapes, dtypes and whether they need a gradient count.

    `assume`: it is known that control flow depends on data, which is assumed at once.

    Forward hooks of the model itself are not in the graph, for calling the model runs them; those of its modules are.
    Raises ValueError that names the user's source line when the forward depends on data in a way no graph can hold.
    """
    find_hooks(model)
    if assume:
        return _capture(model, kwargs, assume)
    try:
        return _capture(model, kwargs)
    except ValueError as error:
        if DATA_DEPENDENT not in str(error):
            raise
        try:
            captured = _capture(model, kwargs, assume=True)
        except Exception:  # what could not be assumed says less than what could not be captured
            raise error from None
        captured.refusal = error
        return captured


def _capture(model: torch.nn.Module, kwargs: dict[str, Any], assume: bool = False) -> Captured:
    calls = Calls(model)
    hinted = compat.hinted_export(lambda: calls.assumed.add(calls.running[-1])) if assume else contextlib.nullcontext()
    with compat.lazy_modules(), hinted as mode:
        mode = mode or compat.FakeTensorMode(shape_env=compat.ShapeEnv(), allow_non_fake_inputs=True)
        return _export(model, kwargs, mode, calls, assume)


def _export(model: torch.nn.Module, kwargs: dict[str, Any], mode, calls: Calls, assume: bool) -> Captured:

    def fake(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        with mode:
            fake = torch.empty(leaf.shape, dtype=leaf.dtype, device="cpu")
        integers = assume and leaf.dim() and not leaf.is_floating_point() and leaf.dtype != torch.bool
        examples.append(torch.arange(leaf.numel(), dtype=leaf.dtype).reshape(leaf.shape) if integers else None)
        compat.set_example(fake, None)
        return fake

    def give_examples(_, args, kwargs):  # export has made fakes of its own
        for value, example in zip(pytree.tree_leaves(kwargs), examples):
            compat.set_example(value, example)

    examples: list[torch.Tensor | None] = []
    leaves, spec = pytree.tree_flatten(kwargs)
    inputs = [fake(leaf) for leaf in leaves]
    assumed = Assumed(model) if assume else contextlib.nullcontext()
    fake_kwargs = pytree.tree_unflatten(inputs, spec)
    try:
        with (
            frontends.prepared(model), fake_weights(model, mode), _conversions(model), _own_hooks_off(model),
            keep_functions(), calls.watch(), _GroupedProducts(), assumed, compat.user_frames(), _quiet(), mode,
        ):  # fmt: skip
            if assume:
                model.register_forward_pre_hook(give_examples, with_kwargs=True)
            program = torch.export.export(model, (), fake_kwargs, strict=False)
    except Exception as error:
        raise _explained(error, model) from error
    gm = program.graph_module
    constants = _set_roles(gm, program)
    for node in gm.graph.nodes:
        if node.op == "placeholder" and node.meta["role"][0] == "input":
            node.meta["requires_grad"] = getattr(leaves[node.meta["role"][1]], "requires_grad", False)
    _inline_regions(gm)
    for node in list(gm.graph.nodes):
        _respell(node)
        same = node.target is aten.to.dtype and node.args[0].meta["val"].dtype == node.meta["val"].dtype
        if node.target is aten.numpy_T.default:  # x.T
            node.target, dims = aten.permute.default, node.meta["val"].dim()
            node.args = (node.args[0], list(reversed(range(dims))))
        elif node.target is aten.mT.default:
            node.target, node.args = aten.transpose.int, (node.args[0], -2, -1)
        if same and not any(node.args[2:]) and not node.kwargs:  # x.to(its own dtype) is x
            node.replace_all_uses_with(node.args[0])
            gm.graph.erase_node(node)
    for node in reversed(gm.graph.nodes):
        if "assert" in str(node.target) or "sym_constrain" in str(node.target):
            gm.graph.erase_node(node)
    gm.graph.eliminate_dead_code()
    gm.graph.lint()
    return Captured(gm, program.call_spec.out_spec, constants, inputs, calls=calls, model=model, kwargs=fake_kwargs)


def _respell(node: Node) -> None:
    """Other words for the same op."""
    if node.target is aten.type_as.default:
        node.target, node.args = aten.to.dtype, (node.args[0], node.meta["val"].dtype)
    elif node.target is aten.mT.default:
        node.target, node.args = aten.transpose.int, (node.args[0], -2, -1)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """torch prints the graph so far, and each question about data, where we answer in one sentence."""
    logger = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with compat.unprinted_export():
            yield
    finally:
        logger.setLevel(level)


def _set_roles(gm: GraphModule, program) -> dict[str, torch.Tensor]:
    kinds = torch.export.graph_signature.InputKind
    constants, position = {}, 0
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    for node, spec in zip(placeholders, program.graph_signature.input_specs, strict=True):
        if spec.kind == kinds.PARAMETER:
            node.meta["role"] = ("parameter", spec.target)
        elif spec.kind == kinds.BUFFER:
            node.meta["role"] = ("buffer", spec.target)
        elif spec.kind == kinds.USER_INPUT:
            node.meta["role"] = ("input", position)
            position += 1
        else:
            node.meta["role"] = ("constant", spec.target)
            constants[spec.target] = program.constants[spec.target]
    return constants


def _inline_regions(gm: GraphModule) -> None:
    for node in list(gm.graph.nodes):
        name = getattr(node.target, "_name", "") if node.op == "call_function" else ""
        if name not in ("wrap_with_set_grad_enabled", "wrap_with_autocast"):
            continue
        grad = name == "wrap_with_set_grad_enabled"
        submodule, operands = (node.args[1], node.args[2:]) if grad else (node.args[4], node.args[5:])
        inner = getattr(gm, submodule.target)
        _inline_regions(inner)
        values = dict(zip((n for n in inner.graph.nodes if n.op == "placeholder"), operands, strict=True))
        with gm.graph.inserting_before(node):
            results = gm.graph.graph_copy(inner.graph, values)
            for old, new in values.items():
                if old.op == "placeholder":
                    continue
                new.meta = dict(old.meta)
                if not grad:
                    new.meta.setdefault("autocast", tuple(node.args[:4]))
                elif not node.args[0]:
                    new.meta["no_grad"] = True
            results = list(results) if isinstance(results, (tuple, list)) else [results]
            results = [_origin(r) if isinstance(r, Node) else r for r in results]
            if grad and not node.args[0]:
                for i, value in enumerate(results):
                    if any(value is operand for operand in operands):  # of outside; the region has only read it
                        continue
                    if isinstance(value, Node) and isinstance(value.meta.get("val"), torch.Tensor):
                        results[i] = gm.graph.call_function(aten.detach.default, (value,))
                        results[i].meta = dict(value.meta)
        for user in list(node.users):
            user.replace_all_uses_with(results[user.args[1]])
            gm.graph.erase_node(user)
        gm.graph.erase_node(node)
        if not submodule.users:
            gm.graph.erase_node(submodule)


# ops that give their operand itself where there is nothing to do; later uses of the operand then read the op's result
SELF = {
    aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten.to.other, aten.type_as.default, aten.contiguous.default,
    aten.flatten.using_ints, aten.resolve_conj.default, aten.resolve_neg.default, aten.dropout.default,
}  # fmt: skip


def _origin(node: Node) -> Node:
    """The value that a node gives on as the very same tensor, as `x.to(x.dtype)` gives x."""
    while node.op == "call_function" and node.target in SELF:
        x = node.args[0]
        assert isinstance(x, Node)
        a, b = x.meta["val"], node.meta["val"]
        names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
        given = dict(zip(names, node.args)) | node.kwargs
        if given.get("copy") or given.get("p") and given["train"]:
            break
        if (a.dtype, a.shape, a.stride()) != (b.dtype, b.shape, b.stride()):
            break
        node = x
    return node


def source_line(node: Node) -> str:
    """`file.py:12 (code)` of the user's line that made a node: the innermost frame outside torch."""
    frames = re.findall(r'File "([^"]+)", line (\d+), in [^\n]*\n\s+([^\n]+)', node.meta.get("stack_trace") or "")
    for path, line, code in reversed(frames):
        if "/torch/" not in path and "/tedcompile/" not in path:
            return f"{path.rsplit('/', 1)[-1]}:{line} ({code.strip()})"
    return ""


def module_path(node: Node) -> str:
    """The path of the module that a node, or the forward node whose VJP it is, came from: `model.layers.0.mlp`."""
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack") or {}
    return next(reversed(list(stack.values())), ("",))[0] if stack else ""


def layer_of(path: str) -> str:
    """`model.layers.3.mlp` to `model.layers.3`; empty outside of numbered modules."""
    found = re.match(r"(.*?(?<![^.])\d+)(?![^.])", path)
    return found[1] if found else ""


DATA_DEPENDENT = "control flow or a size depends on the values of tensors"


def _explained(error: Exception, model: torch.nn.Module) -> Exception:
    if (
        isinstance(error, (ValueError, TypeError))
        and getattr(error, "__module__", "") != "torch"
        and "tedcompile" in str(traceback.extract_tb(error.__traceback__)[-1].filename)
    ):
        return error
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "/torch/" not in f.filename]
    frames = [f for f in frames if "/tedcompile/" not in f.filename]
    where = f"{frames[-1].filename}:{frames[-1].lineno} ({frames[-1].line})" if frames else type(model).__name__
    text = str(error)
    if (
        type(error).__name__ in ("GuardOnDataDependentSymNode", "DataDependentOutputException")
        or "data-dependent" in text
    ):
        cause = f"{DATA_DEPENDENT}; use torch.where, or a mask, instead"
    else:
        cause = f"{type(error).__name__}: {text.strip().splitlines()[0] if text.strip() else 'no message'}"
    return ValueError(f"{type(model).__name__} cannot be captured: {where}: {cause}")
