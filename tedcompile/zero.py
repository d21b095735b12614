"""ZeRO (Rajbhandari et al., arXiv 1910.02054): over which data-parallel ranks a parameter's copies are shared out.

Dense parameters have copies on all dp x ep ranks, experts, which are split over ep, on dp ranks only: two families that
are never mixed (DeepSpeed-TED, arXiv 2303.06318, section 3). Stage 1 shards what the optimizer keeps, 2 also gradients,
3 also the parameters.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Shard

from tedcompile import compat
from tedcompile.layouts import Layout, S
from tedcompile.mesh import DATA_AXES, Groups, MeshShape

STAGES = (0, 1, 2, 3)


@dataclass(frozen=True)
class Share:
    """What `parallelize` tells the optimizer of a parameter: its name, the stage, the mesh axes that hold copies
    ("data" or "dp"), and the dim on which its gradient (stage 2) or itself (3) is split over them; None: not split."""

    name: str
    stage: int
    axis: str
    dim: int | None

    @property
    def axes(self) -> tuple[str, ...]:
        """The mesh axes that `axis` stands for."""
        return DATA_AXES if self.axis == "data" else (self.axis,)

    def layouts(self, mesh: MeshShape) -> dict[str, Layout]:
        """The further layouts of what is split, by mesh axis."""
        return {} if self.dim is None else {a: S(self.dim) for a in self.axes if mesh[a] > 1}

    def stored(self, mesh: MeshShape) -> dict[str, Layout]:
        """Those of the parameter itself."""
        return self.layouts(mesh) if self.stage == 3 else {}


def family(placements: Collection[str]) -> str:
    """The mesh axis whose ranks hold copies of a parameter that is split over the axes `placements`."""
    return "dp" if "ep" in placements else "data"


def share(name: str, stage: int, shape: Sequence[int], placements: dict[str, Layout], mesh: MeshShape) -> Share:
    """How a parameter of this whole shape is shared out: on the first dim that divides and is not split already."""
    axis = family(placements)
    used = {layout.dim for a, layout in placements.items() if mesh[a] > 1}
    dims = [d for d, n in enumerate(shape) if d not in used and n and n % mesh[axis] == 0]
    return Share(name, stage, axis, dims[0] if stage > 1 and mesh[axis] > 1 and dims else None)


def gradient(parameter: DTensor, local: torch.Tensor) -> DTensor:
    """This rank's gradient as a DTensor: in the layout of its parameter, under stage 2 split over the copies."""
    given = getattr(parameter, "ted", None)
    if given is None or given.stage != 2 or given.dim is None:
        return compat.like(parameter, local)
    names = parameter.device_mesh.mesh_dim_names or ()
    placements = [Shard(given.dim) if n in given.axes else p for n, p in zip(names, parameter.placements, strict=True)]
    return compat.dtensor(local, parameter.device_mesh, placements, parameter.shape, parameter.stride())


def part(parameter: torch.Tensor) -> torch.Tensor:
    """What this rank's gradient of a parameter is for, of its local tensor: all of it, under stage 2 a part."""
    local, given = compat.local_tensor(parameter), getattr(parameter, "ted", None)
    if given is None or given.stage != 2 or given.dim is None:
        return local
    mesh = parameter.device_mesh  # type: ignore[attr-defined]
    group = Groups.of(mesh).group[given.axis]
    return local.chunk(dist.get_world_size(group), given.dim)[dist.get_rank(group)]
