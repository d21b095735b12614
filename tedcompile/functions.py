"""Backward passes that a captured graph cannot see: `torch.autograd.Function` kept whole, hooks refused by name.

`torch.export` traces through `Function.apply` and silently drops the class's own backward. While `keep_functions` is
active, apply becomes one node instead:

    tedfn.forward("router.TopK(Tensor, int, 'softmax')", [x, w], [2], needs=[True, False]) -> [*outputs, *saved]

Its VJP is one `tedfn.backward` node that calls the class's backward. Both run the user's Python when the graph runs;
what that Python is called with, beside tensors and ints, is found by name in a registry (`_FUNCTIONS`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import functools
import inspect
import itertools
import sys
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import FunctionCtx
from torch.utils.checkpoint import CheckpointFunction

LIBRARY = torch.library.Library("tedfn", "DEF")
LIBRARY.define("forward(str function, Tensor[] tensors, SymInt[] ints, bool[] needs) -> Tensor[]")
LIBRARY.define(
    "backward(str function, int plan, Tensor?[] grads, Tensor[] saved, SymInt[] ints, SymInt[] sizes, bool[] needs)"
    " -> Tensor[]"
)


# ---- values without their tensors -----------------------------------------------------------------------------------


class _Slot(enum.Enum):
    TENSOR = "Tensor"
    INT = "int"


@dataclass
class _Template:
    """A nested value whose tensors and ints are kept apart: ints may be symbols, and a shape is a range of them."""

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


def _split(value: Any) -> tuple[_Template, list[Tensor], list[int]]:
    leaves, spec = pytree.tree_flatten(value)
    tensors: list[Tensor] = []
    ints: list[int] = []
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


def _identity(value: Any, owner: str, seen: frozenset[int] = frozenset()) -> Any:
    """A hashable stand-in that is equal for values that mean the same; ValueError for one that hides tensors."""
    if id(value) in seen:
        return id(value)
    again = functools.partial(_identity, owner=owner, seen=seen | {id(value)})
    if isinstance(value, torch.nn.Module) and any(True for _ in itertools.chain(value.parameters(), value.buffers())):
        raise ValueError(f"{owner} is given the module {type(value).__name__}, whose parameters would get no gradient")
    if isinstance(value, Tensor):
        raise ValueError(f"{owner} reaches a tensor through a closure; pass it as an argument")
    if isinstance(value, (torch.SymFloat, torch.SymBool)):
        raise ValueError(f"{owner} is given a float or bool computed from a size that is not known at capture")
    if isinstance(value, types.MethodType):
        return again(value.__func__), again(value.__self__)
    if isinstance(value, functools.partial):
        value = (value.func, value.args, value.keywords)
    if isinstance(value, types.FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        return value.__code__, again((cells, value.__defaults__, value.__kwdefaults__))
    leaves, spec = pytree.tree_flatten(value)
    if len(leaves) != 1 or leaves[0] is not value:
        return repr(spec), tuple(again(leaf) for leaf in leaves)
    if isinstance(value, float):
        return float, repr(value)
    return (type(value), value) if type(value).__hash__ not in (None, object.__hash__) else id(value)


def _text(value: Any) -> str:
    if isinstance(value, _Slot):
        return value.value
    plain = value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device))
    return repr(value) if plain else getattr(value, "__qualname__", type(value).__name__)


# ---- the registry ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Plan:
    """How a forward's result is kept for its backward. Compared as a whole; the last two fields are found by trying."""

    structure: Any  # of what is saved, the outputs and the rest below, without constants
    constants: Any
    like: tuple[tuple[torch.dtype, torch.device, int], ...]  # dtype, device and ndim of each input
    state: _Template = field(compare=False)  # of (save_for_backward's tensors, attributes of ctx)
    sources: tuple[int, ...]  # where each saved tensor is in [*inputs, *outputs of the op]
    positions: tuple[int | None, ...]  # for each output tensor, which of the outputs it is
    arity: int
    differentiable: tuple[bool, ...]
    materialize: bool
    absent: tuple[bool, ...] = field(default=(), compare=False)  # inputs that backward gives no gradient
    written: tuple[bool, ...] = field(default=(), compare=False)  # gradients, saved tensors it writes to or returns


@dataclass
class _Function:
    """A Function class and the arguments of one call of it that are neither tensors nor ints."""

    cls: type[Function]
    arguments: _Template
    positions: tuple[int | None, ...]  # for each tensor, which argument it is, or None inside a list
    arity: int
    autocast: tuple[tuple[str, torch.dtype], ...]
    plans: list[_Plan] = field(default_factory=list)

    def needs(self, needs: Sequence[bool]) -> tuple[bool, ...]:
        """`ctx.needs_input_grad`: one flag an argument, from one a tensor."""
        wanted = {position for position, need in zip(self.positions, needs) if need}
        return tuple(position in wanted for position in range(self.arity))


_FUNCTIONS: dict[str, _Function] = {}
_NAMES: dict[Any, str] = {}
