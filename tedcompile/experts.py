"""`tedcompile experts`: checkpoints with other numbers of experts, from folder to folder, one slice in memory.

Which tensors have a dim of experts is not listed: it is where the model of the one configuration and the model of the
other, both without weights, differ in shape.

merge: the experts of two checkpoints and the rows of their routers side by side (aggregation of experts: Kim et al.,
arXiv 2109.10465, section 4). prune: the experts that held-out data use most, in each layer, or random ones.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tedcompile import data
from tedcompile import weights as weights_
from tedcompile.lazy import Lazy
from tedcompile.load import from_config, load
from tedcompile.save import write_folder

COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")  # of a configuration
DENSE = ("first", "mean")


def merge(first: str, second: str, out: str, dense: str = "first") -> str:
    """Writes the model with the experts of both, those of the first one first; returns a sentence about it.

    `dense`: what has no dim of experts is the first one's, or the mean of both. Raises ValueError that names what does
    not fit.
    """
    if dense not in DENSE:
        raise ValueError(f"--dense cannot be {dense!r}: choose {' or '.join(DENSE)}")
    one, other = _open(first), _open(second)
    if type(one.model) is not type(other.model):
        raise ValueError(f"{first} is a {type(one.model).__name__}, {second} a {type(other.model).__name__}")
    number = _number(one.model.config) + _number(other.model.config)
    target = _build(one.model.config, number)
    made: dict[str, Tensor] = {}
    for name, t in weights_.saved_tensors(target).items():
        a, b = one.tensors[name], other.tensors.get(name)
        if b is None:
            raise ValueError(f"{second} has no {name}, which {first} has")
        dim = _dim(name, a, t)
        if dim is None and a.shape != b.shape or dim is not None and _but(a.shape, dim) != _but(b.shape, dim):
            raise ValueError(f"{name} has shape {tuple(a.shape)} in {first}, {tuple(b.shape)} in {second}")
        if dim is not None:
            made[name] = torch.cat([a, b.to(a.dtype) if b.dtype != a.dtype else b], dim)
        else:
            made[name] = (a + b) / 2 if dense == "mean" and a.is_floating_point() else a
    _write(target, made, out, first)
    return f"{out}: {number} experts, of {first} and {second}\n"


def prune(
    folder: str,
    out: str,
    keep: int,
    by: str,
    paths: Sequence[str] = (),
    batches: int = 16,
    seq: int = 512,
    seed: int = 0,
) -> str:
    """Writes the model with `keep` experts in each layer; returns a table of what they were used for.

    `by`: "utilisation" keeps those that most tokens of `paths` are routed to, "random" any, by the seed. Raises
    ValueError that says what does not fit.
    """
    source = _open(folder)
    config, number = source.model.config, _number(source.model.config)
    chosen = getattr(config, "num_experts_per_tok", 1)
    if not chosen <= keep < number:
        raise ValueError(f"--keep {keep}: {folder} has {number} experts, of which a token uses {chosen}")
    blocks = _blocks(source.model)
    if by == "random":
        generator = torch.Generator().manual_seed(seed)
        kept = {path: torch.randperm(number, generator=generator)[:keep].sort().values for path in blocks}
        lines = [f"{path}: experts {', '.join(map(str, index.tolist()))}" for path, index in kept.items()]
    elif by == "utilisation":
        if not paths:
            raise ValueError("--by utilisation needs --data, held-out text to count routing on")
        counts = utilisation(folder, source.model, paths, batches, seq)
        kept = {p: c.argsort(descending=True, stable=True)[:keep].sort().values for p, c in counts.items()}
        lines = [
            f"{path}: experts {', '.join(map(str, kept[path].tolist()))}, "
            f"{c[kept[path]].sum().item() / max(c.sum().item(), 1):.1%} of {c.sum().item():,} assignments"
            for path, c in counts.items()
        ]
    else:
        raise ValueError(f"--by cannot be {by!r}: choose utilisation or random")
    target = _build(config, keep)
    made: dict[str, Tensor] = {}
    for name, t in weights_.saved_tensors(target).items():
        a = source.tensors[name]
        dim = _dim(name, a, t)
        made[name] = a
        if dim is not None:
            index = next((kept[p] for p in blocks if name.startswith(p + ".")), None)
            if index is None:
                raise ValueError(
                    f"{name} {tuple(a.shape)} has a dim of experts outside of the blocks {', '.join(blocks)}"
                )
            rows = a.chunk(number, dim)
            made[name] = torch.cat([rows[i] for i in index.tolist()], dim)
    _write(target, made, out, folder)
    return "\n".join([*lines, f"{out}: {keep} of {number} experts"]) + "\n"


@torch.no_grad()
def utilisation(folder: str, model: torch.nn.Module, paths: Sequence[str], batches: int, seq: int) -> dict[str, Tensor]:
    """Assignments of tokens to experts (E,) of each MoE block, over `batches` sequences of held-out text."""
    from transformers import AutoModelForCausalLM

    size = model.get_input_embeddings().num_embeddings
    spec = folder if (Path(folder) / "tokenizer.json").exists() else "bytes"
    with tempfile.TemporaryDirectory() as place:
        file = data.tokenise(data.files(paths), data.tokenizer(spec), Path(place), size)
        sequences = data.Sequences(file, seq)
        if not sequences.count:
            raise ValueError(f"--data: there is less than one sequence of {seq} tokens")
        ids = [sequences.read([i]) for i in range(min(batches, sequences.count))]
        del sequences
    device = "cuda" if torch.cuda.is_available() else "cpu"
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").to(device).eval()
    counts = {path: torch.zeros(_number(model.config), dtype=torch.int64) for path in _blocks(model)}

    def hook(path: str) -> Any:
        def count(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
            index = next(a for a in (*args, *kwargs.values()) if isinstance(a, Tensor) and not a.is_floating_point())
            counts[path] += index.flatten().bincount(minlength=len(counts[path])).cpu()

        return count

    for path in counts:
        whole.get_submodule(f"{path}.experts").register_forward_pre_hook(hook(path), with_kwargs=True)
    for batch in ids:
        whole(input_ids=batch.to(device))
    return counts


class _Folder:
    """A folder's configuration as a model without weights, and its tensors by the model's names, unread."""

    def __init__(self, model: torch.nn.Module, tensors: Mapping[str, Lazy]):
        self.model, self.tensors = model, tensors


def _open(folder: str) -> _Folder:
    if not Path(folder).is_dir():
        raise ValueError(f"there is no folder {folder}")
    model, example = load(folder)
    planned = weights_.plan(model, folder)
    if planned.mapped is not None:
        planned.mapped.loaded()
    tensors = {
        name: planned.files[id(t)] for name, t in weights_.saved_tensors(model).items() if id(t) in planned.files
    }
    if getattr(model.config, "n_group", None) not in (None, 1):
        raise ValueError(f"{folder} routes in {model.config.n_group} groups of experts, which would be torn apart")
    return _Folder(model, tensors)


def _number(config: Any) -> int:
    for name in COUNTS:
        if isinstance(getattr(config, name, None), int):
            return getattr(config, name)
    raise ValueError(f"a {config.model_type} has no experts: its configuration has none of {', '.join(COUNTS)}")


def _build(config: Any, number: int) -> torch.nn.Module:
    config = copy.deepcopy(config)
    for name in COUNTS:
        if isinstance(getattr(config, name, None), int):
            setattr(config, name, number)
    return from_config(config)


def _blocks(model: torch.nn.Module) -> list[str]:
    """The modules whose child `experts` is called with (tokens, chosen experts, weights)."""
    found = [n.removesuffix(".experts") for n, m in model.named_modules() if n.endswith(".experts")]
    if not found:
        raise ValueError(f"{type(model).__name__} has no module named experts")
    return found


def _dim(name: str, old: Tensor, new: Tensor) -> int | None:
    """The dim of experts: where the shapes differ."""
    if old.dim() != new.dim():
        raise ValueError(f"{name} would have shape {tuple(new.shape)} in place of {tuple(old.shape)}")
    dims = [d for d in range(old.dim()) if old.shape[d] != new.shape[d]]
    if len(dims) > 1:
        raise ValueError(f"{name} would have shape {tuple(new.shape)} in place of {tuple(old.shape)}")
    return dims[0] if dims else None


def _but(shape: Sequence[int], dim: int) -> list[int]:
    return [n for d, n in enumerate(shape) if d != dim]


def _write(model: torch.nn.Module, made: dict[str, Tensor], out: str, like: str) -> None:
    """With the dtypes of the files, and the tokenizer of `like`."""
    once: dict[int, str] = {}
    for name, t in weights_.saved_tensors(model).items():
        once.setdefault(id(t), name)
    model.to(next(t.dtype for t in made.values() if t.is_floating_point()))
    write_folder(model, {name: made[name] for name in once.values()}, out)
    data.copy_tokenizer(like, out)
