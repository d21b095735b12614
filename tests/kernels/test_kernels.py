"""Every kernel against its reference in fp64: odd sizes, experts without rows, one expert with all, slots with none."""

import pytest
import torch

from tedcompile.ops import gated, ops, products, tokens

triton = pytest.importorskip("triton")

from tedcompile.kernels import experts, gradients, grouped, routing  # noqa: E402
from tedcompile.kernels import losses as loss_kernels  # noqa: E402
from tedcompile.kernels.configs import Config  # noqa: E402

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu has them without the interpreter")

ROUTINGS = {
    "spread": lambda T, K, E: torch.stack([torch.randperm(E)[:K] for _ in range(T)]),
    "an empty expert": lambda T, K, E: torch.randint(1, E, (T, K)),
    "one expert": lambda T, K, E: torch.full((T, K), E - 1),
    "slots without": lambda T, K, E: torch.randint(-1, E, (T, K)),
    "none": lambda T, K, E: torch.full((T, K), -1),
    "no tokens": lambda T, K, E: torch.zeros(0, K, dtype=torch.int64),
}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Tiles that fit the sizes here, so that there are several, full ones and others."""
    config = Config(16, 16, 16, warps=4, group=2, programs=0)
    monkeypatch.setattr(experts, "choose", lambda *_: config)
    torch.manual_seed(0)


def close(got, want, tolerance=1e-5):
    assert got.shape == want.shape
    assert (got.double() - want.double()).norm() <= tolerance * want.double().norm() + 1e-30


@pytest.mark.parametrize("name", ROUTINGS)
@pytest.mark.parametrize("T, K, E", [(70, 2, 5), (9, 3, 130)])
def test_route(name, T, K, E):
    index = ROUTINGS[name](T, K, E)
    for got, want in zip(routing.route(index, E), ops.route(index, E), strict=True):
        assert torch.equal(got, want)


def test_plan_gives_every_row_one_tile():
    counts = torch.tensor([3, 0, 16, 17, 1])
    plan = routing.Plan(counts, 40, 16)
    assert plan.offsets.tolist() == [0, 3, 3, 19, 36, 37]
    assert plan.by_size.tolist() == [3, 2, 0, 4, 1]
    tiles = plan.tiles.tolist()
    assert tiles[0] == 5 <= plan.max_tiles
    assert list(zip(tiles[1:11:2], tiles[2:11:2])) == [(0, 0), (2, 3), (3, 19), (3, 35), (4, 36)]


def case(name, transposed, T=14, K=2, E=4, H=24, I=20, dtype=torch.float32):
    def weight(k, n):
        w = torch.randn(E, n, k).transpose(1, 2) if transposed else torch.randn(E, k, n)
        return w / k**0.5

    index = ROUTINGS[name](T, K, E)
    x, weights = torch.randn(len(index), H), torch.rand(len(index), K)
    up, down = weight(H, 2 * I), weight(I, H)
    return index, [t.to(dtype).requires_grad_() for t in (x, weights, up, down)]


def run(module, index, inputs, act, g, route=ops.route):
    """gated_experts and its gradients by the functions of a module: kernels or references."""
    x, weights, up, down = (t.detach() for t in inputs)
    counts, perm, order = route(index, up.shape[0])
    out, pre = module.gated_experts(x, weights, counts, perm, order, up, down, act, x.dtype)
    grad_pre, h, grad_weights = module.gated_vjp(g, weights, counts, perm, order, down, pre, act)
    k = perm.shape[1]
    return (
        out, module.gated_vjp_x(grad_pre, counts, perm, up), grad_weights,
        module.tokens_outer(x, grad_pre, counts, order, k, not up.is_contiguous()),
        module.tokens_outer(g, h, counts, order, k, down.is_contiguous()).transpose(1, 2),
    )  # fmt: skip


@pytest.mark.parametrize(
    "name, transposed, sizes",
    [*((name, True, {}) for name in ROUTINGS), ("spread", False, {}), ("slots without", True, dict(H=17, I=9))],
    ids=str,
)
def test_gated_experts(name, transposed, sizes):
    index, inputs = case(name, transposed, **sizes)
    g = torch.randn_like(inputs[0])
    got = run(experts, index, inputs, "silu", g)
    want = run(gated, index, [t.detach().double() for t in inputs], "silu", g.double())
    for a, b in zip(got, want, strict=True):
        close(a, b)
    for a, b in zip(got[3:], inputs[2:], strict=True):
        assert a.stride() == b.stride() or not a.numel()


def test_only_rows_with_an_expert():
    index, inputs = case("slots without", True)
    g = torch.randn_like(inputs[0])
    got, same, want = (
        run(m, index, inputs, "silu", g, route)
        for m, route in ((experts, ops.route_some), (gated, ops.route_some), (gated, ops.route))
    )
    for a, b, c in zip(got, same, want, strict=True):
        close(a, c)
        close(b, c)


@pytest.mark.parametrize("act", gated.ACTIVATIONS)
def test_activations(act):
    index, inputs = case("spread", True, T=8)
    g = torch.randn_like(inputs[0])
    got, want = (run(m, index, inputs, act, g) for m in (experts, gated))
    for a, b in zip(got, want, strict=True):
        close(a, b)


@pytest.mark.parametrize(
    "options", [dict(n=64), dict(n=128), dict(n=256), dict(programs=1), dict(a_tma=False, b_tma=False)], ids=str
)
def test_configurations(options, monkeypatch):
    config = Config(**dict(m=16, n=16, k=16, group=2) | options)
    monkeypatch.setattr(experts, "choose", lambda *_: config)
    index, inputs = case("spread", True, T=12)
    g = torch.randn_like(inputs[0])
    got, want = (run(m, index, inputs, "silu", g) for m in (experts, gated))
    for a, b in zip(got, want, strict=True):
        close(a, b)


def test_grouped_products_and_sums():
    index, (x, weights, up, _) = case("slots without", False)
    rows, counts, perm, order = ops.permute(x.detach(), index, 4)
    n = int(counts.sum())
    y = experts.grouped_mm(rows, up.detach(), counts)
    close(y[:n], products.grouped_mm(rows[:n].double(), up.detach().double(), counts))
    y[n:] = 1
    close(
        experts.grouped_outer(rows[:n], y[:n], counts),
        products.grouped_outer(rows[:n].double(), y[:n].double(), counts),
    )
    close(experts.gather_sum(y, perm, order), tokens.gather_sum(y, perm, order))
    close(experts.unpermute(y, perm, order, weights.detach()), tokens.unpermute(y, perm, order, weights.detach()))
    some = torch.where(index < 0, -1, perm)
    close(experts.gather_sum(y, some, order), tokens.gather_sum_some(y, some, order))


def test_rows_gathered_first(monkeypatch):
    monkeypatch.setattr(experts, "GATHERED_WIDTH", 30)  # of the up weight's gradient, not of the down weight's
    monkeypatch.setattr(experts.ops, "grouped_outer", experts.grouped_outer, raising=False)
    index, inputs = case("spread", True, T=8)
    g = torch.randn_like(inputs[0])
    for a, b in zip(*(run(m, index, inputs, "silu", g) for m in (experts, gated)), strict=True):
        close(a, b)


def test_backward_by_gradcheck():
    index, inputs = case("slots without", True, T=5, H=3, I=2, dtype=torch.float64)
    counts, perm, order = ops.route(index, 4)
    f = lambda x, w, up, down: ops.gated_experts(x, w, counts, perm, order, up, down, "gelu", torch.float64)[0]
    assert torch.autograd.gradcheck(f, inputs)


def test_strides_that_the_memory_accelerator_takes():
    assert grouped._by_tma(torch.zeros(4, 16), True, 16)
    assert not grouped._by_tma(torch.zeros(4, 9), True, 16)
    assert not grouped._by_tma(torch.zeros(4, 16)[:, 1:], True, 16)


@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("columns", [5, 64, 130])
def test_losses(columns, scale, monkeypatch):
    monkeypatch.setattr(loss_kernels, "BLOCK", 64)
    logits, target = 30 * torch.randn(7, columns), torch.randint(columns, (7,))
    target[2] = -100
    wide = logits.double()
    want = ops.loss_rows(wide, target, scale)
    got = loss_kernels.loss_rows(logits, target, scale)
    for a, b in zip(got, want, strict=True):
        close(a, b, 1e-6)
    assert not got[1][2]
    given = torch.randn(2, 7)
    ops.loss_gradient_(wide, target, want[0], *given.double(), scale)
    loss_kernels.loss_gradient_(logits, target, got[0], *given, scale)
    close(logits, wide)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_deliver_gradients(dtype):
    sizes, chunk = [(7, 300), (1,), (256,), (0,), (513,)], 512
    found = [torch.randn(s).to(dtype) for s in sizes]
    found[0] = found[0].t().contiguous().t()  # not row-major
    found[4] = torch.randn(514).to(dtype)[1:]  # not on 16 bytes
    rows = [-(-t.numel() // 256) for t in found]
    sums = [-(-t.numel() // chunk) for t in found]
    places = [(sum(rows[:i]), sum(sums[:i])) for i in range(len(found))]
    flat, squares = (
        torch.zeros(sum(rows), 256, dtype=dtype),
        torch.zeros(sum(sums), dtype=torch.promote_types(dtype, torch.float32)),
    )
    want, tables = [torch.zeros_like(t) for t in found], {}
    for add in (False, True):
        gradients.deliver(found, places, flat, squares, add, chunk, tables)
        want = [w + t for w, t in zip(want, found, strict=True)]
        for w, (row, place), n in zip(want, places, sums, strict=True):
            assert torch.equal(flat[row:].flatten()[: w.numel()], w.flatten())
            close(squares[place : place + n].sum(), w.to(squares.dtype).square().sum(), 1e-5)
    some = [2, 4]  # the others stay
    gradients.deliver([found[i] for i in some], [places[i] for i in some], flat, squares, False, chunk, tables)
    for i, (row, _) in enumerate(places):
        now = found[i] if i in some else want[i]
        assert torch.equal(flat[row:].flatten()[: now.numel()], now.flatten())
