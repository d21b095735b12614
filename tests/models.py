"""Tiny fp32 models for the tests: the real Hugging Face classes, and the plain modules of examples/.

`MODELS[name]()` gives `(model, make_batch)`, the same weights on every call. Builders take `experts=`.
Every parameter is random, also those that start as zeros or ones (norm weights, biases), so that no gradient is
zero or symmetric by accident. All sizes divide by 4 for tp=4, except the key/value heads of `*_kv2`.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from tests import styles

VOCAB, SEQ, BATCH, EXPERTS = 128, 16, 2, 8

# model(**make_batch(data_rank, step, seq, batch, ignored)) is the loss, or has it as .loss
MakeBatch = Callable[..., dict[str, torch.Tensor]]
Build = Callable[..., tuple[nn.Module, MakeBatch]]

COMMON = dict(
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=16,
    vocab_size=VOCAB,
    num_experts_per_tok=2,
    max_position_embeddings=64,
    bos_token_id=None,
    eos_token_id=None,
)


def families(experts: int) -> dict[str, dict]:
    """Hugging Face model types and their tiny configurations."""
    groups = max(experts // 2, 1)
    return {
        "mixtral": dict(intermediate_size=96, num_local_experts=experts),
        "qwen2_moe": dict(
            head_dim=8,
            intermediate_size=96,
            moe_intermediate_size=48,
            shared_expert_intermediate_size=80,
            num_experts=experts,
        ),
        "qwen3_moe": dict(intermediate_size=96, moe_intermediate_size=48, num_experts=experts, norm_topk_prob=True),
        "olmoe": dict(head_dim=8, intermediate_size=48, num_experts=experts),
        "deepseek_v3": dict(
            head_dim=8,  # of the rotary part
            num_hidden_layers=3,
            first_k_dense_replace=1,
            num_key_value_heads=8,
            intermediate_size=96,
            moe_intermediate_size=48,
            n_routed_experts=experts,
            n_shared_experts=1,
            n_group=groups,
            topk_group=max(groups // 2, 1),
            q_lora_rank=32,
            kv_lora_rank=24,
            qk_rope_head_dim=8,
            qk_nope_head_dim=16,
            v_head_dim=12,
        ),
        "gpt_oss": dict(
            intermediate_size=48,
            num_local_experts=experts,
            sliding_window=8,
            swiglu_limit=0.5,  # low enough that some activations are clamped
            max_position_embeddings=131072,  # what its rope scaling expects
        ),
    }


def randomise(model: nn.Module) -> None:
    """N(0, 0.08) for weights, their own value plus N(0, 0.1) for 1-D parameters and correction biases."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.08)
            else:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        for name, buffer in model.named_buffers():
            if name.endswith("correction_bias"):
                buffer.normal_(0, 0.1)


def ids_and_labels(
    names: tuple[str, str], shift: int, data_rank: int, step: int, seq: int = SEQ, batch: int = BATCH, ignored=False
) -> dict[str, torch.Tensor]:
    """One data rank's batch of one step; with `ignored`, -100 at a number of label positions that differs by rank."""
    generator = torch.Generator().manual_seed(1000 * step + data_rank)
    tokens = torch.randint(VOCAB, (batch, seq + shift), generator=generator)
    ids, labels = tokens[:, :seq].contiguous(), tokens[:, shift:].clone()
    if ignored:
        positions = torch.randperm(labels.numel(), generator=generator)
        labels.view(-1)[positions[: (3 + 7 * data_rank) % (labels.numel() // 2)]] = -100
    return dict(zip(names, (ids, labels)))


def hugging_face(family: str, experts: int = EXPERTS, aux: bool = False, **sizes) -> tuple[nn.Module, MakeBatch]:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    if aux:
        sizes |= dict(output_router_logits=True, router_aux_loss_coef=0.02)
    config = AutoConfig.for_model(family, **{**COMMON, **families(experts)[family], **sizes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()
    randomise(model)
    # These models shift the labels themselves.
    return model, functools.partial(ids_and_labels, ("input_ids", "labels"), 0)


def example(module: str, experts: int = EXPERTS, **sizes) -> tuple[nn.Module, MakeBatch]:
    torch.manual_seed(0)
    model, _ = importlib.import_module(f"examples.{module}").build(vocab=VOCAB, experts=experts, **sizes)
    randomise(model.train())

    def make_batch(data_rank: int, step: int, **options) -> dict[str, torch.Tensor]:
        batch = ids_and_labels(("idx", "targets"), 1, data_rank, step, **options)
        if module == "nano_moe":  # which ignores -1 as nanoGPT does
            batch["targets"][batch["targets"] == -100] = -1
        return batch

    return model, make_batch


class Styled(nn.Module):
    """A language model of two MoE blocks of tests/styles.py, by name, and nothing else."""

    def __init__(self, style: str):
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCAB, styles.H), nn.Linear(styles.H, VOCAB, bias=False)
        self.blocks = nn.ModuleList([styles.STYLES[style]() for _ in range(2)])

    def forward(self, idx: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = self.embed(idx)
        for block in self.blocks:
            x = x + block(F.layer_norm(x, (styles.H,)).flatten(0, 1)).view_as(x)
        return F.cross_entropy(self.head(x).flatten(0, 1), targets.flatten())


def styled(style: str, experts: int = EXPERTS) -> tuple[nn.Module, MakeBatch]:
    torch.manual_seed(0)
    model = Styled(style).train()
    for p in model.parameters():
        nn.init.normal_(p, std=0.5)
    return model, functools.partial(ids_and_labels, ("idx", "targets"), 1)


BASE: dict[str, Build] = {family: functools.partial(hugging_face, family) for family in families(EXPERTS)}
BASE["nano_moe"] = functools.partial(example, "nano_moe", heads=4)
BASE["shared_expert_moe"] = functools.partial(example, "shared_expert_moe", heads=8, kv_heads=4)

# DeepSeek-V3 has no auxiliary loss; shared_expert_moe always has one.
VARIANTS: dict[str, Build] = {
    f"{family}_aux": functools.partial(hugging_face, family, aux=True)
    for family in ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss")
}
VARIANTS["titan_moe"] = functools.partial(example, "titan_moe", heads=4)
for style in ("LoopContinue", "DenseFused"):
    VARIANTS[f"style_{style}"] = functools.partial(styled, style)
VARIANTS["qwen3_moe_kv2"] = functools.partial(hugging_face, "qwen3_moe", num_key_value_heads=2)

MODELS: dict[str, Build] = BASE | VARIANTS


def find(name: str) -> Build:
    """A model of this file, or, as "hf:TYPE", the small model of a family of the installed transformers."""
    if name.startswith("hf:"):
        from tests import families

        return functools.partial(families.build, name.removeprefix("hf:"))
    return MODELS[name]


def plain(model: nn.Module) -> nn.Module:
    """The model as its users run it on one device: Hugging Face experts as the loop that their source shows."""
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    return model


def routers(model: nn.Module, experts: int) -> list[tuple[nn.Module, torch.Tensor, torch.Tensor | None]]:
    """(module, weight (E, H), its bias or correction bias (E) or None) of each router, found by shape."""
    found = []
    for module in model.modules():
        own = [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None]
        by_dim = {t.dim(): t for t in own if t.shape[:1] == (experts,)}
        if 2 in by_dim and 3 not in by_dim:
            found.append((module, by_dim[2], by_dim.get(1)))
    return found


def loss_of(output) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output.loss
