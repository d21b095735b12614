"""State in host memory: tiles go through two staging buffers; one is filled while the other is updated or sent back.

Either the state travels to the device and back, or gradients travel to the host, where the C++ kernel of the same rule
updates the state, and parameters there and back (ZeRO-Offload, arXiv 2101.06840): at most 4 bytes a bf16 parameter in
each direction of the link in place of 12, but at the speed of the host's memory. `choose` says which takes less time.

On CUDA the copies in and out run on streams of their own, so both directions of the link are busy at once. Elsewhere
the same code copies in order.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Array:
    """A tile's rows of one array, and what is done with them where the update is not: fetched, brought back."""

    rows: Tensor
    read: bool = True
    written: bool = True


class Stager:
    """Two buffers of `tile_bytes`, on the device, or with `on_host` in pinned host memory."""

    def __init__(self, device: torch.device, tile_bytes: int, on_host: bool):
        self.on_host, self.on_gpu = on_host, device.type == "cuda"
        self.inward = torch.cuda.Stream(device) if self.on_gpu else None
        self.outward = torch.cuda.Stream(device) if self.on_gpu else None
        place: dict = dict(device="cpu", pin_memory=self.on_gpu) if on_host else dict(device=device)
        self.buffers = [torch.empty(tile_bytes + 4096, dtype=torch.uint8, **place) for _ in range(2)]

    def _on(self, stream) -> Any:
        return torch.cuda.stream(stream) if self.on_gpu else contextlib.nullcontext()

    def _mark(self) -> Any:
        if self.on_gpu:
            event = torch.cuda.Event()
            event.record()
            return event
        return None

    def _after(self, event: Any) -> None:
        if event is not None:
            torch.cuda.current_stream().wait_event(event)

    def _views(self, buffer: Tensor, arrays: Sequence[Array]) -> list[Tensor]:
        found, start = [], 0
        for a in arrays:
            found.append(buffer[start : start + a.rows.nbytes].view(a.rows.dtype).view(a.rows.shape))
            start += -(-a.rows.nbytes // 256) * 256
        return found

    def stream(self, tiles: Sequence[Sequence[Array]]) -> Iterator[list[Tensor]]:
        """Each tile's arrays where they are staged, in order; what is written to them goes back."""
        staged: dict[int, list[Tensor]] = {}
        fetched: dict[int, Any] = {}
        stored: dict[int, Any] = {}
        begun = self._mark()

        def fetch(i: int) -> None:
            with self._on(self.inward):
                self._after(stored.get(i - 2, begun))
                staged[i] = self._views(self.buffers[i % 2], tiles[i])
                for there, array in zip(staged[i], tiles[i], strict=True):
                    if array.read:
                        there.copy_(array.rows, non_blocking=True)
                fetched[i] = self._mark()

        for i in range(min(2, len(tiles))):
            fetch(i)
        for i in range(len(tiles)):
            if self.on_host and self.on_gpu:
                fetched[i].synchronize()
            else:
                self._after(fetched[i])
            yield staged[i]
            updated = None if self.on_host else self._mark()
            with self._on(self.outward):
                self._after(updated)
                for array, there in zip(tiles[i], staged.pop(i), strict=True):
                    if array.written:
                        array.rows.copy_(there, non_blocking=True)
                stored[i] = self._mark()
            self._after(stored[i] if self.on_host else None)  # who reads the parameters next waits for them
            if i + 2 < len(tiles):
                fetch(i + 2)
        if tiles:
            self._after(stored[len(tiles) - 1])


def choose(device: torch.device, state: int, staged: int, size: int = 1 << 24) -> bool:
    """Whether the update is to run on the host, by what it costs at rates measured here on copies of `size` bytes.

    `state`: bytes an element that the optimizer keeps; `staged`: of gradient and parameter. The device's update takes
    as long as the link for the state, each direction at once; the host's as long as the slower of the link, for what is
    staged, and of the host's memory, which reads and writes both. On a CPU the state is where it is updated already.
    """
    if device.type != "cuda":
        return True
    host = [torch.zeros(size, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
    there = torch.empty(size, dtype=torch.uint8, device=device)

    def rate(to: Tensor) -> float:
        best = float("inf")
        for _ in range(4):
            torch.cuda.synchronize(device)
            start = time.perf_counter()
            to.copy_(host[0], non_blocking=True)
            torch.cuda.synchronize(device)
            best = min(best, time.perf_counter() - start)
        return size / best

    link, memory = rate(there), 2 * rate(host[1])
    return max(staged / link, 2 * (state + staged) / memory) < state / link
