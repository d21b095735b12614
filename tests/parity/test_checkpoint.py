"""Recomputing changes nothing, dropout too: losses and gradients are bit for bit those of checkpoint="none"."""

from __future__ import annotations

import os
import socket

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import tedcompile
from tedcompile import processes
from tests import models

OPTIONS: list[dict] = [
    dict(checkpoint="full"),
    dict(checkpoint="full", off=["save_collectives"]),
    dict(checkpoint="selective", memory_budget=0.5),
]


def step(mesh, **options) -> list[torch.Tensor]:
    """The loss and all gradients of this rank."""
    model, make_batch = models.hugging_face("qwen3_moe", attention_dropout=0.2)
    rank = tedcompile.data_rank(mesh)
    tedcompile.parallelize(model, mesh, example_inputs=make_batch(0, 0), backend="eager", **options)
    torch.manual_seed(7)
    loss = model(**make_batch(rank, 0)).loss
    loss.backward()
    return [loss.detach(), *(p.grad.to_local() for p in model.parameters())]


def run(rank: int, port: int) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE="4", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo")
    mesh = dist.init_device_mesh("cpu", (1, 2, 2), mesh_dim_names=("dp", "ep", "tp"))
    want = step(mesh)
    for options in OPTIONS:
        found = step(mesh, **options)
        assert all(map(torch.equal, found, want)), options
    dist.destroy_process_group()


def test_bit_for_bit():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.start_processes(run, args=(port,), nprocs=4, start_method=processes.start_method())
