"""A model's way through a folder: saved from one mesh, read by the library that the plain model is from, and loaded on
another mesh, where each rank reads its own slices."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pathlib
import shutil
import tempfile
import unittest.mock
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tedcompile.compare import finite, full, held, local
from tests import models
from tests.parity.harness import Case, make_mesh, require_same

TOLERANCE = 1e-5  # of logits, relative to their largest


@dataclass(frozen=True)
class WeightsCase(Case):
    other: tuple[int, int, int] = (2, 1, 2)
    zero: int = 3  # on the other mesh
    logits: bool = False  # also on the other mesh
    tied: bool = False
    failures: bool = False  # what is refused on one rank is refused on all, and what is initialised

    def run(self) -> dict:
        with torch.random.fork_rng():
            return (fail if self.failures else compare)(self)


def build(case: WeightsCase) -> tuple[nn.Module, dict[str, Tensor]]:
    sizes = {}
    if case.model in models.families(models.EXPERTS):
        sizes = dict(num_hidden_layers=2 if case.model == "deepseek_v3" else 1, tie_word_embeddings=case.tied)
    model, make_batch = models.MODELS[case.model](**sizes)
    return models.plain(model), make_batch


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {n: full(t) for n, t in (*model.named_parameters(remove_duplicate=False), *model.named_buffers())}


@torch.no_grad()
def logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    model.eval()
    output = model(**batch)
    return getattr(output, "logits", output)


def read(folder: pathlib.Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return {n: t for file in sorted(folder.glob("*.safetensors")) for n, t in load_file(file).items()}


def differ(found: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    names = sorted(found.keys() ^ expected.keys())
    return names or [n for n, t in expected.items() if found[n].dtype != t.dtype or not torch.equal(found[n], t)]


def shared_folder() -> pathlib.Path:
    place = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(place, src=0)
    return pathlib.Path(place[0])


def compare(case: WeightsCase) -> dict:
    import tedcompile

    mesh, wrong, loss_error = make_mesh(case.mesh, True, "cpu"), [], 0.0

    def judge(what: str, found: Tensor, expected: Tensor) -> None:
        nonlocal loss_error
        error = finite((found - expected).abs().max() / expected.abs().max())
        loss_error = max(loss_error, error)
        if error > TOLERANCE:
            wrong.append(f"{what}: logits differ by {error:.1e}")

    reference, make_batch = build(case)
    batch = make_batch(tedcompile.data_rank(mesh), 0)
    want = logits(reference, batch)
    model, _ = build(case)
    tedcompile.parallelize(model, mesh, example_inputs=batch, backend="eager")
    judge("parallel", logits(model, batch), want)

    place = shared_folder()
    folder, theirs = place / "ours", place / "theirs"
    tedcompile.save_pretrained(model, folder, max_shard_size=40_000)
    if dist.get_rank() == 0 and hasattr(reference, "save_pretrained"):
        from transformers import AutoModelForCausalLM

        reference.save_pretrained(theirs)
        wrong += [f"{n} is not what transformers writes" for n in differ(read(folder), read(theirs))]
        for name in ("config.json", "generation_config.json"):
            if json.loads((folder / name).read_text()) != json.loads((theirs / name).read_text()):
                wrong.append(f"{name} is not what transformers writes")
        loaded, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        wrong += [f"from_pretrained: {what} {names}" for what, names in info.items() if names]
        judge("from_pretrained", logits(models.plain(loaded), batch), want)
    elif dist.get_rank() == 0:
        once = {n: p.detach() for n, p in (*reference.named_parameters(), *reference.named_buffers())}
        wrong += [f"{n} is not in the plain layout" for n in differ(read(folder), once)]

    with torch.device("meta"):
        empty, _ = build(case)
    other = make_mesh(case.other, True, "cpu")
    batch = make_batch(tedcompile.data_rank(other), 0)
    options = dict(example_inputs=batch, backend="eager", zero=case.zero)
    loaded = tedcompile.parallelize(empty, other, weights=folder, **options)
    wrong += [f"{n} is not what was saved" for n in differ(tensors(loaded), tensors(reference))]
    if case.tied and loaded.lm_head.weight is not loaded.model.embed_tokens.weight:
        wrong.append("a tied weight is not tied any more")
    if case.logits:
        judge("loaded", logits(loaded, batch), logits(reference, batch))
        tedcompile.save_pretrained(loaded, theirs)  # over other files, of one mesh for those of another
        if dist.get_rank() == 0:
            wrong += [f"{n} changed by loading and saving" for n in differ(read(theirs), read(folder))]
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(place)
    return verdict(wrong, loaded, loss_error)


def verdict(wrong: list[str], model: nn.Module, loss_error: float = 0.0) -> dict:
    nothing = ("", 0.0)
    return {
        "ok": not wrong,
        "loss_error": loss_error,
        "worst_gradient": nothing,
        "worst_update": nothing,
        "param_fraction": held(model.parameters()),
        "expert_fraction": held(p for p in model.parameters() if p.dim() == 3),
        "message": "; ".join(wrong),
    }


def fail(case: WeightsCase) -> dict:
    import tedcompile

    wrong, rank, made = [], dist.get_rank(), []

    @contextlib.contextmanager
    def refused(*texts: str) -> Iterator[None]:
        """All ranks raise a ValueError; rank 1's has the first text, the others' the last."""
        try:
            yield
            found = "nothing"
        except ValueError as error:
            found = str(error)
        if texts[0 if rank == 1 else -1] not in found:
            wrong.append(f"rank {rank}: not {texts} but {found}")

    def load(weights, sizes=case.mesh):
        with torch.device("meta"):
            model, make_batch = build(case)
        torch.manual_seed(7 if rank == 0 else 100 + rank)
        mesh = make_mesh(sizes, True, "cpu")
        return tedcompile.parallelize(model, mesh, example_inputs=make_batch(0, 0), backend="eager", weights=weights)

    for sizes in (case.mesh, case.other):  # a meta model is the same on every mesh
        model = load(None, sizes)
        made.append(tensors(model))
        require_same("initial values", {n: t.double().sum().item() for n, t in made[-1].items()})
    wrong += [f"{n} is initialised by mesh" for n in differ(*made)]

    place = shared_folder()
    folder = place / "model"
    tedcompile.save_pretrained(model, folder, max_shard_size=40_000)
    before = {f.name: f.read_bytes() for f in sorted(folder.iterdir())}
    if rank == 1:
        for name in ("torn", "other"):
            shutil.copytree(folder, place / name)
        torn = max((place / "torn").glob("*.safetensors"))
        torn.write_bytes(torn.read_bytes()[:-4])
        config = place / "other" / "model.safetensors.index.json"
        listed = json.loads(config.read_text())["weight_map"]
        extra = next(n for n in listed if n.endswith("norm.weight"))
        file = place / "other" / listed[extra]
        from safetensors.torch import load_file, save_file

        save_file({n: t.bfloat16() for n, t in load_file(file).items()}, file)
    dist.barrier()
    with refused("is not a whole safetensors file (tensor", "rank 1 failed: ValueError"):
        load(place / ("torn" if rank == 1 else "model"))
    with refused("ranks disagree on their files of weights"):
        load(place / ("other" if rank == 1 else "model"))

    with torch.no_grad():
        for p in model.parameters():
            local(p).add_(1)
    full_disk = unittest.mock.patch("os.fsync", side_effect=OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    with refused("No space left on device"), full_disk if rank == 0 else contextlib.nullcontext():
        tedcompile.save_pretrained(model, folder)
    with refused("Not a directory"):
        tedcompile.save_pretrained(model, folder / "config.json" / "model")
    dist.barrier()
    if {f.name: f.read_bytes() for f in sorted(folder.iterdir())} != before:
        wrong.append("a failed save changed the folder")
    dist.barrier()
    tedcompile.save_pretrained(model, folder)
    if sorted(f.name for f in folder.iterdir() if "safetensors" in f.name) != ["model.safetensors"]:
        wrong.append(f"files of an older save are left: {os.listdir(folder)}")
    dist.barrier()
    if rank == 0:
        shutil.rmtree(place)
    return verdict(wrong, model)
