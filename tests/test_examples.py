"""The plain example models train on one process."""

import importlib.util
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["nano_moe", "shared_expert_moe", "titan_moe"])
def test_plain_model_trains_one_step(name):
    torch.manual_seed(0)
    model, inputs = load(name).build()
    loss = model(**inputs)
    assert loss.shape == ()
    loss.backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert model(**inputs) < loss


@pytest.mark.parametrize("name", ["nano_moe", "shared_expert_moe", "titan_moe"])
def test_build_scales_and_returns_logits_without_targets(name):
    model, inputs = load(name).build(batch=3, seq=24, layers=1, experts=4, top_k=1, vocab=50)
    assert model(inputs["idx"]).shape == (3, 24, 50)


def test_nano_moe_ties_embedding_and_head():
    model, _ = load("nano_moe").build()
    assert model.lm_head.weight is model.wte.weight
    assert "lm_head.weight" not in dict(model.named_parameters())
