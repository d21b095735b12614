"""Control flow that depends on routing, decided as for a routing that reaches every expert.

    for e, expert in enumerate(experts):
        mask = (index == e).any(-1)
        if mask.any():                      # taken
            out[mask] += expert(x[mask]) * ...

No graph can hold such a branch. Under `assumed`, each choice of experts (a top-k, an argmax) has an example value that
reaches all of them; integer work on it is done on the example as well, and a branch goes the way the example goes.
Where something was assumed is noted by module: the graph is right only if that module is recognised and the recognised
form is proven against the module's own code, with idle experts too (`prove.py`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tedcompile import compat

# function -> the position of `dim` in its arguments, and which of its results are indices
CHOICES: dict[Any, tuple[int, slice]] = {
    f: (at, results)
    for names, at, results in (
        (("topk",), 2, slice(1, 2)), (("argmax",), 1, slice(0, 1)), (("max", "sort"), 1, slice(1, 2)),
        (("argsort",), 1, slice(0, 1)), (("multinomial",), 9, slice(0, 1)),
    )
    for name in names
    for f in (getattr(torch, name), getattr(Tensor, name))
}  # fmt: skip
# function -> the position of the table from which it looks up entries
LOOKUPS = {Tensor.__getitem__: 0, torch.index_select: 0, Tensor.index_select: 0, torch.nn.functional.embedding: 1}
NONZERO = {torch.nonzero, Tensor.nonzero}


class Calls:
    """What each module is first called with, and which one runs; by path."""

    def __init__(self, model: torch.nn.Module):
        self.modules = {n: m for n, m in model.named_modules() if n}
        self.made: dict[str, tuple[tuple, dict]] = {}
        self.running: list[str] = [""]
        self.assumed: set[str] = set()

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        hooks: list[Any] = []
        for name, module in self.modules.items():

            def enter(_, args, kwargs, name=name):
                self.made.setdefault(name, (args, kwargs))
                self.running.append(name)

            def leave(*_):
                self.running.pop()

            hooks.append(module.register_forward_pre_hook(enter, with_kwargs=True, prepend=True))
            hooks.append(module.register_forward_hook(leave, always_call=True))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


class Assumed(torch.overrides.TorchFunctionMode):
    """Gives the indices of a choice an example that reaches every expert; branches follow the examples.

    A choice is made by a top-k and the like, or looked up in a buffer of integers (hash routing).
    """

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model
        integer = {n: b for n, b in model.named_buffers() if b.dtype in (torch.int64, torch.int32) and b.numel()}
        known = {n: b for n, b in integer.items() if b.device.type != "meta"}
        self.sizes = {n: int(b.max()) + 1 for n, b in known.items()}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if (func is torch.where and len(args) == 1) or (func in NONZERO and kwargs.pop("as_tuple", False)):
            found = args[0].nonzero()  # torch gives the tuple the example's sizes
            return tuple(found.select(1, i) for i in range(args[0].dim()))
        if func is Tensor.numpy and args[0].dim() == 1 and not args[0].is_floating_point():  # counts
            func = Tensor.tolist
        if func is Tensor.tolist and args[0].dim() == 1 and not isinstance(args[0].shape[0], int):
            return args[0]  # positions, which index as a tensor as well
        if func is Tensor.__format__ and args[0].dim() == 0:  # an expert's name
            return format(int(args[0]), args[1])
        if func is torch.select and isinstance(args[2], torch.SymInt):
            args = (*args[:2], int(args[2]))  # the weights of one expert
        result = func(*args, **kwargs)
        if func in LOOKUPS and isinstance(result, Tensor) and compat.example_of(result) is None:
            table = args[LOOKUPS[func]]
            name = next((n for n, b in self.model.named_buffers() if b is table), None)
            if name in self.sizes:
                with compat.no_modes():
                    example = _spread(result.shape, max(result.dim() - 1, 1), self.sizes[name])
                compat.set_example(result, example)
        at, which = CHOICES.get(func, (0, None))
        if which is not None:
            x = args[0] if args else kwargs["input"]
            dim = kwargs.get("dim", args[at] if len(args) > at else -1)
            parts = list(result) if isinstance(result, tuple) else [result]
            for index in parts[which]:
                chosen = compat.example_of(index) is None or x.is_floating_point()
                if chosen and isinstance(dim, int) and x.dim():
                    with compat.no_modes():
                        example = _spread(index.shape, dim % x.dim(), x.shape[dim])
                    compat.set_example(index, example)
        return result


def _spread(shape: torch.Size, dim: int, size: int) -> Tensor:
    """Indices below `size` that are different along dim and, with enough of them, reach every one."""
    if dim >= len(shape) or shape.numel() <= shape[dim]:
        return (torch.arange(shape.numel()) % size).reshape(shape)
    rest = [s for i, s in enumerate(shape) if i != dim]
    number = shape.numel() // shape[dim]
    step = shape[dim] if shape[dim] % size else 1  # a whole order starts elsewhere in each row: its first may be taken
    flat = (torch.arange(number)[:, None] * step + torch.arange(shape[dim])) % size
    return flat.reshape(*rest, shape[dim]).movedim(-1, dim).contiguous()
