"""An all-to-all's size comes from the smallest value that has it."""

import torch
from torch import nn
from torch.fx import Graph, GraphModule

from tedcompile import graphs
from tedcompile.ops import ops
from tedcompile.passes import small_sizes
from tests.lockstep import text


def test_pinned():
    graph = Graph()
    nodes = {}
    for name, shape, dtype in (
        ("x", (6, 4), torch.float32), ("back", (6, 4), torch.float32), ("other", (5, 4), torch.float32),
        ("splits", (2, 2), torch.int64), ("weights", (6,), torch.float32), ("order", (6,), torch.int64),
    ):  # fmt: skip
        nodes[name] = graph.placeholder(name)
        nodes[name].meta["val"] = torch.empty(shape, dtype=dtype, device="meta")
    results = [
        graphs.call(graph, ops.all_to_all_like.default, (nodes["x"], nodes["splits"], nodes[like], "ep"), nodes["x"])
        for like in ("back", "other")
    ]
    graph.output(tuple(results))
    gm = GraphModule(nn.Module(), graph)
    small_sizes.run(gm, None)
    assert text(gm).split("\n") == [
        "all_to_all_like:  = ted.all_to_all_like(x, splits, order, ep)",
        "all_to_all_like_default_1:  = ted.all_to_all_like(x, splits, other, ep)",
    ]
