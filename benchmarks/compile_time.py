"""Time to the first step of models of 4 and 48 equal layers: equal layers compile once.

    python -m benchmarks.compile_time [--layers 4 48] [--systems tedcompile "tedcompile whole" hf_compile]

Every cell is a process of its own with empty caches; tedcompile's runs again from the cache it has left. The model is a
narrow Qwen3-MoE, so that the time is that of compiling. One process, on a GPU where there is one. Writes
benchmarks/results/compile_time.json, or --out.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
import time

SIZES = dict(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=16, vocab_size=256, num_experts=8,
             num_experts_per_tok=2, moe_intermediate_size=32, norm_topk_prob=True)  # fmt: skip
SYSTEMS = ("tedcompile", "tedcompile whole", "hf_compile")  # whole: off=["cut_layers"]


def measure(system: str, layers: int) -> dict:
    """Seconds from the model to the end of its first step, and those of the second."""
    import torch
    import torch.distributed as dist
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    import tedcompile

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Qwen3MoeConfig(num_hidden_layers=layers, **SIZES)).to(device).train()
    ids = torch.randint(256, (2, 128), device=device)
    start = time.perf_counter()
    if system == "hf_compile":
        model.set_experts_implementation("grouped_mm")
        model = torch.compile(model)
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        mesh = dist.init_device_mesh(device, (1,), mesh_dim_names=("tp",))
        tedcompile.parallelize(model, mesh, off=["cut_layers"] if system.endswith("whole") else [])
    seconds = []
    for _ in range(2):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        loss.item()
        seconds.append(time.perf_counter() - start)
        start = time.perf_counter()
    return {"first_step_s": seconds[0], "second_step_s": seconds[1], "loss": loss.item(),
            "gpu": torch.cuda.get_device_name() if device == "cuda" else "",
            "clock": torch.cuda.clock_rate() if device == "cuda" else None,
            "torch": torch.__version__}  # fmt: skip


def run(system: str, layers: int, cache: str) -> dict:
    """`measure` in a process of its own."""
    env = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache, "TRITON_CACHE_DIR": cache + "/triton"}
    command = [sys.executable, "-m", __spec__.name, "--cell", system, str(layers)]
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 48])
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=SYSTEMS)
    parser.add_argument("--cell", nargs=2, metavar=("SYSTEM", "LAYERS"), help=argparse.SUPPRESS)
    parser.add_argument("--out", default=str(pathlib.Path(__file__).parent / "results" / "compile_time.json"))
    options = parser.parse_args()
    if options.cell:
        print(json.dumps(measure(options.cell[0], int(options.cell[1]))))
        return
    rows = []
    for layers in options.layers:
        for system in options.systems:
            with tempfile.TemporaryDirectory() as cache:
                cells = [(system, run(system, layers, cache))]
                if system == "tedcompile":
                    cells.append(("tedcompile, from its cache", run(system, layers, cache)))
            for name, found in cells:
                facts = {
                    "versions": {"torch": found["torch"], "python": platform.python_version()},
                    "gpu": found["gpu"],
                    "clock_mhz": found["clock"],
                    "date": datetime.date.today().isoformat(),
                }
                for metric in ("first_step_s", "second_step_s"):
                    rows.append({"benchmark": "compile_time", "case": f"{layers} layers", "system": name,
                                 "metric": metric, "value": found[metric], "unit": "s", **facts})  # fmt: skip
                print(f"{layers} layers, {name}: first step {found['first_step_s']:.1f} s, "
                      f"second {found['second_step_s']:.3f} s, loss {found['loss']:.6f}", flush=True)  # fmt: skip
                pathlib.Path(options.out).write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
