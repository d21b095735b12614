"""The (dp, ep, tp) mesh: sizes for planning, process groups for running.

Planning needs only integers (`MeshShape`); graphs name axes, never ranks or groups. `Groups` ties axis names to the
process groups of one rank. Besides the three axes there are `data` = dp x ep, the ranks that bring their own batch
(DeepSpeed-TED, arXiv 2303.06318, section 3: dense parameters are data-parallel over dp x ep, experts over dp), and
`ept` = ep x tp, the ranks that share out experts that are not split.
"""

from __future__ import annotations

import atexit
import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from tedcompile import compat

AXES = ("dp", "ep", "tp")
DATA_AXES = ("dp", "ep")

atexit.register(compat.settle_gloo)  # every call ends with a word between ranks, perhaps the process's last


@dataclass(frozen=True)
class MeshShape:
    """Sizes of the three axes; an axis that is not there has size 1."""

    dp: int = 1
    ep: int = 1
    tp: int = 1

    def __getitem__(self, axis: str) -> int:
        joint = {"data": self.dp * self.ep, "ept": self.ep * self.tp}
        return joint[axis] if axis in joint else getattr(self, axis)

    @property
    def world(self) -> int:
        return self.dp * self.ep * self.tp

    def as_dict(self) -> dict[str, int]:
        return {axis: self[axis] for axis in AXES}

    @staticmethod
    def parse(text: str) -> MeshShape:
        """`"ep=4,tp=2"` to a shape. Raises ValueError naming what is wrong."""
        sizes: dict[str, int] = {}
        for part in filter(None, (p.strip() for p in text.split(","))):
            axis, _, size = part.partition("=")
            if axis not in AXES:
                raise ValueError(
                    f"unknown mesh axis {axis!r} in {text!r}: the axes are dp, ep and tp, as in dp=1,ep=4,tp=2"
                )
            if not size.isdigit() or int(size) < 1:
                raise ValueError(f"mesh axis {axis} needs a size of at least 1, got {size!r} in {text!r}")
            if axis in sizes:
                raise ValueError(f"mesh axis {axis} is given twice in {text!r}")
            sizes[axis] = int(size)
        return MeshShape(**sizes)


def shape_of(mesh: DeviceMesh | MeshShape | str | dict) -> MeshShape:
    """Sizes of any description of a mesh. Raises ValueError for an unknown axis, TypeError for another type."""
    if isinstance(mesh, MeshShape):
        return mesh
    if isinstance(mesh, str):
        return MeshShape.parse(mesh)
    if isinstance(mesh, dict):
        return MeshShape.parse(",".join(f"{k}={v}" for k, v in mesh.items()))
    if not isinstance(mesh, DeviceMesh):
        raise TypeError(f"mesh must be a torch DeviceMesh with axes among dp, ep, tp, got {type(mesh).__name__}")
    names = mesh.mesh_dim_names
    if not names:
        raise ValueError(
            'the mesh has no axis names: pass mesh_dim_names=("dp", "ep", "tp") (any subset) to init_device_mesh'
        )
    unknown = [n for n in names if n not in AXES]
    if unknown:
        raise ValueError(
            f"unknown mesh axis {unknown[0]!r}: tedcompile knows dp, ep and tp, the mesh has {', '.join(names)}"
        )
    return MeshShape(**dict(zip(names, mesh.mesh.shape, strict=True)))


def data_world(mesh: DeviceMesh) -> int:
    """How many different batches one step takes: dp x ep."""
    return shape_of(mesh)["data"]


def data_rank(mesh: DeviceMesh) -> int:
    """Which of the `data_world(mesh)` batches this rank brings; the tp ranks of one group answer the same."""
    shape = shape_of(mesh)
    names = mesh.mesh_dim_names or ()
    dp = mesh.get_local_rank("dp") if "dp" in names else 0
    ep = mesh.get_local_rank("ep") if "ep" in names else 0
    return dp * shape.ep + ep


class Groups:
    """This rank's process group, its own index and a process-independent name for every axis of a mesh."""

    _known: dict[tuple, Groups] = {}

    def __init__(self, mesh: DeviceMesh, serial: int):
        self.mesh, self.shape = mesh, shape_of(mesh)
        self.era = dist.group.WORLD  # the groups end with it
        self.device = (
            torch.device("cuda", torch.cuda.current_device())
            if mesh.device_type == "cuda"
            else torch.device(mesh.device_type)
        )
        names = mesh.mesh_dim_names or ()
        self.names = {axis: f"ted{serial or ''}_{axis}" for axis in (*AXES, "data", "ept", "world")}
        self.rank: dict[str, int] = {}
        self.group: dict[str, dist.ProcessGroup] = {}
        self.host: dist.ProcessGroup | None = None
        for axis in AXES:
            self.rank[axis] = mesh.get_local_rank(axis) if axis in names else 0
        self.rank["data"] = self.rank["dp"] * self.shape.ep + self.rank["ep"]
        joint: dict[str, tuple[str, ...]] = {"data": DATA_AXES, "ept": ("ep", "tp")}
        for axis, along in [*((a, (a,)) for a in AXES), *joint.items()]:
            sizes = [a for a in along if self.shape[a] > 1]
            everyone = self._along(along, names)
            if len(along) > 1 and len(sizes) == 1:
                self.group[axis] = self.group[sizes[0]]
            elif sizes == [axis] and any(ranks != sorted(ranks) for ranks in everyone):
                self.group[axis] = mesh.get_group(axis)  # of ranks in another order than a new one would have
            elif sizes:
                for ranks in everyone:
                    group = compat.new_group(ranks, mesh.device_type)
                    if dist.get_rank() in ranks:
                        self.group[axis] = group
        if self.shape.world > 1:
            ranks = sorted(mesh.mesh.flatten().tolist())
            whole = len(ranks) == dist.get_world_size()
            self.group["world"] = dist.group.WORLD if whole else compat.new_group(ranks, mesh.device_type)
            # agreement between ranks is checked on the host, beside the devices' work
            on_host = mesh.device_type == "cpu" and dist.get_backend() == "gloo"
            self.host = self.group["world"] if on_host else dist.new_group(ranks, backend="gloo")
        for axis, group in self.group.items():
            compat.register_group(self.names[axis], group)

    def _along(self, axes: tuple[str, ...], names: tuple[str, ...]) -> list[list[int]]:
        """The ranks of each group over some axes, in the order of the mesh."""
        others = [i for i, n in enumerate(names) if n not in axes]
        inner = [i for i, n in enumerate(names) if n in axes]
        size = math.prod(self.mesh.mesh.shape[i] for i in inner)
        return self.mesh.mesh.permute(*others, *inner).reshape(-1, size).tolist()

    @classmethod
    def along(cls, mesh: DeviceMesh, axis: int) -> dist.ProcessGroup:
        """The group of one axis of any mesh: no second communicator where `of` has made one."""
        known = cls._known.get(_key(mesh))
        if known is None or known.era is not dist.group.WORLD or not mesh.mesh_dim_names:
            return mesh.get_group(axis)
        return known.group[mesh.mesh_dim_names[axis]]

    @classmethod
    def of(cls, mesh: DeviceMesh) -> Groups:
        """The groups of a mesh, made once for each distinct mesh (every rank must call this in the same order)."""
        key = _key(mesh)
        if any(groups.era is not dist.group.WORLD for groups in cls._known.values()):
            cls._known.clear()  # torch.distributed was started again
        if key not in cls._known:
            if dist.is_initialized() and math.prod(mesh.mesh.shape) > dist.get_world_size():
                raise ValueError(
                    f"the mesh has {math.prod(mesh.mesh.shape)} ranks, the world only {dist.get_world_size()}"
                )
            cls._known[key] = cls(mesh, len(cls._known))
        return cls._known[key]


def _key(mesh: DeviceMesh) -> tuple:
    return mesh.device_type, tuple(mesh.mesh.flatten().tolist()), tuple(mesh.mesh.shape), mesh.mesh_dim_names
