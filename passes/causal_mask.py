"""An attention mask that depends on no input and is the lower triangle becomes `is_causal`.

Before:  mask = le(arange(S), arange(S)[:, None]) ...;  attention(q, k, v, mask)
After:   attention(q, k, v, is_causal=True)

Fused kernels take `is_causal`, not a mask. The mask is evaluated, not guessed, so sliding windows and packing stay.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from tedcompile import graphs
from tedcompile.layouts import aten, shape

LIMIT = 1 << 28  # largest mask that is worth evaluating, in elements


def run(gm: GraphModule, ctx) -> None:
    causal: dict[Node, bool] = {}
    values: dict[Node, Any] = {}
    for node in gm.graph.nodes:
        if node.target is not aten.scaled_dot_product_attention.default or len(node.args) < 4 or node.args[3] is None:
            continue
        mask = node.args[3]
        if mask not in causal:
            causal[mask] = _is_triangle(mask, shape(node.args[0])[-2], shape(node.args[1])[-2], values)
        if causal[mask]:
            dropout = node.args[4] if len(node.args) > 4 else 0.0
            node.args = (*node.args[:3], None, dropout, True)
    gm.graph.eliminate_dead_code()


def _is_triangle(mask: Node, queries: int, keys: int, values: dict[Node, Any]) -> bool:
    if queries != keys or shape(mask)[-2:] != (queries, keys) or mask.meta["val"].numel() > LIMIT:
        return False
    try:
        value = graphs.evaluate(mask, values)
    except graphs.Unknown:
        return False
    triangle = torch.ones(queries, keys, dtype=torch.bool).tril()
    if value.dtype == torch.bool:
        return bool((value == triangle).all())
    lowest = torch.finfo(value.dtype).min
    return bool(((value == 0) == triangle).all()) and bool((value.masked_fill(triangle, lowest) <= lowest).all())
