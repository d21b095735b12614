"""What each optimisation saves on a link of 200 mbit/s, measured beside the cost model: python -m benchmarks.slow_link

Two "hosts" are network namespaces joined by a veth pair whose two ends `tc` limits; two gloo processes run in each, tp
inside a host and ep across. A Qwen3-MoE of two layers trains (every layer replayed, checkpoint="full") under each plan
in turn: median step time, and the bytes of a step that the veth's own counters saw leave the first host, headers
included. Beside them what `explain` and the constants of the machine two_slow_hosts predict: every collective by its
alpha-beta cost, and the model's FLOPs at the machine's rate, with no overlap and no memory-bound work.
All plans must give the same losses. Needs root, and `ip` and `tc` of iproute2. Writes results/slow_link.json.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import pathlib
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

import torch
import torch.distributed as dist
import transformers
from torch.utils.flop_counter import FlopCounterMode

import tedcompile
from benchmarks.communication import OPTIMISATIONS
from tedcompile import machines
from tedcompile.mesh import MeshShape

MESH = MeshShape(dp=1, ep=2, tp=2)
MACHINE = "two_slow_hosts"
RATE = "200mbit"  # as machines.toml has it
BATCH, SEQ = 8, 128
SIZES = dict(hidden_size=256, moe_intermediate_size=64, num_experts=16, num_experts_per_tok=4, num_hidden_layers=2,
             num_attention_heads=8, num_key_value_heads=4, head_dim=32, vocab_size=512, intermediate_size=64,
             norm_topk_prob=True, bos_token_id=None, eos_token_id=None)  # fmt: skip
CASE = "qwen3_2layers"
SYSTEMS = OPTIMISATIONS | {
    "split experts, dedup": dict(plan=dict(experts="tensor", dispatch="dedup", drop="yes")),
    "split experts, all_gather": dict(plan=dict(experts="tensor", dispatch="all_gather", drop="yes")),
    "folded experts, all_to_all": dict(plan=dict(experts="folded", dispatch="all_to_all")),
    "folded experts, dedup": dict(plan=dict(experts="folded", dispatch="dedup")),
    "folded experts, all_gather": dict(plan=dict(experts="folded", dispatch="all_gather")),
    "the cost model's plan": dict(),
}
UNITS = {"step_ms": "ms", "fastest_ms": "ms", "predicted_ms": "ms", "time_ratio": "1", "link_mib": "MiB",
         "predicted_link_mib": "MiB", "bytes_ratio": "1"}  # fmt: skip


def build() -> tuple[torch.nn.Module, list[dict[str, torch.Tensor]]]:
    """The model, and the batch of each data rank."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model("qwen3_moe", **SIZES))
    ids = torch.randint(SIZES["vocab_size"], (MESH["data"], BATCH, SEQ))
    return model.float().train(), [dict(input_ids=x, labels=x) for x in ids]


# ---- one rank -------------------------------------------------------------------------------------------------------


def work(options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(minutes=10))
    mesh = dist.init_device_mesh("cpu", (MESH.dp, MESH.ep, MESH.tp), mesh_dim_names=("dp", "ep", "tp"))
    counter = pathlib.Path("/sys/class/net", os.environ["GLOO_SOCKET_IFNAME"], "statistics/tx_bytes")
    runs = {}
    for system in options.systems:
        model, batches = build()
        batch = batches[tedcompile.data_rank(mesh)]
        tedcompile.parallelize(
            model, mesh, example_inputs=batch, backend="eager", checkpoint="full", machine=MACHINE, **SYSTEMS[system]
        )
        runs[system] = model, torch.optim.SGD(model.parameters(), lr=0.1), {"seconds": [], "sent": [], "losses": []}
    for step in range(options.steps + 1):  # in turn, so that what else the machine does falls on all of them
        for model, optimizer, found in runs.values():
            dist.barrier()
            before, start = int(counter.read_text()), time.perf_counter()
            loss = model(**batch).loss
            loss.backward()
            dist.barrier()
            if step:  # the first one compiles
                found["seconds"].append(time.perf_counter() - start)
                found["sent"].append(int(counter.read_text()) - before)
            found["losses"].append(loss.item())
            optimizer.step()
            optimizer.zero_grad()
    results = {}
    for system, (_, _, found) in runs.items():
        everyone: list = [None] * MESH.world
        dist.all_gather_object(everyone, found["losses"])
        results[system] = found | {"losses": everyone}
    if dist.get_rank() == 0:
        options.out.write_text(json.dumps(results))
    dist.destroy_process_group()


# ---- two hosts ------------------------------------------------------------------------------------------------------


def missing() -> str:
    """What keeps this benchmark from running here; empty if nothing does."""
    if not sys.platform.startswith("linux"):
        return "network namespaces are Linux's"
    tools = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if tools:
        return f"{' and '.join(tools)} not found: install iproute2"
    return "" if os.geteuid() == 0 else "network namespaces need root: run as root"


def tool(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr.strip() or done.returncode}")


@contextlib.contextmanager
def hosts(rate: str) -> Iterator[list[tuple[str, str, str]]]:
    """Two namespaces joined by a link of that rate each way, as (namespace, interface, address); gone afterwards."""
    mark = f"ted{os.getpid()}"
    ends = [(f"{mark}-{i}", f"{mark}v{i}", f"10.77.0.{i + 1}") for i in range(2)]
    try:
        for name, _, _ in ends:
            tool("ip", "netns", "add", name)
        (a, a_end, _), (b, b_end, _) = ends
        tool("ip", "link", "add", a_end, "netns", a, "type", "veth", "peer", "name", b_end, "netns", b)
        for name, interface, address in ends:
            inside = ("ip", "netns", "exec", name)
            tool(*inside, "ip", "addr", "add", f"{address}/24", "dev", interface)
            for link in ("lo", interface):
                tool(*inside, "ip", "link", "set", link, "up")
            limit = ("tbf", "rate", rate, "burst", "256kb", "latency", "400ms")
            tool(*inside, "tc", "qdisc", "add", "dev", interface, "root", *limit)
        yield ends
    finally:
        for name, _, _ in ends:  # a namespace takes its end of the link along
            subprocess.run(("ip", "netns", "del", name), capture_output=True)


def measure(options: argparse.Namespace) -> dict[str, dict]:
    """The results of all systems, of four processes on two hosts. RuntimeError with their output if one fails."""
    with hosts(options.rate) as ends, tempfile.TemporaryDirectory() as folder:
        out = pathlib.Path(folder, "results.json")
        processes, logs = [], []
        try:
            for rank in range(MESH.world):
                name, interface, _ = ends[rank // MESH.tp]
                place = dict(RANK=rank, WORLD_SIZE=MESH.world, LOCAL_RANK=rank % MESH.tp, LOCAL_WORLD_SIZE=MESH.tp,
                             MASTER_ADDR=ends[0][2], MASTER_PORT=29500, GLOO_SOCKET_IFNAME=interface,
                             OMP_NUM_THREADS=1)  # fmt: skip
                command = ["ip", "netns", "exec", name, sys.executable, "-m", "benchmarks.slow_link", "--worker"]
                command += ["--out", str(out), "--steps", str(options.steps), "--systems", *options.systems]
                environment = {**os.environ, **{k: str(v) for k, v in place.items()}}
                logs.append(pathlib.Path(folder, f"{rank}.log"))
                with logs[-1].open("w") as log:
                    to = None if rank == 0 else log
                    processes.append(subprocess.Popen(command, env=environment, stdout=to, stderr=log))
            while any(p.poll() is None for p in processes):
                if any(p.poll() for p in processes):
                    time.sleep(3)  # for the others to say what they know
                    break
                time.sleep(0.2)
        finally:
            for p in processes:
                p.kill()
                p.wait()
        if not out.exists():
            raise RuntimeError("\n".join(f"--- rank {i}\n{log.read_text()[-3000:]}" for i, log in enumerate(logs)))
        return json.loads(out.read_text())


# ---- the prediction -------------------------------------------------------------------------------------------------


def predict(machine: machines.Machine, model: torch.nn.Module, batch: dict, flops: float, system: str) -> dict:
    """Milliseconds of a step, and MiB that leave a host in it."""
    found = tedcompile.explain(
        model, MESH, example_inputs=batch, checkpoint="full", machine=MACHINE, **SYSTEMS[system]
    )["collectives"]
    seconds = machine.product(flops, BATCH * SEQ, SIZES["hidden_size"] / MESH.tp, 4)
    link = 0.0
    for row in found:
        where = machines.place(row["axis"], MESH, machine)
        seconds += row["count"] * (sum(machine.collective(row["kind"], row["bytes_per_rank"], where)) + machine.launch)
        if row["kind"] == "all_to_all":  # from every rank to those outside
            across = machine.ranks_per_node * (where.size - where.inside) / (where.size - 1)
        else:  # a ring leaves the host once
            across = machine.ranks_per_node / where.inside if where.inside < where.size else 0
        link += row["count"] * row["wire_bytes"] * across
    return {"predicted_ms": 1e3 * seconds, "predicted_link_mib": link / 2**20}


def flops_of_a_rank(model: torch.nn.Module, batch: dict) -> float:
    """Of forward, replay and backward, all split over tp."""
    model.set_experts_implementation("eager")
    totals = []
    with FlopCounterMode(display=False) as counter:
        loss = model(**batch).loss
        totals.append(counter.get_total_flops())
        loss.backward()
        totals.append(counter.get_total_flops())
    return (totals[0] + totals[1]) / MESH.tp


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results" / "slow_link.json"
    )
    parser.add_argument("--steps", type=int, default=7, help="timed steps of each system (7)")
    parser.add_argument("--systems", nargs="+", default=list(SYSTEMS), choices=list(SYSTEMS), metavar="SYSTEM")
    parser.add_argument("--rate", default=RATE, help=f"of the link, as tc takes it ({RATE}, what is predicted for)")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options)
        return 0
    if why := missing():
        print(f"slow_link: {why}", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the hosts are taken down
    try:
        results = measure(options)
    except RuntimeError as error:
        print(f"slow_link: {error}", file=sys.stderr)
        return 1
    machine = machines.load(MACHINE)
    model, batches = build()
    flops = flops_of_a_rank(build()[0], batches[0])
    facts = {"versions": {"torch": torch.__version__, "transformers": transformers.__version__}, "gpu": None,
             "clock_mhz": None, "date": datetime.date.today().isoformat()}  # fmt: skip
    rows = []
    first = torch.tensor(next(iter(results.values()))["losses"])
    for system, found in results.items():
        apart = ((torch.tensor(found["losses"]) - first).abs() / first).max().item()
        assert apart < 1e-5, f"the losses of {system!r} differ by {apart:.1e}"
        values = {"step_ms": 1e3 * statistics.median(found["seconds"]), "fastest_ms": 1e3 * min(found["seconds"])}
        values["link_mib"] = statistics.median(found["sent"]) / 2**20
        values |= predict(machine, model, batches[0], flops, system)
        values["time_ratio"] = values["step_ms"] / values["predicted_ms"]
        values["bytes_ratio"] = values["link_mib"] / values["predicted_link_mib"]
        rows += [{"benchmark": "slow_link", "case": CASE, "system": system, "metric": metric, "value": values[metric],
                  "unit": unit, **facts} for metric, unit in UNITS.items()]  # fmt: skip
        print(system, {k: float(f"{v:.4g}") for k, v in values.items()}, [round(s, 2) for s in found["seconds"]])
    print(f"the losses of all {len(results)} systems are equal to 1e-5")
    options.out.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
