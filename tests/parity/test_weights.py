"""Every model through a folder, on real processes: weights.py."""

from __future__ import annotations

import pytest

from tests import models
from tests.parity.harness import Pool
from tests.parity.weights import WeightsCase

CASES = [WeightsCase(model, (1, 2, 2), tied=model == "qwen3_moe", logits=model == "qwen3_moe") for model in models.BASE]


@pytest.fixture(scope="module")
def pool():
    with Pool(4) as pool:
        yield pool


@pytest.mark.parametrize("case", CASES, ids=str)
def test_through_a_folder(pool, case):
    (result,) = pool.run([case])
    assert result["ok"], result["message"]
    assert result["param_fraction"] < 0.4, "each rank has read more than its part"


def test_what_fails_on_one_rank_fails_on_all(pool):
    (result,) = pool.run([WeightsCase("qwen3_moe", (1, 2, 2), failures=True)])
    assert result["ok"], result["message"]
