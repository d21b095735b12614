"""A gated MLP over sorted rows becomes one op with the same values and gradients; other bodies stay."""

import pytest
import torch
from torch import nn

from tedcompile import pipeline
from tedcompile.mesh import MeshShape
from tedcompile.ops import ops
from tedcompile.passes import fuse_experts
from tests import joint, lockstep, models

T, H, I, E, K = 9, 6, 4, 5, 2

BODIES = {
    "chunk": lambda p: (lambda g, u: nn.functional.silu(g) * u)(*p.chunk(2, -1)),
    "slices": lambda p: p[:, I:] * nn.functional.gelu(p[:, :I], approximate="tanh"),
    "gelu": lambda p: (lambda g, u: nn.functional.gelu(g) * u)(*p.split(I, -1)),
}
OTHERS = {
    "second half activated": lambda p: (lambda g, u: g * nn.functional.silu(u))(*p.chunk(2, -1)),
    "interleaved": lambda p: nn.functional.silu(p[:, ::2]) * p[:, 1::2],
    "clamped": lambda p: (lambda g, u: nn.functional.silu(g) * u.clamp(max=1))(*p.chunk(2, -1)),
    "gate read twice": lambda p: (lambda g, u: nn.functional.silu(g) * u + g)(*p.chunk(2, -1)),
    "sigmoid": lambda p: (lambda g, u: g.sigmoid() * u)(*p.chunk(2, -1)),
}


class Block(nn.Module):
    def __init__(self, body):
        super().__init__()
        torch.manual_seed(0)
        self.body = body
        self.router = nn.Linear(H, E, dtype=torch.float64)
        self.up = nn.Parameter(torch.randn(E, 2 * I, H, dtype=torch.float64))
        self.down = nn.Parameter(torch.randn(E, I, H, dtype=torch.float64))

    def forward(self, x):
        weights, index = self.router(x).softmax(-1).topk(K)
        rows, counts, perm, order = ops.permute(x.tanh(), index, E)
        h = self.body(ops.grouped_mm(rows, self.up.transpose(1, 2), counts))
        return ops.unpermute(ops.grouped_mm(h, self.down, counts), perm, order, weights).square().sum()


def fused(body, **options):
    module = Block(body)
    x = torch.randn(T, H, dtype=torch.float64)
    gm, ctx = lockstep.distributed(module, {"x": x}, MeshShape(), **options)
    fuse_experts.run(gm, ctx)
    gm.graph.lint()
    return module, x, gm


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_values_and_gradients(body):
    module, x, gm = fused(body)
    assert lockstep.targets(gm).count("ted::gated_experts") == 1
    assert not {"ted::permute", "ted::grouped_mm", "ted::unpermute"} & set(lockstep.targets(gm))
    parameters = dict(module.named_parameters())
    values = [
        parameters[n.meta["role"][1]] if n.meta["role"][0] == "parameter" else x
        for n in gm.graph.nodes
        if n.op == "placeholder"
    ]
    got, want = torch.fx.Interpreter(gm).run(*values)[0], module(x)
    torch.testing.assert_close(got, want)
    gradients = (torch.autograd.grad(y, list(parameters.values())) for y in (got, want))
    for a, b, p in zip(*gradients, parameters.values(), strict=True):
        torch.testing.assert_close(a, b)
        assert a.stride() == p.stride()


@pytest.mark.parametrize("body", OTHERS.values(), ids=OTHERS)
def test_other_bodies_stay(body):
    _, _, gm = fused(body)
    assert "ted::gated_experts" not in lockstep.targets(gm)
    assert lockstep.targets(gm).count("ted::grouped_mm") == 2


@pytest.mark.parametrize("dispatch, fuses", [("all_gather", True), ("dedup", True), ("all_to_all", False)])
def test_tokens_that_travel(dispatch, fuses, monkeypatch):
    module, mesh = Block(BODIES["chunk"]), MeshShape(ep=5)
    batches = [{"x": torch.randn(T, H, dtype=torch.float64)} for _ in range(5)]
    gm, ctx = lockstep.distributed(module, batches[0], mesh, plan={"dispatch": dispatch})
    fuse_experts.run(gm, ctx)
    assert ("ted::gated_experts" in lockstep.targets(gm)) == fuses
    lockstep.parity(module, batches, mesh, monkeypatch, (gm, ctx))


def test_only_tokens_halves_and_routing_are_kept(monkeypatch):
    """Of a layer: nothing as long as the rows but the halves; no row of tokens and no output of an expert."""
    model, make_batch = models.MODELS["qwen3_moe"]()
    run_forward = pipeline.run_forward

    def fusing(captured, ctx):
        gm = run_forward(captured, ctx)
        fuse_experts.run(gm, ctx)
        return gm

    monkeypatch.setattr(pipeline, "run_forward", fusing)
    forward, backward = joint.parts(model, make_batch(0, 0, seq=18), MeshShape())
    rows = 18 * models.BATCH * 2  # no size of a weight
    kept = [n.meta["val"] for n in backward.graph.find_nodes(op="placeholder")]
    kept = [v.shape[1] for v in kept if isinstance(v, torch.Tensor) and v.dim() == 2 and v.shape[0] == rows]
    assert kept == [96, 96]  # both layers' [gate, up]
    assert not [n for n in forward.graph.nodes if n.target is ops.grouped_mm.default]
