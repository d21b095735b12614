"""Hugging Face transformers: an experts function made of the canonical ops, caches switched off, and checkpoints.

Most MoE families call their experts through one registry, `experts.forward(hidden (T, H), index (T, K), weights
(T, K)) -> (T, H)`, and differ in attributes of the experts module, which is all that is read here.
"""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import core_model_loading as loading
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from tedcompile.frontends import Mapped
from tedcompile.ops import ops

NAME = "tedcompile"


def experts(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The experts' computation over rows sorted by expert; the body (gate, activation, biases) is the module's own."""
    rows, counts, perm, order = ops.permute(hidden, index, self.num_experts)

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        weight = getattr(self, name)
        y = ops.grouped_mm(x, weight if self.is_transposed else weight.transpose(1, 2), counts)
        return y + ops.per_expert(getattr(self, name + "_bias"), counts, rows) if self.has_bias else y

    if self.has_gate:
        rows_h = self._apply_gate(linear(rows, "gate_up_proj"))
    else:
        rows_h = self.act_fn(linear(rows, "up_proj"))
    rows_out = linear(rows_h, "down_proj")
    if getattr(self, "has_post_expert_norm", False):
        rows_out = self.post_expert_norm(rows_out)
    return ops.unpermute(rows_out, perm, order, weights).to(hidden.dtype)


ALL_EXPERTS_FUNCTIONS.register(NAME, experts)


@contextlib.contextmanager
def prepared(model) -> Iterator[None]:
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    changes = {"_experts_implementation": NAME, "use_cache": False}
    saved = [(c, name, getattr(c, name)) for c in configs.values() for name in changes if hasattr(c, name)]
    try:
        for config, name, _ in saved:
            setattr(config, name, changes[name])
        yield
    finally:
        for config, name, value in saved:
            setattr(config, name, value)


def example_inputs(model) -> dict[str, Any]:
    ids = torch.zeros(2, 16, dtype=torch.int64)
    inputs = {"input_ids": ids, "labels": ids.clone()}
    return inputs | {"attention_mask": torch.ones_like(ids)} if model.config.is_encoder_decoder else inputs


def from_checkpoint(model, found: dict[str, torch.Tensor]) -> Mapped:
    """As `from_pretrained` maps names and converts (experts one by one, stacked into one weight): by its own rules."""
    rules = get_model_conversion_mapping(model)
    renamings = [r for r in rules if isinstance(r, loading.WeightRenaming)]
    converters = {p: r for r in rules if isinstance(r, loading.WeightConverter) for p in r.source_patterns}
    unique = list({id(c): c for c in converters.values()}.values())
    known, mapped = model.state_dict(), Mapped()
    making: dict[str, Any] = {}
    ignored = [*(model._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq", r"position_ids$"]
    for source in sorted(found, key=loading.dot_natural_key):
        name, pattern = loading.rename_source_key(source, renamings, unique, model.base_model_prefix, known)
        if name not in known and source in known:
            name, pattern = source, None
        if name not in known:
            if not any(re.search(p, source) or re.search(p, name) for p in ignored):
                mapped.unexpected.append(source)
            continue
        if pattern is None:
            mapped.tensors[name], mapped.sources[name] = found[source], [source]
            continue
        rule = making.setdefault(name, copy.deepcopy(converters[pattern]))
        rule.add_tensor(name, source, pattern, found[source])
        mapped.sources.setdefault(name, []).append(source)
    for name, rule in making.items():
        try:
            made = rule.convert(name, model=model, config=model.config)
        except Exception as error:
            made = {name: error}
        for target, value in made.items():
            mapped.tensors[target] = value[0] if isinstance(value, list) else value
            mapped.sources.setdefault(target, mapped.sources[name])

    def loaded() -> None:  # transformers writes a model back in the layout that it was read from
        model._weight_conversions = [rule for rule in rules if rule.was_used()]

    mapped.loaded = loaded
    return mapped


def to_checkpoint(model, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    kept = {name: t for name, t in state.items() if name not in set(model._keys_to_ignore_on_save or ())}
    return loading.revert_weight_conversion(model, kept)


def save_config(model, folder: Path) -> None:
    config = copy.deepcopy(model.config)
    config.architectures, config.dtype = [type(model).__name__], str(model.dtype).split(".")[1]
    config.save_pretrained(folder)
    if model.can_generate() and model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
