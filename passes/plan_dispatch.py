"""Chooses how the tokens of each MoE block meet their experts: `meta["dispatch"]` (`layouts.Dispatch`) on its ops.

Needs: canonical MoE ops, before layouts. Changes no node. A later signature keeps the experts where the first has put
them. A block that cannot be dispatched gets no plan, stays whole, and `ctx.replicated` says why.
"""

from __future__ import annotations

from torch.fx import GraphModule

from tedcompile.blocks import Block, refusal
from tedcompile.layouts import Dispatch
from tedcompile.ops import ops


def run(gm: GraphModule, ctx) -> None:
    if ctx.shape["ept"] == 1:
        return
    for node in gm.graph.nodes:
        if node.target is ops.permute.default:
            block = Block.of(gm, node)
            dispatch, reason = _plan(gm, ctx, block)
            if dispatch:
                for n in (node, *block.leaves, *block.body):
                    n.meta["dispatch"] = dispatch
            elif reason:
                ctx.replicated.append((node, reason))


def _plan(gm: GraphModule, ctx, block: Block) -> tuple[Dispatch | None, str]:
    shape, wish = ctx.shape, ctx.options.plan
    drop = shape.tp > 1 and "drop_duplicates" not in ctx.options.off
    experts = _decided(ctx, block) or wish.get("experts", "tensor")
    if experts == "folded" and (not drop or refusal(gm, block, shape["ept"], ctx)):
        experts = "tensor"
    if experts != "folded":
        if shape.ep == 1:
            return None, ""
        reason = refusal(gm, block, shape.ep, ctx)
        if reason:
            return None, reason
    kind = wish.get("dispatch", "all_to_all")
    if not block.moves_tokens:
        kind = "all_to_all"
    return Dispatch(experts, kind, drop), ""


def _decided(ctx, block: Block) -> str | None:
    """Where an earlier signature has put the experts."""
    if ctx.decided is None:
        return None
    dims = {ctx.fixed[w].dim for w in block.weights if ctx.fixed[w].kind == "S"}
    return "folded" if dims == {0} else "tensor" if dims else "whole"
