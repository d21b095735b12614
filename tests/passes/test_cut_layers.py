"""Equal layers are one segment, others are not, and what is cut computes what the whole graph computes, bit for bit."""

from __future__ import annotations

import functools
import gc
import itertools
import weakref

import pytest
import torch
from torch import nn
from torch.fx import Graph, GraphModule

from tedcompile import graphs
from tedcompile.mesh import MeshShape
from tedcompile.passes import cut_layers, lower, reduce_gradients
from tests import joint, models


@functools.cache
def parts(eps=1e-6):
    """A forward and a backward graph of four layers; `eps` of one norm of the third."""
    model, batch = models.MODELS["qwen3_moe"](num_hidden_layers=4)
    model.model.layers[2].input_layernorm.variance_epsilon = eps
    return joint.parts(model, batch(0, 0), MeshShape(dp=2, ep=2, tp=2))


def layers(cut: cut_layers.Cut) -> list[int]:
    """The forms of the segments with experts, in the order they run."""
    experts = [any("grouped" in str(n.target) for n in s.graph.nodes) for s in cut.segments]
    calls = cut.outer.graph.find_nodes(op="call_module")
    return [cut.form[n.target] for n in calls if experts[cut.form[n.target]]]


def test_equal_layers_are_one():
    forward, backward = (layers(cut_layers.run(graph)) for graph in parts())
    assert len(forward) == len(backward) == 4
    assert forward[0] == forward[1] == forward[2]  # the last one keeps less
    assert len(set(backward)) == 1


def test_another_constant_is_another_layer():
    found = layers(cut_layers.run(parts(eps=1e-3)[0]))
    assert found[0] == found[1] != found[2]


def test_gradients_are_reduced_outside():
    _, backward = parts()
    cut = cut_layers.run(backward)
    outside = [n for n in cut.outer.graph.nodes if graphs.collective(n) == "all_reduce"]
    inside = [n for s in cut.segments for n in s.graph.nodes if graphs.collective(n) == "all_reduce"]
    assert outside and all(n.args[-1] in ("data", "dp") for n in outside)
    assert inside and all(n.args[-1] == "tp" for n in inside)


@pytest.mark.parametrize("zero", [0, 3])
def test_gradients_travel_beside_the_layers_that_follow(zero, monkeypatch):
    """Each is sent before the next layer of the backward, and waited for after the last; large ones, alone, as well."""
    monkeypatch.setattr(reduce_gradients, "BUCKET", 1 << 12)
    monkeypatch.setattr(cut_layers, "_end_early", lambda *_: None)  # each layer one segment
    model, batch = models.MODELS["qwen3_moe"](num_hidden_layers=4)
    mesh = MeshShape(dp=2)
    cut = cut_layers.run(joint.parts(model, batch(0, 0), mesh, zero=zero)[1])
    lower.run(cut.outer, {axis: axis for axis in ("data", "dp")}, in_place=True)
    order = {n: i for i, n in enumerate(cut.outer.graph.nodes)}
    experts = [any("grouped" in str(n.target) for n in s.graph.nodes) for s in cut.segments]
    blocks = [order[n] for n in cut.outer.graph.find_nodes(op="call_module") if experts[cut.form[n.target]]]
    sent = [n for n in order if "reduce" in str(n.target) and "_c10d" in str(n.target)]
    waits = [order[u] for n in sent for u in n.users]
    assert len(blocks) == 4 and len(sent) > 8
    for before, after in itertools.pairwise(blocks):
        assert any(before < order[n] < after for n in sent)
    assert all(at > blocks[-1] for at in waits)


@pytest.mark.parametrize("mesh", [MeshShape(dp=2, ep=2), MeshShape(dp=2, tp=2)], ids=str)
def test_parameters_are_whole_when_they_are_read(mesh, monkeypatch):
    """ZeRO-3: layers are not parted, each wait comes after its start, and what is joined stands before its reader."""
    monkeypatch.setattr(lower, "AHEAD", 1)
    model, batch = models.MODELS["qwen3_moe"](num_hidden_layers=4)
    for graph in joint.parts(model, batch(0, 0), mesh, zero=3):
        cut = cut_layers.run(graph)
        assert len(layers(cut)) == 4
        lower.run(cut.outer, {axis: axis for axis in ("data", "dp", "ep", "tp")}, in_place=True)
        order = {n: i for i, n in enumerate(cut.outer.graph.nodes)}
        assert all(order[a] < order[n] for n in order for a in n.all_input_nodes)
        calls = cut.outer.graph.find_nodes(op="call_module")
        joined = cut.outer.graph.find_nodes(op="call_function", target=torch.ops.aten.cat.default)
        assert joined
        for node in joined:
            first = min(order[u] for u in node.users)
            assert not any(order[node] < order[n] < first for n in calls)


def test_large_gradients_travel_beside_the_rest_of_their_layer(monkeypatch):
    monkeypatch.setattr(reduce_gradients, "BUCKET", 1 << 12)
    model, batch = models.MODELS["qwen3_moe"](num_hidden_layers=4)
    backward = joint.parts(model, batch(0, 0), MeshShape(dp=2))[1]
    cut = cut_layers.run(backward)
    monkeypatch.undo()
    whole = cut_layers.run(backward)  # as if these gradients were small
    has = [
        [any(w in str(n.target) for n in s.graph.nodes) for w in ("grouped_outer", "attention")] for s in cut.segments
    ]
    calls = [cut.form[n.target] for n in cut.outer.graph.nodes if n.op == "call_module"]
    experts, attention = ([n for n in calls if has[n][i]] for i in range(2))
    assert len(experts) == len(attention) == 4
    assert len(set(experts)) == 1 and len(set(attention[:3])) == 1 and set(experts).isdisjoint(attention)
    assert len(cut.segments) <= len(whole.segments) + 2  # what the first layer recomputes may be something else
    order = [n for n in cut.outer.graph.nodes if n.op == "call_module" or graphs.collective(n)]
    last = max(i for i, n in enumerate(order) if n.op == "call_module" and has[cut.form[n.target]][1])
    large = [i for i, n in enumerate(order) if graphs.collective(n) and n.args[0].meta["val"].dim() == 3]
    assert len(large) == 8 and max(large) < last  # also those of the layer that comes last


def test_too_little_repeats():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU())])

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return x.sum()

    for graph in joint.parts(Two(), dict(x=torch.ones(2, 4)), MeshShape()):
        assert cut_layers.run(graph) is None


@pytest.mark.parametrize("name, checkpoint", [("nano_moe", "none"), ("nano_moe", "full")])
def test_same_numbers(name, checkpoint):
    results = []
    for off in ([], ["cut_layers"]):
        model, batch = models.MODELS[name](layers=3)
        run, inputs = joint.build(model, batch(0, 0), MeshShape(), off=off, checkpoint=checkpoint)
        loss = run(*inputs)[0]
        loss.backward()
        results.append([loss.detach(), *(x.grad for x in inputs if x.grad is not None)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_value_goes_before_the_call_that_reads_it_last():
    graph = Graph()
    x = graph.placeholder("x")
    y = graph.call_module("twice", (x,))
    graph.output((graph.call_module("look", (graph.call_module("take", (y,)),)),))
    holder = nn.Module()
    for name in ("twice", "look", "take"):
        holder.add_module(name, nn.Identity())
    seen = []

    def double(args):
        seen.append(weakref.ref(args[0]))
        return 2 * args.pop()

    def look(args):
        gc.collect()
        assert seen[0]() is None and seen[1]() is None
        return args.pop()

    def take(args):
        assert seen[0]() is None
        seen.append(weakref.ref(args[0]))
        return args.pop() + 1

    run = cut_layers.Outer(GraphModule(holder, graph), dict(twice=double, look=look, take=take))
    assert run([torch.ones(2)])[0].tolist() == [3, 3]


def test_dropout_does_not_make_layers_differ():
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

        def forward(self, x):
            return x + nn.functional.dropout(self.down(self.up(x).relu()), 0.5)

    class Dropped(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([Layer() for _ in range(4)])

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return x.square().mean()

    forward, _ = joint.parts(Dropped(), dict(x=torch.ones(6, 8)), MeshShape())
    cut = cut_layers.run(forward)
    rand = [sum("rand" in str(n.target) for n in s.graph.nodes) for s in cut.segments]
    assert sorted(rand)[-1] == 1 and len(cut.form) - len(cut.segments) >= 2
