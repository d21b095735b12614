"""What compile.py asks of Inductor."""

from __future__ import annotations

import pytest
import torch
from torch.fx import symbolic_trace

from tedcompile import compile


@pytest.mark.parametrize("deterministic", [False, True])
def test_inductor_tunes_no_reduction_where_ranks_must_be_bit_equal(monkeypatch, deterministic):
    from torch._inductor import compile_fx, config

    seen = []
    monkeypatch.setattr(compile_fx, "compile_fx_inner", lambda *a, **k: seen.append(config.deterministic))
    gm = symbolic_trace(torch.nn.ReLU())
    compile._compiler("inductor", {}, deterministic)(False, False)(gm, [])
    assert seen == [deterministic]
