"""Random numbers of a seed and a rank."""

from __future__ import annotations

import torch

from tedcompile.ops import groups
from tedcompile.ops.define import NO_GRADIENT, define


@define("site(Tensor seed, int number) -> Tensor", lambda seed, number: torch.empty_like(seed), NO_GRADIENT)
def site(seed, number):
    """The seed of one random op, from that of the call: its own node, so that equal layers differ by an input only."""
    return torch.tensor((int(seed) * 0x9E3779B1 + number * 0x85EBCA77) % 2**62)


@define(
    "rand(Tensor like, Tensor seed, str kind, str axis) -> Tensor",
    lambda like, seed, kind, axis: like.new_empty(tuple(like.shape), dtype=torch.float32),
    NO_GRADIENT,
)
def rand(like, seed, kind, axis):
    """fp32 in the shape of `like`, "uniform" in [0, 1) or "normal", from a seed and the rank on `axis` if named.

    seed is a 0-d int64 tensor on the host. Replay with the same seed gives the same numbers (recomputation).
    """
    value = (int(seed) + (groups.index_in(axis) + 1 if axis else 0) * 0xC2B2AE3D) % 2**63
    generator = torch.Generator(device=like.device).manual_seed(value)
    draw = torch.randn if kind == "normal" else torch.rand
    return draw(like.shape, dtype=torch.float32, device=like.device, generator=generator)
