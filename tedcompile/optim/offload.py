"""State in host memory, streamed through two staging tiles: one is filled while the other is updated or written back.

On CUDA the copies in and out run on streams of their own, so both directions of the link are busy at once (as in
ZeRO-Offload, arXiv 2101.06840, with the update on the device). Elsewhere the same code copies in order.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


class Stager:
    def __init__(self, device: torch.device, tile_bytes: int):
        self.device, self.on_gpu = device, device.type == "cuda"
        self.inward = torch.cuda.Stream(device) if self.on_gpu else None
        self.outward = torch.cuda.Stream(device) if self.on_gpu else None
        self.buffers = [torch.empty(tile_bytes + 4096, dtype=torch.uint8, device=device) for _ in range(2)]

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

    def _views(self, buffer: Tensor, arrays: Sequence[Tensor]) -> list[Tensor]:
        found, start = [], 0
        for a in arrays:
            size = a.numel() * a.element_size()
            found.append(buffer[start : start + size].view(a.dtype).view(a.shape))
            start += -(-size // 256) * 256
        return found

    def stream(self, tiles: Sequence[list[Tensor]]) -> Iterator[list[Tensor]]:
        """Each tile's arrays on the device, in order; what is written to them goes back to the host."""
        staged: dict[int, list[Tensor]] = {}
        fetched: dict[int, Any] = {}
        stored: dict[int, Any] = {}
        begun = self._mark()

        def fetch(i: int) -> None:
            with self._on(self.inward):
                self._after(stored.get(i - 2, begun))
                staged[i] = self._views(self.buffers[i % 2], tiles[i])
                for there, here in zip(staged[i], tiles[i], strict=True):
                    there.copy_(here, non_blocking=True)
                fetched[i] = self._mark()

        for i in range(min(2, len(tiles))):
            fetch(i)
        for i in range(len(tiles)):
            self._after(fetched[i])
            yield staged[i]
            updated = self._mark()
            with self._on(self.outward):
                self._after(updated)
                for here, there in zip(tiles[i], staged.pop(i), strict=True):
                    here.copy_(there, non_blocking=True)
                stored[i] = self._mark()
            if i + 2 < len(tiles):
                fetch(i + 2)
        if tiles:
            self._after(stored[len(tiles) - 1])
