"""`tedcompile.optim` in one process, beside torch.optim: values, storage, skipping, checkpoints, compilation once."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tedcompile import compat
from tedcompile.optim import Rule, Tiled, TiledAdamW, rules, tiles
from tedcompile.optim.flat import pieces

SHAPES = ((300, 7), (1,), (64, 64), (5,), (1000, 33))
LATE = 3  # the parameter without gradients in some steps


def parameters(dtype=torch.float32) -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(s).to(dtype)) for s in SHAPES]


def gradient(p: nn.Parameter, i: int, step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * step + i)
    return torch.randn(p.shape, generator=generator).to(p.dtype) * (1 + step)


def train(params, optimizer, steps, clip=None, late=(), first=0) -> list[nn.Parameter]:
    """Gradients come by backward where .grad is a view, and are assigned where it is None; a scheduler runs."""
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2 * steps)
    for step in range(first, first + steps):
        for i, p in enumerate(params):
            if i == LATE and step in late:
                p.grad = None if step else p.grad  # none at all, or the view that nothing was written to
            elif p.grad is None:
                p.grad = gradient(p, i, step)
            else:
                (p * gradient(p, i, step)).sum().backward()
        if clip:
            nn.utils.clip_grad_norm_([p for p in params if p.grad is not None], clip)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    return params


def error(found, expected) -> float:
    """The largest relative error of an update."""
    start = [p.detach().to(torch.float64) for p in parameters(expected[0].dtype)]
    moved = [(a.detach() - s, b.detach() - s) for a, b, s in zip(found, expected, start, strict=True)]
    return max(float((a - b).norm() / b.norm()) for a, b in moved)


PEERS = {
    "adamw": (lambda p, **o: TiledAdamW(p, lr=1e-2, **o), lambda p: torch.optim.AdamW(p, lr=1e-2)),
    "adam": (
        lambda p, **o: Tiled(p, rules.adam, lr=1e-2, weight_decay=0.1, **o),
        lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=0.1),
    ),
    "momentum": (
        lambda p, **o: Tiled(p, rules.momentum, lr=1e-2, nesterov=True, weight_decay=0.1, **o),
        lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True, weight_decay=0.1),
    ),
    "sgd": (lambda p, **o: Tiled(p, rules.sgd, lr=1e-2, **o), lambda p: torch.optim.SGD(p, lr=1e-2)),
}


@pytest.mark.parametrize("clip", [None, 30.0])
@pytest.mark.parametrize("name", PEERS)
def test_updates_are_torchs(name, clip):
    """Also of a parameter that has gradients in some steps only: its bias correction counts its own steps."""
    mine, theirs = PEERS[name]
    a, b = parameters(torch.float64), parameters(torch.float64)
    train(a, mine(a, max_grad_norm=clip), 8, late=(0, 1, 4))
    train(b, theirs(b), 8, clip, late=(0, 1, 4))
    assert error(a, b) < (1e-9 if clip is None else 1e-8)


def test_fp32_and_offload():
    a, b = parameters(), parameters()
    train(b, torch.optim.AdamW(b, lr=1e-2), 8)
    optimizer = TiledAdamW(a, lr=1e-2)
    train(a, optimizer, 8)
    assert error(a, b) < 1e-6
    for place in ("device", "host", "auto"):
        c = parameters()
        train(c, TiledAdamW(c, lr=1e-2, offload="cpu", update_on=place, tile_bytes=1 << 16), 8)
        assert all(map(torch.equal, a, c)), place


@pytest.mark.parametrize("place", ["device", "host"])
@pytest.mark.parametrize("name", PEERS)
def test_offload_of_a_rule_with_little_state_or_none(name, place):
    """What is streamed is then more than the state: gradient and parameter."""
    a, b = parameters(), parameters()
    train(a, PEERS[name][0](a), 3)
    train(b, PEERS[name][0](b, offload="cpu", update_on=place, tile_bytes=1 << 16), 3)
    assert all(map(torch.equal, a, b))


@pytest.mark.parametrize("place", ["device", "host"])
def test_offload_leaves_parameters_without_gradients_alone(place):
    """Their rows lie between those that are updated, in the same tiles."""
    a, b = parameters(torch.bfloat16), parameters(torch.bfloat16)
    options = dict(lr=1e-2, master="split", max_grad_norm=30.0)
    train(a, TiledAdamW(a, **options), 4, late=(0, 1))
    train(b, TiledAdamW(b, **options, offload="cpu", update_on=place, tile_bytes=1 << 16), 4, late=(0, 1))
    assert all(map(torch.equal, a, b))


def test_master_weights():
    a, b, c = parameters(torch.bfloat16), [nn.Parameter(p.detach().float()) for p in parameters(torch.bfloat16)], None
    mine, theirs = TiledAdamW(a), torch.optim.AdamW(b)
    c = parameters(torch.bfloat16)
    split = TiledAdamW(c, master="split")
    for step in range(100):
        for i, (p, q, r) in enumerate(zip(a, b, c, strict=True)):
            p.grad.copy_(gradient(p, i, step))
            r.grad.copy_(p.grad)
            q.grad = p.grad.float()
        for optimizer in (mine, theirs, split):
            optimizer.step()
    state, other = mine.state_dict()["state"], split.state_dict()["state"]
    for i, (p, q, r) in enumerate(zip(a, b, c, strict=True)):
        master = state[i]["master"]
        assert (master - q).norm() <= 1e-7 * q.norm()
        assert torch.equal(p, master.bfloat16())
        assert torch.equal(other[i]["master"], master)
        assert ((r.float() - master).abs() <= master.abs() * 2**-8).all()
    split_bytes, fp32_bytes = (o.kept[0].arrays[0].nbytes for o in (split, mine))
    assert 2 * split_bytes == fp32_bytes


def test_parameters_that_somebody_else_writes():
    (p,) = [nn.Parameter(torch.ones(512, dtype=torch.bfloat16))]
    optimizer = TiledAdamW([p], lr=0.0, weight_decay=0.0)
    p.grad.fill_(1)
    optimizer.step()
    with torch.no_grad():
        p[:256] = 2
    optimizer.step()
    assert (p[:256] == 2).all() and (p[256:] == 1).all()


@pytest.mark.parametrize("moments", ["bf16", "int8"])
def test_compressed_moments_converge(moments):
    """Least squares: the loss reached is that of fp32 moments, although a moment's change is below the spacing."""

    def fit(**options):
        torch.manual_seed(0)
        x, want = torch.randn(256, 64), torch.randn(64, 32)
        w = nn.Parameter(torch.zeros(64, 32))
        optimizer = TiledAdamW([w], lr=0.02, weight_decay=0.0, **options)
        losses = []
        for _ in range(150):
            loss = (x @ (w - want)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    exact, found = fit(), fit(moments=moments)
    assert found[50] == pytest.approx(exact[50], rel=0.05)
    assert found[-1] < 0.02 * exact[0]


def test_a_step_with_an_inf_or_nan_is_left_out():
    a = parameters(torch.bfloat16)
    optimizer = TiledAdamW(a, moments="int8")
    train(a, optimizer, 2)
    before = [p.detach().clone() for p in a], [x.clone() for kept in optimizer.kept for x in kept.arrays]
    for bad in (float("inf"), float("nan")):
        for p in a:
            p.grad.fill_(1)
        a[2].grad[3, 3] = bad
        optimizer.step()
    assert optimizer.skipped == 2 and not optimizer.grad_norm.isfinite()
    after = a, [x for kept in optimizer.kept for x in kept.arrays]
    assert all(map(torch.equal, before[0], after[0])) and all(map(torch.equal, before[1], after[1]))
    assert optimizer.clocks[0][0].step == 2


def test_checkpoints_go_to_torch_and_back():
    a, b = parameters(torch.float64), parameters(torch.float64)
    mine, theirs = TiledAdamW(a, lr=1e-2), torch.optim.AdamW(b, lr=1e-2)
    train(a, mine, 4, late=(0, 1)), train(b, theirs, 4, late=(0, 1))
    c, d = ([nn.Parameter(p.detach().clone()) for p in b] for _ in range(2))
    to_torch, to_mine = torch.optim.AdamW(c), TiledAdamW(d)
    to_torch.load_state_dict(copy.deepcopy(mine.state_dict()))
    to_mine.load_state_dict(copy.deepcopy(theirs.state_dict()))
    for params, optimizer in ((b, theirs), (c, to_torch), (d, to_mine)):
        train(params, optimizer, 3, first=4)
    assert error(c, b) < 1e-9 and error(d, b) < 1e-9


@pytest.mark.parametrize("options", [dict(moments="int8"), dict(moments="bf16", master="split")], ids=str)
def test_compressed_checkpoints_are_exact(options):
    a = parameters(torch.bfloat16)
    optimizer = TiledAdamW(a, **options)
    train(a, optimizer, 3)
    b = [nn.Parameter(p.detach().clone()) for p in a]
    other = TiledAdamW(b, **options)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for x, y in zip(optimizer.kept[0].arrays, other.kept[0].arrays, strict=True):
        torch.testing.assert_close(y, x, rtol=1e-6, atol=0)


def test_names_groups_closure_and_views(monkeypatch):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[0].bias.requires_grad_(False)
    named = list(model.named_parameters())
    optimizer = TiledAdamW([{"params": named[:2], "lr": 0.1}, {"params": named[2:], "weight_decay": 0.0}])
    assert [g["param_names"] for g in optimizer.state_dict()["param_groups"]] == [
        ["0.weight", "0.bias"],
        ["1.weight", "1.bias"],
    ]
    views = [p.grad for p in model.parameters() if p.requires_grad]
    kernels = []
    x = torch.randn(4, 8)

    def closure():
        kernels.append("closure")
        loss = model(x).square().mean()
        loss.backward()
        return loss

    losses = []
    optimizer.step(closure)
    monkeypatch.setattr(compat, "inductor_kernel", lambda *_: pytest.fail("compiled again"))
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.999)
    for _ in range(1000):
        optimizer.zero_grad()
        losses.append(optimizer.step(closure).item())
        scheduler.step()
    assert len(kernels) == 1001 and losses[-1] < losses[0]
    assert all(p.grad is v for p, v in zip((p for p in model.parameters() if p.requires_grad), views, strict=True))
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 0.999**1000)
    model[0].bias.requires_grad_(True)  # thawed
    before = model[0].bias.detach().clone()
    optimizer.step(closure)
    assert not torch.equal(model[0].bias, before)


def test_a_rule_of_ones_own():
    def update(p, g, state, h):
        top = torch.maximum(state["top"] * h["fade"], g.abs())
        return p - h["lr"] * g / (top + 1e-8), {"top": top}

    mine = Rule(update, {"top": "positive"}, {"lr": 0.1, "fade": 0.9})
    (p,) = [nn.Parameter(torch.ones(300))]
    optimizer = Tiled([p], mine, lr=0.5)
    p.grad.copy_(torch.linspace(-3, 3, 300))
    optimizer.step()
    torch.testing.assert_close(p.detach(), 1 - 0.5 * torch.linspace(-3, 3, 300).sign())


@pytest.mark.parametrize("rule", [rules.lion, rules.adafactor], ids=["lion", "adafactor"])
def test_other_rules_descend(rule):
    torch.manual_seed(0)
    x, w = torch.randn(256, 64), nn.Parameter(torch.zeros(64, 32))
    want = torch.randn(64, 32)
    optimizer = Tiled([w], rule, lr=0.01)
    losses = []
    for _ in range(200):
        loss = (x @ (w - want)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(offload="disk"), "offload cannot be 'disk'; choose None or 'cpu'"),
        (dict(update_on="gpu"), "update_on cannot be 'gpu'; choose 'auto' or 'device' or 'host'"),
        (dict(moments="fp8"), "moments cannot be 'fp8'"),
        (dict(max_grad_norm=0.0), "max_grad_norm must be positive"),
        (dict(tile_bytes=1), "tile_bytes must be at least"),
    ],
    ids=lambda o: str(o)[:20],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        TiledAdamW([nn.Parameter(torch.ones(1))], **options)


def test_pieces_cover_any_range():
    t = torch.arange(24).view(4, 2, 3)
    for low in range(25):
        for high in range(low, 25):
            flat = torch.full((24,), -1)
            for piece, start in pieces(t, low, high):
                flat[start : start + piece.numel()] = piece.flatten()
            assert flat[low:high].equal(torch.arange(low, high)) and (flat < 0).sum() == 24 - (high - low)


@pytest.mark.parametrize("moments, kind", tiles.STORAGES)
def test_what_is_stored_of_a_state_is_found_again_in_its_value(moments, kind):
    """A checkpoint holds values; each of 20,000 blocks has its own codes and scale again."""
    stored = tiles.STORAGES[moments, kind]
    torch.manual_seed(0)
    x = torch.randn(20_000, 256) * 10.0 ** torch.randint(-12, 3, (20_000, 1))
    x[0] = 0
    arrays = stored.encode(x.abs() if kind == "positive" else x, torch.randint(1 << 16, x.shape, dtype=torch.int32))
    if moments == "int8" and kind == "signed":
        arrays[0][1:5].clamp_(-126, 126)
    found = stored.restore(stored.decode(*arrays))
    assert all(a.equal(b) for a, b in zip(found, arrays, strict=True))
