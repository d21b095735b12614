"""Random numbers on tp ranks: the same where a value is replicated, independent ones where it is split."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tedcompile.layouts import Layout
from tedcompile.mesh import MeshShape
from tedcompile.ops import ops
from tedcompile.passes import check, randomness
from tests.lockstep import Ranks, distributed

T, H, I, E = 4096, 16, 32, 8
MESH = MeshShape(dp=2, tp=2)
SIGMAS = 5


class Noisy(nn.Module):
    """Router jitter, random token selection (each expert keeps tokens by lot), and dropout on three kinds of values."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(H, I), nn.Linear(I, H, bias=False)
        self.norm, self.out, self.gate = (
            nn.LayerNorm(H, elementwise_affine=False),
            nn.Linear(H, I),
            nn.Linear(H, E, bias=False),
        )
        self.last = nn.Linear(I, H)

    def forward(self, x):
        scores = self.gate(x * torch.empty_like(x).uniform_(1 - 1e-2, 1 + 1e-2)).softmax(-1)
        chosen = F.one_hot(scores.argmax(-1), E)
        lots = torch.rand_like(scores) * chosen
        kept = lots >= lots.topk(T // E, dim=1).values[:, -1:]  # over capacity: by lot, not by position
        h = F.dropout(F.gelu(self.up(x * (kept * scores).sum(-1, keepdim=True))), 0.25)  # split over tp
        y = x + F.dropout(self.down(h), 0.1)  # tokens split, where the algebra is on
        return F.dropout(self.last(F.gelu(self.out(self.norm(y)))), 0.3).square().mean()


def draws(monkeypatch, seed: int = 3, **options) -> list[tuple[Layout, list[Tensor]]]:
    """The layout of each random value, and the numbers that each rank draws for it."""
    torch.manual_seed(0)
    module = Noisy().double()
    x = torch.randn(1, T, H, dtype=torch.float64)
    gm, _ = distributed(module, dict(x=x), MESH, **options)
    ranks, found = Ranks(MESH, monkeypatch), []
    call = ranks.call

    def watch(target, args, kwargs):
        out = call(target, args, kwargs)
        if target is ops.rand.default:
            found.append(out)
        return out

    def value(node, r):
        kind, name = node.meta["role"]
        if kind == "seed":  # as the runtime makes it
            return torch.tensor(seed * MESH["data"] + ranks.at[r]["dp"])
        if kind == "input":
            return x
        return ranks.local(node, module.get_parameter(name).detach(), r)

    monkeypatch.setattr(ranks, "call", watch)
    with torch.no_grad():
        ranks.run(gm, value)
    nodes = [n for n in gm.graph.nodes if n.target is ops.rand.default]
    assert len(nodes) == 5
    return list(zip([n.meta["layout"] for n in nodes], found, strict=True))


def require(found: list[tuple[Layout, list[Tensor]]]) -> None:
    """AssertionError unless ranks draw alike exactly where they should, and numbers are uniform and independent."""
    apart: list[Tensor] = []
    for layout, (a, b, *others) in found:
        if layout.kind == "S":
            apart += [a, b, *others]
        else:
            assert a.equal(b) and others[0].equal(others[1]), f"tp ranks draw others for the same {layout} value"
            apart += [a, others[0]]
    for u in apart:
        n = u.numel()
        assert n >= 2**14
        for p in (0.1, 0.25, 0.3):  # what dropout drops
            assert abs((u < p).double().mean() - p) < SIGMAS * math.sqrt(p * (1 - p) / n)
        distance = (u.flatten().double().sort().values - torch.arange(n) / n).abs().max()
        assert distance < 2.2 / math.sqrt(n), "not uniform"  # Kolmogorov-Smirnov, one in 10,000
    for u, v in itertools.combinations(apart, 2):
        n = min(u.numel(), v.numel())
        pair = torch.stack([u.flatten()[:n], v.flatten()[:n]]).double()
        assert abs(torch.corrcoef(pair)[0, 1]) < SIGMAS / math.sqrt(n), "numbers that should be independent are not"
        both = ((pair < 0.25).all(0)).double().mean()  # dropped in both
        assert abs(both - 1 / 16) < SIGMAS * math.sqrt(15 / 256 / n)


def kinds(found) -> list[str]:
    return [layout.kind for layout, _ in found]


def test_draws_are_alike_where_replicated_and_independent_where_split(monkeypatch):
    for off, last in (([], "S"), (["simplify_collectives"], "R")):
        found = draws(monkeypatch, off=off)
        require(found)
        assert "S" in kinds(found) and kinds(found)[3] == last
        assert any(kind != "S" for kind in kinds(found)[:2]), "jitter and lots are drawn by all tp ranks alike"


def test_a_seed_decides_all_numbers(monkeypatch):
    first, again, other = (draws(monkeypatch, seed) for seed in (3, 3, 4))
    assert all(a.equal(b) for (_, x), (_, y) in zip(first, again) for a, b in zip(x, y))
    n = T * E // MESH.tp
    for (_, x), (_, y) in zip(first, other):
        for a, b in itertools.product(x, y):
            pair = torch.stack([a.flatten()[:n], b.flatten()[:n]]).double()
            assert abs(torch.corrcoef(pair)[0, 1]) < SIGMAS / math.sqrt(pair.shape[1])


NEVER = lambda site, axis: (site, "")


def _first(site):
    site.args = (site.args[0], 0)
    return site


@pytest.mark.parametrize(
    "mutant, message",
    [
        (NEVER, "should be independent"),  # split values get the same numbers
        (lambda site, axis: (site, "tp"), "draw others for the same"),  # replicated ones do not
        (lambda site, axis: (_first(site), axis), "should be independent"),  # all values get the same numbers
    ],
    ids=["never_by_rank", "always_by_rank", "one_site"],
)
def test_a_wrong_pass_fails(mutant: Callable, message: str, monkeypatch):
    emit = randomness._emit
    wrong = lambda graph, replace, node, site, axis: emit(graph, replace, node, *mutant(site, axis))
    monkeypatch.setattr(randomness, "_emit", wrong)
    if message == "draw others for the same" or mutant is NEVER:
        with pytest.raises(AssertionError, match="must differ exactly where the value is split"):
            draws(monkeypatch)  # the checker sees it, too
    monkeypatch.setattr(check, "run", lambda gm, ctx: None)
    with pytest.raises(AssertionError, match=message):
        require(draws(monkeypatch, off=["simplify_collectives"]))
