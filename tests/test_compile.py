"""What compile.py asks of Inductor."""

from __future__ import annotations

import pytest
import torch
from torch.fx import symbolic_trace

from tedcompile import compile, graphs
from tedcompile.ops import ops


@pytest.mark.parametrize("deterministic", [False, True])
def test_inductor_tunes_no_reduction_where_ranks_must_be_bit_equal(monkeypatch, deterministic):
    from torch._inductor import compile_fx, config

    seen = []
    monkeypatch.setattr(compile_fx, "compile_fx_inner", lambda *a, **k: seen.append(config.deterministic))
    gm = symbolic_trace(torch.nn.ReLU())
    compile._compiler("inductor", {}, deterministic, True)(False, False)(gm, [])
    assert seen == [deterministic]


def test_a_graph_with_collectives_keeps_its_order(monkeypatch):
    """Else every reduction of gradients starts after the last kernel of the backward."""
    from torch._inductor import compile_fx, config

    seen = []
    monkeypatch.setattr(compile_fx, "compile_fx_inner", lambda *a, **k: seen.append(config.reorder_for_peak_memory))
    for target, more in ((torch.ops.aten.relu.default, ()), (ops.all_reduce.default, ("tp",))):
        graph = torch.fx.Graph()
        x = graph.placeholder("x")
        x.meta["val"] = torch.empty(4, device="meta")
        graph.output((graphs.call(graph, target, (x, *more), x),))
        gm = torch.fx.GraphModule({}, graph)
        compile._compiler("inductor", {"tp": "ted_tp"}, False, True)(True, False)(gm, [])
    assert seen == [config.reorder_for_peak_memory, False]
