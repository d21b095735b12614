"""The fixed point that splits weights: what it decides and what it says about the rest."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tedcompile.plan import plan_tensors
from tests.lockstep import captured


def planned(module, tp=2, **batch):
    """(layouts of the split weights, reasons of the others) by name."""
    gm = captured(module.train(), batch or dict(x=torch.randn(4, 8))).gm
    plan = plan_tensors(gm.graph, tp)
    name = lambda n: n.meta["role"][1]
    return {name(n): str(w) for n, w in plan.weights.items()}, {name(n): r for n, r in plan.reasons.items()}


class Stack(nn.Module):
    """A function of numbered linears."""

    def __init__(self, function, *sizes):
        super().__init__()
        self.function = function
        self.l = nn.ModuleList(nn.Linear(i, o) for i, o in sizes)

    def forward(self, x):
        return self.function(self.l, x)


def test_column_then_row():
    split, reasons = planned(Stack(lambda l, x: l[1](F.relu(l[0](x))), (8, 16), (16, 8)))
    assert split["l.0.weight"] == "S(0)" and split["l.0.bias"] == "S(0)"
    assert split["l.1.weight"] == "S(1)" and "l.1.bias" not in split and not reasons


def test_value_that_an_op_needs_whole_sends_its_weights_back():
    split, reasons = planned(Stack(lambda l, x: l[1](l[0](x).cumprod(-1)), (8, 16), (16, 6)))
    assert "l.0.weight" not in split and "cumprod" in reasons["l.0.weight"]
    assert "test_plan.py" in reasons["l.0.weight"]


def test_size_that_tp_does_not_divide():
    split, reasons = planned(Stack(lambda l, x: l[1](F.relu(l[0](x))), (8, 6), (6, 8)), tp=4)
    assert reasons["l.0.weight"] == "a dim of size 6 does not divide over tp=4"
    assert split["l.1.weight"] == "S(0)"


def test_repeated_modules_share_their_fate():
    """The first layer could be split alone; a twin whose result is needed whole takes it along."""

    def function(l, x):
        return F.relu(l[0](x)).sum() + l[1](x).cumprod(-1).sum()

    split, reasons = planned(Stack(function, (8, 16), (8, 16)))
    assert not split and set(reasons) >= {"l.0.weight", "l.1.weight"}


def test_weight_with_two_uses_has_one_layout():
    def function(l, x):
        return l[0](F.relu(l[0](x)))

    split, _ = planned(Stack(function, (8, 8)))
    assert split.get("l.0.weight") in (None, "S(0)", "S(1)")


class Norm(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.weight, self.down = nn.Linear(8, 16), nn.Parameter(torch.ones(16)), nn.Linear(16, 8)

    def forward(self, x):
        h = self.up(x)
        return self.down(h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-6) * self.weight)


def test_planning_is_pure():
    """The same plan twice, and a graph that is as it was."""
    gm = captured(Norm(), dict(x=torch.randn(4, 8))).gm
    before = str(gm.graph)
    first, second = plan_tensors(gm.graph, 2), plan_tensors(gm.graph, 2)
    assert str(gm.graph) == before
    assert first.weights == second.weights and first.layouts == second.layouts


@pytest.mark.parametrize("tp", [2, 4, 8])
def test_every_size(tp):
    split, _ = planned(Stack(lambda l, x: l[1](F.relu(l[0](x))), (8, 16), (16, 8)), tp=tp)
    assert set(split.values()) == {"S(0)", "S(1)"}
