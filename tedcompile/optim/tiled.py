"""`Tiled`: a torch.optim.Optimizer that runs any update rule, tile by tile over flat memory, as one compiled kernel.

A step makes its numbers in one small kernel, and runs the rule's kernel over each bucket: a handful of launches,
whatever the number of tensors. The norm for clipping and for inf and nan takes one more look at the gradients, or none
(`norm="backward"`).
Nothing waits for the device, unless offloaded state is updated on the host: a skipped step is a flag that the kernels
read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from operator import attrgetter, is_
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from tedcompile import compat
from tedcompile.mesh import Groups
from tedcompile.optim import rules, tiles
from tedcompile.optim.flat import VERSION, Bucket, Slot, copies, scattered, share
from tedcompile.optim.offload import Array, Stager, choose
from tedcompile.optim.tiles import BLOCK, LAUNCH

GRAD = attrgetter("grad")
LONG = 8  # tiles that travel as one where they are gathered in place: no more memory, and a link's full speed
CHOICES = {"master": ("fp32", "split"), "moments": ("fp32", "bf16", "int8"), "offload": (None, "cpu")}
CHOICES |= {"update_on": ("auto", "device", "host"), "norm": ("step", "backward")}


@dataclass(eq=False)
class Clock:
    """The steps that some parameters of a group have taken, and the numbers of the next one."""

    step: Tensor  # 0-d fp64
    scalars: Tensor  # (n,) fp64


@dataclass(eq=False)
class Kept:
    """A bucket with what is kept of its parameters: the master's array, then those of the states in order."""

    bucket: Bucket
    arrays: list[Tensor]
    runs: list[tuple[int, int, int]]  # (start, stop, clock) in rows of the bucket


class Tiled(torch.optim.Optimizer):
    """Any rule of `tedcompile.optim.rules`, or one's own.

    Args:
        params: parameters, (name, parameter) pairs or param groups, as for any torch optimizer; plain tensors or the
            DTensors of `parallelize`. They become views of flat memory, as do their gradients, and stay what they are
            otherwise: load values by `copy_`, do not assign `.data`.
        rule: the update.
        tile_bytes: the size of a tile where tiles are gathered (ZeRO) or staged (offload): a step needs at most two.
            Where NCCL gathers in place (ZeRO-1), `LONG` of them travel as one, and need no memory.
        offload: "cpu" keeps master weights and moments in host memory.
        update_on: where offloaded state is updated: on the "device", through which it streams, on the "host", to which
            gradients go and from which parameters come, or where rates measured at the start say that it takes less
            time ("auto"). The two round alike, not bit by bit.
        master: beside bf16 and fp16 parameters, fp32 weights ("fp32"), or for bf16 the 16 bits that they lack
            ("split", as exact, 2 bytes a parameter less).
        moments: how states are stored: "fp32", "bf16" or "int8" (block-wise).
        max_grad_norm: clips the norm of all gradients, over the whole mesh, as torch.nn.utils.clip_grad_norm_ does.
        check_finite: leaves out a step whose gradients have an inf or nan, on all ranks (`skipped` counts them).
        norm: where the norm for clipping and for the check comes from: the "step" reads the gradients once more, or the
            "backward" of a parallel model leaves it with the gradients (on GPUs). The latter is for loops in which
            nothing else writes gradients: no clip_grad_norm_, GradScaler or hand-made change comes after the backward.
        **numbers: defaults of the rule's numbers (lr, ...), which param groups may override.

    `grad_norm`: of the last step, before clipping, a 0-d fp64 tensor; nan when it was not computed.
    """

    def __init__(
        self,
        params: Iterable,
        rule: rules.Rule,
        *,
        tile_bytes: int = 64 << 20,
        offload: str | None = None,
        update_on: str = "auto",
        master: str = "fp32",
        moments: str = "fp32",
        max_grad_norm: float | None = None,
        check_finite: bool = True,
        norm: str = "step",
        **numbers: Any,
    ):
        chosen = dict(offload=offload, update_on=update_on, master=master, moments=moments, norm=norm)
        for name, value in chosen.items():
            if value not in CHOICES[name]:
                raise ValueError(f"{name} cannot be {value!r}; choose {' or '.join(map(repr, CHOICES[name]))}")
        for name in numbers.keys() - rule.defaults.keys():
            raise TypeError(f"the rule has no {name!r}; it has {', '.join(rule.defaults)}")
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"max_grad_norm must be positive, got {max_grad_norm}")
        if tile_bytes < 1 << 16:
            raise ValueError(f"tile_bytes must be at least {1 << 16}, got {tile_bytes}")
        self.rule, self.tile_bytes, self.offload, self.norm = rule, tile_bytes, offload, norm
        self.master, self.moments, self.check_finite = master, moments, check_finite
        self.kept: list[Kept] = []
        self.clocks: list[list[Clock]] = []
        self._built: set[Tensor] = set()
        self._hyper: list[tuple[tuple, Tensor]] = []
        super().__init__(params, {**rule.defaults, **numbers})
        self.device = compat.local_tensor(self.param_groups[0]["params"][0]).device
        self._largest = self._number(math.inf if max_grad_norm is None else max_grad_norm)
        self._check = check_finite or max_grad_norm is not None
        self._skipped, self._zero = self._number(0.0), self._number(0.0)
        self.grad_norm = self._number(math.nan)
        self.on_host = bool(offload) and self._on_host(update_on)
        self._stager = Stager(self.device, tile_bytes, self.on_host) if offload else None
        self._prepare, self._names = tiles.prepare_kernel(rule, self.device)
        for number in range(len(self.param_groups)):
            self._build(number)

    @property
    def skipped(self) -> int:
        """How many steps were left out for an inf or nan. Waits for the device."""
        return int(self._skipped.item())

    def set_skipped(self, steps: int) -> None:
        self._skipped.fill_(steps)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        if hasattr(self, "device"):
            self._build(len(self.param_groups) - 1)

    # ---- flat memory

    def _on_host(self, update_on: str) -> bool:
        """Where offloaded state is updated: the same on all ranks, for the two kernels round differently."""
        if update_on != "auto":
            return update_on == "host"
        first = self.param_groups[0]["params"][0]
        dtype = compat.local_tensor(first).dtype
        mesh: Any = getattr(first, "device_mesh", None)
        state = sum(d.itemsize * c / BLOCK for d, c in tiles.master_storage(self.master, dtype))
        state += sum(stored.row_bytes / BLOCK for stored in self._storages(dtype).values())
        votes = self._number(float(choose(self.device, state, 2 * dtype.itemsize)))
        for axis in range(mesh.ndim if mesh is not None else 0):
            if mesh.size(axis) > 1:
                dist.all_reduce(votes, op=dist.ReduceOp.MIN, group=Groups.along(mesh, axis))
        return bool(votes)

    def _number(self, value: float) -> Tensor:
        return torch.full((), value, dtype=torch.float64, device=self.device)

    def _build(self, number: int) -> None:
        """Buckets for the parameters of a group that learn and are in none yet."""
        group = self.param_groups[number]
        names = group.get("param_names") or [share(p).name for p in group["params"]]
        if any(names):
            group["param_names"] = names
        while len(self.clocks) <= number:
            self.clocks.append([])
            self._hyper.append(((), torch.empty(0)))
        kinds: dict[tuple, list[tuple[Tensor, str]]] = {}
        for p, name in zip(group["params"], names, strict=True):
            self.state.setdefault(p, {})  # for tools that ask whether there is state
            if p in self._built or not p.requires_grad:
                continue
            local = compat.local_tensor(p)
            if local.device != self.device or not local.is_floating_point():
                raise ValueError(
                    f"parameter {name or tuple(p.shape)} is {local.dtype} on {local.device}: all must be floating "
                    f"point and on {self.device}, where the first one is"
                )
            if self.master == "split" and local.dtype == torch.float16:
                raise ValueError(f'parameter {name or tuple(p.shape)} is fp16: master="split" needs bf16 (or fp32)')
            kinds.setdefault((local.dtype, copies(p)[0]), []).append((p, name))
            self._built.add(p)
        clock, old = self._clock(number) if kinds else 0, len(self.kept)
        for (dtype, _), members in kinds.items():
            kept = list(tiles.master_storage(self.master, dtype))
            storages = self._storages(dtype)
            arrays = kept + [array for s in storages.values() for array in s.arrays]
            group_ = copies(members[0][0])[1]
            row = dtype.itemsize * BLOCK
            if self.offload:  # what is streamed: the state, or to the host gradient and parameter
                row = max(row * (2 if self.on_host else 1), sum(d.itemsize * c for d, c in arrays))
            limit = LAUNCH
            if self.offload or group_:
                in_place = group_ and self.device.type == "cuda" and not (self.offload or scattered(members[0][0]))
                tile = self.tile_bytes * (LONG if in_place else 1)
                limit = tile // row // (dist.get_world_size(group_) if group_ else 1)
                limit = max(limit // 4 * 4, 4)  # one number a row, of 4 bytes, starts on 16 too
            bucket = Bucket(number, [p for p, _ in members], [n for _, n in members], limit)
            where = "cpu" if self.offload else self.device
            pin = bool(self.offload) and self.device.type == "cuda"
            made = [torch.zeros(bucket.own, c, dtype=d, device=where, pin_memory=pin) for d, c in arrays]
            for slot in bucket.slots:
                slot.clock = clock
                if slot.param.grad is None:
                    slot.param.grad = slot.grad
            self.kept.append(Kept(bucket, made, []))
            self._refresh(self.kept[-1], everything=True)
        self._active: tuple[bool, ...] = ()
        self._all = False
        self._remember()
        for new in self.kept[old:]:
            new.bucket.settled()

    def _storages(self, dtype: torch.dtype) -> dict[str, tiles.Storage]:
        return {n: tiles.storage(self.moments, kind, dtype) for n, kind in self.rule.states.items()}

    def _clock(self, number: int, step: Tensor | None = None) -> int:
        scalars = torch.zeros(len(self._names), dtype=torch.float64, device=self.device)
        self.clocks[number].append(Clock(self._number(0.0) if step is None else step.clone(), scalars))
        return len(self.clocks[number]) - 1

    def _slots(self) -> Iterator[tuple[Kept, Slot]]:
        for kept in self.kept:
            for slot in kept.bucket.slots:
                yield kept, slot

    def _remember(self) -> None:
        """What tells whether anything but gradients has changed since."""
        slots = [slot for _, slot in self._slots()]
        self._params, self._grads = [s.param for s in slots], [s.grad for s in slots]
        self._frozen = [p for g in self.param_groups for p in g["params"] if p not in self._built]
        self._versions = sum(map(VERSION, self._params))

    @torch.no_grad()
    def _refresh(self, kept: Kept, everything: bool = False) -> None:
        """Master weights follow parameters that somebody else has written."""
        bucket = kept.bucket
        bucket.read()
        masters = tiles.master_storage(self.master, bucket.dtype)
        for start, rows, own in self._chunks(kept) if masters else ():
            param, array = bucket.param[start : start + rows], kept.arrays[0][own : own + rows]
            stored = array.to(param.device, copy=False)
            value = param.to(torch.float32)
            if not everything:
                old = tiles.join(param, [stored])
                value = torch.where(tiles.part(old, param.dtype, [stored.dtype])[0] == param, old, value)
            array.copy_(tiles.part(value, param.dtype, [stored.dtype])[1])

    # ---- gradients

    def _collect(self) -> None:
        """Gradients are in flat memory, and each parameter that has one is on a clock that will run."""
        thawed = any(p.grad is not None for p in self._frozen)
        if self._all and not thawed and all(map(is_, map(GRAD, self._params), self._grads)):
            return
        for number in range(len(self.param_groups)) if thawed else ():
            self._build(number)
        active, sources, targets = [], [], []
        for _, slot in self._slots():
            grad, mine = slot.param.grad, slot.grad
            if grad is None:
                compat.local_tensor(mine).zero_()
            elif grad is not mine:
                source, target = compat.local_tensor(grad), compat.local_tensor(mine)
                if isinstance(grad, DTensor) and grad.placements != mine.placements:
                    source = grad.redistribute(mine.device_mesh, mine.placements).to_local()
                if source is not target:
                    sources.append(source)
                    targets.append(target)
                slot.param.grad = mine
                slot.touched = True
            slot.touched = slot.touched or mine._version > 0
            active.append(grad is not None and slot.touched)
        compat.foreach_copy(targets, sources)
        if tuple(active) != self._active:
            self._active, self._all = tuple(active), all(active)
            self._set_clocks()

    def _set_clocks(self) -> None:
        """Parameters without a gradient stay behind, as in torch: their clock is another one from now on."""
        moving: dict[tuple[int, int], list[tuple[Slot, bool]]] = {}
        for (kept, slot), on in zip(self._slots(), self._active, strict=True):
            moving.setdefault((kept.bucket.group_number, slot.clock), []).append((slot, on))
        for (number, clock), members in moving.items():
            if len({on for _, on in members}) == 2:
                other = self._clock(number, self.clocks[number][clock].step)
                for slot, on in members:
                    slot.clock = slot.clock if on else other
        self._running = {(kept.bucket.group_number, slot.clock) for (kept, slot), on in
                         zip(self._slots(), self._active, strict=True) if on}  # fmt: skip
        learns = iter(self._active)
        for kept in self.kept:
            kept.runs = []
            for slot in kept.bucket.slots:
                if next(learns):
                    last = kept.runs[-1] if kept.runs else None
                    if last and last[1:] == (slot.start, slot.clock):
                        kept.runs[-1] = (last[0], slot.stop, slot.clock)
                    else:
                        kept.runs.append((slot.start, slot.stop, slot.clock))

    def _squares(self) -> Tensor:
        """The sum of squares of all gradients, each element of the whole mesh counted once."""
        totals: dict[Any, Tensor] = {}
        for kept in self.kept:
            mesh, found = kept.bucket.mesh, kept.bucket.squares(self.norm == "backward")
            totals[mesh] = found + totals[mesh] if mesh in totals else found
        for mesh, total in totals.items():
            for axis in range(mesh.ndim if mesh is not None else 0):
                if mesh.size(axis) > 1:
                    dist.all_reduce(total, group=Groups.along(mesh, axis))
        return sum(totals.values(), self._number(0.0))

    def zero_grad(self, set_to_none: bool = False) -> None:
        """Zeroes gradients in one write a bucket; they stay views of flat memory.

        `set_to_none`: `p.grad` is None until a backward has written, not added, its gradients to the same memory.
        """
        for kept in self.kept:
            kept.bucket.forget() if set_to_none else kept.bucket.zero()
        if set_to_none:
            for p in self._params:
                p.grad = None
        elif not all(map(is_, map(GRAD, self._params), self._grads)):
            for _, slot in self._slots():
                if slot.param.grad is not None:
                    slot.param.grad = slot.grad

    # ---- the step

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One update. `closure`, when given, is called once, first, with gradients enabled; its result is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._collect()
        if sum(map(VERSION, self._params)) != self._versions:
            for kept in self.kept:
                self._refresh(kept)
            self._remember()
        squares = self._zero
        if self._check:
            squares = self._squares()
            self.grad_norm = squares.sqrt()
            self._skipped += squares.isfinite().logical_not()
        for number, clocks in enumerate(self.clocks):
            for i, clock in enumerate(clocks):
                if (number, i) in self._running:
                    self._prepare([squares, self._numbers(number), self._largest, clock.step, clock.scalars])
        for kept in self.kept:
            self._update(kept)
        return loss

    def _numbers(self, number: int) -> Tensor:
        """The numbers of a param group on the device, written when they change."""
        found: list[float] = []
        for name in self.rule.defaults:
            value = self.param_groups[number][name]
            found += map(float, value) if isinstance(value, (tuple, list)) else [float(value)]
        if self._hyper[number][0] != tuple(found):
            made = torch.tensor(found, dtype=torch.float64, device=self.device)
            self._hyper[number] = (tuple(found), made)
        return self._hyper[number][1]

    def _update(self, kept: Kept) -> None:
        bucket = kept.bucket
        where = torch.device("cpu") if self.on_host else self.device
        kernel = tiles.update_kernel(self.rule, self._names, self.master, self.moments, bucket.dtype, where)
        scalars = [clock.scalars.to(where) for clock in self.clocks[bucket.group_number]]
        parts = list(bucket.tiles())
        transfers: list[Callable[[], None]] = []

        def send(start: int, rows: int) -> None:
            transfers.append(bucket.send(start, rows))
            if len(transfers) == 2 and bucket.scattered:  # the one before ran beside this tile's update: free its tile
                transfers.pop(0)()

        for i, (grad, param, *arrays) in enumerate(self._arrays(kept, parts)):
            if i:  # the tile before is back on the device, if it was not there
                send(*parts[i - 1][:2])
            start, rows, _ = parts[i]
            for first, last, clock in kept.runs:
                a, b = max(first, start) - start, min(last, start + rows) - start
                if a < b:
                    kernel([scalars[clock], grad[a:b], param[a:b], *(x[a:b] for x in arrays)])
        send(*parts[-1][:2])
        for wait in transfers:
            wait()

    def _arrays(self, kept: Kept, parts: list[tuple[int, int, int]]) -> Iterator[list[Tensor]]:
        """Each tile's gradient, parameter and what is kept, where it is updated."""
        bucket = kept.bucket
        near = [[flat[start : start + rows] for flat in (bucket.grad, bucket.param)] for start, rows, _ in parts]
        far = [[a[own : own + rows] for a in kept.arrays] for _, rows, own in parts]
        if self._stager is None:
            yield from (n + f for n, f in zip(near, far, strict=True))
        elif not self.on_host:
            staged = self._stager.stream([[Array(x) for x in f] for f in far])
            yield from (n + f for n, f in zip(near, staged, strict=True))
        else:
            staged = self._stager.stream([[Array(grad, written=False), Array(param)] for grad, param in near])
            yield from (n + f for n, f in zip(staged, far, strict=True))

    # ---- checkpoints

    def _chunks(self, kept: Kept) -> Iterator[tuple[int, int, int]]:
        """As `Bucket.tiles`, none of more than `tile_bytes` in fp32."""
        limit = max(self.tile_bytes // (4 * BLOCK), 1)
        for start, rows, own in kept.bucket.tiles():
            for i in range(0, rows, limit):
                yield start + i, min(limit, rows - i), own + i

    @torch.no_grad()
    def parts(self) -> Iterator[tuple[Slot, str, int, Tensor]]:
        """What this rank keeps of the states, tile by tile, no communication: (slot, name of the state, low, values).

        `values` (n,) of the update's precision are the elements from `low` on of the slot's local tensor, row-major.
        """
        for kept in self.kept:
            bucket = kept.bucket
            masters, states = tiles.master_storage(self.master, bucket.dtype), self._storages(bucket.dtype)
            for start, rows, own in self._chunks(kept):
                arrays = [a[own : own + rows].to(self.device) for a in kept.arrays]
                found: dict[str, Tensor] = {}
                if masters:
                    found["master"] = tiles.join(bucket.param[start : start + rows], arrays[:1])
                rest = iter(arrays[len(masters) :])
                for name, stored in states.items():
                    found[name] = stored.decode(*(next(rest) for _ in stored.arrays)).expand(-1, BLOCK)
                for slot, low, high, at in bucket.held(start, rows):
                    for name, values in found.items():
                        yield slot, name, low, values.reshape(-1)[at : at + high - low]

    def steps(self) -> Iterator[tuple[Slot, float]]:
        """The parameters, and how many steps each has taken. Waits for the device."""
        taken = [[clock.step.item() for clock in clocks] for clocks in self.clocks]
        for kept, slot in self._slots():
            yield slot, taken[kept.bucket.group_number][slot.clock]

    @torch.no_grad()
    def load_parts(self, step: Callable[[Slot], float], read: Callable[[Slot, str, int, int], Tensor | None]) -> None:
        """The other way: `read(slot, name, low, high)` gives values, or None where the checkpoint has no such state."""
        self.clocks = [[] for _ in self.param_groups]
        for kept in self.kept:
            bucket, number = kept.bucket, kept.bucket.group_number
            bucket.read()  # the parameters may be new ones
            for slot in bucket.slots:
                steps = [clock.step.item() for clock in self.clocks[number]]
                taken = step(slot)
                slot.clock = steps.index(taken) if taken in steps else self._clock(number, self._number(taken))
            masters, states = tiles.master_storage(self.master, bucket.dtype), self._storages(bucket.dtype)
            for start, rows, own in self._chunks(kept):
                flat = bucket.param[start : start + rows]
                found = {n: torch.zeros_like(flat, dtype=tiles.precision(bucket.dtype)) for n in states}
                if masters:
                    found["master"] = flat.to(torch.float32)
                for slot, low, high, at in bucket.held(start, rows):
                    for name, values in found.items():
                        new = read(slot, name, low, high)
                        if new is not None:
                            values.view(-1)[at : at + high - low].copy_(new)
                made = list(tiles.part(found["master"], bucket.dtype, [d for d, _ in masters])[1:] if masters else ())
                for name, stored in states.items():
                    value = found[name]
                    value = value.mean(-1, keepdim=True) if stored.arrays[0][1] == 1 else value
                    made += stored.restore(value)
                for array, new in zip(kept.arrays, made, strict=True):
                    array[own : own + rows].copy_(new)
        self._active, self._all = (), False
        self._remember()

    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """As of a torch optimizer: states by parameter, in its shape and layout and in fp32, under torch's names.

        Under ZeRO a collective call. torch.optim.AdamW loads that of `TiledAdamW`, and the other way round; a fp32
        master weight is the further entry "master". States of kind "block" are spread over their elements.
        """
        steps = dict(self.steps())
        for kept in self.kept:
            bucket = kept.bucket
            found: dict[str, Tensor] = {}
            masters, states = tiles.master_storage(self.master, bucket.dtype), self._storages(bucket.dtype)
            arrays = [a.to(self.device) for a in kept.arrays]
            if masters:
                found["master"] = bucket.whole(tiles.join(bucket.part(bucket.param), arrays[:1]))
            rest = iter(arrays[len(masters) :])
            for name, stored in states.items():
                value = stored.decode(*(next(rest) for _ in stored.arrays))
                found[name] = bucket.whole(value.expand(-1, BLOCK).contiguous())
            for slot in bucket.slots:
                if steps[slot] > 0:
                    entries = {n: compat.with_local(slot.grad, slot.view(rows).clone()) for n, rows in found.items()}
                    self.state[slot.param] = {"step": torch.tensor(steps[slot], dtype=torch.float32), **entries}
        try:
            return super().state_dict()
        finally:
            for p in self.state:
                self.state[p] = {}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes what `state_dict` gives, on this mesh and ZeRO stage or another, or what torch.optim.AdamW's gives.

        States may be DTensors of any layout, or whole tensors. Raises ValueError when the groups do not match.
        """
        saved = state_dict["param_groups"]
        sizes = [[len(g["params"]) for g in groups] for groups in (saved, self.param_groups)]
        if sizes[0] != sizes[1]:
            raise ValueError(f"the state dict has param groups of {sizes[0]} parameters, the optimizer of {sizes[1]}")
        for group, old in zip(self.param_groups, saved, strict=True):
            group.update({k: v for k, v in old.items() if k not in ("params", "param_names")})
        order = dict(zip((p for g in self.param_groups for p in g["params"]),
                         (i for g in saved for i in g["params"]), strict=True))  # fmt: skip
        states = {slot: state_dict["state"].get(order[slot.param], {}) for _, slot in self._slots()}
        local: dict[Slot, dict[str, Tensor]] = {}

        def read(slot: Slot, name: str, low: int, high: int) -> Tensor | None:
            part = local[slot].get(name)
            return None if part is None else part.reshape(-1)[low:high]

        known = {*self.rule.states, "master"}
        for slot, entries in states.items():  # all ranks gather in one order
            local[slot] = {n: _local_part(entries[n], slot) for n in sorted(known & entries.keys())}
        self.load_parts(lambda slot: float(states[slot].get("step", 0)), read)


def _local_part(value: Tensor, slot: Slot) -> Tensor:
    """This rank's part of a parameter's state."""
    param = slot.grad
    if not isinstance(param, DTensor):
        return value.full_tensor() if isinstance(value, DTensor) else value
    if isinstance(value, DTensor):
        if value.device_mesh == param.device_mesh and value.placements == param.placements:
            return compat.local_tensor(value)
        value = value.full_tensor()
    if value.shape != param.shape:
        raise ValueError(f"the state of {slot.name} has shape {tuple(value.shape)}, the parameter {tuple(param.shape)}")
    return compat.cut(value, param)


class TiledAdamW(Tiled):
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101), as torch.optim.AdamW; other arguments as of `Tiled`."""

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        **options: Any,
    ):
        super().__init__(params, rules.adamw, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, **options)
