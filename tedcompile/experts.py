"""`tedcompile experts`: checkpoints with other numbers of experts, from folder to folder, one slice in memory.

Which tensors have a dim of experts is not listed: it is where the model of the one configuration and the model of the
other, both without weights, differ in shape.

merge: the experts of two checkpoints and the rows of their routers side by side (aggregation of experts: Kim et al.,
arXiv 2109.10465, section 4). prune: the experts that held-out data use most, in each layer, or random ones. Where a
router chooses groups of experts first (`n_group`), each group gets as many of each checkpoint, or keeps as many.
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
from tedcompile.capture import layer_of
from tedcompile.lazy import Lazy
from tedcompile.load import configuration, from_config, load
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
    number, groups = _number(one.model.config) + _number(other.model.config), _groups(one.model.config)
    if groups != _groups(other.model.config):
        raise ValueError(f"{first} routes in {groups} groups of experts, {second} in {_groups(other.model.config)}")
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
            b = b.to(a.dtype) if b.dtype != a.dtype else b
            pairs = zip(a.chunk(groups, dim), b.chunk(groups, dim), strict=True)
            made[name] = torch.cat([part for pair in pairs for part in pair], dim)
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
    blocks, groups = _blocks(source.model), _groups(config)
    if keep % groups:
        raise ValueError(f"--keep {keep}: {folder} routes in {groups} groups of experts, give a multiple of {groups}")
    if by == "random":
        generator = torch.Generator().manual_seed(seed)
        kept = {path: _best(torch.rand(number, generator=generator), keep, groups) for path in blocks}
        lines = [f"{path}: experts {', '.join(map(str, index.tolist()))}" for path, index in kept.items()]
    elif by == "utilisation":
        if not paths:
            raise ValueError("--by utilisation needs --data, held-out text to count routing on")
        counts = utilisation(folder, paths, batches, seq)
        kept = {path: _best(count, keep, groups) for path, count in counts.items()}
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


TOGETHER = 16  # sequences that go through a layer while it is in memory


@torch.no_grad()
def utilisation(folder: str, paths: Sequence[str], batches: int, seq: int) -> dict[str, Tensor]:
    """Assignments of tokens to experts (E,) of each MoE block, over `batches` sequences of held-out text.

    One layer is in memory at a time: it is read before it is called, and let go after.
    """
    source = _open(folder)
    model, size = source.model.eval(), source.model.get_input_embeddings().num_embeddings
    spec = folder if (Path(folder) / "tokenizer.json").exists() else "bytes"
    with tempfile.TemporaryDirectory() as place:
        file = data.tokenise(data.files(paths), data.tokenizer(spec), Path(place), size)
        sequences = data.Sequences(file, seq)
        if not sequences.count:
            raise ValueError(f"--data: there is less than one sequence of {seq} tokens")
        ids = sequences.read(range(min(batches, sequences.count)))
        del sequences
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    counts = {path: torch.zeros(_number(model.config), dtype=torch.int64) for path in _blocks(model)}
    base, layers, dtype = model.base_model, {layer_of(path) for path in counts}, configuration(folder).dtype
    made = dict(weights_._initialised(model, source.planned.made, 0, device))

    def fill(root: torch.nn.Module, inside: bool) -> list[tuple[dict, str, Tensor]]:
        """Gives the tensors of a module values, those of its layers only where it is `inside` one."""
        filled = []
        for path, module in root.named_modules():
            if not inside and any(f"{names[root]}{path}.".startswith(f"{layer}.") for layer in layers):
                continue
            for slot in (module._parameters, module._buffers):
                for leaf, t in slot.items():
                    if t is None or not t.is_meta:
                        continue
                    value = made[id(t)] if id(t) in made else source.planned.files[id(t)].read().to(device)
                    if isinstance(t, torch.nn.Parameter):
                        value = value.to(dtype or value.dtype)
                        value = torch.nn.Parameter(value, requires_grad=False)
                    filled.append((slot, leaf, t))
                    slot[leaf] = value
        return filled

    def empty(filled: list[tuple[dict, str, Tensor]]) -> None:
        for slot, leaf, t in filled:
            slot[leaf] = t

    def count(path: str, args: tuple, kwargs: dict) -> None:
        index = next(a for a in (*args, *kwargs.values()) if isinstance(a, Tensor) and not a.is_floating_point())
        counts[path] += index.flatten().bincount(minlength=len(counts[path])).cpu()

    names = {module: f"{name}." if name else "" for name, module in model.named_modules()}
    for path in counts:
        experts = model.get_submodule(f"{path}.experts")
        experts.register_forward_pre_hook(lambda m, a, k, path=path: count(path, a, k), with_kwargs=True)
    held: dict[str, list] = {}
    for layer in layers:
        module = model.get_submodule(layer)
        module.register_forward_pre_hook(lambda m, _, layer=layer: held.update({layer: fill(m, True)}))
        module.register_forward_hook(lambda m, _, out, layer=layer: empty(held.pop(layer)))
    fill(base, False)
    for some in ids.split(TOGETHER):
        base(input_ids=some.to(device), use_cache=False)
    return counts


class _Folder:
    """A folder's configuration as a model without weights, and its tensors by the model's names, unread."""

    def __init__(self, model: torch.nn.Module, planned: weights_.Weights, tensors: Mapping[str, Lazy]):
        self.model, self.planned, self.tensors = model, planned, tensors


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
    return _Folder(model, planned, tensors)


def _groups(config: Any) -> int:
    """Groups of neighbouring experts, of which a token's router chooses some first."""
    return getattr(config, "n_group", None) or 1


def _best(scores: Tensor, keep: int, groups: int) -> Tensor:
    """The numbers of the experts with the highest scores (E,), as many in each group."""
    size = len(scores) // groups
    order = scores.view(groups, size).argsort(dim=-1, descending=True, stable=True)[:, : keep // groups]
    return (order + torch.arange(groups)[:, None] * size).flatten().sort().values


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
