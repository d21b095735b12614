"""Is the parallel model the plain model? Real gloo processes, fp32, plain SGD (Adam would hide a wrong factor).

A `Case` is a model on a mesh in a scenario. `reference` trains the plain model in one process: called once per data
rank's batch, the mean of those losses, three SGD steps. `run_case`, on every rank of a world, trains the parallel one
and compares. `Pool` keeps the processes of one world size for many cases, and survives crashes and hangs.

    with Pool(4) as pool:
        (result,) = pool.run([Case("qwen3_moe", (1, 2, 2))])
"""

from __future__ import annotations

import contextlib
import datetime
import faulthandler
import functools
import hashlib
import math
import multiprocessing
import multiprocessing.connection
import os
import pathlib
import signal
import socket
import sys
import tempfile
import time
import traceback
import unittest.mock
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tests import models

STEPS, LEARNING_RATE = 3, 0.2
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-6, 1e-5
IDLE = 3  # the expert that "starved_expert" starves
SLOW_IMPORTS = [
    "torch.distributed.tensor",
    "torch.export",
    "torch._inductor.compile_fx",
    "transformers.modeling_utils",
    "transformers.models.auto.modeling_auto",
]


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
    "few_tokens": Scenario(needs=lambda dp, ep, tp: tp > 3, batch=(("seq", 3), ("batch", 1))),
    "ep_equals_experts": Scenario(needs=lambda dp, ep, tp: ep > 3),
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


@dataclass
class Reference:
    losses: list[list[Tensor]]  # [step][data rank]: the loss, and the auxiliary loss where the output has one
    initial: dict[str, Tensor]
    gradients: dict[str, Tensor]  # of step 1
    updates: dict[str, Tensor]  # parameters after all steps, less the initial ones


def losses_of(output) -> Tensor:
    losses = [models.loss_of(output), getattr(output, "aux_loss", None)]
    return torch.stack([loss.detach().cpu() for loss in losses if isinstance(loss, Tensor)])


def reference(case: Case) -> Reference:
    return train_plain(case.model, case.scenario, case.experts, case.mesh[0] * case.mesh[1])


@functools.lru_cache(maxsize=32)
def train_plain(name: str, scenario: str, experts: int, data_world: int) -> Reference:
    model, batch = build(name, scenario, experts)
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    initial = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses, gradients = [], {}
    for step in range(STEPS):
        losses.append([])
        for data_rank in range(data_world):
            output = model(**batch(data_rank, step))
            losses[-1].append(losses_of(output))
            (models.loss_of(output) / data_world).backward()
            idle = SCENARIOS[scenario].idle(experts, data_rank)
            for n, p in model.named_parameters():
                if step == 0 and p.dim() == 3:
                    assert not p.grad[idle].any(), f"{name}, {scenario}: an expert of {idle} gets tokens ({n})"
        if step == 0:
            gradients = {n: zeros_if_none(p.grad, p).clone() for n, p in model.named_parameters()}
        optimizer.step()
        optimizer.zero_grad()
    updates = {n: p.detach() - initial[n] for n, p in model.named_parameters()}
    return Reference(losses, initial, gradients, updates)


def zeros_if_none(gradient: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if gradient is None else gradient


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


def local(tensor: Tensor) -> Tensor:
    return tensor.detach().to_local() if isinstance(tensor, DTensor) else tensor.detach()


def full(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor().detach() if isinstance(tensor, DTensor) else tensor.detach()).clone().cpu()


def run_case(case: Case) -> dict:
    """One rank's verdict. All ranks of a world of `case.world` call it; they communicate in the same order."""
    if case.sabotage == "no_reduction":
        with unittest.mock.patch("tedcompile.passes.reduce_gradients.run", lambda gm, ctx: None):
            return compare(case)
    return compare(case)


def compare(case: Case) -> dict:
    import tedcompile
    from tests.parity.volumes import Recorder, explained

    start, nothing = time.perf_counter(), contextlib.nullcontext()
    mesh = make_mesh(case.mesh, case.all_axes, case.device)
    shared = [reference(case) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(shared, src=0)
    expected: Reference = shared[0]

    model, batch = build(case.model, case.scenario, case.experts)
    example = batch(0, 0) if case.example_inputs else None
    model = tedcompile.parallelize(model, mesh, example_inputs=example, backend=case.backend, **OPTIONS[case.options])
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
        loss_error = max(loss_error, finite(((losses - want) / want).abs().max()))
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


def finite(error: Tensor) -> float:
    return error.nan_to_num(nan=math.inf).item()


def worst(
    found: dict[str, Tensor],
    expected: dict[str, Tensor],
    stored: dict[str, Tensor] | None = None,
    steps: int = STEPS,
    tolerance: float = GRADIENT_TOLERANCE,
) -> tuple[str, float]:
    """The largest error of a tensor, relative to max(its norm, 1e-6 of the norm of all). A missing tensor is zero.

    Updates are differences of `stored` fp32 parameters: one rounding of these per step is within the tolerance.
    """
    norms = {name: tensor.double().norm() for name, tensor in expected.items()}
    floor = 1e-6 * torch.stack(list(norms.values())).norm()
    errors = {}
    for name, tensor in expected.items():
        scale = torch.maximum(norms[name], floor)
        if stored:
            rounding = steps * 2**-24 * stored[name].double().norm()
            scale = torch.maximum(scale, rounding / tolerance)
        errors[name] = finite((zeros_if_none(found.get(name), tensor) - tensor).double().norm() / scale)
    return max(errors.items(), key=lambda item: item[1])


def held(parameters: Iterable[Tensor]) -> float:
    """The part of the parameters' elements that this rank holds."""
    sizes = [(local(p).numel(), p.numel()) for p in parameters]
    return sum(mine for mine, _ in sizes) / max(sum(whole for _, whole in sizes), 1)


def require_same(what: str, value) -> None:
    """Raises on all ranks when they disagree, where going on would hang."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    if any(v != values[0] for v in values):
        raise AssertionError(f"ranks disagree on {what}: {values}")


def drifted(model: nn.Module, mesh) -> list[str]:
    """Parameters and buffers that are replicated over an axis and not bit-equal on its ranks."""
    found = []
    for axis in mesh.mesh_dim_names:
        digests = {}
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            names = tensor.device_mesh.mesh_dim_names if isinstance(tensor, DTensor) else ()
            if axis not in names or tensor.placements[names.index(axis)].is_replicate():
                raw = local(tensor).cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
                digests[name] = hashlib.sha256(raw).hexdigest()
        others = [None] * mesh[axis].size()
        dist.all_gather_object(others, digests, group=mesh.get_group(axis))
        found += [
            f"{n} is not bit-equal among {axis} ranks" for n in digests if any(o.get(n) != digests[n] for o in others)
        ]
    return found


# ---- the processes


class Pool:
    """`world_size` gloo processes, started at the first case and kept. A case that raises or hangs on any rank is
    reported with its tracebacks, and the next case gets new processes."""

    GRACE = 5.0  # seconds that the other ranks get after the first one failed

    def __init__(self, world_size: int):
        self.world_size, self.workers = world_size, []

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    def start(self) -> None:
        # Forking from a server that has imported the slow modules: seconds less for each process.
        context = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "forkserver")
        context.set_forkserver_preload(SLOW_IMPORTS)
        self.stacks = tempfile.TemporaryDirectory()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        for rank in range(self.world_size):
            here, there = context.Pipe()
            process = context.Process(
                target=worker, args=(rank, self.world_size, port, there, self._stack(rank)), daemon=True
            )
            process.start()
            there.close()
            self.workers.append((process, here))

    def stop(self, patience: float = 5.0) -> None:
        """Workers end when their pipe does; those that cannot, hanging in a collective, are killed."""
        for _, connection in self.workers:
            connection.close()
        deadline = time.monotonic() + patience
        for process, _ in self.workers:
            process.join(max(0.0, deadline - time.monotonic()))
        for process, _ in self.workers:
            process.kill()
            process.join()
        if self.workers:
            self.stacks.cleanup()
        self.workers = []

    def run(self, cases: Iterable[Case]) -> list[dict]:
        return [self._run(case) for case in cases]

    def _stack(self, rank: int) -> pathlib.Path:
        return pathlib.Path(self.stacks.name, f"{rank}.txt")

    def _run(self, case: Case) -> dict:
        assert case.world == self.world_size, f"{case} needs {case.world} processes, this pool has {self.world_size}"
        start = time.monotonic()
        if not self.workers:
            self.start()
        for _, connection in self.workers:
            connection.send(case)
        replies: dict[int, dict] = {}
        deadline = start + case.timeout
        waiting = {connection: rank for rank, (_, connection) in enumerate(self.workers)}
        while waiting and time.monotonic() < deadline:
            for connection in multiprocessing.connection.wait(list(waiting), deadline - time.monotonic()):
                rank = waiting.pop(connection)
                try:
                    replies[rank] = connection.recv()
                except EOFError:
                    replies[rank] = {"ok": False, "error": "the process died"}
                if "error" in replies[rank]:
                    deadline = min(deadline, time.monotonic() + self.GRACE)
        for rank in waiting.values():
            replies[rank] = {"ok": False, "error": f"no answer; it was at\n{self._where(rank)}"}
        if any("error" in reply for reply in replies.values()):
            self.stop(patience=0)
        return merge(replies) | {"seconds": time.monotonic() - start}

    def _where(self, rank: int) -> str:
        os.kill(self.workers[rank][0].pid, signal.SIGUSR1)
        time.sleep(0.3)
        return self._stack(rank).read_text() if self._stack(rank).exists() else ""


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


def worker(rank: int, world_size: int, port: int, connection, stack_file: pathlib.Path) -> None:
    if sys.platform == "linux":  # whatever the machine's own name resolves to
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to answer
    torch.set_num_threads(1)
    on_gpus = torch.cuda.device_count() >= world_size
    if on_gpus:
        torch.cuda.set_device(rank)
    with contextlib.suppress(EOFError), stack_file.open("w") as stacks:
        faulthandler.register(signal.SIGUSR1, file=stacks)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpus else "gloo",
            init_method=f"tcp://127.0.0.1:{port}",
            rank=rank,
            world_size=world_size,
            timeout=datetime.timedelta(seconds=900),
        )
        while True:
            case = connection.recv()
            try:
                connection.send(case.run())
            except Exception:
                connection.send({"ok": False, "error": traceback.format_exc()})
