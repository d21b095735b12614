"""How gradients reach their parameters: to flat memory that an optimizer keeps for them, and by autograd where none is.

Autograd would add each to what `p.grad` holds, tensor by tensor, also to zeros; flat memory takes those of a whole
backward at once, writes where it is zero, and knows their squares afterwards.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Protocol

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


def deliver(parameters: Sequence[DTensor], gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
    """In a backward: takes local gradients home; returns, as DTensors, those that autograd is to accumulate."""
    left: list[Tensor | None] = []
    arrived: dict[Home, list[tuple[int, Tensor]]] = {}
    usual = torch.is_grad_enabled()  # a graph of the backward is wanted
    for p, g in zip(parameters, gradients, strict=True):
        home, number = None, 0
        if g is not None and not usual and p in _homes:
            reference, number = _homes[p]
            home = reference()
        if g is not None and home is not None and home.takes(number, p, g) and compat.only_accumulates(p):
            arrived.setdefault(home, []).append((number, g))
            g = None
        left.append(None if g is None else zero.gradient(p, g))
    for home, members in arrived.items():
        home.deliver(members)
    return left
