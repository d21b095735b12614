"""The processes that the cases of all files here run in."""

from __future__ import annotations

import pytest

from tests.parity.harness import Case, Pool


@pytest.fixture(scope="session")
def run():
    """Runs a case in the processes of its world size; they are kept until another size is asked for."""
    pool = Pool(1)

    def run(case: Case) -> dict:
        nonlocal pool
        if case.world != pool.world_size:
            pool.stop()
            pool = Pool(case.world)
        return pool.run([case])[0]

    yield run
    pool.stop()
