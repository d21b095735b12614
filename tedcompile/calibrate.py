"""`tedcompile calibrate`: measures the present machine and writes it as TOML, for `--machine FILE`.

One process measures products, memory and kernel starts; under torchrun all ranks do so at once, and the collectives of
the ranks of one node, and those between nodes, are measured too. Links get the alpha and beta that fit the measured
times of all three collectives best (least squares of relative errors) under the costs of `machines`.
"""

from __future__ import annotations

import datetime
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from tedcompile import machines
from tedcompile.machines import RING, Link

COLLECTIVES = ("all_reduce", "all_gather", "all_to_all")
SIZES = {"cpu": [2**k for k in range(12, 25, 2)], "cuda": [2**k for k in range(12, 29, 2)]}  # from 4 KiB on each rank
SLOW = 0.1  # seconds after which no larger size is tried
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Sample:
    """One measured collective: seconds, and what one rank of n sends, in messages and bytes."""

    kind: str
    size: int
    messages: float
    sent: float
    seconds: float


def run(out: str | None = None) -> str:
    """Measures and writes to the file `out`, or returns the TOML text; empty on all ranks but the first.

    Needs the environment of torchrun, or none (one process). Raises ValueError if `out` cannot be written.
    """
    if out is not None and Path(out).suffix != ".toml":
        raise ValueError(f"--out must name a .toml file, not {out}")
    world, local = (int(os.environ.get(name, 1)) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    ours = world > 1 and not dist.is_initialized()
    if ours:
        limit = datetime.timedelta(minutes=5)
        if device.type == "cuda":
            dist.init_process_group("nccl", timeout=limit, device_id=device)
        else:
            dist.init_process_group("gloo", timeout=limit)
    try:
        text = _measure(device, world, local)
        rank = dist.get_rank() if world > 1 else 0
    finally:
        if ours:
            dist.destroy_process_group()
    if rank:
        return ""
    if out is None:
        return text
    try:
        Path(out).write_text(text)
    except OSError as error:
        raise ValueError(f"cannot write {out}: {error.strerror}") from None
    return f"written to {out}\n"


def _measure(device: torch.device, world: int, local: int) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    assumed = machines.default(device.type, name)
    links, notes = {"intra": assumed.intra, "inter": assumed.inter}, []
    for link, groups in (("intra", _nodes(world, local)), ("inter", _across(world, local))):
        if not groups:
            notes.append(f"{link}: not measured, as {assumed.name}")
            continue
        samples = list(_samples(_own(groups), len(groups[0]), device))
        alpha, beta = fit(samples)
        # all ranks of a node sent at once: what the node sends is what they sent together
        links[link] = Link(alpha, beta * (local if link == "inter" else 1))
        notes += [f"{link}: {line}" for line in _compare(samples, alpha, beta)]
    rates, rows, width = {}, assumed.half_rows, assumed.half_width
    for dtype, kind in DTYPES.items():
        rate, rows, width = products(device, kind)
        rates[dtype] = _mean(rate, device, world)
    copy, launch = (_mean(x, device, world) for x in (copy_bandwidth(device), kernel_start(device)))
    rows, width = (_mean(x, device, world) for x in (rows, width))
    if device.type == "cuda":
        memory = float(torch.cuda.get_device_properties(device).total_memory)
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / local
    lines = [
        f"# {name}, torch {torch.__version__}, {world} processes, {local} on a node; measured by tedcompile calibrate",
        *[f"# {note}" for note in notes],
        f"ranks_per_node = {local if world > 1 else assumed.ranks_per_node}",
        *[f"{link} = {{ alpha = {x.alpha:.3g}, beta = {x.beta:.4g} }}" for link, x in links.items()],
        f"gemm = {{ {', '.join(f'{dtype} = {rate:.4g}' for dtype, rate in rates.items())} }}",
        f"half_rows = {rows:.3g}",
        f"half_width = {width:.3g}",
        f"copy = {copy:.4g}",
        f"memory = {memory:.4g}",
        f"launch = {launch:.3g}",
    ]
    return "\n".join(lines) + "\n"


# ---- links ----------------------------------------------------------------------------------------------------------


def _nodes(world: int, local: int) -> list[list[int]]:
    return [list(range(i, i + local)) for i in range(0, world, local)] if local > 1 else []


def _across(world: int, local: int) -> list[list[int]]:
    return [list(range(i, world, local)) for i in range(local)] if world > local else []


def _own(groups: list[list[int]]) -> dist.ProcessGroup:
    """This rank's group; every rank makes all of them."""
    made = [(ranks, dist.new_group(ranks)) for ranks in groups]
    return next(group for ranks, group in made if dist.get_rank() in ranks)


def _samples(group: dist.ProcessGroup, n: int, device: torch.device) -> Iterator[Sample]:
    # torch 2.13 has a new name for it
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    for kind in COLLECTIVES:
        for size in SIZES[device.type]:
            x = torch.zeros(size // 4 // n * n, device=device)
            y = torch.empty(len(x) * (n if kind == "all_gather" else 1), device=device)
            call: Callable[[], object] = {
                "all_reduce": lambda: dist.all_reduce(x, group=group),  # noqa: B023
                "all_gather": lambda: gather(y, x, group=group),  # noqa: B023
                "all_to_all": lambda: dist.all_to_all_single(y, x, group=group),  # noqa: B023
            }[kind]
            # every rank must stop at the same size, so the slowest rank of all decides
            seconds = _slowest(_timed(call, device, dist.barrier), device)
            messages, sent = RING[kind](n, x.nbytes)
            yield Sample(kind, x.nbytes, messages, sent, seconds)
            if seconds > SLOW:
                break


def fit(samples: list[Sample]) -> tuple[float, float]:
    """(alpha, beta) of seconds = messages * alpha + sent / beta, by least squares of the relative errors."""
    a = torch.tensor([[s.messages / s.seconds, s.sent / s.seconds] for s in samples], dtype=torch.float64)
    scale = a.norm(dim=0)
    found = torch.linalg.lstsq(a / scale, torch.ones(len(samples), 1, dtype=torch.float64)).solution.flatten() / scale
    alpha, inverse = found.tolist()
    fastest = min(samples, key=lambda s: s.seconds / s.messages)
    best = max(samples, key=lambda s: s.sent / s.seconds)
    # noise can make one of the two negative: the fastest sample bounds it then
    return (alpha if alpha > 0 else fastest.seconds / fastest.messages), 1 / inverse if inverse > 0 else (
        best.sent / best.seconds
    )


def _compare(samples: list[Sample], alpha: float, beta: float) -> Iterator[str]:
    """One line for each collective: the largest size, measured and as the fit has it."""
    for kind in COLLECTIVES:
        last = [s for s in samples if s.kind == kind][-1]
        fitted = last.messages * alpha + last.sent / beta
        yield f"{kind} of {last.size / 2**20:.3g} MiB {1e3 * last.seconds:.3g} ms, fit {1e3 * fitted:.3g} ms"


# ---- one device -----------------------------------------------------------------------------------------------------


def products(device: torch.device, dtype: torch.dtype) -> tuple[float, float, float]:
    """(FLOP/s of large products, rows at half of it, width at half of it), as `Machine.product` uses them.

    Seconds per FLOP are a + b/rows and a + c/width where the other sizes are large: half_rows = b/a, half_width = c/a.
    """
    large = 8192 if device.type == "cuda" else 768
    small = [large // 64, large // 16, large // 4, large]

    def per_flop(rows: int, width: int) -> float:
        x, w = torch.randn(rows, large, device=device, dtype=dtype), torch.randn(large, width, device=device).to(dtype)
        return _timed(lambda: x @ w, device) / (2 * rows * large * width)

    def half(points: list[tuple[int, float]]) -> tuple[float, float]:
        a = torch.tensor([[1 / t, 1 / (n * t)] for n, t in points], dtype=torch.float64)
        one = torch.ones(len(points), 1, dtype=torch.float64)
        floor, slope = torch.linalg.lstsq(a, one).solution.flatten().tolist()
        return floor, max(slope / floor, 1.0) if floor > 0 else 1.0

    by_rows = [(n, per_flop(n, large)) for n in small]
    by_width = [(n, per_flop(large, n)) for n in small]
    fastest = min(t for _, t in by_rows + by_width)
    (_, rows), (_, width) = half(by_rows), half(by_width)
    # the rate that gives the fastest product its time
    return (1 + rows / large) * (1 + width / large) / fastest, rows, width


def copy_bandwidth(device: torch.device) -> float:
    """Bytes/s, reads and writes counted."""
    x = torch.zeros(2**28 if device.type == "cuda" else 2**24, device=device)
    y = torch.empty_like(x)
    return 2 * x.nbytes / _timed(lambda: y.copy_(x), device)


def kernel_start(device: torch.device) -> float:
    """Seconds that a tiny kernel takes in a row of them."""
    x = torch.zeros(8, device=device)
    row = 200

    def calls() -> None:
        for _ in range(row):
            x.add_(1)

    return _timed(calls, device) / row


def _timed(call: Callable[[], object], device: torch.device, before: Callable[[], object] = lambda: None) -> float:
    """Median seconds of a call, of at least 3 and at most 20 in about a tenth of a second."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    call()
    wait()
    first = time.perf_counter()
    call()
    wait()
    repeats = max(3, min(20, int(0.1 / max(time.perf_counter() - first, 1e-6))))
    if dist.is_initialized():  # collectives need the same number everywhere
        repeats = int(_slowest(repeats, device))
    times = []
    for _ in range(repeats):
        before()
        wait()
        start = time.perf_counter()
        call()
        wait()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _slowest(value: float, device: torch.device) -> float:
    found = torch.tensor(float(value), dtype=torch.float64, device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return found.item()


def _mean(value: float, device: torch.device, world: int) -> float:
    if world == 1:
        return value
    found = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(found)
    return found.item() / world
