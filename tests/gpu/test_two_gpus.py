"""Parity on two GPUs and NCCL, a process each: the plain model on the CPU against the parallel one, fp32."""

from __future__ import annotations

import pytest
import torch

from tests.parity.harness import Case, Pool

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")]


@pytest.fixture(scope="module")
def pool():
    with Pool(2) as pool:
        yield pool


@pytest.mark.parametrize("mesh", [(1, 1, 2), (1, 2, 1), (2, 1, 1)], ids=["tp", "ep", "dp"])
@pytest.mark.parametrize("model", ["qwen3_moe", "deepseek_v3"])
def test_parity(pool, model, mesh):
    (result,) = pool.run([Case(model, mesh, backend="eager", device="cuda")])
    assert result["ok"], result["message"]


def test_parity_in_chunks(pool):
    (result,) = pool.run([Case("qwen3_moe", (1, 2, 1), backend="eager", options="chunks_no_drop", device="cuda")])
    assert result["ok"], result["message"]


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [(1, 1, 2), (1, 2, 1)], ids=["tp", "ep"])
def test_parity_compiled(pool, mesh):
    (result,) = pool.run([Case("qwen3_moe", mesh, backend="inductor", device="cuda")])
    assert result["ok"], result["message"]
