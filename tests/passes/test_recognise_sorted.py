"""Sorted dispatch in the ways that people write it becomes the canonical ops; look-alikes stay as they are."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tedcompile.ops import ops
from tedcompile.passes import functionalise, recognise_sorted
from tests.lockstep import after, targets

T, H, I, E = 10, 6, 8, 4


class Moe(nn.Module):
    """Stacked experts behind a top-k router; `dispatch(self, x, weights, index)` is the part under test."""

    def __init__(self, dispatch, k=2):
        super().__init__()
        torch.manual_seed(0)
        self.dispatch, self.k = dispatch, k
        self.router = nn.Linear(H, E)
        self.up, self.down = nn.Parameter(torch.randn(E, H, I)), nn.Parameter(torch.randn(E, I, H))
        self.up_bias = nn.Parameter(torch.randn(E, I))

    def forward(self, x):
        weights, index = self.router(x).softmax(-1).topk(self.k)
        if self.k == 1 and self.dispatch in ONE_D:
            weights, index = self.router(x).softmax(-1).max(-1)
        return self.dispatch(self, x, weights, index)

    def body(self, rows, counts):
        return ops.grouped_mm(F.gelu(ops.grouped_mm(rows, self.up, counts)), self.down, counts)


def sorted_slots(index):
    flat = index.flatten()
    order = flat.argsort(stable=True)
    return flat, order, flat.bincount(minlength=E)


def index_add(m, x, weights, index):
    flat, order, counts = sorted_slots(index)
    y = m.body(x[order // m.k], counts) * weights.flatten()[order, None]
    return torch.zeros_like(x).index_add(0, order // m.k, y)


def index_add_in_place(m, x, weights, index):
    flat, order, counts = sorted_slots(index)
    token = torch.arange(T).repeat_interleave(m.k)[order]
    out = torch.zeros(T, H)
    out.index_add_(0, token, m.body(x[token], counts) * weights.view(-1)[order].unsqueeze(-1))
    return out


def index_put_accumulate(m, x, weights, index):
    flat, order, counts = sorted_slots(index)
    y = m.body(x[order // m.k], counts) * weights.flatten()[order, None]
    return torch.zeros_like(x).index_put((order // m.k,), y, accumulate=True)


def inverse_permutation(m, x, weights, index):
    flat, order, counts = sorted_slots(index)
    y = m.body(x[order // m.k], counts)
    return (y[order.argsort()].view(T, m.k, H) * weights[..., None]).sum(1)


def inverse_by_scatter(m, x, weights, index):
    flat, order, counts = sorted_slots(index)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(T * m.k))
    y = m.body(x.index_select(0, order // m.k), counts)
    return (y.index_select(0, inverse).view(T, m.k, H) * weights[..., None]).sum(1)


def scatter_rows(m, x, weights, index):
    flat, order, counts = sorted_slots(index)
    y = m.body(x[order // m.k], counts)
    slots = torch.zeros(T * m.k, H)
    slots[order] = y
    return (slots.view(T, m.k, H) * weights[..., None]).sum(1)


def weights_before(m, x, weights, index):
    flat, order, counts = sorted_slots(index)
    rows = x[order // m.k] * weights.flatten()[order, None]
    return torch.zeros_like(x).index_add(0, order // m.k, m.body(rows, counts))


def expanded_tokens(m, x, weights, index):
    """Copies tokens to slots first and sorts the slots."""
    flat, order, counts = sorted_slots(index)
    slots = x.repeat_interleave(m.k, 0)
    y = m.body(slots[order], counts)
    return (y[order.argsort()].view(T, m.k, H) * weights[..., None]).sum(1)


def histc(m, x, weights, index):
    flat = index.flatten()
    order = flat.argsort(stable=True)
    counts = torch.histc(flat.float(), bins=E, min=0, max=E - 1).long()
    y = m.body(x[order // m.k], counts) * weights.flatten()[order, None]
    return torch.zeros_like(x).index_add(0, order // m.k, y)


def one_hot(m, x, weights, index):
    values, order = torch.sort(index.flatten(), stable=True)
    counts = F.one_hot(index, E).sum((0, 1))
    y = m.body(x[order // m.k], counts) * weights.flatten()[order, None]
    return torch.zeros_like(x).index_add(0, order // m.k, y)


def compared(m, x, weights, index):
    values, order = torch.sort(index.flatten(), stable=True)
    counts = (values[None] == torch.arange(E)[:, None]).sum(1)
    y = m.body(x[torch.div(order, m.k, rounding_mode="floor")], counts) * weights.flatten()[order, None]
    return torch.zeros_like(x).index_add(0, order // m.k, y)


def scattered_counts(m, x, weights, index):
    flat = index.flatten()
    order = flat.sort(stable=True).indices
    counts = torch.zeros(E, dtype=torch.int64).scatter_add(0, flat, torch.ones_like(flat))
    y = m.body(x[order // m.k], counts) * weights.flatten()[order, None]
    return torch.zeros_like(x).index_add(0, order // m.k, y)


def offsets(m, x, weights, index):
    flat, order, counts = sorted_slots(index)
    ends = counts.cumsum(0)
    counts = torch.diff(ends, prepend=ends.new_zeros(1))
    y = m.body(x[order // m.k], counts) * weights.flatten()[order, None]
    return torch.zeros_like(x).index_add(0, order // m.k, y)


def biases(m, x, weights, index):
    flat, order, counts = sorted_slots(index)
    h = F.gelu(ops.grouped_mm(x[order // m.k], m.up, counts) + m.up_bias[flat[order]])
    y = ops.grouped_mm(h, m.down, counts) * weights.flatten()[order, None]
    return torch.zeros_like(x).index_add(0, order // m.k, y)


def scatter_add(m, x, weights, index):
    flat, order, counts = sorted_slots(index)
    token = order // m.k
    y = m.body(x[token], counts) * weights.flatten()[order, None]
    return torch.zeros_like(x).scatter_add(0, token[:, None].expand(-1, H), y)


def unstable_sort(m, x, weights, index):
    flat = index.flatten()
    order = flat.argsort()
    y = m.body(x[order // m.k], flat.bincount(minlength=E)) * weights.flatten()[order, None]
    return torch.zeros_like(x).index_add(0, order // m.k, y)


def one_dimension(m, x, weights, index):
    order = index.argsort(stable=True)
    y = m.body(x[order], index.bincount(minlength=E)) * weights[order, None]
    return torch.zeros_like(x).index_add(0, order, y)


def one_dimension_put(m, x, weights, index):
    order = index.argsort(stable=True)
    out = torch.zeros_like(x)
    out[order] = m.body(x[order], index.bincount(minlength=E))
    return out * weights[:, None]


ONE_D = {one_dimension, one_dimension_put}
POSITIVE = [
    index_add, index_add_in_place, index_put_accumulate, inverse_permutation, inverse_by_scatter, scatter_rows,
    weights_before, histc, one_hot, compared, scattered_counts, offsets, biases, scatter_add,
    unstable_sort,
]  # fmt: skip
CASES = [(f, 2) for f in POSITIVE] + [(f, 1) for f in (index_add, inverse_permutation, *sorted(ONE_D, key=str))]


def rewritten(dispatch, k):
    module = Moe(dispatch, k)
    gm, ctx = after(module, dict(x=torch.randn(T, H)), functionalise, recognise_sorted)
    gm.recompile()
    return module, gm, ctx


def same_as_eager(module, gm):
    known = dict(module.named_parameters())
    x = torch.randn(T, H, generator=torch.Generator().manual_seed(3))
    known |= {0: x, **gm.meta["constants"]}
    (got,) = gm(*(known[n.meta["role"][1]] for n in gm.graph.nodes if n.op == "placeholder"))
    want = module(x)
    torch.testing.assert_close(got, want)
    g = torch.randn_like(want)
    for a, b in zip(*(torch.autograd.grad(y, list(module.parameters()), g, allow_unused=True) for y in (got, want))):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dispatch, k", CASES, ids=lambda x: getattr(x, "__name__", str(x)))
def test_recognised(dispatch, k):
    module, gm, ctx = rewritten(dispatch, k)
    same_as_eager(module, gm)
    names = targets(gm)
    assert not ctx.replicated
    gm.graph.lint()
    assert names.count("ted::permute") == 1
    # nothing that adds atomically or sorts is left of the dispatch
    left = {"aten::index_add", "aten::scatter_add", "aten::argsort", "aten::sort", "aten::bincount", "aten::histc"}
    assert not left.intersection(names), left.intersection(names)
    assert {"ted::gather_sum", "ted::unpermute", "ted::take"} & set(names)
    for n in gm.graph.nodes:
        if n.target is ops.grouped_mm.default:
            counts = n.args[2]
            assert counts.args[0].target is ops.permute.default and counts.args[1] == 1


def test_biases_become_per_expert():
    _, gm, _ = rewritten(biases, 2)
    assert targets(gm).count("ted::per_expert") == 1


def wrong_token(m, x, weights, index):
    """Rows are sorted by expert, and the tokens are those of other slots."""
    flat, order, counts = sorted_slots(index)
    y = m.body(x[order % T], counts)
    return torch.zeros_like(x).index_add(0, order % T, y)


def unsorted_rows(m, x, weights, index):
    flat, order, counts = sorted_slots(index)
    token = torch.arange(T).repeat_interleave(m.k)
    return torch.zeros_like(x).index_add(0, token, m.body(x[token], counts))


def counts_of_another_routing(m, x, weights, index):
    flat, order, _ = sorted_slots(index)
    other = m.router(x.flip(0) * 2).topk(m.k).indices
    y = m.body(x[order // m.k], other.flatten().bincount(minlength=E))
    return torch.zeros_like(x).index_add(0, order // m.k, y)


def descending(m, x, weights, index):
    flat, _, counts = sorted_slots(index)
    order = flat.argsort(descending=True, stable=True)
    return torch.zeros_like(x).index_add(0, order // m.k, m.body(x[order // m.k], counts))


def shifted_counts(m, x, weights, index):
    flat, order, counts = sorted_slots(index)
    return torch.zeros_like(x).index_add(0, order // m.k, m.body(x[order // m.k], counts.roll(1)))


def fixed_groups(m, x, weights, index):
    counts = torch.full((E,), T * m.k // E)
    rows = x.repeat(m.k, 1)
    return m.body(rows, counts).view(m.k, T, H).sum(0) * weights.sum()


@pytest.mark.parametrize(
    "dispatch",
    [wrong_token, unsorted_rows, counts_of_another_routing, descending, shifted_counts, fixed_groups],
    ids=lambda f: f.__name__,
)
def test_look_alike_dispatches_its_rows_as_they_are(dispatch):
    """They are not tokens in the order of their experts; the product still says which expert each row is for."""
    module, gm, ctx = rewritten(dispatch, 2)
    same_as_eager(module, gm)
    assert not {"ted::gather_sum", "ted::unpermute", "ted::per_expert"} & set(targets(gm))
    (permute,) = [n for n in gm.graph.nodes if n.target is ops.permute.default]
    assert permute.args[0].meta["val"].shape == (2 * T, H) and permute.args[1].meta["val"].shape == (2 * T, 1)
    assert not ctx.replicated


def two_layers(m, x, weights, index):
    x = x + index_add(m, x, weights, index)
    weights, index = m.router(x).softmax(-1).topk(m.k)
    return x + inverse_permutation(m, x, weights, index)


def test_two_blocks():
    module, gm, ctx = rewritten(two_layers, 2)
    same_as_eager(module, gm)
    assert targets(gm).count("ted::permute") == 2 and not ctx.replicated


def accumulated_on_residual(m, x, weights, index):
    """The rows are added onto x itself, not onto zeros."""
    flat, order, counts = sorted_slots(index)
    y = m.body(x[order // m.k], counts) * weights.flatten()[order, None]
    return x.index_add(0, order // m.k, y)


def scaled_index_add(m, x, weights, index):
    flat, order, counts = sorted_slots(index)
    y = m.body(x[order // m.k], counts) * weights.flatten()[order, None]
    return torch.zeros_like(x).index_add(0, order // m.k, y, alpha=2)


def onto_ones(m, x, weights, index):
    flat, order, counts = sorted_slots(index)
    y = m.body(x[order // m.k], counts) * weights.flatten()[order, None]
    return torch.full((T, H), 1.0).index_add(0, order // m.k, y)


@pytest.mark.parametrize("dispatch", [accumulated_on_residual, scaled_index_add, onto_ones], ids=lambda f: f.__name__)
def test_combines_that_are_more_than_a_sum_keep_their_value(dispatch):
    module, gm, _ = rewritten(dispatch, 2)
    same_as_eager(module, gm)
