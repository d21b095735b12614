"""Activations of gated experts and their derivatives, in fp32 registers. ACT is a name of `ACTIVATIONS`."""

import triton
import triton.language as tl

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")


@triton.jit
def activate(x, ACT: tl.constexpr):
    """f(x) and f'(x)."""
    if ACT == "silu":
        s = 1 / (1 + tl.exp(-x))
        y = x * s
        slope = s + y * (1 - s)
    elif ACT == "gelu":
        cdf = 0.5 * (1 + tl.erf(x * 0.7071067811865476))
        y = x * cdf
        slope = cdf + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif ACT == "gelu_tanh":
        u = 1.5957691216057308 * (x + 0.044715 * x * x * x)
        s = 1 / (1 + tl.exp(-u))  # (1 + tanh(u / 2)) / 2
        y = x * s
        slope = s + y * (1 - s) * 1.5957691216057308 * (1 + 0.134145 * x * x)
    else:
        tl.static_assert(ACT == "relu")
        y = tl.maximum(x, 0.0)
        slope = tl.where(x > 0, 1.0, 0.0)
    return y, slope
