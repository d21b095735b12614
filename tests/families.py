"""Every text MoE family of the installed transformers, small: found in its model mappings, shrunk by its own fields.

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

from tests import models

HIDDEN, EXPERTS, HEADS, TOP_K = 64, models.EXPERTS, 4, 2

# What a configuration's field becomes, by its name: a value, or a function of its default. The first match counts.
LAYERS = r"(num|n)_((hidden|decoder|encoder)_)?layers|(en|de)coder_layers"
COUNTS = r"(moe_)?(num_|n_)(local_|routed_)?experts"
FIELDS: list[tuple[str, Any]] = [
    (r".*(drop|jitter).*", lambda v: 0.0 if isinstance(v, float) else v),
    (r".*shared_experts", lambda v: 1 if v is None else min(v, 1)),
    (r".*(nextn_predict_layers|mtp_layers)", lambda v: v and min(v, 1)),
    (r"first_k_dense_replace|num_dense_layers|num_sparse_\w+_layers|moe_layer_start_index", lambda v: min(v, 1)),
    (r"moe_layer_end_index", -1),
    (r".*(period|sparse_step|group_size|res_block|layer_interval|every_n_layers)", lambda v: v and min(v, 2)),
    (r".*layer_offset", lambda v: min(v, 1)),
    (r"(num|n)_(expert_)?groups?", lambda v: v and min(v, 2)),
    (r"(mamba_)?expand", 1),
    (r"topk_group", lambda v: v and 1),
    (r"is_moe|enable_moe_block", True),
    (r"zero_expert_num", 2),
    (r"expert_capacity", 3),  # tokens are dropped
    (r".*vocab_size\w*", lambda v: v and models.VOCAB),
    (r"hidden_size|d_model", HIDDEN),
    (r".*(intermediate_size\w*|ffn_dim|ffn_hidden_size|d_ff)", lambda v: 96 if v is None else v and 96),
    (r".*(qk_rope_head_dim|index_head_dim)|rotary_dim", 8),
    (r".*(_rank|lowrank|latent_size)", lambda v: v and 24),
    (r".*(router_hidden_size|hidden_size_per_layer_input|ple_embed_dim|state_size|d_state)", lambda v: v and 16),
    (r"index_topk|.*window\w*|(\w*_)?chunk_size|block_size|rel_extent", lambda v: v and 8),
    (r"index_block_size|compress_rates", 4),
]  # fmt: skip
# What a field becomes that has no default, though the model does not work without.
UNSET: dict[str, Any] = {
    "head_dim": HIDDEN // HEADS, "layer_types": ["conv", "full_attention"],
    "attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0},
    "indexer_n_heads": HEADS, "indexer_kv_heads": 1, "indexer_head_dim": HIDDEN // HEADS, "indexer_budget": 8,
    "indexer_compress_ratio": 4,
}  # fmt: skip


def leaves(fields: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, value in fields.items():
        if isinstance(value, dict):
            yield from leaves(value, (*path, str(name)))
        else:
            yield (*path, str(name)), value


def shrunk(default: dict[str, Any], experts: int) -> dict[str, Any]:
    """The fields of a default configuration that a small model sets to other values."""
    every = [(path[-1], v) for path, v in leaves(default)]
    top = dict(reversed(every))
    queries = [v for n, v in every if re.fullmatch(r"num_attention_heads|(num|n)_heads", n)]
    one_of_many = any(v and v > 1 for n, v in every if re.fullmatch(COUNTS, n))
    of, kept = _layers(default, next((v for n, v in top.items() if re.fullmatch(LAYERS, n)), 0))

    def value(name: str, v: Any) -> Any:
        if isinstance(v, list):
            if len(v) == of and v != list(range(of)):
                v = [v[i] for i in kept]
            elif v and all(type(i) is int for i in v):  # indices of layers
                v = [i for i in v if i < len(kept) - (len(v) < of)]
            return [value(name, x) for x in v] if re.fullmatch(r".*heads_per_layer", name) else v
        if re.fullmatch(LAYERS, name):
            return len(kept)
        if re.fullmatch(COUNTS, name):
            return experts
        if re.fullmatch(r".*(experts?_per_tok(en)?|moe_top_?k|moe_k|top_k_experts)", name):
            return 1 if v == 1 and one_of_many else TOP_K
        if re.fullmatch(r".*(key_value_heads|kv_n_heads|num_key_heads|kv_heads)", name):
            return v and (HEADS if v in queries else HEADS // 2)
        if re.fullmatch(r".*heads(_per_layer)?", name):
            return v and HEADS
        if re.fullmatch(r".*token_id", name):
            return v if isinstance(v, int) and v < models.VOCAB else None
        if re.fullmatch(r".*(head_dim|d_kv|kv_channels|d_head)", name) and "rope" not in name and "index" not in name:
            rope = top.get("qk_rope_head_dim", -1)
            whole = {rope + x for n, x in every if n == "qk_nope_head_dim" and name == "head_dim"}
            return v and (8 if v == rope else HIDDEN // HEADS + 8 * (v in whole))
        to = next((to for pattern, to in FIELDS if re.fullmatch(pattern, name)), v)
        return to(v) if callable(to) else to

    changed: dict[str, Any] = {"use_cache": False}
    if default["is_encoder_decoder"]:
        changed |= {"pad_token_id": 0, "decoder_start_token_id": 0}
    for path, v in leaves(default):
        name = path[-1]
        if path[0] == "per_layer_config":
            if int(path[1]) not in kept:
                continue
            path = (path[0], str(kept.index(int(path[1]))), *path[2:])
        if path[0] == "compress_rates":
            name = path[0]
        if v is None and name in UNSET:
            changed[name] = UNSET[name]
        unset = v is None and not re.search("expert|moe|topk", name)
        if isinstance(v, str) or unset or name in ("qk_head_dim", "id2label", "label2id"):
            continue
        to = value(name, v)
        if to != v or path[0] == "per_layer_config":
            at = changed
            for step in path[:-1]:
                at = at.setdefault(step, {})
            at[path[-1]] = to
    for name, v in changed.items():
        if isinstance(v, dict) and name != "per_layer_config":
            changed[name] = default[name] | v | UNSET.get(name, {})
    return changed


def _layers(default: dict[str, Any], number: int) -> tuple[int, list[int]]:
    """The default's number of layers, and the fewest of them, at least two, that show every value of its lists."""
    lists = [v for v in default.values() if isinstance(v, list) and v]
    number = number or max((len(v) for v in lists), default=2)
    lists = [v for v in lists if len(v) == number and v != list(range(number))]
    seen: set[tuple[int, str]] = set()
    kept = []
    for i in range(number):
        new = {(k, str(v[i])) for k, v in enumerate(lists)} - seen
        if new or len(kept) < 2 and number - i <= 2 - len(kept):
            kept.append(i)
            seen |= new
    if len(kept) < 2:
        kept = sorted({*kept, 1})
    return number, kept


@dataclass
class Family:
    """`experts`: the names of the experts' weights; `unusable`: why transformers cannot build a small model."""

    name: str  # transformers' model type
    title: str  # of the class
    experts: list[str] = field(default_factory=list)
    unusable: str = ""


def config(name: str, experts: int = EXPERTS) -> Any:
    from transformers import CONFIG_MAPPING

    known = CONFIG_MAPPING[name]
    return known(**shrunk(known().to_dict(), experts))


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
        if "text_config" in default or not any(re.fullmatch(COUNTS, path[-1]) for path, _ in leaves(default)):
            continue  # what holds a text model names it as a family of its own
        try:
            small, large = (
                {n: p.numel() for n, p in _meta(name, number).named_parameters()} for number in (EXPERTS, 2 * EXPERTS)
            )
        except Exception as error:
            yield Family(name, title, unusable=f"{type(error).__name__}: {str(error).strip()[:200]}")
            continue
        each = 16 * HIDDEN  # more than a row of a router
        grown = {
            _pattern(n)
            for n, size in large.items()
            if size - small.get(n, 0) >= (EXPERTS * each if n in small else each)
        }
        if experts := [n for n in small if _pattern(n) in grown]:
            yield Family(name, title, experts)


def _pattern(name: str) -> str:
    return re.sub(r"\d+", "*", name)


def _meta(name: str, experts: int) -> nn.Module:
    with torch.device("meta"):
        return _model(config(name, experts))


def _model(made: Any) -> nn.Module:
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    auto = AutoModelForSeq2SeqLM if made.is_encoder_decoder else AutoModelForCausalLM
    return auto.from_config(made, dtype=torch.float32).train()


def build(name: str, experts: int = EXPERTS) -> tuple[nn.Module, models.MakeBatch]:
    """The small model with random weights, equal on every call, and its batches."""
    torch.manual_seed(0)
    model = _model(config(name, experts))
    models.randomise(model)
    for table in model.buffers():  # the experts of each word
        if table.shape == (models.VOCAB, TOP_K) and not table.is_floating_point():
            table.copy_(torch.rand(models.VOCAB, experts).argsort(1)[:, :TOP_K])

    def make_batch(data_rank: int, step: int, **options) -> dict[str, torch.Tensor]:
        batch = models.ids_and_labels(("input_ids", "labels"), 0, data_rank, step, **options)
        if model.config.is_encoder_decoder:  # as tokenizers give it
            batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        return batch

    return model, make_batch
