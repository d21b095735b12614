"""A nanoGPT-like Mixture-of-Experts language model in plain PyTorch, and the lines that train it on four devices.

    torchrun --nproc-per-node 4 examples/nano_moe.py

The model knows nothing of parallelism. Letters in names: B batch, S sequence, T = B*S tokens, D width, H heads,
E experts, K experts per token, I inner width of an expert, V vocabulary.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class Config:
    vocab: int = 128
    block: int = 64  # longest sequence
    layers: int = 2
    heads: int = 4
    dim: int = 64
    experts: int = 8
    top_k: int = 2
    inner: int = 96
    dropout: float = 0.0


class Attention(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.heads, self.dropout = config.heads, config.dropout
        self.c_attn = nn.Linear(config.dim, 3 * config.dim)
        self.c_proj = nn.Linear(config.dim, config.dim)

    def forward(self, x_BSD: Tensor) -> Tensor:
        B, S, D = x_BSD.shape
        q, k, v = self.c_attn(x_BSD).split(D, dim=2)
        q, k, v = (t.view(B, S, self.heads, D // self.heads).transpose(1, 2) for t in (q, k, v))
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        y = self.c_proj(y.transpose(1, 2).reshape(B, S, D))
        return F.dropout(y, self.dropout, self.training)


class MoE(nn.Module):
    """Sends each token to its top K experts: sort the token slots by expert, multiply group by group, add back."""

    def __init__(self, config: Config):
        super().__init__()
        E, D, I = config.experts, config.dim, config.inner
        self.experts, self.top_k, self.dropout = E, config.top_k, config.dropout
        self.router = nn.Linear(D, E, bias=False)
        self.w_gate = nn.Parameter(torch.empty(E, D, I))
        self.w_up = nn.Parameter(torch.empty(E, D, I))
        self.w_down = nn.Parameter(torch.empty(E, I, D))

    def forward(self, x_BSD: Tensor) -> Tensor:
        x_TD = x_BSD.reshape(-1, x_BSD.size(-1))
        probs_TE = F.softmax(self.router(x_TD), dim=-1, dtype=torch.float32)
        weights_TK, experts_TK = probs_TE.topk(self.top_k, dim=-1)
        weights_TK = (weights_TK / weights_TK.sum(-1, keepdim=True)).to(x_TD.dtype)

        expert = experts_TK.flatten()  # of each of the T*K slots
        order = expert.argsort(stable=True)  # slots, sorted by expert
        token = order // self.top_k
        offsets_E = torch.bincount(expert, minlength=self.experts).cumsum(0).to(torch.int32)

        rows = x_TD[token]
        rows = F.silu(torch._grouped_mm(rows, self.w_gate, offsets_E)) * torch._grouped_mm(rows, self.w_up, offsets_E)
        rows = torch._grouped_mm(rows, self.w_down, offsets_E)
        rows = rows * weights_TK.flatten()[order].unsqueeze(-1)

        y_TD = torch.zeros_like(x_TD).index_add(0, token, rows)
        return F.dropout(y_TD.view_as(x_BSD), self.dropout, self.training)


class Block(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(config.dim), Attention(config)
        self.ln_2, self.moe = nn.LayerNorm(config.dim), MoE(config)

    def forward(self, x_BSD: Tensor) -> Tensor:
        x_BSD = x_BSD + self.attn(self.ln_1(x_BSD))
        return x_BSD + self.moe(self.ln_2(x_BSD))


class NanoMoE(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.dropout = config.dropout
        self.wte = nn.Embedding(config.vocab, config.dim)
        self.wpe = nn.Embedding(config.block, config.dim)
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.layers)])
        self.ln_f = nn.LayerNorm(config.dim)
        self.lm_head = nn.Linear(config.dim, config.vocab, bias=False)
        self.lm_head.weight = self.wte.weight  # one tensor, two uses
        for p in self.parameters():
            if p.dim() > 1:
                nn.init.normal_(p, std=0.02)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> Tensor:
        """Token ids (B, S) to logits (B, S, V); with targets (B, S) to the mean loss. Targets of -1 are ignored."""
        x_BSD = self.wte(idx) + self.wpe(torch.arange(idx.size(1), device=idx.device))
        x_BSD = F.dropout(x_BSD, self.dropout, self.training)
        for block in self.blocks:
            x_BSD = block(x_BSD)
        logits_BSV = self.lm_head(self.ln_f(x_BSD))
        if targets is None:
            return logits_BSV
        return F.cross_entropy(logits_BSV.flatten(0, 1).float(), targets.flatten(), ignore_index=-1)


def build(batch: int = 2, seq: int = 16, **config) -> tuple[NanoMoE, dict[str, Tensor]]:
    """The model and inputs of one training step. Keywords scale it: build(seq=1024, block=1024, dim=768, layers=12)."""
    model = NanoMoE(Config(**config))
    ids = torch.randint(model.wte.num_embeddings, (batch, seq + 1))
    return model, {"idx": ids[:, :-1].contiguous(), "targets": ids[:, 1:].contiguous()}


def main() -> None:
    import tedcompile

    device = "cuda" if torch.cuda.is_available() else "cpu"
    mesh = torch.distributed.init_device_mesh(device, (1, 2, 2), mesh_dim_names=("dp", "ep", "tp"))
    torch.manual_seed(0)  # the same weights on every rank
    model, example_inputs = build(batch=8, seq=64)
    model = tedcompile.parallelize(model.to(device), mesh, example_inputs=example_inputs)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    rank, world = tedcompile.data_rank(mesh), tedcompile.data_world(mesh)
    for step in range(100):
        torch.manual_seed(step * world + rank)  # each data rank its own batch: sequences that count up modulo 128
        ids = ((torch.randint(128, (8, 1)) + torch.arange(65)) % 128).to(device)
        loss = model(idx=ids[:, :-1].contiguous(), targets=ids[:, 1:].contiguous())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0 and torch.distributed.get_rank() == 0:
            print(f"step {step:3}  loss {loss.item():.4f}", flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
