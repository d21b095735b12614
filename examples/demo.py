"""What `make demo` runs: a small Qwen3-MoE learns Python from the standard library's own sources.

It trains twice from the same weights on the same batches: once as plain Hugging Face code on one process, once through
`tedcompile.parallelize` on four (NCCL with four GPUs, gloo on CPUs otherwise). It then shows both losses side by side,
and the collectives of one MoE layer. Exit code 1: the loss did not fall, or the two runs differ.

    python examples/demo.py [--steps 40] [--backend inductor|eager]
"""

import argparse
import os
import socket
import sys
import sysconfig
import time
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", TOKENIZERS_PARALLELISM="false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # four processes share the cores, and waiting OpenMP threads spin

import torch
import torch.multiprocessing as mp
from tabulate import tabulate
from torch import Tensor
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

MESH = {"dp": 1, "ep": 2, "tp": 2}
WORLD = MESH["dp"] * MESH["ep"] * MESH["tp"]
DATA_WORLD = MESH["dp"] * MESH["ep"]  # each of these ranks brings its own batch; tp ranks share one
BATCH, SEQ = 4, 128
LEARNING_RATE, EPS = 1e-3, 1e-4  # with AdamW's default eps, 1e-8, rounding errors grow 10,000-fold within 40 steps
MAX_DIFFERENCE = 1e-3  # of the two losses of a step, relative, in fp32
MIN_FALL = 1.0  # of the loss over the run, in nats per byte

CONFIG = Qwen3MoeConfig(
    vocab_size=256,
    hidden_size=128,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    num_experts=8,
    num_experts_per_tok=2,
    moe_intermediate_size=224,
    max_position_embeddings=SEQ,
    norm_topk_prob=True,
)


def read_sources() -> Tensor:
    """The top-level modules of the standard library, in order of name, as one uint8 tensor."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return torch.frombuffer(bytearray(b"\n".join(f.read_bytes() for f in files)), dtype=torch.uint8)


def read_batch(data: Tensor, step: int, data_rank: int) -> Tensor:
    """Token ids (BATCH, SEQ), int64: the batch of that data rank at that step, the same in every process."""
    generator = torch.Generator().manual_seed(step * DATA_WORLD + data_rank)
    starts = torch.randint(len(data) - SEQ, (BATCH, 1), generator=generator)
    return data[starts + torch.arange(SEQ)].long()


def make_model() -> Qwen3MoeForCausalLM:
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(CONFIG)


def progress(step: int, steps: int, loss: float, seconds: float) -> None:
    """Draws the bar in place on a terminal; elsewhere one line every ten steps. `seconds` is the time of this step."""
    done = 30 * (step + 1) // steps
    rate = DATA_WORLD * BATCH * SEQ / seconds
    line = f"  [{'#' * done}{'.' * (30 - done)}] step {step + 1:3}/{steps}  loss {loss:.4f}  {rate:8,.0f} tokens/s"
    if sys.stdout.isatty():
        print(f"\r{line}", end="\n" if step + 1 == steps else "", flush=True)
    elif (step + 1) % 10 == 0 or step + 1 == steps:
        print(line, flush=True)


def train_plain(steps: int, device: str) -> list[float]:
    """The reference: the plain model, called once per data rank's batch, stepping on the mean of those losses."""
    data, model = read_sources(), make_model().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, eps=EPS)
    losses = []
    for step in range(steps):
        start, total = time.perf_counter(), 0.0
        for data_rank in range(DATA_WORLD):
            ids = read_batch(data, step, data_rank).to(device)
            loss = model(input_ids=ids, labels=ids).loss / DATA_WORLD
            loss.backward()
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
        progress(step, steps, total, time.perf_counter() - start)
    return losses


def train_parallel(rank: int, steps: int, device: str, backend: str, port: int, results: mp.SimpleQueue) -> None:
    """One of the WORLD processes; rank 0 puts the list of losses into the queue."""
    import tedcompile

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    if device == "cuda":
        torch.cuda.set_device(rank)
    mesh = torch.distributed.init_device_mesh(device, tuple(MESH.values()), mesh_dim_names=tuple(MESH))

    data, start = read_sources(), time.perf_counter()
    model = tedcompile.parallelize(make_model().to(device), mesh, backend=backend)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, eps=EPS)
    losses = []
    for step in range(steps):
        ids = read_batch(data, step, tedcompile.data_rank(mesh)).to(device)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

        mean = loss.detach() / WORLD  # for the report: tp ranks hold the same loss, so this is the mean over data ranks
        torch.distributed.all_reduce(mean)
        losses.append(mean.item())
        if rank == 0:
            if step == 0:
                print(f"  first step done after {time.perf_counter() - start:.0f} s, compilation included", flush=True)
            progress(step, steps, losses[-1], time.perf_counter() - start)
        start = time.perf_counter()
    if rank == 0:
        results.put(losses)
    torch.distributed.destroy_process_group()


def run_parallel(steps: int, device: str, backend: str) -> list[float]:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    results = mp.get_context("spawn").SimpleQueue()
    mp.spawn(train_parallel, args=(steps, device, backend, port, results), nprocs=WORLD)
    return results.get()


def layer_collectives() -> list[list]:
    """Rows (what, over which axis, when, how often, bytes) for one MoE layer."""
    import tedcompile

    rows = []
    for c in tedcompile.explain(CONFIG, MESH, batch=BATCH, seq=SEQ, dtype=torch.float32)["collectives"]:
        if c["module"].startswith("model.layers.*.mlp"):
            calls = f"{c['count'] / CONFIG.num_hidden_layers:g}"
            rows.append([c["kind"], c["axis"], c["role"], c["phase"], calls, c["bytes_per_rank"], c["wire_bytes"]])
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--backend", choices=["inductor", "eager"], default="inductor")
    args = parser.parse_args()
    if args.steps < 1:
        parser.error(f"--steps must be at least 1, got {args.steps}")
    device = "cuda" if torch.cuda.device_count() >= WORLD else "cpu"

    mesh = " ".join(f"{axis}={size}" for axis, size in MESH.items())
    size = sum(p.numel() for p in make_model().parameters()) / 1e6
    print(f"Qwen3-MoE, {size:.1f} M parameters, {BATCH} x {SEQ} bytes of text on each of {DATA_WORLD} data ranks")
    print(f"\nThe plain model on one process ({device}):")
    plain = train_plain(args.steps, device)
    print(f"\nThe same model on {WORLD} processes, mesh {mesh}; the first step compiles:", flush=True)
    parallel = run_parallel(args.steps, device, args.backend)

    differences = [abs(a - b) / abs(b) for a, b in zip(parallel, plain)]
    rows = [[i + 1, *row] for i, row in enumerate(zip(parallel, plain, differences))]
    headers = ["step", f"loss, {WORLD} processes", "loss, one process", "relative difference"]
    print("\n" + tabulate(rows, headers, floatfmt=("", ".6f", ".6f", ".1e")))
    print("\nThe collectives of one MoE layer in one step (bytes of one call, on one rank):\n")
    headers = ["collective", "axis", "carries", "phase", "calls", "bytes in", "bytes sent"]
    print(tabulate(layer_collectives(), headers, intfmt=","))

    last = min(5, args.steps)
    fall = parallel[0] - sum(parallel[-last:]) / last
    print(f"\nThe loss fell by {fall:.2f} from {parallel[0]:.2f}; at least {MIN_FALL} is required.")
    print(f"The largest difference between the two runs is {max(differences):.1e}; {MAX_DIFFERENCE} is allowed.")
    good = fall >= MIN_FALL and max(differences) <= MAX_DIFFERENCE  # NaN fails both
    print("The demo passed." if good else "The demo FAILED.")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
