"""Update rules in plain PyTorch: what `Tiled` makes one kernel of. A user's own rule is ten lines like these.

`update(p, g, state, h)` gives the new parameter and the new state. p, g and the states are tensors (blocks, 256) of the
master precision, 256 consecutive elements of flat memory a block; a state of kind "block" is (blocks, 1), one number a
block. `h` holds 0-d fp64 tensors: the param group's numbers (of a tuple `betas` the entries `beta1`, `beta2`), `step`,
which is 1 in the first update, and what `prepare(h)` has made of them, once a step and not once an element.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Numbers = dict[str, Tensor]
State = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Rule:
    """An optimizer as data.

    Args:
        update: the rule, element by element or block by block (above).
        states: names of the states that start at zero, and their kinds: "signed", "positive" (never below zero), both
            one an element, or "block".
        defaults: numbers of a param group and their defaults.
        prepare: further numbers, once a step.
    """

    update: Callable[[Tensor, Tensor, State, Numbers], tuple[Tensor, State]]
    states: Mapping[str, str]
    defaults: Mapping[str, Any]
    prepare: Callable[[Numbers], Numbers] = field(default=lambda h: h)


def _bias_corrections(h: Numbers) -> Numbers:
    unbias = 1 / (1 - h["beta2"] ** h["step"]).sqrt()
    size = h["lr"] / (1 - h["beta1"] ** h["step"])
    decay = 1 - h["lr"] * h["weight_decay"]
    return dict(h, unbias=unbias, size=size, decay=decay, w1=1 - h["beta1"], w2=1 - h["beta2"])


def _adam(p: Tensor, g: Tensor, state: State, h: Numbers) -> tuple[Tensor, State]:
    m = state["exp_avg"] + (g - state["exp_avg"]) * h["w1"]
    v = state["exp_avg_sq"] * h["beta2"] + g * g * h["w2"]
    return p - h["size"] * m / (v.sqrt() * h["unbias"] + h["eps"]), {"exp_avg": m, "exp_avg_sq": v}


def _adamw(p, g, state, h):
    return _adam(p * h["decay"], g, state, h)


def _adam_l2(p, g, state, h):
    return _adam(p, g + h["weight_decay"] * p, state, h)


ADAM = {"exp_avg": "signed", "exp_avg_sq": "positive"}
BETAS = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8}
adamw = Rule(_adamw, ADAM, BETAS | {"weight_decay": 1e-2}, _bias_corrections)  # Loshchilov, Hutter: arXiv 1711.05101
adam = Rule(_adam_l2, ADAM, BETAS | {"weight_decay": 0.0}, _bias_corrections)  # Kingma, Ba: arXiv 1412.6980


def _momentum(p, g, state, h):
    g = g + h["weight_decay"] * p
    buf = h["momentum"] * state["momentum_buffer"] + h["fresh"] * g
    step = torch.where(h["nesterov"] != 0, g + h["momentum"] * buf, buf)
    return p - h["lr"] * step, {"momentum_buffer": buf}


def _fresh(h):
    return dict(h, fresh=torch.where(h["step"] == 1, 1.0, 1 - h["dampening"]))


# as torch.optim.SGD, with and without momentum
momentum = Rule(
    _momentum,
    {"momentum_buffer": "signed"},
    {"lr": 1e-3, "momentum": 0.9, "dampening": 0.0, "weight_decay": 0.0, "nesterov": False},
    _fresh,
)
sgd = Rule(lambda p, g, s, h: (p - h["lr"] * (g + h["weight_decay"] * p), {}), {}, {"lr": 1e-3, "weight_decay": 0.0})


def _lion(p, g, state, h):
    m = state["exp_avg"]
    step = (m * h["beta1"] + g * (1 - h["beta1"])).sign()
    p = p * (1 - h["lr"] * h["weight_decay"]) - h["lr"] * step
    return p, {"exp_avg": m * h["beta2"] + g * (1 - h["beta2"])}


# Chen et al.: arXiv 2302.06675
lion = Rule(_lion, {"exp_avg": "signed"}, {"lr": 1e-4, "betas": (0.9, 0.99), "weight_decay": 0.0})


def _adafactor(p, g, state, h):
    v = state["exp_avg_sq"] + ((g * g).mean(-1, keepdim=True) + h["eps"] - state["exp_avg_sq"]) * h["rate"]
    step = g / v.sqrt()
    step = step / (step.square().mean(-1, keepdim=True).sqrt() / h["clip"]).clamp(min=1)
    return p * (1 - h["lr"] * h["weight_decay"]) - h["lr"] * step, {"exp_avg_sq": v}


# After Shazeer, Stern (arXiv 1804.04235): their decay rate and update clipping, with one second moment for each block
# of 256 elements in place of one for each row and column; no first moment.
adafactor = Rule(
    _adafactor,
    {"exp_avg_sq": "block"},
    {"lr": 1e-2, "eps": 1e-30, "clip": 1.0, "decay": 0.8, "weight_decay": 0.0},
    lambda h: dict(h, rate=h["step"] ** -h["decay"]),
)
