"""An attention mask that depends on no input and is the lower triangle becomes `is_causal`.

Before:  mask = le(arange(S), arange(S)[:, None]) ...;  attention(q, k, v, mask)
After:   attention(q, k, v, is_causal=True)

Fused kernels take `is_causal`, not a mask. The mask is evaluated, not guessed, so sliding windows and packing stay.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from tedcompile.layouts import aten, shape

LIMIT = 1 << 28  # largest mask that is worth evaluating, in elements


def run(gm: GraphModule, ctx) -> None:
    causal: dict[Node, bool] = {}
    values: dict[Node, object] = {}
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


def _is_triangle(mask: Node, queries: int, keys: int, values: dict[Node, object]) -> bool:
    if queries != keys or shape(mask)[-2:] != (queries, keys) or mask.meta["val"].numel() > LIMIT:
        return False
    try:
        value = _evaluate(mask, values)
    except _Unknown:
        return False
    assert isinstance(value, torch.Tensor)
    triangle = torch.ones(queries, keys, dtype=torch.bool).tril()
    if value.dtype == torch.bool:
        return bool((value == triangle).all())
    lowest = torch.finfo(value.dtype).min
    return bool(((value == 0) == triangle).all()) and bool((value.masked_fill(triangle, lowest) <= lowest).all())


class _Unknown(Exception):
    pass


def _evaluate(node: Node, values: dict[Node, object]) -> object:
    """The real value of a node that depends on no placeholder."""
    pending = [node]
    while pending:
        n = pending[-1]
        missing = [a for a in n.all_input_nodes if a not in values]
        if n.op != "call_function" or torch.Tag.nondeterministic_seeded in getattr(n.target, "tags", ()):
            raise _Unknown
        if missing:
            pending.extend(missing)
            continue
        args, kwargs = torch.fx.map_arg((n.args, n.kwargs), values.__getitem__)
        values[n] = n.target(*args, **kwargs)
        pending.pop()
    return values[node]
