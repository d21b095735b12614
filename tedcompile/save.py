"""`save_pretrained`: a parallel model as the folder that the plain model's library would write, streamed.

One tensor at a time is whole, on rank 0's host; its bytes go into the file where the header says they are (the
safetensors format: 8 bytes with the header's length, the header as JSON, then the values).
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import shutil
import struct
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from tedcompile import compat, frontends
from tedcompile.lazy import Lazy, Region, cut, part, write_part
from tedcompile.runtime import ParallelModule, Runtime, plain
from tedcompile.weights import DTYPES, INDEX, SINGLE, saved_tensors

STAGE = ".saving"  # the folder in which files are written
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@torch.no_grad()
def save_pretrained(model: torch.nn.Module, folder: str | os.PathLike, *, max_shard_size: int = 5_000_000_000) -> None:
    """Writes a parallel model as the plain one: `AutoModelForCausalLM.from_pretrained(folder)` reads it.

    Every rank calls it; rank 0 writes. Names and shapes are those of the model's library (for a plain module, of its
    `state_dict()`; a tied tensor once), in files of at most `max_shard_size` bytes, or of one larger tensor. Files get
    their names when all are written, so a failed save leaves an older one in the folder as it was.

    Raises TypeError for a model that is not parallel, and ValueError on all ranks when rank 0 cannot write.
    """
    if not isinstance(model, ParallelModule):
        raise TypeError(f"save_pretrained takes what parallelize returned, not a {type(model).__name__}")
    runtime, folder = model._ted, Path(folder)
    whole = _Whole(runtime)
    state: dict[str, Lazy] = {}
    seen: set[int] = set()
    for name, t in saved_tensors(model).items():
        if id(t) not in seen:
            seen.add(id(t))
            state[name] = Lazy.of(t.shape, t.dtype, functools.partial(whole.read, t))
    with plain(model):
        tensors = frontends.to_checkpoint(model, state)
    files = _files(tensors, max_shard_size)
    first = whole.first

    stage = folder / STAGE

    def prepare() -> None:
        if first:
            stage.mkdir(parents=True, exist_ok=True)
            with plain(model):
                frontends.save_config(model, stage)

    try:
        _together(runtime, prepare, folder)
        for file, names in files.items():
            write = functools.partial(_write, stage / file, {n: tensors[n] for n in names}, first)
            _together(runtime, write, folder)
        _together(runtime, lambda: _publish(folder, files, tensors) if first else None, folder)
    finally:
        if first:
            shutil.rmtree(stage, ignore_errors=True)


def write_folder(
    model: torch.nn.Module, state: Mapping[str, Lazy], folder: str | os.PathLike, max_shard_size: int = 5_000_000_000
) -> None:
    """The same of one process: a model without weights, and its tensors by name, which are read one at a time."""
    folder = Path(folder)
    stage = folder / STAGE
    tensors = frontends.to_checkpoint(model, dict(state))
    files = _files(tensors, max_shard_size)
    try:
        stage.mkdir(parents=True, exist_ok=True)
        frontends.save_config(model, stage)
        for file, names in files.items():
            _write(stage / file, {n: tensors[n] for n in names}, True)
        _publish(folder, files, tensors)
    except OSError as error:
        raise ValueError(f"the model cannot be saved to {folder}: {error}") from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _together(runtime: Runtime, work, folder: Path) -> None:
    def named() -> None:
        try:
            work()
        except OSError as error:
            raise ValueError(f"the model cannot be saved to {folder}: {error}") from error

    runtime.together(named)


class _Whole:
    """Whole tensors on the host of the first rank, the last one kept; on the others meta tensors of the same shape."""

    def __init__(self, runtime: Runtime):
        self.group = runtime.groups.host
        self.first = self.group is None or dist.get_rank(self.group) == 0
        self.tensor: torch.Tensor | None = None
        self.value: torch.Tensor | None = None

    def read(self, tensor: torch.Tensor, region: Region) -> torch.Tensor:
        if self.tensor is not tensor or self.value is None:
            self.tensor = self.value = None
            self.value, self.tensor = self._gather(tensor), tensor
        return cut(self.value, region)

    def _gather(self, tensor: torch.Tensor) -> torch.Tensor:
        local = compat.local_tensor(tensor).detach()
        whole = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu" if self.first else "meta")
        if not isinstance(tensor, DTensor) or self.group is None:
            return whole.copy_(local)
        mesh, placements = tensor.device_mesh, tensor.placements
        me = dist.get_rank(self.group)
        for rank, number in enumerate(dist.get_process_group_ranks(self.group)):
            at = (mesh.mesh == number).nonzero()[0].tolist()
            if any(p.is_replicate() and i for p, i in zip(placements, at, strict=True)):
                continue  # a copy
            ranges = part(tensor.shape, placements, at, mesh.mesh.shape)
            if rank == me:
                piece = local.cpu().contiguous()
                if not self.first:
                    dist.send(raw(piece), group_dst=0, group=self.group)
            elif self.first:
                piece = torch.empty([sum(b - a for a, b in held) for held in ranges], dtype=tensor.dtype)
                dist.recv(raw(piece), group_src=rank, group=self.group)
            if self.first:
                write_part(whole, ranges, piece)
        return whole


def raw(t: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor's bytes."""
    return t.reshape(-1).view(torch.uint8)


def header(tensors: Mapping[str, torch.Tensor], metadata: dict[str, str]) -> tuple[bytes, dict[str, int]]:
    """What a safetensors file starts with, and where after it each tensor's bytes are, in their order in the file."""
    offsets, end = {}, 0
    for name, t in sorted(tensors.items(), key=lambda item: -item[1].element_size()):  # so that all are aligned
        offsets[name] = end
        end += t.nbytes
    entries: dict = {"__metadata__": metadata}
    for name, start in offsets.items():
        t = tensors[name]
        entries[name] = {"dtype": NAMES[t.dtype], "shape": list(t.shape), "data_offsets": [start, start + t.nbytes]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, offsets


def _files(tensors: dict[str, Lazy], limit: int) -> dict[str, list[str]]:
    """Names in the order of the model, as many to a file as its size allows."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, t in tensors.items():
        if groups[-1] and size + t.nbytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += t.nbytes
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    return {f"model-{i:05}-of-{len(groups):05}.safetensors": names for i, names in enumerate(groups, 1)}


def _write(path: Path, tensors: dict[str, Lazy], first: bool) -> None:
    """One file. A rank 0 that cannot write goes on gathering, for the others are about to send, and raises then."""
    text, offsets = header(tensors, {"format": "pt"})
    failure: Exception | None = None
    with contextlib.ExitStack() as stack:
        file = None
        try:
            if first:
                file = stack.enter_context(path.open("wb"))
                file.write(text)
        except OSError as error:
            failure = error
        for name, t in tensors.items():
            try:
                value = t.read()
                if file is not None and failure is None:
                    file.seek(len(text) + offsets[name])
                    file.write(raw(value.contiguous()).numpy())
            except Exception as error:
                failure = failure or error
        if failure is None and file is not None:
            try:
                file.flush()
                os.fsync(file.fileno())
            except OSError as error:
                failure = error
    if failure is not None:
        raise failure


def _publish(folder: Path, files: dict[str, list[str]], tensors: dict[str, Lazy]) -> None:
    """Moves the files to their place, and removes those of an earlier save."""
    if len(files) > 1:
        where = {name: file for file, names in files.items() for name in names}
        index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": where}
        (folder / STAGE / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    written = sorted(p.name for p in (folder / STAGE).iterdir())
    for path in folder.iterdir():
        if path.name not in written and re.fullmatch(
            r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?", path.name
        ):
            path.unlink()
    for name in written:
        (folder / STAGE / name).replace(folder / name)
    (folder / STAGE).rmdir()
