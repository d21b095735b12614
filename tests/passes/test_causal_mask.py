"""A mask that is the lower triangle becomes is_causal; every other mask stays."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tedcompile.layouts import aten
from tedcompile.passes import causal_mask, functionalise
from tests.lockstep import after

B, HEADS, L, D = 2, 2, 6, 4
MIN = torch.finfo(torch.float32).min


class Attention(nn.Module):
    def __init__(self, mask):
        super().__init__()
        self.mask = mask
        self.register_buffer("triangle", torch.ones(L, L, dtype=torch.bool).tril(), persistent=False)

    def forward(self, x, padding):
        return F.scaled_dot_product_attention(x, x, x, self.mask(self, x, padding))


def rows_and_columns():
    return torch.arange(L)[:, None], torch.arange(L)[None]


def compared(m, x, padding):
    i, j = rows_and_columns()
    return i >= j


def batched(m, x, padding):
    i, j = rows_and_columns()
    return (j <= i)[None, None].expand(B, 1, L, L)


def tril(m, x, padding):
    return torch.ones(L, L, dtype=torch.bool).tril()


def additive(m, x, padding):
    return torch.full((L, L), MIN).triu(1)


def additive_infinite(m, x, padding):
    return torch.zeros(L, L).masked_fill(torch.ones(L, L, dtype=torch.bool).triu(1), float("-inf"))


@pytest.mark.parametrize("mask", [compared, batched, tril, additive, additive_infinite], ids=lambda f: f.__name__)
def test_triangle(mask):
    arguments, same = attention(mask)
    assert arguments == (None, 0.0, True)
    assert same


def window(m, x, padding):
    i, j = rows_and_columns()
    return (j <= i) & (j > i - 3)


def upper(m, x, padding):
    return compared(m, x, padding).t()


def diagonal_hidden(m, x, padding):
    i, j = rows_and_columns()
    return (i > j) | (j == 0)


def bidirectional(m, x, padding):
    return torch.ones(L, L, dtype=torch.bool)


def soft(m, x, padding):
    """A finite penalty is not a mask."""
    return torch.full((L, L), -10.0).triu(1)


def biased(m, x, padding):
    i, j = rows_and_columns()
    return torch.where(i >= j, -0.1 * (i - j), MIN)


def one_of_batch(m, x, padding):
    i, j = rows_and_columns()
    both = torch.stack([i >= j, (i >= j) & (j > i - 3)])
    return both[:, None]


def padded(m, x, padding):
    return compared(m, x, padding)[None, None] & padding[:, None, None]


def from_buffer(m, x, padding):
    return m.triangle


@pytest.mark.parametrize(
    "mask",
    [window, upper, diagonal_hidden, bidirectional, soft, biased, one_of_batch, padded, from_buffer],
    ids=lambda f: f.__name__,
)
def test_other_masks_stay(mask):
    arguments, same = attention(mask)
    assert arguments[0] is not None and len(arguments) == 1
    assert same


def attention(mask):
    """The attention node's arguments from the mask on, and whether the graph gives the module's value."""
    module = Attention(mask)
    x = torch.randn(B, HEADS, L, D, generator=torch.Generator().manual_seed(0))
    padding = torch.ones(B, L, dtype=torch.bool)
    padding[1, 4:] = False
    gm, _ = after(module, dict(x=x, padding=padding), functionalise, causal_mask)
    (node,) = (n for n in gm.graph.nodes if n.target is aten.scaled_dot_product_attention.default)
    gm.recompile()
    known = {0: x, 1: padding, "triangle": module.triangle, **gm.meta["constants"]}
    (got,) = gm(*(known[n.meta["role"][1]] for n in gm.graph.nodes if n.op == "placeholder"))
    return node.args[3:], torch.allclose(got, module(x, padding), atol=1e-6)


def test_fewer_queries_than_keys_stay():
    class Last(nn.Module):
        def forward(self, x):
            mask = torch.ones(2, L, dtype=torch.bool).tril()
            return F.scaled_dot_product_attention(x[:, :, -2:], x, x, mask)

    gm, _ = after(Last(), dict(x=torch.randn(B, HEADS, L, D)), causal_mask)
    assert "is_causal" not in str(gm.graph) and "True" not in str(gm.graph.output_node().args)
    (node,) = (n for n in gm.graph.nodes if n.target is aten.scaled_dot_product_attention.default)
    assert node.args[3] is not None
