"""In-place programs against eager torch: values and gradients, on written cases and on random programs."""

import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tedcompile.passes import functionalise
from tests.lockstep import after, targets


class Program(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function
        generator = torch.Generator().manual_seed(1)
        self.w = nn.Parameter(torch.randn(4, 6, generator=generator))
        self.v = nn.Parameter(torch.randn(6, generator=generator))
        self.register_buffer("seen", torch.ones(6))

    def forward(self, x):
        return self.function(self, x, self.w * 1, self.v * 1)


def same_as_eager(function):
    """Asserts equal outputs, gradients and buffers; the rewritten graph."""
    module, x = Program(function), torch.randn(4, 6, generator=torch.Generator().manual_seed(2))
    gm, ctx = after(module, dict(x=x), functionalise)
    assert not any(n.target._schema.is_mutable for n in gm.graph.nodes if hasattr(n.target, "_schema"))
    output = gm.graph.output_node()
    count = len(output.args[0])
    output.args = ((*output.args[0], *ctx.mutations.values()),)
    gm.recompile()
    known = {**dict(module.named_parameters()), "seen": module.seen.clone(), 0: x, **gm.meta["constants"]}
    given = [known[n.meta["role"][1]] for n in gm.graph.nodes if n.op == "placeholder"]
    got = gm(*given)
    got, buffers = got[:count], got[count:]
    want = module(x)
    want = want if isinstance(want, tuple) else (want,)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b)
    for node, value in zip(ctx.mutations, buffers, strict=True):
        torch.testing.assert_close(value, module.get_buffer(node.meta["role"][1]))
    if not ctx.mutations:
        assert torch.equal(module.seen, torch.ones(6))
    for a, b in zip(gradients(module, got), gradients(module, want), strict=True):
        torch.testing.assert_close(a, b)
    return gm


def gradients(module, results):
    total = sum((r * torch.arange(1.0, 1 + r.numel()).view(r.shape)).sum() for r in results if r.is_floating_point())
    if not total.requires_grad:
        return []
    found = torch.autograd.grad(total, list(module.parameters()), allow_unused=True, retain_graph=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(module.parameters(), found, strict=True)]


def into_select(m, x, a, b):
    base = a + x
    row = base[1]
    row.add_(b)
    return base, row


def two_views(m, x, a, b):
    base = a * x
    rows, columns = base[:2], base[:, 1:4]
    rows.mul_(2)
    columns.add_(rows[0, 0])  # reads what was written through the other view
    rows.sub_(1)
    return base, rows, columns


def nested_views(m, x, a, b):
    base = a + 0 * x
    inner = base.t()[1:5:2].unsqueeze(0).permute(2, 0, 1)
    inner.mul_(3)
    return base.sum(0), inner


def reshapes(m, x, a, b):
    base = a * x
    base.view(2, 12)[1].add_(1)
    base.flatten()[3:5].zero_()
    base.view(4, 1, 6).squeeze(1).mul_(2)
    return base


def chained(m, x, a, b):
    return a.add_(1).mul_(x).clamp_(min=0).t().add_(2)


def copies(m, x, a, b):
    base = torch.zeros(4, 6)
    base[2].copy_(b)
    base[:, 3].copy_(a[:, 1])
    return base


def copy_broadcast_then_view(m, x, a, b):
    base = torch.zeros(4, 6)
    base.copy_(b)
    return base.view(24) * x.view(24)


def copy_transposed_then_view(m, x, a, b):
    base = torch.zeros(4, 6)
    base.t().copy_((a * x).reshape(6, 4))
    return base.view(3, 8)


def copy_cast(m, x, a, b):
    base = torch.zeros(4, 6, dtype=torch.float64)
    base.copy_(a)
    return base


def wider_operand(m, x, a, b):
    a.add_(x.double())
    return a


def wider_into_view(m, x, a, b):
    base = a * x
    base[1].mul_(b.double())
    return base + 1


def integers(m, x, a, b):
    counts = torch.zeros(6, dtype=torch.int32)
    counts.add_((x[0] > 0).long())
    return counts, a * counts


def masked(m, x, a, b):
    a.masked_fill_(x > 0, -1.0)
    a[:, 2].masked_fill_(x[:, 2] > 0, 5.0)
    return a.softmax(-1)


def put(m, x, a, b):
    base = torch.zeros(4, 6)
    base[torch.tensor([1, 3])] = a[:2]
    base[torch.tensor([0, 1]), torch.tensor([2, 2])] += b[:2]
    return base


def boolean_put(m, x, a, b):
    base = a * 2
    base[x > 0] = 0.5
    return base


def index_add(m, x, a, b):
    out = torch.zeros_like(a)
    out.index_add_(0, torch.tensor([1, 1, 0, 3]), a * x)
    out[0].scatter_add_(0, torch.tensor([0, 0, 5]), b[:3])
    return out


def old_values(m, x, a, b):
    before = a.exp()
    view = a[0]
    copied = view.clone()
    a.mul_(2)
    return before, view, copied, a


def chunks(m, x, a, b):
    base = torch.zeros(4, 6)
    left, right = base.chunk(2, dim=1)
    left.add_(x[:, :3])
    right.add_(left)
    return base * a, left, right * b[:3]


def unbound(m, x, a, b):
    base = torch.zeros(4, 6)
    rows = base.unbind(0)
    rows[2].add_(x[0])
    return base * a, rows[1], rows[2]


def split_sizes(m, x, a, b):
    base = x * 2
    first, second, third = base.split([1, 3, 2], dim=-1)
    base.add_(1)
    second.neg_()
    return base * a, first, third


def narrow(m, x, a, b):
    base = a * x
    base.narrow(1, 2, 3).mul_(2)
    return base


def counter(m, x, a, b):
    with torch.no_grad():
        m.seen.add_(x.sum(0))
    return a


def split_read_only(m, x, a, b):
    left, right = (a * x).chunk(2, dim=1)
    b.add_(1)
    return left * right, b


def detach_in_place(m, x, a, b):
    base = a * x
    base.detach_()
    return base * b


def buffer_added(m, x, a, b):
    m.seen.add_(x.sum(0))
    m.seen[2:].add_(1)
    return a * m.seen


def buffer_under_no_grad(m, x, a, b):
    with torch.no_grad():
        m.seen += x.detach().sum(0)
    return a * m.seen


def inplace_activation(m, x, a, b):
    return F.relu(a, inplace=True) + F.silu(b, inplace=True)


def diagonal(m, x, a, b):
    base = a * x
    base.diagonal().mul_(2)
    return base


def setitem_slices(m, x, a, b):
    base = torch.empty(4, 6)
    base[..., ::2] = a[..., ::2] * 2
    base[..., 1::2] = x[..., 1::2]
    return base


def loop(m, x, a, b):
    out = torch.zeros(4, 6)
    for i in range(4):
        out[i] += a[i] * b
        out[:, i].mul_(1 + i)
    return out


def swapped_views(m, x, a, b):
    base = a * x
    moved = base.unflatten(1, (2, 3)).transpose(1, 2)
    moved[:, 1].add_(1)
    return base, moved


CASES = [
    into_select,
    two_views,
    nested_views,
    reshapes,
    chained,
    copies,
    copy_broadcast_then_view,
    copy_transposed_then_view,
    copy_cast,
    wider_operand,
    wider_into_view,
    integers,
    masked,
    put,
    boolean_put,
    index_add,
    old_values,
    chunks,
    unbound,
    split_sizes,
    split_read_only,
    narrow,
    counter,
    detach_in_place,
    buffer_added,
    buffer_under_no_grad,
    inplace_activation,
    diagonal,
    setitem_slices,
    loop,
    swapped_views,
]


@pytest.mark.parametrize("function", CASES, ids=lambda f: f.__name__)
def test_same_as_eager(function):
    same_as_eager(function)


def random_program(seed):
    """A function that writes through random views of two values and reads the others at random."""

    def program(m, x, a, b):
        rng = random.Random(seed)
        values = [a * x, a + b, x * b]
        for _ in range(rng.randint(4, 9)):
            v = rng.choice(values)
            kind = rng.randrange(9)
            if kind == 0 and v.dim() > 1:
                values.append(v[rng.randrange(v.shape[0])])
            elif kind == 1 and v.dim():
                d = rng.randrange(v.dim())
                values.append(v.narrow(d, 0, max(v.shape[d] - 1, 1)))
            elif kind == 2 and v.dim() > 1:
                values.append(v.transpose(0, -1))
            elif kind == 3 and v.dim():
                values.append(v[..., ::2])
            elif kind == 4:
                values.append(v.unsqueeze(0))
            elif kind == 5:
                v.mul_(rng.choice([0.5, 2.0]))
            elif kind == 6:
                other = rng.choice([u for u in values if u.shape == v.shape])
                v.add_(other * 0.5)
            elif kind == 7:
                v.copy_((v * 2 + x.mean()).flip(0) if v.dim() else v + 1)
            else:
                values.append(v.flatten() if rng.random() < 0.5 else v * 1.5)
        return tuple(values)

    return program


@pytest.mark.parametrize("seed", range(12))
def test_random_program(seed):
    same_as_eager(random_program(seed))


def test_graph_without_writes_is_left_alone():
    gm = same_as_eager(lambda m, x, a, b: (a.view(24) * 2, a.chunk(2, 1)[0]))
    assert "aten::view" in targets(gm) and "aten::chunk" in targets(gm)


def test_pinned():
    gm = same_as_eager(into_select)
    at = targets(gm).index("aten::select")
    assert targets(gm)[at:] == ["aten::select", "aten::add", "aten::select_scatter"]


def write_input(m, x, a, b):
    x.add_(1)
    return a * x


def write_parameter(m, x, a, b):
    with torch.no_grad():
        m.w.mul_(2)
    return a


def detached(m, x, a, b):
    base = a * x
    base.detach().mul_(3)
    return base * b


def under_no_grad(m, x, a, b):
    base = a * x
    with torch.no_grad():
        base.mul_(3)
    return base * b


def write_overlapping(m, x, a, b):
    base = a * x
    base.flatten().unfold(0, 4, 2)[1].add_(1)
    return base


@pytest.mark.parametrize(
    "function, message",
    [
        (write_input, r"writes into the input .* at test_functionalise.py:\d+"),
        (write_parameter, r"writes into the parameter w at test_functionalise.py:\d+"),
        (write_overlapping, r"a write through .*unfold.* is not supported"),
        (detached, r"a write through detach\(\) .* has no gradient"),
        (under_no_grad, "a write under no_grad .* with a gradient"),
    ],
    ids=["input", "parameter", "unknown_view", "detached", "no_grad"],
)
def test_refused(function, message):
    with pytest.raises(ValueError, match=message):
        after(Program(function), dict(x=torch.zeros(4, 6)), functionalise)
