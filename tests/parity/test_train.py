"""`tedcompile train` under torchrun: ranks that are killed, a request to end, and another mesh."""

from __future__ import annotations

import pathlib
import sys

import pytest

from tests import soak


@pytest.mark.skipif(sys.platform != "linux", reason="finds processes by /proc")
def test_killed_three_times_asked_to_end_and_finished_on_fewer_processes(tmp_path):
    """All of it together is the run on one process without a break."""
    from tedcompile.cli import main

    meshes = "ep=2 / dp=1"
    assert main(soak.options(tmp_path, "whole", meshes)) == 0
    expected = soak.losses(tmp_path / "whole")
    assert len(expected) == soak.STEPS
    with (tmp_path / "model.py").open("a") as file:
        file.write(soak.KILLS)

    process, log, seen = soak.launch(tmp_path, "broken", meshes, 2), tmp_path / "broken.log", set()

    def trained() -> bool:
        seen.update(soak.workers(process.pid))
        return log.read_text().count("goes on from") == 3 and max(soak.losses(tmp_path / "broken")) > 2 * soak.EVERY

    try:
        soak.wait_for(process, trained)
        process.terminate()
    finally:
        soak.finish(process, 120)
    text = log.read_text()
    assert soak.resumed(text) == [soak.EVERY] * 3, text[-4000:]  # after steps 6, 6 and 8
    assert len(seen) == 8 and not any(pathlib.Path(f"/proc/{pid}/cmdline").exists() for pid in seen)
    found = soak.losses(tmp_path / "broken")
    assert "asked to end: saved after step" in text and len(found) < soak.STEPS, text[-4000:]
    assert main(soak.options(tmp_path, "broken", meshes)) == 0
    assert soak.check(expected, soak.losses(tmp_path / "broken"), 0, []) == []
