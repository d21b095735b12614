"""`verify`: a user's own model, plain against parallel, and what differs, module by module.

What is compared is in `compare`: losses, the gradient of every parameter, parameters after some steps of SGD, and that
replicated values are bit-equal on their ranks. When something differs, the run is repeated with one optimisation less
at a time: the one without which the two agree is named.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from tabulate import tabulate
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves, tree_map

from tedcompile import compare, optim
from tedcompile.api import parallelize
from tedcompile.compare import Reference
from tedcompile.explain import replicated
from tedcompile.mesh import Groups, data_rank, shape_of
from tedcompile.ops import ops
from tedcompile.options import OPTIONAL, Options
from tedcompile.runtime import ParallelModule, Runtime
from tedcompile.traffic import pattern

STEPS, RATE = 2, 0.1
# The least tolerance of gradients and updates, where the model itself is not more sensitive; that of losses is a tenth.
# Another order of summation alone makes a difference of many roundings in fp32; kernels differ more on GPUs
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-5}
ON_GPU = 10
# So many times what the plain model changes by one rounding of its weights. On the way through a layer a value is
# rounded anew where a rank's partial sum, the sum of ranks, an expert's row and the sum of a token's rows are stored
ROUNDINGS = 4
LOST = 0.5  # a lost reduction over two ranks differs by this at least


def verify(
    model: nn.Module,
    mesh: DeviceMesh,
    batch: dict[str, Any] | tuple | Callable[[int], Any],
    *,
    backend: str = "eager",
    steps: int = STEPS,
    tolerance: float | None = None,
    off: Sequence[str] = (),
    plan: Mapping[str, str] | None = None,
    checkpoint: str = "none",
    memory_budget: float | None = None,
    machine: str = "",
    zero: int = 0,
    diagnose: bool = True,
) -> Verification:
    """Trains copies of a model, plain and parallel, on the same batches, and compares them.

    Every rank of the mesh calls it, as `parallelize`; the model stays as it is. The plain one is trained on rank 0,
    which needs memory for several copies of it. Dropout and router jitter are set to 0 in the copies.

    Args:
        model: a plain nn.Module with its values. Rank 0's are used.
        mesh: as for `parallelize`.
        batch: the arguments of this rank's training step (a dict or a tuple), or a function of the step that gives
            them. The tp ranks of one data rank bring the same, the data ranks different ones: with equal batches
            a missing reduction of gradients would not be seen.
        backend, off, plan, checkpoint, memory_budget, machine, zero: as for `parallelize`.
        steps: of SGD, all of whose losses and the sum of whose updates are compared.
        tolerance: of a parameter's gradient and update, the norm of the difference relative to their norm; a tenth of
            it for losses. By default 1e-5 in fp32 (on GPUs 1e-4), and for each parameter four times what one rounding
            of all weights changes in the plain model, where that is more, as it is in bf16 and fp16. fp32 says most:
            the coarser the numbers, the more tokens there are whose experts nearly tie and that choose another one.
        diagnose: where something differs, run again with one optimisation less at a time.

    Returns the same `Verification` on every rank: `.ok`, and as text the table that the command line prints.

    Raises TypeError and ValueError as `parallelize` does, and ValueError for a model that cannot be compared with
    itself: one whose loss is not finite, or another one each time.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if isinstance(model, ParallelModule):
        raise ValueError(f"{type(model).__name__} is parallel already: verify takes the plain model")
    shape_of(mesh)
    if not isinstance(mesh, DeviceMesh):
        raise TypeError(
            "verify needs a torch DeviceMesh (init_device_mesh) on each rank; the command `tedcompile verify` starts "
            "the processes itself"
        )
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if tolerance is not None and not tolerance > 0:
        raise ValueError(f"tolerance must be positive, got {tolerance}")
    wanted: dict[str, Any] = dict(
        off=sorted([off] if isinstance(off, str) else off), plan=dict(plan or {}), checkpoint=checkpoint,
        memory_budget=memory_budget, machine=machine, zero=zero, backend=backend,
    )  # fmt: skip
    Options.of(**{k: v for k, v in wanted.items() if k != "backend"})
    devices = [torch.cuda.current_device()] if mesh.device_type == "cuda" else []
    with torch.random.fork_rng(devices), torch.enable_grad():
        bench = _Bench(model, mesh, batch if callable(batch) else lambda step: batch, steps, tolerance)
        found = bench.attempt(wanted)
        if diagnose and not found.ok:
            found.diagnosis += suspects(wanted, lambda changed: bench.attempt(changed).ok)
    return found


# ---- what was found -------------------------------------------------------------------------------------------------


@dataclass
class Parameter:
    """One parameter. `gradient` and `update`: relative differences, and how large they may be; `drift`: the axis on
    whose ranks it differs."""

    name: str
    shape: list[int]
    local_shape: list[int]
    layout: str
    gradient: float
    update: float
    drift: str
    tolerances: tuple[float, float]

    @property
    def ok(self) -> bool:
        return self.gradient <= self.tolerances[0] and self.update <= self.tolerances[1] and not self.drift


@dataclass
class Verification:
    """What `verify` found. Differences are relative; `wrong` says what is out of tolerance, `diagnosis` what helps.

    `tolerance`: of losses, and the least one of gradients and updates.

    `loss`: the largest difference of a loss of any step and data rank; `losses`: the plain and the parallel one of each
    step, the mean over data ranks; `drift`: buffers that differ between ranks, by axis; `parts`: how experts and
    attention are split; `whole`: what stayed replicated, and why.
    """

    model: str
    mesh: dict[str, int]
    device: str
    dtype: str
    options: dict[str, Any]
    tolerance: tuple[float, float]
    loss: float
    losses: list[tuple[float, float]]
    parameters: list[Parameter]
    drift: dict[str, str]
    parts: list[tuple[str, str]]
    whole: list[dict[str, str]]
    notes: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    diagnosis: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.wrong

    def as_dict(self) -> dict[str, Any]:
        """For JSON, which has no infinity: a number that is not finite is the text "inf"."""
        found = {"ok": self.ok, **dataclasses.asdict(self)}
        return tree_map(lambda x: "inf" if isinstance(x, float) and not math.isfinite(x) else x, found)

    def table(self, module: str = "") -> str:
        """A row for each kind of module; for "all", or a path (`model.layers.1.mlp`), for each parameter."""
        chosen = [p for p in self.parameters if module in ("", "all") or f"{p.name}.".startswith(f"{module}.")]
        if not chosen:
            tops = ", ".join(dict.fromkeys(_block(p.name)[0] for p in self.parameters))
            raise ValueError(f"no parameter is in a module {module!r}: give all, or a path below {tops}")
        groups: dict[str, list[Parameter]] = {}
        for p in chosen:
            groups.setdefault(p.name if module else _block(p.name)[0], []).append(p)
        rows = []
        for name, group in groups.items():
            gradient, update = (max(group, key=lambda p: getattr(p, what)) for what in ("gradient", "update"))
            drifts = sorted({p.drift for p in group if p.drift})
            rows.append(
                [
                    name,
                    _number(gradient.gradient),
                    *([] if module else [_block(gradient.name)[1]]),
                    _number(update.update),
                    f"not over {', '.join(drifts)}" if drifts else "yes" if _replicated(group, self.mesh) else "-",
                    _layouts(group),
                    "" if all(p.ok for p in group) else "DIFFERS",
                ]
            )
        headers = ["parameter" if module else "module", "gradient", *([] if module else ["worst in"]), "update",
                   "copies equal", "layout", ""]  # fmt: skip
        return tabulate(rows, headers, tablefmt="simple", disable_numparse=True).rstrip()

    def text(self, module: str = "") -> str:
        mesh = ", ".join(f"{axis}={size}" for axis, size in self.mesh.items())
        given = [f"{k} {v}" for k, v in self.options.items() if v and v not in ("none", "eager") and k != "backend"]
        steps = " ".join(f"{plain:.6g}/{parallel:.6g}" for plain, parallel in self.losses)
        lines = [
            f"{self.model} on {mesh}: {self.device}, {self.dtype}, {', '.join([self.options['backend'], *given])}",
            *self.notes,
            "",
            f"loss, plain/parallel: {steps}; largest difference {_number(self.loss)}"
            + ("  DIFFERS" if self.loss > self.tolerance[0] else ""),
            "",
            self.table(module),
            "",
            *(f"{what}: {how}" for what, how in self.parts),
            *(f"whole: {r['module']}: {r['reason']}" for r in self.whole),
            "",
        ]
        if self.ok:
            gradient, update = (max(getattr(p, what) for p in self.parameters) for what in ("gradient", "update"))
            limits = [limit for p in self.parameters for limit in p.tolerances]
            span = f"{min(limits):.0e}" + (f" to {max(limits):.0e}, by parameter" if max(limits) > min(limits) else "")
            lines.append(
                f"AGREES: losses differ by {_number(self.loss)} (tolerance {self.tolerance[0]:.0e}), gradients by "
                f"{_number(gradient)} and updates by {_number(update)} (tolerance {span})"
            )
        else:
            rest = f"; and {len(self.wrong) - 3} more" if len(self.wrong) > 3 else ""
            lines += [f"DIFFERS: {'; '.join(self.wrong[:3])}{rest}", *self.diagnosis]
        return "\n".join(lines) + "\n"

    def __str__(self) -> str:
        return self.text()


def _number(x: float) -> str:
    return f"{x:.1e}" if x else "0"


def _block(name: str) -> tuple[str, str]:
    """`model.layers.3.mlp.gate.weight` to (`model.layers.*.mlp`, `gate.weight, layer 3`)."""
    words = name.split(".")
    at = next((i for i, word in enumerate(words) if word.isdigit()), None)
    if at is None:
        return ".".join(words[:-1]) or name, words[-1]
    end = min(at + 2, len(words) - 1)
    return ".".join([*words[:at], "*", *words[at + 1 : end]]), f"{'.'.join(words[end:])}, layer {words[at]}"


def _replicated(group: Iterable[Parameter], mesh: Mapping[str, int]) -> bool:
    """Whether any of them has copies."""
    return any(size > 1 and f"{axis}: " not in p.layout for p in group for axis, size in mesh.items())


def _layouts(group: Sequence[Parameter]) -> str:
    """One layout where all have the same, else the parameters of each."""
    found: dict[str, list[str]] = {}
    for p in group:
        found.setdefault(p.layout, []).append(re.sub(r", layer .*", "", _block(p.name)[1]))
    if len(found) == 1:
        return next(iter(found))
    whole = list(dict.fromkeys(found.pop("replicated", [])))
    axes = " and ".join(a for a in ("dp", "ep", "tp") if any(f"{a}: " in layout for layout in found))
    kinds = {re.sub(r"(^|\.)\d+(?=\.)", r"\1*", leaf) for leaves in found.values() for leaf in leaves}
    return f"split over {axes}" + (f", not {', '.join(whole)}" if len(whole) < 4 else f", {len(kinds)} of them") * bool(
        whole
    )


# ---- running --------------------------------------------------------------------------------------------------------


class _Bench:
    """The plain model's numbers, on rank 0, and attempts of the parallel one."""

    def __init__(self, model: nn.Module, mesh: DeviceMesh, batch: Callable[[int], Any], steps: int, tolerance: Any):
        self.mesh, self.groups, self.steps = mesh, Groups.of(mesh), steps
        host = self.groups.host
        self.first = host is None or dist.get_rank(host) == 0
        self.ranks = Runtime(self.groups, "eager", (), Options())
        self.model, self.notes, self.batches = self.ranks.together(lambda: self._copies(model, batch))
        floating = [p.dtype for p in self.model.parameters() if p.is_floating_point()]
        self.dtype = max(floating, key=lambda dtype: torch.finfo(dtype).eps)  # the coarsest
        factor = ON_GPU if mesh.device_type == "cuda" else 1
        least = max(TOLERANCES.get(self.dtype, 0.0), ROUNDINGS * torch.finfo(self.dtype).eps / 2)
        self.given, self.tolerance = tolerance is not None, tolerance or factor * least
        brought = dict(self._everyone((data_rank(mesh), self.batches)))
        found = self.ranks.together(lambda: self._plain(brought) if self.first else None)
        self.reference: Reference | None = found[0] if found else None
        self.loss_tolerance, self.limits = found[1] if found else (0.0, {})
        self.notes += found[2] if found else []

    def _copies(self, model: nn.Module, batch: Callable[[int], Any]) -> tuple[nn.Module, list[str], list[Any]]:
        batches = [tree_map(_on_host, batch(step)) for step in range(self.steps)]
        for what in (*model.parameters(), *model.buffers(), *filter(torch.is_tensor, tree_leaves(batches))):
            if what.is_meta:
                raise ValueError("verify needs values: the model or its batch is on the meta device")
        if not any(True for _ in model.parameters()):
            raise ValueError(f"{type(model).__name__} has no parameters")
        model = copy.deepcopy(model).train()
        for p in model.parameters():
            p.grad = None
        off = silence(model)
        return model, [f"set to 0 in both: {', '.join(off)}"] if off else [], batches

    def _everyone(self, value: Any) -> list[Any]:
        host = self.groups.host
        if host is None:
            return [value]
        values: list[Any] = [None] * dist.get_world_size(host)
        dist.all_gather_object(values, value, group=host)
        return values

    def _plain(self, brought: dict[int, list[Any]]) -> tuple[Reference, tuple[float, dict], list[str]]:
        device = self.groups.device
        model = copy.deepcopy(self.model).to(device)

        def batch(rank: int, step: int) -> Any:
            return tree_map(lambda x: x.to(device) if isinstance(x, torch.Tensor) else x, brought[rank][step])

        notes = self._repeats(model, batch(0, 0))
        equal = [r for r in range(1, len(brought)) if _same(brought[r], brought[0])]
        if equal:
            notes.append(
                f"data ranks 0 and {equal[0]} bring equal batches: a missing reduction of gradients would not be seen"
            )
        reference = compare.train_plain(model, batch, len(brought), self.steps, RATE)
        losses = torch.stack([loss for step in reference.losses for loss in step])
        if not losses.isfinite().all():
            raise ValueError(
                f"the plain model's loss is {losses[~losses.isfinite()][0]}: there is nothing to compare with"
                + (", its numbers overflow in fp16" if self.dtype is torch.float16 else "")
            )
        limits, more = self._limits(batch, len(brought), reference)
        return reference, limits, notes + more

    def _limits(
        self, batch: compare.Batches, data_world: int, of: Reference
    ) -> tuple[tuple[float, dict[str, tuple[float, float]]], list[str]]:
        """The tolerance of losses, and those of each parameter's gradient and update."""
        if self.given:
            return (self.tolerance / 10, dict.fromkeys(of.initial, (self.tolerance,) * 2)), []
        model = copy.deepcopy(self.model).to(self.groups.device)
        own = compare.sensitivity(model, batch, data_world, self.steps, RATE, of, self.tolerance)
        limit = lambda error: max(self.tolerance, ROUNDINGS * error)  # noqa: E731
        limits = {n: (limit(own.gradients[n]), limit(own.updates[n])) for n in of.initial}
        blind = [n for n, pair in limits.items() if max(pair) >= LOST]
        notes = []
        if blind:
            notes.append(
                f"one rounding of the weights changes the gradients or updates of {len(blind)} of {len(limits)} "
                f"parameters so much ({blind[0]}) that a lost reduction would not be seen there: try a finer dtype"
            )
        return (max(self.tolerance / 10, ROUNDINGS * own.loss), limits), notes

    def _repeats(self, model: nn.Module, batch: Any) -> list[str]:
        """The same step twice, from the same buffers: a model that draws random numbers differs from itself."""
        buffers = {n: b.clone() for n, b in model.named_buffers()}
        losses, gradients = [], []
        for _ in range(2):
            output = compare.call(model, batch)
            losses.append(compare.losses_of(output))
            compare.loss_of(output).backward()
            gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
            model.zero_grad(set_to_none=True)
            with torch.no_grad():
                for n, b in model.named_buffers():
                    b.copy_(buffers[n])
        if not gradients[0]:
            raise ValueError(f"{type(model).__name__} has no parameter that its loss gives a gradient")
        if not losses[0].isfinite().all():
            return []  # reported with all losses
        loss = compare.loss_difference(losses[1], losses[0])
        errors = compare.differences(gradients[1], gradients[0])
        name = max(errors, key=errors.__getitem__)
        if loss > self.tolerance / 10 or errors[name] > self.tolerance:
            what = f"loss {losses[0][0]:.8g}, then {losses[1][0]:.8g}" if loss else f"the gradient of {name} differs"
            raise ValueError(
                f"the plain model is not deterministic, on the same batch it gives other numbers ({what}): it draws "
                "random numbers in training, or a kernel sums in any order; nothing can be compared with it"
            )
        if loss or errors[name]:
            return [f"the plain model differs from itself by {loss:.1e} (loss) and {errors[name]:.1e} ({name})"]
        return []

    def attempt(self, wanted: dict[str, Any]) -> Verification:
        """Trains the parallel model with these options of `parallelize`."""
        model: Any = copy.deepcopy(self.model)
        parallelize(model, self.mesh, example_inputs=self.batches[0], **wanted)
        parts, whole = _parts(model)
        names = [n for n, _ in model.named_parameters()]
        start = self._whole((n, p) for n, p in model.named_parameters())
        parameters = list(model.parameters())
        sgd = (
            optim.Tiled(parameters, optim.rules.sgd, lr=RATE)
            if wanted["zero"]
            else torch.optim.SGD(parameters, lr=RATE)
        )
        losses, gradients = [], {}
        for step in range(self.steps):
            output = compare.call(model, self.batches[step])
            losses.append(compare.losses_of(output))
            compare.loss_of(output).backward()
            if step == 0:
                without = [n for n, p in model.named_parameters() if p.grad is None]
                self.ranks.compare("parameters without a gradient", repr(without))
                gradients = self._whole((n, p.grad) for n, p in model.named_parameters() if p.grad is not None)
            sgd.step()
            sgd.zero_grad()
        end = self._whole((n, p) for n, p in model.named_parameters())
        facts = [_facts(n, p) for n, p in model.named_parameters()]
        drift = compare.drifted(model, self.mesh)
        every = self._everyone((data_rank(self.mesh), losses, drift))
        drift = {n: axis for _, _, found in every for n, axis in found.items()}
        work = lambda: self._compare(names, start, gradients, end, every)  # noqa: E731
        loss, pairs, errors, wrong, hints = self.ranks.together(lambda: work() if self.first else (0.0, [], {}, [], []))
        wrong += [f"{name} is not bit-equal among {axis} ranks" for name, axis in drift.items()]
        found = Verification(
            model=type(self.model).__name__,
            mesh=self.groups.shape.as_dict(),
            device=str(self.groups.device.type),
            dtype=str(self.dtype).removeprefix("torch."),
            options=wanted,
            tolerance=(self.loss_tolerance, self.tolerance),
            loss=loss,
            losses=pairs,
            parameters=[
                Parameter(*f, *errors.get(f[0], (math.inf, math.inf)), drift.get(f[0], ""), self._limit(f[0]))  # type: ignore[call-arg]
                for f in facts
            ],
            drift={n: axis for n, axis in drift.items() if n not in names},
            parts=parts,
            whole=whole,
            notes=self.notes,
            wrong=wrong,
            diagnosis=hints,
        )
        shared = [found]
        if self.groups.host is not None:
            dist.broadcast_object_list(shared, group_src=0, group=self.groups.host)
        return shared[0]

    def _limit(self, name: str) -> tuple[float, float]:
        return self.limits.get(name, (self.tolerance, self.tolerance))

    def _whole(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """All ranks gather them, only the first one keeps them."""
        kept = {}
        for name, t in tensors:
            whole = compare.full(t)
            if self.first:
                kept[name] = whole
        return kept

    def _compare(self, names: list[str], start: dict, gradients: dict, end: dict, every: list) -> tuple:
        reference, wrong = self.reference, []
        assert reference is not None
        if odd := sorted(set(names) ^ reference.initial.keys()):
            wrong.append(f"parameters that only one of the two models has: {', '.join(odd)}")
        if odd := [n for n in start if n in reference.initial and not start[n].equal(reference.initial[n])]:
            wrong.append(f"other values than the plain model's right after parallelize: {', '.join(odd)}")
        by_step = [
            max(compare.loss_difference(losses[step], reference.losses[step][rank]) for rank, losses, _ in every)
            for step in range(self.steps)
        ]
        loss = max(by_step)
        wrong += [
            f"the loss of step {step + 1} differs by {error:.1e}"
            for step, error in enumerate(by_step)
            if error > self.loss_tolerance
        ][:1]
        data = {rank: losses for rank, losses, _ in every}
        pairs = []
        for step in range(self.steps):
            plain = torch.stack([loss[0] for loss in reference.losses[step]]).mean()
            pairs.append((plain.item(), torch.stack([losses[step][0] for losses in data.values()]).mean().item()))
        updates = {n: end[n] - start[n] for n in end}
        by_gradient = compare.differences(gradients, reference.gradients)
        by_update = compare.differences(updates, reference.updates, reference.initial, self.steps, self.tolerance)
        for i, (what, errors) in enumerate((("gradient", by_gradient), ("update", by_update))):
            for name, error in sorted(errors.items(), key=lambda item: -item[1] / self._limit(item[0])[i]):
                if error > self._limit(name)[i]:
                    wrong.append(f"the {what} of {name} differs by {error:.1e}")
        hints = []
        if by_step[0] > self.loss_tolerance:
            hints.append("The first loss differs already: the forward computes something else.")
        elif any(error > self._limit(name)[0] for name, error in by_gradient.items()):
            hints.append(
                "The first losses agree: the forward is right, and the backward or the reduction of gradients is not."
            )
        return loss, pairs, {n: (by_gradient[n], by_update[n]) for n in by_gradient}, wrong, hints


def _on_host(value: Any) -> Any:
    return value.detach().cpu() if isinstance(value, torch.Tensor) and not value.is_meta else value


def _same(a: Any, b: Any) -> bool:
    pairs = zip(tree_leaves(a), tree_leaves(b), strict=True)
    return all(x.equal(y) if isinstance(x, torch.Tensor) else x == y for x, y in pairs)


def silence(model: nn.Module) -> list[str]:
    """Sets dropout and router jitter to 0, in place; what was set, as `attention_dropout 0.1 of model.layers.*`."""
    found: dict[str, None] = {}
    owners: list[tuple[str, Any]] = list(model.named_modules())
    configs = {id(m.config): (type(m.config).__name__, m.config) for _, m in owners if hasattr(m, "config")}
    for path, owner in (*owners, *configs.values()):
        random = isinstance(owner, nn.modules.dropout._DropoutNd)
        for name, value in list(vars(owner).items()):
            if isinstance(value, float) and value > 0 and (random and name == "p" or re.search("drop|jitter", name)):
                setattr(owner, name, 0.0)
                found[f"{'dropout' if random else name} {value:g} of {pattern(path) or type(owner).__name__}"] = None
    return list(found)


def _facts(name: str, parameter: torch.Tensor) -> tuple[str, list[int], list[int], str]:
    """Name, shape, local shape and layout of a parameter."""
    texts = []
    if isinstance(parameter, DTensor):
        axes = parameter.device_mesh.mesh_dim_names or ()
        for axis, placement in zip(axes, parameter.placements, strict=True):
            if not placement.is_replicate():
                parts = getattr(placement, "split_factor", 1)
                texts.append(f"{axis}: Shard({placement.dim})" + (f" of {parts} sections" if parts > 1 else ""))
    return name, list(parameter.shape), list(compare.local(parameter).shape), ", ".join(texts) or "replicated"


def _parts(model: Any) -> tuple[list[tuple[str, str]], list[dict[str, str]]]:
    """How experts and attention are split, and what stayed whole for which reason."""
    (_, ctx, gm, _), *_ = model._ted.ready.values()
    experts, todo = set(), [n.args[1] for n in gm.graph.nodes if n.target is ops.grouped_mm.default]
    seen = set(todo)
    while todo:
        node = todo.pop()
        if node.op == "placeholder":
            experts.add(node.meta["role"][1])
        fresh = [a for a in node.all_input_nodes if a not in seen]
        seen.update(fresh)
        todo += fresh
    parameters = dict(model.named_parameters(remove_duplicate=False))
    experts |= {n for n, p in parameters.items() if "ep: " in _facts(n, p)[3]}
    paths = [path for path, m in model.named_modules() if path and "attention" in type(m).__name__.lower()]
    attention = {n for n in parameters if any(n.startswith(f"{path}.") for path in paths)}
    found = []
    for what, names in (("experts", experts), ("attention", attention - experts)):
        kinds: dict[str, set[str]] = {}
        for name in sorted(names & parameters.keys()):
            texts = re.findall(r"(\w+): ", _facts(name, parameters[name])[3])
            kinds.setdefault(_block(name)[0], set()).update(texts)
        for module, axes in kinds.items():
            order = [a for a in ("dp", "ep", "tp") if a in axes]
            found.append((what, f"{module} split over {' and '.join(order)}" if order else f"{module} whole"))
    if not experts:
        found.insert(0, ("experts", "none recognised"))
    return found, replicated(ctx.replicated)


# ---- where it comes from --------------------------------------------------------------------------------------------


def suspects(wanted: dict[str, Any], agrees: Callable[[dict[str, Any]], bool]) -> Iterator[str]:
    """Runs again with one optimisation or option less at a time; what makes the two agree, in sentences."""
    trials: list[tuple[str, dict[str, Any]]] = []
    if wanted["backend"] != "eager":
        trials.append(('uncompiled (backend="eager")', dict(backend="eager")))
    if wanted["zero"]:
        trials.append(("without ZeRO (zero=0)", dict(zero=0)))
    if wanted["checkpoint"] != "none":
        trials.append(('without checkpointing (checkpoint="none")', dict(checkpoint="none", memory_budget=None)))
    unused = [] if wanted["checkpoint"] != "none" else ["save_collectives"]
    unused += [] if torch.cuda.is_available() else ["fuse_experts", "cuda_graphs"]
    passes = [p for p in OPTIONAL if p not in wanted["off"] and p not in unused]
    trials += [(f"without {p} (off={p})", dict(off=[*wanted["off"], p])) for p in passes]
    if not wanted["plan"]:
        trials.append(
            ("with experts split over tp (plan experts=tensor, dispatch=all_to_all)",
             dict(plan=dict(experts="tensor", dispatch="all_to_all")))
        )  # fmt: skip
    good = []
    for text, changes in trials:
        with contextlib.suppress(ValueError):  # an option that these cannot do without
            if agrees(wanted | changes):
                good.append(text)
    if good:
        yield f"They agree {', and '.join(good)}: look there first, or go on without it."
    else:
        yield f"They differ as well {', '.join(text for text, _ in trials)}: it is in none of these."
