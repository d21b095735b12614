"""On a CUDA GPU: training with recorded graphs gives what training without gives, however results are held."""

from __future__ import annotations

import copy

import pytest
import torch

import tedcompile
from tedcompile import replay
from tests import models

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
STEPS = 12


@pytest.fixture
def replays(monkeypatch):
    calls, real = [], replay.Recorded._replay
    monkeypatch.setattr(replay, "BOUND", 0.0)
    monkeypatch.setattr(replay.Recorded, "_replay", lambda self, args: calls.append(self.visible) or real(self, args))
    return calls


def train(kind, plain, make_batch, mesh, off):
    """Losses of each step and the last parameters."""
    torch.manual_seed(0)
    model = tedcompile.parallelize(copy.deepcopy(plain).cuda(), mesh, off=off, example_inputs=make_batch(0, 0))
    if "tiled" in kind:
        optimizer = tedcompile.optim.Tiled(model.parameters(), tedcompile.optim.rules.sgd, lr=0.1)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses, held = [], []
    for step in range(STEPS):
        batches = [{k: v.cuda() for k, v in make_batch(0, step * 2 + i).items()} for i in range(2)]
        found = []
        if kind == "two forwards":
            found = [models.loss_of(model(**b)) for b in batches]
            sum(found).backward()
        else:
            for batch in batches[: 2 if "accumulate" in kind else 1]:
                found.append(models.loss_of(model(**batch)))
                if kind == "retain":
                    found[-1].backward(retain_graph=True)
                found[-1].backward()
        if kind == "gradients held":
            held.append([(p.grad, p.grad.full_tensor().clone()) for p in model.parameters() if p.grad is not None])
        losses += found
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.equal(g.full_tensor(), then) for step in held for g, then in step)
    return torch.stack([x.detach() for x in losses]), [p.full_tensor().detach() for p in model.parameters()]


@pytest.mark.parametrize(
    "kind",
    ["torch", "tiled", "torch accumulate", "tiled accumulate", "two forwards", "retain", "gradients held"],
)
@pytest.mark.parametrize("name", ["qwen3_moe", "nano_moe"])
def test_training(name, kind, mesh, replays):
    plain, make_batch = models.MODELS[name]()
    models.plain(plain)
    want, parameters = train(kind, plain, make_batch, mesh, ["cuda_graphs"])
    assert not replays
    got, found = train(kind, plain, make_batch, mesh, [])
    assert any(v for v in replays)  # forwards
    assert kind in ("torch accumulate", "gradients held", "two forwards") or not all(replays)  # backwards
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    for mine, other in zip(found, parameters, strict=True):
        assert (mine - other).norm() <= 1e-4 * other.norm() + 1e-6


def test_evaluation(mesh, replays):
    plain, make_batch = models.MODELS["qwen3_moe"]()
    models.plain(plain)
    model = tedcompile.parallelize(copy.deepcopy(plain).cuda(), mesh, example_inputs=make_batch(0, 0)).eval()
    kept = []
    with torch.no_grad():
        for step in range(8):
            batch = {k: v.cuda() for k, v in make_batch(0, step).items()}
            kept.append((model(**batch).logits, plain.eval()(**make_batch(0, step)).logits))
    assert replays
    for got, want in kept:
        torch.testing.assert_close(got.cpu(), want, rtol=1e-3, atol=1e-4)


def test_what_launching_does_not_bound_is_not_recorded(mesh, monkeypatch):
    calls, real = [], replay.Recorded._record
    monkeypatch.setattr(replay.Recorded, "_record", lambda self, args: calls.append(1) or real(self, args))
    weight = torch.randn(8192, 8192, device="cuda")

    def run(args):
        y = args[0] @ args[0]
        args.clear()
        return [y.sum(), y]

    recorded = replay.Recorded(run, moving=set(), visible=1)
    for _ in range(10):
        recorded([weight])
        torch.cuda.synchronize()
    assert not calls
