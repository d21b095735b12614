"""Every way to write an MoE: recognised, proven against its own code, and parallel with the same gradients (fp64)."""

import inspect

import pytest
import torch
from torch import nn

from tedcompile import graphs, pipeline, prove
from tedcompile.capture import capture
from tedcompile.mesh import MeshShape
from tedcompile.ops import ops
from tedcompile.passes import merge_experts, separate_experts
from tedcompile.passes.merge_experts import Merge
from tests import routers, styles
from tests.lockstep import distributed, parity, placements, targets

T = 10
ALL = styles.STYLES | routers.ROUTERS
MESHES = [MeshShape(ep=2, tp=2), MeshShape(dp=2, ep=2), MeshShape(ep=4), MeshShape(tp=2)]
FEW = ("LoopWhere", "LoopHitStacked", "LoopSplit", "OneHotModules", "DenseBmm", "GroupedPadded", "Gathered", "Buffers",
       "RandomTokens")  # fmt: skip
CASES = [(name, MESHES[0]) for name in ALL]
CASES += [(name, MESHES[1 + i % 3]) for i, name in enumerate(FEW)]
BESIDE = ("gate.", "shared", "width", "temperature")  # names of parameters that no expert has
# partial sums of an expert are not cast: TED's plan, which would split these experts over tp, leaves them whole there
WHOLE_OVER_TP = {"GroupedMm", "GroupedInterleaved"}


def batches(number, module):
    """Tokens, and ids where the module wants them, of each data rank."""
    found = []
    for i in range(number):
        generator = torch.Generator().manual_seed(i)
        found.append(dict(x=torch.randn(T, styles.H, dtype=torch.float64, generator=generator)))
        if "ids" in inspect.signature(module.forward).parameters:
            found[-1]["ids"] = torch.randint(32, (T,), generator=generator)
    return found


@pytest.mark.parametrize("style, mesh", CASES, ids=str)
def test_parity(style, mesh, monkeypatch):
    module = styles.build(ALL[style]).double()
    inputs = batches(mesh["data"], module)
    gm, ctx = distributed(module, inputs[0], mesh)
    assert not [reason for n, reason in ctx.replicated if n.op != "placeholder" and "divide" not in reason]
    experts = {n for n, p in module.named_parameters() if not n.startswith(BESIDE)}
    split = placements(gm)
    for axis in ("ep", "tp"):
        if mesh[axis] > 1 and not (axis == "tp" and style in WHOLE_OVER_TP):  # a bias may stay whole
            assert {n for n in experts if "bias" not in n and "scale" not in n} <= {
                n for n in split if axis in split[n]
            }
    parity(module, inputs, mesh, monkeypatch, (gm, ctx))


@pytest.mark.parametrize("style", styles.DENSE)
def test_dense_experts_see_all_tokens_without_sending_any_twice(style):
    """No all-to-all: tokens are gathered over ep, and the sums of a rank's experts scattered."""
    module = styles.build(styles.STYLES[style]).double()
    for mesh in (MESHES[0], MESHES[2]):
        gm, _ = distributed(module, batches(1, module)[0], mesh, own_plan=True)
        assert ("ted::all_to_all" in targets(gm)) == (style == "DenseInputs")  # scores are rows of their own, too


def test_products_in_bf16_are_recognised():
    """torchtitan casts operands to bf16 whatever the parameters are."""
    gm, reasons = recognised(styles.build(styles.GroupedHalf))
    assert not reasons and targets(gm).count("ted::permute") == 1


def recognised(module):
    """The graph of a style by all recognisers with proof, and what stayed as written."""
    captured = capture(module.double(), batches(1, module)[0])
    ctx = pipeline.Context(MeshShape())
    gm = pipeline.run_forward(captured, ctx)
    return gm, [reason for _, reason in ctx.replicated]


aten = torch.ops.aten


def changing(target, monkeypatch, change):
    """Recognisers whose calls of an op get other arguments, or results."""
    call = graphs.call

    def other(graph, op, args, like, val=None):
        add = lambda op, args: call(graph, op, args, like)
        return change(add, args) if op is target else call(graph, op, args, like, val)

    monkeypatch.setattr(graphs, "call", other)


def swap_experts(monkeypatch):
    def change(add, args):
        x, index, experts = args
        after = add(aten.remainder.Scalar, (add(aten.add.Scalar, (index, 1)), experts))
        return add(ops.permute.default, (x, after, experts))

    changing(ops.permute.default, monkeypatch, change)


def swap_modules(monkeypatch):
    """Experts that are modules, stacked in another order."""
    stack = separate_experts.stack
    monkeypatch.setattr(merge_experts, "stack", lambda g, c, p: stack(g, c, [p[1], p[0], *p[2:]]))


def drop_bias(monkeypatch):
    changing(ops.per_expert.default, monkeypatch,
             lambda add, args: add(aten.mul.Scalar, (add(ops.per_expert.default, args), 0)))  # fmt: skip


def wrong_score(monkeypatch):
    def change(add, args):
        *rest, weights = args
        return add(ops.unpermute.default, (*rest, add(aten.flip.default, (weights, [1]))))

    changing(ops.unpermute.default, monkeypatch, change)


def forget_idle(monkeypatch):
    """A recogniser that is right only where every expert has rows."""
    spread = Merge.spread

    def other(self, weight, dims):
        reached = self.add(aten.clamp.default, (self.add(aten.min.default, (self.counts,)), 0, 1))
        return self.add(aten.mul.Tensor, (spread(self, weight, dims), reached))

    monkeypatch.setattr(Merge, "spread", other)


# one style at least of each recogniser, and of each of its forms
MUTATIONS = {
    swap_experts: ["LoopWhere", "LoopSplit", "LoopDense", "OneHot", "OneHotModules", "DenseBmm", "Gathered",
                   "ExpertChoiceBmm", "GroupedMm", "ExpertChoice"],
    swap_modules: ["LoopWhere", "LoopSplit", "LoopDense", "OneHotModules"],
    drop_bias: ["LoopBiases", "OneHot", "OneHotModules", "DenseBmm", "Gathered", "GroupedInterleaved"],
    wrong_score: ["LoopWhere", "LoopDense", "OneHot", "DenseBmm", "Gathered", "GroupedMm"],
    forget_idle: ["LoopBiases"],
}  # fmt: skip


@pytest.mark.parametrize("mutate, style", [(m, s) for m, names in MUTATIONS.items() for s in names], ids=lambda x: (
    getattr(x, "__name__", x)
))  # fmt: skip
def test_a_wrong_recogniser_is_caught(mutate, style, monkeypatch):
    word = "idle" if mutate is forget_idle else "output 0 differs"
    module = styles.build(styles.STYLES[style])
    mutate(monkeypatch)
    if styles.NUMBERS[style] == 2:  # needs the proof to be captured at all
        with pytest.raises(ValueError, match=word):
            recognised(module)
        return
    gm, reasons = recognised(module)
    assert any(word in reason for reason in reasons), reasons
    assert "ted::permute" not in targets(gm)


class Penalty(styles.LoopHitStacked):
    """Weights are read beside the experts' products as well."""

    def forward(self, x):
        return super().forward(x), self.gate_up_proj.square().sum()


class PenaltyModules(styles.LoopWhere):
    def forward(self, x):
        return super().forward(x), sum(expert.w1.weight.square().sum() for expert in self.experts)


@pytest.mark.parametrize("style", [Penalty, PenaltyModules])
def test_experts_that_something_else_reads_stay_whole(style, monkeypatch):
    module, mesh = styles.build(style).double(), MESHES[0]
    inputs = batches(mesh["data"], module)
    gm, ctx = distributed(module, inputs[0], mesh)
    assert not any("ep" in split for split in placements(gm).values())
    assert any("is read by something else" in r or "not a parameter" in r for _, r in ctx.replicated)
    parity(module, inputs, mesh, monkeypatch, (gm, ctx))


def test_a_second_signature_finds_the_experts_where_the_first_has_put_them(monkeypatch):
    module, mesh = styles.build(styles.LoopAny).double(), MESHES[0]
    inputs = batches(mesh["data"], module)
    gm, ctx = distributed(module, inputs[0], mesh)
    decided = pipeline.placements(gm) | ctx.stacked
    fewer = [dict(x=batch["x"][:6]) for batch in inputs]
    ctx = pipeline.Context(mesh, decided, options=ctx.options)
    gm = pipeline.run_forward(capture(module, fewer[0]), ctx)
    assert {n: p for n, p in pipeline.placements(gm).items() if p} == {
        n: p for n, p in decided.items() if p and "*" not in n
    }
    parity(module, fewer, mesh, monkeypatch, (gm, ctx))


class Twice(styles.LoopContinue):
    """What follows a branch is not what its absence would be: an idle expert costs its bias."""

    def dispatch(self, x, weights, index):
        out = super().dispatch(x, weights, index)
        for e in range(styles.E):
            if not (index == e).any():
                out = out + 1
        return out


def test_an_assumption_that_does_not_hold_is_refused():
    with pytest.raises(ValueError, match="control flow or a size depends on the values of tensors.*idle"):
        recognised(styles.build(Twice))


class Layers(nn.Module):
    """Two equal blocks inside a model, with control flow."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([styles.LoopContinue(), styles.LoopContinue()])

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x


def test_the_block_is_proven_and_equal_blocks_once():
    model = styles.build(Layers).double()
    captured = capture(model, batches(1, model)[0])
    assert captured.calls.assumed == {"layers.0", "layers.1"}
    ctx = pipeline.Context(MeshShape())
    gm = pipeline.run_forward(captured, ctx)
    assert ctx.prove.proven == {"layers.0", "layers.1"} and list(ctx.prove.verdicts.values()) == [""]
    assert targets(gm).count("ted::permute") == 2


class ByWidth(styles.LoopContinue):
    """Its code depends on its width, so nothing is proven by a narrower copy."""

    def dispatch(self, x, weights, index):
        out = super().dispatch(x, weights, index)
        return 2 * out if x.shape[-1] > 64 else out


@pytest.mark.parametrize("style, narrow", [
    (styles.LoopContinue, True), (styles.GatheredEinsum, True), (styles.LoopWhere, False), (ByWidth, False),
], ids=lambda x: getattr(x, "__name__", ""))  # fmt: skip
def test_a_wide_block_is_proven_on_a_narrower_copy_where_its_code_is_the_same(style, narrow, monkeypatch):
    """LoopWhere has its width as a number in its code."""
    monkeypatch.setattr(styles, "H", 128)
    monkeypatch.setattr(styles, "I", 192)
    copy, widths = prove._copy, []
    monkeypatch.setattr(prove, "_copy", lambda m, dtype, sizes: widths.append(sizes) or copy(m, dtype, sizes))
    with torch.device("meta"):
        module = style()
    gm, reasons = recognised(module)
    assert targets(gm).count("ted::permute") == 1 and not reasons
    assert widths[0] == {128: 16, 192: 24} and (widths[-1] == {128: 16, 192: 24}) == narrow


class Unequal(styles.LoopWhere):
    def __init__(self):
        super().__init__()
        self.experts[2] = styles.FeedForward()


class Ranked(styles.LoopWhere):
    """An expert's tokens are normalised over the tokens, which mixes its rows."""

    def dispatch(self, x, weights, index):
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(index == e)
            y = expert(x[token])
            out.index_add_(0, token, y.softmax(0) * weights[token, slot, None])
        return out


class Mixed(styles.DenseBmm):
    """What an expert makes of a token depends on the other tokens."""

    def body(self, x):
        h = torch.baddbmm(self.up_bias, x, self.up)
        return torch.bmm(h - h.mean(1, keepdim=True), self.down)


class Shifted(styles.GroupedFunctional):
    """Rows whose number depends on data: torch's product needs them in order, and nothing says how many there are."""

    def dispatch(self, x, weights, index):
        flat = index.flatten()
        order = flat.argsort(stable=True)
        kept = order[weights.flatten()[order] > 0.3]
        counts = torch.bincount(flat[kept], minlength=styles.E)
        y = self.body(x[kept // self.k], counts) * weights.flatten()[kept, None]
        return torch.zeros_like(x).index_add(0, kept // self.k, y)


@pytest.mark.parametrize("strange, words", [
    (Unequal, ["the loop at styles.py", "not one over experts", "not the same code", "styles.py"]),
    (Ranked, ["the loop at test_styles.py", "y = expert(x[token])", "mixes an expert's rows", "y.softmax(0)"]),
    (Mixed, ["the product at test_styles.py", "as every expert on every token", "mixes tokens", "h.mean(1"]),
    (Shifted, ["the grouped product at styles.py", "F.grouped_mm", "is not a dispatch to experts"]),
], ids=lambda x: getattr(x, "__name__", ""))  # fmt: skip
def test_a_strange_block_stays_and_says_why(strange, words):
    """As it is written, correct, and with its source line, the style it is closest to, and the op that does not fit."""
    module = styles.build(strange)
    gm, reasons = recognised(module)
    assert "ted::permute" not in targets(gm)
    assert any(all(word in reason for word in words) for reason in reasons), reasons
