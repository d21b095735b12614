"""The ways people write an MoE block, in plain PyTorch: `STYLES[name]()` is a small module of tokens (T, H).

T tokens, H width, E experts, K experts a token, I inner width of an expert, C capacity of an expert.
Every class is the code as its users write it; none knows of tedcompile.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

H, I, E, K = 8, 12, 4, 2


class MLP(nn.Module):
    """One expert, gated."""

    def __init__(self, bias: bool = False):
        super().__init__()
        self.w1, self.w3 = nn.Linear(H, I, bias=bias), nn.Linear(H, I, bias=bias)
        self.w2 = nn.Linear(I, H, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class FeedForward(nn.Module):
    """One expert as an nn.Sequential with biases."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(H, I), nn.GELU(), nn.Dropout(0.0), nn.Linear(I, H))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Moe(nn.Module):
    """A router and experts; `route` and `dispatch` are what styles vary."""

    def __init__(self, expert: Callable[[], nn.Module] | None = MLP, k: int = K):
        super().__init__()
        self.k = k
        self.gate = nn.Linear(H, E, bias=False)
        if expert is not None:
            self.experts = nn.ModuleList([expert() for _ in range(E)])

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and experts (T, K) of each token."""
        weights, index = self.gate(x).softmax(-1).topk(self.k)
        return weights / weights.sum(-1, keepdim=True), index

    def forward(self, x: Tensor) -> Tensor:
        return self.dispatch(x, *self.route(x))


# ---- 1. a loop over modules, with masks


class LoopWhere(Moe):
    """Old Mixtral: one-hot masks and index_add_."""

    def dispatch(self, x, weights, index):
        out = torch.zeros_like(x)
        mask = F.one_hot(index, E).permute(2, 1, 0)
        for e in range(E):
            slot, token = torch.where(mask[e])
            y = self.experts[e](x[None, token].reshape(-1, H)) * weights[token, slot, None]
            out.index_add_(0, token, y.to(x.dtype))
        return out


class LoopMask(Moe):
    """A boolean mask of tokens, and the weight summed over the slots."""

    def dispatch(self, x, weights, index):
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            mask = (index == e).any(-1)
            w = (weights * (index == e)).sum(-1)
            out[mask] += expert(x[mask]) * w[mask].unsqueeze(-1)
        return out


class LoopNonzero(Moe):
    """mistral-inference: positions by torch.where of the experts chosen, results added in place."""

    def dispatch(self, x, weights, index):
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            token, slot = torch.where(index == i)
            out[token] += weights[token, slot, None] * expert(x[token])
        return out


class LoopDense(Moe):
    """Every expert on every token, masked (no indices at all)."""

    def dispatch(self, x, weights, index):
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            w = torch.where(index == e, weights, 0).sum(-1, keepdim=True)
            out = out + w * expert(x)
        return out


class LoopSlots(Moe):
    """DeepSeek's training code: tokens repeated K times, each expert writes its own slots."""

    def dispatch(self, x, weights, index):
        slots = x.repeat_interleave(self.k, dim=0)
        flat = index.view(-1)
        y = torch.empty_like(slots)
        for e, expert in enumerate(self.experts):
            y[flat == e] = expert(slots[flat == e])
        return (y.view(*weights.shape, -1) * weights.unsqueeze(-1)).sum(dim=1)


# ---- 2. the same with control flow that depends on data


class LoopAny(Moe):
    def dispatch(self, x, weights, index):
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            mask = (index == e).any(dim=-1)
            if mask.any():
                w = (weights * (index == e)).sum(-1)
                out[mask] += expert(x[mask]) * w[mask].unsqueeze(-1)
        return out


class LoopContinue(Moe):
    def dispatch(self, x, weights, index):
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(index == e)
            if token.numel() == 0:
                continue
            out.index_add_(0, token, expert(x[token]) * weights[token, slot, None])
        return out


class LoopHit(Moe):
    """Over only the experts that are hit."""

    def dispatch(self, x, weights, index):
        out = torch.zeros_like(x)
        mask = F.one_hot(index, E).permute(2, 1, 0)
        hit = torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero()
        for e in hit:
            slot, token = torch.where(mask[e].squeeze(0))
            y = self.experts[e](x[token]) * weights[token, slot, None]
            out.index_add_(0, token, y)
        return out


class LoopHitStacked(Moe):
    """Today's Hugging Face eager experts: stacked weights, indexed by a tensor."""

    def __init__(self):
        super().__init__(None)
        self.gate_up_proj, self.down_proj = nn.Parameter(torch.empty(E, 2 * I, H)), nn.Parameter(torch.empty(E, H, I))

    def dispatch(self, x, weights, index):
        out = torch.zeros_like(x)
        with torch.no_grad():
            mask = F.one_hot(index, E).permute(2, 1, 0)
            hit = torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero()
        for e in hit:
            e = e[0]
            if e == E:
                continue
            slot, token = torch.where(mask[e])
            gate, up = F.linear(x[token], self.gate_up_proj[e]).chunk(2, dim=-1)
            y = F.linear(F.silu(gate) * up, self.down_proj[e]) * weights[token, slot, None]
            out.index_add_(0, token, y.to(out.dtype))
        return out


class LoopSplit(Moe):
    """DeepSeek's inference code, with gradients: rows sorted by expert, split by counts on the host."""

    def dispatch(self, x, weights, index):
        counts = torch.bincount(index.flatten(), minlength=E).tolist()
        order = index.view(-1).argsort()
        rows = x[order // self.k]
        outputs, start = [], 0
        for i, n in enumerate(counts):
            if n == 0:
                continue
            outputs.append(self.experts[i](rows[start : start + n]))
            start += n
        y = torch.cat(outputs)
        slots = torch.empty_like(y)
        slots[order] = y
        return (slots.view(*weights.shape, -1) * weights.unsqueeze(-1)).sum(dim=1)


# ---- 3. one-hot dispatch and combine with a capacity


class Stacked(Moe):
    """Weights (E, H, I) and (E, I, H), with biases."""

    def __init__(self, k: int = K):
        super().__init__(None, k)
        self.up, self.up_bias = nn.Parameter(torch.empty(E, H, I)), nn.Parameter(torch.empty(E, 1, I))
        self.down, self.down_bias = nn.Parameter(torch.empty(E, I, H)), nn.Parameter(torch.empty(E, 1, H))

    def body(self, x: Tensor) -> Tensor:
        """(E, C, H) to (E, C, H)."""
        return torch.baddbmm(self.down_bias, F.gelu(torch.baddbmm(self.up_bias, x, self.up)), self.down)


class OneHot(Stacked):
    """GShard: top-k, positions by cumsum, what is over the capacity is dropped."""

    factor = 1.0

    def masks(self, x: Tensor) -> Tensor:
        """The combine weights (T, E, C)."""
        T = x.shape[0]
        capacity = max(1, math.ceil(self.k * T / E * self.factor))
        weights, index = self.route(x)
        hot = F.one_hot(index, E)  # (T, K, E)
        position = (hot.transpose(0, 1).reshape(-1, E).cumsum(0) - 1).view(self.k, T, E).transpose(0, 1)
        kept = hot * (position < capacity)
        place = F.one_hot((position * kept).sum(-1), capacity)  # (T, K, C)
        return torch.einsum("tk,tke,tkc->tec", weights, kept.to(x.dtype), place.to(x.dtype))

    def forward(self, x):
        combine = self.masks(x)
        dispatch = combine.bool().to(x.dtype)
        rows = torch.einsum("tec,th->ech", dispatch, x)
        return torch.einsum("tec,ech->th", combine, self.body(rows))


class OneHotModules(OneHot):
    """DeepSpeed's sharded_moe: the experts are modules, each on its chunk."""

    def __init__(self):
        Moe.__init__(self, FeedForward)

    def body(self, x):
        return torch.cat([expert(chunk) for chunk, expert in zip(x.chunk(E, dim=0), self.experts)], dim=0)


class Switch(OneHot):
    """Top-1 with dropping, as matrix products."""

    factor = 0.75

    def __init__(self):
        super().__init__(k=1)

    def route(self, x):
        return self.gate(x).softmax(-1).topk(1)

    def forward(self, x):
        combine = self.masks(x)
        T = x.shape[0]
        dispatch = (combine > 0).to(x.dtype).reshape(T, -1)
        rows = (dispatch.t() @ x).reshape(E, -1, H)
        return combine.reshape(T, -1) @ self.body(rows).reshape(-1, H)


# ---- 4. dense


class DenseBmm(Stacked):
    """Llama-4's training code without its routing of inputs: every expert on every token, a weighted sum."""

    def dispatch(self, x, weights, index):
        scores = torch.zeros(x.shape[0], E, dtype=x.dtype).scatter(1, index, weights)
        y = self.body(x.repeat(E, 1).view(E, -1, H))
        return (y * scores.t().unsqueeze(-1)).sum(0)


class DenseEinsum(Stacked):
    def dispatch(self, x, weights, index):
        scores = torch.zeros(x.shape[0], E, dtype=x.dtype).scatter(1, index, weights)
        h = F.gelu(torch.einsum("th,ehi->tei", x, self.up) + self.up_bias[:, 0])
        return torch.einsum("tei,eih,te->th", h, self.down, scores)


class DenseInputs(Stacked):
    """Llama 4: the scores scale the inputs of every expert."""

    def dispatch(self, x, weights, index):
        scores = torch.zeros(x.shape[0], E, dtype=x.dtype).scatter(1, index, weights.sigmoid())
        rows = x.repeat(E, 1) * scores.transpose(0, 1).reshape(-1, 1)
        y = torch.bmm(F.silu(torch.bmm(rows.view(E, -1, H), self.up)), self.down)
        return y.reshape(E, -1, H).sum(0)


# ---- 6. weights gathered for each slot


class Gathered(Stacked):
    def dispatch(self, x, weights, index):
        T = x.shape[0]
        flat = index.reshape(-1)
        slots = x.repeat_interleave(self.k, 0)
        h = torch.bmm(slots.unsqueeze(1), self.up[flat]) + self.up_bias[flat]
        y = torch.bmm(F.gelu(h), self.down[flat]) + self.down_bias[flat]
        return (y.view(T, self.k, H) * weights[..., None]).sum(1)


class GatheredEinsum(Stacked):
    """Mixtral in gpt-fast: weights (T, K, H, I) and einsum."""

    def dispatch(self, x, weights, index):
        h = F.gelu(torch.einsum("th,tkhi->tki", x, self.up[index]))
        return torch.einsum("tki,tkih,tk->th", h, self.down[index], weights)


class GatheredMatmul(Stacked):
    def dispatch(self, x, weights, index):
        h = F.gelu(torch.matmul(x[:, None, None, :], self.up[index]) + self.up_bias[index])
        y = torch.matmul(h, self.down[index]) + self.down_bias[index]
        return (y.squeeze(2) * weights.unsqueeze(-1)).sum(1)


LOOPS = {c.__name__: c for c in (LoopWhere, LoopMask, LoopNonzero, LoopSlots)}
CONTROL = {c.__name__: c for c in (LoopAny, LoopContinue, LoopHit, LoopHitStacked, LoopSplit)}
ONE_HOT = {c.__name__: c for c in (OneHot, OneHotModules, Switch)}
DENSE = {c.__name__: c for c in (LoopDense, DenseBmm, DenseEinsum, DenseInputs)}
GATHERED = {c.__name__: c for c in (Gathered, GatheredEinsum, GatheredMatmul)}
STYLES: dict[str, Callable[[], nn.Module]] = LOOPS | CONTROL | ONE_HOT | DENSE | GATHERED
STYLES["LoopBiases"] = functools.partial(LoopContinue, functools.partial(MLP, bias=True))
STYLES["LoopSequential"] = functools.partial(LoopAny, FeedForward)


def build(name: str) -> nn.Module:
    """The module with random weights, the same on every call."""
    torch.manual_seed(0)
    module = STYLES[name]()
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(0, 0.5)
    return module
