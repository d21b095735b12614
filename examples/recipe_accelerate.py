"""A tedcompile model in a loop with Hugging Face Accelerate.

    torchrun --nproc-per-node 4 examples/recipe_accelerate.py --ep 2 --tp 2

The model is not given to `accelerator.prepare`, which would wrap it in DDP: its gradients are averaged over the dp x ep
ranks already. The loader deals batches over these ranks, not over all processes. The schedule is not prepared either:
Accelerate would step it once for each process.
"""

import argparse
import sysconfig
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader
from transformers import MixtralConfig, MixtralForCausalLM

import tedcompile

SIZES = dict(hidden_size=128, intermediate_size=256, num_attention_heads=4, num_key_value_heads=4)
MODEL = dict(vocab_size=256, num_hidden_layers=4, **SIZES)


def train(accelerator, mesh, model, optimizer, schedule, loader, steps: int, clip: float = 1.0) -> list[float]:
    """Mean losses of the steps, the same on all ranks."""
    world, rank = tedcompile.data_world(mesh), tedcompile.data_rank(mesh)
    loader = prepare_data_loader(loader, accelerator.device, num_processes=world, process_index=rank)
    optimizer = accelerator.prepare(optimizer)
    losses, parts = [], []
    while len(losses) < steps:
        for batch in loader:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                parts.append(loss.detach())
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), clip)
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                schedule.step()
                losses.append(accelerator.reduce(torch.stack(parts).mean(), "mean").item())
                parts = []
                if len(losses) % 10 == 0:
                    accelerator.print(f"step {len(losses):3}  loss {losses[-1]:.4f}", flush=True)
                if len(losses) == steps:
                    break
    return losses


def main() -> None:
    parser = argparse.ArgumentParser()
    for axis in ("dp", "ep", "tp"):
        parser.add_argument(f"--{axis}", type=int, default=1)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--seq", type=int, default=128)
    parser.add_argument("--out", default="trained")
    options = parser.parse_args()

    accelerator = Accelerator(cpu=not torch.cuda.is_available(), gradient_accumulation_steps=2)
    sizes = (options.dp, options.ep, options.tp)
    mesh = torch.distributed.init_device_mesh(accelerator.device.type, sizes, mesh_dim_names=("dp", "ep", "tp"))
    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(**MODEL)).to(accelerator.device)
    model = tedcompile.parallelize(model, mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)

    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))  # the data: the standard library's own
    text = torch.frombuffer(bytearray(b"".join(f.read_bytes() for f in sources)), dtype=torch.uint8)
    rows = text[: len(text) // options.seq * options.seq].view(-1, options.seq).long()
    data = [dict(input_ids=r, labels=r) for r in rows]
    order = torch.utils.data.RandomSampler(data, generator=torch.Generator().manual_seed(0))  # the same on every rank
    loader = DataLoader(data, batch_size=4, sampler=order, drop_last=True)
    train(accelerator, mesh, model, optimizer, schedule, loader, options.steps)
    tedcompile.save_pretrained(model, options.out)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
