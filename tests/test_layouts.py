"""The layout table: each rule's result, and that local ops on local values give the global op, forward and backward."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tedcompile.layouts import MOVES, PMAX, RULES, E, NoRule, P, R, S, Sections
from tedcompile.layouts.views import split_dim_after_view
from tedcompile.mesh import MeshShape
from tedcompile.ops import ops
from tedcompile.passes import check, shard_tensors
from tedcompile.pipeline import Context
from tests.lockstep import captured, parity

TP = 2
IDS = torch.tensor([[0, 3, 5], [7, 2, 2]])
TARGET = torch.tensor([1, -100, 7, 0, 5])
INDEX = torch.tensor([[0, 2], [2, 0], [2, 3], [0, 3], [3, 2]])  # no row for expert 1
COUNTS = torch.tensor([3, 0, 4, 3])


class Operands(nn.Module):
    """A function of parameters of the given shapes, as a module."""

    def __init__(self, function, shapes):
        super().__init__()
        self.function = function
        generator = torch.Generator().manual_seed(len(shapes) + sum(map(sum, shapes)))
        for i, shape in enumerate(shapes):
            value = torch.randn(shape, dtype=torch.float64, generator=generator)
            self.register_parameter(f"p{i}", nn.Parameter(value))

    def forward(self):
        return self.function(*self.parameters())


def moe(x, weight, scores):
    rows, counts, perm, order = ops.permute(x, INDEX, 4)
    return ops.unpermute(ops.grouped_mm(rows, weight, counts), perm, order, scores.abs())


# name: (function, operand shapes, their layouts, layout of the result)
TABLE = {
    "add": (lambda a, b: a + b, [(4, 6), (4, 6)], [S(1), R], S(1)),
    "add_broadcast": (lambda a, b: a + b, [(4, 6), (4, 1)], [S(1), R], S(1)),
    "add_lower_rank": (lambda a, b: a + b, [(4, 6), (6,)], [S(0), R], S(0)),
    "add_higher_rank": (lambda a, b: a + b, [(6,), (4, 6)], [S(0), R], S(1)),
    "add_scalar": (lambda a: a + 1, [(4, 6)], [S(1)], S(1)),
    "mul": (lambda a, b: a * b, [(4, 6), (6,)], [S(1), R], S(1)),
    "sub_alpha": (lambda a, b: torch.sub(a, b, alpha=3), [(4, 6), (4, 6)], [S(1), S(1)], S(1)),
    "fused": (lambda a, b: a * b, [(4, 8), (8,)], [S(1, (4, 4)), R], S(1, (4, 4))),
    "where": (lambda a, b: torch.where(a > 0, a, b), [(4, 6), (6,)], [S(1), R], S(1)),
    "masked_fill": (lambda a, b: a.masked_fill(b > 0, 2.0), [(4, 6), (4, 1)], [S(1), R], S(1)),
    "clamp": (lambda a: a.clamp(max=0.5), [(4, 6)], [S(0)], S(0)),
    "partial_plus_bias": (lambda a, w, b: F.linear(a, w) + b, [(4, 6), (3, 6), (3,)], [S(1), S(1), R], P),
    "partial_plus_partial": (lambda a, b: a.sum(0) + b.sum(0), [(4, 6), (4, 6)], [S(0), S(0)], P),
    "partial_times_small": (lambda a, b: a.sum(0) * b, [(4, 6, 5), (6, 1)], [S(0), R], P),
    "partial_negated": (lambda a: -a.sum(0), [(4, 6)], [S(0)], P),
    "partial_scalar": (lambda a: a.sum(0) * 3.0, [(4, 6)], [S(0)], R),
    "partial_product": (lambda a, b: a.sum(0) * b.sum(0), [(4, 6), (4, 6)], [S(0), S(0)], R),
    "partial_gelu": (lambda a: F.gelu(a.sum(0)), [(4, 6)], [S(0)], R),
    "view_split": (lambda a: a.view(3, 4, 2), [(3, 8)], [S(1)], S(1)),
    "view_merge": (lambda a: a.reshape(3, 8), [(3, 4, 2)], [S(1)], S(1)),
    "view_leading": (lambda a: a.view(12, 5), [(4, 3, 5)], [S(0)], S(0)),
    "view_one": (lambda a: a.view(3, 1, 8), [(3, 8)], [S(1)], S(2)),
    "view_fused": (lambda a: a.view(3, 2, 4), [(3, 8)], [S(1, (4, 4))], S(2)),
    "flatten": (lambda a: a.flatten(1), [(3, 4, 2)], [S(1)], S(1)),
    "unflatten": (lambda a: a.unflatten(1, (4, 2)), [(3, 8)], [S(1)], S(1)),
    "view_joined": (lambda a: a.reshape(12, 2), [(3, 8)], [S(1)], S(0, (4, 4, 4))),
    "view_parted": (lambda a: a.reshape(3, 8), [(12, 2)], [S(0, (4, 4, 4))], S(1)),
    "view_mixed": (lambda a: a.reshape(8, 3), [(3, 8)], [S(1)], R),  # no rule: gathered
    "transpose": (lambda a: a.transpose(-1, 0), [(4, 5, 6)], [S(2)], S(0)),
    "t": (lambda a: a.t(), [(4, 6)], [S(1)], S(0)),
    "permute": (lambda a: a.permute(2, 0, -2), [(4, 5, 6)], [S(0)], S(1)),
    "unsqueeze": (lambda a: a.unsqueeze(1), [(4, 6)], [S(1)], S(2)),
    "unsqueeze_last": (lambda a: a.unsqueeze(-1), [(4, 6)], [S(1)], S(1)),
    "squeeze": (lambda a: a.squeeze(), [(1, 2, 1, 6)], [S(1)], S(0)),  # the local dim has size 1 as well
    "squeeze_dim": (lambda a: a.squeeze(0), [(2, 6)], [S(0)], S(0)),
    "expand": (lambda a: a.expand(3, -1, 6), [(4, 1)], [S(0)], S(1)),
    "repeat": (lambda a: a.repeat(3, 1, 2), [(4, 5)], [S(0)], S(1)),
    "repeat_along": (lambda a: a.repeat(2, 1), [(4, 5)], [S(0)], S(0, (4, 4))),
    "repeat_fused": (lambda a: a.repeat(2, 1), [(8, 5)], [S(0, (4, 4))], S(0, (4, 4, 4, 4))),
    "attention_fused": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v),
        [(2, 4, 3, 5)] * 3,
        [S(1, (2, 2))] * 3,
        S(1, (2, 2)),
    ),
    "repeat_heads": (lambda a: a.repeat_interleave(3, 1), [(2, 4, 5)], [S(1)], S(1)),
    "slice_other": (lambda a: a[:, 1:3], [(4, 6)], [S(0)], S(0)),
    "slice_all": (lambda a: a[-4:], [(4, 6)], [S(0)], S(0)),
    "slice_strided": (lambda a: a[:, 1::2], [(3, 8)], [S(1)], S(1)),
    "slice_strided_odd": (lambda a: a[:, ::3], [(3, 12)], [S(1)], S(1)),
    "slice_strided_uneven": (lambda a: a[:, ::3], [(3, 8)], [S(1)], R),
    "slice_section": (lambda a: a[:, 4:], [(3, 8)], [S(1, (4, 4))], S(1)),
    "slice_two_sections": (lambda a: a[:, :8], [(3, 12)], [S(1, (4, 4, 4))], S(1, (4, 4))),
    "slice_across": (lambda a: a[:, 2:6], [(3, 8)], [S(1, (4, 4))], R),
    "slice_part": (lambda a: a[:, 2:6], [(3, 8)], [S(1)], R),
    "complex": (
        lambda a, b: torch.view_as_real(torch.view_as_complex(a) * torch.view_as_complex(b)),
        [(4, 3, 2), (3, 2)],
        [S(0), R],
        S(0),
    ),
    "complex_parts": (lambda a: torch.view_as_real(torch.view_as_complex(a) * 2), [(4, 3, 2)], [S(2)], R),
    "complex_whole": (  # its gradient is one, too
        lambda a, w: F.linear(torch.view_as_real(torch.view_as_complex(a) * 1j).flatten(1), w),
        [(4, 3, 2), (8, 6)],
        [R, S(0)],
        S(1),
    ),
    "narrow_other": (lambda a: a.narrow(1, 1, 2), [(4, 6)], [S(0)], S(0)),
    "narrow_all": (lambda a: a.narrow(0, 0, 4), [(4, 6)], [S(0)], S(0)),
    "narrow_section": (lambda a: a.narrow(-1, 4, 4), [(3, 8)], [S(1, (4, 4))], S(1)),
    "narrow_two_sections": (lambda a: a.narrow(1, 4, 8), [(3, 12)], [S(1, (4, 4, 4))], S(1, (4, 4))),
    "narrow_part": (lambda a: a.narrow(1, 2, 4), [(3, 8)], [S(1)], R),
    "movedim": (lambda a: a.movedim(0, -1), [(4, 5, 6)], [S(0)], S(2)),
    "movedim_other": (lambda a: a.movedim(2, 0), [(5, 4, 3)], [S(1)], S(2)),
    "movedim_many": (lambda a: a.movedim((3, 0), (0, 2)), [(3, 5, 4, 7)], [S(2)], S(3)),
    "expand_as": (lambda a, b: a.expand_as(b) * b, [(4, 1), (3, 4, 6)], [S(0), R], S(1)),
    "expand_as_to_split": (lambda a, b: a.expand_as(b) * b, [(4, 1), (4, 6)], [R, S(1)], S(1)),
    "expand_as_sliced": (lambda a, b: a.expand_as(b) * b, [(6,), (4, 6)], [R, S(1)], S(1)),
    "expand_as_crossed": (lambda a, b: a.expand_as(b) * b, [(4, 1), (4, 6)], [S(0), S(1)], R),
    "select": (lambda a: a[:, 1], [(4, 6, 2)], [S(2)], S(1)),
    "select_along": (lambda a: a[1], [(4, 6)], [S(0)], R),
    "chunk": (lambda a: a.chunk(2, -1)[1], [(3, 8)], [S(1, (4, 4))], S(1)),
    "split_sizes": (lambda a: a.split([4, 2, 2], 1)[2], [(3, 8)], [S(1, (4, 2, 2))], S(1)),
    "split_other": (lambda a: a.split(2, 0)[1], [(4, 8)], [S(1)], S(1)),
    "split_wrong": (lambda a: a.split([2, 6], 1)[1], [(3, 8)], [S(1, (4, 4))], R),
    "unbind": (lambda a: a.unbind(0)[1], [(2, 4)], [S(1)], S(0)),
    "cat": (lambda a, b: torch.cat([a, b], -1), [(4, 3), (4, 5)], [S(0), R], S(0)),
    "cat_partial": (lambda a, b: torch.cat([a.sum(0), b.sum(0)]), [(4, 3), (4, 5)], [S(0), S(0)], P),
    "cat_mixed": (lambda a, b: torch.cat([a.sum(0), b]), [(4, 3), (5,)], [S(0), R], R),
    "cat_along": (lambda a, b: torch.cat([a, b]), [(4, 3), (4, 3)], [S(0), S(0)], R),
    "stack": (lambda a, b: torch.stack([a, b], 0), [(4, 3), (4, 3)], [S(0), R], S(1)),
    "pad": (lambda a: F.pad(a, (1, 2)), [(4, 3)], [S(0)], S(0)),
    "pad_along": (lambda a: F.pad(a, (1, 2)), [(4, 4)], [S(1)], R),
    "index": (lambda a: a[IDS], [(8, 4)], [S(1)], S(2)),
    "index_behind": (lambda a: a[:, IDS[0]], [(4, 8)], [S(0)], S(0)),
    "index_along": (lambda a: a[IDS], [(8, 4)], [S(0)], R),
    "index_select": (lambda a: a.index_select(-1, IDS[0]), [(4, 8)], [S(0)], S(0)),
    "flip": (lambda a: a.flip(0), [(4, 8)], [S(1)], S(1)),
    "flip_along": (lambda a: a.flip(-1), [(4, 8)], [S(1)], R),
    "roll": (lambda a: a.roll(1, 0), [(4, 8)], [S(1)], S(1)),
    "roll_flat": (lambda a: a.roll(1), [(4, 8)], [S(1)], R),
    "sum": (lambda a: a.sum(1), [(4, 6)], [S(0)], S(0)),
    "sum_before": (lambda a: a.sum(0), [(4, 6)], [S(1)], S(0)),
    "sum_keep": (lambda a: a.sum(0, keepdim=True), [(4, 6)], [S(1)], S(1)),
    "sum_along": (lambda a: a.sum((0, 1)), [(4, 6, 3)], [S(1)], P),
    "sum_all": (lambda a: a.sum(), [(4, 6)], [S(1)], P),
    "mean_along": (lambda a: a.mean(-1, keepdim=True), [(4, 6)], [S(1)], P),
    "mean_all": (lambda a: a.mean(), [(4, 6)], [S(1, (2, 4))], P),
    "mean_of_partial": (lambda a: a.sum(0).mean(), [(4, 6)], [S(0)], P),
    "amax": (lambda a: a.amax(1), [(4, 6)], [S(0)], S(0)),
    "amax_along": (lambda a: a.detach().amax(-1) + a.sum(-1), [(4, 6)], [S(1)], R),
    "amax_gradient": (lambda a: a.amax(-1), [(4, 6)], [S(1)], R),
    "amin_along": (lambda a: a.detach().amin(-1) + a.sum(-1), [(4, 6)], [S(1)], R),
    "softmax": (lambda a: a.softmax(-1), [(4, 6)], [S(0)], S(0)),
    "softmax_along": (lambda a: a.softmax(-1), [(4, 6)], [S(1)], R),
    "softmax_partial": (lambda a: a.sum(0).softmax(-1), [(4, 6)], [S(0)], R),
    "topk": (lambda a: a.topk(2)[0], [(4, 6)], [S(0)], R),
    "max": (lambda a: a.max(0)[0], [(4, 6)], [S(1)], S(0)),
    "max_keep": (lambda a: a - a.max(-1, keepdim=True).values, [(4, 6, 3)], [S(1)], S(1)),
    "max_along": (lambda a: a.max(0)[0], [(4, 6)], [S(0)], R),
    "rms_norm": (lambda a, w: F.rms_norm(a, (6,), w), [(4, 6), (6,)], [S(0), R], S(0)),
    "rms_norm_along": (lambda a, w: F.rms_norm(a, (6,), w), [(4, 6), (6,)], [S(1), R], R),
    "layer_norm": (lambda a, w, b: F.layer_norm(a, (6,), w, b), [(4, 6), (6,), (6,)], [S(0), R, R], S(0)),
    "layer_norm_along": (lambda a, w: F.layer_norm(a, (6,), w), [(4, 6), (6,)], [S(1), R], R),
    "square_mean": (lambda a: a * (a.square().mean(-1, keepdim=True) + 1).rsqrt(), [(4, 6)], [S(1)], S(1)),
    "column": (lambda x, w, b: F.linear(x, w, b), [(4, 6), (8, 6), (8,)], [R, S(0), S(0)], S(1)),
    "column_bias_whole": (lambda x, w, b: F.linear(x, w, b), [(4, 6), (8, 6), (8,)], [R, S(0), R], S(1)),
    "column_fused": (lambda x, w: F.linear(x, w), [(4, 6), (8, 6)], [R, S(0, (4, 4))], S(1, (4, 4))),
    "column_of_partial": (lambda x, w: F.linear(x.sum(0), w), [(4, 3, 6), (8, 6)], [S(0), S(0)], S(1)),
    "row": (lambda x, w, b: F.linear(x, w, b), [(4, 6), (3, 6), (3,)], [S(1), S(1), R], P),
    "row_sliced": (lambda x, w: F.linear(x, w), [(4, 6), (3, 6)], [R, S(1)], P),
    "row_whole_weight": (lambda x, w: F.linear(x, w), [(4, 6), (3, 6)], [S(1), R], R),
    "tokens": (lambda x, w, b: F.linear(x, w, b), [(4, 6), (3, 6), (3,)], [S(0), R, R], S(0)),
    "addmm_column": (lambda b, x, w: torch.addmm(b, x, w), [(8,), (4, 6), (6, 8)], [S(0), R, S(1)], S(1)),
    "addmm_row": (lambda b, x, w: torch.addmm(b, x, w), [(3,), (4, 6), (6, 3)], [R, S(1), S(0)], P),
    "addmm_matrix": (lambda b, x, w: torch.addmm(b, x, w), [(4, 8), (4, 6), (6, 8)], [R, R, S(1)], R),
    "addmm_scalar_bias": (lambda b, x, w: torch.addmm(b, x, w), [(1,), (4, 6), (6, 8)], [R, R, S(1)], R),
    "addmm_beta": (lambda b, x, w: torch.addmm(b, x, w, beta=2), [(8,), (4, 6), (6, 8)], [R, R, S(1)], R),
    "matmul_column": (lambda x, w: x @ w, [(2, 4, 6), (6, 8)], [R, S(1)], S(2)),
    "matmul_row": (lambda x, w: x @ w, [(2, 4, 6), (6, 3)], [S(2), S(0)], P),
    "matmul_heads": (lambda a, b: a @ b, [(2, 4, 5, 3), (2, 4, 3, 6)], [S(1), R], S(1)),
    "matmul_broadcast": (lambda a, b: a @ b, [(2, 4, 5, 3), (1, 3, 6)], [S(1), R], S(1)),
    "matmul_inner": (lambda a, b: a @ b, [(2, 5, 4), (2, 4, 6)], [S(2), S(1)], P),
    "matmul_inner_left": (lambda a, b: a @ b, [(2, 5, 4), (2, 4, 6)], [S(2), R], P),
    "matmul_inner_right": (lambda a, b: a @ b, [(2, 5, 4), (2, 4, 6)], [R, S(1)], P),
    "matmul_rows": (lambda a, b: a @ b, [(2, 4, 3), (2, 3, 6)], [S(1), R], S(1)),
    "matmul_columns": (lambda a, b: a @ b, [(2, 4, 3), (2, 3, 6)], [R, S(2)], S(2)),
    "matmul_crossed": (lambda a, b: a @ b, [(2, 4, 6), (2, 6, 4)], [S(1), S(2)], R),
    "matvec": (lambda a, b: a @ b, [(4, 6), (6,)], [S(1), R], R),
    "attention": (
        lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m, enable_gqa=True),
        [(2, 4, 5, 3), (2, 2, 5, 3), (2, 2, 5, 3), (2, 4, 5, 5)],
        [S(1), S(1), S(1), R],
        S(1),
    ),
    "attention_mask_broadcast": (
        lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m),
        [(2, 4, 5, 3)] * 3 + [(2, 1, 5, 5)],
        [S(1), R, R, R],
        S(1),
    ),
    "attention_three_heads": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
        [(2, 6, 5, 4), (2, 3, 5, 4), (2, 3, 5, 4)],
        [S(1), R, R],
        R,
    ),
    "attention_head_dim": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v), [(2, 2, 5, 4)] * 3, [S(3)] * 3, R),
    "embedding_vocabulary": (lambda w: F.embedding(IDS, w), [(8, 4)], [S(0)], P),
    "embedding_padding": (lambda w: F.embedding(IDS, w, padding_idx=2), [(8, 4)], [S(0)], P),
    "embedding_features": (lambda w: F.embedding(IDS, w), [(8, 4)], [S(1)], S(2)),
    "cross_entropy": (lambda x: F.cross_entropy(x, TARGET), [(5, 8)], [S(1)], R),
    "cross_entropy_sum": (lambda x: F.cross_entropy(x, TARGET, reduction="sum"), [(5, 8)], [S(1)], R),
    "cross_entropy_none": (lambda x: F.cross_entropy(x, TARGET, reduction="none"), [(5, 8)], [S(1)], R),
    "cross_entropy_ignore": (lambda x: F.cross_entropy(x, TARGET.abs() % 8, ignore_index=1), [(5, 8)], [S(1)], R),
    "cross_entropy_smooth": (lambda x: F.cross_entropy(x, TARGET, label_smoothing=0.1), [(5, 8)], [S(1)], R),
    "cross_entropy_tokens": (lambda x: F.cross_entropy(x.t(), TARGET[:4]), [(8, 4)], [S(1)], R),
    "experts_column": (moe, [(5, 6), (4, 6, 8), (5, 2)], [R, S(2), R], S(1)),
    "experts_row": (moe, [(5, 6), (4, 6, 3), (5, 2)], [S(1), S(1), R], P),
    "experts_tokens": (moe, [(5, 6), (4, 6, 3), (5, 2)], [R, R, R], R),
    "experts_partial_tokens": (lambda x, *o: moe(x.sum(0), *o), [(2, 5, 6), (4, 6, 8), (5, 2)], [S(0), S(2), R], S(1)),
    "per_expert": (lambda b, x: ops.per_expert(b, COUNTS, x) * x, [(4, 6), (10, 6)], [S(1), R], S(1)),
    "per_expert_along": (lambda b, x: ops.per_expert(b, COUNTS, x) * x, [(4, 6), (10, 6)], [S(0), R], R),
    "split_groups": (lambda x, w: ops.grouped_mm(x, w, COUNTS), [(10, 6), (4, 6, 3)], [S(0), R], R),
    "gather_sum": (
        lambda x, w: ops.gather_sum(F.linear(x, w), *ops.permute(x, INDEX, 4)[2:]),
        [(10, 6), (3, 6)],
        [S(1), S(1)],
        P,
    ),
    "zeros_like": (lambda a: a + torch.zeros_like(a), [(4, 6)], [S(1)], S(1)),
    "factory": (lambda a: a + a.new_ones(4, 6), [(4, 6)], [S(1)], S(1)),
    "detach": (lambda a: a.detach() * a, [(4, 6)], [S(1)], S(1)),
    "dtype": (lambda a: a.float().double(), [(4, 6)], [S(1)], S(1)),
    "no_rule": (lambda a: a.cumprod(0), [(4, 6)], [S(1)], R),
}


@pytest.mark.parametrize("name", TABLE)
def test_rule(name, monkeypatch):
    function, shapes, layouts, expected = TABLE[name]
    module = Operands(function, shapes)
    gm = captured(module, {}).gm
    placeholders = {n.meta["role"][1]: n for n in gm.graph.nodes if n.meta.get("role", ("",))[0] == "parameter"}
    ctx = Context(MeshShape(tp=TP), fixed={n: R for n in placeholders.values()})
    ctx.fixed |= {placeholders[f"p{i}"]: layout for i, layout in enumerate(layouts)}
    shard_tensors.run(gm, ctx)
    gm.graph.lint()
    check.check(gm, TP)
    (result,) = gm.graph.output_node().args[0]
    if expected != R:  # it was made whole for the output
        assert result.target in (ops.all_reduce.default, ops.gather.default)
        result = result.args[0]
    assert result.meta["layout"] == expected
    parity(module, [{}], MeshShape(tp=TP), monkeypatch, graph=(gm, ctx))


def test_every_move_has_its_layouts():
    kinds = {"R", "E", "S", "P", "D"}
    assert {k for move in MOVES for k in move} == kinds
    # an entered value's cotangent is lost when it is read as anything else
    assert not any(have == "E" for have, _ in MOVES)


def test_rules_are_of_ops_that_exist():
    assert all(isinstance(t, torch._ops.OpOverload) or t is torch.Tag.pointwise for t in RULES)


def test_layout_text_and_local_shape():
    assert [str(x) for x in (R, E, P, PMAX, S(1), S(0, (4, 4)))] == ["R", "E", "P", "P(max)", "S(1)", "S(0 of 4+4)"]
    assert S(1).local((3, 8, 5), 4) == (3, 2, 5)
    assert P.local((3, 8), 4) == (3, 8)


@pytest.mark.parametrize(
    "before, after, layout, expected",
    [
        ((3, 8), (3, 4, 2), S(1), S(1)),
        ((3, 8), (3, 2, 4), S(1), S(1)),
        ((3, 8), (1, 3, 8), S(1), S(2)),
        ((3, 4, 2), (3, 8), S(1), S(1)),
        ((4, 6), (24,), S(0), S(0)),
        ((3, 24), (3, 3, 4, 2), S(1), Sections),  # fused qkv, seen by its view
        ((3, 24), (3, 3, 4, 2), S(1, (8, 8, 8)), S(2)),
        ((3, 24), (3, 24), S(1, (8, 16)), S(1, (8, 16))),
        ((3, 24), (3, 3, 4, 2), S(1, (12, 12)), NoRule),
        ((3, 24), (3, 2, 3, 4), S(1, (12, 12)), NoRule),  # three heads of each section over two ranks
        ((3, 9), (3, 3, 3), S(1), NoRule),
        ((3, 8), (24,), S(1), S(0, (8, 8, 8))),
        ((65, 8), (520,), S(1), NoRule),
        ((3, 2, 8), (3, 4, 4), S(2), S(1, (2, 2))),  # heads of each slot
        ((3, 4, 4), (3, 2, 8), S(1, (2, 2)), S(2)),
        ((2, 3, 8), (6, 8), S(1), NoRule),
        ((4, 6), (8, 3), S(0), S(0)),
        ((8, 6), (12, 4), S(0), NoRule),
    ],
)
def test_split_dim_after_view(before, after, layout, expected):
    if isinstance(expected, type):
        with pytest.raises(expected):
            split_dim_after_view(before, after, layout, TP)
    else:
        assert split_dim_after_view(before, after, layout, TP) == expected
