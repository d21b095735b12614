"""Parity on real processes: every model on one mesh, every other mesh in every scenario. matrix.py has it all."""

from __future__ import annotations

import itertools

import pytest

from tests import models
from tests.parity.harness import GRADIENT_TOLERANCE, SCENARIOS, Case

OTHER_MESHES = [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 1), (2, 1, 2)]

# Ways to dispatch, and optimisations off: the others are in matrix.py; tests/passes has each pass on all ranks in one
# process.
WAYS = (
    "no_drop",
    "ted",
    "dedup",
    "all_gather",
    "dedup_folded",
    "no_algebra",
    "chunks",
    "ted_full_resend",
    "full_resend",
)

# Every model; with an aux loss it is dispatched in another way than planned, and so are some others further down. What
# is sent is what explain says.
CASES = [Case(model, (1, 2, 2)) for model in models.MODELS if not model.endswith("_aux")]
CASES += [
    Case(model, (1, 2, 2), options=way, volumes=True)
    for model, way in zip([*(m for m in models.MODELS if m.endswith("_aux")), *reversed(models.BASE)], WAYS)
]
# Every pair of mesh and scenario, with the models in turn.
CASES += [
    Case(model, mesh, scenario)
    for model, (mesh, scenario) in zip(
        itertools.cycle(models.BASE),
        [(mesh, name) for mesh in OTHER_MESHES for name, s in SCENARIOS.items() if s.needs(*mesh)],
    )
]
CASES += [
    Case("gpt_oss", (1, 1, 4), "few_tokens"),
    Case("nano_moe", (1, 1, 4), "few_tokens"),
    Case("qwen3_moe_kv2", (1, 1, 4)),  # tp does not divide the key/value heads
    Case("mixtral", (1, 4, 1), "ep_equals_experts"),
    Case("shared_expert_moe", (1, 4, 1), "ep_equals_experts"),
    Case("qwen3_moe", (1, 4, 2), "ep_equals_experts"),
    Case("deepseek_v3", (2, 2, 2), "starved_expert"),
    Case("olmoe", (1, 2, 1), all_axes=False),
    Case("gpt_oss", (1, 1, 2), example_inputs=False),
    Case("qwen3_moe", (2, 1, 1), volumes=True),  # its embedding's gradient travels as rows
]


@pytest.mark.parametrize("case", sorted(CASES, key=lambda case: case.world), ids=str)
def test_parity(run, case):
    check(case, run(case))


@pytest.mark.slow
@pytest.mark.parametrize("model", ["deepseek_v3", "nano_moe", "style_LoopContinue"])
def test_parity_compiled(run, model):
    case = Case(model, (1, 2, 2), backend="inductor")
    check(case, run(case))


def check(case: Case, result: dict) -> None:
    assert result["ok"], f"{case}\n{result['message']}"
    _, ep, tp = case.mesh
    stacked = case.model != "style_LoopContinue"  # whose experts are modules
    assert not stacked or result["expert_fraction"] == pytest.approx(1 / (ep * tp)), (
        "experts are not split over ep and tp"
    )
    if tp == 2 and not case.model.startswith("style"):  # these have more embedding than layers
        assert result["param_fraction"] <= 0.6, "tensor parallelism did not happen"


def test_an_unreduced_gradient_fails(run):
    result = run(Case("qwen3_moe", (1, 2, 1), sabotage="no_reduction"))
    assert not result["ok"]
    assert result["worst_gradient"][1] > 0.1
    assert "bit-equal" in result["message"]


def test_a_wrong_factor_of_one_expert_gradient_fails(run):
    result = run(Case("qwen3_moe", (1, 2, 1), sabotage="scale_expert_gradient"))
    assert not result["ok"]
    assert result["worst_gradient"] == ("model.layers.0.mlp.experts.gate_up_proj", pytest.approx(1.0, rel=1e-3))


def test_ranks_that_drift_apart_fail(run):
    result = run(Case("qwen3_moe", (1, 2, 1), sabotage="drift"))
    assert not result["ok"]
    assert result["worst_gradient"][1] < GRADIENT_TOLERANCE
    assert "model.norm.weight is not bit-equal among ep ranks" in result["message"]


def test_other_bytes_than_explain_says_fail(run):
    result = run(Case("qwen3_moe", (1, 2, 1), sabotage="other_volumes", volumes=True))
    assert not result["ok"]
    assert "all_to_all ep forward: " in result["message"] or "all_gather ep forward: " in result["message"]


def test_a_rank_that_raises_is_reported_and_the_next_case_runs(run):
    result = run(Case("no_such_model", (1, 2, 1)))
    assert not result["ok"]
    assert "KeyError: 'no_such_model'" in result["message"]
    assert run(Case("nano_moe", (1, 2, 1)))["ok"]
