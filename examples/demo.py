"""What `make demo` runs: a small Qwen3-MoE learns Python from the standard library's own sources.

From one checkpoint and on the same batches it is trained twice: as plain Hugging Face code on one process, and by
`tedcompile train` on four (NCCL with four GPUs, gloo on CPUs otherwise). Both losses are then shown side by side, and
the collectives of one MoE layer. Exit code 1: the loss did not fall, or the two runs differ.

    python examples/demo.py [--steps 40] [--backend inductor|eager] [--out demo]
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", TOKENIZERS_PARALLELISM="false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # four processes share the cores, and waiting OpenMP threads spin

import torch
from tabulate import tabulate
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.utils import logging

import tedcompile
from tedcompile import data

MESH = {"dp": 1, "ep": 2, "tp": 2}
WORLD = MESH["dp"] * MESH["ep"] * MESH["tp"]
BATCH, SEQ, MICRO_BATCHES = 4, 128, 2  # a step is two micro-batches, one for each of the dp x ep ranks
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


def train_plain(folder: Path, batches: data.MicroBatches, steps: int, device: str) -> list[float]:
    """The reference: plain Hugging Face code, a step on the mean loss of its micro-batches."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, eps=EPS, weight_decay=0.0)
    losses = []
    for step in range(steps):
        start, total = time.perf_counter(), 0.0
        for number in range(step * MICRO_BATCHES, (step + 1) * MICRO_BATCHES):
            ids = batches.read(number).to(device)
            loss = model(input_ids=ids, labels=ids).loss / MICRO_BATCHES
            loss.backward()
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
        if (step + 1) % 10 == 0 or step + 1 == steps:
            speed = MICRO_BATCHES * BATCH * SEQ / (time.perf_counter() - start)
            print(f"step {step + 1}/{steps}  loss {total:.4f}  {speed:,.0f} tokens/s", flush=True)
    return losses


def train_parallel(folder: Path, text: Path, out: Path, steps: int, device: str, backend: str) -> list[float]:
    """`tedcompile train` under torchrun; the trained model is exported to out/trained."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(WORLD)]
    command += ["-m", "tedcompile.cli", "train", "--model", folder, "--tokenizer", "bytes", "--data", text]
    command += ["--mesh", ",".join(f"{axis}={size}" for axis, size in MESH.items()), "--steps", steps]
    command += ["--batch", BATCH, "--seq", SEQ, "--micro-batches", MICRO_BATCHES, "--schedule", "constant"]
    command += ["--lr", LEARNING_RATE, "--eps", EPS, "--beta2", 0.999, "--weight-decay", 0, "--clip", 0]
    command += ["--dtype", "fp32", "--device", device, "--backend", backend, "--log-every", 1, "--save-every", 0]
    command += ["--out", out, "--export", out / "trained"]
    subprocess.run([str(word) for word in command], check=True)
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines]


def layer_collectives() -> list[list]:
    """Rows (what, over which axis, when, how often, bytes) for one MoE layer."""
    rows = []
    for c in tedcompile.explain(CONFIG, MESH, batch=BATCH, seq=SEQ, dtype=torch.float32)["collectives"]:
        if c["module"].startswith("model.layers.*.mlp"):
            calls = f"{c['count'] / CONFIG.num_hidden_layers:g}"
            rows.append([c["kind"], c["axis"], c["role"], c["phase"], calls, c["bytes_per_rank"], c["wire_bytes"]])
    return rows


def run(place: Path, steps: int, backend: str) -> int:
    device = "cuda" if torch.cuda.device_count() >= WORLD else "cpu"
    folder, text, out = place / "model", place / "python.txt", place / "run"
    shutil.rmtree(out, ignore_errors=True)
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(CONFIG)
    model.save_pretrained(folder)
    text.write_bytes(b"\n".join(f.read_bytes() for f in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))))
    tokens = data.tokenise([text], data.tokenizer("bytes"), out, CONFIG.vocab_size)
    batches = data.MicroBatches(data.Sequences(tokens, SEQ), BATCH, seed=0)

    size = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"Qwen3-MoE, {size:.1f} M parameters, {MICRO_BATCHES} x {BATCH} x {SEQ} bytes of text a step")
    print(f"\nThe plain model on one process ({device}):")
    plain = train_plain(folder, batches, steps, device)
    mesh = ",".join(f"{axis}={size}" for axis, size in MESH.items())
    print(f"\ntedcompile train on {WORLD} processes, mesh {mesh}; the first step compiles:", flush=True)
    parallel = train_parallel(folder, text, out, steps, device, backend)

    differences = [abs(a - b) / abs(b) for a, b in zip(parallel, plain, strict=True)]
    rows = [[i + 1, *row] for i, row in enumerate(zip(parallel, plain, differences))]
    headers = ["step", f"loss, {WORLD} processes", "loss, one process", "relative difference"]
    print("\n" + tabulate(rows, headers, floatfmt=("", ".6f", ".6f", ".1e")))
    print("\nThe collectives of one MoE layer in one step (bytes of one call, on one rank):\n")
    headers = ["collective", "axis", "carries", "phase", "calls", "bytes in", "bytes sent"]
    print(tabulate(layer_collectives(), headers, intfmt=","))

    last = min(5, steps)
    fall = parallel[0] - sum(parallel[-last:]) / last
    print(f"\nThe loss fell by {fall:.2f} from {parallel[0]:.2f}; at least {MIN_FALL} is required.")
    print(f"The largest difference between the two runs is {max(differences):.1e}; {MAX_DIFFERENCE} is allowed.")
    good = fall >= MIN_FALL and max(differences) <= MAX_DIFFERENCE  # NaN fails both
    print("The demo passed." if good else "The demo FAILED.")
    return 0 if good else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--backend", choices=["inductor", "eager"], default="inductor")
    parser.add_argument("--out", type=Path, help="keep the checkpoints here (default: a temporary folder)")
    args = parser.parse_args()
    if args.steps < 1:
        parser.error(f"--steps must be at least 1, got {args.steps}")
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as place:
        return run(args.out or Path(place), args.steps, args.backend)


if __name__ == "__main__":
    sys.exit(main())
