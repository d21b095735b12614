"""How an op of `torch.ops.ted` is registered: schema, kernel, fake kernel and VJP."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

LIBRARY = torch.library.Library("ted", "DEF")
ops = torch.ops.ted


def define(schema: str, fake: Callable | None = None, vjp: tuple[Callable, Callable] | None = None):
    """Registers `ted::schema` with the decorated function as its kernel; `vjp` is (setup_context, backward)."""

    def register(kernel: Callable) -> Callable:
        name = LIBRARY.define(schema)
        LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
        torch.library.register_fake(f"ted::{name}", fake or kernel, lib=LIBRARY)
        if vjp:
            torch.library.register_autograd(f"ted::{name}", vjp[1], setup_context=vjp[0], lib=LIBRARY)
        return kernel

    return register


def keep(*names: str):
    """A setup_context that keeps the named arguments (after the inputs' order) as ctx attributes, saving no tensor."""

    def setup(ctx, inputs, output):
        for name, value in zip(names, inputs[-len(names) :] if names else (), strict=True):
            setattr(ctx, name, value)

    return setup


def save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


# for ops that read a differentiable tensor and whose result has no gradient
NO_GRADIENT = (lambda ctx, inputs, output: setattr(ctx, "count", len(inputs)), lambda ctx, *_: (None,) * ctx.count)


def same(x: Tensor, *_) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)
