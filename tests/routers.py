"""The ways people route tokens, in front of experts of any style: `ROUTERS[name]()` is a module of tokens (T, H).

T tokens, H width, E experts, K experts a token. Every class is the code as its users write it. The experts are one loop
(`Looped`), but where a router drops tokens, which goes with a capacity.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.styles import E, H, K, LoopContinue, OneHot, Switch


class Router(LoopContinue):
    """Experts are a loop; subclasses vary `route`."""


# ---- scores


class SoftmaxTop1(Router):
    def __init__(self):
        super().__init__(k=1)

    def route(self, x):
        return self.gate(x).softmax(-1).topk(1)


class Argmax(Router):
    """Switch: the best expert, by max."""

    def __init__(self):
        super().__init__(k=1)

    def route(self, x):
        weight, index = self.gate(x).softmax(-1).max(-1, keepdim=True)
        return weight, index


class TopKSoftmax(Router):
    """Old Mixtral: the softmax of the best K logits."""

    def route(self, x):
        logits, index = self.gate(x).topk(self.k)
        return logits.softmax(-1), index


class Sigmoid(Router):
    def route(self, x):
        weights, index = self.gate(x).sigmoid().topk(self.k)
        return weights / (weights.sum(-1, keepdim=True) + 1e-9), index


class SigmoidLogits(Router):
    """Llama 4: the best logits, and sigmoids of those that stay."""

    def route(self, x):
        logits, index = self.gate(x).topk(self.k)
        masked = torch.full_like(self.gate(x), -math.inf).scatter(1, index, logits)
        return masked.sigmoid().gather(1, index), index


class ScatteredScores(Router):
    """The scores of all experts, zero where they are not chosen."""

    def route(self, x):
        scores = self.gate(x).softmax(-1)
        index = scores.topk(self.k).indices
        scores = torch.zeros_like(scores).scatter(1, index, scores.gather(1, index))
        return (scores / scores.sum(-1, keepdim=True)).gather(1, index), index


class Grouped(Router):
    """DeepSeek-V3: the best groups by their two best experts, a correction bias for the choice alone."""

    groups, best = 2, 1

    def __init__(self):
        super().__init__()
        self.register_buffer("correction", torch.linspace(-0.3, 0.3, E))

    def route(self, x):
        scores = self.gate(x).sigmoid()
        choice = scores + self.correction
        of_groups = choice.view(-1, self.groups, E // self.groups).topk(2, dim=-1).values.sum(-1)
        groups = of_groups.topk(self.best, dim=-1, sorted=False).indices
        mask = torch.zeros_like(of_groups).scatter(1, groups, 1)
        mask = mask.unsqueeze(-1).expand(-1, self.groups, E // self.groups).reshape(-1, E)
        index = choice.masked_fill(~mask.bool(), 0.0).topk(self.k, sorted=False).indices
        weights = scores.gather(1, index)
        return 2.5 * weights / (weights.sum(-1, keepdim=True) + 1e-20), index


class Balanced(Router):
    """A bias that counts of tokens move, outside autograd (loss-free balancing)."""

    def __init__(self):
        super().__init__()
        self.register_buffer("bias", torch.linspace(-0.1, 0.1, E))
        self.register_buffer("tokens", torch.zeros(E))

    def route(self, x):
        scores = self.gate(x).softmax(-1)
        index = (scores + self.bias).topk(self.k).indices
        with torch.no_grad():
            self.tokens.add_(F.one_hot(index, E).sum((0, 1)))
        return scores.gather(1, index), index


class Cosine(Router):
    """Scores are cosines with the experts' embeddings, over a learned temperature."""

    def __init__(self):
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(()))

    def route(self, x):
        cosine = F.linear(F.normalize(x, dim=-1), F.normalize(self.gate.weight, dim=-1))
        weights, index = (cosine / self.temperature.abs().clamp(min=0.05)).softmax(-1).topk(self.k)
        return weights, index


# ---- losses


class AuxLoss(Router):
    """Switch's load balancing loss and ST-MoE's z-loss beside the output."""

    def forward(self, x):
        logits = self.gate(x)
        scores = logits.softmax(-1)
        weights, index = scores.topk(self.k)
        share = F.one_hot(index, E).to(x.dtype).sum(1).mean(0)
        aux = E * (share * scores.mean(0)).sum()
        z = torch.logsumexp(logits, dim=-1).square().mean()
        return self.dispatch(x, weights, index), 0.01 * aux + 0.001 * z


# ---- estimators


class _Straight(torch.autograd.Function):
    """A hand-written estimate of the gradient of a choice, after SparseMixer (GRIN)."""

    @staticmethod
    def forward(ctx, scores, chosen, index, best):
        ctx.save_for_backward(chosen, index, best)
        ctx.experts = scores.shape[1]
        return chosen * best.to(chosen.dtype)

    @staticmethod
    def backward(ctx, g):
        chosen, index, best = ctx.saved_tensors
        g = g * chosen
        half = torch.where(best, g, g / 3)
        scores = torch.zeros(g.shape[0], ctx.experts, dtype=g.dtype, device=g.device).scatter_add(1, index, -half)
        return scores, half + g, None, None


class SparseMixer(Router):
    """Twice the best expert among those near the maximum, with a gradient estimator of its own."""

    jitter = 0.1

    def pick(self, scores: Tensor, logits: Tensor):
        top, index = logits.max(-1, keepdim=True)
        far = ((top - logits) / logits.abs().clamp(min=top.abs())) > 2 * self.jitter
        gates = logits.masked_fill(far, -torch.inf).softmax(-1)
        chosen = gates.gather(1, index)
        best = scores.argmax(-1, keepdim=True) == index
        return _Straight.apply(scores, chosen, index, best), index

    def route(self, x):
        scores = self.gate(x)
        first, i = self.pick(scores, scores)
        second, j = self.pick(scores, scores.scatter(1, i, -torch.inf))
        return torch.cat((first, second), dim=-1), torch.cat((i, j), dim=-1)


class StraightThrough(Router):
    """The forward weighs by 1, the gradient is that of the scores."""

    def route(self, x):
        weights, index = self.gate(x).softmax(-1).topk(self.k)
        return weights + (1 - weights).detach(), index


# ---- by token id


class Hash(Router):
    """Hash layers: the experts of a token are those of its id."""

    def __init__(self):
        super().__init__()
        del self.gate
        self.register_buffer("table", torch.stack([torch.randperm(E)[:K] for _ in range(32)]))

    def forward(self, x, ids):
        index = self.table[ids]
        return self.dispatch(x, torch.full(index.shape, 1 / self.k, dtype=x.dtype, device=x.device), index)


class Modulo(Router):
    """Top-1 by id, without a table."""

    def __init__(self):
        super().__init__(k=1)
        del self.gate

    def forward(self, x, ids):
        index = (ids * 7 + 3).remainder(E).unsqueeze(-1)
        return self.dispatch(x, torch.ones_like(index, dtype=x.dtype), index)


# ---- random


class Jitter(Router):
    """Switch: inputs of the router are scaled at random."""

    def route(self, x):
        noise = torch.empty_like(x).uniform_(1 - 1e-2, 1 + 1e-2)
        return self.gate(x * noise).softmax(-1).topk(self.k)


class Noisy(Router):
    """Shazeer et al.: noise of a learned width."""

    def __init__(self):
        super().__init__()
        self.width = nn.Linear(H, E, bias=False)

    def route(self, x):
        logits = self.gate(x)
        logits, index = (logits + torch.randn_like(logits) * F.softplus(self.width(x))).topk(self.k)
        return logits.softmax(-1), index


class Gumbel(Router):
    def route(self, x):
        logits = self.gate(x)
        noise = -torch.log(-torch.log(torch.rand_like(logits).clamp(1e-6, 1 - 1e-6)))
        index = (logits + noise).topk(self.k).indices
        return logits.softmax(-1).gather(1, index), index


class Random(Router):
    """Random routing (THOR): any experts, alike."""

    def route(self, x):
        index = torch.rand(x.shape[0], E, device=x.device).argsort(-1)[:, : self.k]
        return self.gate(x).sigmoid().gather(1, index), index


class RandomSecond(Router):
    """GShard: the second expert is used in proportion to its weight."""

    def route(self, x):
        weights, index = self.gate(x).softmax(-1).topk(2)
        used = 2 * weights[:, 1] > torch.rand(x.shape[0], device=x.device)
        return weights * torch.stack([torch.ones_like(used), used], dim=1), index


class RandomTokens(Switch):
    """DeepSpeed's Random Token Selection: over capacity, tokens are dropped by lot, not by position."""

    def masks(self, x):
        T = x.shape[0]
        capacity = max(1, math.ceil(T / E * self.factor))
        weights, index = self.route(x)
        hot = F.one_hot(index[:, 0], E).to(x.dtype)  # (T, E)
        lots = hot * torch.rand_like(hot)
        kept = torch.zeros_like(hot).scatter(0, lots.topk(capacity, dim=0).indices, 1.0) * hot
        place = F.one_hot(((kept.cumsum(0) - 1) * kept).sum(1).long(), capacity).to(x.dtype)
        return torch.einsum("t,te,tc->tec", weights[:, 0], kept, place)


class SecondPlace(OneHot):
    """GShard's top-2 without topk: argmax, and argmax of what is left."""

    def route(self, x):
        scores = self.gate(x).softmax(-1)
        first = scores.argmax(-1)
        rest = scores.masked_fill(F.one_hot(first, E).bool(), 0.0)
        second = rest.argmax(-1)
        index = torch.stack([first, second], dim=-1)
        weights = scores.gather(1, index)
        return weights / weights.sum(-1, keepdim=True), index


SCORES = (SoftmaxTop1, Argmax, TopKSoftmax, Sigmoid, SigmoidLogits, ScatteredScores, Grouped, Balanced, Cosine)
OTHERS = (AuxLoss, SparseMixer, StraightThrough, Hash, Modulo, SecondPlace)
RANDOM = (Jitter, Noisy, Gumbel, Random, RandomSecond, RandomTokens)
ROUTERS: dict[str, Callable[[], nn.Module]] = {c.__name__: c for c in (*SCORES, *OTHERS, *RANDOM)}
