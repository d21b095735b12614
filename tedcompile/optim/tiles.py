"""The kernel of a tile: a rule, the storage of master and moments, clipping and skipping as one Inductor kernel.

A tile is rows of flat memory (rows, 256). Everything that is kept is read and written once, in place. The number of
rows is a symbol, and all numbers are tensors, so nothing is ever compiled twice.

Storage of an fp32 value, as arrays with one row a block:
    fp32    itself
    bf16    its upper 16 bits, rounded up or down by chance in proportion (a decay of 0.1 % a step is below bf16's
            spacing and would be rounded away every time)
    int8    codes and one fp32 scale a block: signed values linearly; positive ones, as parts of the block's largest, as
            floats of 5 bits of exponent and 3 of mantissa; both rounded by chance (block-wise: Dettmers et al., arXiv
            2110.02861)
    split   of a master weight, the 16 bits that its bf16 parameter lacks: exact
The chance is a hash of position, step and gradient: the same on all ranks that hold the same values.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tedcompile import compat
from tedcompile.optim.rules import Rule

BLOCK = 256
LAUNCH = 2**31 // BLOCK - 64  # rows: 32-bit indices, also of the last, partly filled program
ONE = (127 << 3) - 255  # code 255 of a positive int8 state is 1.0, the block's largest value; code 0 is 2**-32 of it


@dataclass(frozen=True)
class Storage:
    arrays: tuple[tuple[torch.dtype, int], ...]  # dtype and columns of each array
    decode: Callable[..., Tensor]  # of the arrays
    encode: Callable[[Tensor, Tensor], tuple[Tensor, ...]]  # value, 16 random bits in int32
    exact: Callable[[Tensor, tuple], tuple[Tensor, ...]] = lambda x, found: found  # mends what encode made of a decoded

    def restore(self, x: Tensor) -> tuple[Tensor, ...]:
        """The arrays of which `decode` gives x, bit by bit where there are some, else those of the nearest value."""
        return self.exact(x, self.encode(x, torch.full_like(x, 1 << 15, dtype=torch.int32)))

    @property
    def row_bytes(self) -> int:
        return sum(dtype.itemsize * columns for dtype, columns in self.arrays)


def _plain(dtype: torch.dtype, columns: int = BLOCK) -> Storage:
    return Storage(((dtype, columns),), lambda x: x, lambda x, bits: (x,))


def _encode_bf16(x: Tensor, bits: Tensor) -> tuple[Tensor]:
    return (((x.view(torch.int32) + bits) & -65536).view(torch.float32).to(torch.bfloat16),)


def _encode_signed(x: Tensor, bits: Tensor) -> tuple[Tensor, Tensor]:
    scale = x.abs().amax(-1, keepdim=True) / 127
    code = (x * (1 / scale.clamp(min=1e-38)) + bits.to(torch.float32) * 2**-16).floor()
    return code.clamp(-127, 127).to(torch.int8), scale


def _exact_signed(x: Tensor, found: tuple) -> tuple[Tensor, Tensor]:
    """The scale is one of the neighbours of largest value / largest code; rounding by chance may leave 126 of 127."""
    code, scale = found
    top = x.abs().amax(-1, keepdim=True)
    for largest in (126, 127):  # where both do, as for a single number, the likely one is taken
        for direction in (0.0, torch.inf, -torch.inf):
            guess = top / largest
            guess = guess if not direction else torch.nextafter(guess, torch.full_like(guess, direction))
            codes = (x / guess.clamp(min=1e-38)).round().clamp(-127, 127)
            right = (codes * guess == x).all(-1, keepdim=True) & (top > 0)
            code, scale = torch.where(right, codes.to(torch.int8), code), torch.where(right, guess, scale)
    return code, scale


def _decode_positive(code: Tensor, top: Tensor) -> Tensor:
    return top * ((code.to(torch.int32) + ONE) << 20).view(torch.float32)


def _encode_positive(x: Tensor, bits: Tensor) -> tuple[Tensor, Tensor]:
    top = x.amax(-1, keepdim=True)
    part = (x * ((1 + 2**-20) / top.clamp(min=1e-38))).clamp(max=1)  # of the largest, whatever the division, 1
    code = ((part.view(torch.int32) + (bits << 4)) >> 20) - ONE
    return code.clamp(0, 255).to(torch.uint8), top


STORAGES: dict[tuple[str, str], Storage] = {
    ("bf16", kind): Storage(((torch.bfloat16, BLOCK),), lambda x: x.to(torch.float32), _encode_bf16)
    for kind in ("signed", "positive")
}
STORAGES["int8", "signed"] = Storage(
    ((torch.int8, BLOCK), (torch.float32, 1)),
    lambda code, scale: code.to(torch.float32) * scale,
    _encode_signed,
    _exact_signed,
)
STORAGES["int8", "positive"] = Storage(((torch.uint8, BLOCK), (torch.float32, 1)), _decode_positive, _encode_positive)


def precision(dtype: torch.dtype) -> torch.dtype:
    """In which a parameter of this dtype is updated."""
    return torch.promote_types(dtype, torch.float32)


def storage(moments: str, kind: str, dtype: torch.dtype) -> Storage:
    """Of a state, for parameters of a dtype: fp64 parameters have fp64 states."""
    if kind == "block":
        return _plain(precision(dtype), 1)
    return _plain(precision(dtype)) if moments == "fp32" or dtype == torch.float64 else STORAGES[moments, kind]


def master_storage(master: str, dtype: torch.dtype) -> tuple[tuple[torch.dtype, int], ...]:
    """What is kept of a master weight beside its parameter."""
    if precision(dtype) == dtype:
        return ()
    return ((torch.float32 if master == "fp32" else torch.int16, BLOCK),)


def join(param: Tensor, kept: Sequence[Tensor]) -> Tensor:
    """The master weight of a parameter."""
    if not kept:
        return param
    if kept[0].dtype == torch.float32:
        return kept[0]
    return ((param.view(torch.int16).to(torch.int32) << 16) + kept[0].to(torch.int32)).view(torch.float32)


def part(value: Tensor, dtype: torch.dtype, kept: Sequence[torch.dtype]) -> tuple[Tensor, ...]:
    """A master weight as parameter and what is kept beside it."""
    if not kept:
        return (value,)
    if kept[0] == torch.float32:
        return value.to(dtype), value
    bits = value.view(torch.int32)
    upper = (bits + 0x8000) >> 16
    return upper.to(torch.int16).view(dtype), (bits - (upper << 16)).to(torch.int16)


def chances(g: Tensor, step: Tensor) -> Iterator[Tensor]:
    """Random numbers of 16 bits, int32 (rows, 256), for one state after another: a hash of position, step, gradient."""
    position = torch.arange(g.shape[0] * BLOCK, dtype=torch.int32, device=g.device).view(-1, BLOCK)
    x = (g.to(torch.float32).view(torch.int32) ^ position) + step.to(torch.int32) * 0x45EBCA6B
    while True:
        for factor in (0x7FEB352D, 0x46CA68B5):
            x = (x ^ (x >> 15 & 0x1FFFF)) * factor
        x = x ^ (x >> 16 & 0xFFFF)
        yield x & 0xFFFF
        yield x >> 16 & 0xFFFF


def numbers(names: Sequence[str], scalars: Tensor) -> dict[str, Tensor]:
    return dict(zip(names, scalars.unbind(0), strict=True))


@functools.cache
def update_kernel(
    rule: Rule, names: tuple[str, ...], master: str, moments: str, dtype: torch.dtype, device: torch.device
) -> Callable[[list[Tensor]], None]:
    """run([scalars (n,) fp64, gradient, parameter, what is kept of the master, arrays of the states in order])."""
    kept = master_storage(master, dtype)
    states = {name: storage(moments, kind, dtype) for name, kind in rule.states.items()}

    def update(scalars: Tensor, grad: Tensor, param: Tensor, *arrays: Tensor) -> tuple:
        h = numbers(names, scalars)
        finite, clip = h.pop("_finite") != 0, h.pop("_clip")
        p = join(param, arrays[: len(kept)])
        g = grad.to(p.dtype) * clip
        rest, old = list(arrays[len(kept) :]), {}
        for name, stored in states.items():
            old[name] = [rest.pop(0) for _ in stored.arrays]
        new_p, new = rule.update(p, g, {n: states[n].decode(*a) for n, a in old.items()}, h)
        for target, value in zip(
            (param, *arrays), part(torch.where(finite, new_p, p), dtype, [d for d, _ in kept]), strict=False
        ):
            target.copy_(value)
        random = chances(g, h["step"])
        for name, stored in states.items():
            bits = next(random) if stored.arrays[0][0].itemsize < 4 else p
            for target, value in zip(old[name], stored.encode(new[name], bits), strict=True):
                target.copy_(torch.where(finite, value, target))
        return ()

    arrays = [(dtype, BLOCK), (dtype, BLOCK), *kept, *(array for s in states.values() for array in s.arrays)]
    rows = 1 << 16  # a size to choose configurations by
    return compat.inductor_kernel(update, [(torch.float64, len(names)), *((d, rows, c) for d, c in arrays)], device)


def squares(grad: Tensor) -> Tensor:
    """The sum of squares of a gradient (rows, 256), 0-d fp64; inf or nan when an element is."""
    dims = None if grad.is_cuda else -1  # on CPUs one long fp32 sum is inexact
    return torch.linalg.vector_norm(grad, dim=dims, dtype=precision(grad.dtype)).to(torch.float64).square().sum()


def group_names(rule: Rule) -> list[str]:
    """The numbers of a param group, one after another."""
    names: list[str] = []
    for name, value in rule.defaults.items():
        several = isinstance(value, tuple)
        names += [f"{name.removesuffix('s')}{i + 1}" for i in range(len(value))] if several else [name]
    return names


@functools.cache
def prepare_kernel(rule: Rule, device: torch.device) -> tuple[Callable, tuple[str, ...]]:
    """Once a step: run([squares 0-d, group numbers (n,), largest norm 0-d, step 0-d, scalars (m,)]), and the scalars'
    names. Counts the step if the gradients are finite, and writes `_finite`, `_clip` and the rule's numbers."""
    names = group_names(rule)
    h = dict.fromkeys((*names, "step"), torch.ones((), dtype=torch.float64))
    found = ("_finite", "_clip", *rule.prepare(dict(h)))

    def prepare(squares: Tensor, group: Tensor, largest: Tensor, step: Tensor, scalars: Tensor) -> tuple:
        finite = squares.isfinite().to(torch.float64)
        clip = (largest / (squares.sqrt() + 1e-6)).clamp(max=1.0)  # as torch.nn.utils.clip_grad_norm_
        h = numbers(names, group) | {"step": step + 1}
        scalars.copy_(torch.stack([finite, clip, *rule.prepare(h).values()]))
        step.copy_(step + finite)
        return ()

    sizes: list[tuple] = [(), (len(names),), (), (), (len(found),)]
    return compat.inductor_kernel(prepare, [(torch.float64, *s) for s in sizes], device), found
