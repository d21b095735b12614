"""On a CUDA GPU: head and cross-entropy, chunk by chunk, against fp64; and that the logits never exist at once."""

from __future__ import annotations

import pytest
import torch

from tedcompile.ops import losses, ops

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("shape", [(300, 128, 1000), (77, 50, 33), (1, 8, 50257)], ids=str)
@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 1e-2), (torch.float16, 2e-3), (torch.float32, 1e-5)])
def test_against_fp64(dtype, tolerance, shape, bias, monkeypatch):
    rows, hidden, columns = shape
    monkeypatch.setattr(losses, "CHUNK", 40 * columns * dtype.itemsize)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.manual_seed(0)
    x, weight = torch.randn(rows, hidden), torch.randn(columns, hidden) / hidden**0.5
    target = torch.randint(columns, (rows,)).cuda()
    target[1:5] = -100
    leaves = [t.cuda().to(dtype).requires_grad_() for t in ([x, weight, torch.randn(columns)] if bias else [x, weight])]
    wide = [t.detach().double().requires_grad_() for t in leaves]
    found = ops.linear_loss(*leaves, *([] if bias else [None]), target, -100, 0.5, True)[0]
    logits = torch.nn.functional.linear(*wide) * 0.5
    expected = torch.nn.functional.cross_entropy(logits, target, reduction="sum")
    pairs = zip(torch.autograd.grad(3 * found, leaves), torch.autograd.grad(3 * expected, wide), strict=True)
    for got, want in [*pairs, (found, expected)]:
        assert (got.double() - want).norm() <= tolerance * want.norm() + 1e-30


def test_memory():
    rows, hidden, columns = 16384, 256, 151936
    x = torch.randn(rows, hidden, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(columns, hidden, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    target = torch.randint(columns, (rows,), device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss, *_ = ops.linear_loss(x, weight, None, target, -100, 1.0, True)
    extra = torch.cuda.max_memory_allocated() - before
    assert extra < losses.CHUNK * 1.1 + 4 * columns * hidden + 4 * rows * hidden, extra / 2**30
    again = ops.linear_loss(x, weight, None, target, -100, 1.0, True)
    assert torch.equal(loss, again[0])
