"""Ranks of a training run that part ways: an error on every rank that says which one and what, or, where one does not
come at all, a sentence that names the collective, the module and the ranks missing."""

from __future__ import annotations

import datetime
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tedcompile import compat, watch
from tedcompile.processes import Failure, Pool
from tests import soak


@dataclass(frozen=True)
class Diverging:
    """A run of three steps on two ranks, in which rank 1 does something else in step 2; `text` is the error of each."""

    how: str
    place: str
    timeout = 600.0

    def run(self):
        import torch.distributed as dist

        from tedcompile import train
        from tedcompile.settings import Settings

        words = soak.options(Path(self.place), self.how, "ep=2", steps=3)[1:]
        given = {flag[2:].replace("-", "_"): value for flag, value in zip(words[::2], words[1::2], strict=True)}
        settings = Settings.of({n: [v] if n in ("data", "plan") else v for n, v in given.items()})
        mesh = dist.init_device_mesh("cpu", (1, 2, 1), mesh_dim_names=("dp", "ep", "tp"))
        run = train.Run(settings, mesh, [])
        told: list[str] = []

        def tell(text):
            told.append(text)
            compat.store_client().set(f"told {self.how}", text)

        watch.PATIENCE = 30.0  # on a busy machine an answer takes its time
        thread = watch.Watch(run.runtime.groups, 6.0, tell)
        update = run.optimizer.step

        def step():  # what is new in a first step may take long
            update()
            if self.how in ("late", "reading") and not thread.ident:
                thread.start()

        run.optimizer.step = step
        if dist.get_rank() == 1:
            getattr(self, self.how)(run)
        try:
            run.train()
        except ValueError as error:
            return str(error), told
        finally:
            if thread.ident:
                thread.stop()
        return "", told

    def sleep(self):
        """Until the other rank has told that this one is missing."""
        compat.store_client().wait([f"told {self.how}"], datetime.timedelta(seconds=120))

    def in_step_2(self, run, work):
        """Replaces `run._batch` by `work(batch)` in step 2."""
        original, calls = run._batch, []

        def batch(ids):
            calls.append(0)
            made = original(ids)
            return work(made) if len(calls) == 4 else made

        run._batch = batch

    def shapes(self, run):
        self.in_step_2(run, lambda batch: {n: t[:, :-2] for n, t in batch.items()})

    def data(self, run):
        def out(batch):
            raise ValueError("no more data")

        self.in_step_2(run, out)

    def nan(self, run):
        def spoil(batch):
            with torch.no_grad():
                next(run.model.parameters()).to_local().fill_(float("nan"))
            return batch

        self.in_step_2(run, spoil)

    def late(self, run):
        import torch.distributed as dist

        update, exchange, steps = run.optimizer.step, dist.all_to_all_single, []

        def step():
            steps.append("done")
            return update()

        def slow(*args, **kwargs):
            if steps == ["done"]:  # the first one of step 2
                steps.append("slept")
                self.sleep()
            return exchange(*args, **kwargs)

        run.optimizer.step, dist.all_to_all_single = step, slow

    def reading(self, run):
        self.in_step_2(run, lambda batch: self.sleep() or batch)


@pytest.fixture(scope="module")
def pool():
    with Pool(2, device="cpu") as pool:
        yield pool


def replies(pool, how, tmp_path):
    soak.options(tmp_path, how, "ep=2")  # writes the files
    found = pool.call(Diverging(how, str(tmp_path)))
    failed = [f"rank {r}: {x.text}" for r, x in found.items() if isinstance(x, Failure)]
    assert not failed, "\n".join(failed)
    return found


@pytest.mark.parametrize(
    "how, text",
    [
        ("shapes", "ranks disagree on their inputs: rank 0 has .*, rank 1 has "),
        ("data", "(rank 1 failed: ValueError: )?no more data"),
        ("nan", r"rank 1 \(data rank 1\): the loss of step 2 is nan"),
    ],
)
def test_every_rank_raises_at_once(how, text, pool, tmp_path):
    for rank, (error, _) in replies(pool, how, tmp_path).items():
        assert re.match(text, error), f"rank {rank}: {error!r}"


def test_a_stuck_collective_is_named_with_its_module_and_the_missing_rank(pool, tmp_path):
    found = replies(pool, "late", tmp_path)
    assert [error for error, _ in found.values()] == ["", ""], "rank 1 came in the end"
    (text,) = found[0][1]
    assert re.fullmatch(
        r"rank 0 has waited \d+ s for all_to_all over ep of blocks\.0\.moe, in the forward; "
        r"missing: rank 1 is at the forward since \d+ s",
        text,
    ), text


def test_a_rank_that_does_something_else_is_named(pool, tmp_path):
    (text,) = replies(pool, "reading", tmp_path)[0][1]
    assert re.fullmatch(
        r"rank 0 has waited \d+ s for the ranks' word on a step; missing: rank 1 is at the data of step 2 since \d+ s",
        text,
    ), text


def test_a_rank_that_does_not_answer_is_named():
    graph = watch.Place(
        "the backward", True, [("all_reduce", "tp", "m.0"), ("all_to_all", "ep", "m.1")], {"tp": 4, "ep": 7}
    )
    mine = {"what": "the backward", "seconds": 9.0, "counts": {"tp": 5, "ep": 8}}
    other = {"what": "the backward", "seconds": 9.0, "counts": {"tp": 5, "ep": 8}}
    text = watch.tell(0, {0: mine, 1: other}, {"tp": [0, 1], "ep": [0, 2]}, graph, 4)
    assert text == (
        "rank 0 has waited 9 s for all_to_all over ep of m.1, in the backward; missing: rank 2 does not answer"
    )
