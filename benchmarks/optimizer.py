"""The optimizer's step on one GPU: tedcompile.optim beside torch's AdamW, same parameters, same run.

    python -m benchmarks.optimizer

bf16 parameters with fp32 master weights and moments: 28 bytes of traffic a parameter (gradient 2, parameter 2, master
8, moments 16), so a step cannot be faster than copying as many bytes; the copy is measured in the same run. Cases: the
same parameters as 30 tensors, as 3,000 and as one; `accuracy`: the master weights after 100 steps in fp32, and
torch.optim.AdamW's, beside those in fp64; `offload`: states on the host. `ted_6.7b` is DeepSpeed-TED's spike of up-cast
gradients (arXiv 2303.06318, section 4) for 6.7e9 base parameters, 16 experts, 32 devices: by its formula, and measured
with as many parameters as a device has of the experts.
Writes benchmarks/results/optimizer.json, or --out, and keeps the rows that it did not measure again; --cases and
--systems choose some by parts of their names.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import pathlib
import statistics
import time
from collections.abc import Callable, Iterable

import torch

from tedcompile.optim import TiledAdamW

BYTES = 28
RESULTS = pathlib.Path(__file__).parent / "results"
OPTIONS = dict(lr=1e-4, weight_decay=0.01)
OURS: dict[str, dict] = {
    "tedcompile": dict(check_finite=False),
    "tedcompile, clipped and checked": dict(max_grad_norm=1.0),
    'tedcompile, master="split"': dict(check_finite=False, master="split"),
    'tedcompile, moments="bf16"': dict(check_finite=False, moments="bf16"),
    'tedcompile, moments="int8"': dict(check_finite=False, moments="int8"),
}
UNITS = {"step_ms": "ms", "cpu_ms": "ms", "extra_gib": "GiB", "of_copy": "1"}
UNITS |= {"error": "relative, to torch's foreach", "error_fp64": "relative, to fp64"}
UNITS |= {"copy_gb_s": "GB/s", "link_gb_s": "GB/s", "of_link": "1", "device_gib": "GiB", "on_host": "bool",
          "threads": "count"}  # fmt: skip


class Device:
    """Times, memory and waiting, on a GPU or (to try this file) on a CPU."""

    def __init__(self, name: str):
        self.name, self.gpu = name, name == "cuda"

    def sync(self) -> None:
        if self.gpu:
            torch.cuda.synchronize()

    def held(self, peak: bool = False) -> int:
        if not self.gpu:
            return 0
        return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()

    def time(self, step: Callable[[], object], repeats: int = 5, warm: int = 2, steps: int = 5) -> tuple[float, float]:
        """Median seconds of one of `steps` steps in a row, and of the host's part of it."""
        for _ in range(warm):
            step()
        wall, host = [], []
        for _ in range(repeats):
            self.sync()
            start = time.perf_counter()
            step()
            host.append(time.perf_counter() - start)  # of the first: later ones may wait for a full queue
            for _ in range(steps - 1):
                step()
            self.sync()
            wall.append((time.perf_counter() - start) / steps)
        return statistics.median(wall), statistics.median(host)


def tensors(device: Device, total: int, count: int) -> list[torch.nn.Parameter]:
    generator = torch.Generator(device.name).manual_seed(0)
    made = []
    for _ in range(count):
        t = torch.empty(total // count, dtype=torch.bfloat16, device=device.name)
        made.append(torch.nn.Parameter(t.normal_(0, 0.02, generator=generator)))
    return made


def ours(params: list, **options) -> Callable[[], object]:
    optimizer = TiledAdamW(params, **OPTIONS, **options)
    for p in params:
        p.grad.normal_(0, 1e-3)
    return optimizer.step


class Masters:
    """fp32 master weights around torch's AdamW, as mixed-precision training does it: casts there and back."""

    def __init__(self, params: Iterable, **options):
        self.params = list(params)
        self.masters = [torch.nn.Parameter(p.detach().float()) for p in self.params]
        self.optimizer = torch.optim.AdamW(self.masters, **options)

    @torch.no_grad()
    def step(self) -> None:
        for master, p in zip(self.masters, self.params, strict=True):
            master.grad = p.grad.float()
        self.optimizer.step()
        for master in self.masters:
            master.grad = None
        torch._foreach_copy_([p.detach() for p in self.params], self.masters)

    def zero_grad(self, set_to_none: bool = True) -> None:
        for p in self.params:
            p.grad = None


def torch_adamw(params: list, **options) -> Callable[[], object]:
    for p in params:
        p.grad = torch.empty_like(p).normal_(0, 1e-3)
    return Masters(params, **OPTIONS, **options).step


def compiled_loop(params: list) -> Callable[[], object]:
    """One compiled pointwise pass for each tensor: what is left to gain over it is launches."""
    states = [[p.detach().float(), torch.zeros_like(p, dtype=torch.float32), torch.zeros_like(p, dtype=torch.float32)]
              for p in params]  # fmt: skip
    for p in params:
        p.grad = torch.empty_like(p).normal_(0, 1e-3)
    count = torch.zeros((), dtype=torch.float32, device=params[0].device)

    @torch.compile(fullgraph=True)
    def update(p, g, master, m, v, size, root):
        g = g.float()
        m.lerp_(g, 0.1)
        v.mul_(0.999).addcmul_(g, g, value=0.001)
        master.mul_(1 - 1e-6).sub_(size * m / (v.sqrt() / root + 1e-8))
        p.copy_(master)

    @torch.no_grad()
    def step():
        count.add_(1)
        size, root = 1e-4 / (1 - 0.9**count), (1 - 0.999**count).sqrt()
        for p, state in zip(params, states, strict=True):
            update(p.detach(), p.grad, *state, size, root)

    return step


SYSTEMS: dict[str, Callable[[list], Callable]] = {
    "torch AdamW, fused, with casts": lambda params: torch_adamw(params, fused=True),
    "torch AdamW, foreach, with casts": lambda params: torch_adamw(params, foreach=True),
    "a compiled pass for each tensor": compiled_loop,
}
SYSTEMS |= {name: (lambda params, o=options: ours(params, **o)) for name, options in OURS.items()}


def measure(device: Device, make: Callable, total: int, count: int, copy: float) -> dict[str, float]:
    params = tensors(device, total, count)
    step = make(params)
    step()  # compiles, allocates states
    device.sync()
    before = device.held()
    if device.gpu:
        torch.cuda.reset_peak_memory_stats()
    seconds, host = device.time(step)
    extra = device.held(peak=True) - before
    return {
        "step_ms": seconds * 1e3,
        "of_copy": BYTES * total / seconds / copy,
        "extra_gib": extra / 2**30,
        "cpu_ms": host * 1e3,
    }


def copy_bandwidth(device: Device, size: int) -> float:
    """Bytes read and written a second by a copy."""
    a = torch.zeros(size, dtype=torch.uint8, device=device.name)
    b = torch.empty_like(a)
    return 2 * size / device.time(lambda: b.copy_(a))[0]


def accuracy(device: Device) -> dict[str, dict[str, float]]:
    """By system, the master weights after 100 steps on bf16 gradients: relative distances to fp64 and to torch's
    default, of the weights' norm."""

    def trained(dtype: torch.dtype, make: Callable) -> torch.Tensor:
        p = torch.nn.Parameter(tensors(device, 1 << 20, 1)[0].detach().to(dtype))
        optimizer, generator = make(p), torch.Generator(device.name).manual_seed(1)
        for _ in range(100):
            g = torch.empty(1 << 20, dtype=torch.bfloat16, device=device.name).normal_(0, 1e-3, generator=generator)
            p.grad = g.to(dtype)
            optimizer.step()
        return optimizer.state_dict()["state"][0]["master"] if dtype == torch.bfloat16 else p.detach()

    made = {"tedcompile": trained(torch.bfloat16, lambda p: TiledAdamW([p], **OPTIONS))}
    for kind, options in (("foreach", dict(foreach=True)), ("fused", dict(fused=True)), ("loop", dict(foreach=False))):
        made[f"torch AdamW, {kind}"] = trained(
            torch.float32, lambda p, o=options: torch.optim.AdamW([p], **OPTIONS, **o)
        )
    exact = trained(torch.float64, lambda p: torch.optim.AdamW([p], **OPTIONS))

    def apart(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a.double() - b.double()).norm() / b.double().norm())

    default = made["torch AdamW, foreach"]
    return {name: {"error": apart(p, default), "error_fp64": apart(p, exact)} for name, p in made.items()}


def link_bandwidth(device: Device) -> float:
    """Bytes a second in each direction, both at once, of pinned host memory."""
    size = 1 << (30 if device.gpu else 24)
    host = [torch.zeros(size, dtype=torch.uint8, pin_memory=device.gpu) for _ in range(2)]
    there = [torch.zeros(size, dtype=torch.uint8, device=device.name) for _ in range(2)]
    streams = [torch.cuda.Stream() for _ in range(2)] if device.gpu else []

    def both():
        if not streams:
            return there[0].copy_(host[0]), host[1].copy_(there[1])
        for stream, (a, b) in zip(streams, ((there[0], host[0]), (host[1], there[1])), strict=True):
            with torch.cuda.stream(stream):
                a.copy_(b, non_blocking=True)

    return size / device.time(both, repeats=2, warm=1, steps=3)[0]


def offload(device: Device, total: int, place: str, link: float) -> dict[str, float]:
    """`of_link`: the least time that the link needs, over the step's. Its busier direction has 12 bytes a parameter
    where the state travels (master and moments), 4 where gradients and parameters do."""
    params = tensors(device, total, 40)
    before = sum(4 * p.numel() for p in params)  # parameters and gradients
    optimizer = TiledAdamW(params, **OPTIONS, check_finite=False, offload="cpu", update_on=place)
    for p in params:
        p.grad.normal_(0, 1e-3)
    if device.gpu:
        torch.cuda.reset_peak_memory_stats()
    seconds, _ = device.time(optimizer.step, repeats=1, warm=1, steps=3)
    return {
        "step_ms": seconds * 1e3,
        "of_link": (4 if optimizer.on_host else 12) * total / link / seconds,
        "on_host": float(optimizer.on_host),
        "threads": torch.get_num_threads(),
        "device_gib": max(device.held(peak=True) - before, 0) / 2**30,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--params", type=float, default=1.5e9)
    parser.add_argument("--offload", type=float, default=4e9, help="parameters of the offload case, 0 for none")
    parser.add_argument("--counts", type=int, nargs="*", default=[30, 3000, 1])
    parser.add_argument(
        "--cases", nargs="*", default=[""], help="parts of names: ted, 30, 3,000, 1 , accuracy, offload"
    )
    parser.add_argument("--systems", nargs="*", default=[""], help="parts of names")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(os.environ.get("OUT", RESULTS)))
    args = parser.parse_args()
    device = Device(args.device)
    facts = {
        "versions": {"torch": torch.__version__},
        "gpu": torch.cuda.get_device_name() if device.gpu else "cpu",
        "clock_mhz": torch.cuda.clock_rate() if device.gpu else 0,
        "date": datetime.date.today().isoformat(),
    }
    file = args.out / "optimizer.json"
    rows: list[dict] = json.loads(file.read_text()) if file.exists() else []

    def record(case: str, system: str, **found: float) -> None:
        nonlocal rows
        print(case, system, {k: float(f"{v:.4g}") for k, v in found.items()}, flush=True)
        rows = [row for row in rows if (row["case"], row["system"]) != (case, system)]
        rows += [
            {"benchmark": "optimizer", "case": case, "system": system, "metric": metric, "value": value,
             "unit": UNITS[metric], **facts}
            for metric, value in found.items()
        ]  # fmt: skip
        file.write_text(json.dumps(rows, indent=1) + "\n")

    def wanted(case: str, system: str = "") -> bool:
        return any(c in case for c in args.cases) and (not system or any(s in system for s in args.systems))

    total, spike = int(args.params), int(16 * 6.7e9 / (3 * 32))
    copy = copy_bandwidth(device, min(2 * total, 1 << 32))
    record("copy", "copy", copy_gb_s=copy / 1e9)
    if wanted("ted_6.7b"):
        record("ted_6.7b", "up-cast at once (formula)", extra_gib=4 * spike / 2**30)
        for name in ("torch AdamW, fused, with casts", "tedcompile"):
            if wanted("ted_6.7b", name):
                record("ted_6.7b", name, **measure(device, SYSTEMS[name], spike if device.gpu else total, 8, copy))
                gc.collect()
    for count in args.counts:
        for name, make in SYSTEMS.items():
            if count != args.counts[0] and ("master" in name or "moments" in name):
                continue
            case = f"{count:,} tensors"
            if wanted(case, name):
                record(case, name, **measure(device, make, total, count, copy))
                gc.collect()
    if wanted("accuracy"):
        for name, found in accuracy(device).items():
            record("accuracy", name, **found)
    if args.offload and wanted("offload"):
        link = link_bandwidth(device)
        record("offload", "both directions of the link at once", link_gb_s=link / 1e9)
        for place in ("device", "host", "auto"):
            name = f'tedcompile, update_on="{place}"'
            if wanted("offload", name):
                record("offload", name, **offload(device, int(args.offload), place, link))
                gc.collect()


if __name__ == "__main__":
    main()
