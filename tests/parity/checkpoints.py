"""A run that goes on from its checkpoint, on the same mesh and on others, is the run without a break.

Each step takes the same micro-batches, dealt over the data ranks and accumulated, so it is the same step on every mesh.
"""

from __future__ import annotations

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
