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


class LoopSplitMask(Moe):
    """JetMoe: counted in a mask of floats, experts with biases on what torch.split gives, rows joined by cat."""

    def __init__(self):
        super().__init__(FeedForward)

    def dispatch(self, x, weights, index):
        counts = torch.zeros(x.shape[0], E, dtype=x.dtype).scatter(1, index, 1).long().sum(0).tolist()
        order = index.flatten().argsort(stable=True)
        parts = x[order.div(self.k, rounding_mode="trunc")].split(counts)
        rows = torch.cat([expert(part) for expert, part in zip(self.experts, parts)])
        return torch.zeros_like(x).index_add(0, order // self.k, rows * weights.flatten()[order, None])


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


# ---- 5. sorted rows and torch's grouped products


def grouped_mm(rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """rows (N, H) in the order of the experts, weight (E, H, I), counts (E,) of rows."""
    return torch._grouped_mm(rows, weight, offs=counts.cumsum(0, dtype=torch.int32))


class GroupedMm(Moe):
    """torchtitan: sorted slots, counts by histc, scores before or after the experts, added back by scatter_add."""

    before, inner = False, I

    def __init__(self, k: int = K):
        super().__init__(None, k)
        self.w1, self.w3 = nn.Parameter(torch.empty(E, self.inner, H)), nn.Parameter(torch.empty(E, self.inner, H))
        self.w2 = nn.Parameter(torch.empty(E, H, self.inner))

    def body(self, rows: Tensor, counts: Tensor) -> Tensor:
        h = F.silu(grouped_mm(rows, self.w1.transpose(-2, -1), counts))
        h = h * grouped_mm(rows, self.w3.transpose(-2, -1), counts)
        return grouped_mm(h, self.w2.transpose(-2, -1), counts).type_as(rows)

    def dispatch(self, x, weights, index):
        counts = torch.histc(index.view(-1).float(), bins=E, min=0, max=E)
        order = torch.argsort(index.view(-1), stable=True)
        scores, token = weights.view(-1)[order], order // self.k
        spread = token.reshape(-1, 1).expand(-1, x.shape[-1])
        rows = torch.gather(x, dim=0, index=spread)
        if self.before:
            rows = (rows.to(torch.float32) * scores.reshape(-1, 1)).to(x.dtype)
        rows = self.body(rows, counts)
        if not self.before:
            rows = (rows.to(torch.float32) * scores.reshape(-1, 1)).to(x.dtype)
        return torch.zeros_like(x).scatter_add(dim=0, index=spread, src=rows)


class GroupedBefore(GroupedMm):
    before = True


class GroupedFunctional(GroupedMm):
    """F.grouped_mm, and the sum over slots as a product (torchtitan today)."""

    def body(self, rows, counts):
        offsets = torch.cumsum(counts, dim=0, dtype=torch.int32)
        h = F.silu(F.grouped_mm(rows, self.w1.transpose(-2, -1), offs=offsets))
        h = h * F.grouped_mm(rows, self.w3.transpose(-2, -1), offs=offsets)
        return F.grouped_mm(h, self.w2.transpose(-2, -1), offs=offsets)

    def dispatch(self, x, weights, index):
        counts = torch.histc(index.view(-1).float(), bins=E, min=0, max=E)
        order = torch.argsort(index.view(-1), stable=True)
        rows = self.body(x[order // self.k], counts)
        slots = torch.zeros_like(rows)
        slots[order] = rows
        return torch.bmm(weights.reshape(-1, 1, self.k), slots.reshape(-1, self.k, x.shape[-1])).squeeze(1)


class GroupedHalf(GroupedMm):
    """Products in bf16 whatever the parameters are, as torchtitan's are."""

    inner = 16  # torch wants rows of a multiple of 16 bytes

    def body(self, rows, counts):
        rows_, w1, w2, w3 = (t.bfloat16() for t in (rows, self.w1, self.w2, self.w3))
        h = F.silu(grouped_mm(rows_, w1.transpose(-2, -1), counts)) * grouped_mm(rows_, w3.transpose(-2, -1), counts)
        return grouped_mm(h, w2.transpose(-2, -1), counts).type_as(rows)


class GroupedPadded(GroupedMm):
    """Every expert's rows padded with zeros to a multiple of 8."""

    def dispatch(self, x, weights, index):
        flat = index.flatten()
        expert, order = flat.sort(stable=True)
        counts = torch.bincount(flat, minlength=E)
        padded = (counts + 7) // 8 * 8
        start, start_padded = counts.cumsum(0) - counts, padded.cumsum(0) - padded
        place = torch.arange(flat.numel(), device=x.device) - start[expert] + start_padded[expert]
        rows = x.new_zeros(flat.numel() + 8 * E, x.shape[-1]).index_copy(0, place, x[order // self.k])
        y = self.body(rows, padded)[place]
        return torch.zeros_like(x).index_add(0, order // self.k, y * weights.flatten()[order, None])


class GroupedPermuted(GroupedMm):
    """The padding as rows of zeros that indices point at: x with one row more, and places of -1."""

    def dispatch(self, x, weights, index):
        flat, m = index.flatten(), 8
        slots = flat.numel()
        counts = torch.bincount(flat, minlength=E)
        order = flat.argsort(stable=True)
        rows = x[order // self.k]
        padded = (counts + m - 1) // m * m
        ends = padded.cumsum(0)
        place = torch.arange(slots + m * E, device=x.device)
        expert = torch.searchsorted(ends, place, right=True).clamp(max=E - 1)
        within = place - (ends - padded)[expert]
        source = (counts.cumsum(0) - counts)[expert] + within
        source = torch.where((within < counts[expert]) & (place < ends[-1]), source, slots)
        y = self.body(torch.vstack((rows, rows.new_zeros(1, x.shape[-1])))[source], padded)
        back = y.new_zeros(slots + 1, x.shape[-1])
        back[source] = y
        return torch.zeros_like(x).index_add(0, order // self.k, back[:-1] * weights.flatten()[order, None])


class ExpertChoice(GroupedMm):
    """Every expert takes its best C tokens."""

    def forward(self, x):
        capacity = max(1, x.shape[0] * self.k // E)
        scores = self.gate(x).softmax(-1)
        weights, token = scores.t().topk(capacity, dim=-1)  # (E, C)
        counts = torch.full((E,), capacity, device=x.device)
        y = self.body(x[token.flatten()], counts) * weights.flatten()[:, None]
        return torch.zeros_like(x).index_add(0, token.flatten(), y)


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


# ---- 3. places of a capacity, filled in other ways


class ExpertChoiceBmm(Stacked):
    def forward(self, x):
        capacity = max(1, x.shape[0] * self.k // E)
        weights, token = self.gate(x).softmax(0).topk(capacity, dim=0)  # (C, E)
        y = self.body(x[token.t()]) * weights.t().unsqueeze(-1)
        return torch.zeros_like(x).index_add(0, token.t().reshape(-1), y.reshape(-1, H))


class ExpertChoiceOneHot(Stacked):
    """Zhou et al.: the choice as a permutation matrix (E, C, T)."""

    def forward(self, x):
        capacity = max(1, x.shape[0] * self.k // E)
        weights, token = self.gate(x).softmax(-1).t().topk(capacity, dim=-1)
        chosen = F.one_hot(token, x.shape[0]).to(x.dtype)
        y = self.body(torch.einsum("ect,th->ech", chosen, x))
        return torch.einsum("ect,ec,ech->th", chosen, weights, y)


class Buffers(Stacked):
    """Tutel, Megatron: slots are scattered to buffers (E*C, H), what is over the capacity to none."""

    def dispatch(self, x, weights, index):
        T, flat = x.shape[0], index.flatten()
        capacity = math.ceil(self.k * T / E)
        position = (F.one_hot(flat, E).cumsum(0) * F.one_hot(flat, E)).sum(-1) - 1
        kept = position < capacity
        place = torch.where(kept, flat * capacity + position, E * capacity)
        buffers = x.new_zeros(E * capacity + 1, H).index_copy(0, place, x.repeat_interleave(self.k, 0))
        y = self.body(buffers[:-1].view(E, capacity, H)).reshape(-1, H)
        y = torch.cat([y, y.new_zeros(1, H)])[place] * (weights.flatten() * kept)[:, None]
        return y.view(T, self.k, H).sum(1)


# ---- 7. parameters in other shapes, and what stands beside the experts


class Fused(LoopContinue):
    """A loop over stacked weights: [gate; up] in halves or interleaved, biases, a scale of every expert."""

    interleaved = transposed = False

    def __init__(self):
        super().__init__(None)
        shape = (E, H, 2 * I) if self.transposed else (E, 2 * I, H)
        self.gate_up, self.gate_up_bias = nn.Parameter(torch.empty(shape)), nn.Parameter(torch.empty(E, 2 * I))
        self.down = nn.Parameter(torch.empty((E, I, H) if self.transposed else (E, H, I)))
        self.down_bias, self.scale = nn.Parameter(torch.empty(E, H)), nn.Parameter(torch.empty(E))

    def expert(self, e: int, x: Tensor) -> Tensor:
        if self.transposed:
            h = x @ self.gate_up[e] + self.gate_up_bias[e]
        else:
            h = F.linear(x, self.gate_up[e], self.gate_up_bias[e])
        gate, up = (h[..., ::2], h[..., 1::2]) if self.interleaved else h.chunk(2, dim=-1)
        h = F.silu(gate) * up * self.scale[e]
        return h @ self.down[e] + self.down_bias[e] if self.transposed else F.linear(h, self.down[e], self.down_bias[e])

    @property
    def experts(self):
        return [functools.partial(self.expert, e) for e in range(E)]


class FusedTransposed(Fused):
    transposed = True


class FusedInterleaved(Fused):
    interleaved = True


class GroupedInterleaved(GroupedMm):
    """GPT-OSS: [gate, up] interleaved, biases of the rows' experts, over sorted rows."""

    def __init__(self):
        Moe.__init__(self, None)
        self.gate_up, self.gate_up_bias = nn.Parameter(torch.empty(E, H, 2 * I)), nn.Parameter(torch.empty(E, 2 * I))
        self.down, self.down_bias = nn.Parameter(torch.empty(E, I, H)), nn.Parameter(torch.empty(E, H))

    def body(self, rows, counts):
        counts = counts.long()
        expert = torch.repeat_interleave(torch.arange(E, device=rows.device), counts, output_size=rows.shape[0])
        h = grouped_mm(rows, self.gate_up, counts) + self.gate_up_bias[expert]
        gate, up = h[..., ::2].clamp(max=7.0), h[..., 1::2].clamp(-7.0, 7.0)
        return grouped_mm((up + 1) * gate * torch.sigmoid(1.702 * gate), self.down, counts) + self.down_bias[expert]


class DenseFused(Moe):
    """GPT-OSS's dense form: bmm with transposed weights, [gate; up] in halves."""

    def __init__(self):
        super().__init__(None)
        self.gate_up, self.down = nn.Parameter(torch.empty(E, 2 * I, H)), nn.Parameter(torch.empty(E, H, I))

    def dispatch(self, x, weights, index):
        scores = torch.zeros(x.shape[0], E, dtype=x.dtype).scatter(1, index, weights)
        gate, up = torch.bmm(x.expand(E, -1, -1), self.gate_up.transpose(1, 2)).chunk(2, dim=-1)
        y = torch.bmm(F.silu(gate) * up, self.down.mT)
        return (y * scores.t()[..., None]).sum(dim=0)


class Shared(LoopContinue):
    """A shared expert beside the routed ones."""

    def __init__(self):
        super().__init__()
        self.shared = MLP()

    def dispatch(self, x, weights, index):
        return super().dispatch(x, weights, index) + self.shared(x)


class SharedGated(Shared):
    """Qwen2-MoE: with a gate of its own."""

    def __init__(self):
        super().__init__()
        self.shared_gate = nn.Linear(H, 1, bias=False)

    def dispatch(self, x, weights, index):
        return LoopContinue.dispatch(self, x, weights, index) + self.shared_gate(x).sigmoid() * self.shared(x)


class GroupedShared(GroupedMm):
    """torchtitan: the routed rows are added onto what the shared expert makes."""

    def __init__(self):
        super().__init__()
        self.shared = MLP()

    def dispatch(self, x, weights, index):
        flat = index.flatten()
        order = flat.argsort(stable=True)
        y = self.body(x[order // self.k], flat.bincount(minlength=E)) * weights.flatten()[order, None]
        return self.shared(x).index_add(0, order // self.k, y)


LOOPS = {c.__name__: c for c in (LoopWhere, LoopMask, LoopNonzero, LoopSlots)}
CONTROL = {c.__name__: c for c in (LoopAny, LoopContinue, LoopHit, LoopHitStacked, LoopSplit, LoopSplitMask)}
ONE_HOT = {c.__name__: c for c in (OneHot, OneHotModules, Switch)}
DENSE = {c.__name__: c for c in (LoopDense, DenseBmm, DenseEinsum, DenseInputs)}
GATHERED = {c.__name__: c for c in (Gathered, GatheredEinsum, GatheredMatmul)}
GROUPED = {
    c.__name__: c for c in (GroupedMm, GroupedBefore, GroupedFunctional, GroupedPadded, GroupedPermuted, ExpertChoice)
}
CAPACITY = {c.__name__: c for c in (ExpertChoiceBmm, ExpertChoiceOneHot, Buffers)}
SHAPES = {c.__name__: c for c in (Fused, FusedTransposed, FusedInterleaved, GroupedInterleaved, DenseFused)}
SHARED = {c.__name__: c for c in (Shared, SharedGated, GroupedShared)}
STYLES: dict[str, Callable[[], nn.Module]] = LOOPS | CONTROL | ONE_HOT | DENSE | GATHERED
STYLES |= GROUPED | CAPACITY | SHAPES | SHARED
NUMBERS = {name: number for number, group in {1: LOOPS, 2: CONTROL, 3: ONE_HOT | CAPACITY, 4: DENSE, 5: GROUPED,
           6: GATHERED, 7: SHAPES | SHARED}.items() for name in group}  # fmt: skip
STYLES["LoopBiases"] = functools.partial(LoopContinue, functools.partial(MLP, bias=True))
STYLES["LoopSequential"] = functools.partial(LoopAny, FeedForward)
NUMBERS |= {"LoopBiases": 2, "LoopSequential": 2}


def build(make: Callable[[], nn.Module]) -> nn.Module:
    """The module with random weights, the same on every call."""
    torch.manual_seed(0)
    module = make()
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(0, 0.5)
    return module
