"""Every text MoE family of the installed transformers, small: found in its model mappings, shrunk as `verify` does.

A family is a class that the mappings for causal or sequence-to-sequence language models name. It is an MoE if its
configuration counts experts and some weights of its small model grow with their number, routers aside.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from tedcompile import shrink
from tedcompile.load import from_config
from tedcompile.mesh import MeshShape
from tests import models

EXPERTS = models.EXPERTS
MESH = MeshShape(1, 2, 2)

# What a field of a default configuration becomes, from all of them, where it has nothing and the model has no experts
# without it, or cannot be built.
UNSET: list[tuple[str, Any]] = [
    (shrink.EXPERTS, EXPERTS),
    (shrink.PER_TOKEN, 2),
    (r".*shared_experts", 1),
    (r".*(expert|moe)\w*intermediate_size", 96),
    (r"head_dim", lambda default: default["hidden_size"] // default["num_attention_heads"]),
    (r"layer_types", lambda default: ["conv", "full_attention"] * (default["num_hidden_layers"] // 2)),
    (r"attn_config", {"rope_theta": 1e4, "clip_qkv": 8.0, "kv_n_heads": 8}),
    (r"ffn_config", {"moe_top_k": 2}),  # the router of one normalised weight has no gradient
    (r"indexer_n_heads", 4), (r"indexer_kv_heads", 1), (r"indexer_budget", 8), (r"indexer_compress_ratio", 4),
    (r"indexer_head_dim", lambda default: default["head_dim"]),
]  # fmt: skip
SWITCHES = r"is_moe|enable_moe_block"


def config(name: str, experts: int = EXPERTS) -> Any:
    """A small configuration with so many experts."""
    from transformers import CONFIG_MAPPING

    kind = CONFIG_MAPPING[name]
    default = kind().to_dict()
    given: dict[str, Any] = {"use_cache": False}
    for field_, value in default.items():
        pattern, found = next((rule for rule in UNSET if re.fullmatch(rule[0], field_)), ("", None))
        found = found(default) if callable(found) else found
        unset = value is None or not value and pattern in (shrink.EXPERTS, shrink.PER_TOKEN)
        if isinstance(found, dict):
            given[field_] = (value or {}) | found
        elif found is not None and unset:
            given[field_] = found
        elif re.fullmatch(SWITCHES, field_):
            given[field_] = True
    return shrink.shrink(kind.from_dict(default | given), MESH, experts)[0]


def leaves(fields: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, value in fields.items():
        if isinstance(value, dict):
            yield from leaves(value, (*path, str(name)))
        else:
            yield (*path, str(name)), value


@dataclass
class Family:
    """`experts`: the names of the experts' weights; `unusable`: why transformers cannot build a small model."""

    name: str  # transformers' model type
    title: str  # of the class
    experts: list[str] = field(default_factory=list)
    unusable: str = ""


def discovered(only: Collection[str] = ()) -> Iterator[Family]:
    """All families, or those of `only` that are MoE, by name."""
    from transformers import CONFIG_MAPPING
    from transformers.models.auto import modeling_auto as auto

    mappings = (auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES)
    for name, title in sorted({n: t for mapping in reversed(mappings) for n, t in mapping.items()}.items()):
        if only and name not in only:
            continue
        try:
            default = CONFIG_MAPPING[name]().to_dict()
        except Exception:
            default = {}
        if "text_config" in default or not any(re.fullmatch(shrink.EXPERTS, path[-1]) for path, _ in leaves(default)):
            continue  # what holds a text model names it as a family of its own
        try:
            small, large = (
                {n: p.numel() for n, p in from_config(made, torch.float32).named_parameters()} for made in _pair(name)
            )
        except Exception as error:
            yield Family(name, title, unusable=f"{type(error).__name__}: {str(error).strip()[:200]}")
            continue
        each = 16 * shrink.HIDDEN  # more than a row of a router
        grown = {
            _pattern(n)
            for n, size in large.items()
            if size - small.get(n, 0) >= (EXPERTS * each if n in small else each)
        }
        if experts := [n for n in small if _pattern(n) in grown]:
            yield Family(name, title, experts)


def _pattern(name: str) -> str:
    return re.sub(r"\d+", "*", name)


def _pair(name: str) -> tuple[Any, Any]:
    """The small configuration, and one with twice as many experts."""
    small = config(name)
    return small, shrink.shrink(small, MESH, 2 * EXPERTS)[0]


def build(name: str, experts: int = EXPERTS) -> tuple[nn.Module, models.MakeBatch]:
    """The small model with random weights, equal on every call, and its batches."""
    torch.manual_seed(0)
    model = from_config(config(name, experts), torch.float32, "cpu").train()
    models.randomise(model)
    for table in model.buffers():  # the experts of each word
        if table.dim() == 2 and table.shape[0] == shrink.VOCAB and not table.is_floating_point():
            table.copy_(torch.rand(shrink.VOCAB, experts).argsort(1)[:, : table.shape[1]])

    def make_batch(data_rank: int, step: int, **options) -> dict[str, torch.Tensor]:
        batch = models.ids_and_labels(("input_ids", "labels"), 0, data_rank, step, **options)
        if model.config.is_encoder_decoder:  # as tokenizers give it
            batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        return batch

    return model, make_batch
