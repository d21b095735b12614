"""The same training on one GPU and on two: are the losses the same, and what does a step take?

    python -m benchmarks.mesh_runs --out benchmarks/results       # two GPUs, a few minutes
    python -m benchmarks.mesh_runs --jobs "qwen3_layer tp=1" "qwen3_layer ep=2 dispatch=dedup"    # with options
    python -m benchmarks.mesh_runs --out /tmp/runs --cpu          # a tiny model on gloo, to try this file

Cases of train_step.py on the meshes 1, tp=2, ep=2 and dp=2, or on those given, with options of `parallelize`: bf16,
NCCL, Inductor, 20 steps of TiledAdamW with fp32 master weights. Checked:

- losses stay within 2e-2 of the one-GPU run's on the same batches (two data ranks: the mean of both ranks' losses
  beside one GPU that averages the gradients of both batches);
- parameters and buffers replicated over an axis are bit-equal on its ranks after the last step;
- nothing compiles after the first step, neither here nor in torch.

All jobs start together and compile side by side. The large ones then take turns to train, and each is timed alone, when
nothing compiles any more; so `first_step_s` is from a cold cache beside the other compilations. Each job is a group of
processes with a deadline: one that fails is reported, and the others go on. Writes mesh_runs.json after each job, and
keeps the rows of other jobs in it; the exit code is 1 unless every check passed.

Predicted beside the measured, for the machine that the GPU's name says: `communication_ms`, all collectives of a step
one after the other; `block_ms`, the MoE blocks of a step; `replay_ms`, what checkpointing recomputes; `saved_gib`, what
the forward keeps for the backward.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import pathlib
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tedcompile.mesh import MeshShape

KINDS = {"checkpoint": str, "memory_budget": float, "zero": int, "master": str, "moments": str}  # the rest is the plan
CASES, MESHES = ("demo", "qwen3_4layers"), ("tp=1", "tp=2", "ep=2", "dp=2")
# beside these: two tensor-parallel GPUs with the work of two, and the least memory with exact masters
MORE = ("qwen3_4layers:batch=8 tp=1", "qwen3_4layers:batch=8 tp=2", "qwen3_4layers ep=2 zero=1 master=split")
TOLERANCE, ROUNDS = 2e-2, 3
LATE = "did not end in time"
# At 1e-4 this one learns its four random batches so fast that one rounding more moves the loss by a tenth.
LEARNING_RATE = {"mixtral_layer": 1e-5, "ted": 1e-5}
UNITS = {
    "step_ms": "ms", "forward_backward_ms": "ms", "tokens_per_s_per_gpu": "1/s", "of_one_gpu": "1", "peak_gib": "GiB",
    "first_step_s": "s",
    "worst_loss_difference": "relative", "first_loss": "nats", "last_loss": "nats", "replicas_apart": "tensors",
    "compilations_after_first_step": "count", "communication_ms": "ms, predicted", "block_ms": "ms, predicted",
    "replay_ms": "ms, predicted", "saved_gib": "GiB, predicted",
}  # fmt: skip


# ---- one process of a job


class Compiled(Exception):
    """Raised in place of a model's first run."""


def train(options: argparse.Namespace) -> None:
    import torch
    import torch.distributed as dist
    import transformers

    import tedcompile
    from benchmarks import train_step
    from tedcompile import metrics

    rank = int(os.environ["RANK"])
    if options.cpu:
        device, sync = torch.device("cpu"), lambda: None
        torch.set_num_threads(1)
        dist.init_process_group("gloo")
    else:
        device, sync = torch.device("cuda", int(os.environ["LOCAL_RANK"])), torch.cuda.synchronize
        torch.cuda.set_device(device)
        dist.init_process_group("nccl")
    shape, chosen = parse(options.mesh)
    mesh = dist.init_device_mesh(device.type, tuple(shape.as_dict().values()), mesh_dim_names=("dp", "ep", "tp"))
    result = {
        "losses": [],
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "gpu": "cpu" if options.cpu else torch.cuda.get_device_name(),
        "clock_mhz": 0,
    }
    with contextlib.suppress(Exception):  # needs nvidia-ml-py
        result["clock_mhz"] = torch.cuda.clock_rate()

    def write() -> None:
        if rank == 0:
            part = options.out.with_suffix(".part")
            part.write_text(json.dumps(result))
            part.rename(options.out.with_suffix(".json"))

    def turn(name: str) -> float:
        """Waits until the driver says that this job may `name`; returns the seconds waited."""
        start = time.perf_counter()
        if rank == 0:
            options.out.with_suffix(f".{name}?").touch()
        while not options.out.with_suffix(f".{name}").exists():
            time.sleep(0.05)
        return time.perf_counter() - start

    if not options.cpu:
        torch.cuda.reset_peak_memory_stats()
    data = [train_step.batches(options.case, r, device) for r in range(max(shape["data"], *options.data))]
    model = train_step.build(options.case, torch.bfloat16, torch.device("meta") if options.meta else device)
    start = time.perf_counter()
    tiled = {key: chosen.pop(key) for key in ("master", "moments") if key in chosen}
    example = train_step.example(options.case, data[0][0])
    backend = "eager" if options.eager else "inductor"
    model = tedcompile.parallelize(model, mesh, example_inputs=example, backend=backend, **chosen)
    if shape.world == 1:
        initial = [p.to_local().detach().to("cpu", copy=True) for p in model.parameters()]
    run = model._ted.run

    def compiled(*_):
        raise Compiled

    mine = data[tedcompile.data_rank(mesh)]
    model._ted.run = compiled
    with contextlib.suppress(Compiled):
        train_step.loss_of(model, mine[0])
    model._ted.run = run
    if not options.cpu:
        torch.cuda.empty_cache()
    waited = turn("train")  # neither the states nor the activations of several large models fit
    rate = LEARNING_RATE.get(options.case.partition(":")[0], 1e-4)

    def new_optimizer():
        return tedcompile.optim.TiledAdamW(model.parameters(), lr=rate, norm="backward", **tiled)

    def step(optimizer, *batches) -> torch.Tensor:
        losses = []
        for ids in batches:
            losses.append(train_step.loss_of(model, ids))
            (losses[-1] / len(batches)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return torch.stack(losses).mean().detach()

    optimizer = new_optimizer()
    losses = [step(optimizer, mine[0])]
    sync()
    result["first_step_s"] = time.perf_counter() - start - waited
    compiled = compilations(model)
    losses += [step(optimizer, mine[i % len(mine)]) for i in range(1, train_step.STEPS)]
    result["losses"] = mean_over_data_ranks(torch.stack(losses).float(), model._ted.groups)
    (program,) = model._ted.programs.values()
    result["replay_ms"], result["saved_gib"] = 1e3 * program.replay, program.saved / 2**30
    result["compilations_after_first_step"] = len(compilations(model) ^ compiled)
    different = apart(model, mesh)
    result["replicas_apart"] = len(different)
    print(*(f"not equal on all ranks: {name}" for name in different), sep="\n", flush=True)
    write()

    turn("time")
    whole, partial = [], []
    if not options.cpu:
        torch.cuda.reset_peak_memory_stats()
    for i in range(train_step.TIMED):
        dist.barrier()
        sync()
        start = time.perf_counter()
        train_step.loss_of(model, mine[i % len(mine)]).backward()
        sync()
        partial.append(time.perf_counter() - start)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    for _ in range(ROUNDS):  # steps one after the other, as in training: the host is ahead of the device
        dist.barrier()
        sync()
        start = time.perf_counter()
        for i in range(train_step.TIMED):
            step(optimizer, mine[i % len(mine)])
        sync()
        whole.append((time.perf_counter() - start) / train_step.TIMED)
    result["forward_backward_ms"] = 1e3 * statistics.median(partial)
    result["step_ms"] = 1e3 * statistics.median(whole)
    result["tokens_per_s_per_gpu"] = mine[0].numel() / shape.tp / statistics.median(whole)
    if not options.cpu:
        result["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    flops = metrics.token_flops(model, mine[0].shape[1])
    if flops:
        result["token_flops"] = flops
        result["tflops_per_gpu"] = result["tokens_per_s_per_gpu"] * flops / 1e12
        result["mfu"] = result["tflops_per_gpu"] * 1e12 / model._ted.machine.rate(2)
    if options.count:

        def again() -> None:
            optimizer.zero_grad()  # keeps the memory that TiledAdamW has for gradients
            train_step.loss_of(model, mine[0]).backward()

        result |= count(again, not options.cpu)
        optimizer.zero_grad(set_to_none=True)
    write()

    if shape.world == 1:  # the same compiled step again, from the start, now with the batches of several data ranks
        result["losses_of"] = {}
        for ranks in options.data:
            optimizer = None
            with torch.no_grad():
                for p, value in zip(model.parameters(), initial, strict=True):
                    p.to_local().copy_(value)
            optimizer = new_optimizer()
            together = [[d[i % len(mine)] for d in data[:ranks]] for i in range(train_step.STEPS)]
            losses = [step(optimizer, *batches) for batches in together]
            result["losses_of"][str(ranks)] = torch.stack(losses).float().tolist()
        write()
    dist.destroy_process_group()


def count(step: Callable[[], None], gpu: bool) -> dict:
    """Bytes handed to the collectives of a step by "kind axis", mean over ranks; on GPUs also ms in NCCL's kernels."""
    import torch
    import torch.distributed as dist

    from tests.parity.volumes import Recorder

    with Recorder() as recorder:
        step()
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, recorder.bytes)
    handed: dict[str, float] = {}
    for counted in everyone:
        for (kind, axis, _), size in counted.items():
            handed[f"{kind} {axis}"] = handed.get(f"{kind} {axis}", 0.0) + size / len(everyone)
    found: dict = {"handed": handed}
    if gpu:
        with torch.profiler.profile() as profile:
            step()
            torch.cuda.synchronize()
        kernels = [e for e in profile.key_averages() if e.key.startswith("ncclDevKernel")]
        found["nccl_ms"] = sum(e.self_device_time_total for e in kernels) / 1e3
    return found


def parse(system: str) -> tuple[MeshShape, dict]:
    """A mesh and options of `parallelize`: "ep=2 dispatch=dedup", "tp=2 off=simplify_collectives checkpoint=full".

    `master` and `moments` are TiledAdamW's.
    """
    from tedcompile.mesh import MeshShape

    mesh, *rest = system.split()
    chosen: dict = {"off": [], "plan": {}}
    for key, _, value in (word.partition("=") for word in rest):
        if key == "off":
            chosen["off"].append(value)
        elif key in KINDS:
            chosen[key] = KINDS[key](value)
        else:
            chosen["plan"][key] = value
    return MeshShape.parse(mesh), chosen


def predict(case: str, system: str, gpu: str) -> dict:
    """Of one step on one rank: ms and bytes (by "kind axis") of its collectives, and ms of its MoE blocks."""
    import torch

    import tedcompile
    from benchmarks import ted, train_step
    from tedcompile import machines

    machine = machines.default("cpu" if gpu == "cpu" else "cuda", gpu)
    shape, chosen = parse(system)
    _, sizes, (batch, seq) = train_step.case_of(case)
    model = train_step.build(case, torch.bfloat16, torch.device("meta"))
    chosen = {key: value for key, value in chosen.items() if key not in ("zero", "master", "moments")}
    example = train_step.example(case, torch.empty(batch, seq, dtype=torch.int64, device="meta"))
    facts = tedcompile.explain(
        model, shape, example_inputs=example, batch=batch, seq=seq, machine=machine.name, **chosen
    )
    seconds, handed = 0.0, dict[str, float]()
    for row in facts["collectives"]:
        at = machines.place(row["axis"], shape, machine)
        seconds += row["count"] * sum(machine.collective(row["kind"], row["bytes_per_rank"], at))
        key = f"{row['kind']} {row['axis']}"
        handed[key] = handed.get(key, 0.0) + row["count"] * row["bytes_per_rank"]
    found: dict = {"communication_ms": 1e3 * seconds, "explained": handed}
    if facts["choices"]:
        layers = sizes["num_hidden_layers"] // (ted.MOE_EVERY if isinstance(model, ted.GPT) else 1)
        best = [c for choice in facts["choices"] for c in choice["candidates"] if c["chosen"]]
        found["block_ms"] = 1e3 * layers * sum(c["seconds"] for c in best)
        words = lambda c: f"{c['experts']} {c['dispatch']} {'drop' * c['drop']} {c['chunks']} chunks"
        found["plan"] = "; ".join(dict.fromkeys(map(words, best))).replace("  ", " ")
    return found


def compilations(model) -> set:
    """What has been compiled: our programs, and every counter of Dynamo, AOTAutograd and Inductor with its value."""
    from torch._dynamo.utils import counters

    return {*model._ted.programs} | {(a, b, n) for a, found in counters.items() for b, n in found.items()}


def mean_over_data_ranks(losses, groups) -> list[float]:
    import torch.distributed as dist

    if "data" in groups.group:
        dist.all_reduce(losses, group=groups.group["data"])
        losses /= groups.shape["data"]
    return losses.tolist()


def apart(model, mesh) -> list[str]:
    """Parameters and buffers that are replicated over an axis and not bit-equal on its ranks."""
    import torch
    import torch.distributed as dist

    found = []
    for axis in mesh.mesh_dim_names:
        if mesh[axis].size() == 1:
            continue
        group = mesh.get_group(axis)
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            placements = getattr(tensor, "placements", None)
            if placements and not placements[mesh.mesh_dim_names.index(axis)].is_replicate():
                continue
            own = (tensor.to_local() if placements else tensor).detach().contiguous()
            first = own.clone()
            dist.broadcast(first, group_src=0, group=group)
            different = torch.tensor(int(not bits(own).equal(bits(first))), device=own.device)
            dist.all_reduce(different, group=group)
            found += [name] * bool(different)
    return found


def bits(tensor):
    import torch

    return tensor.reshape(-1).view(torch.uint8)


def reference_losses(one_gpu: dict, system: str) -> list[float]:
    """Those of the one-GPU run with the batches of as many data ranks; empty where it has none."""
    ranks = parse(system)[0]["data"]
    return one_gpu.get("losses_of", {}).get(str(ranks), []) if ranks > 1 else one_gpu.get("losses", [])


# ---- the driver


@dataclass
class Job:
    case: str
    mesh: str
    gpu: int  # of its first process
    file: pathlib.Path
    flags: tuple[str, ...] = ()  # further ones of its processes
    processes: list[subprocess.Popen] = field(default_factory=list)
    ended: float = 0.0
    error: str = ""

    @property
    def name(self) -> str:
        return f"{self.case} {self.mesh}"

    @property
    def world(self) -> int:
        return parse(self.mesh)[0].world

    def start(self, options: argparse.Namespace) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [sys.executable, "-m", "benchmarks.mesh_runs", "--worker", "--case", self.case, "--mesh", self.mesh]
        command += ["--out", str(self.file), *["--cpu"] * options.cpu, *self.flags]
        for rank in range(self.world):
            place = dict(RANK=rank, LOCAL_RANK=self.gpu + rank, WORLD_SIZE=self.world, MASTER_PORT=port)
            environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", **{k: str(v) for k, v in place.items()}}
            with self.file.with_suffix(f".{rank}.log").open("w") as log:
                process = subprocess.Popen(
                    command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
                )
            self.processes.append(process)

    def asked(self, what: str) -> bool:
        return self.file.with_suffix(f".{what}?").exists()

    def allow(self, what: str) -> None:
        self.file.with_suffix(f".{what}").touch()

    def poll(self) -> bool:
        """Whether its processes still run. One that failed takes the others along: they would wait for it."""
        codes = [p.poll() for p in self.processes]
        if any(codes) and not self.error:
            self.error, self.ended = f"a process ended with {next(filter(None, codes))}", time.monotonic()
        if self.error and time.monotonic() > self.ended + 3:
            self.kill()
        return any(p.poll() is None for p in self.processes)

    def kill(self) -> None:
        for p in self.processes:
            if p.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(p.pid, signal.SIGKILL)
                p.wait()

    def result(self) -> dict:
        file = self.file.with_suffix(".json")
        return json.loads(file.read_text()) if file.exists() else {}

    def log(self, characters: int = 3000) -> str:
        texts = [self.file.with_suffix(f".{r}.log").read_text(errors="replace") for r in range(self.world)]
        return "\n".join(f"--- {self.name}, rank {r}\n{t[-characters:]}" for r, t in enumerate(texts) if t.strip())


class Driver:
    def __init__(self, options: argparse.Namespace, jobs: list[Job]):
        self.options, self.jobs = options, jobs
        self.deadline = time.monotonic() + options.seconds
        self.predictions: dict[tuple[str, str], dict[str, float]] = {}

    def wait(self, until: Callable[[], bool], seconds: float) -> bool:
        end = min(time.monotonic() + seconds, self.deadline)
        while time.monotonic() < end and not until():
            self.poll()
            time.sleep(0.05)
        return until()

    def poll(self) -> list[Job]:
        return [job for job in self.jobs if job.poll()]

    def say(self, text: str) -> None:
        print(f"[{self.options.seconds - (self.deadline - time.monotonic()):5.1f} s] {text}", flush=True)

    def go(self) -> None:
        import torch

        for job in self.jobs:
            job.start(self.options)
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        self.predictions = {(job.case, job.mesh): predict(job.case, job.mesh, gpu) for job in self.jobs}
        small = [job for job in self.jobs if job.case.partition(":")[0] in ("demo", "tiny")]
        large = [job for job in self.jobs if job not in small]
        for job in small:  # these fit beside everything
            job.allow("train")
        compiled = lambda: (
            all(job.asked("time") for job in small if job in self.poll())
            and all(job.asked("train") for job in large if job in self.poll())
        )
        quiet = self.wait(compiled, self.options.seconds * 0.6)
        self.say("all compiled" if quiet else "not all compiled in time; going on beside those that compile")
        waiting = [*small, *large]
        while waiting and time.monotonic() < self.deadline:
            alive = self.poll()
            waiting = [job for job in waiting if job in alive]
            ready = [job for job in waiting if job.asked("time" if job in small else "train")]
            if not ready:
                time.sleep(0.05)
                continue
            job = ready[0]
            waiting.remove(job)
            job.allow("train")
            job.allow("time")
            self.wait(lambda job=job: not job.poll(), self.options.seconds)
            self.say(f"{job.name} {job.error or 'ended'}")
            self.report()
        for job in self.poll():
            job.error = job.error or LATE
            job.kill()

    def report(self) -> bool:
        """Writes the rows of all results there are. Returns whether every check of every job passed."""
        results = {(job.case, job.mesh): job.result() for job in self.jobs}
        rows, good = [], True
        for job in self.jobs:
            found = results[job.case, job.mesh]
            reference = results.get((job.case, "tp=1"), {})
            want = reference_losses(reference, job.mesh)
            have = found.get("losses", [])
            if have:
                found |= {"first_loss": have[0], "last_loss": have[-1]}
            if want and have:
                found["worst_loss_difference"] = max(abs(a - b) / abs(b) for a, b in zip(have, want))
            good &= not job.error and "step_ms" in found and found.get("worst_loss_difference", 1.0) <= TOLERANCE
            good &= found.get("replicas_apart") == 0 and found.get("compilations_after_first_step") == 0
            one = results.get((job.case.partition(":")[0], "tp=1"), {}).get("tokens_per_s_per_gpu")
            if one and "tokens_per_s_per_gpu" in found:
                found["of_one_gpu"] = found["tokens_per_s_per_gpu"] / one
            if "step_ms" in found:
                found |= self.predictions[job.case, job.mesh]
            facts = {key: found.get(key) for key in ("versions", "gpu", "clock_mhz")}
            facts["date"] = datetime.date.today().isoformat()
            system = f"tedcompile {job.mesh}"
            rows += [
                {"benchmark": "mesh_runs", "case": job.case, "system": system, "metric": metric, "value": found[metric],
                 "unit": unit, **facts}
                for metric, unit in UNITS.items() if metric in found
            ]  # fmt: skip
        self.options.out.mkdir(parents=True, exist_ok=True)
        file = self.options.out / "mesh_runs.json"
        mine = {(row["case"], row["system"]) for row in rows}
        others = json.loads(file.read_text()) if file.exists() else []
        rows = [row for row in others if (row["case"], row["system"]) not in mine] + rows
        file.write_text(json.dumps(rows, indent=1) + "\n")
        return good

    def summary(self) -> None:
        found = {}
        for row in json.loads((self.options.out / "mesh_runs.json").read_text()):
            found.setdefault((row["case"], row["system"]), {})[row["metric"]] = row["value"]
        for job in self.jobs:
            numbers = found.get((job.case, f"tedcompile {job.mesh}"), {})
            print(job.name, {k: float(f"{v:.5g}") for k, v in numbers.items()}, job.error, flush=True)
        wrong = [job for job in self.jobs if job.error or job.result().get("replicas_apart")]
        print(*(job.log() for job in wrong), sep="\n", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results")
    parser.add_argument("--cases", nargs="+", default=[], help=f"by default {' '.join(CASES)}, and {'; '.join(MORE)}")
    parser.add_argument("--meshes", nargs="+", default=[], help=f"by default {' '.join(MESHES)}")
    parser.add_argument("--jobs", nargs="+", default=[], metavar="'CASE MESH ...'", help="these, instead of all cases")
    parser.add_argument("--seconds", type=float, default=400.0, help="for everything")
    parser.add_argument("--cpu", action="store_true", help="a tiny model on gloo")
    parser.add_argument("--meta", action="store_true", help=argparse.SUPPRESS)  # the model is initialised by its parts
    parser.add_argument("--eager", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--count", action="store_true", help=argparse.SUPPRESS)  # and the collectives' bytes
    parser.add_argument("--data", type=int, nargs="+", default=[2], help=argparse.SUPPRESS)  # ranks that one GPU acts
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--mesh", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        train(options)
        return 0
    if options.cpu:
        options.cases = ["tiny"]
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{folder}/inductor")
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "4")  # of each of the many processes
        named = options.jobs
        if not named:
            cases, meshes = options.cases or CASES, options.meshes or MESHES
            named = [f"{case} {mesh}" for case in cases for mesh in meshes]
            named += MORE if not (options.cases or options.meshes) else ()
        pairs = [job.split(maxsplit=1) for job in named]
        jobs = [  # those on one GPU take turns on the two
            Job(case, mesh, k % 2 if parse(mesh)[0].world == 1 else 0, pathlib.Path(folder, f"{case}-{k}.x"))
            for k, (case, mesh) in enumerate(pairs)
        ]
        driver = Driver(options, jobs)
        try:
            driver.go()
        finally:
            for job in jobs:
                job.kill()
            good = driver.report()
            driver.summary()
    print("every check passed" if good else "NOT every check passed", flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
