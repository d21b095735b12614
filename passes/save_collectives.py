"""Communication-aware checkpointing: a collective's result is kept, so the replay in the backward never sends again.

Before:  y = all_reduce(x, "tp");  z = f(y)          # recomputing z for the backward would reduce x once more
After:   y = all_reduce(x, "tp") [kept];  z = f(y)   # the replay starts at y

With a layer's two all-reduces and two all-to-alls this is TED's 6 + 6 collectives of a replayed layer become 4 + 4
(DeepSpeed-TED, arXiv 2303.06318, section 5). What a collective alone has read need not be recomputed either.

Needs: a joint graph. Leaves true: `meta["recompute"]` on the collectives of the forward.
"""

from __future__ import annotations

from torch.fx import GraphModule
from torch.utils.checkpoint import CheckpointPolicy

from tedcompile import graphs


def run(gm: GraphModule, ctx) -> None:
    for node in graphs.forward_nodes(gm.graph, ctx.outputs):
        if graphs.collective(node):
            node.meta["recompute"] = CheckpointPolicy.MUST_SAVE
