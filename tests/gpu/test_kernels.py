"""On a CUDA GPU: gated experts in bf16 and fp16 against fp64, for sizes and routings that kernels find hard."""

from __future__ import annotations

import pytest
import torch

from tedcompile.ops import gated, ops, tokens

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

ROUTINGS = {
    "spread": lambda T, K, E: torch.rand(T, E).topk(K).indices,
    "an empty expert": lambda T, K, E: torch.randint(1, E, (T, K)),
    "one expert": lambda T, K, E: torch.full((T, K), E - 1),
    "slots without": lambda T, K, E: torch.randint(-1, E, (T, K)),
    "no tokens": lambda T, K, E: torch.zeros(0, K, dtype=torch.int64),
}
SIZES = {  # T, H, I, E, K
    "plain": (512, 256, 384, 8, 2),
    "many experts": (300, 128, 64, 200, 8),
    "odd": (77, 100, 52, 5, 3),
    "no accelerator": (130, 99, 37, 4, 2),
    "few rows": (5, 256, 128, 64, 4),
    "gathered first": (300, 256, 2048, 4, 2),
}


def case(name, routing, transposed, dtype):
    T, H, I, E, K = SIZES[name]
    torch.manual_seed(0)
    index = ROUTINGS[routing](T, K, E).cuda()
    weight = lambda k, n: torch.randn(E, n, k).transpose(1, 2) if transposed else torch.randn(E, k, n)
    inputs = [torch.randn(len(index), H), torch.rand(len(index), K), weight(H, 2 * I) / H**0.5, weight(I, H) / I**0.5]
    return index, E, [t.cuda().to(dtype).requires_grad_() for t in inputs]


def run(index, E, inputs, act="silu", route=ops.route):
    x, weights, up, down = inputs
    counts, perm, order = route(index, E)
    out = ops.gated_experts(x, weights, counts, perm, order, up, down, act, x.dtype)[0]
    g = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return out.detach(), *torch.autograd.grad(out, inputs, g)


TOLERANCES = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}
CASES = [
    *((name, routing, True, torch.bfloat16) for name in SIZES for routing in ROUTINGS),
    *((name, "slots without", False, dtype) for name in SIZES for dtype in TOLERANCES),
]


@pytest.mark.parametrize("name, routing, transposed, dtype", CASES, ids=str)
def test_gated_experts(name, routing, transposed, dtype):
    index, E, inputs = case(name, routing, transposed, dtype)
    got = run(index, E, inputs)
    want = run(index, E, [t.detach().double().requires_grad_() for t in inputs])
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape and a.dtype == dtype
        assert (a.double() - b).norm() <= TOLERANCES[dtype] * b.norm() + 1e-30
    for a, b in zip(got[1:], inputs, strict=True):
        assert a.stride() == b.stride() or not a.numel()
    for a, b in zip(got, run(index, E, inputs), strict=True):
        assert torch.equal(a, b)


def test_only_rows_with_an_expert():
    index, E, inputs = case("plain", "slots without", True, torch.bfloat16)
    for a, b in zip(run(index, E, inputs), run(index, E, inputs, route=ops.route_some), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("act", gated.ACTIVATIONS)
def test_activations(act):
    index, E, inputs = case("plain", "spread", True, torch.bfloat16)
    got = run(index, E, inputs, act)
    want = run(index, E, [t.detach().double().requires_grad_() for t in inputs], act)
    for a, b in zip(got, want, strict=True):
        assert (a.double() - b).norm() <= 1e-2 * b.norm()


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("T, K, E", [(5000, 8, 128), (333, 3, 5), (64, 1, 500)])
def test_route(routing, T, K, E):
    index = ROUTINGS[routing](T, K, E)
    for a, b in zip(ops.route(index.cuda(), E), tokens.route(index, E), strict=True):
        assert torch.equal(a.cpu(), b)


def test_nothing_waits_for_the_device():
    index, E, inputs = case("plain", "spread", True, torch.bfloat16)
    run(index, E, inputs)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        x, weights, up, down = inputs
        counts, perm, order = ops.route(index, E)
        out = ops.gated_experts(x, weights, counts, perm, order, up, down, "silu", x.dtype)[0]
        torch.autograd.grad(out, inputs, torch.ones_like(out))
    finally:
        torch.cuda.set_sync_debug_mode("default")
