"""The plain example models train on one process, and the demo reads the same batches in every process."""

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


def test_demo_batches_depend_on_step_and_data_rank_only():
    pytest.importorskip("transformers")
    demo = load("demo")
    data, again = demo.read_sources(), load("demo").read_sources()
    batches = [demo.read_batch(data, step, data_rank) for step in range(3) for data_rank in range(demo.DATA_WORLD)]
    torch.manual_seed(1)
    for i, batch in enumerate(batches):
        assert batch.shape == (demo.BATCH, demo.SEQ)
        assert batch.equal(demo.read_batch(again, *divmod(i, demo.DATA_WORLD)))
        assert not any(batch.equal(other) for other in batches[:i])
