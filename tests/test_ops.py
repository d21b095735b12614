"""Each op's value and VJP against a dense reference that autograd differentiates; the moves in two real processes."""

import multiprocessing
import os
import tempfile

import pytest
import torch
import torch.distributed as dist

from tedcompile import compat
from tedcompile.ops import ops

T, K, E = 7, 2, 4
ROUTINGS = {
    "spread": torch.tensor([[0, 1], [2, 3], [1, 0], [3, 2], [0, 3], [1, 2], [2, 0]]),
    "an expert without rows": torch.tensor([[0, 2], [2, 3], [3, 0], [3, 2], [0, 3], [3, 2], [2, 0]]),
    "one expert": torch.full((T, K), 2),
    "no tokens": torch.zeros(0, K, dtype=torch.int64),
}


def tensor(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def same(got, want, inputs, **tolerance):
    """Equal values, and equal gradients for a random cotangent."""
    torch.testing.assert_close(got, want, **tolerance)
    g = torch.randn(want.shape, dtype=want.dtype, generator=torch.Generator().manual_seed(9))
    for a, b in zip(*(torch.autograd.grad(y, inputs, g, retain_graph=True) for y in (got, want)), strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, **tolerance)


def dense_rows(x, index):
    """Rows by expert, then by token, then by slot: (rows, slots)."""
    slots = [(t, k) for e in range(E) for t in range(len(index)) for k in range(K) if index[t, k] == e]
    tokens = torch.tensor([t for t, _ in slots], dtype=torch.int64)
    return x[tokens], slots


@pytest.mark.parametrize("index", ROUTINGS.values(), ids=ROUTINGS)
def test_permute(index):
    x = tensor(len(index), 5)
    rows, counts, perm, order = ops.permute(x, index, E)
    want, slots = dense_rows(x, index)
    same(rows, want, [x])
    assert counts.tolist() == [int((index == e).sum()) for e in range(E)]
    assert order.tolist() == [t * K + k for t, k in slots]
    assert torch.equal(perm.flatten()[order], torch.arange(index.numel()))


@pytest.mark.parametrize("index", ROUTINGS.values(), ids=ROUTINGS)
def test_unpermute_and_gather_sum(index):
    x, weights = tensor(len(index), 5), tensor(len(index), K, seed=1)
    rows, counts, perm, order = ops.permute(x.detach(), index, E)
    rows = (rows * torch.arange(1, 1 + len(rows), dtype=rows.dtype)[:, None]).requires_grad_()
    token = order // K
    scaled = rows * weights.flatten()[order, None]
    same(ops.unpermute(rows, perm, order, weights), torch.zeros_like(x).index_add(0, token, scaled), [rows, weights])
    same(ops.gather_sum(rows, perm, order), torch.zeros_like(x).index_add(0, token, rows), [rows])


def test_unpermute_keeps_each_operands_dtype():
    index = ROUTINGS["spread"]
    rows, weights = tensor(T * K, 6, dtype=torch.bfloat16), tensor(T, K, dtype=torch.float32)
    _, _, perm, order = ops.permute(torch.zeros(T, 6), index, E)
    out = ops.unpermute(rows, perm, order, weights)
    assert out.dtype == torch.float32
    a, b = torch.autograd.grad(out.sum(), [rows, weights])
    assert (a.dtype, b.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("k", [1, 3])
def test_other_numbers_of_experts_a_token(k):
    index = torch.randint(E, (5, k), generator=torch.Generator().manual_seed(k))
    x = tensor(5, 3)
    rows, counts, perm, order = ops.permute(x, index, E)
    same(ops.gather_sum(rows, perm, order), x * k, [x])


COUNTS = {"spread": [3, 4, 2, 5], "holes": [0, 9, 0, 5], "last empty": [14, 0, 0, 0], "no rows": [0, 0, 0, 0]}


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("h, i", [(4, 8), (5, 3), (1, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_grouped_mm(counts, h, i, dtype):
    counts = torch.tensor(counts)
    rows, weight = tensor(int(counts.sum()), h, dtype=dtype), tensor(E, h, i, dtype=dtype, seed=1)
    spread = weight.repeat_interleave(counts, 0)  # (N, H, I)
    same(ops.grouped_mm(rows, weight, counts), (rows[:, :, None] * spread).sum(1), [rows, weight], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_grouped_mm_of_a_transposed_weight(counts):
    counts = torch.tensor(counts)
    rows, weight = tensor(int(counts.sum()), 8, dtype=torch.float32), tensor(E, 12, 8, dtype=torch.float32, seed=1)
    want = torch.einsum("nh,nih->ni", rows, weight.repeat_interleave(counts, 0))
    same(ops.grouped_mm(rows, weight.transpose(1, 2), counts), want, [rows, weight], rtol=1e-4, atol=1e-5)


def test_grouped_mm_of_strided_rows():
    counts = torch.tensor(COUNTS["holes"])
    wide, weight = tensor(14, 16, dtype=torch.float32), tensor(E, 5, 8, dtype=torch.float32, seed=1)
    rows = wide[:, 1::3]
    want = torch.einsum("nh,nhi->ni", rows, weight.repeat_interleave(counts, 0))
    same(ops.grouped_mm(rows, weight, counts), want, [wide, weight], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_per_expert(counts):
    counts = torch.tensor(counts)
    bias, rows = tensor(E, 5), tensor(int(counts.sum()), 2)
    same(ops.per_expert(bias, counts, rows), bias.repeat_interleave(counts, 0), [bias])


def test_take():
    x, order = tensor(6, 3), torch.tensor([3, 1, 5, 0, 2, 4])
    same(ops.take(x, order, order.argsort()), x[order], [x])


def test_regroup():
    received = torch.tensor([[2, 0, 1], [1, 3, 0]])
    order, inverse = ops.regroup(received, torch.zeros(7, 2))
    assert order.tolist() == [0, 1, 3, 4, 5, 6, 2]  # by expert, then by source, then as they came
    assert torch.equal(inverse[order], torch.arange(7))


def test_vjps_by_gradcheck():
    index = ROUTINGS["an expert without rows"]
    _, counts, perm, order = ops.permute(torch.zeros(T, 3), index, E)
    cases = [
        (lambda x: ops.permute(x, index, E)[0], [(T, 3)]),
        (lambda y, w: ops.unpermute(y, perm, order, w), [(T * K, 3), (T, K)]),
        (lambda y, w: ops.grouped_mm(y, w, counts), [(T * K, 3), (E, 3, 2)]),
        (lambda b: ops.per_expert(b, counts, order), [(E, 2)]),
    ]
    for function, shapes in cases:
        assert torch.autograd.gradcheck(function, [tensor(*s) for s in shapes])


def test_rand_replays_and_differs():
    like = torch.zeros(50, 40)
    draw = lambda seed, salt: ops.rand(like, ops.site(torch.tensor(seed), salt), "uniform", "")
    assert torch.equal(draw(1, 2), draw(1, 2))
    assert not torch.equal(draw(1, 2), draw(1, 3)) and not torch.equal(draw(1, 2), draw(2, 2))
    assert draw(1, 2).min() >= 0 and draw(1, 2).max() < 1 and abs(draw(1, 2).mean() - 0.5) < 0.03


def part(whole, rank, dim, sections=()):
    return torch.cat([s.chunk(2, dim)[rank] for s in whole.split(sections or whole.shape[dim], dim)], dim)


def moves(rank):
    """On each of two ranks: the moves' values and VJPs by their definitions."""
    axis = "test_ops_axis"
    compat.register_group(axis, dist.group.WORLD)
    whole, g = tensor(8, 6).detach(), [tensor(8, 6, seed=s).detach() for s in (1, 2)]
    x = whole.clone().requires_grad_()
    close = torch.testing.assert_close

    def vjp(y, cotangent):
        return torch.autograd.grad(y, x, cotangent)[0]

    y = ops.enter(x, axis)
    close(y, x)
    close(vjp(y, g[rank]), g[0] + g[1])
    y = ops.share(x, 2, axis)
    close(ops.all_reduce(y, axis), x)
    close(vjp(y, g[0]), g[0])
    x = g[rank].clone().requires_grad_()
    y = ops.all_reduce(x, axis)
    close(y, g[0] + g[1])
    close(vjp(y, whole), whole)
    close(ops.all_max(g[rank], axis), torch.maximum(*g))
    for dim, sections in ((0, []), (1, []), (0, [2, 6]), (1, [2, 4])):
        x = whole.clone().requires_grad_()
        y = ops.slice(x, dim, 2, sections, axis)
        close(y, part(whole, rank, dim, sections))
        close(vjp(y, part(g[0], rank, dim, sections)), g[0])
        x = part(whole, rank, dim, sections).requires_grad_()
        y = ops.gather(x, dim, 2, sections, axis)
        close(y, whole)
        close(vjp(y, g[0]), part(g[0], rank, dim, sections))
    counts = torch.tensor([[1, 0, 2, 3], [0, 4, 0, 1]])  # of each rank, for its experts 0 to 3
    received = ops.exchange_counts(counts[rank], 2, axis)
    assert received.tolist() == [counts[r, 2 * rank : 2 * rank + 2].tolist() for r in range(2)]
    splits = ops.splits(counts[rank], received)
    assert splits.tolist() == [[1, 5], [1, 4]] if rank == 0 else [[4, 1], [5, 1]]
    x = (10 * rank + torch.arange(float(counts[rank].sum())))[:, None].requires_grad_()
    there = ops.all_to_all(x, splits, axis)
    assert there.flatten().tolist() == ([0, 10, 11, 12, 13] if rank == 0 else [1, 2, 3, 4, 5, 14])
    home = ops.all_to_all_like(there * 2, splits.flip(0), x, axis)
    close(home, 2 * x)
    close(vjp(home, x.detach() + 1), 2 * (x.detach() + 1))
    weight, ids = tensor(8, 3).detach(), torch.tensor([[0, 5], [7, 3]])
    x = part(weight, rank, 0).requires_grad_()
    y = ops.all_reduce(ops.embedding_shard(x, ids, 3, axis), axis)
    close(y, weight[ids])
    want = torch.zeros(8, 3, dtype=torch.float64).index_put(
        (torch.tensor([0, 5, 7]),), torch.ones((), dtype=torch.float64)
    )
    close(vjp(y, torch.ones_like(y)), part(want, rank, 0))  # nothing for the padding index 3
    logits, target = tensor(4, 6).detach(), torch.tensor([0, 5, 2, 3])
    x = part(logits, rank, 1).requires_grad_()
    y = ops.all_reduce(ops.pick(x, target, axis), axis)
    close(y, logits[range(4), target])
    close(vjp(y, torch.ones_like(y)), part(torch.nn.functional.one_hot(target, 6).double(), rank, 1))
    assert int(ops.rank(x, axis)) == rank


def process(rank, path):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    try:
        moves(rank)
    finally:
        dist.destroy_process_group()


def test_moves_in_two_processes():
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("spawn")
        ranks = [context.Process(target=process, args=(r, os.path.join(folder, "store"))) for r in range(2)]
        for p in ranks:
            p.start()
        for p in ranks:
            p.join(60)
        for p in ranks:
            if p.is_alive():
                p.kill()
        assert [p.exitcode for p in ranks] == [0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_products_have_the_strides_that_inductor_is_told(dtype):
    """torch pads the rows of a result whose width is no multiple of 16 bytes."""
    rows, counts = tensor(6, 16, dtype=dtype).detach(), torch.tensor([2, 0, 3, 1])
    assert ops.grouped_mm(rows, tensor(4, 16, 10, dtype=dtype).detach(), counts).stride() == (10, 1)
    assert ops.grouped_outer(rows, rows[:, :10].contiguous(), counts).stride() == (160, 10, 1)
    assert ops.grouped_outer(tensor(6, 10, dtype=dtype).detach(), rows, counts).stride() == (160, 16, 1)
