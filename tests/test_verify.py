"""`verify` finds what is wrong, names it, and says in one sentence what it cannot compare."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tedcompile import pipeline, verify
from tedcompile.cli import main
from tedcompile.mesh import MeshShape
from tedcompile.shrink import fewer, shrink
from tedcompile.trials import vary

from .models import COMMON, families

MODEL = """
import os
import time

import torch
import torch.distributed as dist

from tedcompile.passes import reduce_gradients


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(2))
        self.a, self.b = torch.nn.Linear(8, 16), torch.nn.Linear(16, 8)
        self.change = lambda x: x

    def forward(self, x):
        for layer in self.layers:
            x = layer(x).relu() + x
        return self.change(self.b(self.a(x).relu())).square().mean()


def build():
    return Model(), {"x": torch.randn(4, 8)}


def unreduced():
    reduce_gradients.run = lambda gm, ctx: None
    return build()


def one_unreduced():
    run = reduce_gradients.run

    def without_the_first(gm, ctx):
        every = ctx.gradients
        ctx.gradients = {i: every[i] for i in sorted(every)[1:]}
        run(gm, ctx)
        ctx.gradients = every

    reduce_gradients.run = without_the_first
    return build()


def half():
    model, batch = build()
    return model.bfloat16(), {"x": batch["x"].bfloat16()}


def half_unreduced():
    one_unreduced()
    return half()


def dies():
    if dist.get_rank() == 1:
        os.kill(os.getpid(), 9)
    return build()


def hangs():
    if dist.get_rank() == 1:
        time.sleep(1000)
    return build()
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "model.py"
    path.write_text(MODEL)
    return path


@pytest.fixture
def build(file):
    space = {}
    exec(file.read_text(), space)
    return space["build"]


@pytest.fixture
def mesh():
    """Of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.init_device_mesh("cpu", (1,), mesh_dim_names=("dp",))
    dist.destroy_process_group()


# ---- the command


def test_agrees(tmp_path, capsys):
    pytest.importorskip("transformers")
    values = {"model_type": "qwen3_moe", **COMMON, **families(8)["qwen3_moe"], "num_hidden_layers": 5}
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert main(["verify", str(tmp_path), "--mesh", "ep=2", "--seq", "8", "--steps", "1"]) == 0
    out = capsys.readouterr().out
    assert "num_hidden_layers 5 -> 2" in out
    assert "experts: model.layers.*.mlp split over ep\n" in out and "attention: model.layers.*.self_attn whole" in out
    (row,) = (line for line in out.splitlines() if line.startswith("model.layers.*.mlp "))
    assert "split over ep, not gate.weight" in row and "DIFFERS" not in row
    assert out.splitlines()[-1].startswith("AGREES: losses differ by ")


def test_an_unreduced_gradient(file, capsys):
    assert main(["verify", f"{file}:unreduced", "--mesh", "dp=2", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert not found["ok"]
    assert {p["name"] for p in found["parameters"] if p["gradient"] > 0.1} == {
        f"{name}.{kind}" for name in ("layers.0", "layers.1", "a", "b") for kind in ("weight", "bias")
    }
    assert {p["drift"] for p in found["parameters"]} == {"dp"}
    assert "The first losses agree" in found["diagnosis"][0]
    assert found["diagnosis"][1].startswith("They differ as well without ")


@pytest.mark.parametrize("function", ["one_unreduced", "half_unreduced"])
def test_one_unreduced_gradient_names_its_module(file, capsys, function):
    assert main(["verify", f"{file}:{function}", "--mesh", "dp=2", "--steps", "1", "--no-diagnosis"]) == 1
    out = capsys.readouterr().out
    (row,) = (line for line in out.splitlines() if line.endswith("DIFFERS") and not line.startswith("loss"))
    assert row.startswith("layers.* ") and "weight, layer 0" in row
    assert "DIFFERS: the gradient of layers.0.weight differs by" in out


def test_half_precision_compiled_under_torchrun(file):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "--no-python"]
    command += [str(Path(sys.executable).with_name("tedcompile")), "verify", f"{file}:half", "--mesh", "dp=2"]
    done = subprocess.run([*command, "--backend", "inductor", "--zero", "2"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "cpu, bfloat16, inductor, zero 2" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("AGREES")  # once


def test_an_encoder_and_a_decoder(tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    layers = dict(num_layers=2, num_decoder_layers=2, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1)
    config = transformers.CONFIG_MAPPING["switch_transformers"](**layers, use_cache=False)
    (tmp_path / "config.json").write_text(config.to_json_string())
    assert main(["verify", str(tmp_path), "--mesh", "ep=2", "--seq", "8", "--steps", "1"]) == 0
    out = capsys.readouterr().out
    assert "expert_capacity 64 -> 3" in out and out.splitlines()[-1].startswith("AGREES")
    assert "experts: encoder.block.*.layer split over ep\n" in out
    assert "experts: decoder.block.*.layer split over ep\n" in out


def test_a_rank_that_dies(file, capsys):
    assert main(["verify", f"{file}:dies", "--mesh", "tp=2", "--no-diagnosis"]) == 1
    assert capsys.readouterr().out.startswith("FAILED: rank 1: the process died by signal SIGKILL")


def test_a_rank_that_hangs(file, capsys):
    assert main(["verify", f"{file}:hangs", "--mesh", "tp=2", "--no-diagnosis", "--timeout", "8"]) == 1
    out = capsys.readouterr().out
    assert out.startswith("FAILED: no answer in 8 s; ") and out.count("\n") == 1


@pytest.mark.parametrize(
    "argv, words",
    [
        (["mixtral"], "verify needs --mesh"),
        (["mixtrl", "--mesh", "tp=2"], "unknown model 'mixtrl': did you mean mixtral"),
        (["no.py:build", "--mesh", "tp=2"], "there is no file no.py"),
        (["mixtral", "--mesh", "tp=2", "--seq", "0"], "--seq must be positive, got 0"),
        (["mixtral", "--mesh", "tp=2", "--tolerance", "-1"], "--tolerance must be positive, got -1"),
        (["mixtral", "--mesh", "tp=2", "--backend", "triton"], "unknown backend 'triton': choose "),
        (["mixtral", "--mesh", "tp=2", "--off", "polish"], "there is no optimisation 'polish'"),
        (["mixtral", "--mesh", "tp=2", "--zero", "4"], "zero cannot be 4"),
        (["mixtral", "--mesh", "tp=512", "--device", "cuda"], "512 processes need a GPU each, this machine has"),
        (["mixtral", "--mesh", "tp=2", "--full"], "leave --full out"),
        (["mixtral", "--mash", "tp=2"], "unknown option --mash: did you mean --mesh?"),
    ],
)
def test_bad_arguments(argv, words, capsys):
    assert main(["verify", *argv]) == 2
    out, err = capsys.readouterr()
    assert words in err and out == "" and err.count("\n") == 1


def test_a_refusal_of_the_ranks(file, capsys):
    assert main(["verify", f"{file}:nothing", "--mesh", "tp=2"]) == 2
    assert "has no function 'nothing'" in capsys.readouterr().err


# ---- the function


def test_the_model_stays_as_it_is(build, mesh):
    model, batch = build()
    model.drop = torch.nn.Dropout(0.5)
    model.change = lambda x: model.drop(x)
    model.eval()
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    found = verify(model, mesh, batch)
    assert found.ok and str(found).splitlines()[-1].startswith("AGREES")
    assert not model.training and model.drop.p == 0.5 and type(model).__name__ == "Model"
    assert all(p.grad is None and p.equal(before[n]) for n, p in model.named_parameters())
    assert torch.get_rng_state().equal(state)


def test_a_wrong_pass_is_named(build, mesh, monkeypatch):
    run = dict(pipeline.FORWARD)["simplify_collectives"]

    def wrong(gm, ctx):
        run(gm, ctx)
        output = gm.graph.output_node()
        (loss,) = output.args[0]
        with gm.graph.inserting_before(output):
            more = gm.graph.call_function(torch.ops.aten.mul.Scalar, (loss, 1.001))
        more.meta = dict(loss.meta)
        output.replace_input_with(loss, more)

    passes = [(name, wrong if run is other else other) for name, other in pipeline.FORWARD]
    monkeypatch.setattr(pipeline, "FORWARD", passes)
    model, batch = build()
    found = verify(model, mesh, batch)
    assert not found.ok and found.loss == pytest.approx(1e-3, rel=1e-3)
    assert found.diagnosis[0] == "The first loss differs already: the forward computes something else."
    assert found.diagnosis[1].startswith("They agree without simplify_collectives (off=simplify_collectives)")
    assert found.table().count("DIFFERS") == 3
    names = [line.split()[0] for line in found.table("layers").splitlines()[2:]]
    assert names == ["layers.0.weight", "layers.0.bias", "layers.1.weight", "layers.1.bias"]


def test_what_cannot_be_compared(build, mesh):
    model, batch = build()
    with pytest.raises(TypeError, match="verify needs a torch DeviceMesh"):
        verify(model, "tp=2", batch)
    model.change = lambda x: x + torch.rand_like(x)
    with pytest.raises(ValueError, match="not deterministic, on the same batch it gives other numbers"):
        verify(model, mesh, batch)
    model.change = lambda x: x / 0
    with pytest.raises(ValueError, match="the plain model's loss is (inf|nan)"):
        verify(model, mesh, batch)
    with pytest.raises(ValueError, match="meta device"):
        verify(model.to("meta"), mesh, batch)


# ---- shrinking and batches


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_a_shrunken_configuration_is_the_same_kind_of_model(kind):
    transformers = pytest.importorskip("transformers")
    config = transformers.CONFIG_MAPPING[kind]()
    small, changes = shrink(config, MeshShape(1, 2, 2))
    old, new = config.to_dict(), small.to_dict()
    assert {c.split()[0] for c in changes} <= {k for k in old if old[k] != new[k]}
    assert new["hidden_size"] == 64 and new["vocab_size"] == 256
    experts = next(k for k in ("n_routed_experts", "num_local_experts", "num_experts") if k in new)
    assert new[experts] % 4 == 0 and new["num_experts_per_tok"] == min(old["num_experts_per_tok"], 4) < new[experts]
    assert (new["num_key_value_heads"] == new["num_attention_heads"]) == (
        old["num_key_value_heads"] == old["num_attention_heads"]
    )
    if kind == "deepseek_v3":  # a dense layer and a sparse one
        assert new["num_hidden_layers"] == 2 and new["first_k_dense_replace"] == 1 and new["n_group"] > 1
    if kind == "gpt_oss":
        assert new["layer_types"] == ["sliding_attention", "full_attention"]


def test_layers_show_every_kind():
    """The fewest layers that have an entry of every list; where their places decide as well, the first ones."""
    transformers = pytest.importorskip("transformers")
    lists = dict(layer_types=[*["sliding_attention"] * 3, "full_attention", "sliding_attention", "full_attention"])
    config = transformers.CONFIG_MAPPING["gpt_oss"](num_hidden_layers=6, **lists)
    small, _ = shrink(config, MeshShape(1, 2, 2))
    assert small.layer_types == ["sliding_attention", "full_attention"] and small.num_hidden_layers == 2
    config = transformers.CONFIG_MAPPING["qwen3_moe"](num_hidden_layers=6, mlp_only_layers=[0, 1, 3])
    small, _ = shrink(config, MeshShape(1, 2, 2))
    assert small.num_hidden_layers <= 3 and 0 < len(small.mlp_only_layers) < small.num_hidden_layers


def test_what_no_axis_divides_stays_so():
    assert [fewer(count, 4, 4) for count in (32, 6, 7, 3, 0)] == [4, 6, 7, 3, 0]
    assert fewer(60, 8, 8) == 10 and fewer(64, 8, 8) == 8


def test_batches_of_other_ranks_and_steps():
    ids = torch.arange(16).view(2, 8) * 7 % 11
    example = {
        "ids": ids, "labels": ids + 1, "mask": torch.ones(2, 8, dtype=torch.bool),
        "positions": torch.arange(8).expand(2, 8).contiguous(), "only_a_shape": torch.zeros(2, 4, dtype=torch.int64),
        "x": torch.randn(2, 8), "scale": 2.0, "attention_mask": torch.ones(2, 8, dtype=torch.int64),
    }  # fmt: skip
    a, b = (vary(example, 11, seed) for seed in (0, 1))
    assert not a["ids"].equal(b["ids"]) and a["ids"].sort().values.ne(0).any()
    assert a["labels"].equal(a["ids"] + 1)
    assert a["positions"].equal(example["positions"]) and a["mask"].all() and a["attention_mask"].eq(1).all()
    assert a["scale"] == 2.0
    assert a["only_a_shape"].min() >= 0 and 0 < a["only_a_shape"].max() < 11
    assert vary(example, 11, 0)["x"].equal(a["x"]) and not a["x"].equal(b["x"])
