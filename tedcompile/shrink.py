"""A transformers configuration made small and left what it is: few layers of every kind, narrow, with fewer experts.

A field is known by its name (`FIELDS`). Counts that an axis of the mesh divides stay divisible by it, others stay
indivisible; key/value heads stay fewer than heads, projections wider than the model stay wider, dense layers stay
before sparse ones. Dropout and jitter become 0.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tedcompile.load import first_line, from_config
from tedcompile.mesh import MeshShape

HIDDEN, VOCAB, WINDOW, TOP_K = 64, 256, 8, 4
LEAST_LAYERS = 2
GROUPS = 4


@dataclass
class _Sizes:
    """Of one (nested) configuration, by the roles of its fields: as they are, and as they become."""

    mesh: MeshShape
    old: dict[str, Any]
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    hidden: int = HIDDEN

    def find(self, names: str) -> int:
        return next((v for k, v in self.old.items() if re.fullmatch(names, k) and isinstance(v, int) and v), 0)

    def __post_init__(self) -> None:
        tp = self.mesh.tp
        heads, kv = self.find(HEADS), self.find(KV_HEADS)
        self.kv_heads = fewer(kv, 4 if kv == heads else 2, tp)
        self.heads = self.kv_heads if kv == heads else fewer(heads, max(4, 2 * self.kv_heads), tp)
        self.hidden = max(HIDDEN, 16 * self.heads)
        wide, hidden = heads * self.find("head_dim"), self.find(WIDTH)
        self.head_dim = self.hidden // max(self.heads, 1)
        if wide and hidden and wide != hidden:
            self.head_dim = 2 * self.head_dim if wide > hidden else self.head_dim // 2

    def scaled(self, value: int) -> int:
        """A width in proportion to the model's, a multiple of 16 on each tp rank if tp divided it."""
        unit = 16 * (self.mesh.tp if value % self.mesh.tp == 0 else 1)
        size = value * self.hidden / (self.find(WIDTH) or value)
        return min(value, max(unit, min(round(size / unit), 4 * self.hidden // unit) * unit))

    def experts(self, count: int) -> int:
        both = self.mesh.ep * self.mesh.tp
        least = max(8, 2 * self.topk(self.find(PER_TOKEN)), 2 * self.groups(self.find(EXPERT_GROUPS)))
        return fewer(count, least, both if count % both == 0 else self.mesh.ep)

    def topk(self, value: int) -> int:
        return min(value, TOP_K)

    def groups(self, value: int) -> int:
        return min(value, GROUPS)

    def vocab(self, value: int) -> int:
        return min(value, VOCAB if value % self.mesh.tp == 0 else VOCAB - 1)


def fewer(count: int, least: int, axis: int) -> int:
    """The smallest divisor of `count`, of at least `least`, that is a multiple of `axis` if and only if `count` is."""
    divisors = (k for k in range(min(least, count), count + 1) if k and count % k == 0)
    return next((k for k in divisors if (k % axis == 0) == (count % axis == 0)), count)


HEADS = r"(num_attention|n|num|decoder_attention)_?heads?"
KV_HEADS = r"(num_)?(key_value|kv)_?(n_)?heads|num_kv_heads"
WIDTH = r"hidden_size|d_model|n_embd|hidden_dim"
PER_TOKEN = r".*experts?_per_tok(en)?|moe_top_?k|moe_k|top_k_experts|router_top_k|num_selected_experts"
EXPERT_GROUPS = r"(n|num)_(expert_)?groups?"

# (name of the field, its new value from the old one and the sizes); the first match counts
FIELDS: list[tuple[str, Callable[[Any, _Sizes], Any]]] = [
    (r".*(drop|jitter).*", lambda v, s: 0.0 if isinstance(v, float) else v),
    (PER_TOKEN, lambda v, s: s.topk(v)),
    (r"(moe_)?(num|n)_(local_|routed_)?experts", lambda v, s: s.experts(v)),
    (r"zero_expert_num", lambda v, s: min(v, 2)),
    (EXPERT_GROUPS, lambda v, s: s.groups(v)),
    (r"topk_group", lambda v, s: max(1, v * s.groups(s.find(EXPERT_GROUPS)) // max(s.find(EXPERT_GROUPS), 1))),
    (r"mamba_n_groups", lambda v, s: min(v, 2)),
    (KV_HEADS, lambda v, s: s.kv_heads),
    (HEADS, lambda v, s: s.heads),
    (r".*_(key|k)_heads", lambda v, s: fewer(v, 2, s.mesh.tp)),
    (r".*heads", lambda v, s: fewer(v, 4, s.mesh.tp)),
    (r"mamba_d_head", lambda v, s: s.old.get("mamba_expand", 2) * s.hidden // fewer(s.find("mamba_n_heads"), 4, 2)),
    (r"qk_head_dim", lambda v, s: 16 + 8),
    (r"qk_nope_head_dim|v_head_dim", lambda v, s: 16),
    (r"qk_rope_head_dim|rotary_dim|index_head_dim", lambda v, s: 8),
    (r"head_dim|d_kv|kv_channels", lambda v, s: 8 if v == s.old.get("qk_rope_head_dim") else s.head_dim),
    (r".*head_dim", lambda v, s: 16),
    (r".*(lora_rank|latent_size)", lambda v, s: min(v, 32)),
    (r".*vocab_size.*", lambda v, s: s.vocab(v)),
    (r".*token_id", lambda v, s: v % s.vocab(s.find("vocab_size") or VOCAB)),
    (WIDTH, lambda v, s: s.hidden),
    (r".*(intermediate_size.*|ffn_dim|ffn_hidden_size|d_ff|d_inner|n_inner)", lambda v, s: s.scaled(v)),
    (r"(index_topk|.*sliding_window\w*|attention_chunk_size|.*chunk_size)", lambda v, s: min(v, WINDOW)),
]  # fmt: skip


def shrink(config: Any, mesh: MeshShape) -> tuple[Any, list[str]]:
    """A small copy of a configuration, for runs on `mesh`, and what was changed: "num_hidden_layers 48 -> 2".

    Raises ValueError when the small copy cannot be built.
    """
    old = config.to_dict()
    kind = type(config)
    try:
        narrow = kind.from_dict(_narrow(old, mesh))
        small = kind.from_dict(_shorten(narrow.to_dict(), _layers(narrow)))
        from_config(copy.deepcopy(small))  # which changes it
    except Exception as error:
        raise ValueError(
            f"the {config.model_type} configuration cannot be shrunk ({first_line(error)}): give a small config.json "
            "of your own, or the whole model with --full"
        ) from error
    return small, list(_changes(old, small.to_dict()))


def _narrow(old: dict[str, Any], mesh: MeshShape) -> dict[str, Any]:
    sizes, new = _Sizes(mesh, old), dict(old)
    for name, value in old.items():
        if isinstance(value, dict):
            if "model_type" in value:
                new[name] = _narrow(value, mesh)
            elif name.startswith("rope"):  # longrope has a factor for each pair of rotary dims
                pairs = sizes.head_dim // 2
                new[name] = {k: v[:pairs] if isinstance(v, list) else v for k, v in value.items()}
            continue
        rule = next((rule for pattern, rule in FIELDS if re.fullmatch(pattern, name)), None)
        if rule is None:
            continue
        if isinstance(value, list) and all(type(v) is int for v in value):
            new[name] = [rule(v, sizes) for v in value]
        elif type(value) in (int, float) and value > 0:
            new[name] = rule(value, sizes)
    return new


def _layers(config: Any) -> int:
    """The least number of layers among which there is one of each kind: of the same modules, shapes and switches."""
    count = getattr(config, "get_text_config", lambda: config)().num_hidden_layers
    model = from_config(copy.deepcopy(config))
    least = min(LEAST_LAYERS, count)
    for stack in model.modules():
        if isinstance(stack, nn.ModuleList) and len(stack) == count:
            kinds = [_kind(layer) for layer in stack]
            least = max(least, *(kinds.index(kind) + 1 for kind in set(kinds)))
    return least


def _kind(layer: nn.Module) -> tuple:
    return tuple(
        (
            path,
            type(m).__name__,
            tuple((n, tuple(p.shape)) for n, p in m._parameters.items() if p is not None),
            tuple((n, v) for n, v in sorted(vars(m).items()) if isinstance(v, (bool, str)) and n != "training"),
            tuple(n for n, v in sorted(vars(m).items()) if v is None and n != "__doc__"),
        )
        for path, m in layer.named_modules()
    )


def _shorten(values: dict[str, Any], layers: int) -> dict[str, Any]:
    """Lists with an entry for each layer, and lists of layers' numbers, become those of the first layers."""
    name = next((n for n in ("num_hidden_layers", "n_layer", "num_layers", "n_layers") if values.get(n)), "")
    count, new = values.get(name), dict(values)
    for key, value in values.items():
        if isinstance(value, dict) and "model_type" in value:
            new[key] = _shorten(value, layers)
        elif isinstance(value, dict) and value and all(str(k).isdigit() for k in value):
            new[key] = {k: v for k, v in value.items() if int(k) < layers}
        elif not name:
            continue
        elif isinstance(value, list) and len(value) == count:
            new[key] = value[:layers]
        elif isinstance(value, list) and "layer" in key and all(type(v) is int for v in value):
            new[key] = [v for v in value if v < layers]
    return new | ({name: layers} if name else {})


def _changes(old: dict[str, Any], new: dict[str, Any], prefix: str = ""):
    for name, value in old.items():
        now = new.get(name)
        if now == value:
            continue
        if isinstance(value, dict) and isinstance(now, dict):
            yield from _changes(value, now, f"{prefix}{name}.")
        elif isinstance(value, list) and isinstance(now, list) and len(now) != len(value):
            yield f"{prefix}{name} {len(value)} -> {len(now)} entries"
        else:
            yield f"{prefix}{name} {value} -> {now}"


def elements(config: Any) -> int:
    """Parameters of the model of a configuration."""
    return sum(p.numel() for p in from_config(copy.deepcopy(config), torch.float32).parameters())
