"""Where a rank is: so that a collective that is stuck ends in a sentence that names it, its module and who is missing.

A rank notes what it waits for (`waiting`) or does (`doing`). A `Watch` thread looks at the note; when the rank has
waited too long, it asks all ranks at the store where they are, says so, and ends the process: a call that waits for
another rank cannot be broken off otherwise. Process groups count what they have issued, and each op of `graphs.KINDS`
issues one: so the count of a rank that is late says which of the graph's collectives it has not come to.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
from torch.fx import GraphModule

from tedcompile import compat, graphs
from tedcompile.mesh import Groups
from tedcompile.pipeline import where

PATIENCE = 3.0  # seconds that the other ranks get to answer


@dataclass(frozen=True)
class Place:
    """What a rank does; of a graph its collectives (kind, axis, module)."""

    what: str = "outside of a step"
    waits: bool = False  # for other ranks
    collectives: Sequence[tuple[str, str, str]] = ()
    issued: dict[str, int] = field(default_factory=dict)  # of each axis when it began
    since: float = field(default_factory=time.monotonic)


_place = Place()
_graph = Place()  # the last graph: a GPU may still be at it when the host has gone on


@contextlib.contextmanager
def at(place: Place) -> Iterator[None]:
    global _place
    before, _place = _place, place
    try:
        yield
    finally:
        _place = dataclasses.replace(before, since=time.monotonic())


def waiting(what: str) -> contextlib.AbstractContextManager[None]:
    return at(Place(what, True))


def doing(what: str) -> contextlib.AbstractContextManager[None]:
    return at(Place(what))


def collectives(gm: GraphModule) -> list[tuple[str, str, str]]:
    """Those of a graph, in order, while they are named by axes."""
    return [(kind, n.args[-1], where(n)) for n in gm.graph.nodes if (kind := graphs.collective(n)) and n.args[-1]]


def watched(run: Callable, found: Sequence[tuple[str, str, str]], what: str, names: Mapping[str, str]) -> Callable:
    """A compiled graph that takes a list, its place noted while it runs."""
    if not found:
        return run
    axes = {axis: names[axis] for _, axis, _ in found}

    def call(args: list) -> Any:
        global _graph
        _graph = Place(what, True, found, {axis: compat.issued(name) for axis, name in axes.items()})
        with at(_graph):
            return run(args)

    call._boxed_call = True  # type: ignore[attr-defined]
    return call


class Watch(threading.Thread):
    """Of this rank; all ranks make theirs in the same order. `end(sentence)` is called once, in this thread."""

    _made = 0

    def __init__(self, groups: Groups, seconds: float, end: Callable[[str], None] | None = None):
        super().__init__(name="watch", daemon=True)
        self.seconds, self.end = seconds, end or _end
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.names = {axis: groups.names[axis] for axis in groups.group}
        self.members = {axis: dist.get_process_group_ranks(group) for axis, group in groups.group.items()}
        self.store, self.over = compat.store_client(), threading.Event()
        Watch._made += 1
        self.key = f"tedcompile.stuck.{Watch._made}"

    def run(self) -> None:
        answered = False
        while not self.over.wait(min(1.0, self.seconds / 4)):
            stuck = _place.waits and time.monotonic() - _place.since > self.seconds
            try:
                if not answered and (stuck or self.store.check([self.key])):
                    answered = True
                    self._answer()
                if stuck:
                    self.end(self.sentence())
                    return
            except RuntimeError:  # the store is gone, and with it the run
                return

    def stop(self) -> None:
        self.over.set()
        self.join()

    def _answer(self) -> None:
        place = _place
        counts = {axis: compat.issued(name) for axis, name in self.names.items()}
        facts = {"what": place.what, "seconds": time.monotonic() - place.since, "counts": counts}
        self.store.set(f"{self.key}.{self.rank}", json.dumps(facts))
        self.store.set(self.key, "yes")

    def sentence(self) -> str:
        """What this rank waits for, and where the ranks are that have not come."""
        answers: dict[int, dict[str, Any]] = {}
        deadline = time.monotonic() + PATIENCE
        while len(answers) < self.world and time.monotonic() < deadline:
            for rank in range(self.world):
                if rank not in answers and self.store.check([f"{self.key}.{rank}"]):
                    answers[rank] = json.loads(self.store.get(f"{self.key}.{rank}"))
            time.sleep(0.05)
        return tell(self.rank, answers, self.members, _graph, self.world)


def tell(
    rank: int, answers: Mapping[int, dict[str, Any]], members: Mapping[str, Sequence[int]], graph: Place, world: int
) -> str:
    """A sentence of the answers: for the collective of `graph`, the last one of this rank, that a rank is late for."""
    mine = answers[rank]
    name, late = "", []
    for axis, ranks in members.items():
        counts = {r: answers[r]["counts"][axis] if r in answers else -1 for r in ranks}
        behind = [r for r in ranks if counts[r] < counts[rank]]
        if behind and axis in graph.issued:
            mine_there = [c for c in graph.collectives if c[1] == axis]
            number = max(max(counts[r] for r in behind) - graph.issued[axis], 0)
            if number < len(mine_there):
                kind, _, module = mine_there[number]
                name, late = f"{kind} over {axis}" + (f" of {module}" if module else "") + ", in ", behind
                break
    others = [r for r in range(world) if r != rank]
    late = late or [r for r in others if answers.get(r, {}).get("what") != mine["what"]] or others
    there = [
        f"rank {r} is at {answers[r]['what']} since {answers[r]['seconds']:.0f} s"
        if r in answers
        else f"rank {r} does not answer"
        for r in late
    ]
    return f"rank {rank} has waited {mine['seconds']:.0f} s for {name}{mine['what']}; missing: {', '.join(there)}"


def _end(sentence: str) -> None:
    sys.stderr.write(f"tedcompile: {sentence}\n")
    sys.stderr.flush()
    os._exit(1)
