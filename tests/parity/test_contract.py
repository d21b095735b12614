"""What `parallelize` promises beside parity: each function below runs on two or four real gloo processes."""

from __future__ import annotations

import copy
import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn

import tedcompile
from tedcompile import processes
from tedcompile.ops import losses
from tests import models


def mesh_of(**sizes):
    return dist.init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=tuple(sizes))


def close(a, b, tolerance=1e-5):
    return (a - b).norm() <= tolerance * b.norm()


def full(p):
    return p.full_tensor().detach()


class MLP(nn.Module):
    """Tied weights, a counter, a frozen weight, an unused one: what models in the wild have."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(32, 16)
        self.up, self.down = nn.Linear(16, 64), nn.Linear(64, 16)
        self.head = nn.Linear(16, 32, bias=False)
        self.head.weight = self.embed.weight
        self.up.bias.requires_grad_(False)
        self.spare = nn.Parameter(torch.ones(3))
        self.register_buffer("seen", torch.zeros(32))

    def forward(self, ids, scale=1.0, labels=None):
        if self.training:
            self.seen.add_(F.one_hot(ids, 32).sum((0, 1)).float())
        x = self.embed(ids)
        x = x + self.down(F.gelu(self.up(x))) * scale
        logits = self.head(x)
        if labels is None:
            return {"logits": logits}
        return {"loss": F.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


def batch(rank, seq=8):
    ids = torch.randint(32, (2, seq), generator=torch.Generator().manual_seed(rank))
    return dict(ids=ids, labels=ids)


def make():
    torch.manual_seed(0)
    return MLP()


class Loss(nn.Module):
    """A model whose forward returns a scalar."""

    def __init__(self):
        super().__init__()
        self.inner = make()

    def forward(self, ids, labels, scale=1.0):
        return self.inner(ids, scale, labels)["loss"]


def everyday_use():
    """Tied and frozen parameters, a counter, evaluation, outputs, accumulation, clipping, numbers that change."""
    mesh = mesh_of(dp=2, tp=2)
    rank = tedcompile.data_rank(mesh)
    assert tedcompile.data_world(mesh) == 2
    plain, model = Loss(), Loss()
    names = [n for n, _ in model.named_parameters()]
    keys = list(model.state_dict())
    assert tedcompile.parallelize(model, mesh, example_inputs=batch(0), backend="eager") is model
    assert [n for n, _ in model.named_parameters()] == names and list(model.state_dict()) == keys
    assert model.inner.head.weight is model.inner.embed.weight
    assert not model.inner.up.bias.requires_grad
    assert model.inner.up.weight.to_local().shape == (32, 16)

    for scale in (1.0, 0.5):  # accumulates over two calls; another number is no other signature
        (sum(plain(**batch(r), scale=scale) for r in range(2)) / 2).backward()
        model(**batch(rank), scale=scale).backward()
    assert len(model._ted.programs) == 1
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if q.grad is not None:
            assert close(p.grad.full_tensor(), q.grad), name
    assert torch.equal(model.inner.seen, plain.inner.seen)

    norms = [nn.utils.clip_grad_norm_(m.parameters(), 0.1) for m in (model, plain)]
    assert close(norms[0].full_tensor(), norms[1])
    for m in (model, plain):
        torch.optim.AdamW(m.parameters(), lr=1e-2).step()
        m.zero_grad()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert close(full(p), q.detach(), 1e-4)

    state = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        model.inner.down.weight.zero_()
    model.load_state_dict(state)
    assert close(full(model.inner.down.weight), plain.inner.down.weight.detach(), 1e-4)
    plain.eval(), model.eval()
    with torch.no_grad():
        assert close(model(**batch(rank)), plain(**batch(rank)))


def outputs():
    """In training the loss alone comes back, with `outputs` the logits too; evaluation returns everything."""
    mesh = mesh_of(tp=2)
    plain, model = make(), tedcompile.parallelize(make(), mesh, example_inputs=batch(0), backend="eager")
    assert model(**batch(0))["logits"] is None
    model.eval(), plain.eval()
    assert close(model(**batch(0))["logits"], plain(**batch(0))["logits"])
    assert close(model(ids=batch(1)["ids"])["logits"], plain(ids=batch(1)["ids"])["logits"])
    named = tedcompile.parallelize(make(), mesh, example_inputs=batch(0), backend="eager", outputs=["logits"])
    plain.train()
    assert close(named(**batch(0))["logits"], plain(**batch(0))["logits"])
    with pytest.raises(ValueError, match="no 'logit'; it has loss, logits"):
        tedcompile.parallelize(make(), mesh, example_inputs=batch(0), outputs=["logit"])


def disagreement():
    """Ranks that bring other shapes, other tensor-parallel batches, or fail alone: an error on all, and no hang."""
    rank = dist.get_rank()
    mesh = mesh_of(tp=2)
    model = tedcompile.parallelize(make(), mesh, example_inputs=batch(0), backend="eager")
    with pytest.raises(ValueError, match="bring different batches"):
        model(**batch(rank))
    with pytest.raises(ValueError, match="disagree on their inputs"):
        model(**batch(0, seq=8 + rank))
    with pytest.raises(ValueError, match="disagree on their inputs.*a call that fails.*label"):
        model(ids=batch(0)["ids"], **{"label" if rank else "labels": batch(0)["labels"]})
    model(**batch(0))["loss"].backward()

    class Moody(MLP):
        def forward(self, ids, labels):
            if rank == 1:
                raise RuntimeError("not today")
            return super().forward(ids, 1.0, labels)

    with pytest.raises(ValueError, match="not today"):
        tedcompile.parallelize(Moody(), mesh, example_inputs=batch(0), backend="eager")

    class Wider(MLP):
        def forward(self, ids, labels):
            return super().forward(ids, 1.0 + rank, labels)

    other = tedcompile.parallelize(Wider(), mesh, example_inputs=batch(0), backend="eager")
    with pytest.raises(ValueError, match="disagree on their graphs"):
        other(**batch(0))


def bad_input():
    """One sentence that says what is wrong and what to do, before anything is communicated."""
    mesh = mesh_of(tp=2)

    class Silent(MLP):
        def forward(self, ids):
            return super().forward(ids)

    class Branchy(MLP):
        def forward(self, ids, labels):
            return super().forward(ids, 1.0, labels)["loss"] if ids.sum() > 3 else self.spare.sum()

    class Setter(MLP):
        def forward(self, ids, labels):
            self.seen.copy_(F.one_hot(ids, 32).sum((0, 1)).float())
            return super().forward(ids, 1.0, labels)

    def go(model, mesh=mesh, **kwargs):
        return lambda: tedcompile.parallelize(model, mesh, example_inputs=kwargs or batch(0))

    ids_only = dict(ids=batch(0)["ids"])
    cases = [
        (TypeError, "example_inputs=dict", lambda: tedcompile.parallelize(make(), mesh)),
        (TypeError, "must be an nn.Module", lambda: tedcompile.parallelize(make, mesh)),
        (ValueError, "unknown backend 'inducter'", lambda: tedcompile.parallelize(make(), mesh, backend="inducter")),
        (ValueError, "returns no loss", go(Silent(), **ids_only)),
        (ValueError, "test_contract.py.*ids.sum.*torch.where", go(Branchy())),
        (ValueError, "buffer seen", go(Setter(), mesh_of(dp=2))),
        (ValueError, "unknown mesh axis 'pp'", lambda: tedcompile.parallelize(make(), mesh_of(pp=2))),
        (ValueError, "ep=2 cannot work", go(make(), mesh_of(ep=2))),
        (ValueError, "3 experts do not divide over ep=2; ep = 3 would", lambda: tedcompile.parallelize(
            models.MODELS["qwen3_moe"](experts=3)[0], mesh_of(ep=2))),
    ]  # fmt: skip
    for kind, message, call in cases:
        with pytest.raises(kind, match=message):
            call()
    hooked = make()
    hooked.down.weight.register_hook(lambda g: g * 10)
    with pytest.raises(ValueError, match="down.weight"):
        tedcompile.parallelize(hooked, mesh, example_inputs=batch(0))
    model = tedcompile.parallelize(make(), mesh, example_inputs=batch(0), backend="eager")
    with pytest.raises(TypeError, match="missing a required argument|label"):
        model(ids=batch(0)["ids"], label=batch(0)["labels"])
    with pytest.raises(ValueError, match="parallel already"):
        tedcompile.parallelize(model, mesh, example_inputs=batch(0))


class Noisy(nn.Module):
    """Dropout on replicated and on split values, inside attention, and random numbers of the model's own."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.qkv = nn.Linear(32, 2048), nn.Linear(2048, 32), nn.Linear(32, 96)

    def forward(self, x):
        h = F.dropout(self.a(x) * 0 + 1, 0.25, self.training)
        y = F.dropout(self.b(h) * 0 + 1, 0.25, self.training)
        q, k, v = (t.view(*y.shape[:2], 4, 8).transpose(1, 2) for t in self.qkv(y).chunk(3, -1))
        z = F.scaled_dot_product_attention(q, k, v, dropout_p=0.5 if self.training else 0.0, is_causal=True)
        return {"loss": z.mean() + h.mean() + y.mean(), "h": h, "y": y, "u": torch.rand_like(y)}


def random_numbers():
    """Split values draw different numbers on tp ranks, replicated ones the same; the seed decides all of them."""
    mesh = mesh_of(dp=2, tp=2)
    x = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    model = tedcompile.parallelize(Noisy(), mesh, example_inputs=dict(x=x), backend="eager", outputs=["h", "y", "u"])
    torch.manual_seed(7)
    first, second = model(x), model(x)
    torch.manual_seed(7)
    again = model(x)
    assert torch.equal(first["h"], again["h"]) and not torch.equal(first["h"], second["h"])
    h = first["h"]
    assert not torch.equal(h[..., :1024], h[..., 1024:]), "tp ranks drew the same numbers for their parts"
    assert h.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert abs((h == 0).float().mean() - 0.25) < 0.02 and abs(first["u"].mean() - 0.5) < 0.05
    everyone = [torch.empty_like(first["y"]) for _ in range(4)]
    dist.all_gather(everyone, first["y"].detach())
    assert torch.equal(everyone[0], everyone[1]) and not torch.equal(everyone[0], everyone[2])
    first["loss"].backward()
    grads = [torch.empty_like(model.b.bias.grad.to_local()) for _ in range(4)]
    dist.all_gather(grads, model.b.bias.grad.to_local())
    assert all(torch.equal(g, grads[0]) for g in grads)
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(x)["h"], torch.ones(2, 16, 2048))


def autocast():
    """`torch.autocast` around fp32 parameters: as near to the plain model as bf16 is."""
    mesh = mesh_of(ep=2, tp=2)
    plain, make_batch = models.MODELS["qwen3_moe"]()
    model = copy.deepcopy(plain)
    plain.set_experts_implementation("batched_mm")
    tedcompile.parallelize(model, mesh, backend="eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        want = sum(plain(**make_batch(r, 0)).loss for r in range(2)) / 2
        loss = model(**make_batch(tedcompile.data_rank(mesh), 0)).loss
    want.backward()
    loss.backward()
    mean = loss.detach() / 4
    dist.all_reduce(mean)
    assert close(mean, want.detach(), 1e-2)
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert p.grad.dtype == torch.float32
        if q.grad.norm() > 1e-3 and "gate.weight" not in name:
            assert close(p.grad.full_tensor(), q.grad, 0.2), name


def strides_and_retained_graphs():
    """Compiled code reads dense inputs, and may write over what a backward has read: neither shows."""
    plain, model = make(), tedcompile.parallelize(make(), mesh_of(dp=1), example_inputs=batch(0))
    apart = {k: torch.stack([v, v], -1)[..., 0] for k, v in batch(0).items()}
    assert not any(v.is_contiguous() for v in apart.values())
    for m in (model, plain):
        loss = m(**apart)["loss"]
        loss.backward(retain_graph=True)
        loss.backward()
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert q.grad is None or close(p.grad.full_tensor(), q.grad), name


def split_vocabulary():
    """The loss of a split vocabulary, chunk by chunk: compiled, with ignored labels."""
    calls, chunks = [], losses._chunks
    losses.CHUNK, losses._chunks = 500, lambda x, weight: calls.append(len(x)) or chunks(x, weight)
    mesh = mesh_of(tp=2)
    plain, model = make(), make()
    tedcompile.parallelize(model, mesh, example_inputs=batch(0))
    given = batch(0)
    given["labels"] = torch.where(given["ids"] < 8, -100, given["labels"])
    losses_found = [m(**given)["loss"] for m in (model, plain)]
    assert close(*losses_found)
    for loss in losses_found:
        loss.backward()
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert q.grad is None or close(p.grad.full_tensor(), q.grad), name
    assert calls == [16, 16]  # a forward and its backward


def pairs(model, plain):
    return zip(model.parameters(), plain.parameters(), strict=True)


def second_thoughts():
    """Weights frozen and freed between steps, a gradient of the inputs, the model's own hooks, and a copy of it."""
    mesh = mesh_of(dp=2, tp=2)
    rank = tedcompile.data_rank(mesh)
    plain, model = Loss(), Loss()
    for m in (plain, model):
        m.register_forward_pre_hook(lambda m, args, kwargs: (args, {**kwargs, "scale": 0.5}), with_kwargs=True)
        m.register_forward_hook(lambda m, args, loss: 2 * loss)
        m.inner.up.register_forward_hook(lambda m, args, y: 3 * y)
        m.inner.down.requires_grad_(False)
    tedcompile.parallelize(model, mesh, example_inputs=batch(0), backend="eager")
    for learns in (lambda n: "down" not in n, lambda n: True, lambda n: "embed" in n):
        for m in (plain, model):
            m.zero_grad()
            for n, p in m.named_parameters():
                p.requires_grad_(learns(n))
        (sum(plain(**batch(r)) for r in range(2)) / 2).backward()
        model(**batch(rank)).backward()
        for p, q in pairs(model, plain):
            assert (p.grad is None) == (q.grad is None)
            assert q.grad is None or close(p.grad.full_tensor(), q.grad)

    before = model(**batch(rank)).item()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    assert model(**batch(rank)).item() == before
    assert twin(**batch(rank)).item() == pytest.approx(2 * torch.tensor(32.0).log().item())
    twin(**batch(rank)).backward()
    assert all(p.grad is None or p.grad is not q.grad for p, q in pairs(twin, model))

    class Square(nn.Module):
        def __init__(self):
            super().__init__()
            self.mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))

        def forward(self, x):
            return self.mlp(x).square().mean()

    plain = Square()
    model = tedcompile.parallelize(copy.deepcopy(plain), mesh, example_inputs=(torch.zeros(4, 16),), backend="eager")
    with torch.no_grad():
        for p, q in pairs(model, plain):
            q.copy_(full(p))  # rank 0's weights
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(rank))
    xs = [x.clone().requires_grad_() for _ in range(2)]
    plain(xs[0]).backward(), model(xs[1]).backward()
    assert close(xs[1].grad, xs[0].grad)


CASES = {second_thoughts: 4, everyday_use: 4, outputs: 2, disagreement: 2, bad_input: 2, random_numbers: 4, autocast: 4}
CASES |= {strides_and_retained_graphs: 1, split_vocabulary: 2}


def run(rank, world, port, function):
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo")
    function()
    dist.destroy_process_group()


@pytest.mark.parametrize("function", CASES, ids=lambda f: f.__name__)
def test_contract(function):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    world = CASES[function]
    mp.start_processes(run, args=(world, port, function), nprocs=world, start_method=processes.start_method())
