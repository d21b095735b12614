"""What users may switch off, force or ask for: checked once, alike for `parallelize`, `explain` and the command line.

Nothing here changes a result: every option chooses between programs that compute the same losses and gradients.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tedcompile import machines
from tedcompile.zero import STAGES

# optimisations by the name of their pass (cuda_graphs: replay.py); the other passes are what makes the program right
OPTIONAL = (
    "drop_duplicates", "simplify_collectives", "chunk_tokens", "save_collectives", "fuse_experts", "fuse_loss",
    "cut_layers", "cuda_graphs",
)  # fmt: skip
# choices that the cost model makes, and the values that may be forced
PLANS: dict[str, tuple[str, ...]] = {
    "dispatch": ("all_to_all", "dedup", "all_gather"),
    "experts": ("tensor", "folded"),
    "drop": ("yes", "no"),
    "drop_point": ("before_gate", "after_gate"),
    "chunks": ("1", "2", "4", "8"),
}
CHECKPOINTS = ("none", "full", "selective")


@dataclass(frozen=True)
class Options:
    """`memory_budget`: for selective checkpointing, bytes (above 1) or a fraction of what "none" would keep.

    `machine`: whose costs decide, a name of machines.toml or a TOML file; empty for that of the devices in use.
    """

    off: frozenset[str] = frozenset()
    plan: Mapping[str, str] = field(default_factory=dict)
    checkpoint: str = "none"
    memory_budget: float | None = None
    machine: str = ""
    zero: int = 0

    @staticmethod
    def of(
        off: Sequence[str] | str = (),
        plan: Mapping[str, str] | None = None,
        checkpoint: str = "none",
        memory_budget: float | None = None,
        machine: str = "",
        zero: int = 0,
    ) -> Options:
        """Checks what a user gives. Raises ValueError that names the option, what was given and what there is."""
        names = frozenset([off] if isinstance(off, str) else off)
        for name in sorted(names - set(OPTIONAL)):
            raise ValueError(f"off: there is no optimisation {name!r}; choose among {', '.join(OPTIONAL)}")
        for key, value in (plan or {}).items():
            if key not in PLANS:
                raise ValueError(f"plan: there is no choice {key!r}; the choices are {', '.join(PLANS)}")
            if value not in PLANS[key]:
                raise ValueError(f"plan: {key} cannot be {value!r}; choose {' or '.join(PLANS[key])}")
        if checkpoint not in CHECKPOINTS:
            raise ValueError(f"checkpoint cannot be {checkpoint!r}; choose {' or '.join(CHECKPOINTS)}")
        if (checkpoint == "selective") != (memory_budget is not None):
            raise ValueError(
                'memory_budget (bytes, or a fraction below 1) goes with checkpoint="selective", and only it'
            )
        if memory_budget is not None and not memory_budget > 0:
            raise ValueError(f"memory_budget must be positive, got {memory_budget}")
        if machine:
            machines.load(machine)
        if zero not in STAGES:
            raise ValueError(f"zero cannot be {zero!r}; choose {', '.join(map(str, STAGES))}")
        return Options(names, dict(plan or {}), checkpoint, memory_budget, machine, zero)

    @property
    def saves_collectives(self) -> bool:
        """Whether a replay starts from the results of collectives; selective checkpointing has no other way."""
        return self.checkpoint == "selective" or "save_collectives" not in self.off
