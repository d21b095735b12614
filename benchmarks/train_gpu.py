"""From checkpoint to checkpoint on two GPUs: does a run that is killed and goes on elsewhere give the model back?

    python -m benchmarks.train_gpu                # two GPUs, NCCL, about five minutes; $OUT/train_gpu.json, or --out
    python -m benchmarks.train_gpu --cpu          # a tiny model on gloo, to try this file

Two layers of Qwen3-30B-A3B's widths with 32 experts, as transformers saves them, are trained by `tedcompile train` in
bf16 (compiled, fp32 masters, ZeRO-1) on the mesh ep=2. One rank is killed (SIGKILL) after a step; the run goes on from
its checkpoint on the mesh dp=2, to the end, and exports. Checked:

- the first step's loss is that of the plain model with the weights of the folder, on the same micro-batches;
- steps done twice, before the kill on ep=2 and after it on dp=2, have the same loss;
- the exported tensors are bit for bit those of the last checkpoint;
- the plain model, from the export, has the held-out loss that the run has reported last;
- its logits are those of the parallel model that is loaded from the export, in fp32.

The exit code is 1 unless all of it holds.
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
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from typing import Any

ROOT = pathlib.Path(__file__).parent.parent
STEPS, EVERY, KILL = 30, 10, 14  # of the run, of its checkpoints, and the step after which a rank is killed
GPU = dict(hidden_size=2048, num_hidden_layers=2, num_attention_heads=32, num_key_value_heads=4, head_dim=128,
           vocab_size=8192, num_experts=32, num_experts_per_tok=8, moe_intermediate_size=768)  # fmt: skip
CPU = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
           vocab_size=256, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)  # fmt: skip
SHAPES = {"cuda": (GPU, 2048, 2), "cpu": (CPU, 32, 2)}  # configuration, seq, batch
MICRO_BATCHES, HELD_OUT = 4, 4
RUN = {"cuda": ["--dtype", "bf16", "--lr", "1e-4"],
       "cpu": ["--dtype", "fp32", "--lr", "1e-3", "--eps", "1e-4", "--backend", "eager"]}  # fmt: skip
# relative differences: of losses in the run's precision, of logits in fp32 by other kernels
LIMITS = {"cuda": {"loss": 2e-2, "logits": 1e-3}, "cpu": {"loss": 1e-4, "logits": 1e-4}}


# ---- the parts in processes of their own


def make(folder: pathlib.Path, device: str) -> None:
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    with torch.device(device):
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**SHAPES[device][0], norm_topk_prob=True))
    model.to(torch.bfloat16 if device == "cuda" else torch.float32).save_pretrained(folder)


def plain(folder: pathlib.Path, device: str) -> Any:
    """The model as transformers loads it, its experts a loop, in fp32."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    model.set_experts_implementation("eager")
    return model


def compare(place: pathlib.Path, device: str) -> None:
    """Under torchrun; the first rank writes place/compared.json."""
    import torch
    import torch.distributed as dist
    from transformers import AutoConfig, AutoModelForCausalLM

    import tedcompile
    from tedcompile import data
    from tedcompile.checkpoint import Source
    from tedcompile.lazy import everything

    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    mesh = dist.init_device_mesh(device, (1, 2, 1), mesh_dim_names=("dp", "ep", "tp"))
    _, seq, batch = SHAPES[device]
    sequences = data.Sequences(next((place / "run").glob("tokens-*")), seq)
    held_out = sequences.read(range(sequences.count - HELD_OUT * batch, sequences.count)).to(device).split(batch)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(place / "export"), dtype=torch.float32)
    model = tedcompile.parallelize(model, mesh, weights=place / "export", backend="eager").eval()
    with torch.no_grad():
        logits = model(input_ids=held_out[0]).logits.cpu()
    if dist.get_rank() == 0:
        found: dict[str, float] = {}
        with torch.no_grad():
            whole = plain(place / "export", device)
            want = whole(input_ids=held_out[0]).logits.cpu()
            found["logits"] = ((logits - want).norm() / want.norm()).item()
            found["exported_loss"] = sum(whole(input_ids=b, labels=b).loss.item() for b in held_out) / HELD_OUT
            saved = Source(place / "run" / "checkpoints" / f"step-{STEPS:08}")
            different = 0
            for name, p in whole.named_parameters():
                value = saved.read(f"model/{name}", everything(p.shape))
                different += not value.float().equal(p.cpu())
            found["exported_tensors"], found["different_tensors"] = len(list(whole.parameters())), different
            del whole
            first = plain(place / "model", device)
            train_data = data.MicroBatches(sequences, batch, 0, HELD_OUT * batch)
            losses = [train_data.read(i).to(device) for i in range(MICRO_BATCHES)]
            found["first_loss"] = sum(first(input_ids=b, labels=b).loss.item() for b in losses) / MICRO_BATCHES
        (place / "compared.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


# ---- the driver


def torchrun(*command: str) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *command]


def start(command: list[str], log: pathlib.Path) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}
    environment.setdefault("OMP_NUM_THREADS", "1")
    with log.open("a") as out:
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )


def ranks(launcher: int) -> list[int]:
    """The processes that a torchrun has started."""
    found = []
    for stat in pathlib.Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(stat.read_text().rpartition(")")[2].split()[1]) == launcher:
                command = (stat.parent / "cmdline").read_bytes()
                found += [int(stat.parent.name)] * (b"tedcompile.cli" in command)
    return sorted(found)


def losses(run: pathlib.Path, name: str = "loss") -> dict[int, float]:
    found = {}
    for line in (run / "metrics.jsonl").read_text().splitlines() if (run / "metrics.jsonl").exists() else ():
        with contextlib.suppress(ValueError):  # half a line
            values = json.loads(line)
            found |= {values["step"]: values[name]} if name in values else {}
    return found


class Failed(Exception):
    """A part of the run ended in another way than it should."""


class Drive:
    def __init__(self, place: pathlib.Path, device: str, deadline: float):
        self.place, self.device, self.deadline = place, device, time.monotonic() + deadline
        self.run, self.seconds, self.processes = place / "run", {}, []
        _, seq, batch = SHAPES[device]
        self.options = [
            *("--model", str(place / "model"), "--tokenizer", "bytes", "--data", str(place / "text.txt")),
            *("--seq", str(seq), "--batch", str(batch), "--micro-batches", str(MICRO_BATCHES), "--warmup", "5"),
            *("--steps", str(STEPS), "--save-every", str(EVERY), "--keep", "2", "--log-every", "1"),
            *("--eval-every", str(STEPS), "--eval-batches", str(HELD_OUT), "--device", device),
            *("--out", str(self.run), "--export", str(place / "export"), *RUN[device]),
        ]

    def part(self, name: str, command: list[str], work: Callable[[subprocess.Popen], None] | None = None) -> int:
        """Runs it to its end, `work` meanwhile; its exit code."""
        began, log = time.monotonic(), self.place / f"{name}.log"
        process = start(command, log)
        self.processes.append(process)
        try:
            if work:
                work(process)
            code = process.wait(max(1.0, self.deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise Failed(f"{name} is not done in time: {log.read_text()[-3000:]}") from None
        finally:
            self.seconds[name] = round(time.monotonic() - began, 1)
            print(f"{name}: {self.seconds[name]} s", flush=True)
        return code

    def good(self, name: str, command: list[str]) -> None:
        if code := self.part(name, command):
            raise Failed(f"{name} ended with {code}: {(self.place / f'{name}.log').read_text()[-3000:]}")

    def kill(self, process: subprocess.Popen) -> None:
        """The last rank, after the step KILL, when there is a checkpoint."""
        newest = self.run / "checkpoints" / f"step-{EVERY:08}"
        while max(losses(self.run), default=0) < KILL or not newest.exists():
            if process.poll() is not None or time.monotonic() > self.deadline:
                raise Failed(f"the run ended before the kill: {(self.place / 'train.log').read_text()[-3000:]}")
            time.sleep(0.02)
        os.kill(ranks(process.pid)[-1], signal.SIGKILL)
        self.killed = time.monotonic()

    def stop(self) -> None:
        for process in self.processes:
            for pid in ranks(process.pid) if process.poll() is None else ():
                os.kill(pid, signal.SIGKILL)
            process.kill()

    def results(self) -> dict[str, Any]:
        own = [sys.executable, "-m", "benchmarks.train_gpu", *["--cpu"] * (self.device == "cpu")]
        files = sorted(pathlib.Path(sysconfig.get_path("stdlib")).glob("*.py"))
        (self.place / "text.txt").write_bytes(b"\n".join(f.read_bytes() for f in files))
        self.good("make", [*own, "--make", str(self.place)])
        train = ["-m", "tedcompile.cli", "train", *self.options]
        if self.part("train", torchrun(*train, "--mesh", "ep=2"), self.kill) == 0:
            raise Failed("the run ended well though a rank was killed")
        self.seconds["train, after the kill"] = round(time.monotonic() - self.killed, 1)
        before = losses(self.run)
        self.good("resume", torchrun(*train, "--mesh", "dp=2"))
        after = losses(self.run)
        said = [x for x in (self.place / "resume.log").read_text().splitlines() if x.startswith("goes on from")]
        self.good("compare", torchrun("-m", *own[2:], "--compare", str(self.place)))
        compared = json.loads((self.place / "compared.json").read_text())

        went_on = int(said[0].rsplit(" ", 1)[1]) if said else 0
        twice = {s: abs(after[s] / before[s] - 1) for s in before if s > went_on and s in after}
        reported, first = losses(self.run, "eval_loss")[STEPS], before[1]
        limits = LIMITS[self.device]
        checks = {
            "first step against the plain model": (abs(first / compared["first_loss"] - 1), limits["loss"]),
            "steps done on both meshes": (max(twice.values(), default=1.0), limits["loss"]),
            "tensors of the export not as in the checkpoint": (compared["different_tensors"], 0),
            "held-out loss of the export": (abs(reported / compared["exported_loss"] - 1), limits["loss"]),
            "logits of the export": (compared["logits"], limits["logits"]),
            "steps missing": (STEPS - len(after), 0),
            "checkpoint gone on from is of another step": (int(went_on not in (EVERY, 2 * EVERY)), 0),
            "loss at the end, of that at the start": (after[STEPS] / first, 0.9),
        }
        rows = [json.loads(x) for x in (self.run / "metrics.jsonl").read_text().splitlines()]
        speed = {n: [r[n] for r in rows if n in r][-2:] for n in ("tokens_per_second", "memory_gib", "mfu")}
        return {
            "checks": {n: {"value": v, "limit": limit, "ok": bool(v <= limit)} for n, (v, limit) in checks.items()},
            "went_on_from": went_on,
            "steps_done_twice": len(twice),
            "losses_before": before,
            "losses_after": after,
            **compared,
            **speed,
            "checkpoint_gib": _size(self.run / "checkpoints" / f"step-{STEPS:08}") / 2**30,
        }


def _size(folder: pathlib.Path) -> int:
    return sum(p.stat().st_size for p in folder.iterdir())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="gloo, a tiny model")
    parser.add_argument("--out", type=pathlib.Path, default=os.environ.get("OUT"), help="folder for train_gpu.json")
    parser.add_argument("--seconds", type=float, default=540, help="in which all must be done")
    parser.add_argument("--make", type=pathlib.Path, help=argparse.SUPPRESS)
    parser.add_argument("--compare", type=pathlib.Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    device = "cpu" if args.cpu else "cuda"
    if args.make:
        make(args.make / "model", device)
        return 0
    if args.compare:
        compare(args.compare, device)
        return 0
    import torch
    import transformers

    if not args.cpu and torch.cuda.device_count() < 2:
        parser.error("two GPUs are needed: --cpu tries the same with a tiny model")
    place = pathlib.Path(tempfile.mkdtemp())
    drive = Drive(place, device, args.seconds)
    result: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "device": "cpu" if args.cpu else torch.cuda.get_device_name(),
        "model": SHAPES[device][0],
    }
    try:
        result |= drive.results()
    except Exception as error:
        result["error"] = f"{type(error).__name__}: {error}"
    finally:
        drive.stop()
        shutil.rmtree(place, ignore_errors=True)
    result["seconds"] = drive.seconds
    for name, check in result.get("checks", {}).items():
        print(f"{'ok ' if check['ok'] else 'BAD'} {name}: {check['value']:.2g}, at most {check['limit']:g}")
    if "error" in result:
        print(result["error"])
    if args.out:
        pathlib.Path(args.out).mkdir(parents=True, exist_ok=True)
        (pathlib.Path(args.out) / "train_gpu.json").write_text(json.dumps(result, indent=1) + "\n")
    return 0 if "error" not in result and all(c["ok"] for c in result["checks"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
