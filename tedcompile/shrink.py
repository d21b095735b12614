"""A transformers configuration made small and left what it is: few layers of every kind, narrow, with fewer experts.

A field is known by its name (`FIELDS`). Counts that an axis of the mesh divides stay divisible by it, others stay
indivisible; key/value heads stay fewer than heads, projections wider than the model stay wider, dense layers stay
before sparse ones. Dropout and jitter become 0. Encoders and decoders are two stacks of layers, shortened alike.
"""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Callable, Iterator
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
    """Of one (nested) configuration, by the roles of its fields: as they are, and as they become.

    `number`: of experts, where it is given.
    """

    mesh: MeshShape
    old: dict[str, Any]
    number: int = 0
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    hidden: int = HIDDEN

    def find(self, names: str) -> int:
        return next((v for k, v in self.old.items() if re.fullmatch(names, str(k)) and isinstance(v, int) and v), 0)

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

    def dim_of_head(self, value: int) -> int:
        """Of latent attention it is the width of the rotary part, or of both parts, which may differ by layer."""
        rope = self.find("qk_rope_head_dim")
        both = {rope + nope for nope in _everywhere(self.old, "qk_nope_head_dim")}
        return 8 if value == rope else 16 + 8 if value in both else self.head_dim

    def scaled(self, value: int) -> int:
        """A width in proportion to the model's, a multiple of 16 on each tp rank if tp divided it."""
        unit = 16 * (self.mesh.tp if value % self.mesh.tp == 0 else 1)
        size = value * self.hidden / (self.find(WIDTH) or value)
        return min(value, max(unit, min(round(size / unit), 4 * self.hidden // unit) * unit))

    def experts(self, count: int) -> int:
        both = self.mesh.ep * self.mesh.tp
        least = max(8, 2 * self.topk(self.find(PER_TOKEN)), 2 * self.groups(self.find(EXPERT_GROUPS)))
        return self.number or fewer(count, least, both if count % both == 0 else self.mesh.ep)

    def topk(self, value: int) -> int:
        return min(value, TOP_K)

    def groups(self, value: int) -> int:
        return min(value, GROUPS)

    def vocab(self, value: int) -> int:
        return min(value, VOCAB if value % self.mesh.tp == 0 else VOCAB - 1)


def _everywhere(values: dict[str, Any], name: str) -> Iterator[Any]:
    """The values of a field, in nested dicts too."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _everywhere(value, name)
        elif key == name and value:
            yield value


def fewer(count: int, least: int, axis: int) -> int:
    """The smallest divisor of `count`, of at least `least`, that is a multiple of `axis` if and only if `count` is."""
    divisors = (k for k in range(min(least, count), count + 1) if k and count % k == 0)
    return next((k for k in divisors if (k % axis == 0) == (count % axis == 0)), count)


HEADS = r"(num_attention|n|num|decoder_attention|encoder_attention)_?heads?"
KV_HEADS = r"(num_)?(key_value|kv)_?(n_)?heads|num_kv_heads"
WIDTH = r"hidden_size|d_model|n_embd|hidden_dim"
EXPERTS = r"(moe_)?(num|n)_(local_|routed_)?experts"
PER_TOKEN = r".*experts?_per_tok(en)?|moe_top_?k|moe_k|top_k_experts|router_top_k|num_selected_experts"
EXPERT_GROUPS = r"(n|num)_(expert_)?groups?"
LAYERS = r"(num|n)_((hidden|decoder|encoder)_)?layers?|(en|de)coder_layers"

# (name of the field, its new value from the old one and the sizes); the first match counts. A field of a dict without
# a model type has the dict's name before its own
FIELDS: list[tuple[str, Callable[[Any, _Sizes], Any]]] = [
    (r".*(drop|jitter).*", lambda v, s: 0.0 if isinstance(v, float) else v),
    (PER_TOKEN, lambda v, s: s.topk(v)),
    (EXPERTS, lambda v, s: s.experts(v)),
    (r"zero_expert_num", lambda v, s: min(v, 2)),
    (r"expert_capacity", lambda v, s: min(v, 3)),  # tokens are dropped
    (EXPERT_GROUPS, lambda v, s: s.groups(v)),
    (r"topk_group", lambda v, s: max(1, v * s.groups(s.find(EXPERT_GROUPS)) // max(s.find(EXPERT_GROUPS), 1))),
    (r".*(nextn_predict_layers|mtp_layers)", lambda v, s: min(v, 1)),
    (r"first_k_dense_replace|num_dense_layers|num_sparse_\w+_layers|moe_layer_start_index", lambda v, s: min(v, 1)),
    (r"moe_layer_end_index", lambda v, s: -1),
    (r".*(period|sparse_step|group_size|res_block|layer_interval|every_n_layers)", lambda v, s: min(v, 2)),
    (r".*layer_offset", lambda v, s: min(v, 1)),
    (r"mamba_n_groups", lambda v, s: min(v, 2)),
    (r"(mamba_)?expand", lambda v, s: 1),
    (r".*_(key|k)_heads", lambda v, s: fewer(v, 2, s.mesh.tp)),
    (KV_HEADS, lambda v, s: s.kv_heads),
    (r".+_(key_value|kv)_heads", lambda v, s: min(v, s.kv_heads)),
    (HEADS, lambda v, s: s.heads),
    (r".*heads(_per_layer)?", lambda v, s: fewer(v, 4, s.mesh.tp)),
    (r"qk_head_dim", lambda v, s: 16 + 8),
    (r"qk_nope_head_dim|v_head_dim", lambda v, s: 16),
    (r"qk_rope_head_dim|rotary_dim|index_head_dim", lambda v, s: 8),
    (r"head_dim|d_kv|kv_channels", lambda v, s: s.dim_of_head(v)),
    (r"indexer_head_dim", lambda v, s: s.head_dim),
    (r".*(head_dim|d_head)", lambda v, s: 16),
    (r".*(_rank|lowrank|latent_size)", lambda v, s: min(v, 24)),
    (r".*(router_hidden_size|hidden_size_per_layer_input|ple_embed_dim|state_size|d_state)", lambda v, s: min(v, 16)),
    (r".*vocab_size.*", lambda v, s: s.vocab(v)),
    (r".*token_id", lambda v, s: v % s.vocab(s.find("vocab_size") or VOCAB)),
    (WIDTH, lambda v, s: s.hidden),
    (r".*(intermediate_size.*|ffn_dim|ffn_hidden_size|d_ff|d_inner|n_inner)", lambda v, s: s.scaled(v)),
    (r"index_block_size|compress_rates\..*", lambda v, s: min(v, 4)),
    (r"index_topk|.*window\w*|.*chunk_size|block_size|rel_extent", lambda v, s: min(v, WINDOW)),
]  # fmt: skip


def shrink(config: Any, mesh: MeshShape, experts: int = 0) -> tuple[Any, list[str]]:
    """A small copy of a configuration, for runs on `mesh`, and what was changed: "num_hidden_layers 48 -> 2".

    With `experts` it has that many. Raises ValueError when the small copy cannot be built.
    """
    old = config.to_dict()
    kind = type(config)
    # a decoder begins with it, and default configurations leave it out
    start = {n: old.get(n) or 0 for n in ("pad_token_id", "decoder_start_token_id") if config.is_encoder_decoder}
    try:
        narrow = kind.from_dict(_narrow(old | start, mesh, experts))
        small = kind.from_dict(_shorten(narrow.to_dict(), _layers(narrow)))
        from_config(copy.deepcopy(small))  # which changes it
    except Exception as error:
        raise ValueError(
            f"the {config.model_type} configuration cannot be shrunk ({first_line(error)}): give a small config.json "
            "of your own, or the whole model with --full"
        ) from error
    return small, list(_changes(old, small.to_dict()))


def _narrow(old: dict[str, Any], mesh: MeshShape, experts: int) -> dict[str, Any]:
    return _fields(old, _Sizes(mesh, old, experts), "")


def _fields(values: dict[str, Any], sizes: _Sizes, prefix: str) -> dict[str, Any]:
    new = dict(values)
    for name, value in values.items():
        if isinstance(value, dict):
            if "model_type" in value:
                new[name] = _narrow(value, sizes.mesh, sizes.number)
            elif str(name).startswith("rope"):  # longrope has a factor for each pair of rotary dims
                pairs = sizes.head_dim // 2
                new[name] = {k: v[:pairs] if isinstance(v, list) else v for k, v in value.items()}
            elif name not in ("id2label", "label2id"):
                new[name] = _fields(value, _Sizes(sizes.mesh, sizes.old | value, sizes.number), f"{name}.")
            continue
        names = (str(name), f"{prefix}{name}")
        rule = next((rule for pattern, rule in FIELDS if any(re.fullmatch(pattern, n) for n in names)), None)
        if rule is None:
            continue
        if isinstance(value, list) and all(type(v) is int for v in value):
            new[name] = [rule(v, sizes) for v in value]
        elif type(value) in (int, float) and value > 0:
            new[name] = rule(value, sizes)
    return new


def _layers(config: Any) -> list[int]:
    """The fewest layers, two at least, among which there is one of each kind: of the same modules, shapes and switches.

    Those that show every entry of the configuration's lists, where these say it all; else the first ones.
    """
    values = getattr(config, "get_text_config", lambda: config)().to_dict()
    count = _count(values)
    whole = _kinds(config, count)
    lists = [v for v in values.values() if isinstance(v, list) and len(v) == count and v != list(range(count))]
    if lists:
        seen: set[tuple[int, str]] = set()
        kept: list[int] = []
        for i in range(count):
            new = {(k, str(v[i])) for k, v in enumerate(lists)} - seen
            if new or len(kept) < LEAST_LAYERS and count - i <= LEAST_LAYERS - len(kept):
                kept.append(i)
                seen |= new
        with contextlib.suppress(Exception):  # lists may belong together in other ways
            small = type(config).from_dict(_shorten(config.to_dict(), kept))
            if set().union(*whole) <= set().union(*_kinds(small, len(kept))):
                return kept
    least = max([min(LEAST_LAYERS, count), *(kinds.index(kind) + 1 for kinds in whole for kind in kinds)])
    return list(range(least))


def _count(values: dict[str, Any]) -> int:
    """The number of layers; of the longer stack, where there are two."""
    return max((v for n, v in values.items() if re.fullmatch(LAYERS, n) and isinstance(v, int)), default=0)


def _kinds(config: Any, count: int) -> list[list[tuple]]:
    """The kind of each layer, by stack of layers."""
    model = from_config(copy.deepcopy(config))
    return [
        [_kind(layer) for layer in stack]
        for stack in model.modules()
        if isinstance(stack, nn.ModuleList) and len(stack) == count
    ]


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


def _shorten(values: dict[str, Any], kept: list[int]) -> dict[str, Any]:
    """Lists with an entry for each layer, lists of layers' numbers and dicts by them become the kept layers'."""
    count, new = _count(values), dict(values)
    for key, value in values.items():
        if isinstance(value, dict) and "model_type" in value:
            new[key] = _shorten(value, kept)
        elif isinstance(value, dict) and value and all(str(k).isdigit() for k in value) and not key.endswith("label"):
            of_kept = {str(layer): i for i, layer in enumerate(kept)}
            new[key] = {type(k)(of_kept[str(k)]): v for k, v in value.items() if str(k) in of_kept}
        elif not count:
            continue
        elif isinstance(value, list) and len(value) == count and value != list(range(count)):
            new[key] = [value[i] for i in kept]
        elif isinstance(value, list) and "layer" in key and all(type(v) is int for v in value):
            # one layer at least stays out of them, where one was
            new[key] = [v for v in value if v < len(kept) - (len(value) < count)]
        elif re.fullmatch(LAYERS, key) and isinstance(value, int):
            new[key] = min(value, len(kept))
    return new


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
