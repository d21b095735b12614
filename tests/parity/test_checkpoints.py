"""Runs that go on from a checkpoint on real processes: checkpoints.py."""

from __future__ import annotations

import pytest

from tests.parity.checkpoints import OneRankFails, ResumedRun

CASES = [
    ResumedRun("qwen3_moe", (1, 2, 2), zero=1, others=(((2, 2, 1), 3, "tiled"),)),
    ResumedRun("nano_moe", (2, 1, 2), zero=2, others=(((1, 4, 1), 1, "tiled"), ((1, 2, 2), 0, "tiled"))),
    ResumedRun("nano_moe", (1, 4, 1), zero=0, optimizer="torch", others=(((1, 4, 1), 3, "tiled"),)),
    ResumedRun("nano_moe", (2, 2, 1), zero=1, optimizer="bf16-split"),
    ResumedRun("nano_moe", (2, 2, 1), zero=2, optimizer="int8"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_goes_on_as_without_a_break(run, case):
    result = run(case)
    assert result["ok"], result["message"]


def test_what_goes_wrong_on_one_rank_ends_all(run):
    result = run(OneRankFails("", (2, 1, 1)))
    assert result["ok"], result["message"]
