"""Chooses how the tokens of each MoE block meet their experts: `meta["dispatch"]` (`layouts.Dispatch`) on its ops.

The cost model compares what the sizes allow (`cost.choose`); `ctx.options` may force a choice or rule one out, and a
later signature keeps the experts where the first has put them. `ctx.choices` holds the candidates of every block.

Needs: canonical MoE ops, before layouts. Changes no node. A block that cannot be dispatched gets no plan, stays whole,
and `ctx.replicated` says why.
"""

from __future__ import annotations

import math

from torch.fx import GraphModule, Node

from tedcompile import cost
from tedcompile.blocks import Block, refusal
from tedcompile.layouts import Dispatch, shape
from tedcompile.ops import ops
from tedcompile.passes import chunk_tokens, drop_duplicates


def run(gm: GraphModule, ctx) -> None:
    if ctx.shape["ept"] == 1:
        return
    blocks = [Block.of(n) for n in gm.graph.nodes if n.target is ops.permute.default]
    reasons = [refusal(block, ctx.shape.ep, ctx) for block in blocks]
    whole: dict[Node, str] = {}  # weights of a block that stays whole
    while True:
        found = {w: r for block, r in zip(blocks, reasons) if r for w in block.weights if w is not None} | whole
        if len(found) == len(whole):
            break
        whole = found
        reasons = [r or next((whole[w] for w in b.weights if w in whole), "") for b, r in zip(blocks, reasons)]
    for block, reason in zip(blocks, reasons):
        dispatch = None if reason else _plan(ctx, block)
        if dispatch:
            for n in (block.permute, *block.leaves, *block.body):
                n.meta["dispatch"] = dispatch
        elif reason and ctx.shape.ep > 1:
            ctx.replicated.append((block.permute, reason))


def _plan(ctx, block: Block) -> Dispatch | None:
    mesh, off = ctx.shape, ctx.options.off
    drop = mesh.tp > 1 and "drop_duplicates" not in off
    plan = dict(ctx.options.plan)
    if "chunk_tokens" in off or not chunk_tokens.cuttable(block):
        plan["chunks"] = "1"
    decided = _decided(ctx, block)
    if decided:
        plan["experts"] = decided
    elif "experts" not in plan and refusal(block, mesh["ept"], ctx):
        plan["experts"] = "tensor"
    if not block.moves_tokens:
        plan["dispatch"] = "all_to_all"
    elif shape(block.permute.args[1])[1] == block.experts:  # dense: every rank needs every token
        plan.setdefault("dispatch", "all_gather")
    sizes = _sizes(block)
    try:
        if sizes is None or decided == "whole":
            raise ValueError("the experts are not two products and what is between them")
        found = cost.choose(sizes, mesh, ctx.machine, plan, off)
    except ValueError:
        if {"experts", "drop"} & ctx.options.plan.keys() and not decided:
            raise
        if mesh.ep == 1:
            return None
        return Dispatch("tensor" if decided != "whole" else decided, plan.get("dispatch", "all_to_all"), drop)
    ctx.choices.append((block.permute, sizes, plan))
    best = found.best.candidate
    if best.experts == "tensor" and mesh.ep == 1:
        return None  # split inside, by the layouts alone
    point = best.drop_point if best.drop and ("drop_point" in plan or best.drop_point == "before_gate") else ""
    if point == "before_gate" and not _gate_splits(block, mesh.tp):
        if "drop_point" in ctx.options.plan:
            raise ValueError(
                f"plan: drop_point=before_gate, but {sizes.T} tokens do not divide over tp={mesh.tp}, or they are "
                "routed by other values than those that the experts get; leave drop_point out"
            )
        point = ""
    return Dispatch(best.experts, best.dispatch, best.drop, point, best.chunks)


def _gate_splits(block: Block, tp: int) -> bool:
    return shape(block.permute.args[1])[0] % tp == 0 and bool(drop_duplicates.router(block))


def _sizes(block: Block) -> cost.Block | None:
    """What the cost model knows of a block; None where its products are not those of an MLP."""
    products = [n for n in block.readers if n.target is ops.grouped_mm.default]
    (tokens, slots), hidden = shape(block.permute.args[1]), shape(block.permute.args[0])[1]
    inner = {_columns(n) for n in products if shape(n)[1] == hidden}
    if len(inner) != 1:
        return None
    (width,) = inner
    work = sum(_columns(n) * shape(n)[1] for n in products)
    element = min(4, block.permute.args[0].meta["val"].element_size())  # fp64 is for tests
    matrices = max(1, math.ceil(work / (hidden * width)))
    return cost.Block(tokens, slots, hidden, width, block.experts, matrices, element)


def _columns(product: Node) -> int:
    return shape(product.args[0])[1]


def _decided(ctx, block: Block) -> str | None:
    """Where an earlier signature has put the experts."""
    if ctx.decided is None:
        return None
    dims = {ctx.fixed[w].dim for w in block.weights if ctx.fixed[w].kind == "S"}
    return "folded" if dims == {0} else "tensor" if dims or ctx.shape.tp == 1 else "whole"
