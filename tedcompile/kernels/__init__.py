"""Triton kernels of the canonical ops, for CUDA; `tedcompile.ops` holds each one's reference, which is the CPU path."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def register(library: torch.library.Library) -> None:
    """Makes the kernels what CUDA tensors of half and single precision get; the references serve the other dtypes."""
    from tedcompile.kernels import experts
    from tedcompile.kernels import losses as loss_kernels
    from tedcompile.ops import gated, losses, products, tokens

    for name, reference, kernel in (
        ("route", tokens.route, experts.route),
        ("permute", tokens.permute, experts.permute),
        ("gather_sum", tokens.gather_sum, experts.gather_sum),
        ("gather_sum_some", tokens.gather_sum_some, experts.gather_sum),
        ("unpermute", tokens.unpermute, experts.unpermute),
        ("unpermute_some", tokens.unpermute_some, experts.unpermute),
        ("gated_experts", gated.gated_experts, experts.gated_experts),
        ("gated_vjp", gated.gated_vjp, experts.gated_vjp),
        ("gated_vjp_x", gated.gated_vjp_x, experts.gated_vjp_x),
        ("tokens_outer", gated.tokens_outer, experts.tokens_outer),
        ("loss_rows", losses.loss_rows, loss_kernels.loss_rows),
        ("loss_gradient_", losses.loss_gradient_, loss_kernels.loss_gradient_),
    ):
        library.impl(name, _choose(kernel, reference), "CUDA")
    for name, reference, kernel in (
        ("grouped_mm", products.grouped_mm, experts.grouped_mm),
        ("grouped_outer", products.grouped_outer, experts.grouped_outer),
    ):
        library.impl(name, _choose(_where_aten_cannot(kernel, reference), reference), "CUDA")


def _choose(kernel: Callable, reference: Callable) -> Callable:
    def call(*args):
        kinds = {t.dtype for t in args if isinstance(t, torch.Tensor) and t.is_floating_point()}
        return (kernel if kinds <= set(DTYPES) else reference)(*args)

    return call


def _where_aten_cannot(kernel: Callable, reference: Callable) -> Callable:
    """ATen's grouped product takes bf16 with strides of a multiple of 16 bytes; else the reference asks the host."""
    from tedcompile.ops import products

    def call(a, b, counts):
        takes = products.aten_takes(a.contiguous(), b, counts)
        return (reference if takes or a.dtype != b.dtype else kernel)(a, b, counts)

    return call
