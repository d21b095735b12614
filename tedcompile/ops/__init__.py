"""The op vocabulary `torch.ops.ted`: the canonical MoE ops and the moves between layouts, each with its VJP.

Shapes: T tokens, K experts a token, E experts, N rows (token copies, sorted by expert), H and I features.
Backward passes are derived from the VJPs here (TED's drop and gather: arXiv 2303.06318, section 5;
cotangent conventions: `tedcompile.layouts`). Nothing here adds atomically, so replicated values stay bit-equal.

The `axis` of a collective is a mesh axis in every graph that people read; `passes/lower.py` turns it into the name of
a process group just before a graph is run.
"""

import torch

from tedcompile import kernels
from tedcompile.ops import gated, losses, moves, products, random, sums, tokens, travel, vocabulary  # noqa: F401 (register)
from tedcompile.ops.define import LIBRARY, ops

__all__ = ["ops"]

if torch.cuda.is_available() and kernels.installed():
    kernels.register(LIBRARY)
