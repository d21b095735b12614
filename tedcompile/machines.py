"""Machines as numbers: links, rates, memory; what one collective and one product cost on them. No tensors.

Costs are alpha-beta: messages * alpha + bytes sent / beta, with the messages and bytes of the ring algorithms (Thakur
et al. 2005, "Optimization of Collective Communication Operations in MPICH").
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from tedcompile.mesh import MeshShape

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

DTYPES = {2: ("bf16", "fp16"), 4: ("fp32",)}  # by bytes of an element
DEVICES = {"V100": "v100", "A100": "a100", "A800": "a100", "H100": "h100", "H200": "h200"}  # in a GPU's name

# (messages, bytes sent) of one rank of n, for an operand of b bytes on that rank
RING = {
    "all_reduce": lambda n, b: (2 * (n - 1), 2 * (n - 1) * b / n),
    "all_gather": lambda n, b: (n - 1, (n - 1) * b),
    "reduce_scatter": lambda n, b: (n - 1, (n - 1) * b / n),
    "all_to_all": lambda n, b: (n - 1, (n - 1) * b / n),
}


@dataclass(frozen=True)
class Link:
    """`alpha` seconds to start a message, `beta` bytes/s."""

    alpha: float
    beta: float


@dataclass(frozen=True)
class Machine:
    """What the cost model knows of a machine; units and meaning of each field are in machines.toml.

    `intra.beta` is of one rank, `inter.beta` of one node, whose ranks share it.
    """

    name: str
    ranks_per_node: int
    intra: Link
    inter: Link
    gemm: tuple[tuple[str, float], ...]
    half_rows: float
    half_width: float
    copy: float
    memory: float
    launch: float

    def rate(self, size: int) -> float:
        """FLOP/s of large products of elements of `size` bytes."""
        rates = dict(self.gemm)
        for dtype in DTYPES.get(size, ()):
            if dtype in rates:
                return rates[dtype]
        raise ValueError(f"machine {self.name} has no gemm rate for elements of {size} bytes")

    def product(self, flops: float, rows: float, width: float, size: int, weights: float = 0) -> float:
        """Seconds of a (grouped) product: `rows` of one group, the smaller `width` of its weights.

        `weights` are the bytes of all groups' weights, which have to be read once however few the rows.
        """
        efficiency = rows / (rows + self.half_rows) * width / (width + self.half_width)
        return max(flops / (self.rate(size) * efficiency), weights / self.copy) if flops else 0.0

    def collective(self, kind: str, size: float, place: Place) -> tuple[float, float]:
        """(seconds to start, seconds to transfer) of one collective of `size` bytes on each rank.

        Across nodes a ring sends over the network once for each node, so the members of a node share its cost; in an
        all-to-all every rank sends its own share, inside and outside of the node at the same time.
        """
        messages, sent = RING[kind](place.size, size)
        if messages == 0:
            return 0.0, 0.0
        outside = place.size - place.inside
        if not outside:
            return messages * self.intra.alpha, sent / self.intra.beta
        part = self.inter.beta / place.sharing
        far = messages * outside / (place.size - 1)
        start = far * self.inter.alpha + (messages - far) * self.intra.alpha
        if kind == "all_to_all":
            near = sent * (place.inside - 1) / (place.size - 1)
            return start, max((sent - near) / part, near / self.intra.beta)
        return start, max(sent / (part * place.inside), sent / self.intra.beta if place.inside > 1 else 0.0)


@dataclass(frozen=True)
class Place:
    """Where a group lies: its `size`, members `inside` one node, and the ranks `sharing` that node's network."""

    size: int
    inside: int
    sharing: int


def place(axis: str, mesh: MeshShape, machine: Machine) -> Place:
    """The groups of an axis: "tp", "ep", "dp", "data" (dp x ep) or "ept" (ep x tp, the folded experts' axis).

    rank = (dp * EP + ep) * TP + tp, nodes hold consecutive ranks. Where groups and nodes do not line up, the node with
    the fewest members of a group decides.
    """
    size, stride = {
        "tp": (mesh.tp, 1),
        "ep": (mesh.ep, mesh.tp),
        "ept": (mesh.ep * mesh.tp, 1),
        "dp": (mesh.dp, mesh.ep * mesh.tp),
        "data": (mesh.dp * mesh.ep, mesh.tp),
    }[axis]
    node = machine.ranks_per_node
    if mesh.world <= node or node % (size * stride) == 0:
        return Place(size, size, min(node, mesh.world))
    return Place(size, max(1, math.gcd(node, size * stride) // stride), node)


# ---- from files -----------------------------------------------------------------------------------------------------


@cache
def known() -> dict[str, dict[str, Any]]:
    """The machines of machines.toml, by name."""
    return tomllib.loads(Path(__file__).with_name("machines.toml").read_text())


def load(spec: str, **changes: Any) -> Machine:
    """A machine by its name in machines.toml, or from a TOML file, with fields replaced by keywords.

    A file holds the same keys as one entry of machines.toml; with `base = "h200"` only those that differ from it.
    Raises ValueError that says which name, file, key or value is wrong.
    """
    if spec in known():
        return _machine(spec, known()[spec] | changes)
    path = Path(spec)
    if path.suffix != ".toml":
        raise ValueError(f"there is no machine {spec!r}: choose {', '.join(known())}, or give a file NAME.toml")
    try:
        values = tomllib.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"cannot read {spec}: {error.strerror}") from None
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{spec} is not TOML: {error}") from None
    base = values.pop("base", None)
    if base is not None and base not in known():
        raise ValueError(f"{spec}: there is no machine {base!r} to start from; choose {', '.join(known())}")
    return _machine(path.stem, (known()[base] if base else {}) | values | changes)


def _machine(name: str, values: Mapping[str, Any]) -> Machine:
    names = {f.name for f in fields(Machine)} - {"name"}
    wrong, missing = sorted(set(values) - names), sorted(names - set(values))
    if wrong or missing:
        what = f"has an unknown key {wrong[0]!r}" if wrong else f"lacks {missing[0]!r}"
        raise ValueError(f"machine {name} {what}; the keys are {', '.join(sorted(names))}")

    def number(key: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise ValueError(f"machine {name}: {key} must be a positive number, got {value!r}")
        return value

    def link(key: str) -> Link:
        value = values[key]
        if isinstance(value, Link):
            return value
        if not isinstance(value, Mapping) or set(value) != {"alpha", "beta"}:
            raise ValueError(f"machine {name}: {key} must be {{ alpha = seconds, beta = bytes/s }}, got {value!r}")
        return Link(*(number(f"{key}.{part}", value[part]) for part in ("alpha", "beta")))

    rates = values["gemm"]
    dtypes = [dtype for group in DTYPES.values() for dtype in group]
    if not isinstance(rates, Mapping) or not rates or not set(rates) <= set(dtypes):
        raise ValueError(f"machine {name}: gemm must be FLOP/s by dtype ({', '.join(dtypes)}), got {rates!r}")
    plain = ("half_rows", "half_width", "copy", "memory", "launch")
    ranks = number("ranks_per_node", values["ranks_per_node"])
    if ranks != int(ranks):
        raise ValueError(f"machine {name}: ranks_per_node must be a whole number, got {ranks}")
    return Machine(
        name, int(ranks), link("intra"), link("inter"),
        tuple((dtype, number(f"gemm.{dtype}", rate)) for dtype, rate in sorted(rates.items())),
        **{key: number(key, values[key]) for key in plain},
    )  # fmt: skip


def default(device_type: str, device_name: str = "") -> Machine:
    """The machine to assume: by the GPU's name where there is one, an H200 for other "cuda" devices, else "cpu"."""
    if device_type != "cuda":
        return load("cpu")
    found = [name for part, name in DEVICES.items() if part in device_name]
    return load(found[0] if found else "h200")
