"""Kills ranks of a training run at random moments; torchrun starts all again, and the run ends as one without a kill.

    python -m tests.soak --kills 30

Each round is a run under `torchrun --max-restarts`; a rank is killed (SIGKILL) at a random time after the start, or
after a step: while it imports, compiles, runs, or writes a checkpoint. Checked: losses are those of the unbroken run,
at most one interval of checkpoints is lost, and no process is left behind.

Then one run under `torchrun --nnodes 1:2`: one node trains alone, a second one joins, and is lost again.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parent.parent
STEPS, EVERY = 24, 4
LATE = "it had ended before"
MODEL = """
import sys
sys.path.insert(0, {root!r})
from examples.nano_moe import build as nano_moe

def build():
    return nano_moe(seq=16, vocab=256, experts=4, layers=1)
"""
# Put behind it: rank 1 kills itself after each restart, in a forward, in an optimizer's step, writing a checkpoint.
KILLS = """
import os, pathlib, signal, time
import torch.distributed as dist
from tedcompile import checkpoint
from tedcompile.optim import TiledAdamW

newest = pathlib.Path(__file__).parent / "broken" / "checkpoints" / "step-00000004"
restart = os.environ.get("TORCHELASTIC_RESTART_COUNT") if os.environ.get("RANK") == "1" else ""
steps, update, exchange, write = [], TiledAdamW.step, dist.all_to_all_single, checkpoint._write_pieces

def die():
    while not newest.exists():
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)

def step(*args):
    steps.append(0)
    if restart == "1" and len(steps) == 3:
        die()
    return update(*args)

def all_to_all_single(*args, **kwargs):
    if restart == "0" and len(steps) == 6:
        die()
    return exchange(*args, **kwargs)

def write_pieces(path, *args):
    if restart == "2":
        path.write_bytes(b"half")
        die()
    return write(path, *args)

if restart:
    TiledAdamW.step, dist.all_to_all_single, checkpoint._write_pieces = step, all_to_all_single, write_pieces
"""

# Put behind it: alone, it waits in step 6 for a second node; as rank 1 of two, it dies in its step 4, with torchrun.
ELASTIC = """
import os, pathlib, signal, time
import torch.distributed as dist
from tedcompile.optim import TiledAdamW

joined = pathlib.Path(__file__).parent / "joined"
steps, update = [], TiledAdamW.step

def step(*args):
    steps.append(0)
    while len(steps) == 6 and dist.get_world_size() == 1 and not joined.exists():
        time.sleep(0.01)
    if len(steps) == 4 and dist.get_rank() == 1:
        os.kill(os.getppid(), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)
    return update(*args)

TiledAdamW.step = step
"""


def options(place: pathlib.Path, out: str, mesh: str, steps: int = STEPS) -> list[str]:
    if not (place / "model.py").exists():
        (place / "model.py").write_text(MODEL.format(root=str(ROOT)))
    (place / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 200)
    fixed = "--seq 16 --batch 2 --micro-batches 4 --dtype fp32 --device cpu --backend eager --log-every 1"
    fixed += " --plan dispatch=all_to_all"
    return [
        *("train", "--model", f"{place / 'model.py'}:build", "--data", str(place / "text.txt"), *fixed.split()),
        *("--lr", "1e-2", "--eps", "1e-4"),
        *("--out", str(place / out), "--mesh", mesh, "--steps", str(steps), "--save-every", str(EVERY), "--zero", "1"),
    ]


def losses(folder: pathlib.Path) -> dict[int, float]:
    """By step; what is not (yet) a whole line is left out."""
    file, found = folder / "metrics.jsonl", {}
    for line in file.read_text().splitlines() if file.exists() else ():
        try:
            values = json.loads(line)
        except ValueError:
            continue
        found[values["step"]] = values["loss"]
    return found


def children(pid: int) -> list[int]:
    """Of a process, by /proc."""
    try:
        text = "".join(p.read_text() for p in pathlib.Path(f"/proc/{pid}/task").glob("*/children"))
    except OSError:
        return []
    return [int(p) for p in text.split()]


def workers(launcher: int) -> list[int]:
    """The ranks of a torchrun: its children that run tedcompile."""
    found = []
    for pid in children(launcher):
        try:
            if b"tedcompile.cli" in pathlib.Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
        except OSError:
            continue
    return found


def launch(
    place: pathlib.Path,
    out: str,
    mesh: str,
    ranks: int,
    restarts: int = 3,
    elastic: tuple[str, ...] = (),
    log: str = "",
) -> subprocess.Popen:
    """A torchrun of `ranks` processes; `elastic`: its options as one of several nodes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    command += ["--max-restarts", str(restarts), "--monitor-interval", "0.2", *(elastic or ["--standalone"])]
    command += ["-m", "tedcompile.cli", *options(place, out, mesh)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    if elastic:
        environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    if sys.platform == "linux":
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    file = (place / f"{log or out}.log").open("a")
    return subprocess.Popen(command, env=environment, stdout=file, stderr=file, cwd=place)


def finish(process: subprocess.Popen, timeout: float) -> int:
    try:
        return process.wait(timeout)
    finally:
        process.kill()


def wait_for(process: subprocess.Popen, ready, timeout: float = 300.0) -> None:
    deadline = time.monotonic() + timeout
    while not ready() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)


def resumed(log: str) -> list[int]:
    """The steps from which a run went on."""
    return [int(line.rsplit(" ", 1)[1]) for line in log.splitlines() if line.startswith("goes on from")]


def check(expected: dict[int, float], found: dict[int, float], last_seen: int, went_on: list[int]) -> list[str]:
    """What is wrong with a broken run beside the unbroken one."""
    wrong = []
    for step, loss in expected.items():
        if step not in found or abs(found[step] / loss - 1) > 1e-5:
            wrong.append(f"step {step} has the loss {found.get(step)}, not {loss}")
    if went_on and last_seen - went_on[-1] > 2 * EVERY:  # the last interval, and one whose checkpoint was being written
        wrong.append(f"went on from step {went_on[-1]} after step {last_seen}")
    return wrong


def broken(place: pathlib.Path, out: str, mesh: str, ranks: int, moment) -> tuple[dict[int, float], list[str]]:
    """A run in which one rank is killed when `moment(process, folder)` returns. Its losses, and what went wrong."""
    process = launch(place, out, mesh, ranks)
    wrong = []
    try:
        wait_for(process, lambda: len(workers(process.pid)) == ranks)
        first = workers(process.pid)
        moment(process, place / out)
        seen = max(losses(place / out), default=0)
        if process.poll() is not None or not first:
            wrong.append(LATE)
        else:
            os.kill(random.choice(first), signal.SIGKILL)
        wait_for(process, lambda: any(p not in first for p in workers(process.pid)))
        second = workers(process.pid)
        if code := finish(process, 300):
            wrong.append(f"exit code {code}: {(place / f'{out}.log').read_text()[-2000:]}")
        left = [p for p in {*first, *second} if pathlib.Path(f"/proc/{p}/cmdline").exists()]
        if left:
            wrong.append(f"processes are left: {left}")
    finally:
        for pid in workers(process.pid):
            os.kill(pid, signal.SIGKILL)
        process.kill()
    log = (place / f"{out}.log").read_text()
    return losses(place / out), wrong + check({}, {}, seen, resumed(log))


def elastic(place: pathlib.Path, expected: dict[int, float]) -> list[str]:
    """A run on one node, then on two, then on one again; what went wrong."""
    options(place, "elastic", "ep=2 / dp=1")
    with (place / "model.py").open("a") as file:
        file.write(ELASTIC)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def node(name: str) -> subprocess.Popen:
        alive = f"last_call_timeout=1,keep_alive_interval=1,keep_alive_max_attempt=5,is_host={int(name == 'first')}"
        words = f"--nnodes 1:2 --rdzv-backend c10d --rdzv-endpoint 127.0.0.1:{port} --rdzv-id soak --rdzv-conf {alive}"
        words += " --local-addr 127.0.0.1"
        return launch(place, "elastic", "ep=2 / dp=1", 1, elastic=tuple(words.split()), log=name)

    first, log = node("first"), place / "first.log"
    nodes = [first]
    try:
        wait_for(first, lambda: max(losses(place / "elastic"), default=0) == 5)
        nodes.append(node("second"))
        wait_for(first, lambda: "signal SIGTERM" in log.read_text())  # the first node's torchrun makes room
        (place / "joined").touch()
        code = finish(first, 300)
    finally:
        for process in nodes:
            for pid in workers(process.pid):
                os.kill(pid, signal.SIGKILL)
            process.kill()
    wrong = check(expected, losses(place / "elastic"), 0, [])
    went_on = resumed(log.read_text())
    if code or [step // EVERY for step in went_on] != [1, 2]:  # to two nodes after step 6 or 7, and back after step 8
        wrong.append(f"exit code {code}, went on from {went_on}: {log.read_text()[-2000:]}")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    random.seed(args.seed)
    failed = 0
    with tempfile.TemporaryDirectory() as name:
        place = pathlib.Path(name)
        start = time.monotonic()
        code = finish(launch(place, "whole", "ep=2", 2), 600)
        seconds = time.monotonic() - start
        expected = losses(place / "whole")
        assert code == 0 and len(expected) == STEPS, (place / "whole.log").read_text()
        for number in range(args.kills):
            delay, step = random.uniform(0, seconds * 0.8), random.randint(1, STEPS - 2)
            early = number % 3 == 0

            def moment(process, folder, early=early, delay=delay, step=step):
                if early:
                    time.sleep(delay)
                else:
                    wait_for(process, lambda: max(losses(folder), default=0) >= step)

            found, wrong = broken(place, f"run{number}", "ep=2", 2, moment)
            missed = LATE in wrong
            wrong = [w for w in wrong if w != LATE] + check(expected, found, 0, [])
            failed += bool(wrong)
            when = f"after {delay:.1f} s" if early else f"after step {step}"
            when += f" ({LATE})" * missed
            print(f"{number + 1}/{args.kills} killed {when}: {'ok' if not wrong else '; '.join(wrong)}", flush=True)
        wrong = elastic(place, expected)
        print(f"a second node that comes and is lost: {'; '.join(wrong) or 'ok'}", flush=True)
    print(f"{args.kills - failed} of {args.kills} broken runs ended as the unbroken one")
    return 1 if failed or wrong else 0


if __name__ == "__main__":
    sys.exit(main())
