"""The command line: what it prints, and one sentence with exit code 2 for what cannot work."""

import json
import os
import sys

import pytest

from tedcompile.cli import main

from .models import COMMON, families

pytest.importorskip("transformers")


@pytest.fixture
def config(tmp_path):
    values = {"model_type": "mixtral", **COMMON, **families(8)["mixtral"]}
    (tmp_path / "config.json").write_text(json.dumps(values))
    return tmp_path


PLAIN = """
import torch

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = torch.nn.Linear(8, 16), torch.nn.Linear(16, 8)

    def forward(self, x):
        return self.b(self.a(x).relu()).square().mean()

def build():
    return Model(), {"x": torch.randn(4, 8)}

def reads_values():
    assert torch.ones(()).item() == 1
    return Model(), {"x": torch.randn(4, 8)}

def no_loss():
    return torch.nn.Linear(8, 8), {"input": torch.randn(4, 8)}

def wrong():
    return Model()

def wrong_inputs():
    return Model(), torch.randn(4, 8)

def fails():
    raise RuntimeError("no such thing")

class Branches(Model):
    def forward(self, x):
        return self.a(x).sum() if x.sum() > 0 else self.b(x)

def branches():
    return Branches(), {"x": torch.randn(4, 8)}

number = 3
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "plain.py"
    path.write_text(PLAIN)
    return path


def failure(capsys, *argv) -> str:
    assert main(["explain", *map(str, argv)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("tedcompile: ") and err.count("\n") == 1
    return err


def test_json_of_a_folder_and_of_its_file(config, capsys):
    for path in (config, config / "config.json"):
        assert main(["explain", str(path), "--mesh", "ep=2,tp=2", "--seq", "16", "--dtype", "fp32", "--json"]) == 0
        facts = json.loads(capsys.readouterr().out)
        assert facts["model"] == "MixtralForCausalLM" and facts["mesh"] == {"dp": 1, "ep": 2, "tp": 2}
        moved = [c for c in facts["collectives"] if c["axis"] == "ep" and c["role"] == "payload"]
        assert {c["bytes_per_rank"] for c in moved} == {16 * 2 * 64 * 4}


def test_text(config, capsys):
    assert main(["explain", str(config), "--mesh", "tp=2", "--seq", "16", "--layer", "1"]) == 0
    out, err = capsys.readouterr()
    assert "model.layers.1: MixtralDecoderLayer" in out and "\033" not in out and err == ""


def test_a_users_function(file, capsys):
    for function in ("build", "reads_values"):
        assert main(["explain", f"{file}:{function}", "--mesh", "tp=2"]) == 0
        out = capsys.readouterr().out
        assert "linear = linear(enter, a.weight, a.bias)" in out or "linear = linear(x, a.weight, a.bias)" in out
        assert "all_reduce" in out


@pytest.mark.parametrize(
    "argv, words",
    [
        (["mixtrl", "--mesh", "tp=2"], "unknown model 'mixtrl': did you mean mixtral"),
        (["zzzzzz", "--mesh", "tp=2"], "unknown model 'zzzzzz': give a transformers model type"),
        (["no/config.json", "--mesh", "tp=2"], "cannot read no/config.json: No such file"),
        (["no.py:build", "--mesh", "tp=2"], "there is no file no.py"),
        (["no.py", "--mesh", "tp=2"], "no.py names no function: write no.py:FUNCTION"),
        (["mixtral", "--mesh", "xp=2"], "unknown mesh axis 'xp'"),
        (["mixtral", "--mesh", "tp=two"], "mesh axis tp needs a size of at least 1, got 'two'"),
        (["mixtral", "--mesh", "tp=0"], "mesh axis tp needs a size of at least 1"),
        (["mixtral", "--mesh", "tp=2,tp=2"], "mesh axis tp is given twice"),
        (["mixtral", "--mesh", "tp=2", "--dtype", "bf17"], "unknown dtype 'bf17': choose bf16, fp16 or fp32"),
        (["mixtral", "--mesh", "tp=2", "--batch", "0"], "batch must be at least 1, got 0"),
        (["mixtral", "--mesh", "tp=2", "--seq", "-3"], "seq must be at least 1, got -3"),
        (["mixtral", "--mesh", "tp=2", "--layer", "first"], "--layer takes a number or all, not 'first'"),
        (["mixtral", "--mesh", "tp=2", "--pass", "polish"], "unknown pass 'polish': the passes are functionalise, "),
        (["mixtral", "--mesh", "tp=2", "--machine", "h300"], "there is no machine 'h300': choose v100, a100"),
        (["mixtral", "--mesh", "tp=2", "--machine", "no.toml"], "cannot read no.toml: No such file"),
        (["mixtral"], "explain needs --mesh"),
        (["mixtral", "--mash", "ep=2,tp=2"], "unknown option --mash: did you mean --mesh?"),
        (["mixtral", "--mesh", "tp=2", "--sek=8"], "unknown option --sek: did you mean --seq?"),
        (["mixtral", "--mesh", "tp=2", "--zzz"], "unknown option --zzz: the options are --help, --mesh, "),
        (["mixtral", "tp=2"], "explain has no use for 'tp=2'"),
        (["--mesh", "tp=2"], "the following arguments are required: MODEL"),
        (["mixtral", "--mesh", "tp=2", "--batch", "one"], "argument --batch: invalid int value: 'one'"),
        (["vit", "--mesh", "tp=2"], "no causal or sequence-to-sequence language model of type 'vit'"),
    ],
)
def test_bad_arguments(argv, words, capsys):
    assert words in failure(capsys, *argv)


@pytest.mark.parametrize(
    "function, words",
    [
        ("nothing", "has no function 'nothing'"),
        ("number", "has no function 'number'"),
        ("wrong", "must return (model, example_inputs), an nn.Module and a dict, not Model"),
        ("wrong_inputs", "example_inputs must be a dict or a tuple, not Tensor"),
        ("fails", "failed: RuntimeError: no such thing"),
        ("no_loss", "Linear returns no loss in training"),
        ("branches", "Branches cannot be captured"),
    ],
)
def test_bad_functions(function, words, file, capsys):
    assert words in failure(capsys, f"{file}:{function}", "--mesh", "tp=2")


def test_options_that_a_function_has_no_use_for(file, capsys):
    assert "--seq is for transformers models" in failure(capsys, f"{file}:build", "--mesh", "tp=2", "--seq", 8)


def test_a_file_that_cannot_be_imported(tmp_path, capsys):
    path = tmp_path / "broken.py"
    path.write_text("import no_such_module")
    assert "No module named 'no_such_module'" in failure(capsys, f"{path}:build", "--mesh", "tp=2")


def test_bad_configurations(tmp_path, config, capsys):
    (tmp_path / "empty").mkdir()
    assert "holds no config.json" in failure(capsys, tmp_path / "empty", "--mesh", "tp=2")
    path = tmp_path / "bad.json"
    path.write_text("{")
    assert "is not JSON" in failure(capsys, path, "--mesh", "tp=2")
    path.write_text('{"model_type": "mixtrel"}')
    assert "model_type 'mixtrel'" in failure(capsys, path, "--mesh", "tp=2")
    assert "layer 7 is out of range: the model has layers 0 to 1" in failure(
        capsys, config, "--mesh", "tp=2", "--seq", 16, "--layer", 7
    )


def test_without_transformers(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "pip install 'tedcompile[hf]'" in failure(capsys, "mixtral", "--mesh", "tp=2")


def test_commands(capsys):
    for argv, words in (([], "required: COMMAND (see tedcompile --help)"), (["explan"], "invalid choice: 'explan'")):
        assert main(argv) == 2
        out, err = capsys.readouterr()
        assert words in err and out == "" and err.count("\n") == 1
    assert main(["calibrate", "--oot", "x.toml"]) == 2
    assert "unknown option --oot: did you mean --out?" in capsys.readouterr().err


def test_reader_that_stops_reading(file, monkeypatch):
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        assert main(["explain", f"{file}:build", "--mesh", "tp=2"]) == 0
