"""Head and cross-entropy become one op with the same loss and gradients, chunk by chunk; what does not fit stays."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tedcompile.mesh import MeshShape
from tedcompile.ops import losses, ops
from tedcompile.passes import fuse_loss
from tests import lockstep

B, S, H, V = 2, 7, 6, 12


def shifted_labels(m, h, labels):
    target = F.pad(labels, (0, 1), value=-100)[:, 1:].contiguous()
    return F.cross_entropy(m.head(h).view(-1, V), target.view(-1), reduction="mean")


def shifted_logits(m, h, labels):
    logits = m.head(h) / 8.0
    return F.cross_entropy(logits[:, :-1].contiguous().view(-1, V), labels[:, 1:].reshape(-1), reduction="sum") / 5


def upcast(m, h, labels):
    return F.cross_entropy(m.head(h).float().view(-1, V), labels.flatten())


def flat(m, h, labels):
    return F.cross_entropy(m.head(h.reshape(-1, H)) * 0.5, labels.flatten(), ignore_index=3)


def tied(m, h, labels):
    return F.cross_entropy(F.linear(h, m.embedding.weight).flatten(0, 1), labels.flatten())


def read_twice(m, h, labels):
    logits = m.head(h).view(-1, V)
    return F.cross_entropy(logits, labels.flatten()) + 1e-4 * logits.logsumexp(-1).square().mean()


def smoothed(m, h, labels):
    return F.cross_entropy(m.head(h).view(-1, V), labels.flatten(), label_smoothing=0.1)


def by_token(m, h, labels):
    return F.cross_entropy(m.head(h).view(-1, V), labels.flatten(), reduction="none").square().mean()


def capped(m, h, labels):
    return F.cross_entropy(torch.tanh(m.head(h).view(-1, V)), labels.flatten())


def other_rows(m, h, labels):
    return F.cross_entropy(m.head(h).transpose(1, 2).reshape(-1, V), labels.flatten())


class Model(nn.Module):
    def __init__(self, loss, bias, dtype):
        super().__init__()
        torch.manual_seed(0)
        self.loss = loss
        self.embedding = nn.Embedding(V, H, dtype=dtype)
        self.head = nn.Linear(H, V, bias=bias, dtype=dtype)

    def forward(self, ids, labels):
        return self.loss(self, self.embedding(ids).tanh(), labels)


def run(loss, bias=False, dtype=torch.float64):
    """The targets of the graph, and the largest relative difference of loss and gradients from the plain module."""
    model = Model(loss, bias, dtype)
    inputs = {"ids": torch.randint(V, (B, S)), "labels": torch.randint(V, (B, S))}
    inputs["labels"][0, 2:4] = -100 if loss is not flat else 3
    gm, ctx = lockstep.distributed(model, inputs, MeshShape())
    fuse_loss.run(gm, ctx)
    gm.graph.lint()
    known = {"parameter": dict(model.named_parameters()), "input": list(inputs.values())}
    roles = [n.meta["role"] for n in gm.graph.find_nodes(op="placeholder")]
    expected, found = model(**inputs), torch.fx.Interpreter(gm).run(*(known[kind][key] for kind, key in roles))[0]
    used = [known[kind][key] for kind, key in roles if kind == "parameter"]
    gradients = (torch.autograd.grad(y * 1.7, used, allow_unused=True) for y in (found, expected))
    pairs = [(a, b) for a, b in zip(*gradients, strict=True) if a is not b]  # both None: not used
    worst = max((a - b).norm() / b.norm() for a, b in [*pairs, (found, expected)])
    return lockstep.targets(gm), float(worst)


@pytest.mark.parametrize("chunk", [1 << 30, 4 * V * 8], ids=["whole", "chunks of 4"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("loss", [shifted_labels, shifted_logits, flat, tied], ids=lambda f: f.__name__)
def test_same_loss_and_gradients(loss, bias, chunk, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK", chunk)
    targets, worst = run(loss, bias)
    assert targets.count("ted::linear_loss") == 1 and "aten::cross_entropy_loss" not in targets
    assert worst < 1e-12


def test_bf16_logits_in_fp32():
    targets, worst = run(upcast, dtype=torch.bfloat16)
    assert targets.count("ted::linear_loss") == 1
    assert worst < 1e-2


@pytest.mark.parametrize("loss", [read_twice, smoothed, by_token, capped, other_rows], ids=lambda f: f.__name__)
def test_others_stay(loss):
    targets, worst = run(loss)
    assert "ted::linear_loss" not in targets and "aten::cross_entropy_loss" in targets
    assert worst < 1e-12


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("loss", [shifted_labels, shifted_logits, flat, tied], ids=lambda f: f.__name__)
def test_a_split_vocabulary(loss, bias, monkeypatch):
    """Each rank's rows are one op, chunk by chunk; the same numbers, and not one collective more."""
    monkeypatch.setattr(losses, "CHUNK", 3 * V * 8)
    model = Model(loss, bias, torch.float64)
    torch.manual_seed(1)
    inputs = {"ids": torch.randint(V, (B, S)), "labels": torch.randint(V, (B, S))}
    inputs["labels"][0, 2:4] = -100 if loss is not flat else 3
    mesh = MeshShape(tp=2)
    gm, ctx = lockstep.distributed(model, inputs, mesh)
    before = lockstep.targets(gm)
    fuse_loss.run(gm, ctx)
    gm.graph.lint()
    after = lockstep.targets(gm)
    assert after.count("ted::linear_rows") == 1 and not {"ted::pick", "aten::amax"} & set(after)
    collectives = [t for t in before if t.startswith("ted::all_")]
    assert collectives and collectives == [t for t in after if t.startswith("ted::all_")]
    lockstep.parity(model, [inputs], mesh, monkeypatch, (gm, ctx))


def test_small_split_logits_stay():
    model = Model(flat, False, torch.float64)
    inputs = {"ids": torch.randint(V, (B, S)), "labels": torch.randint(V, (B, S))}
    gm, ctx = lockstep.distributed(model, inputs, MeshShape(tp=2))
    fuse_loss.run(gm, ctx)
    assert "ted::linear_rows" not in lockstep.targets(gm)


def test_no_row_counts():
    x, weight = torch.randn(3, H, requires_grad=True), torch.randn(V, H, requires_grad=True)
    loss, *_ = ops.linear_loss(x, weight, None, torch.full((3,), -100), -100, 1.0, True)
    loss.backward()
    assert loss == 0 and not x.grad.any() and not weight.grad.any()


def test_a_target_that_is_no_column_is_no_number():
    x, weight = torch.randn(1, H), torch.randn(V, H)
    found = [ops.linear_loss(x, weight, None, torch.tensor([t]), -100, 1.0, False)[0] for t in (0, V, -1)]
    assert [f.isnan().item() for f in found] == [False, True, True]


def test_chunks_are_bounded(monkeypatch):
    monkeypatch.setattr(losses, "CHUNK", 1 << 30)
    assert losses.chunk_rows(16384, 151936, 2) == 2048  # of 3533 that would fit
    assert losses.chunk_rows(3, 1 << 40, 2) == 1 and losses.chunk_rows(5, 8, 4) == 5 and losses.chunk_rows(0, 8, 4) == 1
