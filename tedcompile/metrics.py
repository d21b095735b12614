"""What a training run tells: a bar on terminals, a line every few steps, metrics.jsonl, TensorBoard where installed."""

from __future__ import annotations

import json
import math
import resource
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

FORMATS = {
    "loss": "loss {:.4f}",
    "aux_loss": "aux {:.4f}",
    "eval_loss": "held-out loss {:.4f}",
    "gradient_norm": "norm {:.2f}",
    "expert_entropy": "entropy {:.3f}",
    "lr": "lr {:.1e}",
    "tokens_per_second": "{:,.0f} tokens/s",
    "mfu": "MFU {:.1%}",
    "memory_gib": "{:.1f} GiB",
}


class Report:
    """Of rank 0; the others' do nothing. `start`: the step that a resumed run goes on from; later lines are dropped."""

    def __init__(self, folder: Path, steps: int, start: int, every: int, first: bool):
        self.steps, self.every, self.first = steps, every, first
        self.live = first and sys.stdout.isatty()
        self.board: Any = None
        if not first:
            return
        path = folder / "metrics.jsonl"
        old = path.read_text().splitlines(keepends=True) if path.exists() else []
        path.write_text("".join(line for line in old if _step(line) <= start))
        self.file = path.open("a")
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1)

    def due(self, step: int) -> bool:
        return step % self.every == 0 or step == self.steps

    def metrics(self, step: int, values: Mapping[str, Any]) -> None:
        """Values after `step` steps."""
        if not self.first:
            return
        self.file.write(json.dumps({"step": step} | dict(values)) + "\n")
        self.file.flush()
        if self.board is not None:
            for name, value in values.items():
                if isinstance(value, (int, float)):
                    self.board.add_scalar(name, value, step)
        shown = "  ".join(f.format(values[n]) for n, f in FORMATS.items() if values.get(n) is not None)
        self.say(f"step {step}/{self.steps}  {shown}")

    def bar(self, step: int, loss: float, seconds: float) -> None:
        if self.live:
            done = 30 * step // self.steps
            text = f"[{'#' * done}{'.' * (30 - done)}] {step}/{self.steps}  loss {loss:.4f}  {seconds:.2f} s a step"
            print(f"\r\033[K{text}", end="", flush=True)

    def say(self, text: str) -> None:
        if self.first:
            print(f"\r\033[K{text}" if self.live else text, flush=True)

    def close(self) -> None:
        if self.first:
            self.file.close()
            if self.board is not None:
                self.board.close()


def _step(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return sys.maxsize  # half a line of a process that was killed


def memory(device: torch.device) -> float:
    """The most memory that this process has used, in GiB: of the GPU, on CPUs resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def expert_load(logits: Sequence[torch.Tensor], chosen: int) -> torch.Tensor:
    """Tokens that each layer's router (logits (T, E)) gives to each expert: (layers, E)."""
    found = [x.detach().topk(chosen, -1).indices.flatten().bincount(minlength=x.shape[-1]) for x in logits]
    return torch.stack(found).cpu()


def expert_metrics(load: torch.Tensor) -> dict[str, Any]:
    """Of tokens (layers, E): the counts; the mean entropy of their distribution, 1 when all experts get as many; and
    how many times its fair share the busiest expert of all layers gets."""
    share = load / load.sum(-1, keepdim=True)
    entropy = -(share * share.clamp(min=1e-30).log()).sum(-1) / math.log(load.shape[-1])
    busiest = share.max().item() * load.shape[-1]
    return {"expert_tokens": load.int().tolist(), "expert_entropy": entropy.mean().item(), "busiest_expert": busiest}


def token_flops(model: torch.nn.Module, seq: int) -> float | None:
    """FLOPs of one token's forward and backward, or None where the model's configuration does not say how many experts
    a token uses: 6 for each weight that multiplies it, and 12 L H Q S of attention (Chowdhery et al., arXiv 2204.02311,
    appendix B)."""
    config: Any = getattr(model, "config", None)
    chosen = getattr(config, "num_experts_per_tok", None)
    experts = [getattr(config, n, None) for n in ("num_experts", "num_local_experts", "n_routed_experts")]
    total = next((e for e in experts if isinstance(e, int)), None)
    if not isinstance(chosen, int) or total is None:
        return None
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    head = getattr(model, "lm_head", None)
    used = 0.0
    for p in model.parameters():
        if p.dim() == 3:
            used += p.numel() * chosen / total
        elif p.dim() == 2 and (id(p) not in embeddings or p is getattr(head, "weight", None)):
            used += p.numel()
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 6 * used + 12 * config.num_hidden_layers * config.num_attention_heads * width * seq
