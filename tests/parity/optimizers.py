"""Training with `tedcompile.optim` on a mesh is training with torch.optim on the plain model: 5 steps, fp32, clipped or
not, at every ZeRO stage. `python -m tests.parity.optimizers` runs the whole product.

The plain model is trained as in harness.py, on the mean of the data ranks' losses. Each step's gradients differ in
their last bits (other orders of summation), and Adam divides by them: so the update is also compared with that of
torch.optim on the *same* gradients, gathered, which leaves the optimizer alone to answer.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import sys
import weakref
from dataclasses import dataclass

import torch
import torch.distributed as dist

from tedcompile import compat
from tedcompile.compare import GRADIENT_TOLERANCE, LOSS_TOLERANCE, full, held, loss_difference, losses_of, zeros_if_none
from tests import models
from tests.parity import harness
from tests.parity.harness import Case, Pool, build, make_mesh, worst

STEPS = 5
TOLERANCE = 1e-6  # of an update on the same gradients; with SGD also GRADIENT_TOLERANCE on the plain model's own
LEARNING_RATES = {"adamw": 1e-3, "sgd": 0.2}
CLIP = 0.5  # below the norm of the first gradients


@dataclass(frozen=True)
class OptimizerCase(Case):
    rule: str = "adamw"
    zero: int = 0
    clip: bool = False
    offload: str | None = None

    def __str__(self) -> str:
        words = [super().__str__(), self.rule, f"zero{self.zero}"]
        return "-".join(words + ["clip"] * self.clip + ["offload"] * bool(self.offload))

    def run(self) -> dict:
        return compare(self)


def torch_optimizer(case: OptimizerCase, params):
    make = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[case.rule]
    return make(params, lr=LEARNING_RATES[case.rule])


def our_optimizer(case: OptimizerCase, params):
    from tedcompile.optim import Tiled, rules

    return Tiled(
        params,
        getattr(rules, case.rule),
        lr=LEARNING_RATES[case.rule],
        max_grad_norm=CLIP if case.clip else None,
        offload=case.offload,
        update_on="device" if case.rule == "sgd" else "host",
        tile_bytes=1 << 16,  # many tiles, also of these small models
    )


def train_plain(case: OptimizerCase) -> tuple[list, dict, dict]:
    """Losses [step][data rank], initial parameters and updates of the plain model."""
    model, batch = build(case.model, case.scenario, case.experts)
    optimizer = torch_optimizer(case, model.parameters())
    initial = {n: p.detach().clone() for n, p in model.named_parameters()}
    data_world, losses = case.mesh[0] * case.mesh[1], []
    for step in range(STEPS):
        losses.append([])
        for data_rank in range(data_world):
            output = model(**batch(data_rank, step))
            losses[-1].append(losses_of(output))
            (models.loss_of(output) / data_world).backward()
        for p in model.parameters():
            p.grad = zeros_if_none(p.grad, p)
        if case.clip:
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            assert step or norm > CLIP, f"nothing to clip: {norm}"
        optimizer.step()
        optimizer.zero_grad()
    return losses, initial, {n: p.detach() - initial[n] for n, p in model.named_parameters()}


def compare(case: OptimizerCase) -> dict:
    import tedcompile

    mesh = make_mesh(case.mesh, case.all_axes, case.device)
    shared = [train_plain(case) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(shared, src=0)
    losses, initial, updates = shared[0]

    model, batch = build(case.model, case.scenario, case.experts)
    model = tedcompile.parallelize(model, mesh, example_inputs=batch(0, 0), backend=case.backend, zero=case.zero)
    before = {n: weakref.ref(compat.local_tensor(p)) for n, p in model.named_parameters()}
    optimizer = our_optimizer(case, model.parameters())
    gc.collect()
    moved = {slot.name for kept in optimizer.kept if not kept.bucket.scattered for slot in kept.bucket.slots}
    wrong = [f"the memory that {n} moved out of is held" for n in sorted(moved) if before[n]() is not None]
    # the same gradients for torch's optimizer, on whole tensors
    twin = {n: torch.nn.Parameter(full(p)) for n, p in model.named_parameters()}
    theirs = torch_optimizer(case, list(twin.values()))
    rank, loss_error = tedcompile.data_rank(mesh), 0.0
    for step in range(STEPS):
        output = model(**batch(rank, step))
        want = losses[step][rank]
        loss_error = max(loss_error, loss_difference(losses_of(output), want))
        models.loss_of(output).backward()
        for n, p in model.named_parameters():
            twin[n].grad = full(p.grad)
        norm = torch.stack([p.grad.double().norm() for p in twin.values()]).norm()
        torch.nn.utils.clip_grad_norm_(twin.values(), CLIP if case.clip else float("inf"))
        optimizer.step()
        theirs.step()
        error = abs(optimizer.grad_norm.item() / norm.item() - 1)
        if error > TOLERANCE:
            wrong.append(f"the gradients' norm differs by {error:.1e} in step {step}")
        optimizer.zero_grad()
        for n, p in model.named_parameters():
            if compat.local_tensor(p.grad).any():
                wrong.append(f"the gradient of {n} is not zero after zero_grad")
    found = {n: full(p) - initial[n] for n, p in model.named_parameters()}
    on_same = worst(found, {n: p.detach() - initial[n] for n, p in twin.items()}, initial, STEPS, TOLERANCE)
    on_plain = worst(found, updates, initial, STEPS, TOLERANCE)
    if on_same[1] > TOLERANCE:
        wrong.append(f"update of {on_same[0]} differs by {on_same[1]:.1e} on the same gradients")
    # Adam makes full steps of gradients that are zero but for rounding (of a key's bias): only SGD's are compared
    if case.rule == "sgd" and on_plain[1] > GRADIENT_TOLERANCE:
        wrong.append(f"update of {on_plain[0]} differs by {on_plain[1]:.1e}")
    if loss_error > 10 * LOSS_TOLERANCE:
        wrong.append(f"loss differs by {loss_error:.1e}")
    wrong += harness.drifted(model, mesh)
    params = list(model.parameters())
    state = sum(a.numel() for kept in optimizer.kept for a in kept.arrays)
    return {
        "ok": not wrong,
        "loss_error": loss_error,
        "worst_gradient": on_same,
        "worst_update": on_plain,
        "param_fraction": held(params),
        "expert_fraction": held(p for p in params if p.dim() == 3),
        "state_fraction": state / max(2 * sum(p.numel() for p in params), 1),
        "gradient_fraction": held(p.grad for p in params),
        "message": "; ".join(wrong),
    }


@dataclass(frozen=True)
class ResumedCase(OptimizerCase):
    """Trained for two steps, saved, and trained on under another mesh and stage: the same losses as without a break."""

    other_mesh: tuple[int, int, int] = (1, 1, 1)
    other_zero: int = 0

    def __str__(self) -> str:
        return f"{super().__str__()}-then-{'x'.join(map(str, self.other_mesh))}-zero{self.other_zero}"

    def run(self) -> dict:
        model, optimizer, batch = self.prepare(self.mesh, self.zero)
        self.train(model, optimizer, batch, self.mesh, range(2))
        weights = {n: full(p) for n, p in model.named_parameters()}
        state = optimizer.state_dict()
        for entries in state["state"].values():
            entries.update({n: full(t) for n, t in entries.items()})
        expected = self.train(model, optimizer, batch, self.mesh, range(2, STEPS))

        model, optimizer, batch = self.prepare(self.other_mesh, self.other_zero, weights)
        optimizer.load_state_dict(state)
        found = self.train(model, optimizer, batch, self.other_mesh, range(2, STEPS))
        error = max(abs(a / b - 1) for a, b in zip(found, expected, strict=True))
        none = ("", 0.0)
        return {
            "ok": error <= 1e-5,
            "loss_error": error,
            "worst_gradient": none,
            "worst_update": none,
            "param_fraction": 0.0,
            "expert_fraction": 0.0,
            "message": f"losses {found}, without a break {expected}" if error > 1e-5 else "",
        }

    def prepare(self, mesh: tuple[int, int, int], zero: int, weights: dict | None = None):
        import tedcompile

        model, batch = build(self.model, self.scenario, models.EXPERTS)
        model.load_state_dict(weights or {}, strict=False)
        mesh = make_mesh(mesh, True, self.device)
        tedcompile.parallelize(model, mesh, example_inputs=batch(0, 0), backend=self.backend, zero=zero)
        return model, our_optimizer(self, model.parameters()), batch

    def train(self, model, optimizer, batch, mesh, steps) -> list[float]:
        """Mean losses over the data ranks, of whom both meshes have as many."""
        import tedcompile

        assert mesh[0] * mesh[1] == self.mesh[0] * self.mesh[1]
        rank, losses = tedcompile.data_rank(make_mesh(mesh, True, self.device)), []
        for step in steps:
            loss = models.loss_of(model(**batch(rank, step)))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            total = loss.detach().clone()
            dist.all_reduce(total)
            losses.append(total.item())
        return losses


# DeepSpeed's MoE forms: Kim et al., arXiv 2109.10465, table 1
FORMS = {
    "E": dict(mesh=(1, 2, 1)),
    "E+D": dict(mesh=(2, 2, 1)),
    "E+Z": dict(mesh=(1, 2, 1), zero=2),
    "E+D+M": dict(mesh=(2, 2, 2)),
    "E+D+Z": dict(mesh=(2, 2, 1), zero=2),
    "E+Z-Off+M": dict(mesh=(1, 2, 2), zero=1, offload="cpu"),
}


def product() -> list[OptimizerCase]:
    meshes = [*itertools.product((1, 2), repeat=3), (1, 4, 2), (1, 2, 4)]
    cases = [
        OptimizerCase(model, mesh, scenario, rule=rule, zero=zero, clip=clip)
        for model in ("qwen3_moe", "deepseek_v3", "nano_moe")
        for mesh in meshes
        for scenario in ("plain", "starved_expert")
        for rule in LEARNING_RATES
        for zero in (0, 1, 2, 3)
        for clip in (False, True)
        if model == "qwen3_moe" or (clip and scenario == "starved_expert")
    ]
    cases += [
        OptimizerCase("qwen3_moe", mesh, zero=zero, offload="cpu", rule=rule)
        for mesh in ((1, 1, 2), (2, 1, 2), (1, 2, 2))
        for zero in (0, 1, 2, 3)
        for rule in LEARNING_RATES
    ]
    meshes = [(1, 2, 2), (2, 1, 2)]
    cases += [
        ResumedCase("qwen3_moe", mesh, zero=zero, clip=True, other_mesh=other, other_zero=other_zero)
        for mesh, other in itertools.permutations(meshes)
        for zero in (0, 1, 2, 3)
        for other_zero in (0, 1, 2, 3)
    ]
    return sorted(cases, key=lambda case: case.world)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="WORD", default=[], help="cases with all of these in their names")
    words, failed = parser.parse_args().only, 0
    cases = [case for case in product() if all(word in str(case) for word in words)]
    if not cases:
        parser.error(f"no case has {' and '.join(words)} in its name; one is {product()[0]}")
    for world, group in itertools.groupby(cases, key=lambda case: case.world):
        with Pool(world) as pool:
            for case in group:
                (result,) = pool.run([case])
                failed += not result["ok"]
                numbers = [result[k][1] for k in ("worst_gradient", "worst_update")] if "loss_error" in result else []
                print(f"{case}: {'ok' if result['ok'] else 'FAILED'}", *(f"{n:.1e}" for n in numbers), flush=True)
                if not result["ok"]:
                    print(result["message"], flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
