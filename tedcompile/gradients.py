"""How gradients reach their parameters: to flat memory that an optimizer keeps for them, and by autograd where none is.

Autograd would add each to what `p.grad` holds, tensor by tensor; flat memory takes those of a whole backward at once.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from tedcompile import compat, zero


class Home(Protocol):
    def takes(self, number: int, parameter: Tensor, gradient: Tensor) -> bool: ...

    def deliver(self, arrived: Sequence[tuple[int, Tensor]]) -> None: ...


class Way:
    """From a parameter to its home, as long as that lives; copies and pickles of the parameter have none."""

    def __init__(self, home: Home | None = None, number: int = 0):
        self.number = number
        self.home: Callable[[], Home | None] = weakref.ref(home) if home is not None else lambda: None

    def __reduce__(self):
        return Way, ()

    def __deepcopy__(self, memo: dict) -> Way:
        return Way()


NONE = Way()


def settle(parameter: Tensor, home: Home, number: int) -> None:
    """From now on `home` takes the gradients of a parameter."""
    parameter.ted_way = Way(home, number)  # type: ignore[attr-defined]


def deliver(
    parameters: Sequence[DTensor], gradients: Sequence[Tensor | None], nodes: Sequence[Any]
) -> list[Tensor | None]:
    """In a backward: takes local gradients home; returns, as DTensors, those that autograd is to accumulate.

    `nodes`: those of the graph that are to do so.
    """
    left: list[Tensor | None] = []
    arrived: dict[Home, list[tuple[int, Tensor]]] = {}
    usual = torch.is_grad_enabled() or compat.capturing()  # a graph of the backward, or a recording of it, is wanted
    for p, g, node in zip(parameters, gradients, nodes, strict=True):
        way: Way = NONE if g is None or usual else getattr(p, "ted_way", NONE)
        home = way.home()
        if g is not None and home and home.takes(way.number, p, g) and compat.only_accumulates(p, node):
            arrived.setdefault(home, []).append((way.number, g))
            g = None
        left.append(None if g is None else zero.gradient(p, g))
    for home, members in arrived.items():
        home.deliver(members)
    return left
