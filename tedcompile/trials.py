"""Runs of `tedcompile verify`: what each process builds, the batches that it brings, and what failing ones show."""

from __future__ import annotations

import contextlib
import copy
import datetime
import functools
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from tedcompile import frontends
from tedcompile.load import auto_class, configuration, from_config, load
from tedcompile.mesh import MeshShape, data_rank
from tedcompile.processes import Failure, Pool
from tedcompile.shrink import elements, shrink
from tedcompile.verify import STEPS, Verification, suspects, verify

BATCH, SEQ = 2, 32


@dataclass(frozen=True)
class Trial:
    """`source`: a transformers configuration or `file.py:function`; `weights`: a folder with the weights of the former.

    `options`: of `verify`, by name; `device`: "cpu", or "cuda" for a GPU to each rank.
    """

    source: Any
    mesh: MeshShape
    batch: int = BATCH
    seq: int = SEQ
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    seed: int = 0
    weights: str = ""
    options: dict[str, Any] = field(default_factory=lambda: dict(steps=STEPS))
    timeout: float = 600.0

    def run(self) -> Verification:
        """Every rank of a world of `mesh.world` calls it."""
        with quiet():
            torch.manual_seed(self.seed)
            model, example = self.build()
            mesh = _mesh(tuple(self.mesh.as_dict().values()), self.device)
            vocab = vocabulary(model)
            rank = data_rank(mesh)
            return verify(
                model, mesh, lambda step: vary(example, vocab, self.seed + 1000 * step + rank), **self.options
            )

    def build(self) -> tuple[nn.Module, Any]:
        """The model with values, and the example of a batch."""
        if isinstance(self.source, str):
            return load(self.source, device="cpu")
        if self.weights:
            model = auto_class(self.source).from_pretrained(self.weights, config=self.source, dtype=self.dtype)
        else:
            model = from_config(self.source, self.dtype, "cpu")
            disturb(model)
        example = frontends.example_inputs(model) or {}
        return model, {n: x[:1, :1].expand(self.batch, self.seq).clone() for n, x in example.items()}


@functools.cache
def _mesh(sizes: tuple[int, ...], device: str):
    return dist.init_device_mesh(device, sizes, mesh_dim_names=("dp", "ep", "tp"))


@torch.no_grad()
def disturb(model: nn.Module) -> None:
    """Noise on parameters that start as one number (norms, biases): else a gradient may be zero or symmetric for it."""
    for p in model.parameters():
        if p.numel() > 1 and bool((p == p.flatten()[0]).all()):
            p.add_(torch.randn_like(p), alpha=0.1)


def vocabulary(model: nn.Module) -> int:
    """Token ids below this are in every embedding."""
    return min((m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)), default=0)


def vary(example: Any, vocab: int, seed: int) -> Any:
    """The batch of a data rank and a step (in `seed`): tensors of the example's shapes, with its own values shuffled.

    Tensors of one shape are shuffled alike, so that ids and labels stay together. Masks (by name, too), positions and
    what else takes two values or is sorted stay as they are; what is of one number only (an example made for its shape)
    is drawn: ids below `vocab`, or normal numbers.
    """
    orders: dict[torch.Size, Tensor] = {}
    drawn: dict[torch.Size, Tensor] = {}
    generator = torch.Generator().manual_seed(seed)

    def change(x: Any) -> Any:
        if not isinstance(x, Tensor) or x.dim() == 0 or x.dtype is torch.bool:
            return x
        flat = torch.zeros(x.shape, dtype=x.dtype).flatten() if x.is_meta else x.detach().flatten()
        if bool((flat == flat[0]).all()):
            if x.is_floating_point():
                return torch.randn(x.shape, generator=generator).to(x.dtype)
            if vocab < 2:
                return x
            if x.shape not in drawn:
                drawn[x.shape] = torch.randint(vocab, x.shape, generator=generator)
            return drawn[x.shape].to(x.dtype)
        if len(flat.unique()) < 3 or bool((flat.diff() >= 0).all()) or x.shape[-1] > 1 and bool((x.diff() == 1).all()):
            return x
        if x.shape not in orders:
            orders[x.shape] = torch.randperm(len(flat), generator=generator)
        return flat[orders[x.shape]].view(x.shape)

    if isinstance(example, dict):
        return {name: x if "mask" in str(name) else tree_map(change, x) for name, x in example.items()}
    return tree_map(change, example)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """What models print and libraries log is not part of the answer."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def has_weights(folder: str) -> bool:
    names = ("model.safetensors", "model.safetensors.index.json")
    return Path(folder).is_dir() and any(Path(folder, name).exists() for name in names)


def fits(model: nn.Module, world: int) -> None:
    """ValueError for a model too large for this machine: two copies on each rank, five more on the first one."""
    size = sum(x.numel() * x.element_size() for x in tree_leaves(list(model.parameters())))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if (need := (2 * world + 5) * size) > memory:
        raise ValueError(
            f"the model has {size / 2**30:.1f} GiB of parameters, and {world} processes here would need about "
            f"{need / 2**30:.0f} GiB of memory, of which this machine has {memory / 2**30:.0f}: leave --full out"
        )


# ---- many of them ---------------------------------------------------------------------------------------------------


@dataclass
class Broken:
    """A run without a result: a rank raised, died or hung."""

    text: str
    diagnosis: list[str] = field(default_factory=list)
    ok: bool = False


def prepare(
    source: str, mesh: MeshShape, *, full: bool, dtype: torch.dtype, device: str, options: dict[str, Any], **sizes: Any
) -> tuple[Trial, list[str]]:
    """The trial of what a user typed, and what to say about it. Raises ValueError for what cannot work."""
    if device not in ("", "cpu", "cuda"):
        raise ValueError(f"--device cannot be {device!r}: choose cpu or cuda")
    if spawned() and int(os.environ["WORLD_SIZE"]) != mesh.world:
        raise ValueError(f"the mesh needs {mesh.world} processes, torchrun started {os.environ['WORLD_SIZE']}")
    here = int(os.environ.get("LOCAL_WORLD_SIZE", mesh.world)) if spawned() else mesh.world
    gpus = torch.cuda.device_count()
    if device == "cuda" and gpus < here:
        raise ValueError(f"--device cuda: {here} processes need a GPU each, this machine has {gpus}")
    device = device or ("cuda" if gpus >= here else "cpu")
    make = lambda given, **more: Trial(given, mesh, dtype=dtype, device=device, options=options, **sizes, **more)  # noqa: E731
    if ".py:" in source:
        file = source.rpartition(":")[0]
        if not Path(file).is_file():
            raise ValueError(f"there is no file {file}")
        if full:
            raise ValueError("--full is for transformers models: a function's model is taken as it is")
        return make(source), []
    config = configuration(source)
    if not full:
        small, changes = shrink(config, mesh)
        size, was = elements(small), elements(config)
        return make(small), [f"shrunk from {was:,} to {size:,} parameters: {', '.join(changes) or 'nothing'}"]
    fits(from_config(copy.deepcopy(config), dtype), mesh.world)
    if has_weights(source):
        return make(config, weights=source), [f"weights of {source}"]
    return make(config), ["weights: the model's own initialisation"]


def spawned() -> bool:
    """Whether torchrun has started this process, as one of several."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def speaks() -> bool:
    """Whether this process prints."""
    return not spawned() or os.environ["RANK"] == "0"


def run(trial: Trial, diagnose: bool = True) -> Verification | Broken:
    """Runs a trial in processes of its own, or in torchrun's. Raises ValueError for what any rank refuses."""
    if spawned():
        return _under_torchrun(replace(trial, options=trial.options | dict(diagnose=diagnose)))
    with Pool(trial.mesh.world, trial.device, trial.timeout + 60) as pool:
        found = _call(pool, replace(trial, options=trial.options | dict(diagnose=diagnose)))
        if found.ok or not diagnose:
            return found
        if isinstance(found, Broken):
            quick = replace(trial, options=trial.options | dict(diagnose=False))

            def agrees(wanted: dict[str, Any]) -> bool:
                return _call(pool, replace(quick, options=quick.options | wanted)).ok

            found.diagnosis = list(suspects(trial.options, agrees))
    found.diagnosis += _axes(trial)
    return found


def _axes(trial: Trial) -> Iterator[str]:
    """Which axes of the mesh alone show the difference."""
    sizes = {axis: size for axis, size in trial.mesh.as_dict().items() if size > 1}
    if len(sizes) < 2:
        return
    bad: list[str] = []
    good: list[str] = []
    for axis, size in sizes.items():
        alone = replace(trial, mesh=MeshShape(**{axis: size}), options=trial.options | dict(diagnose=False))
        with contextlib.suppress(ValueError), Pool(size, trial.device, trial.timeout + 60) as pool:
            (good if _call(pool, alone).ok else bad).append(f"{axis}={size}")
    if bad or good:
        words = [f"{', '.join(axes)} {word}" for axes, word in ((bad, "differs"), (good, "agrees")) if axes]
        yield f"On one axis: {'; '.join(words)}."


def _call(pool: Pool, trial: Trial) -> Verification | Broken:
    replies = pool.call(trial)
    failures = [(rank, r) for rank, r in replies.items() if isinstance(r, Failure)]
    if not failures:
        return replies[0]
    refused = [r.refused for _, r in failures if r.refused]
    if refused:
        own = [text for text in refused if not re.match(r"rank \d+ failed: ", text)]
        raise ValueError((own or refused)[0])
    # the others lose their connection to a rank that died, and wait for one that raised
    order = ["died", "raised", "hung"]
    kind = min((f.kind for _, f in failures), key=order.index)
    texts = sorted((rank, _last(f)) for rank, f in failures if f.kind == kind)
    if kind == "hung":
        return Broken(f"no answer in {trial.timeout:g} s; {'; '.join(f'rank {r} was at {text}' for r, text in texts)}")
    return Broken(f"rank {texts[0][0]}: {texts[0][1]}")


def _last(failure: Failure) -> str:
    """The line that says most: of an exception the last one, of a stack the innermost one of the user's code."""
    if failure.kind == "hung":
        frames = re.findall(r'File "(.*)", line (\d+) in (\S+)', failure.text.partition("Current thread")[2])
        outside = [f for f in frames if "site-packages" not in f[0] and "/lib/python" not in f[0]]
        return "{}:{} ({})".format(*(outside or frames or [("an unknown place", "?", "?")])[0])
    return failure.text.strip().splitlines()[-1]


def _under_torchrun(trial: Trial) -> Verification:
    ours = not dist.is_initialized()
    if ours:
        if trial.device == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        limit = datetime.timedelta(seconds=trial.timeout)
        dist.init_process_group("cpu:gloo,cuda:nccl" if trial.device == "cuda" else "gloo", timeout=limit)
    try:
        return trial.run()
    finally:
        if ours:
            dist.destroy_process_group()
