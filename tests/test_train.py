"""`tedcompile train`: the data, the options, and a run on one process that is broken off and goes on."""

import json
import signal
import sys

import pytest
import torch

from tedcompile import data, train
from tedcompile.cli import main
from tedcompile.settings import Settings

pytest.importorskip("transformers")

CONFIG = dict(
    model_type="qwen3_moe",
    vocab_size=256,
    hidden_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    max_position_embeddings=64,
)
PLAIN = """
import torch

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = torch.nn.Embedding(256, 16), torch.nn.Linear(16, 256)

    def forward(self, idx, targets):
        return torch.nn.functional.cross_entropy(self.head(self.embed(idx)).flatten(0, 1), targets.flatten())

def build():
    return Model(), {"idx": torch.zeros(2, 8, dtype=torch.int64), "targets": torch.zeros(2, 8, dtype=torch.int64)}

def other():
    return Model(), {"idx": torch.zeros(2, 8)}
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 60)
    (tmp_path / "plain.py").write_text(PLAIN)
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "pickled" / "model.bin").write_text("")
    monkeypatch.chdir(tmp_path)
    return tmp_path


COMMON = "--data text.txt --seq 16 --batch 2 --micro-batches 2 --dtype fp32 --device cpu --backend eager --log-every 1"


def call(*options, common=COMMON):
    return main(["train", *common.split(), *(o for text in options for o in text.split())])


def metrics(folder, name="loss"):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[name] for line in lines if name in line}


# ---- data


def tokens(tmp_path, *names, tokenizer="bytes", vocabulary=256):
    file = data.tokenise(
        data.files([str(tmp_path / n) for n in names]), data.tokenizer(tokenizer), tmp_path / "out", vocabulary
    )
    return data.Sequences(file, seq=4).flat.tolist()


def test_documents_of_every_kind_are_joined(tmp_path):
    (tmp_path / "a.txt").write_text("hé")
    (tmp_path / "b.jsonl").write_text('{"text": "x"}\n\n{"input_ids": [5, 6], "text": null}\n{"tokens": [7]}\n')
    numpy = pytest.importorskip("numpy")
    numpy.save(tmp_path / "c.npy", numpy.array([[1, 2], [3, 4]], dtype="uint16"))
    expected = [104, 0xC3, 0xA9, 0, 120, 0, 5, 6, 7, 1, 2, 3, 4]
    assert tokens(tmp_path, "a.txt", "b.jsonl", "c.npy") == expected
    assert tokens(tmp_path, "") == expected, "a folder is its files in order"
    assert tokens(tmp_path, "b.jsonl", vocabulary=1000) == [120, 0, 5, 6, 7]


def test_parquet_and_saved_datasets(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"id": [1, 2], "text": ["ab", "c"]}), tmp_path / "a.parquet")
    assert tokens(tmp_path, "a.parquet") == [97, 98, 0, 99, 0]
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"input_ids": [[1], [2, 3]]}).save_to_disk(tmp_path / "set")
    assert tokens(tmp_path, "set") == [1, 2, 3]


@pytest.mark.parametrize("package, name", [("pyarrow", "a.parquet"), ("datasets", "set")])
def test_a_missing_package_is_one_sentence(package, name, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / "a.parquet").write_text("")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "dataset_info.json").write_text("{}")
    with pytest.raises(ValueError, match=f"{name} needs the package {package}: pip install 'tedcompile.data.'"):
        tokens(tmp_path, name)


@pytest.mark.parametrize(
    "name, content, text",
    [
        ("a.txt", b"ab\xff", "a.txt is not UTF-8 text: byte 2"),
        ("a.jsonl", b'{"text": "x"}\n{', "a.jsonl, line 2 is not JSON"),
        ("a.jsonl", b'{"content": "x"}', "line 1 has none of text, input_ids, tokens; it has content"),
        ("a.jsonl", b'{"text": 5}', "line 1: text must be a text"),
        ("a.jsonl", b'{"input_ids": [1, "x"]}', "input_ids must be a list of token ids"),
        ("a.jsonl", b'{"input_ids": [256]}', "the file holds token id 256, the model's vocabulary has 256"),
        ("a.npy", b"\x93NUMPY\x01\x00garbage", "a.npy is not an array of token ids"),
    ],
)
def test_what_cannot_be_read_is_named(name, content, text, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=text):
        tokens(tmp_path, name)
    assert not list((tmp_path / "out").iterdir()), "a half-written file of tokens is left"


def test_a_pickled_array_is_not_read(tmp_path):
    numpy = pytest.importorskip("numpy")
    numpy.save(tmp_path / "a.npy", numpy.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="a.npy is not an array of token ids"):
        tokens(tmp_path, "a.npy")


def test_a_tokenizer_of_a_folder(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    (tmp_path / "t").mkdir()
    words.save(str(tmp_path / "t" / "tokenizer.json"))
    (tmp_path / "a.txt").write_text("a b c a")
    assert tokens(tmp_path, "a.txt", tokenizer=str(tmp_path / "t")) == [0, 1, 2, 0]
    with pytest.raises(ValueError, match="makes token id 2, the model's vocabulary has 2"):
        tokens(tmp_path, "a.txt", tokenizer=str(tmp_path / "t"), vocabulary=2)
    with pytest.raises(ValueError, match="holds no tokenizer.json: name a folder with one, or bytes"):
        data.tokenizer(str(tmp_path))


def test_every_epoch_has_all_sequences_once_and_none_of_those_held_out(tmp_path):
    (tmp_path / "a.txt").write_bytes(bytes(range(1, 103)))
    sequences = data.Sequences(
        data.tokenise([tmp_path / "a.txt"], data.tokenizer("bytes"), tmp_path, 256), seq=4, extra=1
    )
    assert sequences.count == 25
    batches = data.MicroBatches(sequences, batch=3, seed=1, held_out=2)
    assert batches.epoch_size == 7
    epochs = [[batches.read(e * 7 + i) for i in range(7)] for e in range(2)]
    for epoch in epochs:
        starts = torch.cat(epoch)[:, 0]
        assert len(set(starts.tolist())) == 21 and starts.max() <= 4 * 22 + 1
        assert all((b[:, 1:] - b[:, :-1] == 1).all() for b in epoch)
    assert not torch.cat(epochs[0]).equal(torch.cat(epochs[1]))
    again = data.MicroBatches(sequences, batch=3, seed=1, held_out=2)
    assert again.read(9).equal(epochs[1][2])
    with pytest.raises(
        ValueError, match="25 sequences of 4 tokens, 2 of them held out: less than one micro-batch of 24"
    ):
        data.MicroBatches(sequences, batch=24, seed=1, held_out=2)


# ---- options


def test_a_toml_file_gives_what_is_not_typed(tmp_path):
    (tmp_path / "run.toml").write_text('model = "m"\ndata = ["a", "b"]\nmicro-batches = 4\nlr = 1\noff = "x"\n')
    found = Settings.of({"lr": "0.5", "steps": "7"}, str(tmp_path / "run.toml"))
    assert (found.model, found.data, found.micro_batches, found.lr, found.steps) == ("m", ("a", "b"), 4, 0.5, 7)
    assert found.off == ("x",)


@pytest.mark.parametrize(
    "toml, text",
    [
        ("stepps = 3", "there is no option 'stepps': did you mean steps?"),
        ("steps = 1.5", "--steps takes a whole number, not 1.5"),
        ("steps = true", "--steps takes a whole number, not True"),
        ("data = [1]", "--data takes texts"),
        ("steps = ", "is not TOML"),
        ("schedule = 'cosin'", "--schedule cannot be 'cosin': choose cosine or linear or constant"),
        ("lr = -1", "--lr must not be negative"),
        ("batch = 0", "--batch must be at least 1"),
        ("warmup = 101", "--warmup 101 is more than --steps 100"),
    ],
)
def test_wrong_options_are_named(toml, text, tmp_path):
    (tmp_path / "run.toml").write_text(toml)
    with pytest.raises(ValueError) as error:
        Settings.of({"model": "m", **({} if "data" in toml else {"data": ["d"]})}, str(tmp_path / "run.toml"))
    assert text in str(error.value)


def test_schedules_warm_up_and_end_at_the_smallest_rate():
    for name, middle in (("cosine", 0.55), ("linear", 0.55), ("constant", 1.0)):
        s = Settings(schedule=name, warmup=10, steps=110, lr=2.0)
        assert s.rate(0) == pytest.approx(0.2) and s.rate(9) == s.rate(10) == 2.0
        assert s.rate(60) == pytest.approx(2 * middle)
        assert s.rate(110) == pytest.approx(2.0 if name == "constant" else 0.2)


# ---- runs


def test_a_run_that_is_asked_to_end_goes_on_as_without_a_break(place, monkeypatch, capsys):
    options = "--model config.json --steps 4 --eval-every 2 --eval-batches 3 --warmup 1 --lr 1e-2 --aux-loss 0.01"
    assert call(options, "--out whole --export model") == 0
    once, original = [], train.Run._step

    def asked(self, step, numbers):
        if step == 1 and not once:
            once.append(signal.raise_signal(signal.SIGTERM))
        return original(self, step, numbers)

    monkeypatch.setattr(train.Run, "_step", asked)
    assert call(options, "--out broken") == 0
    assert "asked to end: saved after step 2" in capsys.readouterr().out
    assert sorted(metrics(place / "broken")) == [1, 2]
    with (place / "broken" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "loss": 0.0}\n{"st')  # of a process that was killed after its last checkpoint
    assert call(options, "--out broken") == 0
    assert "goes on from broken/checkpoints at step 2" in capsys.readouterr().out
    for name in ("loss", "aux_loss", "eval_loss", "lr", "gradient_norm"):
        assert metrics(place / "broken", name) == metrics(place / "whole", name) != {}, name
    for step, layers in metrics(place / "whole", "expert_tokens").items():
        assert len(layers) == 1 and len(layers[0]) == 4 and sum(layers[0]) == 2 * 2 * 16 * 2, step
    assert 0 < metrics(place / "whole", "expert_entropy")[4] <= 1 <= metrics(place / "whole", "busiest_expert")[4]
    losses = metrics(place / "whole")
    assert losses[4] < losses[1]

    from transformers import AutoModelForCausalLM

    exported = AutoModelForCausalLM.from_pretrained(place / "model")
    held_out = data.Sequences(next((place / "whole").glob("tokens-*")), 16)
    ids = held_out.read(range(held_out.count - 6, held_out.count))
    with torch.no_grad():
        found = sum(exported(input_ids=b, labels=b).loss.item() for b in ids.split(2)) / 3
    assert found == pytest.approx(metrics(place / "whole", "eval_loss")[4], rel=1e-5)

    assert call(options, "--out broken --seed 3") == 2
    assert "broken holds a run with --seed 0, now it is 3" in capsys.readouterr().err
    facts = json.loads((place / "broken" / "checkpoints" / "step-00000004" / "checkpoint.json").read_text())
    assert facts["values"]["settings"]["lr"] == 0.01 and facts["values"]["position"] == 8


def test_a_plain_module_and_a_folder_with_weights(place, capsys):
    assert call("--model plain.py:build --steps 3 --out plain --lr 1e-2") == 0
    assert metrics(place / "plain")[3] < metrics(place / "plain")[1]
    assert call("--model config.json --steps 1 --out first --export model") == 0
    capsys.readouterr()
    assert call("--model model --tokenizer bytes --steps 1 --out second --lr 0 --dtype bf16") == 0
    assert "starts from the weights in model" in capsys.readouterr().out
    assert metrics(place / "second")[1] == pytest.approx(metrics(place / "first")[1], rel=0.05)


@pytest.mark.parametrize(
    "options, text",
    [
        ("--steps 1", "train needs --model"),
        ("--model config.json --mesh ep=2", "--mesh ep=2 is for 2 processes, there are 1"),
        ("--model config.json --data none.txt", "there is no file none.txt"),
        ("--model config.json --seq 5000", "less than one micro-batch"),
        ("--model plain.py:other", "must be a dict of two integer tensors"),
        ("--model config.json --stepps 1", "unknown option --stepps: did you mean --steps?"),
        ("--model config.json --config none.toml", "cannot read none.toml"),
        ("--model pickled --tokenizer bytes", "model.bin may be a pickle"),
    ],
)
def test_one_sentence_for_what_cannot_work(options, text, place, capsys):
    assert call(options) == 2
    error = capsys.readouterr().err
    assert text in error and error.count("\n") == 1


def test_memory_that_does_not_suffice_is_told_by_use(place, monkeypatch, capsys):
    def full(self, step, numbers):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee documentation")

    monkeypatch.setattr(train.Run, "_step", full)
    assert call("--model config.json --steps 3") == 2
    error = capsys.readouterr().err
    assert "rank 0 is out of memory (CUDA out of memory. Tried to allocate 2.00 GiB.): parameters 0.00 GiB, " in error
    assert "optimizer state 0.00 GiB, activations and the rest " in error and "--checkpoint full, --zero 3" in error


def test_a_disk_that_cannot_be_read_or_is_full_is_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("abc")
    bad = lambda error: lambda *_: (_ for _ in ()).throw(error)
    with monkeypatch.context() as m, pytest.raises(ValueError, match="a.txt cannot be read: Input/output error"):
        m.setattr(data.Path, "read_bytes", bad(OSError(5, "Input/output error")))
        tokens(tmp_path, "a.txt")
    with monkeypatch.context() as m, pytest.raises(ValueError, match="tokens cannot be written to .*: .*No space left"):
        m.setattr(data.os, "fsync", bad(OSError(28, "No space left on device")))
        tokens(tmp_path, "a.txt")
    assert not list((tmp_path / "out").iterdir())
    assert tokens(tmp_path, "a.txt") == [97, 98, 99, 0]


def test_nan_names_rank_and_step(place, monkeypatch, capsys):
    original = train.Run._batch
    calls = []

    def bad(self, ids):
        calls.append(0)
        if len(calls) == 4:  # the example, two of step 1
            with torch.no_grad():
                next(self.model.parameters()).fill_(float("nan"))
        return original(self, ids)

    monkeypatch.setattr(train.Run, "_batch", bad)
    assert call("--model config.json --steps 3") == 2
    assert "rank 0 (data rank 0): the loss of step 2 is nan" in capsys.readouterr().err
