"""ZeRO (Rajbhandari et al., arXiv 1910.02054): over which data-parallel ranks a parameter's copies are shared out.

Dense parameters have copies on all dp x ep ranks, experts, which are split over ep, on dp ranks only: two families that
are never mixed (DeepSpeed-TED, arXiv 2303.06318, section 3). Stage 1 shards what the optimizer keeps, 2 also gradients,
3 also the parameters.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from tedcompile.layouts import Layout
from tedcompile.mesh import MeshShape

STAGES = (0, 1, 2, 3)


@dataclass(frozen=True)
class Share:
    """What `parallelize` tells the optimizer of a parameter: its name, the stage, the mesh axes that hold copies
    ("data" or "dp"), and the dim on which its gradient (stage 2) or itself (3) is split over them; None: not split."""

    name: str
    stage: int
    axis: str
    dim: int | None


def family(placements: Collection[str]) -> str:
    """The mesh axis whose ranks hold copies of a parameter that is split over the axes `placements`."""
    return "dp" if "ep" in placements else "data"


def split_dim(local: tuple[int, ...], placements: dict[str, Layout], mesh: MeshShape) -> int | None:
    """The first dim that tp and ep leave alone and that divides over the copies; None when there is none.

    `local` is the shape that this rank holds of the parameter.
    """
    copies = mesh[family(placements)]
    used = {layout.dim for axis, layout in placements.items() if mesh[axis] > 1}
    if copies == 1:
        return None
    return next((d for d, n in enumerate(local) if d not in used and n and n % copies == 0), None)
