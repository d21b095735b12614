"""Trains a Hugging Face Mixture-of-Experts model on any mesh.

    torchrun --nproc-per-node 4 examples/train.py --ep 2 --tp 2

The data are the Python standard library's own sources, byte by byte.
"""

import argparse
import sysconfig
from pathlib import Path

import torch
from transformers import MixtralConfig, MixtralForCausalLM

import tedcompile


def main() -> None:
    parser = argparse.ArgumentParser()
    for axis in ("dp", "ep", "tp"):
        parser.add_argument(f"--{axis}", type=int, default=1)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=8, help="sequences of each data rank")
    parser.add_argument("--seq", type=int, default=128)
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    mesh = torch.distributed.init_device_mesh(device, (args.dp, args.ep, args.tp), mesh_dim_names=("dp", "ep", "tp"))
    torch.manual_seed(0)  # the same weights on every rank
    config = MixtralConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = MixtralForCausalLM(config).to(device)  # or AutoModelForCausalLM.from_pretrained(...)

    model = tedcompile.parallelize(model, mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    data = torch.frombuffer(bytearray(b"".join(f.read_bytes() for f in sources)), dtype=torch.uint8)
    generator = torch.Generator().manual_seed(tedcompile.data_rank(mesh))  # tp ranks read the same batch
    for step in range(args.steps):
        starts = torch.randint(len(data) - args.seq, (args.batch, 1), generator=generator)
        ids = data[starts + torch.arange(args.seq)].long().to(device)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0 and torch.distributed.get_rank() == 0:
            print(f"step {step:3}  loss {loss.item():.4f}", flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
