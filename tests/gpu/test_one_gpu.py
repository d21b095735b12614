"""On a CUDA GPU: kernels in bf16 against fp64, and whole models, compiled, against the plain ones in fp32."""

from __future__ import annotations

import copy

import pytest
import torch

import tedcompile
from tedcompile.ops import ops
from tests import models

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


def error(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 2e-2), (torch.float32, 1e-5)])
@pytest.mark.parametrize("sizes", [(96, 64, 48, 8, 2), (33, 40, 24, 5, 3)])
def test_experts_match_fp64(sizes, dtype, tolerance):
    T, H, I, E, K = sizes
    torch.manual_seed(0)
    x, up = torch.randn(T, H, dtype=torch.float64), torch.randn(E, H, I, dtype=torch.float64) / 8
    down, weights = torch.randn(E, I, H, dtype=torch.float64) / 8, torch.rand(T, K, dtype=torch.float64)
    index = torch.randint(E - 1, (T, K)).cuda()  # the last expert gets no token
    results = []
    for kind in (torch.float64, dtype):
        inputs = [t.to("cuda", kind).requires_grad_() for t in (x, up, down, weights)]
        rows, counts, perm, order = ops.permute(inputs[0], index, E)
        y = ops.grouped_mm(torch.nn.functional.silu(ops.grouped_mm(rows, inputs[1], counts)), inputs[2], counts)
        out = ops.unpermute(y, perm, order, inputs[3])
        results.append((out.detach(), *torch.autograd.grad(out.square().sum(), inputs)))
    for want, got in zip(*results, strict=True):
        assert error(got, want) < tolerance


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "nano_moe"])
def test_compiled_model_matches_plain(name, mesh):
    plain, make_batch = models.MODELS[name]()
    model = tedcompile.parallelize(copy.deepcopy(plain).cuda(), mesh, example_inputs=make_batch(0, 0))
    models.plain(plain)
    want = models.loss_of(plain(**make_batch(0, 0)))
    want.backward()
    loss = models.loss_of(model(**{k: v.cuda() for k, v in make_batch(0, 0).items()}))
    loss.backward()
    assert error(loss.cpu(), want) < 1e-5
    floor = 1e-6 * torch.stack([p.grad.norm() for p in plain.parameters() if p.grad is not None]).norm()
    for (n, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        if q.grad is not None and q.grad.norm() > floor:
            assert error(p.grad.full_tensor().cpu(), q.grad) < 1e-4, n
