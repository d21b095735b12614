"""Rules of embeddings and of losses over a vocabulary."""

from __future__ import annotations

from tedcompile.layouts.core import Call, Layout, NoRule, P, R, S, aten, ndim, rule, val
from tedcompile.ops import ops


@rule(aten.embedding.default)
def _embedding(c: Call) -> Layout:
    weight, _ids, padding = c.node.args[0], c.node.args[1], c.arg(2, -1)
    if not any(c.node.args[3:]) and c.assign(weight, S(0)):
        c.emit = lambda w, i, *rest: ops.embedding_shard.default(w, i, padding, "tp")
        return P
    if c.layout(weight) == S(1):
        return S(ndim(c.node) - 1)
    return c.default()


def _cross_entropy_shard(x, target, weight=None, reduction=1, ignore=-100, smoothing=0.0):
    """Cross-entropy over a vocabulary split over tp; the logits are never whole on any rank (passes/fuse_loss.py)."""
    valid = aten.ne.Scalar(target, ignore)
    to = aten.where.self(valid, target, aten.zeros_like.default(target))
    biggest = ops.all_max.default(aten.amax.default(aten.detach.default(x), [-1], True), "tp")
    z = aten.sub.Tensor(x, biggest)
    total = ops.all_reduce.default(aten.sum.dim_IntList(aten.exp.default(z), [-1]), "tp")
    picked = ops.all_reduce.default(ops.pick.default(z, to, "tp"), "tp")
    losses = aten.sub.Tensor(aten.log.default(total), picked)
    losses = aten.where.self(valid, losses, aten.zeros_like.default(losses))
    if reduction == 0:
        return losses
    loss = aten.sum.default(losses)
    return aten.div.Tensor(loss, aten.sum.default(valid)) if reduction == 1 else loss


@rule(aten.cross_entropy_loss.default)
def _cross_entropy(c: Call) -> Layout:
    x, target, weight, smoothing = c.node.args[0], c.node.args[1], c.arg(2), c.arg(5, 0.0)
    layout = c.layout(x)
    if layout.kind != "S":
        return c.default()
    if layout != S(1) or ndim(x) != 2 or weight is not None or smoothing or ndim(target) != 1 or c.node.kwargs:
        raise NoRule("a weighted, smoothed or probabilistic cross-entropy of split logits")
    if val(target).is_floating_point():
        raise NoRule("a cross-entropy with class probabilities of split logits")
    c.emit = _cross_entropy_shard
    return R


@rule(ops.pick.default)
def _pick(c: Call) -> Layout:
    return P if c.layout(c.node.args[0]) == S(ndim(c.node.args[0]) - 1) else c.default()


@rule(ops.embedding_shard.default)
def _embedding_shard(c: Call) -> Layout:
    c.need(c.node.args[0], S(0))
    return P
