"""A transformer with shared and routed experts in plain PyTorch; nano_moe.py shows how to train it on many devices.

Rotary embedding, grouped-query attention, GELU experts with biases, a sigmoid router, a load-balancing loss.

Letters in names: B batch, S sequence, T = B*S tokens, D width, H heads, G key/value heads, C width of a head,
E experts, K experts per token, I inner width of an expert, V vocabulary.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class Config:
    vocab: int = 128
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    dim: int = 64
    experts: int = 8
    top_k: int = 2
    inner: int = 96
    shared_inner: int = 128
    rope_theta: float = 10_000.0
    aux_weight: float = 0.01


def rotate(x_BHSC: Tensor, cos_SC: Tensor, sin_SC: Tensor) -> Tensor:
    low, high = x_BHSC.chunk(2, dim=-1)
    return x_BHSC * cos_SC + torch.cat((-high, low), dim=-1) * sin_SC


class Attention(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads, config.dim // config.heads
        self.q_proj = nn.Linear(config.dim, self.heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(config.dim, self.kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(config.dim, self.kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.heads * self.head_dim, config.dim, bias=False)

    def forward(self, x_BSD: Tensor, cos_SC: Tensor, sin_SC: Tensor) -> Tensor:
        B, S, _ = x_BSD.shape
        q_BHSC = self.q_proj(x_BSD).view(B, S, self.heads, self.head_dim).transpose(1, 2)
        k_BGSC = self.k_proj(x_BSD).view(B, S, self.kv_heads, self.head_dim).transpose(1, 2)
        v_BGSC = self.v_proj(x_BSD).view(B, S, self.kv_heads, self.head_dim).transpose(1, 2)
        q_BHSC, k_BGSC = rotate(q_BHSC, cos_SC, sin_SC), rotate(k_BGSC, cos_SC, sin_SC)
        y_BHSC = F.scaled_dot_product_attention(q_BHSC, k_BGSC, v_BGSC, is_causal=True, enable_gqa=True)
        return self.o_proj(y_BHSC.transpose(1, 2).reshape(B, S, -1))


class MLP(nn.Module):
    def __init__(self, dim: int, inner: int):
        super().__init__()
        self.up, self.down = nn.Linear(dim, inner), nn.Linear(inner, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Experts(nn.Module):
    """E two-layer GELU networks with biases, each applied to its own consecutive rows."""

    def __init__(self, config: Config):
        super().__init__()
        E, D, I = config.experts, config.dim, config.inner
        self.up, self.up_bias = nn.Parameter(torch.empty(E, D, I)), nn.Parameter(torch.zeros(E, I))
        self.down, self.down_bias = nn.Parameter(torch.empty(E, I, D)), nn.Parameter(torch.zeros(E, D))

    def forward(self, rows: Tensor, expert: Tensor, counts_E: Tensor) -> Tensor:
        """Rows (N, D) sorted by expert, the expert of each row (N) and the rows of each expert (E), to (N, D)."""
        offsets_E = counts_E.cumsum(0).to(torch.int32)
        rows = F.gelu(torch._grouped_mm(rows, self.up, offsets_E) + self.up_bias[expert])
        return torch._grouped_mm(rows, self.down, offsets_E) + self.down_bias[expert]


class MoE(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.num_experts, self.top_k = config.experts, config.top_k
        self.router = nn.Linear(config.dim, config.experts, bias=False)
        self.experts = Experts(config)
        self.shared = MLP(config.dim, config.shared_inner)

    def forward(self, x_BSD: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the output (B, S, D) and the load-balancing loss, which is 1 when all experts are used alike."""
        x_TD = x_BSD.flatten(0, 1)
        scores_TE = self.router(x_TD).float().sigmoid()
        weights_TK, experts_TK = scores_TE.topk(self.top_k, dim=-1)
        weights_TK = (weights_TK / weights_TK.sum(-1, keepdim=True)).to(x_TD.dtype)

        expert, order = experts_TK.flatten().sort(stable=True)  # order: the T*K slots, sorted by expert
        counts_E = F.one_hot(expert, self.num_experts).sum(0)
        rows = self.experts(x_TD[order // self.top_k], expert, counts_E)
        rows_TKD = rows[order.argsort()].view(*experts_TK.shape, -1)
        y_TD = (rows_TKD * weights_TK.unsqueeze(-1)).sum(1)

        share_E = counts_E / expert.numel()
        probs_E = (scores_TE / scores_TE.sum(-1, keepdim=True)).mean(0)
        return (y_TD + self.shared(x_TD)).view_as(x_BSD), self.num_experts * (share_E * probs_E).sum()


class Block(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.attn_norm, self.attn = nn.RMSNorm(config.dim, eps=1e-6), Attention(config)
        self.moe_norm, self.moe = nn.RMSNorm(config.dim, eps=1e-6), MoE(config)

    def forward(self, x_BSD: Tensor, cos_SC: Tensor, sin_SC: Tensor) -> tuple[Tensor, Tensor]:
        x_BSD = x_BSD + self.attn(self.attn_norm(x_BSD), cos_SC, sin_SC)
        y_BSD, aux_loss = self.moe(self.moe_norm(x_BSD))
        return x_BSD + y_BSD, aux_loss


class SharedExpertMoE(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab, config.dim)
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.layers)])
        self.norm = nn.RMSNorm(config.dim, eps=1e-6)
        self.lm_head = nn.Linear(config.dim, config.vocab, bias=False)
        for p in self.parameters():
            if p.dim() > 1:
                nn.init.normal_(p, std=0.02)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> Tensor:
        """Token ids (B, S) to logits (B, S, V); with targets (B, S) to the loss. Targets of -100 are ignored."""
        head_dim = self.config.dim // self.config.heads
        exponent = torch.arange(0, head_dim, 2, device=idx.device, dtype=torch.float32) / head_dim
        position_S = torch.arange(idx.size(1), device=idx.device, dtype=torch.float32)
        angle_SC = torch.outer(position_S, self.config.rope_theta**-exponent).repeat(1, 2)

        x_BSD = self.embed(idx)
        cos_SC, sin_SC = angle_SC.cos().to(x_BSD.dtype), angle_SC.sin().to(x_BSD.dtype)
        aux_losses = []
        for block in self.blocks:
            x_BSD, aux_loss = block(x_BSD, cos_SC, sin_SC)
            aux_losses.append(aux_loss)
        logits_BSV = self.lm_head(self.norm(x_BSD))
        if targets is None:
            return logits_BSV
        loss = F.cross_entropy(logits_BSV.flatten(0, 1).float(), targets.flatten())
        return loss + self.config.aux_weight * torch.stack(aux_losses).mean()


def build(batch: int = 2, seq: int = 16, **config) -> tuple[SharedExpertMoE, dict[str, Tensor]]:
    """The model and inputs of one training step. Keywords scale it: build(seq=1024, dim=768, heads=12, layers=12)."""
    model = SharedExpertMoE(Config(**config))
    ids = torch.randint(model.config.vocab, (batch, seq + 1))
    return model, {"idx": ids[:, :-1].contiguous(), "targets": ids[:, 1:].contiguous()}
