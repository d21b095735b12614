"""Reading weights: what of a file is read, what is refused, and what a model without files is given."""

from __future__ import annotations

import copy
import json
import pickle
import re
import struct

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.tensor import Replicate, Shard

import tedcompile
from tedcompile import compat, weights
from tedcompile.lazy import Lazy, cut, part, read_part, write_part
from tests import models


@pytest.fixture(scope="module")
def mesh():
    """A world of this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.init_device_mesh("cpu", (1, 1, 1), mesh_dim_names=("dp", "ep", "tp"))
    dist.destroy_process_group()


def config(**sizes):
    from transformers import AutoConfig

    family = {**models.COMMON, **models.families(4)["qwen3_moe"], "num_hidden_layers": 1, **sizes}
    return AutoConfig.for_model("qwen3_moe", **family)


def empty(**sizes) -> nn.Module:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config(**sizes), dtype=torch.float32)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint of several files, and the model's own tensors."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(), dtype=torch.float32)
    models.randomise(model)
    folder = tmp_path_factory.mktemp("saved")
    model.save_pretrained(folder, max_shard_size="60KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder, {n: t.detach() for n, t in (*model.named_parameters(), *model.named_buffers())}


@pytest.fixture
def folder(saved, tmp_path):
    """A copy that a test may damage."""
    for file in saved[0].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


# ---- reading in part


def recorded(value: torch.Tensor, log: list) -> Lazy:
    def read(region):
        log.append(tuple(b - a for a, b in region))
        return cut(value, region).clone()

    return Lazy.of(value.shape, value.dtype, read)


def test_a_rank_reads_only_its_slices_of_stacked_and_joined_tensors():
    log: list = []
    gates, ups = (list(torch.randn(4, 6, 8).unbind()) for _ in range(2))
    fused = torch.cat([torch.stack([recorded(t, log) for t in ts], dim=0) for ts in (gates, ups)], dim=1)
    whole = torch.cat([torch.stack(gates), torch.stack(ups)], dim=1)
    ranges = part(fused.shape, [Replicate(), Shard(0), compat.strided_shard(1, 2)], (0, 1, 1), (1, 2, 2))
    mine = read_part(fused.read, ranges, torch.float64, torch.device("cpu"))
    expected = torch.cat([torch.stack(gates)[2:, 3:], torch.stack(ups)[2:, 3:]], dim=1)
    assert torch.equal(mine, expected.double())
    assert log == [(3, 8)] * 4  # two experts' gates and ups, half of each
    again = torch.zeros_like(whole)
    write_part(again, ranges, mine.float())
    assert torch.equal(again[2:, 3:6], whole[2:, 3:6]) and again.count_nonzero() == mine.numel()


@pytest.mark.parametrize(
    "change",
    [
        lambda t: torch.chunk(t, 3, dim=-1)[1].contiguous(),
        lambda t: torch.split(t, [1, 3], dim=0)[1],
        lambda t: torch.transpose(t, dim0=0, dim1=2).contiguous(),
        lambda t: torch.chunk(t, 4, dim=0)[2].squeeze(0),
        lambda t: torch.stack([t, t.detach()], dim=-1),
        lambda t: t.reshape(2, 2, 5, 6).transpose(0, 1).reshape(t.shape),  # read whole
        lambda t: torch.cat([t * 2, t[1:]]),
        lambda t: t.squeeze(),
    ],
)
def test_a_lazy_tensor_is_what_its_ops_make(change):
    value = torch.randn(4, 5, 6)
    lazy, real = change(recorded(value, [])), change(value)
    assert isinstance(lazy, Lazy) and lazy.shape == real.shape
    assert recorded(value, []).transpose(0, 1).sliced and not recorded(value, []).reshape(-1).sliced
    assert torch.equal(lazy.read(), real)
    region = tuple((n // 2, n) for n in real.shape)
    assert torch.equal(lazy.read(region), cut(real, region))


def test_a_change_in_place_of_what_is_not_read_is_refused():
    with pytest.raises(NotImplementedError, match="mul_ changes"):
        recorded(torch.ones(2), []).mul_(2)


# ---- from a folder


def test_from_files_in_another_dtype_and_layout(mesh, saved, tmp_path):
    """bf16 files for an fp32 model; fused experts, as transformers writes them on request."""
    from transformers import AutoModelForCausalLM

    folder, values = saved
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path, save_original_format=False)
    assert "model.layers.0.mlp.experts.gate_up_proj" in load_file(tmp_path / "model.safetensors")
    model = empty()
    values = {n: t.bfloat16().float() if "inv_freq" not in n else t for n, t in values.items()}
    tedcompile.parallelize(model, mesh, weights=tmp_path, backend="eager")
    for name, t in (*model.named_parameters(), *model.named_buffers()):
        assert torch.equal(compat.local_tensor(t), values[name]), name


def test_a_model_with_values_gets_those_of_the_folder(mesh, saved):
    from transformers import AutoModelForCausalLM

    folder, values = saved
    model = AutoModelForCausalLM.from_config(config(), dtype=torch.float32)
    assert not torch.equal(model.lm_head.weight, values["lm_head.weight"])
    tedcompile.parallelize(model, mesh, weights=folder, backend="eager")
    for name, t in (*model.named_parameters(), *model.named_buffers()):
        assert torch.equal(compat.local_tensor(t), values[name]), name


def change(folder, file, **tensors):
    path = folder / file
    save_file({n: t for n, t in {**load_file(path), **tensors}.items() if t is not None}, path, {"format": "pt"})


def index(folder) -> dict:
    return json.loads((folder / weights.INDEX).read_text())["weight_map"]


EXPERT = "model.layers.0.mlp.experts.2.up_proj.weight"


def missing(folder):
    change(folder, index(folder)[EXPERT], **{EXPERT: None})
    write(folder, {n: f for n, f in index(folder).items() if n != EXPERT})


def write(folder, where):
    (folder / weights.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))


def unexpected(folder):
    name, file = "model.layers.7.mlp.gate.weight", index(folder)[EXPERT]
    change(folder, file, **{name: torch.zeros(4, 64)})
    write(folder, {**index(folder), name: file})


def truncated(folder):
    path = folder / index(folder)[EXPERT]
    path.write_bytes(path.read_bytes()[:-8])


def no_header(folder):
    (folder / index(folder)[EXPERT]).write_bytes(b"abc")


def pickled(folder):
    (folder / index(folder)[EXPERT]).write_bytes(pickle.dumps(Malicious(folder / "executed")))


def quantised(folder):
    path = folder / index(folder)[EXPERT]
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    end = header[EXPERT]["data_offsets"]
    header[EXPERT] = {"dtype": "F8_E4M3", "shape": [end[1] - end[0]], "data_offsets": end}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


BROKEN = {
    missing: rf"has no tensor {EXPERT}, of which the model's model.layers.0.mlp.experts.gate_up_proj is made",
    unexpected: r"\.safetensors: tensor model.layers.7.mlp.gate.weight \(4, 64\) is no part of Qwen3MoeForCausalLM",
    truncated: r"\.safetensors is not a whole safetensors file \(tensor .* is cut off\)",
    no_header: r"\.safetensors is not a whole safetensors file: ",
    pickled: r"\.safetensors is not a whole safetensors file: ",
    quantised: rf"\.safetensors: tensor {EXPERT} is of type F8_E4M3",
    lambda f: change(f, index(f)[EXPERT], **{EXPERT: torch.zeros(47, 64)}): (
        rf"\.safetensors: tensor {EXPERT} has shape \(47, 64\), but the model's .*gate_up_proj \(4, 96, 64\) needs "
        r"\(48, 64\)"
    ),
    lambda f: change(f, index(f)["lm_head.weight"], **{"lm_head.weight": torch.zeros(127, 64)}): (
        r"\.safetensors: tensor lm_head.weight has shape \(127, 64\), but the model's lm_head.weight \(128, 64\) needs"
    ),
    lambda f: write(f, {**index(f), EXPERT: "../x.safetensors"}): r"is in '../x.safetensors', which is no safetensors",
    lambda f: write(f, {**index(f), EXPERT: "pytorch_model.bin"}): r"'pytorch_model.bin', which is no safetensors file",
    lambda f: write(f, {**index(f), "nothing": index(f)[EXPERT]}): r"says that tensor nothing is in .*does not hold it",
    lambda f: write(
        f, {n: x for n, x in index(f).items() if n != EXPERT}
    ): rf"holds tensor {EXPERT}, which .* not list",
    lambda f: (f / index(f)[EXPERT]).unlink(): r"index.json says that tensor .* is in .*, which is missing",
    lambda f: (f / weights.INDEX).write_text("{"): r"index.json is no index of safetensors files",
    lambda f: write(f, ["a"]): r"index.json is no index of safetensors files",
    lambda f: (f / weights.INDEX).unlink(): r"holds neither model.safetensors nor model.safetensors.index.json",
}


@pytest.mark.parametrize("damage", BROKEN, ids=range(len(BROKEN)))
def test_a_damaged_folder_is_refused_in_a_sentence(folder, damage):
    damage(folder)
    with pytest.raises(ValueError, match=BROKEN[damage]) as refused:
        weights.plan(empty(), folder)
    assert str(folder) in str(refused.value) and "\n" not in str(refused.value)
    assert not (folder / "executed").exists()


def test_nothing_is_half_loaded(mesh, folder, monkeypatch):
    """A file that fails while it is read: the model is as it was, and loads when the file is whole again."""
    model, original, read = empty(), {}, weights.read_region
    original = dict(model.named_parameters())

    def fails(file, path, name, region):
        if name == "model.norm.weight":
            raise ValueError(f"{path}: tensor {name} cannot be read: a bad disk")
        return read(file, path, name, region)

    monkeypatch.setattr(weights, "read_region", fails)
    with pytest.raises(ValueError, match="tensor model.norm.weight cannot be read: a bad disk"):
        tedcompile.parallelize(model, mesh, weights=folder, backend="eager")
    assert type(model).__name__ == "Qwen3MoeForCausalLM"
    assert all(p is original[n] and p.is_meta for n, p in model.named_parameters())
    assert getattr(model, "_weight_conversions", None) is None


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "checkpoint.pth"])
def test_a_pickle_is_never_executed(folder, name):
    executed = folder / "executed"
    (folder / name).write_bytes(pickle.dumps(Malicious(executed)))
    weights.plan(empty(), folder)  # beside good files
    assert not executed.exists()
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    with pytest.raises(ValueError, match=rf"{re.escape(name)} may be a pickle, which can run code, and is never read"):
        weights.plan(empty(), folder)
    assert not executed.exists()
    pickle.loads((folder / name).read_bytes())
    assert executed.exists()  # it would have


# ---- without files


def initialised(model: nn.Module, seed: int) -> dict[str, torch.Tensor]:
    named = {id(t): n for n, t in (*model.named_parameters(), *model.named_buffers())}
    made = weights.read(model, weights.plan(model, None), {}, seed, torch.device("cpu"))
    assert made.keys() == named.keys()
    return {named[ident]: t for ident, t in made.items()}


@pytest.mark.parametrize("family", models.families(4))
def test_a_model_gets_its_own_initialisation(family):
    from transformers import AutoConfig, AutoModelForCausalLM

    # larger than the other tests', so that two draws have the same deviation
    sizes = {**models.COMMON, **models.families(4)[family]}
    small = AutoConfig.for_model(family, **sizes | dict(num_hidden_layers=2, initializer_range=0.03))
    torch.manual_seed(1)
    real = AutoModelForCausalLM.from_config(small, dtype=torch.float32)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(small, dtype=torch.float32)
    state = torch.get_rng_state()
    made, again, other = initialised(model, 5), initialised(model, 5), initialised(model, 6)
    assert torch.equal(state, torch.get_rng_state())
    assert all(t.is_meta for t in model.parameters())
    for name, want in (*real.named_parameters(), *real.named_buffers()):
        found = made[name]
        assert torch.equal(found, again[name]), name
        if want.detach().unique().numel() <= 2 or "inv_freq" in name:
            assert torch.equal(found, want), name
        else:
            assert not torch.equal(found, other[name]), name
            spread = 6 / want.numel() ** 0.5
            assert abs(found.std() / want.std() - 1) < spread and abs(found.mean()) < spread * want.std(), name


class Tied(nn.Module):
    """nanoGPT's idiom: `apply(self._init_weights)` after the modules' own, and one weight under two names."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(64, 64), nn.Linear(64, 64)
        self.head.weight = self.embed.weight
        self.apply(self._init_weights)

    def _init_weights(self, module):
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.5)


def test_a_plain_module_gets_its_own_initialisation(tmp_path):
    with torch.device("meta"):
        model = Tied()
    made = initialised(model, 0)
    assert made.keys() == {"embed.weight", "head.bias"}
    assert made["embed.weight"].std() == pytest.approx(0.5, rel=0.1)
    assert 0 < made["head.bias"].abs().max() <= 1 / 8
    save_file({"head.weight": torch.ones(64, 64), "head.bias": torch.zeros(64)}, tmp_path / "model.safetensors")
    plan = weights.plan(model, tmp_path)  # either name of a tied weight will do
    assert plan.files.keys() == {id(model.embed.weight), id(model.head.bias)} and not plan.made


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.register_buffer("mask", torch.ones(3, dtype=torch.bool), persistent=False)


class Scaled(Scale):
    def reset_parameters(self):
        nn.init.ones_(self.scale)


class Above(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def reset_parameters(self):
        nn.init.ones_(self.linear.weight)


@pytest.mark.parametrize(
    "make, message",
    [
        (Scale, r"scale is on the meta device and gets no values .*\(Scale needs a reset_parameters"),
        (Scaled, r"mask is on the meta device and gets no values"),
        (Above, r"linear.weight is initialised by another module than its own"),
    ],
)
def test_values_that_only_a_constructor_knows_are_not_made_up(make, message):
    with torch.device("meta"):
        model = make()
    before = copy.copy(list(model.parameters()))
    with pytest.raises(ValueError, match=message):
        initialised(model, 0)
    assert all(a is b for a, b in zip(before, model.parameters()))
