"""Weights of a model that is built on the meta device: each rank's parts, out of safetensors files or made in place.

A folder's tensors become the model's parameters as the model's library maps them (`frontends`), as `Lazy` tensors: what
is read are slices, what is held is this rank's parts and one slice. Only safetensors files are read, never a pickle.
What no file holds (rotary frequencies), and all of it without a folder, comes from the model's own initialisation, one
module at a time.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tedcompile import frontends
from tedcompile.lazy import Lazy, Part, Reader, Region, cut, everything, read_part

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


# ---- files ----------------------------------------------------------------------------------------------------------


def open_folder(folder: str | os.PathLike) -> tuple[dict[str, Lazy], dict[str, Path]]:
    """A folder's tensors by name, and the file of each; their values stay on the disk.

    Raises ValueError, which names the file and the tensor, for files that are missing, damaged or no safetensors, and
    for an index that does not agree with them.
    """
    folder = Path(folder)
    tensors: dict[str, Lazy] = {}
    files: dict[str, Path] = {}
    for path, listed in _files(folder).items():
        file = open_file(path)
        names = set(file.keys())
        for name in sorted(listed - names):
            raise ValueError(f"{folder / INDEX} says that tensor {name} is in {path.name}, which does not hold it")
        for name in sorted(names - listed) if listed else ():
            raise ValueError(f"{path} holds tensor {name}, which {INDEX} does not list there")
        for name in sorted(names):
            found = file.get_slice(name)
            dtype, shape = found.get_dtype(), found.get_shape()
            if dtype not in DTYPES:
                raise ValueError(
                    f"{path}: tensor {name} is of type {dtype}, a quantised checkpoint: convert it to bf16 first"
                )
            tensors[name] = Lazy.of(shape, DTYPES[dtype], functools.partial(read_region, file, path, name))
            files[name] = path
    return tensors, files


def _files(folder: Path) -> dict[Path, set[str]]:
    """The files to read, with the tensors that the index lists for each (none without an index)."""
    if not folder.is_dir():
        raise ValueError(f"weights: there is no folder {folder}")
    if (folder / SINGLE).exists():
        return {folder / SINGLE: set()}
    index = folder / INDEX
    if not index.exists():
        others = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl"))
        why = "may be a pickle, which can run code, and is never read: convert it to safetensors"
        raise ValueError(f"{folder} holds neither {SINGLE} nor {INDEX}" + (f"; {others[0]} {why}" if others else ""))
    try:
        listed = json.loads(index.read_text())["weight_map"]
        pairs = [(str(name), str(file)) for name, file in listed.items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is no index of safetensors files: {type(error).__name__}: {error}") from None
    files: dict[Path, set[str]] = {}
    for name, file in pairs:
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise ValueError(f"{index}: tensor {name} is in {file!r}, which is no safetensors file of this folder")
        if not (folder / file).is_file():
            raise ValueError(f"{index} says that tensor {name} is in {file}, which is missing")
        files.setdefault(folder / file, set()).add(name)
    return files


def open_file(path: Path) -> Any:
    """A safetensors file. Raises ValueError where it is damaged."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise ValueError("weights need the package safetensors: pip install 'tedcompile[hf]'") from None
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a whole safetensors file{_cut_off(path)}: {error}") from None


def _cut_off(path: Path) -> str:
    """The first tensor that a truncated file lacks, where the header can be read."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            size = os.fstat(file.fileno()).st_size - 8 - length
            header = json.loads(file.read(length)) if size >= 0 else {}
        ends = sorted((v["data_offsets"][1], name) for name, v in header.items() if name != "__metadata__")
        return next((f" (tensor {name} is cut off)" for end, name in ends if end > size), "")
    except (OSError, ValueError, struct.error, KeyError, TypeError, AttributeError):
        return ""


def read_region(file: Any, path: Path, name: str, region: Region) -> torch.Tensor:
    try:
        if not region:
            return file.get_tensor(name)
        return file.get_slice(name)[tuple(slice(a, b) for a, b in region)]
    except Exception as error:
        raise ValueError(f"{path}: tensor {name} cannot be read: {error}") from error


# ---- from a folder --------------------------------------------------------------------------------------------------


@dataclass
class Weights:
    """Where the values of a model's tensors come from: `files` by id of the tensor; `made` by initialisation.

    `digest` is equal where ranks have opened equal folders; `done` is called when all is loaded.
    """

    files: dict[int, Lazy] = field(default_factory=dict)
    made: dict[int, str] = field(default_factory=dict)
    digest: str = ""
    mapped: frontends.Mapped | None = None


def saved_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers by name, tied ones under each of their names."""
    return {n: t for n, t in model.state_dict(keep_vars=True).items() if isinstance(t, torch.Tensor)}


def plan(model: torch.nn.Module, folder: str | os.PathLike | None) -> Weights:
    """Decides where each value comes from; reads no values.

    Raises ValueError that names file and tensor where the folder is not this model's.
    """
    weights = Weights()
    if folder is not None:
        found, files = open_folder(folder)
        weights.mapped = frontends.from_checkpoint(model, found)
        weights.files = _matched(model, Path(folder), weights.mapped, found, files)
        facts = [(n, str(t.dtype), tuple(t.shape), files[n].name) for n, t in sorted(found.items())]
        weights.digest = hashlib.sha256(repr(facts).encode()).hexdigest()
    for name, t in (*model.named_parameters(), *model.named_buffers()):
        if t.is_meta and id(t) not in weights.files:
            weights.made[id(t)] = name
    return weights


def _matched(
    model: torch.nn.Module,
    folder: Path,
    mapped: frontends.Mapped,
    found: dict[str, Lazy],
    files: dict[str, Path],
) -> dict[int, Lazy]:
    matched: dict[int, Lazy] = {}
    wanted = saved_tensors(model)
    names: dict[int, list[str]] = {}
    for name, t in wanted.items():
        names.setdefault(id(t), []).append(name)
    for ident, tied in names.items():
        name = next((n for n in tied if n in mapped.sources), tied[0])
        value, t = mapped.tensors.get(name), wanted[name]
        if isinstance(value, Lazy) and value.shape == t.shape:
            matched[ident] = value
            continue
        sources = mapped.sources.get(name, [])
        expected = frontends.to_checkpoint(model, {name: Lazy.of(t.shape, t.dtype, lambda region: None)})  # type: ignore
        if not set(sources) & set(expected):
            expected = {name: t}
        for source in sources:
            if source in expected and found[source].shape != expected[source].shape:
                raise ValueError(
                    f"{files[source]}: tensor {source} has shape {tuple(found[source].shape)}, but the model's {name} "
                    f"{_shape(t)} needs {tuple(expected[source].shape)}"
                )
        missing = [n for n in expected if n not in found]
        if missing:
            more = f" (nor {len(missing) - 1} more)" if len(missing) > 1 else ""
            raise ValueError(f"{folder} has no tensor {missing[0]}{more}, of which the model's {name} is made")
        reason = value if isinstance(value, Exception) else f"they give {_shape(value)}"
        shown = ", ".join(f"{files[s].name}: {s} {_shape(found[s])}" for s in sources[:3])
        raise ValueError(f"{folder}: the model's {name} {_shape(t)} cannot be made of {shown}: {reason}")
    if mapped.unexpected:
        name, others = mapped.unexpected[0], len(mapped.unexpected) - 1
        raise ValueError(
            f"{files[name]}: tensor {name} {_shape(found[name])}{f' and {others} more' if others else ''} is no part "
            f"of {type(model).__name__}"
        )
    return matched


def _shape(t: Any) -> str:
    return str(tuple(t.shape)) if isinstance(t, torch.Tensor) else "nothing"


# ---- by the model's own initialisation ------------------------------------------------------------------------------


def read(
    model: torch.nn.Module,
    weights: Weights,
    parts: dict[int, tuple[Part, torch.dtype]],
    seed: int,
    device: torch.device,
) -> dict[int, torch.Tensor]:
    """This rank's part of each tensor that `weights` knows, by id; what `parts` does not name is whole."""
    local: dict[int, torch.Tensor] = {}
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}

    def take(ident: int, read_region: Reader, rows: bool = False) -> None:
        t = tensors[ident]
        ranges, dtype = parts.get(ident) or ([[r] for r in everything(t.shape)], t.dtype)
        if rows:
            ranges = [[(i, i + 1) for a, b in ranges[0] for i in range(a, b)], *ranges[1:]]
        local[ident] = read_part(read_region, ranges, dtype, device)

    for ident, value in weights.files.items():
        take(ident, value.read, rows=value.sliced and value.dim() > 2)  # one expert at a time
    for ident, whole in _initialised(model, weights.made, seed, device):
        take(ident, functools.partial(cut, whole))
    return local


def _initialised(
    model: torch.nn.Module, wanted: dict[int, str], seed: int, device: torch.device
) -> Iterator[tuple[int, torch.Tensor]]:
    """Whole values of the wanted meta tensors, those of one module at a time.

    A module's own `reset_parameters`, then `_init_weights(module)` of the nearest module that has one, as the
    constructors do it. Random numbers depend on the seed and the module's path alone. Raises ValueError that names a
    tensor that they leave without values: then a constructor has set it, which is lost on the meta device.
    """
    modules = dict(model.named_modules())
    watched = [
        (n, t) for n, t in (*model.named_parameters(), *model.named_buffers()) if id(t) in wanted or not t.is_meta
    ]
    versions = [t._version for _, t in watched]
    done: set[int] = set()
    for path, module in modules.items() if wanted else ():
        own = [(slot, leaf, t) for slot in (module._parameters, module._buffers) for leaf, t in slot.items()]
        own = [entry for entry in own if entry[2] is not None]
        if own and not any(id(t) in wanted and id(t) not in done for _, _, t in own):
            continue
        made: list[tuple[torch.Tensor, torch.Tensor]] = []
        try:
            for slot, leaf, t in own:
                value = _unset(t, device)
                slot[leaf] = torch.nn.Parameter(value, t.requires_grad) if isinstance(t, torch.nn.Parameter) else value
            _initialise(modules, path, seed, device)
            made = [(t, slot[leaf].detach()) for slot, leaf, t in own if id(t) in wanted and id(t) not in done]
        finally:
            for slot, leaf, t in own:
                slot[leaf] = t
        for t, value in made:
            if _is_unset(value):
                raise ValueError(
                    f"{wanted[id(t)]} is on the meta device and gets no values from the initialisation of its module "
                    f"({type(module).__name__} needs a reset_parameters that sets it): give it one, "
                    "or build the model on the cpu"
                )
            done.add(id(t))
            yield id(t), value
    for (name, t), version in zip(watched, versions, strict=True):
        if t._version != version:
            raise ValueError(
                f"{name} is initialised by another module than its own, which cannot be done on the meta device: "
                "build the model on the cpu"
            )


@torch.no_grad()
def _initialise(modules: dict[str, torch.nn.Module], path: str, seed: int, device: torch.device) -> None:
    module, above = modules[path], path
    while not callable(getattr(modules[above], "_init_weights", None)) and above:
        above = above.rpartition(".")[0]
    rule = getattr(modules[above], "_init_weights", None)
    number = int.from_bytes(hashlib.sha256(f"{seed} {path}".encode()).digest()[:7], "big")
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.device(device):
        torch.manual_seed(number)
        for name in ("reset_parameters", "_reset_parameters"):
            if callable(getattr(module, name, None)):
                getattr(module, name)()
        if rule is not None and len(inspect.signature(rule).parameters) == 1:
            rule(module)


def _mark(dtype: torch.dtype) -> int:
    return 0xFF if dtype.is_floating_point or dtype == torch.bool else 0xA5


def _unset(t: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Memory for a tensor, of values that no initialisation gives: nan, or a pattern of bytes."""
    value = torch.empty(t.shape, dtype=t.dtype, device=device)
    if value.numel():
        value.view(-1).view(torch.uint8).fill_(_mark(t.dtype))
    return value


def _is_unset(value: torch.Tensor) -> bool:
    if value.dtype.is_floating_point:
        return bool(value.isnan().any())
    width = value.element_size()
    return bool((value.reshape(-1).view(torch.uint8).view(-1, width) == _mark(value.dtype)).all(1).any())
