"""The process groups that a lowered graph names."""

from __future__ import annotations

import torch
import torch.distributed as dist


def group_of(axis: str) -> dist.ProcessGroup | None:
    """The process group a lowered graph names; an axis of size 1 is never lowered, so it must exist."""
    return torch._C._distributed_c10d._resolve_process_group(axis)


def index_in(axis: str) -> int:
    return dist.get_rank(group_of(axis))
