"""A full training loop: ZeRO, gradient accumulation, clipping, a learning-rate schedule, checkpoints.

    torchrun --nproc-per-node 4 examples/train_zero.py --dp 2 --ep 2 --zero 2

Started again, with another mesh too, it goes on from its last checkpoint: a step is the same micro-batches on any mesh.

The data are the Python standard library's own sources, byte by byte.
"""

import argparse
import sysconfig
from pathlib import Path

import torch
from transformers import MixtralConfig, MixtralForCausalLM

import tedcompile
from tedcompile.optim import TiledAdamW


def main() -> None:
    parser = argparse.ArgumentParser()
    for axis in ("dp", "ep", "tp"):
        parser.add_argument(f"--{axis}", type=int, default=1)
    parser.add_argument(
        "--zero", type=int, default=1, help="share out optimizer state (1), gradients (2), parameters (3)"
    )
    parser.add_argument("--offload", choices=["cpu"], help="keep optimizer state in host memory")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--micro-batches", type=int, default=8, help="of a step, all ranks together")
    parser.add_argument("--batch", type=int, default=4, help="sequences of a micro-batch")
    parser.add_argument("--out", default="run", help="folder of the checkpoints")
    parser.add_argument("--seq", type=int, default=128)
    parser.add_argument("--backend", default="inductor")
    parser.add_argument("--layers", type=int, default=4)
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    mesh = torch.distributed.init_device_mesh(device, (args.dp, args.ep, args.tp), mesh_dim_names=("dp", "ep", "tp"))
    torch.manual_seed(0)  # the same weights on every rank
    config = MixtralConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=args.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = MixtralForCausalLM(config).to(device)
    model = tedcompile.parallelize(model, mesh, zero=args.zero, backend=args.backend)

    decay = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = TiledAdamW(groups, lr=1e-3, max_grad_norm=1.0, offload=args.offload)
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=10)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [warmup, cosine], milestones=[10])

    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    data = torch.frombuffer(bytearray(b"".join(f.read_bytes() for f in sources)), dtype=torch.uint8)
    rank, world = tedcompile.data_rank(mesh), tedcompile.data_world(mesh)  # tp ranks read the same batch
    checkpoints = tedcompile.Checkpoints(args.out, model, optimizer, schedule)
    saved = checkpoints.load()
    for step in range(saved["step"] if saved else 0, args.steps):
        for number in range(rank, args.micro_batches, world):
            generator = torch.Generator().manual_seed(step * args.micro_batches + number)
            starts = torch.randint(len(data) - args.seq, (args.batch, 1), generator=generator)
            ids = data[starts + torch.arange(args.seq)].long().to(device)
            loss = model(input_ids=ids, labels=ids).loss
            (loss * world / args.micro_batches).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 10 == 0 and torch.distributed.get_rank() == 0:
            norm, lr = optimizer.grad_norm.item(), schedule.get_last_lr()[0]
            print(f"step {step:3}  loss {loss.item():.4f}  gradient norm {norm:.2f}  lr {lr:.1e}", flush=True)
        if (step + 1) % 20 == 0 or step + 1 == args.steps:
            checkpoints.save(step + 1)  # a thread writes it
    checkpoints.wait()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
