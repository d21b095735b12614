"""How gradients reach their parameters: to flat memory that an optimizer keeps for them, and by autograd where none is.

Autograd would add each to what `p.grad` holds, tensor by tensor, also to zeros; flat memory takes those of a whole
backward at once, writes where it is zero, and knows their squares afterwards.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.weak import WeakTensorKeyDictionary

from tedcompile import compat, zero


class Home(Protocol):
    def takes(self, number: int, parameter: Tensor, gradient: Tensor) -> bool: ...

    def deliver(self, arrived: Sequence[tuple[int, Tensor]]) -> None: ...


_homes: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # parameter -> (weak Home, its number there)


def settle(parameter: Tensor, home: Home, number: int) -> None:
    """From now on `home` takes the gradients of a parameter, as long as it lives."""
    _homes[parameter] = (weakref.ref(home), number)


def deliver(
    parameters: Sequence[DTensor], gradients: Sequence[Tensor | None], nodes: Sequence[Any]
) -> list[Tensor | None]:
    """In a backward: takes local gradients home; returns, as DTensors, those that autograd is to accumulate.

    `nodes`: those of the graph that are to do so.
    """
    left: list[Tensor | None] = []
    arrived: dict[Home, list[tuple[int, Tensor]]] = {}
    usual = torch.is_grad_enabled()  # a graph of the backward is wanted
    for p, g, node in zip(parameters, gradients, nodes, strict=True):
        reference, number = (None, 0) if g is None or usual else _homes.get(p, (None, 0))
        home = reference and reference()
        if g is not None and home and home.takes(number, p, g) and compat.only_accumulates(p, node):
            arrived.setdefault(home, []).append((number, g))
            g = None
        left.append(None if g is None else zero.gradient(p, g))
    for home, members in arrived.items():
        home.deliver(members)
    return left
