"""One training step: tedcompile beside Hugging Face eager and torch.compile, same model, same batches, same run.

AdamW keeps fp32 master weights and moments: tedcompile.optim's, beside torch's fused one with casts there and back.

    python -m benchmarks.train_step                                  # one process, mesh 1
    torchrun --nproc-per-node 2 -m benchmarks.train_step --mesh tp=2

Cases: `demo` (the model of `make demo`) and `qwen3_4layers` (four layers of Qwen3-30B-A3B, its whole vocabulary);
`qwen3_layer` and `mixtral_layer` are one layer with a vocabulary of 1,024; `ted` has two layers of DeepSpeed-TED's
model; `tiny` serves to try mesh_runs.py on a CPU. Sizes may be others: `mixtral_layer:num_hidden_layers=2,batch=1`.
Losses of 20 AdamW steps are compared before anything is timed. Writes benchmarks/results/train_step.json, or --out.
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
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import transformers
from transformers import AutoModelForCausalLM, MixtralConfig, Qwen3MoeConfig

import tedcompile
from benchmarks import ted
from benchmarks.optimizer import Masters
from tedcompile.mesh import MeshShape

CASES = {
    "demo": (
        Qwen3MoeConfig,
        dict(hidden_size=192, num_hidden_layers=4, num_attention_heads=6, num_key_value_heads=2, head_dim=32,
             vocab_size=256, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=128, norm_topk_prob=True),
        (8, 1024),
    ),
    "qwen3_4layers": (Qwen3MoeConfig, dict(num_hidden_layers=4, norm_topk_prob=True), (4, 4096)),
    "qwen3_layer": (Qwen3MoeConfig, dict(num_hidden_layers=1, vocab_size=1024, norm_topk_prob=True), (4, 4096)),
    "mixtral_layer": (MixtralConfig, dict(num_hidden_layers=1, vocab_size=1024), (4, 4096)),
    "ted": (ted.Config, dict(num_hidden_layers=2, vocab_size=50304), (4, 2048)),
    "tiny": (
        Qwen3MoeConfig,
        dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
             vocab_size=256, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64, norm_topk_prob=True),
        (2, 64),
    ),
}  # fmt: skip
STEPS, TIMED = 20, 10
UNITS = {"forward_backward_ms": "ms", "step_ms": "ms", "tokens_per_s_per_gpu": "1/s", "peak_gib": "GiB",
         "step_peak_gib": "GiB", "first_step_s": "s", "worst_loss_difference": "relative"}  # fmt: skip


def case_of(name: str) -> tuple[type, dict[str, int], tuple[int, int]]:
    """Configuration class, sizes and (batch, seq) of a case, `NAME` or `NAME:size=number,...`."""
    base, _, changes = name.partition(":")
    kind, sizes, (batch, seq) = CASES[base]
    sizes = {**sizes, "batch": batch, "seq": seq}
    sizes |= {key: int(value) for key, _, value in (c.partition("=") for c in filter(None, changes.split(",")))}
    return kind, sizes, (sizes.pop("batch"), sizes.pop("seq"))


def batches(case: str, rank: int, device: torch.device):
    _, config, shape = case_of(case)
    vocab = config.get("vocab_size", 151936)
    generator = torch.Generator().manual_seed(1 + rank)
    return [torch.randint(vocab, shape, generator=generator).to(device) for _ in range(4)]


def build(case: str, dtype: torch.dtype, device: torch.device):
    torch.manual_seed(0)
    kind, sizes, _ = case_of(case)
    with torch.device(device):
        if kind is ted.Config:
            return ted.GPT(ted.Config(**sizes)).to(dtype).train()
        return AutoModelForCausalLM.from_config(kind(**sizes), dtype=dtype).train()


def example(case: str, ids: torch.Tensor) -> dict[str, torch.Tensor] | None:
    """Example inputs where tedcompile needs them."""
    return dict(input_ids=ids, labels=ids) if case_of(case)[0] is ted.Config else None


def loss_of(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    if isinstance(model, ted.GPT):
        return model(input_ids=ids, labels=ids)
    return model(input_ids=ids, labels=ids, use_cache=False).loss


def prepare(system: str, model, mesh):
    if system == "tedcompile":
        return tedcompile.parallelize(model, mesh)
    model.set_experts_implementation("grouped_mm")
    return torch.compile(model) if system == "hf_compile" else model


def median_ms(run: Callable[[int], None]) -> float:
    times = []
    for i in range(TIMED):
        a, b = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        a.record()
        run(i)
        b.record()
        torch.cuda.synchronize()
        times.append(a.elapsed_time(b))
    return statistics.median(times)


def measure(system: str, case: str, mesh, device: torch.device) -> dict:
    rank = tedcompile.data_rank(mesh) if system == "tedcompile" else 0
    data = batches(case, rank, device)
    torch.cuda.empty_cache()
    model = build(case, torch.bfloat16, device)
    start = time.perf_counter()
    model = prepare(system, model, mesh)
    ours, params = system == "tedcompile", model.parameters()
    optimizer: Any
    if ours:
        optimizer = tedcompile.optim.TiledAdamW(params, lr=1e-4, norm="backward")
    else:
        optimizer = Masters(params, lr=1e-4, fused=True)

    def backward(i: int) -> torch.Tensor:
        ids = data[i % len(data)]
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        return loss

    def step(i: int) -> torch.Tensor:
        loss = backward(i)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    def alone(i: int) -> None:
        backward(i)
        for p in model.parameters():
            p.grad = None

    losses = [step(0).item()]
    first = time.perf_counter() - start
    losses += [step(i).item() for i in range(1, STEPS)]
    torch.cuda.reset_peak_memory_stats()
    step_ms, step_peak = median_ms(step), torch.cuda.max_memory_allocated()
    optimizer = None  # its memory is not the backward's
    for p in model.parameters():
        p.grad = None
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    ms = median_ms(alone)
    return {
        "losses": losses,
        "forward_backward_ms": ms,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        "step_ms": step_ms,
        "step_peak_gib": step_peak / 2**30,
        "tokens_per_s_per_gpu": data[0].numel() / step_ms * 1e3 / (mesh_shape(mesh).tp if ours else 1),
        "first_step_s": first,
    }


def mesh_shape(mesh) -> MeshShape:
    return tedcompile.mesh.shape_of(mesh)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mesh", default="tp=1")
    parser.add_argument("--cases", nargs="*", default=["demo", "qwen3_4layers"])
    parser.add_argument("--systems", nargs="*", default=["hf_eager", "hf_compile", "tedcompile"])
    parser.add_argument("--out", default=str(pathlib.Path(__file__).parent / "results" / "train_step.json"))
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a CUDA GPU")
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="29511")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl")
    shape = MeshShape.parse(options.mesh)
    mesh = dist.init_device_mesh("cuda", tuple(shape.as_dict().values()), mesh_dim_names=("dp", "ep", "tp"))
    facts = {
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "gpu": torch.cuda.get_device_name(),
        "clock_mhz": torch.cuda.clock_rate(),
        "date": datetime.date.today().isoformat(),
    }
    rows, reference = [], {}
    for case in options.cases:
        for system in options.systems:
            try:
                result = measure(system, case, mesh, device)
            except Exception as error:  # a peer that fails is named, not hidden
                print(case, system, "failed:", repr(error)[:2000], flush=True)
                import traceback

                traceback.print_exc()
                continue
            finally:
                torch._dynamo.reset()
                gc.collect()
            losses = result.pop("losses")
            if system == "hf_eager":
                reference[case] = losses
            if case in reference:
                worst = max(abs(a - b) / abs(b) for a, b in zip(losses, reference[case], strict=True))
                result["worst_loss_difference"] = worst
            name = system if system != "tedcompile" else f"tedcompile {options.mesh}"
            for metric, value in result.items():
                unit = UNITS[metric]
                rows.append({"benchmark": "train_step", "case": case, "system": name, "metric": metric,
                             "value": value, "unit": unit, **facts})  # fmt: skip
            if dist.get_rank() == 0:
                print(case, name, {k: round(v, 5) for k, v in result.items()}, f"loss {losses[0]:.4f}", flush=True)
                pathlib.Path(options.out).write_text(json.dumps(rows, indent=1) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
