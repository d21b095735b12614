"""A run that goes on from its checkpoint, on the same mesh and on others, is the run without a break.

Each step takes the same micro-batches, dealt over the data ranks and accumulated, so it is the same step on every mesh.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from tests import models
from tests.parity import harness
from tests.parity.harness import Case, full, make_mesh
from tests.parity.weights import shared_folder

MICRO_BATCHES, BEFORE, AFTER = 4, 2, 2
TOLERANCE = 1e-5  # of losses on another mesh


@dataclass(frozen=True)
class ResumedRun(Case):
    zero: int = 1
    optimizer: str = "tiled"
    others: tuple[tuple[tuple[int, int, int], int, str], ...] = ()  # mesh, ZeRO stage, optimizer
    same: bool = True  # and on the same mesh, bit by bit

    timeout = 900.0

    def __str__(self) -> str:
        others = [f"{'x'.join(map(str, mesh))}zero{zero}{name}" for mesh, zero, name in self.others]
        return "-".join([super().__str__(), f"zero{self.zero}", self.optimizer, *others])

    def run(self) -> dict:
        with torch.random.fork_rng():
            return compare(self)


def build(case: ResumedRun, seed: int):
    """Model, optimizer, schedule and `step(number)`, which gives the mean loss of all micro-batches."""
    import tedcompile
    from tedcompile.optim import TiledAdamW

    kind = dict(num_hidden_layers=1) if case.model in models.families(8) else dict(layers=1)
    model, make_batch = models.MODELS[case.model](**kind)
    if seed:
        torch.manual_seed(seed)
        models.randomise(model)
    model = model.to(torch.bfloat16) if "bf16" in case.optimizer else model
    mesh = make_mesh(case.mesh, True, "cpu")
    model = tedcompile.parallelize(model, mesh, example_inputs=make_batch(0, 0), backend="eager", zero=case.zero)
    decay = [p for p in model.parameters() if p.dim() > 1]
    groups = [{"params": decay}, {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0}]
    forms: dict[str, dict] = {
        "tiled": dict(tile_bytes=1 << 16),
        "bf16-split": dict(master="split", offload="cpu", tile_bytes=1 << 16),
        "int8": dict(moments="int8", tile_bytes=1 << 16),
    }
    make = torch.optim.AdamW if case.optimizer == "torch" else TiledAdamW
    optimizer = make(groups, lr=1e-3, eps=1e-4, **forms.get(case.optimizer, {}))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6)
    rank, world = tedcompile.data_rank(mesh), tedcompile.data_world(mesh)

    def step(number: int) -> float:
        total = torch.zeros(())
        for i in range(rank, MICRO_BATCHES, world):
            loss = models.loss_of(model(**make_batch(i, number)))
            (loss * (world / MICRO_BATCHES)).backward()
            total += loss.detach().float() / MICRO_BATCHES / case.mesh[2]
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        dist.all_reduce(total)
        return total.item()

    return model, optimizer, schedule, step


def state(model, optimizer) -> dict[str, Tensor]:
    found = {n: full(p) for n, p in (*model.named_parameters(), *model.named_buffers())}
    for i, entries in optimizer.state_dict()["state"].items():
        found |= {f"{i} {n}": full(t) for n, t in entries.items()}
    return found


def compare(case: ResumedRun) -> dict:
    import tedcompile

    place, wrong, worst = shared_folder(), [], 0.0
    model, optimizer, schedule, step = build(case, 0)
    checkpoints = tedcompile.Checkpoints(place, model, optimizer, schedule)
    for number in range(BEFORE):
        step(number)
    checkpoints.save(BEFORE, position=BEFORE * MICRO_BATCHES)
    before = state(model, optimizer)
    expected = [step(BEFORE + i) for i in range(AFTER)]
    after = state(model, optimizer)
    checkpoints.wait()

    same = [(case.mesh, case.zero, case.optimizer)] if case.same else []
    for mesh, zero, name in (*same, *case.others):
        other = replace(case, mesh=mesh, zero=zero, optimizer=name)
        what = f"on {mesh} with zero {zero} and {name}"
        model, optimizer, schedule, step = build(other, 5)
        saved = tedcompile.Checkpoints(place, model, optimizer, schedule).load()
        if saved != {"step": BEFORE, "position": BEFORE * MICRO_BATCHES}:
            wrong.append(f"{saved} {what}")
        found = state(model, optimizer)
        inexact = "int8" in (name, case.optimizer) and (mesh, zero, name) != (case.mesh, case.zero, case.optimizer)
        wrong += [f"{n} came back otherwise {what}" for n, t in before.items() if not inexact and not t.equal(found[n])]
        losses = [step(BEFORE + i) for i in range(AFTER)]
        if (mesh, zero, name) == (case.mesh, case.zero, case.optimizer):
            found = state(model, optimizer)
            wrong += [f"{n} is another one after going on" for n, t in after.items() if not t.equal(found[n])]
            wrong += [f"losses {losses}, not {expected}"] * (losses != expected)
        error = max(abs(a / b - 1) for a, b in zip(losses, expected, strict=True))
        worst = max(worst, error)
        tolerance = 1e-2 if "bf16" in name else 1e-3 if inexact else TOLERANCE
        if not error <= tolerance:
            wrong.append(f"losses {losses} {what}, not {expected}")
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(place)
    nothing = ("", 0.0)
    return {
        "ok": not wrong,
        "loss_error": worst,
        "worst_gradient": nothing,
        "worst_update": nothing,
        "param_fraction": harness.held(model.parameters()),
        "expert_fraction": 0.0,
        "message": "; ".join(wrong),
    }


PLAIN = """
import torch

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = torch.nn.Embedding(256, 16), torch.nn.Linear(16, 256)
        with torch.no_grad():
            self.embed.weight[255] = float("nan")  # a token that the text has not

    def forward(self, idx, targets):
        return torch.nn.functional.cross_entropy(self.head(self.embed(idx)).flatten(0, 1), targets.flatten())

def build():
    return Model(), {"idx": torch.zeros(2, 8, dtype=torch.int64), "targets": torch.zeros(2, 8, dtype=torch.int64)}
"""


@dataclass(frozen=True)
class OneRankFails(Case):
    """`tedcompile train` on each rank; what goes wrong on one ends all of them, by a sentence that names the rank."""

    def run(self) -> dict:
        from tedcompile import train
        from tedcompile.settings import Settings

        place, wrong, rank = shared_folder(), [], dist.get_rank()
        if rank == 0:
            (place / "model.py").write_text(PLAIN)
            (place / "text.txt").write_text("some words. " * 100)
            (place / "bad.jsonl").write_text(json.dumps({"text": "x" * 999}) + "\n{")
        dist.barrier()
        mesh = make_mesh(self.mesh, True, "cpu")

        def nan(run, numbers):
            return torch.full((2, 9), 255)

        def shorter(run, numbers):
            return torch.zeros(2, 5, dtype=torch.int64)

        def gone(run, numbers):
            raise ValueError("the file has no more sequences")

        def refused(what: str, text: str, read=None, **options) -> None:
            chosen = dict(
                model=f"{place / 'model.py'}:build", data=(str(place / "text.txt"),), out=str(place / "run"), seq=8,
                batch=2, dtype="fp32", backend="eager", steps=2, save_every=1, zero=0,
            )  # fmt: skip
            try:
                run = train.Run(Settings(**{**chosen, **options}), mesh, [])
                if rank == 1:
                    run.train_data.read = lambda number: read(run, number)
                run.train()
                found = "nothing"
            except ValueError as error:
                found = str(error)
            if text not in found:
                wrong.append(f"{what}: {found}")

        refused("nan", "rank 1 (data rank 1): the loss of step 1 is nan", nan)
        ours = "the file has no more sequences"
        refused("no data", ours if rank == 1 else f"rank 1 failed: ValueError: {ours}", gone)
        refused("shapes", "rank 0 has", shorter)
        refused("a bad file", "bad.jsonl, line 2 is not JSON", data=(str(place / "bad.jsonl"),))
        dist.barrier()
        if rank == 0:
            shutil.rmtree(place)
        nothing = ("", 0.0)
        return {"ok": not wrong, "loss_error": 0.0, "worst_gradient": nothing, "worst_update": nothing,
                "param_fraction": 0.0, "expert_fraction": 0.0, "message": "; ".join(wrong)}  # fmt: skip
