"""Gradients go to an optimizer's flat memory by themselves; what a user may do about them does what it did."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
import torch.distributed as dist

import tedcompile
from tedcompile.optim import Tiled, rules
from tests import models


@pytest.fixture(scope="module")
def mesh(tmp_path_factory):
    store = dist.FileStore(str(tmp_path_factory.mktemp("store") / "store"), 1)
    dist.init_process_group("gloo", rank=0, world_size=1, store=store)
    yield dist.init_device_mesh("cpu", (1, 1, 1), mesh_dim_names=("dp", "ep", "tp"))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def made(mesh):
    """A parallel model, the plain one, and batches."""
    plain, batch = models.MODELS["nano_moe"]()
    models.plain(plain)
    model = tedcompile.parallelize(copy.deepcopy(plain), mesh, backend="eager", example_inputs=batch(0, 0))
    model(**batch(0, 0))
    return model, plain, batch


@pytest.fixture(params=["foreach", "kernel"])
def pair(made, request):
    """Copies of both, an optimizer of the first, and how often gradients came home."""
    model, plain, batch = copy.deepcopy(made[0]), copy.deepcopy(made[1]), made[2]
    optimizer = Tiled(model.parameters(), rules.sgd, lr=0.1)
    for kept in optimizer.kept if request.param == "kernel" else ():  # as on a GPU, in Triton's interpreter
        pytest.importorskip("tedcompile.kernels.gradients")
        kept.bucket.fused = True
        kept.bucket._squares = torch.zeros(10000)
        kept.bucket.zero()
    arrivals: list[int] = []
    for kept in optimizer.kept:
        real = kept.bucket.deliver
        kept.bucket.deliver = lambda arrived, real=real: arrivals.append(len(arrived)) or real(arrived)
    return model, plain, batch, optimizer, arrivals


def backward(model, batch, **options):
    models.loss_of(model(**batch)).backward(**options)


def same(model, plain, tolerance=1e-5):
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        want = torch.zeros_like(q) if q.grad is None else q.grad
        assert (p.grad.full_tensor() - want).norm() <= tolerance * want.norm() + 1e-8, name


def test_one_and_several_backwards(pair):
    model, plain, batch, optimizer, arrivals = pair
    for step in range(3):
        backward(model, batch(0, step))
        backward(plain, batch(0, step))
        same(model, plain)
    assert len(arrivals) == 3 and all(arrivals)
    assert all(p.grad is slot.grad for p, (_, slot) in zip(model.parameters(), optimizer._slots()))


@pytest.mark.parametrize("none", [False, True], ids=["zeros", "none"])
def test_zeros_and_none(pair, none):
    model, plain, batch, optimizer, arrivals = pair
    backward(model, batch(0, 0))
    memory = [p.grad.to_local().data_ptr() for p in model.parameters()]
    optimizer.zero_grad(set_to_none=none)
    assert all(p.grad is None if none else not p.grad.to_local().any() for p in model.parameters())
    backward(model, batch(0, 1))
    backward(plain, batch(0, 1))
    same(model, plain)
    model.zero_grad()  # to None: the old values are in flat memory still
    plain.zero_grad()
    for step in (2, 3):
        backward(model, batch(0, step))
        backward(plain, batch(0, step))
    same(model, plain)
    assert len(arrivals) == 4 and memory == [p.grad.to_local().data_ptr() for p in model.parameters()]


KEPT = {
    "itself": lambda p: p.grad,
    "detached": lambda p: p.grad.detach(),
    "local": lambda p: p.grad.to_local(),
    "view": lambda p: p.grad.to_local().view(-1)[:1],
}


@pytest.mark.parametrize("how", KEPT)
def test_a_gradient_that_a_user_keeps_stays(pair, how):
    model, plain, batch, optimizer, _ = pair
    backward(model, batch(0, 0))
    for none in (lambda: model.zero_grad(), lambda: optimizer.zero_grad(set_to_none=True)):
        kept = [KEPT[how](p) for p in model.parameters() if p.grad is not None]
        then = [k.clone() for k in kept]
        none()
        backward(model, batch(0, 1))
        for k, t in zip(kept, then, strict=True):
            assert torch.equal(k.full_tensor() if hasattr(k, "full_tensor") else k,
                               t.full_tensor() if hasattr(t, "full_tensor") else t)  # fmt: skip
        del kept, k
    plain.zero_grad()
    backward(plain, batch(0, 1))
    same(model, plain)


WRITES = {
    "method": lambda gs: [g.mul_(0.5) for g in gs],
    "foreach": lambda gs: torch._foreach_mul_(gs, 0.5),
    "data": lambda gs: [g.data.mul_(0.5) for g in gs],
    "local": lambda gs: [g.to_local().mul_(0.5) for g in gs],
    "numpy": lambda gs: [g.to_local().numpy().__imul__(0.5) for g in gs],
    "clip": None,
}


@pytest.mark.parametrize("how", WRITES)
def test_the_norm_is_of_what_a_step_reads(pair, how):
    model, _, batch, optimizer, _ = pair
    backward(model, batch(0, 0))
    found = [p.grad for p in model.parameters()]
    if how == "clip":
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    else:
        WRITES[how](found)
    want = torch.stack([g.full_tensor().norm() for g in found]).norm()
    optimizer.step()
    assert optimizer.grad_norm.item() == pytest.approx(want.item(), rel=1e-5)
    optimizer.zero_grad()
    torch._foreach_add_(found, 1.0)  # written before the backward: it adds to that
    backward(model, batch(0, 1))
    total = [g.full_tensor().sum().item() - g.numel() for g in found]
    model.zero_grad()
    backward(model, batch(0, 1))
    for p, t in zip(model.parameters(), total, strict=True):
        assert p.grad.full_tensor().sum().item() == pytest.approx(t, abs=1e-2)


def test_the_norm_of_the_backward(pair):
    model, _, batch, optimizer, _ = pair
    optimizer.norm = "backward"
    for step in range(4):
        for i in range(1 + step % 2):
            backward(model, batch(0, step + i))
        if step == 3:
            next(model.parameters()).grad.mul_(3)  # nobody should, but this one is seen
        want = torch.stack([p.grad.full_tensor().norm() for p in model.parameters()]).norm()
        optimizer.step()
        assert optimizer.grad_norm.item() == pytest.approx(want.item(), rel=1e-5)
        optimizer.zero_grad(set_to_none=step % 2 == 0)


def test_moves_and_pickles(pair, tmp_path):
    model, plain, batch, _, _ = pair
    for move in (lambda m: m.to("cpu"), lambda m: m.float(), lambda m: m.double().float()):
        for m in (model, plain):
            move(m)
            m.zero_grad()
            backward(m, batch(0, 0))
        same(model, plain)
    torch.save(dict(model.named_parameters()), tmp_path / "parameters")


def test_frozen_before_the_backward(pair):
    model, plain, batch, _, _ = pair
    for m in (model, plain):
        loss = models.loss_of(m(**batch(0, 0)))
        next(m.parameters()).requires_grad_(False)
        loss.backward()
    same(model, plain)


def test_backwards_in_threads(pair):
    model, plain, batch, _, _ = pair
    for m in (model, plain):
        losses = [models.loss_of(m(**batch(0, i))) for i in range(4)]
        threads = [threading.Thread(target=loss.backward) for loss in losses]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    same(model, plain)


def test_gradients_that_a_user_changes(pair):
    model, plain, batch, _, _ = pair
    for m in (model, plain):
        backward(m, batch(0, 0))
        for p in m.parameters():
            p.grad.mul_(0.5)
        backward(m, batch(0, 1))
    same(model, plain)


def test_hooks(pair):
    model, plain, batch, _, arrivals = pair
    seen = []
    for m in (model, plain):
        first, second, *_ = m.parameters()
        first.register_hook(lambda g: g * 3)
        second.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.norm().item()))
        for step in range(2):
            backward(m, batch(0, step))
    same(model, plain)
    assert len(seen) == 4 and seen[:2] == pytest.approx(seen[2:], rel=1e-4)
    assert set(arrivals) == {len(list(model.parameters())) - 2}


def test_autograd_grad_leaves_grad_alone(pair):
    model, plain, batch, _, arrivals = pair
    found = torch.autograd.grad(models.loss_of(model(**batch(0, 0))), list(model.parameters()), allow_unused=True)
    wanted = torch.autograd.grad(models.loss_of(plain(**batch(0, 0))), list(plain.parameters()), allow_unused=True)
    assert not arrivals and not any(p.grad.to_local().any() for p in model.parameters())
    for got, want in zip(found, wanted, strict=True):
        assert (got is None) == (want is None)
        if want is not None:
            assert (got.full_tensor() - want).norm() <= 1e-5 * want.norm() + 1e-8


def test_backward_to_some(pair):
    model, plain, batch, _, _ = pair
    for m in (model, plain):
        backward(m, batch(0, 0), inputs=list(m.parameters())[:2])
    same(model, plain)


def test_two_forwards_and_a_retained_graph(pair):
    model, plain, batch, _, _ = pair
    for m in (model, plain):
        a, b = (models.loss_of(m(**batch(0, i))) for i in range(2))
        (a + b).backward(retain_graph=True)
        a.backward()
    same(model, plain)


def test_a_copy_of_the_model_keeps_its_own(pair):
    model, plain, batch, optimizer, arrivals = pair
    other = copy.deepcopy(model)
    backward(other, batch(0, 0))
    assert not arrivals and not any(p.grad.to_local().any() for p in model.parameters())
    backward(plain, batch(0, 0))
    same(other, plain)


def test_without_the_optimizer(pair):
    model, plain, batch, optimizer, arrivals = pair
    model.zero_grad()
    del optimizer
    pair_ = (model, plain)
    for m in pair_:
        backward(m, batch(0, 0))
    same(*pair_)


def test_frozen(pair):
    model, plain, batch, _, _ = pair
    for m in (model, plain):
        next(m.parameters()).requires_grad_(False)
        backward(m, batch(0, 0))
    same(model, plain)
