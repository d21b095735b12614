"""ZeRO stages on two GPUs: memory per GPU beside the formula, and the step's time beside stage 0's.

    torchrun --nproc-per-node 2 -m benchmarks.zero                     # all stages; --stages 0 1 for some of them
    torchrun --nproc-per-node 2 -m benchmarks.zero --cpu --case tiny   # on gloo, uncompiled, to try this file

A case of train_step.py under `TiledAdamW`: bf16 parameters and gradients, fp32 master weights and moments. Each stage
trains the same weights on the same batches. Checked: losses stay within 2e-2 of the first stage's, and what a rank
holds after a step is what the formula says, within 3 %. With N ranks that share a parameter's copies, it says in
bytes a parameter (itself 2, gradient 2, master and moments 12; Rajbhandari et al., arXiv 1910.02054, section 5)

    stage 0: 2 + 2 + 12     1: 2 + 2 + 12/N     2: 2 + (2 + 12)/N     3: (2 + 2 + 12)/N

Under 2 a rank's part of the parameters is held a second time (2/N). `peak_gib` has activations too. Writes zero.json,
and keeps the rows of other stages and meshes in it; the exit code is 1 unless every check passed.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import pathlib
import statistics
import sys
import time

import torch
import torch.distributed as dist

import tedcompile
from benchmarks import train_step
from tedcompile import compat, zero
from tedcompile.mesh import MeshShape
from tedcompile.optim import TiledAdamW

STEPS, TOLERANCE = 10, 2e-2
RESULTS = pathlib.Path(__file__).parent / "results"
UNITS = {"step_ms": "ms", "forward_backward_ms": "ms", "held_gib": "GiB", "formula_gib": "GiB", "peak_gib": "GiB",
         "last_loss": "nats", "worst_loss_difference": "relative", "first_step_s": "s", "of_stage_0": "1"}  # fmt: skip


def formula(model, stage: int, shape: MeshShape) -> float:
    """Bytes of parameters, gradients and states on a rank, from whole sizes and the mesh alone."""
    total = 0.0
    for p in model.parameters():
        n, copies = p.numel(), shape[p.ted.axis]
        n /= shape.ep if p.ted.axis == "dp" else 1
        n /= 1 if p.placements[2].is_replicate() else shape.tp
        parameter = 2 / copies if stage == 3 else 2 + (2 / copies if stage == 2 and copies > 1 else 0)
        total += n * (parameter + (2 / copies if stage > 1 else 2) + (12 / copies if stage else 12))
    return total


def held(tensors) -> int:
    """Bytes of the different memories behind these tensors."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t is not None}
    return sum(storages.values())


def measure(options, stage: int, mesh, device: torch.device) -> dict[str, float | list[float]]:
    gpu = device.type == "cuda"
    sync = torch.cuda.synchronize if gpu else lambda: None
    gc.collect()
    if gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if gpu else 0
    model = train_step.build(options.case, torch.bfloat16, device)
    start = time.perf_counter()
    model = tedcompile.parallelize(model, mesh, zero=stage, backend="inductor" if gpu else "eager")
    optimizer = TiledAdamW(model.parameters(), lr=1e-4)
    data = train_step.batches(options.case, tedcompile.data_rank(mesh), device)
    losses, whole, partial, first = [], [], [], 0.0
    for step in range(STEPS):
        dist.barrier()
        sync()
        begun = time.perf_counter()
        ids = data[step % len(data)]
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        losses.append(loss.detach())
        sync()
        partial.append(time.perf_counter() - begun)
        optimizer.step()
        optimizer.zero_grad()
        sync()
        whole.append(time.perf_counter() - begun)
        first = first or time.perf_counter() - start
    total = torch.stack(losses).double()
    dist.all_reduce(total)
    result: dict[str, float | list[float]] = {
        "losses": (total / dist.get_world_size()).tolist(),
        "step_ms": 1e3 * statistics.median(whole[2:]),
        "forward_backward_ms": 1e3 * statistics.median(partial[2:]),
        "formula_gib": formula(model, stage, tedcompile.mesh.shape_of(mesh)) / 2**30,
        "first_step_s": first,
    }
    if gpu:
        del loss, losses
        result["peak_gib"] = (torch.cuda.max_memory_allocated() - before) / 2**30
        result["held_gib"] = (torch.cuda.memory_allocated() - before) / 2**30
    else:
        buckets = [t for k in optimizer.kept for t in (k.bucket.param, k.bucket.grad, *k.arrays)]
        result["held_gib"] = held([*buckets, *map(compat.local_tensor, model.parameters())]) / 2**30
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", default="qwen3_4layers", help="of train_step.py: NAME or NAME:size=number,...")
    parser.add_argument("--mesh", default="dp=2")
    parser.add_argument("--stages", type=int, nargs="+", default=list(zero.STAGES))
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(os.environ.get("OUT", RESULTS)))
    options = parser.parse_args()
    device = torch.device("cpu") if options.cpu else torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    if not options.cpu:
        torch.cuda.set_device(device)
    dist.init_process_group("gloo" if options.cpu else "nccl")
    shape = MeshShape.parse(options.mesh)
    mesh = dist.init_device_mesh(device.type, tuple(shape.as_dict().values()), mesh_dim_names=("dp", "ep", "tp"))
    facts = {
        "versions": {"torch": torch.__version__},
        "gpu": "cpu" if options.cpu else torch.cuda.get_device_name(),
        "clock_mhz": 0 if options.cpu else torch.cuda.clock_rate(),
        "date": datetime.date.today().isoformat(),
    }
    file, good = options.out / "zero.json", True
    rows = json.loads(file.read_text()) if file.exists() else []
    losses: list[float] = []
    for stage in options.stages:
        found = measure(options, stage, mesh, device)
        mine = found.pop("losses")
        losses = losses or mine  # of the first stage
        found["last_loss"] = mine[-1]
        found["worst_loss_difference"] = max(abs(a / b - 1) for a, b in zip(mine, losses, strict=True))
        system = f"{options.mesh} zero={stage}"
        rows = [row for row in rows if (row["case"], row["system"]) != (options.case, system)]
        base = [r["value"] for r in rows if (r["case"], r["system"], r["metric"]) ==
                (options.case, f"{options.mesh} zero=0", "step_ms")]  # fmt: skip
        found["of_stage_0"] = found["step_ms"] / (base[0] if base and stage else found["step_ms"])
        rows += [
            {"benchmark": "zero", "case": options.case, "system": system, "metric": metric, "value": found[metric],
             "unit": unit, **facts}
            for metric, unit in UNITS.items() if metric in found
        ]  # fmt: skip
        good &= found["worst_loss_difference"] <= TOLERANCE
        good &= options.case == "tiny" or abs(found["held_gib"] / found["formula_gib"] - 1) <= 0.03
        if dist.get_rank() == 0:
            file.write_text(json.dumps(rows, indent=1) + "\n")
            print(system, {k: float(f"{v:.5g}") for k, v in found.items()}, flush=True)
    if dist.get_rank() == 0:
        print("every check passed" if good else "NOT every check passed", flush=True)
    dist.destroy_process_group()
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
