"""`tedcompile train`: a model in, trained on local files under torchrun (or on one process), a model out.

A step is the mean over `micro_batches` calls of the model, taken from one list (`data.MicroBatches`): data rank d of W
takes numbers d, d + W, ... after those of the steps before. So a step is the same on every mesh, and a checkpoint's
data position is a count of micro-batches.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tedcompile import compat, data, metrics, watch
from tedcompile.api import parallelize
from tedcompile.checkpoint import Checkpoints
from tedcompile.load import load
from tedcompile.mesh import Groups, MeshShape, data_rank, data_world
from tedcompile.optim import TiledAdamW
from tedcompile.save import save_pretrained
from tedcompile.settings import Settings

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
FIXED = ("seq", "batch", "micro_batches", "seed")  # what the list of micro-batches depends on, besides the data


def run(settings: Settings) -> None:
    """Trains; returns when the last step is saved, or after the step in which SIGTERM came. Raises ValueError."""
    with _processes(settings) as mesh, _termination() as stop:
        made: Run | None = None
        try:
            made = Run(settings, mesh, stop)
            with _watched(made.runtime.groups, settings.timeout):
                made.train()
        except torch.OutOfMemoryError as error:
            used = f"{made.memory()}; " if made else ""
            raise ValueError(
                f"rank {dist.get_rank()} is out of memory ({str(error).splitlines()[0]}): {used}less with a smaller "
                "--batch (and more --micro-batches), --checkpoint full, --zero 3, --master split, --moments bf16, "
                "--offload cpu, or a larger tp"
            ) from None


@contextlib.contextmanager
def _processes(settings: Settings) -> Iterator[Any]:
    """The mesh of the processes that torchrun has started, or of this one."""
    device = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU here")
    world = int(os.environ.get("WORLD_SIZE", 1))
    shapes = settings.meshes() or [MeshShape(dp=world)]
    shape = next((s for s in shapes if s.world == world), None)
    if shape is None:
        known, start = " or ".join(str(s.world) for s in shapes), "torchrun --nproc-per-node"
        raise ValueError(
            f"--mesh {settings.mesh} is for {known} processes, there are {world}: start them by {start} "
            f"{shapes[0].world} --no-python tedcompile train ..."
        )
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    later = settings.timeout + 30  # than the watch, which says more
    options: dict[str, Any] = dict(timeout=datetime.timedelta(seconds=later))
    env = os.environ
    if "RANK" not in env:
        options |= dict(store=dist.HashStore(), rank=0, world_size=1)
    elif env.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and env.get("LOCAL_WORLD_SIZE") == env["WORLD_SIZE"]:
        # After a restart torchrun's store still holds the addresses of processes that are gone (pytorch issue 135712).
        # The count of restarts is the same for all ranks of one node, and only there.
        agent = dist.TCPStore(env["MASTER_ADDR"], int(env["MASTER_PORT"]), is_master=False)
        store = dist.PrefixStore(f"restart {env.get('TORCHELASTIC_RESTART_COUNT')}", agent)
        options |= dict(store=store, rank=int(env["RANK"]), world_size=world)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo", **options)
    whole = world == 1  # after a failure the others may wait in a collective, which only the end of this process ends
    try:
        sizes = shape.as_dict()
        yield dist.init_device_mesh(device, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
        whole = True
    finally:
        if whole:
            compat.settle_gloo()
            dist.destroy_process_group()


@contextlib.contextmanager
def _watched(groups: Groups, seconds: float) -> Iterator[None]:
    """A rank that has waited so long for another one ends, and says where all of them are."""
    if dist.get_world_size() == 1:
        yield
        return
    thread = watch.Watch(groups, seconds)
    thread.start()
    try:
        yield
    finally:
        thread.stop()


@contextlib.contextmanager
def _termination() -> Iterator[list[int]]:
    """A list that is not empty when the process has been asked to end."""
    asked: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
    try:
        yield asked
    finally:
        signal.signal(signal.SIGTERM, before)


class Run:
    def __init__(self, settings: Settings, mesh: Any, stop: list[int]):
        self.settings, self.stop, self.mesh = settings, stop, mesh
        self.rank, self.data_rank, self.data_world = dist.get_rank(), data_rank(mesh), data_world(mesh)
        self.out, self.made = Path(settings.out), 0
        self.micro_batches = settings.micro_batches or self.data_world
        if self.micro_batches % self.data_world:
            raise ValueError(
                f"--micro-batches {self.micro_batches} cannot be dealt over {self.data_world} data ranks (dp x ep): "
                f"give a multiple of {self.data_world}"
            )
        self.config = settings.as_dict() | {"micro_batches": self.micro_batches}
        model, self.inputs, folder = self._model()
        self.source = f"the weights in {folder}" if folder else f"the initial weights of {settings.model}"
        self._read_data(model)
        self.model = parallelize(
            model,
            mesh,
            example_inputs=self._batch(torch.zeros(settings.batch, settings.seq + self.extra, dtype=torch.int64)),
            backend=settings.backend,
            outputs=["router_logits"] if settings.aux_loss else [],
            checkpoint=settings.checkpoint,
            memory_budget=settings.memory_budget or None,
            off=settings.off,
            plan=dict(p.split("=", 1) for p in settings.plan),
            machine=settings.machine,
            zero=settings.zero,
            weights=folder,
        )
        self.runtime = self.model._ted  # type: ignore[union-attr]
        learn = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = TiledAdamW(
            [
                {"params": [p for p in learn if p.dim() > 1]},
                {"params": [p for p in learn if p.dim() < 2], "weight_decay": 0.0},
            ],
            lr=settings.lr,
            betas=(0.9, settings.beta2),
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            max_grad_norm=settings.clip or None,
            master=settings.master,
            moments=settings.moments,
            offload=settings.offload or None,
            norm="backward",  # nothing here writes gradients but backwards
        )
        self.load: Tensor | None = None  # (layers, experts): tokens of this rank in the last step, by their routers
        self.flops = metrics.token_flops(self.model, settings.seq)

    # ---- before the first step

    def _model(self) -> tuple[torch.nn.Module, list[str], str | None]:
        """The model, the names of its two inputs, and the folder with its weights."""
        spec, settings = self.settings.model, self.settings
        torch.manual_seed(settings.seed)
        model, example = load(spec, DTYPES[settings.dtype], "cpu" if ".py:" in spec else "meta")
        if example is None:
            if settings.aux_loss:
                if not hasattr(model.config, "router_aux_loss_coef"):
                    raise ValueError(f"--aux-loss: {type(model).__name__} has no auxiliary loss of its router")
                model.config.output_router_logits = True
                for part in model.modules():
                    if hasattr(part, "router_aux_loss_coef"):
                        part.router_aux_loss_coef = settings.aux_loss
                model.config.router_aux_loss_coef = settings.aux_loss
            self.extra = 0  # these models shift the labels themselves
            kinds = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")  # pickles too: they are refused, not passed over
            holds = Path(spec).is_dir() and any(p.suffix in kinds for p in Path(spec).iterdir())
            return model, ["input_ids", "labels"], spec if holds else None
        named = isinstance(example, dict) and all(
            isinstance(v, Tensor) and not v.is_floating_point() for v in example.values()
        )
        if not named or len(example) != 2:
            raise ValueError(
                f"{spec}: to be trained on tokens, its example_inputs must be a dict of two integer tensors (batch, "
                "seq): the tokens, and the ones that follow them"
            )
        self.extra = 1
        return model.to(DTYPES[settings.dtype]), list(example), None

    def _vocabulary(self, model: torch.nn.Module) -> int | None:
        sizes = [m.num_embeddings for m in model.modules() if isinstance(m, torch.nn.Embedding)]
        if hasattr(model, "get_input_embeddings") and model.get_input_embeddings() is not None:
            sizes = [model.get_input_embeddings().num_embeddings]
        return max(sizes, default=None)

    def _read_data(self, model: torch.nn.Module) -> None:
        """One rank tokenises; the others wait at the store, however long it takes."""
        settings, vocabulary = self.settings, self._vocabulary(model)
        spec = settings.tokenizer or (settings.model if Path(settings.model).is_dir() else "bytes")
        tokenizer = data.tokenizer(spec)
        found: list[data.Sequences] = []
        for paths in filter(None, (settings.data, settings.eval_data)):
            file = self._first(lambda paths=paths: data.tokenise(data.files(paths), tokenizer, self.out, vocabulary))
            found.append(data.Sequences(file, settings.seq, self.extra))
        held_out = 0 if len(found) > 1 or not settings.eval_every else settings.eval_batches * settings.batch
        self.train_data = data.MicroBatches(found[0], settings.batch, settings.seed, held_out)
        self.held_out: list[list[int]] = []
        if settings.eval_every:
            source, start = (found[1], 0) if len(found) > 1 else (found[0], found[0].count - held_out)
            ids = list(range(start, source.count))[: settings.eval_batches * settings.batch]
            self.held_out = [ids[i : i + settings.batch] for i in range(0, len(ids), settings.batch)]
            self.held_out = [b for b in self.held_out if len(b) == settings.batch]
            if not self.held_out:
                raise ValueError(f"--eval-data: {source.count} sequences are less than one micro-batch")
            self.held_out_data = source
        self.config["tokens"] = data.contents(found[0].file)

    def _first(self, work: Any) -> Any:
        """What rank 0 makes, for all ranks; ValueError on all of them when it fails."""
        result: Any = (None, "")
        if self.rank == 0:
            try:
                result = (work(), "")
            except ValueError as error:
                result = (None, str(error))
        if dist.get_world_size() > 1:
            self.made += 1
            compat.wait_for(f"tedcompile.train.{self.made}", self.rank == 0)
            given = [result]
            dist.broadcast_object_list(given, src=0)
            result = given[0]
        if result[1]:
            raise ValueError(result[1])
        return result[0]

    def memory(self) -> str:
        """What holds the device's memory: at the most that was used, what is not kept between steps is activations."""
        device = self.runtime.groups.device
        kept = {"parameters": list(self.model.parameters()), "gradients": [p.grad for p in self.model.parameters()]}
        kept["optimizer state"] = [a for k in self.optimizer.kept for a in k.arrays]
        sizes = {
            name: sum(
                x.nbytes for t in found if t is not None and (x := compat.local_tensor(t)).device.type == device.type
            )
            / 2**30
            for name, found in kept.items()
        }
        sizes["activations and the rest"] = max(metrics.memory(device) - sum(sizes.values()), 0.0)
        return ", ".join(f"{name} {size:.2f} GiB" for name, size in sizes.items())

    # ---- steps

    def _batch(self, ids: Tensor) -> dict[str, Tensor]:
        tokens, targets = self.inputs
        if not self.extra:
            return {tokens: ids, targets: ids.clone()}
        return {tokens: ids[:, :-1].contiguous(), targets: ids[:, 1:].contiguous()}

    def _gather(self, values: list[float]) -> Tensor:
        """(ranks, n): everyone's numbers."""
        mine, host = torch.tensor(values, dtype=torch.float64), self.runtime.groups.host
        found = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        if host is None:
            return mine[None]
        with watch.waiting("the ranks' word on a step"):
            dist.all_gather(found, mine, group=host)
        return torch.stack(found)

    def train(self) -> None:
        settings, model = self.settings, self.model
        checkpoints = Checkpoints(self.out / "checkpoints", model, self.optimizer, keep=settings.keep)
        saved = checkpoints.load()
        step = self._resumed(saved) if saved else 0
        log = metrics.Report(self.out, settings.steps, step, settings.log_every, self.rank == 0)
        log.say(f"goes on from {checkpoints.folder} at step {step}" if saved else f"starts from {self.source}")
        model.train()
        began, tokens = time.perf_counter(), 0
        while step < settings.steps:
            start = time.perf_counter()
            for group in self.optimizer.param_groups:
                group["lr"] = settings.rate(step)
            numbers = range(
                step * self.micro_batches + self.data_rank, (step + 1) * self.micro_batches, self.data_world
            )
            stopping, loss, aux = self._step(step, numbers)
            step += 1
            tokens += self.micro_batches * settings.batch * settings.seq
            log.bar(step, loss, time.perf_counter() - start)
            if log.due(step):
                seconds, began = time.perf_counter() - began, time.perf_counter()
                speed, tokens = tokens / seconds, 0
                values: dict[str, Any] = {
                    "loss": loss,
                    "aux_loss": aux,
                    "lr": settings.rate(step - 1),
                    "gradient_norm": self.optimizer.grad_norm.item() if settings.clip else None,
                    "skipped_steps": self.optimizer.skipped,
                    "tokens": step * self.micro_batches * settings.batch * settings.seq,
                    "tokens_per_second": speed,
                    "mfu": self._mfu(speed),
                    "memory_gib": metrics.memory(self.runtime.groups.device),
                }
                if self.load is not None:
                    rows = self._gather(self.load.flatten().tolist()).sum(0) / self.mesh["tp"].size()
                    values |= metrics.expert_metrics(rows.view_as(self.load))
                log.metrics(step, {n: v for n, v in values.items() if v is not None})
            if settings.eval_every and step % settings.eval_every == 0:
                log.metrics(step, {"eval_loss": self._evaluate()})
                began = time.perf_counter()
            last = step == settings.steps or stopping
            if last or (settings.save_every and step % settings.save_every == 0):
                checkpoints.save(step, position=step * self.micro_batches, settings=self.config)
            if stopping:
                break
        checkpoints.wait()
        if step < settings.steps:
            log.say(f"asked to end: saved after step {step} in {checkpoints.folder}")
        elif settings.export:
            save_pretrained(model, settings.export)
            self._first(lambda: data.copy_tokenizer(settings.tokenizer or settings.model, settings.export))
            log.say(f"the model is in {settings.export}")
        log.close()

    def _resumed(self, saved: dict[str, Any]) -> int:
        """The step to go on from. Raises ValueError where the list of micro-batches would be another one."""
        before = saved["settings"]
        for name in (*FIXED, "tokens"):
            if before[name] != self.config[name]:
                what = "the data" if name == "tokens" else f"--{name.replace('_', '-')}"
                raise ValueError(
                    f"{self.out} holds a run with {what} {before[name]}, now it is {self.config[name]}: give the same, "
                    "or another --out"
                )
        return saved["step"]

    def _step(self, step: int, numbers: range) -> tuple[bool, float, float | None]:
        """One update: whether to stop, the mean loss over all micro-batches, and the auxiliary loss."""
        batches: list[dict[str, Tensor]] = []
        problem: Exception | None = None
        try:
            with watch.doing(f"the data of step {step + 1}"):
                batches = [self._batch(self.train_data.read(n)) for n in numbers]
        except Exception as error:
            problem = error
        flags = self._gather([bool(problem), bool(self.stop)])
        if flags[:, 0].any():
            self.runtime.together(lambda: _raise(problem))
        losses, auxes, loads = [], [], []
        for batch in batches:
            output = self.model(**batch)
            loss = output if isinstance(output, Tensor) else output.loss
            (loss / len(batches)).backward()
            losses.append(loss.detach())
            if getattr(output, "aux_loss", None) is not None:
                auxes.append(output.aux_loss.detach())
            if self.settings.aux_loss:
                loads.append(metrics.expert_load(output.router_logits, self.model.config.num_experts_per_tok))
        self.load = sum(loads) if loads else None
        with watch.waiting("the losses of a step"):  # a GPU comes to its collectives later than the host
            found = [torch.stack(x).float().mean().item() if x else 0.0 for x in (losses, auxes)]
        rows = self._gather([*found, self.data_rank])
        for rank, (loss, aux, number) in enumerate(rows.tolist()):
            if not torch.isfinite(torch.tensor([loss, aux])).all():
                raise ValueError(
                    f"rank {rank} (data rank {number:.0f}): the loss of step {step + 1} is {loss}; the last checkpoint "
                    "is of a step before it: lower --lr, or look at the data of that step"
                )
        with watch.waiting("the optimizer's step"):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        mean = rows.mean(0).tolist()
        return bool(flags[:, 1].any()), mean[0], mean[1] if auxes else None

    @torch.no_grad()
    def _evaluate(self) -> float:
        """The mean loss of the held-out micro-batches, the same on every mesh."""
        self.model.eval()
        total = 0.0
        for first in range(0, len(self.held_out), self.data_world):
            number = first + self.data_rank
            ids = self.held_out_data.read(self.held_out[min(number, len(self.held_out) - 1)])
            output = self.model(**self._batch(ids))
            loss = output if isinstance(output, Tensor) else output.loss
            if number < len(self.held_out):  # the others only take part
                total += loss.item()
        self.model.train()
        return self._gather([total]).sum().item() / self.mesh["tp"].size() / len(self.held_out)

    def _mfu(self, speed: float) -> float | None:
        """Of the rate of large products that the machine is known or measured to have."""
        if self.flops is None:
            return None
        size = DTYPES[self.settings.dtype].itemsize
        return self.flops * speed / dist.get_world_size() / self.runtime.machine.rate(size)


def _raise(error: Exception | None) -> None:
    if error is not None:
        raise error
