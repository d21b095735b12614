"""The families of transformers are found and shrunk; the shapes of code that only they have."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tedcompile.capture import capture
from tedcompile.hints import _spread
from tedcompile.mesh import MeshShape
from tests import families, styles
from tests.lockstep import distributed, parity, placements, targets

H, E = styles.H, styles.E


def test_discovery():
    found = {f.name: f for f in families.discovered(["llama", "mixtral", "jetmoe", "nllb-moe", "qwen3_5_moe"])}
    assert set(found) == {"jetmoe", "mixtral", "nllb-moe"}  # llama is dense, qwen3_5_moe holds a text model
    assert not any(f.unusable for f in found.values())
    assert len(found["mixtral"].experts) == 4 and len(found["nllb-moe"].experts) == 4 * 2 * families.EXPERTS // 2
    model, make_batch = families.build("mixtral")
    assert sum(p.numel() for p in model.parameters()) < 1e6
    assert set(found["mixtral"].experts) <= {n for n, _ in model.named_parameters()}
    assert make_batch(0, 0)["input_ids"].max() < model.config.vocab_size


class Capacity(nn.Module):
    """Switch: one expert a token, of each sequence only the first ones; experts have names, only hit ones run."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(H, E, bias=False)
        self.experts = nn.ModuleDict({f"expert_{e}": styles.FeedForward() for e in range(E)})

    def forward(self, x):
        self.gate = self.gate.to(x.dtype)
        probabilities = self.gate(x.view(2, -1, H)).softmax(-1)
        mask = F.one_hot(probabilities.argmax(-1), E)
        mask = mask * (mask.cumsum(-2) <= 2)
        weights = probabilities.max(-1).values.view(-1, 1)
        mask = mask.view(-1, 1, E).permute(2, 1, 0)
        out = torch.zeros_like(x)
        for e in torch.greater(mask.sum((-1, -2)), 0).nonzero():
            slot, token = torch.where(mask[e].squeeze(0))
            y = self.experts[f"expert_{e[0]}"](x[None, token].reshape(-1, H))
            out.index_add_(0, token, y * weights[token, slot, None])
        return out


class Transposed(nn.Module):
    """DBRX: positions made under no_grad, and products with `.T` of an expert's weight."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(H, E, bias=False)
        self.w1, self.w2 = (nn.Parameter(torch.randn(E, styles.I, H)) for _ in range(2))

    def forward(self, x):
        weights, index = self.gate(x).softmax(-1).topk(2)
        out = torch.zeros_like(x)
        with torch.no_grad():
            mask = F.one_hot(index, E + 1).permute(2, 1, 0)
            hit = torch.greater(mask.sum((-1, -2)), 0).nonzero()
        for e in hit:
            with torch.no_grad():
                slot, token = torch.where(mask[e[0]])
            y = F.silu(x[token].matmul(self.w1[e[0]].T)).matmul(self.w2[e[0]])
            out.index_add_(0, token, y * weights[token, slot, None])
        return out


@pytest.mark.parametrize("style", [Capacity, Transposed])
def test_parity(style, monkeypatch):
    torch.manual_seed(0)
    module, mesh = style().double(), MeshShape(ep=2, tp=2)
    batches = [dict(x=torch.randn(10, H, dtype=torch.float64)) for _ in range(2)]
    if style is Capacity:
        with torch.no_grad():
            mask = F.one_hot(module.gate(batches[0]["x"].view(2, -1, H)).argmax(-1), E)
        assert mask.sum(1).max() > 2, "no token is dropped"
    gm, ctx = distributed(module, batches[0], mesh)
    assert "ted::permute" in targets(gm)
    split = placements(gm)
    assert all("ep" in split[n] for n, p in module.named_parameters() if p.dim() > 1 and not n.startswith("gate"))
    parity(module, batches, mesh, monkeypatch, (gm, ctx))


class Converts(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.linear, self.dtype = nn.Linear(H, H), dtype

    def forward(self, x):
        return self.linear.to(self.dtype)(x)


def test_conversions_inside_a_forward():
    x = torch.randn(2, H)
    graph = capture(Converts(torch.float32), dict(x=x)).gm
    assert "linear" in str(graph.graph)
    module = Converts(torch.float64)
    with pytest.raises(ValueError, match="converts linear.weight from torch.float32 to torch.float64"):
        capture(module, dict(x=x))
    assert module.linear.weight.dtype == torch.float32 and "_apply" not in vars(module.linear)


def test_a_choice_has_an_example_that_reaches_every_expert():
    for shape, dim, size in [((6, 2), 1, 4), ((6, 4), 1, 4), ((2, 3, 1), 2, 5), ((4, 6), 0, 4), ((2, 8), 2, 4)]:
        example = _spread(torch.Size(shape), dim, size)
        assert example.shape == shape and example.unique().tolist() == list(range(size))
        if dim < len(shape):
            assert all(len(set(row.tolist())) == shape[dim] for row in example.movedim(dim, -1).reshape(-1, shape[dim]))
    assert _spread(torch.Size((6, 4)), 1, 4)[:, :1].unique().numel() == 4
