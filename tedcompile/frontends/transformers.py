"""Hugging Face transformers: an experts function made of the canonical ops, and caches switched off.

Most MoE families call their experts through one registry, `experts.forward(hidden (T, H), index (T, K), weights
(T, K)) -> (T, H)`, and differ in attributes of the experts module, which is all that is read here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

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
    return {"input_ids": ids, "labels": ids.clone()}
