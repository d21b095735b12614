"""Checkpoints of a run on one process: what comes back, what is refused, and what a failure leaves."""

import errno
import json
import logging
import os
import pickle
import random
import struct
import unittest.mock

import pytest
import torch

import tedcompile
from tedcompile import checkpoint
from tedcompile.optim import Tiled, TiledAdamW, rules

pytest.importorskip("safetensors")


class Net(torch.nn.Module):
    def __init__(self, seed=0, width=33, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(seed)
        self.a, self.b = torch.nn.Linear(8, width, dtype=dtype), torch.nn.Linear(width, 8, dtype=dtype)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        self.calls += 1
        return self.b(torch.nn.functional.dropout(self.a(x).relu())).float().square().mean()


def run(seed=0, make=lambda p: torch.optim.AdamW(p, lr=0.01), folder=None, **options):
    model = Net(seed, **options)
    optimizer = make(model.parameters())
    schedule = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=2),
            torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 3]),
        ],
        milestones=[2],
    )
    checkpoints = tedcompile.Checkpoints(folder, model, optimizer, schedule, keep=2)
    return model, optimizer, schedule, checkpoints


def train(model, optimizer, schedule, steps):
    losses = []
    for _ in range(steps):
        loss = model(torch.randn(4, 8).to(model.a.weight.dtype))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append((loss.item(), schedule.get_last_lr()))
    return losses


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
    "tiled": lambda p: TiledAdamW(p, lr=0.01),
    "split": lambda p: TiledAdamW(p, lr=0.01, master="split", moments="bf16", max_grad_norm=0.1, offload="cpu"),
    "int8": lambda p: TiledAdamW(p, lr=0.01, moments="int8"),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_goes_on_bit_by_bit(name, tmp_path):
    options = dict(make=OPTIMIZERS[name], folder=tmp_path, dtype=torch.bfloat16 if name == "split" else torch.float32)
    model, optimizer, schedule, checkpoints = run(**options)
    assert checkpoints.load() is None
    train(model, optimizer, schedule, 3)
    checkpoints.save(3, position={"micro_batch": 12, 5: (1, 2.5)}, scale=torch.tensor([0.1, 2]))
    expected = train(model, optimizer, schedule, 3) + [random.random()]  # and while it is written
    checkpoints.wait()

    other, optimizer, schedule, checkpoints = run(seed=1, **options)
    saved = checkpoints.load()
    assert saved.pop("scale").equal(torch.tensor([0.1, 2]))
    assert saved == {"step": 3, "position": {"micro_batch": 12, 5: (1, 2.5)}}
    found = train(other, optimizer, schedule, 3) + [random.random()]
    assert found == expected
    for key, value in model.state_dict().items():
        assert other.state_dict()[key].equal(value), key


def test_torch_reads_what_tiled_wrote_and_the_other_way_round(tmp_path):
    for writer, reader in (("adamw", "tiled"), ("tiled", "adamw")):
        folder = tmp_path / writer
        model, optimizer, schedule, checkpoints = run(make=OPTIMIZERS[writer], folder=folder)
        train(model, optimizer, schedule, 3)
        checkpoints.save(3)
        expected = train(model, optimizer, schedule, 2)
        checkpoints.wait()
        other, optimizer, schedule, checkpoints = run(seed=1, make=OPTIMIZERS[reader], folder=folder)
        assert checkpoints.load() == {"step": 3}
        found = train(other, optimizer, schedule, 2)
        assert [f[0] for f in found] == pytest.approx([e[0] for e in expected], rel=1e-6)


@pytest.fixture
def two(tmp_path):
    """A run with checkpoints of steps 1 and 2."""
    model, optimizer, schedule, checkpoints = run(folder=tmp_path)
    for step in (1, 2):
        train(model, optimizer, schedule, 1)
        checkpoints.save(step)
    checkpoints.wait()
    return model, checkpoints, tmp_path


def damaged_byte(folder):
    file = folder / "rank-0.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)


def cut_off(folder):
    file = folder / "rank-0.safetensors"
    file.write_bytes(file.read_bytes()[:-9])


def hole(folder):
    """A file that is whole and lacks a tensor that the others' headers know."""
    file, index = folder / "rank-0.safetensors", folder / "checkpoint.json"
    data = file.read_bytes()
    (n,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + n])
    header["model/a.weight[0:32,0:8]"] = header.pop("model/a.weight[0:33,0:8]")
    header["model/a.weight[0:32,0:8]"]["shape"] = [33, 8]
    text = json.dumps(header).encode()
    data = struct.pack("<Q", len(text)) + text + data[8 + n :]
    file.write_bytes(data)
    facts = json.loads(index.read_text())
    facts["files"]["rank-0.safetensors"] = [len(data), checkpoint.zlib.crc32(data)]
    index.write_text(json.dumps(facts))


DAMAGE = {
    "changed": (damaged_byte, "rank-0.safetensors has been changed"),
    "cut off": (cut_off, "rank-0.safetensors has"),
    "a hole": (hole, "256 of the 264 elements of model/a.weight"),
    "no file": (lambda f: (f / "rank-0.safetensors").unlink(), "rank-0.safetensors is missing"),
    "no index": (lambda f: (f / "checkpoint.json").unlink(), "checkpoint.json is not the index"),
    "empty index": (lambda f: (f / "checkpoint.json").write_text("{}"), "checkpoint.json is not the index"),
    "a path": (
        lambda f: (f / "checkpoint.json").write_text(
            (f / "checkpoint.json").read_text().replace("rank-0.", "../step-00000001/rank-0.")
        ),
        "is missing",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(name, two, caplog):
    model, checkpoints, folder = two
    damage, text = DAMAGE[name]
    damage(folder / "step-00000002")
    with caplog.at_level(logging.WARNING, "tedcompile"):
        assert checkpoints.load() == {"step": 1}
    assert "step-00000002" in caplog.text and text in caplog.text
    damage(folder / "step-00000001")
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match="no checkpoint in .* is whole"):
        checkpoints.load()
    assert all(p.equal(b) for p, b in zip(model.parameters(), before))


class Harm:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_no_pickle_is_executed(two, tmp_path):
    """In any place where torch.distributed.checkpoint or torch.load would look, or instead of our own files."""
    _, checkpoints, folder = two
    newest, harm = folder / "step-00000002", pickle.dumps(Harm(tmp_path / "executed"))
    for name in (".metadata", "__0_0.distcp", "rank-1.pt", "optimizer.bin"):
        (newest / name).write_bytes(harm)
    assert checkpoints.load() == {"step": 2}
    for name in ("rank-0.safetensors", "checkpoint.json"):
        (newest / name).write_bytes(harm)
    assert checkpoints.load() == {"step": 1}
    assert not (tmp_path / "executed").exists()
    pickle.loads(harm)
    assert (tmp_path / "executed").exists(), "the test itself would not see it"


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_a_full_disk_is_one_sentence_and_leaves_whole_checkpoints(call, two):
    model, checkpoints, folder = two
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    place = {"fsync": "os.fsync", "rename": "pathlib.Path.rename"}[call]
    with unittest.mock.patch(place, side_effect=full):
        checkpoints.save(3)
        with pytest.raises(
            ValueError, match="the checkpoint of step 3 cannot be written to .*: No space|No space left"
        ):
            checkpoints.wait()
    assert sorted(p.name for p in folder.iterdir()) == ["step-00000001", "step-00000002"]
    assert checkpoints.load() == {"step": 2}
    checkpoints.save(3)
    checkpoints.wait()
    assert checkpoints.load() == {"step": 3}


def test_keeps_the_last_and_removes_what_a_killed_process_left(two):
    model, checkpoints, folder = two
    (folder / ".step-00000003.writing").mkdir()
    (folder / ".step-00000003.writing" / "rank-0.safetensors").write_text("half")
    assert checkpoints.load() == {"step": 2}
    for step in (3, 3, 10**8 - 1, 10**8):
        checkpoints.save(step)
    checkpoints.wait()
    assert sorted(p.name for p in folder.iterdir()) == ["step-100000000", "step-99999999"]
    assert checkpoints.load() == {"step": 10**8}
    damaged_byte(folder / "step-100000000")
    assert checkpoints.load() == {"step": 10**8 - 1}
    for step in (5, 6, 7):  # of a run that goes on from before a damaged one
        checkpoints.save(step)
    checkpoints.wait()
    assert {"step-00000006", "step-00000007"} <= {p.name for p in folder.iterdir()}


def test_refuses_another_model_optimizer_or_value(two):
    model, checkpoints, folder = two
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=r"model/a.weight has shape \(33, 8\), the model's \(34, 8\)"):
        run(folder=folder, width=34)[3].load()
    other = Net()
    other.extra = torch.nn.Linear(1, 1)
    with pytest.raises(ValueError, match="the model has extra.bias, the checkpoint has not"):
        tedcompile.Checkpoints(folder, other).load()
    del other.extra, other.b.bias
    with pytest.raises(ValueError, match="the checkpoint has b.bias, the model has not"):
        tedcompile.Checkpoints(folder, other).load()
    other = Net()
    groups = torch.optim.AdamW([{"params": [p]} for p in other.parameters()])
    with pytest.raises(ValueError, match="1 param groups, the optimizer 4"):
        tedcompile.Checkpoints(folder, other, groups, None).load()
    with pytest.raises(ValueError, match="group 0 of the optimizer is another one, from b.bias on"):
        turned = torch.optim.AdamW(list(other.parameters())[::-1])
        tedcompile.Checkpoints(folder, other, turned, None).load()
    with pytest.raises(ValueError, match="none of the model's"):
        tedcompile.Checkpoints(folder, other, torch.optim.AdamW(Net().parameters()))
    with pytest.raises(ValueError, match="holds 1 schedules, given are 0"):
        tedcompile.Checkpoints(folder, other).load()
    with pytest.raises(ValueError, match="no momentum_buffer of a.weight: it is of another optimizer"):
        momentum = Tiled(other.parameters(), rules.momentum)
        tedcompile.Checkpoints(folder, other, momentum, None).load()
    assert all(p.equal(b) for p, b in zip(model.parameters(), before))
    with pytest.raises(ValueError, match="wrong.there holds a set"):
        checkpoints.save(3, wrong={"there": {1, 2}})


def test_masters_follow_a_model_that_is_loaded_without_its_optimizer(tmp_path):
    saved = Net(0, dtype=torch.bfloat16)
    checkpoints = tedcompile.Checkpoints(tmp_path, saved)
    checkpoints.save(1)
    checkpoints.wait()
    model = Net(1, dtype=torch.bfloat16)
    optimizer = TiledAdamW(model.parameters(), lr=0.0, weight_decay=0.0)
    tedcompile.Checkpoints(tmp_path, model).load()
    model(torch.randn(4, 8).bfloat16()).backward()
    optimizer.step()
    assert all(a.equal(b) for a, b in zip(model.parameters(), saved.parameters()))
