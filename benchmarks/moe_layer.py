"""One MoE layer, router to combine, forward and backward in bf16: python -m benchmarks.moe_layer [--cases NAME ...]

TFLOP/s count model FLOPs, 18*T*K*H*I. Every system gets the same weights, tokens and router; a constant feature of the
tokens gives the router its bias, none ("balanced") or log p of a Zipf law ("zipf"). Before it is timed, a system's loss
and gradients must be near those of Hugging Face's loop over experts in the same precision (relative norm). Each row of
benchmarks/results/moe_layer.json is written when it is measured, and what the file has is not measured again.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import functools
import json
import os
import pathlib
import statistics

import torch
import torch.distributed as dist
import transformers
from torch import nn
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeConfig, Qwen3MoeSparseMoeBlock

import tedcompile
from tedcompile.frontends import transformers as frontend
from tedcompile.ops import ops

SIZES = {"qwen3-30b": (2048, 768, 128, 8), "mixtral-8x7b": (4096, 14336, 8, 2), "fine-4096": (4096, 512, 128, 8)}
CASES = {
    f"{name} {tokens} {routing}": (*SIZES[name], tokens, routing)
    for name, tokens in (("qwen3-30b", 32768), ("qwen3-30b", 8192), ("mixtral-8x7b", 16384), ("fine-4096", 32768),
                         ("qwen3-30b", 16384))
    for routing in ("balanced", "zipf")
}  # fmt: skip
BIAS = 8.0  # the tokens' constant feature


class Layer(nn.Module):
    """A sparse MoE block whose loss is its output's product with given cotangents."""

    def __init__(self, H: int, I: int, E: int, K: int, routing: str):
        super().__init__()
        config = Qwen3MoeConfig(
            hidden_size=H, moe_intermediate_size=I, num_experts=E, num_experts_per_tok=K, norm_topk_prob=True
        )
        config._experts_implementation = "grouped_mm"
        self.config = config
        self.block = Qwen3MoeSparseMoeBlock(config)
        with torch.no_grad():
            for p in self.parameters():
                p.normal_(0, p.shape[-1] ** -0.5)
            bias = -torch.arange(1, E + 1).float().log() if routing == "zipf" else torch.zeros(E)
            self.block.gate.weight[:, 0] = bias[torch.randperm(E)] / BIAS

    def forward(self, x: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        out = self.block(x)
        return ((out[0] if isinstance(out, tuple) else out) * g).sum()


def hf(layer: Layer, implementation: str) -> Layer:
    layer = copy.deepcopy(layer)
    for module in layer.modules():
        if hasattr(module, "config"):
            module.config._experts_implementation = implementation
    return layer


def systems(layer: Layer, x: torch.Tensor, g: torch.Tensor, mesh) -> dict:
    """Name -> a function that makes the module; None where a peer is not installed."""
    return {
        "tedcompile": lambda: tedcompile.parallelize(hf(layer, frontend.NAME), mesh, example_inputs={"x": x, "g": g}),
        "HF grouped_mm + torch.compile": lambda: torch.compile(hf(layer, "grouped_mm"), dynamic=False),
        "HF grouped_mm": lambda: hf(layer, "grouped_mm"),
        "Liger": None,
    }


def step(module: nn.Module, x: torch.Tensor, g: torch.Tensor) -> dict[str, torch.Tensor]:
    x.grad = None
    for p in module.parameters():
        p.grad = None
    loss = module(x=x, g=g)
    loss.backward()
    return {"loss": loss.detach(), "x": x.grad}


def gradients(module: nn.Module, found: dict) -> dict[str, torch.Tensor]:
    local = lambda t: t.full_tensor() if hasattr(t, "full_tensor") else t
    named = {n.removeprefix("_orig_mod."): local(p.grad) for n, p in module.named_parameters()}
    return {n: t.float().cpu() for n, t in (named | {"x": found["x"]}).items()}


def milliseconds(call, repeats: int = 15) -> float:
    """Median of the device's time for a call after three that are not counted; the host runs ahead, as in training."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(3 + repeats + 1)]
    for event in events[:-1]:
        event.record()
        call()
    events[-1].record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in zip(events[3:-1], events[4:], strict=True))


def saved_bytes(module: nn.Module, x: torch.Tensor, g: torch.Tensor) -> int:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    loss = module(x=x, g=g)
    held = torch.cuda.memory_allocated() - before
    loss.backward()
    return held


def six_products(x: torch.Tensor, index: torch.Tensor, layer: Layer) -> float:
    """The layer's grouped products alone, on rows gathered before."""
    up, down = (p.detach() for p in layer.block.experts.parameters())
    counts, _, order = ops.route(index, up.shape[0])
    ends = counts.cumsum(0).int()
    rows = x.detach()[order // index.shape[1]]
    pre = torch._grouped_mm(rows, up.transpose(1, 2), offs=ends)
    h = pre[:, : down.shape[2]].contiguous()

    def call():
        torch._grouped_mm(rows, up.transpose(1, 2), offs=ends)
        torch._grouped_mm(h, down.transpose(1, 2), offs=ends)
        torch._grouped_mm(rows, down, offs=ends)
        torch._grouped_mm(pre, up, offs=ends)
        torch._grouped_mm(pre.t(), rows, offs=ends)
        torch._grouped_mm(rows.t(), h, offs=ends)

    return milliseconds(call)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="NAME")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results")
    options = parser.parse_args()
    path = options.out / "moe_layer.json"
    rows = json.loads(path.read_text()) if path.exists() else []
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="29547")
    dist.init_process_group("nccl", device_id=torch.device("cuda", 0))
    mesh = dist.init_device_mesh("cuda", (1, 1, 1), mesh_dim_names=("dp", "ep", "tp"))

    def record(case: str, system: str, metric: str, value: float | None, unit: str) -> None:
        rows.append({
            "benchmark": "moe_layer", "case": case, "system": system, "metric": metric, "value": value, "unit": unit,
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
            "gpu": torch.cuda.get_device_name(), "clock_mhz": torch.cuda.clock_rate(),
            "date": datetime.date.today().isoformat(),
        })  # fmt: skip
        path.write_text(json.dumps(rows, indent=1) + "\n")
        print(f"{case:30} {system:32} {metric:14} {value} {unit}", flush=True)

    for case in options.cases:
        done = {r["system"] for r in rows if r["case"] == case and r["metric"] == "time"}
        H, I, E, K, T, routing = CASES[case]
        torch.manual_seed(0)
        with torch.device("cuda"):
            layer = Layer(H, I, E, K, routing).to(torch.bfloat16)
            x = torch.randn(1, T, H, dtype=torch.bfloat16)
            g = torch.randn(1, T, H, dtype=torch.bfloat16)
        x[..., 0] = BIAS
        x.requires_grad_()
        flops = 18 * T * K * H * I

        def timed(system: str, ms: float, case=case, flops=flops) -> None:
            record(case, system, "time", ms, "ms")
            record(case, system, "throughput", flops / ms / 1e9, "TFLOP/s")

        if "six ATen products" not in done:
            with torch.no_grad():
                logits = x[0] @ layer.block.gate.weight.t()
            timed("six ATen products", six_products(x[0], logits.topk(K).indices, layer))
        plain = hf(layer, "eager")
        want = gradients(plain, step(plain, x, g))
        del plain
        for system, make in systems(layer, x, g, mesh).items():
            if system in done:
                continue
            if make is None:
                print(f"{case:30} {system:32} not installed", flush=True)
                continue
            torch._dynamo.reset()
            torch.cuda.empty_cache()
            module = make()
            got = gradients(module, step(module, x, g))
            errors = {n: ((got[n] - t).norm() / t.norm()).item() for n, t in want.items()}
            limits = {n: 0.3 if "gate.weight" in n else 0.03 for n in errors}
            if not all(errors[n] < limits[n] for n in errors):
                raise AssertionError(f"{case}, {system}: wrong gradients, by relative norm {errors}")
            record(case, system, "worst_error", max(errors.values()), "1")
            x.grad = None
            for p in module.parameters():
                p.grad = None
            record(case, system, "saved", saved_bytes(module, x, g) / 2**30, "GiB")
            timed(system, milliseconds(functools.partial(step, module, x, g)))
            del module
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
