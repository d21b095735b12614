"""Recomputing changes nothing: losses and every gradient are bit for bit those of checkpoint="none"."""

from __future__ import annotations

import functools
import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import tedcompile
from tedcompile import processes
from tests import models

MODELS = {
    "qwen3_moe": models.MODELS["qwen3_moe"],
    "dropout": functools.partial(models.hugging_face, "qwen3_moe", attention_dropout=0.2),
}
OPTIONS: list[dict] = [
    dict(checkpoint="full"),
    dict(checkpoint="full", off=["save_collectives"]),
    dict(checkpoint="selective", memory_budget=0.5),
]


def step(name: str, mesh, **options) -> list[torch.Tensor]:
    """The loss and all gradients of this rank."""
    model, make_batch = MODELS[name]()
    rank = tedcompile.data_rank(mesh)
    tedcompile.parallelize(model, mesh, example_inputs=make_batch(0, 0), backend="eager", **options)
    torch.manual_seed(7)
    loss = model(**make_batch(rank, 0)).loss
    loss.backward()
    return [loss.detach(), *(p.grad.to_local() for p in model.parameters())]


def run(rank: int, port: int, name: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE="4", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo")
    mesh = dist.init_device_mesh("cpu", (1, 2, 2), mesh_dim_names=("dp", "ep", "tp"))
    want = step(name, mesh)
    for options in OPTIONS[: 1 if name == "dropout" else None]:
        found = step(name, mesh, **options)
        assert all(map(torch.equal, found, want)), options
    dist.destroy_process_group()


@pytest.mark.parametrize("name", MODELS)
def test_bit_for_bit(name):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.start_processes(run, args=(port, name), nprocs=4, start_method=processes.start_method())
