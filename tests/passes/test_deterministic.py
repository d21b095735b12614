"""Sums into indexed places under tensor parallelism: which become ordered ops, and that they mean the same."""

from __future__ import annotations

import types

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from tedcompile.mesh import MeshShape
from tedcompile.ops import ops
from tedcompile.passes import deterministic

x, values = torch.randn(6, 4), torch.randn(6, 4)
rows = torch.tensor([0, 4, 4, 1, 0, 4])
table = torch.tensor([[0, 1, 2, 3], [4, 4, 4, 4], [1, 1, 0, 4]])
CASES = {
    "index_put": (lambda x, v: x.index_put((rows,), v, accumulate=True), ops.sum_into.default),
    "index_put into columns": (
        lambda x, v: torch.ops.aten.index_put(x.t(), [None, rows], v.t(), True), ops.sum_into.default),
    "index_add": (lambda x, v: x.index_add(0, rows, v), ops.sum_into.default),
    "index_add along the last": (lambda x, v: x.t().index_add(-1, rows, v.t()), ops.sum_into.default),
    "index_add scaled": (lambda x, v: x.index_add(0, rows, v, alpha=2), ops.sum_into.default),
    "a mask": (lambda x, v: torch.ops.aten.index_put(x, [rows == 4], v[:3], True), ops.sum_into.default),
    "scatter_add": (lambda x, v: x.scatter_add(0, table, v), ops.sum_along.default),
    "scatter_add along the last": (lambda x, v: x.scatter_add(1, table[:, :2] % 4, v), ops.sum_along.default),
    "embedding": (
        lambda x, v: torch.ops.aten.embedding_dense_backward(v, rows, 6, -1, False), ops.embedding_vjp.default),
    "scatter_reduce": (lambda x, v: x.scatter_reduce(0, table, v, "sum"), ops.sum_along.default),
}  # fmt: skip
STAY = {
    "no sum": lambda x, v: x.index_put((rows[:1],), v[:1]),
    "a maximum": lambda x, v: x.scatter_reduce(0, table, v, "amax"),
    "a sum without what is there": lambda x, v: x.scatter_reduce(0, table, v, "sum", include_self=False),
    "integers": lambda x, v: x.long().scatter_add(0, table, v.long()),
}


def rewritten(function, tp, dp=1):
    gm = make_fx(function)(x, values)
    deterministic.run(gm, types.SimpleNamespace(shape=MeshShape(dp=dp, tp=tp)))
    gm.recompile()
    return gm, [n.target for n in gm.graph.nodes]


@pytest.mark.parametrize("name", CASES)
def test_sums_become_ordered(name):
    function, target = CASES[name]
    gm, targets = rewritten(function, 2)
    assert targets.count(target) == 1
    assert torch.allclose(gm(x, values), function(x, values))
    assert target not in rewritten(function, 1)[1]
    assert (target in rewritten(function, 1, dp=2)[1]) == (name == "embedding")


@pytest.mark.parametrize("name", STAY)
def test_what_only_looks_like_a_sum_stays(name):
    gm, targets = rewritten(STAY[name], 2)
    assert not {ops.sum_into.default, ops.sum_along.default} & set(targets)
    assert torch.equal(gm(x, values), STAY[name](x, values))
