"""What is kept between forward and backward, what is replayed, and when."""

import itertools

import pytest
import torch
from torch import nn

from tedcompile import graphs
from tedcompile.capture import layer_of, module_path
from tedcompile.layouts import aten
from tedcompile.mesh import MeshShape
from tedcompile.ops import ops
from tedcompile.passes.checkpoint import ROUTING, base
from tests.joint import build, parts, replayed
from tests.models import example

FULL = dict(checkpoint="full")
AGAIN = dict(checkpoint="full", off=["save_collectives"])
HALF = dict(checkpoint="selective", memory_budget=0.5)
MESH = MeshShape(ep=2, tp=2)


def model(**sizes):
    module, make_batch = example("nano_moe", heads=4, **sizes)
    return module, make_batch(0, 0)


def step(options, **sizes):
    """Bytes of activations between forward and backward, the loss and all gradients."""
    module, batch = model(**sizes)
    function, inputs = build(module, batch, MeshShape(), **options)
    own = {t.untyped_storage().data_ptr() for t in inputs}
    kept = {}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = function(*inputs)[0]
    gradients = torch.autograd.grad(loss, [t for t in inputs if t.requires_grad], materialize_grads=True)
    return sum(kept.values()), [loss.detach(), *gradients]


def test_memory():
    """Less is kept, to the budget that was given; values and gradients are the same, dropout included."""
    none, want = step({}, layers=3, dropout=0.2)
    sizes = [none]
    for options, most in (
        (dict(HALF, memory_budget=0.7), 0.7),
        (HALF, 0.5),
        (dict(HALF, memory_budget=3e5), 3e5 / none),
    ):
        size, found = step(options, layers=3, dropout=0.2)
        assert all(map(torch.equal, found, want))
        assert size <= most * none
        sizes.append(size)
    full, found = step(FULL, layers=3, dropout=0.2)
    assert all(map(torch.equal, found, want))
    assert full < 0.3 * none
    assert sizes[0] > sizes[1] > sizes[2] > full


def peak(nodes, graph):
    """The most bytes of the given nodes' storages that live at once."""
    order = {n: i for i, n in enumerate(graph.nodes)}
    last: dict = {}
    for n in graph.nodes:
        for user in (n, *n.users):
            last[base(n)] = max(last.get(base(n), 0), order[user])
    changes = [0] * (len(order) + 1)
    for n in nodes:
        if base(n) is n:
            value = n.meta["val"]
            size = sum(t.nbytes for t in (value if isinstance(value, (tuple, list)) else [value]))
            changes[order[n]] += size
            changes[last[n] + 1] -= size
    return max(itertools.accumulate(changes))


def test_one_layer_is_replayed_at_a_time():
    peaks = []
    for layers in (2, 6):
        module, batch = model(layers=layers)
        forward, backward = parts(module, batch, MeshShape(), **FULL)
        again = replayed(forward, backward)
        paths = [layer_of(module_path(n)) for n in again]
        inside = [key for key, _ in itertools.groupby(p for p in paths if p)]
        assert inside == [f"blocks.{i}" for i in reversed(range(layers))]
        peaks.append(peak([n for n, p in zip(again, paths) if p], backward.graph))
    assert peaks[1] == peaks[0] > 0


@pytest.mark.parametrize("options", [FULL, AGAIN, HALF], ids=["full", "sent_again", "selective"])
def test_what_is_never_replayed(options):
    """Routing is not drawn twice, sizes are not made twice, and collectives are sent again only when asked for."""
    module, batch = model(dropout=0.2)
    forward, backward = parts(module, batch, MESH, **options)
    again = replayed(forward, backward)
    assert again
    assert not ROUTING.intersection(n.target for n in again)
    assert not any(n.target in (ops.all_to_all.default, ops.permute.default) for n in backward.graph.nodes)
    assert not any(n.meta.get("unbacked_bindings") for n in backward.graph.nodes if n.op == "call_function")
    kinds = {graphs.collective(n) for n in again} - {""}
    assert kinds == ({"all_reduce", "all_to_all"} if "off" in options else set())


def test_full_replays_what_the_gradients_read():
    """Attention and the first product of the experts; not the second one, of whose result only the size is read."""
    module, make_batch = example("shared_expert_moe", heads=8, kv_heads=4)
    forward, backward = parts(module, make_batch(0, 0), MESH, **FULL)
    again = [n.target for n in replayed(forward, backward)]
    assert sum("_scaled_dot_product" in str(t) for t in again) == 2
    assert again.count(ops.grouped_mm.default) == 2
    assert [n.target for n in forward.graph.nodes].count(ops.grouped_mm.default) == 4
    assert not any("rng_state" in str(n.target) for gm in (forward, backward) for n in gm.graph.nodes)


class TwoLayers(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 8), nn.Tanh()) for _ in range(2)
        )

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return {"loss": x.mean()}


def test_pinned():
    """Of an MLP on tp=2 what enters and leaves the layers is kept; a sum over tp is too, were it read."""
    forward, backward = parts(TwoLayers(), dict(x=torch.randn(4, 8)), MeshShape(tp=2), **FULL)
    kept = [n for n in forward.graph.output_node().args[0][1:] if n.op == "call_function"]
    assert [str(base(n)) for n in kept] == ["add", "tanh_3", "tanh_1"]
    again = [str(n) for n in replayed(forward, backward) if base(n) is n]
    assert again == ["addmm_2", "tanh_2", "addmm", "tanh"]


def test_without_layers_nothing_is_replayed():
    module = TwoLayers().layers[0][0]

    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = module

        def forward(self, x):
            return {"loss": self.inner(x).exp().exp().mean()}

    forward, backward = parts(Loss(), dict(x=torch.randn(4, 8)), MeshShape(), **FULL)
    assert not any(n.target is aten.addmm.default for n in replayed(forward, backward))
