"""Checkpoints of a training run: written beside it, whole or not at all, read on any mesh and ZeRO stage.

    FOLDER/step-00000200/checkpoint.json       the step, schedules, what the caller gave, and each file's size and CRC
                         rank-0.safetensors    what rank 0 kept, in rectangles: "model/lm_head.weight[0:64,32:64]"

Each element is written once, by one of the ranks that hold it, so a tensor is read again from the rectangles that a
mesh's part meets: those of a fused [gate; up] weight and of ZeRO's flat rows too. Files are written in a folder of
another name, synced, and get the final name together by one rename. Nothing is ever a pickle: JSON and safetensors.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import os
import random
import re
import shutil
import sys
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from tedcompile import compat
from tedcompile.lazy import Region, cut, everything, overlap, part, places, read_part, spans, within
from tedcompile.optim.flat import Slot, share
from tedcompile.optim.tiled import Tiled
from tedcompile.save import NAMES, header, raw
from tedcompile.weights import DTYPES, open_file, read_region, saved_tensors

FORMAT = 1
INDEX = "checkpoint.json"
log = logging.getLogger("tedcompile")


class Checkpoints:
    """The checkpoints of a run, in a folder that all ranks see.

        checkpoints = tedcompile.Checkpoints("run", model, optimizer, schedule)
        saved = checkpoints.load()                       # None in a new run
        for step in range(saved["step"] if saved else 0, steps):
            ...
            checkpoints.save(step + 1, position=position)  # returns when all is copied to host memory
        checkpoints.wait()

    Args:
        model: what `parallelize` returned, or a plain module on one process.
        optimizer: of `tedcompile.optim` or torch, over parameters of the model.
        schedules: learning-rate schedulers, or anything with `state_dict` and `load_state_dict` of plain values.
        keep: how many checkpoints stay; older ones are removed when a new one is whole, later ones never.

    Kept besides: the random state of each rank (restored where the number of ranks is the same, else rank 0's), and the
    keywords of `save`. Every rank calls every method. On the same mesh a run goes on bit by bit (with deterministic
    kernels); int8 moments, whose blocks belong to one mesh, are rounded again on another.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        *schedules: Any,
        keep: int = 3,
    ):
        if keep < 1:
            raise ValueError(f"keep must be at least 1, got {keep}")
        self.folder, self.model, self.optimizer, self.schedules = Path(folder), model, optimizer, schedules
        self.keep = keep
        several = dist.is_initialized() and dist.get_world_size() > 1
        self.rank: int = dist.get_rank() if several else 0
        self.world: int = dist.get_world_size() if several else 1
        self.group = dist.new_group(backend="gloo") if several else None  # of the thread that writes
        self.thread: threading.Thread | None = None
        self.error = ""
        self.names = {id(p): n for n, p in model.named_parameters()}
        for number, group in enumerate(optimizer.param_groups if optimizer else ()):
            for i, p in enumerate(group["params"]):
                if id(p) not in self.names:
                    raise ValueError(f"parameter {i} of the optimizer's group {number} is none of the model's")

    # ---- writing

    @torch.no_grad()
    def save(self, step: int, **values: Any) -> None:
        """Starts a checkpoint. `values` are plain: numbers, texts, lists, dicts, small tensors.

        What is written does not change any more when this returns. Raises ValueError on all ranks, also for the
        checkpoint before this one, when it cannot be written; whole ones are left as they are.
        """
        self.wait()
        pieces, tensors = {}, {}
        for name, shape, region, value in self._pieces():
            pieces[_key(name, region)] = value.detach().to("cpu", copy=True).contiguous()
            tensors[name] = [NAMES[value.dtype], list(shape)]
        metadata = {"tensors": json.dumps(tensors), "random": json.dumps(_random_state())}
        facts = {
            "format": FORMAT,
            "step": step,
            "world": self.world,
            "groups": [_encode(group, "the optimizer's groups") for group in self._groups()],
            "skipped": self.optimizer.skipped if isinstance(self.optimizer, Tiled) else 0,
            "schedules": [_encode(s.state_dict(), type(s).__name__) for s in self.schedules],
            "values": {name: _encode(value, name) for name, value in values.items()},
        }
        self.thread = threading.Thread(target=self._write, args=(step, pieces, metadata, facts), name="checkpoint")
        self.thread.start()

    def wait(self) -> None:
        """Until the last checkpoint is whole. Raises ValueError on all ranks if it could not be written."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        if self.error:
            error, self.error = self.error, ""
            raise ValueError(error)

    def _everyone(self, value: Any) -> list[Any]:
        found = [value]
        if self.group is not None:
            found = [None] * self.world
            dist.all_gather_object(found, value, group=self.group)
        return found

    def _together(self, work: Callable[[], Any]) -> list[Any]:
        """Every rank's result; ValueError on all of them when it raises on one."""
        result, text = None, ""
        try:
            result = work()
        except Exception as error:
            known = isinstance(error, (OSError, ValueError))
            text = str(error) if known else f"{type(error).__name__}: {error}"
        found = self._everyone((result, text))
        for rank, (_, failed) in enumerate(found):
            if failed:
                raise ValueError(failed if self.world == 1 else f"rank {rank}: {failed}")
        return [r for r, _ in found]

    def _write(self, step: int, pieces: dict[str, Tensor], metadata: dict[str, str], facts: dict[str, Any]) -> None:
        stage, target = self.folder / f".step-{step:08}.writing", self.folder / f"step-{step:08}"
        first = self.rank == 0

        def prepare() -> None:
            if first:
                self.folder.mkdir(parents=True, exist_ok=True)
                for left in self.folder.glob(".step-*"):  # by a process that was killed
                    shutil.rmtree(left)
                stage.mkdir()

        def publish() -> None:
            if not first:
                return
            for name in files:
                if not (stage / name).exists():
                    raise OSError(f"{stage / name} is not seen by rank 0: all ranks must share the folder")
            _write_file(stage / INDEX, [json.dumps(facts | {"files": files}, indent=1).encode()])
            _sync(stage)
            if target.exists():
                self._remove(target)
            stage.rename(target)
            _sync(self.folder)
            older = [p for p in _found(self.folder) if _number(p) <= step]  # a later one is damaged, or another run's
            for path in older[self.keep :]:
                self._remove(path)

        try:
            try:
                self._together(prepare)
                name = f"rank-{self.rank}.safetensors"
                files = dict(self._together(lambda: (name, _write_pieces(stage / name, pieces, metadata))))
                self._together(publish)
            except ValueError:
                if first:
                    shutil.rmtree(stage, ignore_errors=True)
                raise
        except Exception as error:
            self.error = f"the checkpoint of step {step} cannot be written to {self.folder}: {error}"

    def _remove(self, path: Path) -> None:
        gone = path.with_name(f".{path.name}.removed")
        path.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)

    def _groups(self) -> Iterator[dict[str, Any]]:
        for group in self.optimizer.param_groups if self.optimizer else ():
            numbers = {k: v for k, v in group.items() if k not in ("params", "param_names")}
            yield numbers | {"params": [self.names[id(p)] for p in group["params"]]}

    # ---- what each rank writes

    def _pieces(self) -> Iterator[tuple[str, Sequence[int], Region, Tensor]]:
        """(name, whole shape, rectangle, its values) of all that this rank writes."""
        for name, t in _once(self.model).items():
            yield from self._held(f"model/{name}", t)
        if isinstance(self.optimizer, Tiled):
            shared = {slot: k.bucket.shards > 1 for k in self.optimizer.kept for slot in k.bucket.slots}  # ZeRO-1
            for slot, state, low, values in self.optimizer.parts():
                own = share(slot.param).axes if shared[slot] else ()
                yield from self._flat(f"optimizer/{self.names[id(slot.param)]}/{state}", slot, own, low, values)
            for slot, step in self.optimizer.steps():
                if step:
                    name = f"optimizer/{self.names[id(slot.param)]}/step"
                    yield from self._held(name, torch.tensor(step, dtype=torch.float32))
        elif self.optimizer is not None:
            for p, entries in self.optimizer.state.items():
                for state, value in entries.items():
                    name = f"optimizer/{self.names[id(p)]}/{state}"
                    if value is None:
                        continue
                    if not isinstance(value, Tensor):
                        raise ValueError(f"{name} is a {type(value).__name__}: only tensors are kept in checkpoints")
                    yield from self._held(name, value)

    def _held(self, name: str, t: Tensor) -> Iterator[tuple[str, Sequence[int], Region, Tensor]]:
        if self._writes(name, t):
            local = compat.local_tensor(t)
            for there, here in places(_part(t), everything(local.shape)):
                yield name, t.shape, there, cut(local, here)

    def _flat(
        self, name: str, slot: Slot, own: Sequence[str], low: int, values: Tensor
    ) -> Iterator[tuple[str, Sequence[int], Region, Tensor]]:
        """Elements of a local tensor in row-major order, from `low` on, of which the ranks along `own` have others."""
        if self._writes(name, slot.grad, own):
            for region in spans(compat.local_tensor(slot.grad).shape, low, low + values.numel()):
                sizes = [b - a for a, b in region]
                block, values = values[: math.prod(sizes)].view(sizes), values[math.prod(sizes) :]
                for there, here in places(_part(slot.grad), region):
                    yield name, slot.grad.shape, there, cut(block, here)

    def _writes(self, name: str, t: Tensor, own: Sequence[str] = ()) -> bool:
        """Whether it is this rank, among those with copies, that writes a tensor; on the axes `own` there are none."""
        index, copies = self.rank, self.world
        if isinstance(t, DTensor):
            index, copies, mesh = 0, 1, t.device_mesh
            at, names = mesh.get_coordinate() or (), mesh.mesh_dim_names or ()
            for axis, placement in enumerate(t.placements):
                if placement.is_partial():
                    raise ValueError(f"{name} is partial over {names[axis]}")
                if placement.is_replicate() and names[axis] not in own:
                    index, copies = index * mesh.size(axis) + at[axis], copies * mesh.size(axis)
        return index == zlib.crc32(name.encode()) % copies

    # ---- reading

    def load(self) -> dict[str, Any] | None:
        """Restores the newest checkpoint that is whole; returns its `step` and the values given to `save`, or None.

        One that is damaged is named in a warning, with the file and what is wrong, and the one before is taken. Raises
        ValueError on all ranks when there are only damaged ones, or when one is of another model or optimizer: then
        nothing is changed.
        """
        self.wait()
        paths = [Path(p) for p in self._everyone([str(p) for p in _found(self.folder)])[0]]
        failures = []
        for path in paths:
            try:
                source = None

                def check(path=path) -> None:
                    nonlocal source
                    source = Source(path)
                    source.verify(self.rank, self.world)

                self._together(check)
            except ValueError as error:
                failures.append(str(error))
                if self.rank == 0:
                    log.warning("the checkpoint %s is damaged and left out: %s", path, error)
                continue
            assert source is not None
            return self._restore(source)
        if failures:
            raise ValueError(f"no checkpoint in {self.folder} is whole: {'; '.join(failures)}")
        return None

    @torch.no_grad()
    def _restore(self, source: Source) -> dict[str, Any]:
        self._together(lambda: self._match(source))

        def work() -> None:
            for name, t in _once(self.model).items():
                compat.local_tensor(t).copy_(source.part(f"model/{name}", t))
                torch.autograd.graph.increment_version(t)  # as copy_ on the whole: an optimizer may look
            if self.optimizer is not None:
                self._restore_optimizer(source, self.optimizer)
            for schedule, state in zip(self.schedules, source.facts["schedules"], strict=True):
                schedule.load_state_dict(_decode(state))
            if self.rank == 0 or source.facts["world"] == self.world:
                _set_random_state(source.random[self.rank])

        self._together(work)
        return {"step": source.facts["step"]} | {n: _decode(v) for n, v in source.facts["values"].items()}

    def _match(self, source: Source) -> None:
        """ValueError where a checkpoint is not this model's and optimizer's."""
        tensors = {f"model/{name}": t for name, t in _once(self.model).items()}
        saved = {n for n in source.tensors if n.startswith("model/")}
        for name in sorted(saved ^ tensors.keys()):
            holder, other = ("checkpoint", "model") if name in saved else ("model", "checkpoint")
            raise ValueError(f"{source.path}: the {holder} has {name.partition('/')[2]}, the {other} has not")
        for name, t in tensors.items():
            shape = tuple(source.tensors[name][1])
            if shape != tuple(t.shape):
                raise ValueError(f"{source.path}: {name} has shape {shape}, the model's {tuple(t.shape)}")
        if len(source.facts["schedules"]) != len(self.schedules):
            raise ValueError(
                f"{source.path} holds {len(source.facts['schedules'])} schedules, given are {len(self.schedules)}"
            )
        groups = [(g["params"], old["params"]) for g, old in zip(self._groups(), source.groups, strict=False)]
        if self.optimizer is not None and len(self.optimizer.param_groups) != len(source.groups):
            raise ValueError(
                f"{source.path} has {len(source.groups)} param groups, the optimizer {len(self.optimizer.param_groups)}"
            )
        for number, (mine, theirs) in enumerate(groups):
            if mine != theirs:
                name = next((a for a, b in zip(mine, theirs, strict=False) if a != b), "another number of parameters")
                raise ValueError(f"{source.path}: group {number} of the optimizer is another one, from {name} on")
        if isinstance(self.optimizer, Tiled):
            for slot, _ in self.optimizer.steps():
                name = self.names[id(slot.param)]
                missing = [s for s in self.optimizer.rule.states if f"optimizer/{name}/{s}" not in source.tensors]
                if missing and f"optimizer/{name}/step" in source.tensors:
                    raise ValueError(f"{source.path} has no {missing[0]} of {name}: it is of another optimizer")

    def _restore_optimizer(self, source: Source, optimizer: torch.optim.Optimizer) -> None:
        groups = [{k: v for k, v in g.items() if k != "params"} for g in source.groups]
        if isinstance(optimizer, Tiled):
            for group, old in zip(optimizer.param_groups, groups, strict=True):
                group.update({k: v for k, v in old.items() if k in optimizer.rule.defaults or k == "initial_lr"})

            def step(slot: Slot) -> float:
                name = f"optimizer/{self.names[id(slot.param)]}/step"
                return float(source.read(name, ())) if name in source.tensors else 0.0

            def read(slot: Slot, state: str, low: int, high: int) -> Tensor | None:
                name = f"optimizer/{self.names[id(slot.param)]}/{state}"
                if name not in source.tensors:
                    return None
                shape, ranges = compat.local_tensor(slot.grad).shape, _part(slot.grad)
                found = []
                for region in spans(shape, low, high):
                    block = torch.empty([b - a for a, b in region], dtype=DTYPES[source.tensors[name][0]])
                    for there, here in places(ranges, region):
                        cut(block, here).copy_(source.read(name, there))
                    found.append(block.reshape(-1))
                return torch.cat(found)

            optimizer.load_parts(step, read)
            optimizer.set_skipped(source.facts["skipped"])
            return
        states: dict[str, dict[str, Tensor]] = {}
        for name in source.tensors:
            kind, _, rest = name.partition("/")
            if kind == "optimizer":
                states.setdefault(rest.rpartition("/")[0], {})[rest.rpartition("/")[2]] = source.whole_or_part(
                    name, self.model.get_parameter(rest.rpartition("/")[0])
                )
        numbers = {self.names[id(p)]: i for i, p in enumerate(p for g in optimizer.param_groups for p in g["params"])}
        saved = [
            group | {"params": [numbers[self.names[id(p)]] for p in now["params"]]}
            for group, now in zip(groups, optimizer.param_groups, strict=True)
        ]
        optimizer.load_state_dict({"state": {numbers[n]: s for n, s in states.items()}, "param_groups": saved})


class Source:
    """A checkpoint, opened: values are read when they are asked for.

    Raises ValueError that names the file and what is wrong with it.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            self.facts = json.loads((path / INDEX).read_text())
            sizes = {str(n): (int(size), int(crc)) for n, (size, crc) in self.facts["files"].items()}
            self.groups = [_decode(g) for g in self.facts["groups"]]
            version = self.facts["format"]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path / INDEX} is not the index of a checkpoint: {error!r}") from None
        if version != FORMAT:
            raise ValueError(f"{path / INDEX} is of format {version}, this version reads {FORMAT}")
        self.sums = sizes
        self.tensors: dict[str, list] = {}
        self.pieces: dict[str, list[tuple[Region, Any, Path, str]]] = {}
        self.random: list[dict] = []
        for name, (size, _) in sizes.items():
            file = path / name
            if Path(name).name != name or not file.is_file():
                raise ValueError(f"{file} is missing")
            if file.stat().st_size != size:
                raise ValueError(f"{file} has {file.stat().st_size:,} bytes, {size:,} were written")
            opened = open_file(file)
            try:
                metadata = opened.metadata() or {}
                self.tensors |= json.loads(metadata["tensors"])
                self.random.append(json.loads(metadata["random"]))
                for key in opened.keys():  # noqa: SIM118
                    tensor, region = _parse(key)
                    self.pieces.setdefault(tensor, []).append((region, opened, file, key))
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{file} is not a file of a checkpoint: {error!r}") from None
        for name, (_, shape) in self.tensors.items():
            there = sum(math.prod(b - a for a, b in piece[0]) for piece in self.pieces.get(name, ()))
            if there != math.prod(shape):
                raise ValueError(f"{path} holds {there:,} of the {math.prod(shape):,} elements of {name}")

    def verify(self, rank: int, world: int) -> None:
        """Reads this rank's share of the files, and compares their sums."""
        for name in list(self.sums)[rank::world]:
            total = 0
            with (self.path / name).open("rb") as file:
                while block := file.read(1 << 24):
                    total = zlib.crc32(block, total)
            if total != self.sums[name][1]:
                raise ValueError(f"{self.path / name} has been changed: its CRC-32 is {total:08x}")

    def read(self, name: str, region: Region) -> Tensor:
        """A rectangle of a tensor."""
        whole = torch.empty([b - a for a, b in region], dtype=DTYPES[self.tensors[name][0]])
        for place, opened, file, key in self.pieces[name]:
            common = overlap(place, region)
            if common is not None:
                cut(whole, within(common, region)).copy_(read_region(opened, file, key, within(common, place)))
        return whole

    def part(self, name: str, t: Tensor) -> Tensor:
        """What this rank holds of it, in the layout of `t`."""
        local = compat.local_tensor(t)
        return read_part(functools.partial(self.read, name), _part(t), local.dtype, local.device)

    def whole_or_part(self, name: str, parameter: Tensor) -> Tensor:
        """A state as torch keeps it: in the layout of its parameter when it has its shape."""
        dtype, shape = self.tensors[name]
        if tuple(shape) != tuple(parameter.shape):
            return self.read(name, everything(shape))
        local = read_part(
            functools.partial(self.read, name), _part(parameter), DTYPES[dtype], compat.local_tensor(parameter).device
        )
        return compat.with_local(parameter, local)


def _once(model: torch.nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers, a tied one under its first name."""
    found: dict[int, tuple[str, Tensor]] = {}
    for name, t in saved_tensors(model).items():
        found.setdefault(id(t), (name, t))
    return dict(found.values())


def _part(t: Tensor) -> list[list[tuple[int, int]]]:
    """The ranges that this rank holds of a tensor."""
    if not isinstance(t, DTensor):
        return [[r] for r in everything(t.shape)]
    mesh = t.device_mesh
    return part(t.shape, t.placements, mesh.get_coordinate() or (), mesh.mesh.shape)


def _found(folder: Path) -> list[Path]:
    """The checkpoints of a folder, the newest first."""
    if not folder.is_dir():
        return []
    return sorted((p for p in folder.iterdir() if re.fullmatch(r"step-\d{8,}", p.name)), key=_number, reverse=True)


def _number(path: Path) -> int:
    return int(path.name.partition("-")[2])


# ---- files and plain values


def _key(name: str, region: Region) -> str:
    return f"{name}[{','.join(f'{a}:{b}' for a, b in region)}]"


def _parse(key: str) -> tuple[str, Region]:
    name, _, text = key.removesuffix("]").rpartition("[")
    return name, tuple((int(a), int(b)) for a, b in (r.split(":") for r in text.split(",") if r))


def _write_pieces(path: Path, pieces: dict[str, Tensor], metadata: dict[str, str]) -> tuple[int, int]:
    text, offsets = header(pieces, metadata)
    return _write_file(path, [text, *(raw(pieces[name]).numpy() for name in offsets)])


def _write_file(path: Path, blocks: list[Any]) -> tuple[int, int]:
    """Writes and syncs a file; returns its size and CRC-32."""
    total = 0
    with path.open("wb") as file:
        for block in blocks:
            file.write(block)
            total = zlib.crc32(block, total)
        file.flush()
        os.fsync(file.fileno())
        return file.tell(), total


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _encode(value: Any, where: str) -> Any:
    """Plain values as JSON: what JSON has no form for is {"<kind>": ...}."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, list):
        return [_encode(v, where) for v in value]
    if isinstance(value, tuple):
        return {"<tuple>": [_encode(v, where) for v in value]}
    if isinstance(value, dict):
        pairs = [[_encode(k, where), _encode(v, f"{where}.{k}")] for k, v in value.items()]
        plain = all(isinstance(k, str) and not k.startswith("<") for k in value)
        return dict(pairs) if plain else {"<pairs>": pairs}
    if isinstance(value, Tensor) and value.numel() < 1 << 16:
        value = value.detach().cpu()
        return {"<tensor>": [NAMES[value.dtype], list(value.shape), raw(value.contiguous()).numpy().tobytes().hex()]}
    raise ValueError(f"{where} holds a {type(value).__name__}, which a checkpoint cannot keep: give plain values")


def _decode(value: Any) -> Any:
    if isinstance(value, list):
        return [_decode(v) for v in value]
    if not isinstance(value, dict):
        return value
    if "<tuple>" in value:
        return tuple(_decode(v) for v in value["<tuple>"])
    if "<pairs>" in value:
        return {_decode(k): _decode(v) for k, v in value["<pairs>"]}
    if "<tensor>" in value:
        dtype, shape, text = value["<tensor>"]
        return torch.frombuffer(bytearray.fromhex(text), dtype=DTYPES[dtype]).reshape(shape)
    return {k: _decode(v) for k, v in value.items()}


def _random_state() -> dict[str, Any]:
    state: dict[str, Any] = {"cpu": torch.get_rng_state(), "python": random.getstate()}
    if "numpy" in sys.modules:
        kind, keys, *rest = sys.modules["numpy"].random.get_state()
        state["numpy"] = (kind, keys.tolist(), *rest)
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return _encode(state, "the random state")


def _set_random_state(saved: dict[str, Any]) -> None:
    state = _decode(saved)
    torch.set_rng_state(state["cpu"])
    random.setstate(state["python"])
    if "numpy" in state and "numpy" in sys.modules:
        sys.modules["numpy"].random.set_state(state["numpy"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
