"""`tedcompile train` under torchrun: a rank that is killed, another mesh, a request to end."""

from __future__ import annotations

import signal
import sys

import pytest

from tests import soak

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="finds processes by /proc")


def test_a_killed_rank_costs_no_more_than_an_interval(tmp_path):
    """The run on two ranks, one killed, on another mesh after a request to end: all of it is the run on one."""
    from tedcompile.cli import main

    def after(step):
        return lambda process, folder: soak.wait_for(process, lambda: max(soak.losses(folder), default=0) >= step)

    assert main(soak.options(tmp_path, "whole", "dp=1")) == 0
    expected = soak.losses(tmp_path / "whole")
    assert len(expected) == soak.STEPS

    found, wrong = soak.broken(tmp_path, "killed", "ep=2", 2, after(soak.EVERY + 2))
    assert wrong + soak.check(expected, found, 0, []) == []

    process = soak.launch(tmp_path, "ended", "tp=2", 2)
    after(2)(process, tmp_path / "ended")
    process.send_signal(signal.SIGTERM)
    soak.finish(process, 120)
    log = (tmp_path / "ended.log").read_text()
    assert "asked to end: saved after step" in log, log
    assert main(soak.options(tmp_path, "ended", "dp=1")) == 0
    assert soak.check(expected, soak.losses(tmp_path / "ended"), 0, []) == []
