"""The bytes that a real run hands to its collectives, against `explain`'s formulas at that run's own counts.

Routing is not balanced, so no single rank hands over what a formula says; their mean does, to the byte: what one rank
receives, another has sent. The only letter whose value is the run's is U, the pairs of a token and a rank that has any
of its experts; it is counted where the run makes them.
"""

from __future__ import annotations

import contextlib
import unittest.mock
from collections import Counter
from collections.abc import Iterator

import sympy
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from tedcompile import compile, graphs
from tedcompile.traffic import collectives

C10D = {"all_reduce": "all_reduce", "all_gather_into_tensor": "all_gather", "reduce_scatter_tensor": "reduce_scatter"}


class Recorder(TorchDispatchMode):
    """Calls and bytes by (kind, axis, phase) of what is run within."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[dict] = []
        self.letters: dict[str, int] = {}
        self.calls: Counter[tuple] = Counter()
        self.bytes: Counter[tuple] = Counter()
        self.pairs = self.tokens = 0
        self.phase = "forward"

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        namespace, _, name = func._schema.name.partition("::")
        name = name.removesuffix("_out").removesuffix("_")  # Inductor reuses memory
        kind = (
            C10D.get(name)
            if namespace == "_c10d_functional"
            else graphs.KINDS.get(name)
            if namespace == "ted"
            else None
        )
        if kind is None:
            out = func(*args, **(kwargs or {}))
            if name == "destinations":
                self.pairs += int((out >= 0).sum())
                self.tokens += out.shape[0]
            return out
        key = kind, args[-1].rpartition("_")[2], self.phase
        self.calls[key] += 1
        if namespace == "_c10d_functional":
            self.bytes[key] += args[0].nbytes
            return func(*args, **(kwargs or {}))
        send = dist.all_to_all_single
        # an all-gather of unequal parts is an all-to-all of as many copies as there are ranks
        copies = dist.get_world_size(graph_group(args[-1])) if kind == "all_gather" else 1

        def handed(out, x, *rest, **options):
            assert x.nbytes % copies == 0
            self.bytes[key] += x.nbytes // copies
            return send(out, x, *rest, **options)

        with unittest.mock.patch.object(dist, "all_to_all_single", handed):
            return func(*args, **(kwargs or {}))

    def wrong(self) -> list[str]:
        """What differs from the formulas, the same on all ranks."""
        everyone: list = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, (self.calls, self.bytes, self.pairs, self.tokens))
        ranks, values = len(everyone), dict(self.letters)
        if pairs := sum(e[2] for e in everyone):
            values["U"] = sympy.Rational(pairs, sum(e[3] for e in everyone)) * values["T"]
        calls: Counter[tuple] = Counter()
        size: Counter[tuple] = Counter()
        for row in self.rows:
            key = row["kind"], row["axis"], "forward" if row["phase"] == "forward" else "backward"
            calls[key] += row["count"]
            formula = sympy.sympify(row["formula"], locals={name: sympy.Symbol(name) for name in values})
            size[key] += row["count"] * formula.subs({sympy.Symbol(name): x for name, x in values.items()})
        found = [f"calls {dict(e[0])}, not {dict(calls)}" for e in everyone if e[0] != calls]
        for key in sorted(calls | self.calls):
            mean = sympy.Rational(sum(e[1][key] for e in everyone), ranks)
            if mean != size[key]:
                found.append(f"{' '.join(key)}: {float(mean)} bytes, not {float(size[key])}")
        return list(dict.fromkeys(found))


def graph_group(name: str) -> dist.ProcessGroup:
    return torch._C._distributed_c10d._resolve_process_group(name)


@contextlib.contextmanager
def explained(recorder: Recorder) -> Iterator[None]:
    """What is compiled within gives the recorder its formulas."""
    build = compile.build

    def look(gm, ctx, *rest):
        blocks = [block for _, block, _ in ctx.choices]
        recorder.rows, letters = collectives(gm, ctx.shape, ctx.options, blocks)
        recorder.letters = letters | ctx.shape.as_dict()
        return build(gm, ctx, *rest)

    with unittest.mock.patch.object(compile, "build", look):
        yield
