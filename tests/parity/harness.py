"""Is the parallel model the plain model? Real gloo processes, fp32, plain SGD (Adam would hide a wrong factor).

A `Case` is a model on a mesh in a scenario. `reference` trains the plain model in one process: called once per data
rank's batch, the mean of those losses, three SGD steps. `run_case`, on every rank of a world, trains the parallel one
and compares. `Pool` keeps the processes of one world size for many cases, and survives crashes and hangs.

    with Pool(4) as pool:
        (result,) = pool.run([Case("qwen3_moe", (1, 2, 2))])
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import time
import unittest.mock
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tedcompile import compare, compat, processes
from tedcompile.compare import (
    GRADIENT_TOLERANCE,
    LOSS_TOLERANCE,
    Reference,
    differences,
    full,
    held,
    local,
    losses_of,
)
from tests import models

STEPS, LEARNING_RATE = 3, 0.2
LARGE = 32 << 10  # bytes of a gradient that travels by itself: these models are small, and have both kinds
IDLE = 3  # the expert that "starved_expert" starves
# options of parallelize by name; each must give the same numbers
OPTIONS: dict[str, dict] = {
    "": {},
    "no_drop": dict(plan=dict(experts="tensor", dispatch="all_to_all"), off=["drop_duplicates"]),
    "ted": dict(plan=dict(experts="tensor", dispatch="all_to_all", drop="yes")),
    "dedup": dict(plan=dict(experts="tensor", dispatch="dedup", drop="yes")),
    "all_gather": dict(plan=dict(experts="tensor", dispatch="all_gather", drop="yes")),
    "folded": dict(plan=dict(experts="folded", dispatch="all_to_all")),
    "dedup_folded": dict(plan=dict(experts="folded", dispatch="dedup")),
    "all_gather_folded": dict(plan=dict(experts="folded", dispatch="all_gather")),
    "dedup_no_drop": dict(plan=dict(dispatch="dedup"), off=["drop_duplicates"]),
    "no_algebra": dict(off=["simplify_collectives"]),
    "full": dict(checkpoint="full"),
    "full_resend": dict(checkpoint="full", off=["save_collectives"]),
    "ted_full_resend": dict(
        checkpoint="full",
        off=["save_collectives"],
        plan=dict(experts="tensor", dispatch="all_to_all", drop="yes"),
    ),
    "folded_full_resend": dict(
        checkpoint="full", off=["save_collectives"], plan=dict(experts="folded", dispatch="dedup")
    ),
    "selective": dict(checkpoint="selective", memory_budget=0.5),
    "all_gather_no_drop": dict(plan=dict(dispatch="all_gather"), off=["drop_duplicates"]),
    "chunks": dict(plan=dict(experts="tensor", dispatch="all_to_all", drop="yes", chunks="2")),
    "chunks_no_drop": dict(plan=dict(dispatch="dedup", chunks="2"), off=["drop_duplicates"]),
    "chunks_folded_full": dict(plan=dict(experts="folded", dispatch="dedup", chunks="4"), checkpoint="full"),
}


@dataclass(frozen=True)
class Case:
    model: str  # a name that tests.models.find knows
    mesh: tuple[int, int, int]  # dp, ep, tp
    scenario: str = "plain"
    backend: str = "eager"
    all_axes: bool = True  # False: the mesh names only the axes larger than 1
    example_inputs: bool = True  # False: as for Hugging Face models, without
    sabotage: str = ""  # of SABOTAGE: what to break
    options: str = ""  # of OPTIONS: what parallelize is asked for
    volumes: bool = False  # compare the bytes handed to collectives with explain's formulas, too
    device: str = (
        "cpu"  # "cuda": NCCL, a GPU for each rank, ten times the tolerances (other kernels than the reference)
    )

    def __str__(self) -> str:
        words = [self.model, "x".join(map(str, self.mesh)), self.scenario]
        words += [self.backend] * (self.backend != "eager") + [self.sabotage] * bool(self.sabotage)
        words += [self.options] * bool(self.options) + ["volumes"] * self.volumes
        words += ["fewer_axes"] * (not self.all_axes) + ["no_example"] * (not self.example_inputs)
        words += [self.device] * (self.device != "cpu")
        return "-".join(words)

    def run(self) -> dict:
        """One rank's verdict."""
        return run_case(self)

    @property
    def world(self) -> int:
        return math.prod(self.mesh)

    @property
    def experts(self) -> int:
        return self.mesh[1] if self.scenario == "ep_equals_experts" else models.EXPERTS

    @property
    def timeout(self) -> float:
        return 180.0 if self.backend == "eager" else 900.0


# ---- scenarios: what is done to the model and its batches, alike for the plain and the parallel one


@dataclass(frozen=True)
class Scenario:
    # the meshes (dp, ep, tp) on which it says anything
    needs: Callable[[int, int, int], bool] = lambda *mesh: True
    batch: tuple[tuple[str, object], ...] = ()  # options of make_batch
    shared: bool = True  # shapes and number of experts are those of "plain"
    one_token: bool = False  # data rank 0's batch is one token id, repeated
    prepare: Callable[[nn.Module, Callable, int], None] = lambda model, batch, experts: None
    idle: Callable[[int, int], list[int]] = lambda experts, data_rank: []  # experts without a token on that data rank


@torch.no_grad()
def starve(model: nn.Module, batch: Callable, experts: int) -> None:
    """No token can choose expert 3: its bias is hopeless, or two of the others always have a positive logit."""
    for _, weight, bias in models.routers(model, experts):
        weight[IDLE] = 0
        weight[5], weight[7] = -weight[4], -weight[6]
        weight *= 4  # away from zero, so that it holds for all steps
        if bias is not None:
            bias[IDLE] = -10


@torch.no_grad()
def attract(model: nn.Module, batch: Callable, experts: int) -> None:
    """All tokens of data rank 0 (equal ones) choose the last two experts: their router rows turn towards the token."""

    def turn(weight, module, args):
        hidden = args[0].reshape(-1, weight.shape[1]).mean(0)
        weight[-2:] += 4 * hidden / hidden.square().sum()

    hooks = [
        module.register_forward_pre_hook(functools.partial(turn, weight))
        for module, weight, _ in models.routers(model, experts)
    ]
    model(**batch(0, 0))
    for hook in hooks:
        hook.remove()


SCENARIOS = {
    "plain": Scenario(),
    "ignored_labels": Scenario(batch=(("ignored", True),)),
    "starved_expert": Scenario(prepare=starve, idle=lambda experts, data_rank: [IDLE]),
    "one_expert": Scenario(
        needs=lambda dp, ep, tp: ep > 1,
        one_token=True,
        prepare=attract,
        idle=lambda experts, data_rank: [] if data_rank else list(range(experts - 2)),
    ),
    "few_tokens": Scenario(needs=lambda dp, ep, tp: tp > 3, batch=(("seq", 3), ("batch", 1)), shared=False),
    "ep_equals_experts": Scenario(needs=lambda dp, ep, tp: ep > 3, shared=False),
}


def build(model: str, scenario: str, experts: int) -> tuple[nn.Module, Callable[[int, int], dict[str, Tensor]]]:
    """The plain model and `batch(data_rank, step)` of a case, equal on every rank."""
    module, make_batch = models.find(model)(experts=experts)
    spec = SCENARIOS[scenario]

    def batch(data_rank: int, step: int) -> dict[str, Tensor]:
        inputs = make_batch(data_rank, step, **dict(spec.batch))
        if spec.one_token and data_rank == 0:
            next(iter(inputs.values())).fill_(7)
        return inputs

    spec.prepare(models.plain(module), batch, experts)
    return module, batch


# ---- the plain model


def reference(case: Case) -> Reference:
    return train_plain(case.model, case.scenario, case.experts, case.mesh[0] * case.mesh[1])


@functools.lru_cache(maxsize=32)
def train_plain(name: str, scenario: str, experts: int, data_world: int) -> Reference:
    model, batch = build(name, scenario, experts)

    def idle_experts_have_no_gradient(data_rank: int, step: int) -> None:
        idle = SCENARIOS[scenario].idle(experts, data_rank)
        for n, p in model.named_parameters():
            if step == 0 and p.dim() == 3:
                assert not p.grad[idle].any(), f"{name}, {scenario}: an expert of {idle} gets tokens ({n})"

    return compare.train_plain(model, batch, data_world, STEPS, LEARNING_RATE, idle_experts_have_no_gradient)


# ---- the parallel model


def scale_expert_gradient(model: nn.Module, mesh) -> None:
    """Expert gradients ep times too large, as by an average over dp instead of dp x ep."""
    local(next(p.grad for p in model.parameters() if p.dim() == 3)).mul_(mesh["ep"].size())


def drift(model: nn.Module, mesh) -> None:
    """One rank's gradient of a replicated parameter is another one, by less than the tolerance."""
    local([p.grad for p in model.parameters() if p.dim() == 1][-1]).mul_(1 + 3e-6 * (dist.get_rank() == 0))


SABOTAGE: dict[str, Callable[[nn.Module, object], None]] = {
    "": lambda model, mesh: None,
    "no_reduction": lambda model, mesh: None,  # the pass that averages gradients does nothing
    "scale_expert_gradient": scale_expert_gradient,
    "drift": drift,
    "other_volumes": lambda model, mesh: None,  # a formula is of half the bytes
}


@functools.cache
def make_mesh(sizes: tuple[int, ...], all_axes: bool, device: str):
    axes = [(n, s) for n, s in zip(("dp", "ep", "tp"), sizes) if all_axes or s > 1] or [("dp", 1)]
    names, shape = zip(*axes)
    return dist.init_device_mesh(device, shape, mesh_dim_names=names)


KEPT: dict[Case, nn.Module] = {}  # the last parallel model


def parallel(case: Case, mesh) -> tuple[nn.Module, Callable[[int, int], dict[str, Tensor]]]:
    """The parallel model and its batches. Scenarios that differ in weights and batches only share a compiled model."""
    import tedcompile

    plain, batch = build(case.model, case.scenario, case.experts)
    shared = SCENARIOS[case.scenario].shared and not case.sabotage and not case.volumes
    key = dataclasses.replace(case, scenario="plain")
    if shared and key in KEPT:
        model, given = KEPT[key], dict((*plain.named_parameters(), *plain.named_buffers()))
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            value = given[name].detach()
            local(tensor).copy_(compat.cut(value, tensor) if isinstance(tensor, DTensor) else value)
        return model, batch
    KEPT.clear()
    example = batch(0, 0) if case.example_inputs else None
    model = tedcompile.parallelize(plain, mesh, example_inputs=example, backend=case.backend, **OPTIONS[case.options])
    if shared:
        KEPT[key] = model
    return model, batch


def run_case(case: Case) -> dict:
    """One rank's verdict. All ranks of a world of `case.world` call it; they communicate in the same order."""
    patch = unittest.mock.patch
    with contextlib.ExitStack() as stack:
        stack.enter_context(patch("tedcompile.passes.reduce_gradients.BUCKET", LARGE))
        if case.sabotage == "no_reduction":
            stack.enter_context(patch("tedcompile.passes.reduce_gradients.run", lambda gm, ctx: None))
        return compare_case(case)


def compare_case(case: Case) -> dict:
    import tedcompile
    from tests.parity.volumes import Recorder, explained

    start, nothing = time.perf_counter(), contextlib.nullcontext()
    mesh = make_mesh(case.mesh, case.all_axes, case.device)
    shared = [reference(case) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(shared, src=0)
    expected: Reference = shared[0]

    model, batch = parallel(case, mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    data_rank = tedcompile.data_rank(mesh)

    initial = {name: full(p) for name, p in model.named_parameters()}
    changed = sorted(initial.keys() ^ expected.initial.keys())
    assert not changed, f"parameter names that only one of the two models has: {changed}"
    changed = [name for name, value in initial.items() if not value.equal(expected.initial[name])]
    wrong = [f"other values after parallelize: {', '.join(changed)}"] if changed else []

    loss_error, gradients = 0.0, {}
    recorder = Recorder() if case.volumes else None
    for step in range(STEPS):
        with explained(recorder) if recorder and step == 0 else recorder if recorder and step == 1 else nothing:
            output = model(**batch(data_rank, step))
        losses, want = losses_of(output), expected.losses[step][data_rank]
        assert losses.shape == want.shape, f"losses {losses.tolist()}, not {want.tolist()}"
        loss_error = max(loss_error, compare.loss_difference(losses, want))
        if recorder and step == 1:
            recorder.phase = "backward"
            with recorder:
                models.loss_of(output).backward()
            if case.sabotage == "other_volumes":
                row = next(row for row in recorder.rows if row["axis"] == "ep" and row["role"] == "payload")
                row["formula"] = f"({row['formula']})/2"
            wrong += recorder.wrong()
        else:
            models.loss_of(output).backward()
        SABOTAGE[case.sabotage](model, mesh)
        if step == 0:
            require_same("parameters without a gradient", [n for n, p in model.named_parameters() if p.grad is None])
            gradients = {name: full(p.grad) for name, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        optimizer.zero_grad()
    updates = {name: full(p) - initial[name] for name, p in model.named_parameters()}

    worst_gradient = worst(gradients, expected.gradients)
    worst_update = worst(updates, expected.updates, expected.initial)
    slack = 1 if case.device == "cpu" else 10
    if loss_error > slack * LOSS_TOLERANCE:
        wrong.append(f"loss differs by {loss_error:.1e}")
    for what, (name, error) in (("gradient", worst_gradient), ("update", worst_update)):
        if error > slack * GRADIENT_TOLERANCE:
            wrong.append(f"{what} of {name} differs by {error:.1e}")
    wrong += drifted(model, mesh)
    return {
        "ok": not wrong,
        "loss_error": loss_error,
        "worst_gradient": worst_gradient,
        "worst_update": worst_update,
        "param_fraction": held(model.parameters()),
        "expert_fraction": held(p for p in model.parameters() if p.dim() == 3),
        "seconds": time.perf_counter() - start,
        "message": "; ".join(wrong),
    }


def worst(
    found: dict[str, Tensor],
    expected: dict[str, Tensor],
    stored: dict[str, Tensor] | None = None,
    steps: int = STEPS,
    tolerance: float = GRADIENT_TOLERANCE,
) -> tuple[str, float]:
    """The largest of `compare.differences`."""
    return max(differences(found, expected, stored, steps, tolerance).items(), key=lambda item: item[1])


def require_same(what: str, value) -> None:
    """Raises on all ranks when they disagree, where going on would hang."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    if any(v != values[0] for v in values):
        raise AssertionError(f"ranks disagree on {what}: {values}")


def drifted(model: nn.Module, mesh) -> list[str]:
    return [f"{name} is not bit-equal among {axis} ranks" for name, axis in compare.drifted(model, mesh).items()]


# ---- the processes


class Pool(processes.Pool):
    def run(self, cases: Iterable[Case]) -> list[dict]:
        return [self._run(case) for case in cases]

    def _run(self, case: Case) -> dict:
        assert case.world == self.world_size, f"{case} needs {case.world} processes, this pool has {self.world_size}"
        start = time.monotonic()
        replies = {
            rank: {"ok": False, "error": reply.text} if isinstance(reply, processes.Failure) else reply
            for rank, reply in self.call(case).items()
        }
        return merge(replies) | {"seconds": time.monotonic() - start}


def merge(replies: dict[int, dict]) -> dict:
    """The worst of all ranks; messages in the order in which they came, equal ones once."""
    texts: dict[str, list[int]] = {}
    for rank, reply in replies.items():
        if text := reply.get("error") or reply["message"]:
            texts.setdefault(text, []).append(rank)
    message = "\n".join(f"rank {', '.join(map(str, sorted(ranks)))}: {text}" for text, ranks in texts.items())
    if any("error" in reply for reply in replies.values()):
        return {"ok": False, "message": message}
    result = {
        key: max(reply[key] for reply in replies.values())
        for key, value in next(iter(replies.values())).items()
        if isinstance(value, float)
    }
    for key in ("worst_gradient", "worst_update"):
        result[key] = max((reply[key] for reply in replies.values()), key=lambda item: item[1])
    return result | {"ok": all(reply["ok"] for reply in replies.values()), "message": message}
