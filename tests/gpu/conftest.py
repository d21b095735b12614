"""A mesh of one GPU, for the tests of a file."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist


@pytest.fixture(scope="module")
def mesh():
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    torch.cuda.set_device(0)
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.init_device_mesh("cuda", (1, 1, 1), mesh_dim_names=("dp", "ep", "tp"))
    dist.destroy_process_group()
