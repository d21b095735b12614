"""`tedcompile train` under torchrun: a rank that is killed, a request to end, and another mesh."""

from __future__ import annotations

import sys

import pytest

from tests import soak


@pytest.mark.skipif(sys.platform != "linux", reason="finds processes by /proc")
def test_killed_asked_to_end_and_finished_on_another_mesh(tmp_path):
    """All of it together is the run on one process without a break."""
    from tedcompile.cli import main

    def trained(process, folder):
        soak.wait_for(process, lambda: max(soak.losses(folder), default=0) >= soak.EVERY + 2)

    def resumed(process, folder):
        log = folder.with_suffix(".log")
        soak.wait_for(process, lambda: "goes on from" in log.read_text())
        trained(process, folder)

    assert main(soak.options(tmp_path, "whole", "dp=1")) == 0
    expected = soak.losses(tmp_path / "whole")
    assert len(expected) == soak.STEPS
    found, wrong = soak.broken(tmp_path, "broken", "ep=2", 2, trained, resumed)
    assert not wrong
    log = (tmp_path / "broken.log").read_text()
    assert "asked to end: saved after step" in log and len(found) < soak.STEPS, log
    assert main(soak.options(tmp_path, "broken", "dp=1")) == 0
    assert soak.check(expected, soak.losses(tmp_path / "broken"), 0, []) == []
