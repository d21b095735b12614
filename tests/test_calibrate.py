"""`tedcompile calibrate`: the fit, and files that two real processes write."""

import os
import subprocess
import sys

import pytest

from tedcompile import calibrate
from tedcompile.calibrate import Sample
from tedcompile.cli import main
from tedcompile.machines import RING, load


def samples(seconds):
    for kind in calibrate.COLLECTIVES:
        for size in calibrate.SIZES["cpu"]:
            messages, sent = RING[kind](4, size)
            yield Sample(kind, size, messages, sent, seconds(messages, sent))


def test_fit_finds_what_made_the_times():
    assert calibrate.fit(list(samples(lambda m, b: m * 2e-5 + b / 3e9))) == pytest.approx((2e-5, 3e9))


def test_fit_stays_positive():
    alpha, beta = calibrate.fit(list(samples(lambda m, b: 1e-9 * b**1.5)))
    assert alpha > 0 and beta > 0


def test_two_processes(tmp_path):
    path = tmp_path / "machine.toml"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    subprocess.run(
        [*command, "tedcompile.cli", "calibrate", "--out", str(path)],
        check=True, timeout=300, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    machine, assumed = load(str(path)), load("cpu")  # loading checks that every number is positive
    assert machine.ranks_per_node == 2
    assert machine.intra != assumed.intra and machine.inter == assumed.inter
    assert "# inter: not measured, as cpu" in path.read_text()


def test_file_that_cannot_be_written(capsys):
    assert main(["calibrate", "--out", "machine.json"]) == 2
    assert capsys.readouterr().err == "tedcompile: --out must name a .toml file, not machine.json\n"
