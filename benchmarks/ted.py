"""DeepSpeed-TED's model (arXiv 2303.06318) in plain PyTorch: a GPT, every second layer with top-1 experts.

`Config()` is the paper's 40B: the 6.7B base model with 16 experts. What a module holds depends on its own sizes alone,
so the model may be built on the meta device.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.nano_moe import Attention


@dataclass
class Config:
    hidden_size: int = 4096
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_experts: int = 16
    num_experts_per_tok: int = 1
    vocab_size: int = 50304  # GPT-2's 50,257, padded
    max_position_embeddings: int = 2048


MOE_EVERY = 2


class FFN(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        H = config.hidden_size
        self.up, self.down = nn.Linear(H, 4 * H), nn.Linear(4 * H, H)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class MoE(nn.Module):
    """Each token through its best expert, times that expert's probability; tokens sorted by expert."""

    def __init__(self, config: Config):
        super().__init__()
        E, H = config.num_experts, config.hidden_size
        self.experts, self.top_k = E, config.num_experts_per_tok
        self.router = nn.Linear(H, E, bias=False)
        self.up, self.down = nn.Parameter(torch.empty(E, H, 4 * H)), nn.Parameter(torch.empty(E, 4 * H, H))

    def forward(self, x_BSH: Tensor) -> Tensor:
        x = x_BSH.flatten(0, 1)
        weights, index = F.softmax(self.router(x), dim=-1, dtype=torch.float32).topk(self.top_k, dim=-1)
        expert = index.flatten()
        order = expert.argsort(stable=True)
        token = order // self.top_k
        offsets = torch.bincount(expert, minlength=self.experts).cumsum(0).to(torch.int32)
        rows = F.gelu(torch._grouped_mm(x[token], self.up, offsets))
        rows = torch._grouped_mm(rows, self.down, offsets) * weights.to(x.dtype).flatten()[order].unsqueeze(-1)
        return torch.zeros_like(x).index_add(0, token, rows).view_as(x_BSH)


class Block(nn.Module):
    def __init__(self, config: Config, moe: bool):
        super().__init__()
        H = config.hidden_size
        self.ln_1, self.ln_2 = nn.LayerNorm(H), nn.LayerNorm(H)
        self.attn = Attention(SimpleNamespace(dim=H, heads=config.num_attention_heads, dropout=0.0))  # type: ignore
        self.ffn = MoE(config) if moe else FFN(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.ffn(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.wpe = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        moe = [i % MOE_EVERY == MOE_EVERY - 1 for i in range(config.num_hidden_layers)]
        self.blocks = nn.ModuleList(Block(config, m) for m in moe)
        self.ln_f = nn.LayerNorm(config.hidden_size)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.lm_head.weight = self.wte.weight
        self.apply(self._init_weights)

    @staticmethod
    def _init_weights(module: nn.Module) -> None:
        for p in module.parameters(recurse=False):
            if p.dim() > 1:
                nn.init.normal_(p, std=0.02)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        """Token ids (B, S) and labels (B, S) to the mean loss of predicting each next one."""
        x = self.wte(input_ids) + self.wpe(torch.arange(input_ids.size(1), device=input_ids.device))
        for block in self.blocks:
            x = block(x)
        logits = self.lm_head(self.ln_f(x))[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1).float(), labels[:, 1:].flatten())
