"""Runs on four and on eight GPUs, as a table of rows that a few calls work off: python -m benchmarks.many_gpus --gpus 4

    python -m benchmarks.many_gpus --gpus 8 --mesh ep=4,tp=2 --seconds 560    # rows of one mesh; call it again to go on
    python -m benchmarks.many_gpus --gpus 4 --cpu --rows 2                    # tiny sizes, uncompiled, on gloo

A row is a case of train_step.py, a mesh and options of `parallelize`, run as mesh_runs.py runs it (NCCL, bf16, 20
steps, then timed alone), from a model on the meta device. Small rows compile side by side; those with ZeRO have the
GPUs to themselves. After each, results go into many_gpus.json; what is there is not run again (--retry: what failed).
A call that is cut off leaves the row that it was at to the next one. `--list` prints the table and runs nothing.

Four GPUs: DTD, CAC, the algebra of collectives, layouts of the experts, dispatch kinds, chunks. Eight: DeepSpeed-TED's
40B model (arXiv 2303.06318) without and with them, all of Qwen3-30B-A3B, scaling from one GPU, the largest base model
that fits (`?`: the number of layers is searched for, from the predicted memory on), and the rows of four. Checked:

- losses are within 2e-2 of one GPU's that averages as many batches, or of the case's first run with as many data ranks;
- bytes handed to collectives are within 5 % of `explain`'s (within a factor of 2 where each token travels once to a
  rank, whose formula is for uniform routing);
- what mesh_runs.py checks in each run: copies bit-equal, nothing compiled after the first step.

Predicted beside the measured: as in mesh_runs.py, and `predicted_ms` of a forward and backward: the model's FLOPs at
the machine's rate of large products, and all collectives, with no overlap.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import itertools
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

from benchmarks import mesh_runs
from benchmarks.mesh_runs import LATE, TOLERANCE, parse

FULL = "out of memory"
RESULTS = pathlib.Path(__file__).parent / "results"
TED = "experts=tensor dispatch=all_to_all"
NONE = f"{TED} drop=no off=save_collectives off=simplify_collectives"
OPTIONS = (  # of small cases, the most wanted first: axes that the mesh must have, options
    ("", ""),  # the cost model's plan
    ("ep tp", f"checkpoint=full {NONE}"),
    ("ep tp", f"checkpoint=full {TED} drop=no off=simplify_collectives"),  # + CAC
    ("ep tp", f"checkpoint=full {TED} drop=yes off=simplify_collectives"),  # + DTD
    ("ep tp", f"checkpoint=full {TED} drop=yes"),  # + algebra
    ("", "checkpoint=full off=save_collectives"),
    ("", "checkpoint=full"),
    ("tp", "off=simplify_collectives"),
    *(("ep", f"experts=tensor dispatch={kind}") for kind in ("all_to_all", "dedup", "all_gather")),
    *(("tp", f"experts=folded dispatch={kind}") for kind in ("all_to_all", "dedup", "all_gather")),
    ("ep", "dispatch=all_to_all chunks=2"),
)  # fmt: skip
MESHES = {4: ("ep=2,tp=2", "ep=4", "dp=2,ep=2", "tp=4"), 8: ("ep=4,tp=2", "ep=2,tp=4", "dp=2,ep=2,tp=2")}
CASES = ("qwen3_4layers", "mixtral_layer:num_hidden_layers=2", "ted")
# --cpu: sizes that replace those of the cases
TINY = {"qwen3_4layers": "hidden_size=64,head_dim=16,num_attention_heads=8,num_key_value_heads=8,num_experts=16,"
        "num_experts_per_tok=4,moe_intermediate_size=64,num_hidden_layers=2,vocab_size=256,batch=2,seq=64",
        "mixtral_layer": "hidden_size=64,num_attention_heads=8,num_key_value_heads=8,num_local_experts=8,"
        "intermediate_size=128,num_hidden_layers=2,vocab_size=256,batch=2,seq=64",
        "ted": "hidden_size=64,num_attention_heads=8,num_hidden_layers=4,vocab_size=256,batch=2,seq=64"}  # fmt: skip
UNITS = mesh_runs.UNITS | {
    "nccl_ms": "ms", "predicted_ms": "ms, predicted", "tflops_per_gpu": "TFLOP/s", "mfu": "1",
    "predicted_gib": "GiB, predicted", "bytes_ratio": "1", "handed": "bytes", "explained": "bytes, predicted",
    "losses": "nats", "losses_of": "nats", "plan": "text", "error": "text",
}  # fmt: skip


class Row(NamedTuple):
    case: str
    system: str  # as mesh_runs.parse reads it

    @property
    def peer(self) -> bool:
        return "peer=" in self.system

    @property
    def alone(self) -> bool:
        """Has the GPUs to itself: it is to fill them."""
        return "zero" in parse(self.system)[1]


def rows(gpus: int) -> list[Row]:
    """All rows, the most wanted first."""
    found: list[Row] = []
    if gpus == 8:
        base, big = "ted:num_hidden_layers=32", "qwen3_4layers:num_hidden_layers=48,batch=2"
        whole = "zero=1 master=split checkpoint=full"
        for mesh in ("ep=4,tp=2", "ep=2,tp=4"):  # the paper's experiment; then as the cost model would have it
            found += [Row(base, f"{mesh} {whole} {plan}".strip()) for plan in (NONE, f"{TED} drop=yes", "")]
        found += [Row(big, f"{mesh} {whole}") for mesh in ("ep=8", "ep=4,tp=2", "ep=2,tp=4")]
        found += [Row(case, mesh) for case in (CASES[0], CASES[2]) for mesh in ("tp=1", "ep=2", "ep=4", "ep=8")]
        found += [Row("ted:batch=1,num_hidden_layers=?", f"{mesh} zero=1 checkpoint=full")
                  for mesh in ("ep=8", "ep=4,tp=2", "ep=2,tp=4", "tp=8")]  # fmt: skip
    for mesh, case in itertools.product(MESHES[gpus], CASES):
        axes = {axis for axis, size in parse(mesh)[0].as_dict().items() if size > 1}
        found += [Row(case, f"{mesh} {text}".strip()) for needs, text in OPTIONS if axes >= set(needs.split())]
        found.append(Row(case, "tp=1"))
    found.insert(-1 if gpus == 8 else len(OPTIONS), Row(CASES[0], f"ep={gpus} peer=autoep"))
    return list(dict.fromkeys(found))


def tiny(row: Row) -> Row:
    name, _, changes = row.case.partition(":")
    return Row(f"{name}:{TINY[name]}" + (",num_hidden_layers=?" if "?" in changes else ""), row.system)


# ---- the largest model ----------------------------------------------------------------------------------------------


def predicted_bytes(case: str, system: str, gpu: str) -> float:
    """Memory of a rank with TiledAdamW (bf16, fp32 master and moments): states, layers' inputs, logits."""
    import torch

    import tedcompile
    from benchmarks import train_step
    from tedcompile import machines

    shape, chosen = parse(system)
    _, sizes, (batch, seq) = train_step.case_of(case)
    model = train_step.build(case, torch.bfloat16, torch.device("meta"))
    example = train_step.example(case, torch.empty(batch, seq, dtype=torch.int64, device="meta"))
    facts = tedcompile.explain(model, shape, example_inputs=example, batch=batch, seq=seq, plan=chosen["plan"],
                               machine=machines.default("cpu" if gpu == "cpu" else "cuda", gpu).name)  # fmt: skip
    total = batch * seq * (2 * sizes["num_hidden_layers"] * model.config.hidden_size)
    total += batch * seq * 10 * model.config.vocab_size / shape.tp  # logits and their gradient, in bf16 and fp32
    for p in facts["parameters"]:
        copies = shape.dp if "ep:" in p["layout"] else shape["data"]
        local = 1
        for size in p["local_shape"]:
            local *= size
        total += local * (4 + 12 / (copies if chosen.get("zero") else 1))
    return total


def largest(row: Row, results: dict[Row, dict], memory: float, gpu: str) -> Row | None:
    """The next number of layers to try, two at a time, from where `memory` (bytes) is predicted to be nearly full.

    None when it is found: a number that fits, and two more that do not.
    """
    at = lambda n: Row(row.case.replace("?", str(n)), row.system)
    tried = {n: "step_ms" in results[at(n)] for n in range(2, 1000, 2) if at(n) in results}
    if any(results[at(n)].get("error", FULL) != FULL for n in tried):
        return None  # it failed for another reason
    if not tried:
        few, more = (predicted_bytes(at(n).case, row.system, gpu) for n in (2, 4))
        return at(max(2, 2 * int((0.93 * memory - few) / (more - few) + 1)))
    n = next(iter(tried))
    while n in tried and not (tried[n] and tried.get(n + 2) is False):
        n += 2 if tried[n] else -2
    return at(n) if n > 0 and n not in tried else None


# ---- results --------------------------------------------------------------------------------------------------------


def load(file: pathlib.Path) -> dict[Row, dict]:
    found: dict[Row, dict] = {}
    for entry in json.loads(file.read_text()) if file.exists() else ():
        values = found.setdefault(Row(entry["case"], entry["system"]), {})
        values |= {k: entry[k] for k in ("versions", "gpu", "clock_mhz", "date")} | {entry["metric"]: entry["value"]}
    return found


def save(file: pathlib.Path, results: dict[Row, dict]) -> None:
    entries = [
        {"benchmark": "many_gpus", "case": row.case, "system": row.system, "metric": metric, "value": found[metric],
         "unit": unit, **{k: found.get(k) for k in ("versions", "gpu", "clock_mhz", "date")}}
        for row, found in results.items() for metric, unit in UNITS.items() if metric in found
    ]  # fmt: skip
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    part.write_text(json.dumps(entries, indent=1) + "\n")
    part.rename(file)


def compare(results: dict[Row, dict]) -> list[str]:
    """Compares what has been run with each other; returns what is wrong."""
    wrong = []
    first: dict[tuple, list[float]] = {}
    for row, found in results.items():
        if "losses" in found:
            key = row.case, parse(row.system)[0]["data"]
            one_gpu = mesh_runs.reference_losses(results.get(Row(row.case, "tp=1"), {}), row.system)
            want = one_gpu or first.setdefault(key, found["losses"])
            pairs = zip(found["losses"], want, strict=True)
            found["worst_loss_difference"] = max(abs(a - b) / abs(b) for a, b in pairs)
        if "handed" in found and sum(found["explained"].values()):
            found["bytes_ratio"] = sum(found["handed"].values()) / sum(found["explained"].values())
        if "error" in found and not row.peer and found["error"] != FULL:
            wrong.append(f"{row}: {found['error']}")
        for metric, low, high in (
            ("worst_loss_difference", 0, TOLERANCE), ("replicas_apart", 0, 0), ("compilations_after_first_step", 0, 0),
            ("bytes_ratio", *((0.5, 2) if "dedup" in found.get("plan", "") else (0.95, 1.05))),
        ):  # fmt: skip
            if not low <= found.get(metric, low) <= high:
                wrong.append(f"{row}: {metric} is {found[metric]:.3g}")
    return wrong


# ---- a peer ---------------------------------------------------------------------------------------------------------


def autoep() -> None:
    """One rank of DeepSpeed's AutoEP: the same case, whole steps with torch's AdamW and ZeRO-1."""
    import statistics

    import deepspeed
    import torch
    import torch.distributed as dist

    from benchmarks import train_step

    deepspeed.init_distributed("nccl")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    model = train_step.build(CASES[0], torch.bfloat16, device)
    config = {
        "train_micro_batch_size_per_gpu": train_step.case_of(CASES[0])[2][0],
        "bf16": {"enabled": True}, "zero_optimization": {"stage": 1}, "zero_allow_untested_optimizer": True,
        "expert_parallel": {"enabled": True, "autoep_size": dist.get_world_size(), "preset_model": "qwen3_moe"},
    }  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
    data, losses, times = train_step.batches(CASES[0], dist.get_rank(), device), [], []
    for i in range(train_step.STEPS + train_step.TIMED):
        dist.barrier()
        torch.cuda.synchronize()
        start = time.perf_counter()
        loss = train_step.loss_of(engine, data[i % len(data)])
        engine.backward(loss)
        engine.step()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
        total = loss.detach().float()
        dist.all_reduce(total)
        losses.append(total.item() / dist.get_world_size())
    step = statistics.median(times[train_step.STEPS :])
    if dist.get_rank() == 0:
        found = {"losses": losses[: train_step.STEPS], "step_ms": 1e3 * step, "gpu": torch.cuda.get_device_name(),
                 "tokens_per_s_per_gpu": data[0].numel() / step,
                 "peak_gib": torch.cuda.max_memory_allocated() / 2**30}  # fmt: skip
        pathlib.Path(os.environ["PEER_RESULT"]).write_text(json.dumps(found))
    dist.destroy_process_group()


# ---- the driver -----------------------------------------------------------------------------------------------------


class Batch(mesh_runs.Driver):
    """Rows whose jobs compile side by side; writes results where mesh_runs.py's driver writes its own."""

    results: dict[Row, dict]

    def report(self) -> bool:
        from benchmarks import train_step
        from tedcompile import machines

        for job in self.jobs:
            found, row = job.result(), Row(job.case, job.mesh)
            if "handed" in found:  # the last that is written
                found |= self.predictions[job.case, job.mesh] | {"date": datetime.date.today().isoformat()}
                found["first_loss"], found["last_loss"] = found["losses"][0], found["losses"][-1]
                _, _, (batch, seq) = train_step.case_of(job.case)
                machine = machines.default("cpu" if found["gpu"] == "cpu" else "cuda", found["gpu"])
                replay = 4 / 3 if parse(job.mesh)[1].get("checkpoint") == "full" else 1
                flops = found["token_flops"] * batch * seq / parse(job.mesh)[0].tp * replay
                found["predicted_ms"] = found["communication_ms"] + 1e3 * flops / machine.rate(2)
            elif job.error and job.error != LATE:
                log = job.log(10**6)
                found = {"error": FULL if "OutOfMemoryError" in log else log[-500:]}
            if "handed" in found or "error" in found:
                self.results[row] = found
        good = not compare(self.results)
        save(self.options.out / "many_gpus.json", self.results)
        return good


def run_peer(row: Row, seconds: float, folder: str) -> dict:
    if importlib.util.find_spec("deepspeed") is None:
        return {"error": "DeepSpeed is not installed"}
    result, log = pathlib.Path(folder, "peer.json"), pathlib.Path(folder, "peer.log")
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(parse(row.system)[0].world)]
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, *command, "-m", "benchmarks.many_gpus", "--peer"], stdout=out, stderr=subprocess.STDOUT,
            env=os.environ | {"PEER_RESULT": str(result)}, start_new_session=True,
        )  # fmt: skip
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
    return json.loads(result.read_text()) if result.exists() else {"error": log.read_text(errors="replace")[-500:]}


def work(options: argparse.Namespace, table: list[Row]) -> list[str]:
    """Works off the table until it is done or the time is over; returns what is wrong."""
    import torch

    gpu = "cpu" if options.cpu else torch.cuda.get_device_name()
    memory = 1e9 if options.cpu else torch.cuda.get_device_properties(0).total_memory
    file, end = options.out / "many_gpus.json", time.monotonic() + options.seconds
    results = load(file) if options.cpu else load(RESULTS / file.name) | load(file)
    if options.retry:
        results = {row: found for row, found in results.items() if "error" not in found}
    ranks = [n for n in (2, 4, 8) if n <= options.gpus]
    flags = ("--meta", "--count", *["--eager"] * options.cpu, "--data", *map(str, ranks))
    longest = 60.0
    for number in itertools.count():
        began = time.monotonic()
        left = end - began
        steps = [largest(row, results, memory, gpu) if "?" in row.case else row for row in table]
        waiting = [row for row in steps if row and row not in results]
        if not waiting or left < longest:  # what is begun should have the time to end
            break
        together = list(itertools.takewhile(lambda row: not (row.alone or row.peer), waiting))[: options.side]
        together = together or waiting[:1]
        with tempfile.TemporaryDirectory() as folder:
            if together[0].peer:
                results[together[0]] = run_peer(together[0], min(left, options.patience), folder)
                save(file, results)
                continue
            jobs = [mesh_runs.Job(row.case, row.system, 0, pathlib.Path(folder, f"{number}-{i}.x"), flags)
                    for i, row in enumerate(together)]  # fmt: skip
            driver = Batch(argparse.Namespace(**vars(options) | {"seconds": min(left, options.patience)}), jobs)
            driver.results = results
            try:
                driver.go()
            finally:
                for job in jobs:
                    job.kill()
            late = [row for row, job in zip(together, jobs, strict=True) if job.error == LATE]
            if left >= options.patience:  # it was not this call that ended too early
                results.update({row: {"error": f"{LATE} ({options.patience:.0f} s)"} for row in late})
            driver.report()
            for row, job in zip(together, jobs, strict=True):
                shown = {k: float(f"{v:.5g}") for k, v in results.get(row, {}).items() if isinstance(v, (int, float))}
                print(row.case, row.system, shown, job.error, job.log() if job.error else "", flush=True)
            longest = max(longest, time.monotonic() - began)
    missing = len([row for row in table if "?" not in row.case and row not in results])
    print(f"{len(table) - missing} of {len(table)} rows are there", flush=True)
    return compare(results)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpus", type=int, choices=MESHES, default=4)
    parser.add_argument("--mesh", help="rows of this one only")
    parser.add_argument("--case", help="rows of cases that begin so only")
    parser.add_argument("--rows", type=int, help="the first so many only")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS, help="what results/ has is not run, either")
    parser.add_argument("--seconds", type=float, default=560.0, help="for everything (560)")
    parser.add_argument("--patience", type=float, default=500.0, help="for rows that run side by side (500)")
    parser.add_argument("--side", type=int, default=4, help="rows that compile side by side (4)")
    parser.add_argument("--cpu", action="store_true", help="tiny sizes, uncompiled, on gloo")
    parser.add_argument("--retry", action="store_true", help="rows that have failed, too")
    parser.add_argument("--list", action="store_true", help="print the rows, run nothing")
    parser.add_argument("--peer", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peer:
        autoep()
        return 0
    table = [tiny(row) if options.cpu else row for row in rows(options.gpus)]
    table = [row for row in table if (options.mesh or row.system.split()[0]) == row.system.split()[0]]
    table = [row for row in table if row.case.startswith(options.case or "")][: options.rows]
    if options.list:
        print(*(f"{row.case}  {row.system}" for row in table), sep="\n")
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the processes of its rows end, too
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", folder)
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "4")
        wrong = work(options, table)
    print(*wrong, "NOT every check passed" if wrong else "every check passed", sep="\n", flush=True)
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
