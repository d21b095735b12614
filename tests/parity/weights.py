"""A model's way through a folder: saved from one mesh, read by the library that the plain model is from, and loaded on
another mesh, where each rank reads its own slices."""

from __future__ import annotations

import json
import pathlib
import shutil
import tempfile
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests import models
from tests.parity import harness
from tests.parity.harness import Case, full, make_mesh

TOLERANCE = 1e-5  # of logits, relative to their largest


@dataclass(frozen=True)
class WeightsCase(Case):
    other: tuple[int, int, int] = (2, 1, 2)
    zero: int = 3  # on the other mesh
    logits: bool = False  # also on the other mesh
    tied: bool = False

    def run(self) -> dict:
        with torch.random.fork_rng():
            return compare(self)


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


def compare(case: WeightsCase) -> dict:
    import tedcompile

    mesh, wrong, loss_error = make_mesh(case.mesh, True, "cpu"), [], 0.0

    def judge(what: str, found: Tensor, expected: Tensor) -> None:
        nonlocal loss_error
        error = harness.finite((found - expected).abs().max() / expected.abs().max())
        loss_error = max(loss_error, error)
        if error > TOLERANCE:
            wrong.append(f"{what}: logits differ by {error:.1e}")

    reference, make_batch = build(case)
    batch = make_batch(tedcompile.data_rank(mesh), 0)
    want = logits(reference, batch)
    model, _ = build(case)
    tedcompile.parallelize(model, mesh, example_inputs=batch, backend="eager")
    judge("parallel", logits(model, batch), want)

    place = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(place, src=0)
    folder, theirs = pathlib.Path(place[0], "ours"), pathlib.Path(place[0], "theirs")
    tedcompile.save_pretrained(model, folder, max_shard_size=40_000)
    if dist.get_rank() == 0 and hasattr(reference, "config"):
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
    held = harness.held(loaded.parameters())
    if case.logits:
        judge("loaded", logits(loaded, batch), logits(reference, batch))
        tedcompile.save_pretrained(loaded, theirs)  # over other files, of one mesh for those of another
        if dist.get_rank() == 0:
            wrong += [f"{n} changed by loading and saving" for n in differ(read(theirs), read(folder))]
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(place[0])
    nothing = ("", 0.0)
    return dict(
        ok=not wrong, loss_error=loss_error, worst_gradient=nothing, worst_update=nothing, param_fraction=held,
        expert_fraction=harness.held(p for p in loaded.parameters() if p.dim() == 3), message="; ".join(wrong),
    )  # fmt: skip
