"""ZeRO-2 and 3 in the graphs: what is gathered and scattered, where, and what the forward keeps."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tedcompile.mesh import MeshShape
from tedcompile.passes import gather_parameters, lower
from tests import joint
from tests.lockstep import text


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 64, bias=False), nn.Linear(64, 8)
        self.odd = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return (self.down(self.up(x).relu()) * self.odd.sum()).square().mean()


def calls(gm) -> list[str]:
    return [n.target._schema.name for n in gm.graph.nodes if getattr(n.target, "namespace", "") == "ted"]


def parts(zero, dp, **options):
    return joint.parts(Model(), dict(x=torch.randn(4, 8)), MeshShape(dp=dp), zero=zero, **options)


@pytest.mark.parametrize("checkpoint", ["none", "full"])
def test_zero_3_gathers_in_forward_and_backward_and_keeps_parts(checkpoint):
    forward, backward = parts(3, dp=2, checkpoint=checkpoint)
    assert calls(forward) == ["ted::gather_enter"] * 3  # up, down and its bias; `odd` does not divide
    assert calls(backward).count("ted::gather_enter") == 1  # down: up's own input needs no gradient
    assert calls(backward).count("ted::reduce_scatter") == 3 and calls(backward).count("ted::all_reduce") == 1
    kept = [tuple(n.meta["val"].shape) for n in forward.graph.output_node().args[0][1:]]
    assert (64, 8) not in kept and (8, 64) not in kept, f"a whole weight is kept: {kept}"


def test_zero_2_scatters_and_gathers_nothing():
    forward, backward = parts(2, dp=2)
    assert calls(forward) == []
    assert sorted(calls(backward)) == ["ted::all_reduce", *["ted::reduce_scatter"] * 3]


@pytest.mark.parametrize("zero", [0, 1])
def test_other_stages_leave_the_graph_alone(zero):
    forward, backward = parts(zero, dp=2)
    assert calls(forward) == [] and calls(backward) == ["ted::all_reduce"]


def test_nothing_to_share_out():
    assert not any(calls(gm) for gm in parts(3, dp=1))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_gathers_start_ahead_of_their_use(device, monkeypatch):
    """But not between CPUs, where gloo's threads must not meet what Python does meanwhile."""
    monkeypatch.setattr(lower, "AHEAD", 0)  # one ahead, whatever its size
    if device == "cuda":
        monkeypatch.setattr(lower, "_wait_at_once", lambda gm: None)
    forward, _ = parts(3, dp=2)
    assert all(map(gather_parameters.is_gather, forward.graph.find_nodes(
        op="call_function", target=torch.ops.ted.gather_enter.default)))  # fmt: skip
    torch.distributed.init_process_group("fake", rank=0, world_size=2)
    try:
        lower.run(forward, {"data": torch.distributed.group.WORLD.group_name, "dp": "", "": ""})
    finally:
        torch.distributed.destroy_process_group()
    names = [line.partition(":")[0] for line in text(forward).splitlines()]
    gathers = [i for i, n in enumerate(names) if n.startswith("all_gather_into_tensor")]
    waits = [i for i, n in enumerate(names) if n.startswith("wait_tensor")]
    if device == "cpu":
        assert waits == [i + 1 for i in gathers] and len(waits) == 3
    else:
        assert gathers[1] < waits[0] < gathers[2] < waits[1] < waits[2]
