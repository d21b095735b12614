"""Flat memory: parameters and gradients of one kind as views of two buffers, and who updates which rows of them.

A bucket holds parameters of one param group, dtype and mesh that have copies on the same ranks: dense parameters (over
dp x ep) and experts (over dp) never share one. Rows have 256 elements; every parameter starts on a row.

Under ZeRO-1 a tile of rows is cut among the ranks that hold copies: each updates its part, then the tile is gathered in
place.
What a rank keeps (master, moments) are the rows it updates, in order.
Under ZeRO-2 parameters stay where they are; rows are this rank's parts of them, as its gradients are, and a gathered
tile is copied into the parameters.
"""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from tedcompile import compat, gradients, kernels, zero
from tedcompile.lazy import cut, spans
from tedcompile.mesh import Groups
from tedcompile.optim import tiles
from tedcompile.optim.tiles import BLOCK

VERSION = attrgetter("_version")
CHUNK = 8192  # elements of a gradient with one sum of squares


@dataclass(eq=False)
class Slot:
    """A parameter in its bucket: rows [start, stop)."""

    param: Tensor
    name: str
    start: int
    stop: int
    grad: Tensor  # what p.grad is: a view of flat memory
    clock: int = 0
    touched: bool = False  # whether it ever had a gradient

    def view(self, rows: Tensor) -> Tensor:
        """Its elements of flat memory (rows, 256), in the local shape."""
        shape = compat.local_tensor(self.grad).shape
        return rows.view(-1)[self.start * BLOCK :][: math.prod(shape)].view(shape)


def share(param: Tensor) -> zero.Share:
    """What `parallelize` has left on a parameter."""
    return getattr(param, "ted", None) or zero.Share("", 0, "data", None)


def copies(param: Tensor) -> tuple[str, dist.ProcessGroup | None]:
    """The kind of a parameter among those of its dtype, and the ranks that share out its update."""
    if not isinstance(param, DTensor):
        return "", None
    mesh = param.device_mesh
    if any(p.is_partial() for p in param.placements):
        raise ValueError(f"parameter {share(param).name} of shape {tuple(param.shape)} is partial: redistribute it")
    whole = [i for i, p in enumerate(param.placements) if p.is_replicate() and mesh.size(i) > 1]
    given, group = share(param), None
    if given.stage and not (given.stage == 3 and given.dim is not None):
        group = Groups.of(mesh).group.get(given.axis)
    return f"{id(mesh)} {whole} {given.axis if group else ''} {scattered(param)}", group


def scattered(param: Tensor) -> bool:
    """Whether this rank's gradient is a part of the parameter that it holds (ZeRO-2)."""
    return share(param).stage == 2 and share(param).dim is not None


class Bucket:
    """Flat memory of parameters, and their gradients'."""

    def __init__(self, number: int, params: Sequence[Tensor], names: Sequence[str], limit: int):
        local = [compat.local_tensor(p) for p in params]
        first = local[0]
        self.scattered = scattered(params[0])
        self.group_number, self.dtype, self.device = number, first.dtype, first.device
        self.mesh = params[0].device_mesh if isinstance(params[0], DTensor) else None
        self.group = copies(params[0])[1]
        self.copies = dist.get_world_size(self.group) if self.group else 1
        self.shards = 1 if self.scattered else self.copies
        self.index = dist.get_rank(self.group) if self.group else 0
        parts = [t.chunk(self.copies, share(p).dim) if self.scattered else (t,) for p, t in zip(params, local)]
        self.parts = parts if self.scattered else []  # of what moves, nothing may hold the old memory
        self._landings: dict[int, list[tuple[Tensor, int]]] = {}
        self.slots: list[Slot] = []
        rows = 0
        for p, name, part in zip(params, names, parts, strict=True):
            stop = rows + -(-part[0].numel() // BLOCK)
            self.slots.append(Slot(p, name, rows, stop, zero.gradient(p, part[0]) if self.scattered else p))
            rows = stop
        rows = -(-max(rows, 1) // self.shards) * self.shards
        self.rows, self.own = rows, rows // self.shards
        self.param = first.new_zeros(rows, BLOCK)
        self.grad = torch.zeros_like(self.param)
        for slot in self.slots:
            if not self.scattered:
                compat.set_local(slot.param, slot.view(self.param))
            slot.grad = compat.with_local(slot.grad, slot.view(self.grad).data)  # .data: it counts its own versions
        self._arrivals()
        self.read()
        whole = 1
        if self.mesh is not None:
            whole = math.prod(self.mesh.size(i) for i, p in enumerate(params[0].placements) if p.is_replicate())
        self.weight = self.copies / whole  # of this rank's sum of squares in that of the whole mesh
        self.limit = limit  # own rows of a tile

    # ---- gradients

    def _arrivals(self) -> None:
        """Gradients of a backward come here (`gradients.deliver`)."""
        self.fused = self.grad.is_cuda and kernels.installed()  # one kernel, that sums squares too
        self._sums, count = [], 0
        for slot in self.slots:
            self._sums.append(count)
            count += -(-compat.local_tensor(slot.grad).numel() // CHUNK)
        wide = torch.promote_types(self.dtype, torch.float32)
        self._squares = torch.zeros(count if self.fused else 0, dtype=wide, device=self.device)
        self._tables: dict = {}
        grads = [slot.grad for slot in self.slots]
        self._counted = [*grads, *(t for g in grads if (t := compat.local_tensor(g)) is not g)]
        self._lock = threading.Lock()  # backwards may run in several threads
        self.zero()
        for number, slot in enumerate(self.slots):
            gradients.settle(slot.param, self, number)

    def settled(self) -> None:
        """Who holds the gradients now are their parameters, the bucket and its optimizer; the first let go."""
        counts = []
        for slot in self.slots:
            own = slot.param.grad is slot.grad
            if own:
                slot.param.grad = None
            counts.append(sys.getrefcount(slot.grad))
            if own:
                slot.param.grad = slot.grad
        self._holders = self._uses(), counts

    def _uses(self) -> int:
        return compat.storage_uses(compat.storage(self.grad))

    def _versions(self) -> int:
        return sum(map(VERSION, self._counted))

    def zero(self) -> None:
        """Zeros in all gradients."""
        self.grad.zero_()
        self.forget()

    def forget(self) -> None:
        """There are no gradients: none has been written that counts."""
        self._squares.zero_()
        self._known, self._seen, self._home_stream = self.fused, self._versions(), compat.stream(self.device)

    def takes(self, number: int, parameter: Tensor, gradient: Tensor) -> bool:
        """Whether a gradient of this backward can come by `deliver`.

        Not where `p.grad` is None and somebody still has what it was: that is theirs to keep.
        """
        slot = self.slots[number]
        mine = compat.local_tensor(slot.grad)
        if slot.param is not parameter or compat.storage(mine) != compat.storage(self.grad):
            return False
        if (
            gradient.dtype != self.dtype
            or gradient.shape != mine.shape
            or compat.stream(self.device) != self._home_stream
        ):
            return False
        if parameter.grad is not None:
            return parameter.grad is slot.grad
        uses, counts = self._holders
        return sys.getrefcount(slot.grad) <= counts[number] and self._uses() <= uses

    def deliver(self, arrived: Sequence[tuple[int, Tensor]]) -> None:
        """Gradients of a backward, by the numbers of their slots: written where `p.grad` is None, else added."""
        with self._lock:
            self._known = self._known and self._versions() == self._seen  # somebody else has written
            for add in (False, True):
                members = [m for m in arrived if (self.slots[m[0]].param.grad is not None) == add]
                if members:
                    self._write(members, add)
                for number, _ in members:
                    self.slots[number].touched = True
            for number, _ in arrived:
                if self.slots[number].param.grad is None:
                    self.slots[number].param.grad = self.slots[number].grad
            self._seen = self._versions() if self._known else 0

    def _write(self, members: Sequence[tuple[int, Tensor]], add: bool) -> None:
        sources = [gradient for _, gradient in members]
        if self.fused:
            from tedcompile.kernels.gradients import deliver

            places = [(self.slots[number].start, self._sums[number]) for number, _ in members]
            deliver(sources, places, self.grad, self._squares, add, CHUNK, self._tables)
            return
        targets = [compat.local_tensor(self.slots[number].grad) for number, _ in members]
        compat.foreach_add(targets, sources) if add else compat.foreach_copy(targets, sources)

    def squares(self, arrived: bool) -> Tensor:
        """This rank's part of the sum of squares of the gradients over the whole mesh, 0-d fp64.

        `arrived`: as they arrived, where the backward has left their squares.
        """
        if arrived and self.fused:
            known = self._known and self._versions() == self._seen
            found = self._squares.sum(dtype=torch.float64) if known else tiles.squares(self.grad)
            return found * (self.weight / self.shards)  # all rows, whoever updates them
        parts = [tiles.squares(self.grad[start : start + rows]) for start, rows, _ in self.tiles()]
        return sum(parts[1:], parts[0]) * self.weight

    # ---- parameters

    def read(self) -> None:
        """Parts of parameters to rows."""
        for slot, parts in zip(self.slots, self.parts):  # no parts where parameters are rows themselves
            slot.view(self.param).copy_(parts[self.index])

    def tiles(self) -> Iterator[tuple[int, int, int]]:
        """(start, rows, own): own rows [own, own + rows) are rows [start, start + rows) of flat memory."""
        for own in range(0, self.own, self.limit):
            rows = min(self.limit, self.own - own)
            yield (own if self.scattered else own * self.shards + self.index * rows), rows, own

    def send(self, start: int, rows: int) -> Callable[[], None]:
        """Starts to bring this rank's rows of a tile to the other ranks' parameters; the result waits for theirs."""
        if not self.scattered:
            return self.gather(self.param, start, rows)
        tile = self.param.new_empty(self.copies * rows, BLOCK)
        wait = compat.all_gather(tile, self.param[start : start + rows], self.group)

        def finish() -> None:
            wait()
            flat, landings = tile.view(-1), self._landing(start, rows)
            sources = [flat[at : at + target.numel()].view(target.shape) for target, at in landings]
            compat.foreach_copy([target for target, _ in landings], sources)

        return finish

    def _landing(self, start: int, rows: int) -> list[tuple[Tensor, int]]:
        """Where a gathered tile goes: pieces of parameters, and the element of the tile that each starts with."""
        if start not in self._landings:
            found = self._landings[start] = []
            for slot, parts in zip(self.slots, self.parts, strict=True):
                first = (slot.start - start) * BLOCK  # of the parameter's part, in a rank's rows
                low, high = max(-first, 0), min(parts[0].numel(), rows * BLOCK - first)
                for rank, part in enumerate(parts) if low < high else ():
                    at = rank * rows * BLOCK + first
                    found += [(target, at + offset) for target, offset in pieces(part, low, high)]
        return self._landings[start]

    def gather(self, flat: Tensor, start: int, rows: int) -> Callable[[], None]:
        """Starts to fill the rest of a tile of flat memory with what the other ranks have of it."""
        if self.group is None:
            return lambda: None
        first = start - self.index * rows
        mine = flat[start : start + rows]
        mine = mine if flat.is_cuda else mine.clone()  # NCCL gathers in place
        whole = flat[first : first + rows * self.shards]
        return compat.all_gather(whole, mine, self.group)

    def whole(self, own: Tensor) -> Tensor:
        """All rows of flat memory from those that each rank keeps."""
        if self.shards == 1:
            return own
        flat = own.new_empty(self.rows, own.shape[1])
        for start, rows, first in self.tiles():
            flat[start : start + rows] = own[first : first + rows]
            self.gather(flat, start, rows)()
        return flat

    def part(self, flat: Tensor) -> Tensor:
        """The rows that this rank keeps."""
        if self.shards == 1:
            return flat
        return torch.cat([flat[start : start + rows] for start, rows, _ in self.tiles()])

    def held(self, start: int, rows: int) -> Iterator[tuple[Slot, int, int, int]]:
        """(slot, low, high, at): elements [low, high) of a parameter's view are those from `at` on of these rows."""
        for slot in self.slots:
            first = slot.start * BLOCK
            low = max(start * BLOCK - first, 0)
            high = min((start + rows) * BLOCK - first, compat.local_tensor(slot.grad).numel())
            if low < high:
                yield slot, low, high, first + low - start * BLOCK


def pieces(tensor: Tensor, low: int, high: int) -> Iterator[tuple[Tensor, int]]:
    """Views that cover the elements [low, high) of a tensor in row-major order, and the element each starts with."""
    for region in spans(tensor.shape, low, high):
        view = cut(tensor, region)
        yield view, low
        low += view.numel()
