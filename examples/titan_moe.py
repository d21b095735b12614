"""A transformer with its Mixture of Experts as in torchtitan; nano_moe.py shows how to train it on many devices.

Sigmoid scores with a bias for the choice that counts of tokens balance, scores applied before the experts, a shared
expert. Letters in names: B batch, S sequence, T = B*S tokens, D width, E experts, K experts per token, I inner width of
an expert, N = T*K rows, V vocabulary.
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
    dim: int = 64
    experts: int = 8
    top_k: int = 2
    inner: int = 96
    route_scale: float = 2.0


class Attention(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.heads = config.heads
        self.wq, self.wk, self.wv = (nn.Linear(config.dim, config.dim, bias=False) for _ in range(3))
        self.wo = nn.Linear(config.dim, config.dim, bias=False)

    def forward(self, x_BSD: Tensor) -> Tensor:
        B, S, D = x_BSD.shape
        q, k, v = (w(x_BSD).view(B, S, self.heads, -1).transpose(1, 2) for w in (self.wq, self.wk, self.wv))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.wo(y.transpose(1, 2).reshape(B, S, D))


class FeedForward(nn.Module):
    def __init__(self, dim: int, inner: int):
        super().__init__()
        self.w1, self.w3 = nn.Linear(dim, inner, bias=False), nn.Linear(dim, inner, bias=False)
        self.w2 = nn.Linear(inner, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Router(nn.Module):
    """Tokens (T, D) to scores (T, K) and experts (T, K) of each token, and the number of tokens (E) of each expert."""

    def __init__(self, config: Config):
        super().__init__()
        self.top_k, self.route_scale = config.top_k, config.route_scale
        self.gate = nn.Linear(config.dim, config.experts, bias=False)

    def forward(self, x_TD: Tensor, bias_E: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scores_TE = torch.sigmoid(self.gate(x_TD).to(torch.float32))
        experts_TK = torch.topk(scores_TE + bias_E, k=self.top_k, dim=1).indices
        scores_TK = scores_TE.gather(dim=1, index=experts_TK)
        scores_TK = scores_TK / (scores_TK.sum(dim=-1, keepdim=True) + 1e-20) * self.route_scale
        E = scores_TE.size(1)
        return scores_TK, experts_TK, torch.histc(experts_TK.view(-1).float(), bins=E, min=0, max=E)


class GroupedExperts(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        E, D, I = config.experts, config.dim, config.inner
        self.w1, self.w3 = nn.Parameter(torch.empty(E, I, D)), nn.Parameter(torch.empty(E, I, D))
        self.w2 = nn.Parameter(torch.empty(E, D, I))

    def forward(self, rows_ND: Tensor, counts_E: Tensor) -> Tensor:
        offsets_E = torch.cumsum(counts_E, dim=0, dtype=torch.int32)
        h = F.silu(torch._grouped_mm(rows_ND, self.w1.transpose(-2, -1), offs=offsets_E))
        h = h * torch._grouped_mm(rows_ND, self.w3.transpose(-2, -1), offs=offsets_E)
        return torch._grouped_mm(h, self.w2.transpose(-2, -1), offs=offsets_E).type_as(rows_ND)


class MoE(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.top_k = config.top_k
        self.router, self.experts = Router(config), GroupedExperts(config)
        self.shared_experts = FeedForward(config.dim, config.inner)
        self.register_buffer("expert_bias", torch.zeros(config.experts))  # an optimizer hook moves it
        self.register_buffer("tokens_per_expert", torch.zeros(config.experts), persistent=False)

    def forward(self, x_BSD: Tensor) -> Tensor:
        x_TD = x_BSD.view(-1, x_BSD.size(-1))
        scores_TK, experts_TK, counts_E = self.router(x_TD, self.expert_bias)
        with torch.no_grad():
            self.tokens_per_expert.add_(counts_E)

        order_N = torch.argsort(experts_TK.view(-1), stable=True)
        scores_N, token_N = scores_TK.view(-1)[order_N], order_N // self.top_k
        token_ND = token_N.reshape(-1, 1).expand(-1, x_TD.size(-1))
        rows_ND = torch.gather(x_TD, dim=0, index=token_ND)
        rows_ND = (rows_ND.to(torch.float32) * scores_N.reshape(-1, 1)).to(x_TD.dtype)
        rows_ND = self.experts(rows_ND, counts_E)
        return self.shared_experts(x_TD).scatter_add(dim=0, index=token_ND, src=rows_ND).view_as(x_BSD)


class Block(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.attention_norm, self.attention = nn.RMSNorm(config.dim, eps=1e-5), Attention(config)
        self.ffn_norm, self.moe = nn.RMSNorm(config.dim, eps=1e-5), MoE(config)

    def forward(self, x_BSD: Tensor) -> Tensor:
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD))
        return x_BSD + self.moe(self.ffn_norm(x_BSD))


class TitanMoE(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.tok_embeddings = nn.Embedding(config.vocab, config.dim)
        self.layers = nn.ModuleDict({str(i): Block(config) for i in range(config.layers)})
        self.norm = nn.RMSNorm(config.dim, eps=1e-5)
        self.output = nn.Linear(config.dim, config.vocab, bias=False)
        for p in self.parameters():
            if p.dim() > 1:
                nn.init.normal_(p, std=0.02)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> Tensor:
        """Token ids (B, S) to logits (B, S, V); with targets (B, S) to the mean loss. Targets of -100 are ignored."""
        x_BSD = self.tok_embeddings(idx)
        for layer in self.layers.values():
            x_BSD = layer(x_BSD)
        logits_BSV = self.output(self.norm(x_BSD))
        if targets is None:
            return logits_BSV
        return F.cross_entropy(logits_BSV.flatten(0, 1).float(), targets.flatten())


def build(batch: int = 2, seq: int = 16, **config) -> tuple[TitanMoE, dict[str, Tensor]]:
    """The model and inputs of one training step. Keywords scale it: build(seq=1024, dim=768, heads=12, layers=12)."""
    model = TitanMoE(Config(**config))
    ids = torch.randint(model.config.vocab, (batch, seq + 1))
    return model, {"idx": ids[:, :-1].contiguous(), "targets": ids[:, 1:].contiguous()}
