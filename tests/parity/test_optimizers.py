"""`tedcompile.optim` on real processes: DeepSpeed's MoE forms, and each ZeRO stage; optimizers.py has it all."""

from __future__ import annotations

import math

import pytest

from tests.parity.optimizers import FORMS, OptimizerCase, ResumedCase

STAGES = [
    OptimizerCase("deepseek_v3", (1, 2, 1), "starved_expert", rule="sgd", zero=1, clip=True),
    OptimizerCase("nano_moe", (2, 1, 2), zero=2),
    OptimizerCase("qwen3_moe", (1, 2, 2), "starved_expert", zero=3, clip=True),
]


def check(case: OptimizerCase, result: dict) -> None:
    assert result["ok"], f"{case}\n{result['message']}"
    dp, ep, _ = case.mesh
    limit = 0.6 if case.zero else result["param_fraction"] + 0.02  # every parameter starts on a row of 256
    assert result["state_fraction"] <= limit, "state is not shared out"
    if case.zero == 3:
        assert result["param_fraction"] <= 1.05 / min(dp * ep, 2), "parameters are not shared out"


@pytest.mark.parametrize("form", sorted(FORMS, key=lambda form: math.prod(FORMS[form]["mesh"])))
def test_form(run, form):
    rule = "sgd" if "D" in form else "adamw"
    model = "nano_moe" if form == "E+D+M" else "qwen3_moe"  # eight processes take their time
    case = OptimizerCase(model, scenario="starved_expert", rule=rule, clip="Z" in form, **FORMS[form])
    check(case, run(case))


@pytest.mark.parametrize("case", STAGES, ids=str)
def test_stage(run, case):
    check(case, run(case))


def test_another_mesh_and_stage_goes_on(run):
    case = ResumedCase("qwen3_moe", (1, 2, 2), zero=2, clip=True, other_mesh=(2, 1, 2), other_zero=3)
    result = run(case)
    assert result["ok"], f"{case}\n{result['message']}"
