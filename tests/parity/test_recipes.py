"""Trainers of other libraries over a parallel model: losses and weights of the plain run, on the mesh ep=2, tp=2.

Plain SGD without clipping, so that a factor in the loss or in the gradients shows.
"""

from __future__ import annotations

import copy
import functools
import importlib.metadata
import os
import sys
from dataclasses import dataclass
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from tedcompile.processes import Failure, Pool
from tests.test_examples import load

pytest.importorskip("transformers")
SIZES = (1, 2, 2)
BATCH, SEQ, ACCUMULATE, STEPS, RATE = 2, 12, 2, 2, 0.5
CONFIG = dict(vocab_size=32, hidden_size=32, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
              num_key_value_heads=2, num_local_experts=4)  # fmt: skip


def needs(package: str, version: tuple[int, ...] = ()):
    try:
        found = tuple(int(n) for n in importlib.metadata.version(package).split(".")[:2])
    except importlib.metadata.PackageNotFoundError:
        return pytest.mark.skip(reason=f"needs the package {package}: pip install 'tedcompile[recipes]'")
    return pytest.mark.skipif(found < version, reason=f"needs {package} {version}, this is {found}")


def build():
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**CONFIG))


def dataset(unequal: bool) -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(32, (2 * BATCH * ACCUMULATE * STEPS, SEQ), generator=torch.Generator().manual_seed(1))
    rows = [dict(input_ids=r, labels=r.clone()) for r in ids]
    for i, row in enumerate(rows if unequal else ()):
        row["labels"][: i % 7] = -100
    return rows


def plain(unequal: bool):
    """Losses, gradient norms, and weights before and after, on one process: a step is the mean over its labels."""
    model = build()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    losses, norms = [], []
    rows = dataset(unequal)
    for step in range(STEPS):
        taken = rows[step * len(rows) // STEPS : (step + 1) * len(rows) // STEPS]
        batch = {n: torch.stack([r[n] for r in taken]) for n in ("input_ids", "labels")}
        loss = model(**batch).loss
        loss.backward()
        losses.append(loss.item())
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9).item())
        optimizer.step()
        optimizer.zero_grad()
    return losses, norms, before, model.state_dict()


def as_under_torchrun() -> None:
    rank, world = str(dist.get_rank()), str(dist.get_world_size())
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world, LOCAL_WORLD_SIZE=world, GROUP_RANK="0")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29999", TORCHELASTIC_RUN_ID="recipes")


def reset_accelerate() -> None:
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(True)
    GradientState._reset_state()


@dataclass(frozen=True)
class Recipe:
    name: str
    folder: str
    timeout = 900.0

    def run(self):
        as_under_torchrun()
        losses, norms, model = getattr(self, self.name)(load(f"recipe_{self.name}"))
        assert not any(isinstance(m, torch.nn.parallel.DistributedDataParallel) for m in model.modules())
        return losses, norms, {n: p.full_tensor().detach().clone() for n, p in model.named_parameters()}

    def mesh(self):
        return torch.distributed.init_device_mesh("cpu", SIZES, mesh_dim_names=("dp", "ep", "tp"))

    def trainer(self, recipe):
        from transformers import TrainingArguments

        import tedcompile

        ids = torch.zeros(BATCH, SEQ, dtype=torch.int64)
        example = dict(input_ids=ids, labels=ids, num_items_in_batch=torch.tensor(1.0))

        def made():
            model = tedcompile.parallelize(build(), self.mesh(), example_inputs=example, backend="eager")
            return recipe.ParallelTrainer(
                model,
                self.mesh(),
                args=TrainingArguments(
                    self.folder,
                    max_steps=STEPS,
                    per_device_train_batch_size=BATCH,
                    gradient_accumulation_steps=ACCUMULATE,
                    train_sampling_strategy="sequential",
                    lr_scheduler_type="constant",
                    max_grad_norm=1e9,
                    logging_steps=1,
                    save_steps=1,
                    report_to="none",
                    disable_tqdm=True,
                    use_cpu=True,
                ),
                train_dataset=dataset(True),
                optimizers=(torch.optim.SGD(model.parameters(), lr=RATE), None),
            )

        trainer = made()
        trainer.train()
        logs = [x for x in trainer.state.log_history if "grad_norm" in x]
        again = made()
        again.train(resume_from_checkpoint=f"{self.folder}/checkpoint-1")
        assert again.state.global_step == STEPS
        for (name, p), q in zip(trainer.model.named_parameters(), again.model.parameters(), strict=True):
            assert p.full_tensor().equal(q.full_tensor()), f"{name} after a resumed run"
        return [x["loss"] for x in logs], [float(x["grad_norm"]) for x in logs], trainer.model

    def accelerate(self, recipe):
        from accelerate import Accelerator

        import tedcompile

        reset_accelerate()
        model = tedcompile.parallelize(build(), self.mesh(), backend="eager")
        optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
        schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
        loader = torch.utils.data.DataLoader(dataset(False), BATCH)
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATE)
        losses = recipe.train(accelerator, self.mesh(), model, optimizer, schedule, loader, STEPS, clip=1e9)
        assert schedule.last_epoch == STEPS
        return losses, [], model

    def lightning(self, recipe):
        import lightning

        class Losses(lightning.Callback):
            found: list[float] = []

            def on_train_batch_end(self, trainer, *_):
                self.found.append(trainer.callback_metrics["loss"].item())

        sgd = lambda parameters: torch.optim.SGD(parameters, lr=RATE)
        module = recipe.Module(build(), SIZES, sgd, dataset(False), BATCH, shuffle=False, backend="eager")
        trainer = lightning.Trainer(
            accelerator="cpu",
            devices=4,
            strategy=recipe.Strategy(SIZES),
            max_steps=STEPS,
            accumulate_grad_batches=ACCUMULATE,
            gradient_clip_val=1e9,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            logger=False,
            callbacks=[Losses()],
        )
        trainer.fit(module)
        found = torch.tensor(Losses.found).view(STEPS, ACCUMULATE).mean(1)
        return found.tolist(), [], module.model


@dataclass(frozen=True)
class Program:
    """The recipe's own `main`, with one layer, uncompiled."""

    name: str
    folder: str
    timeout = 900.0

    def run(self):
        import tedcompile

        as_under_torchrun()
        if self.name != "lightning":
            reset_accelerate()
        recipe = load(f"recipe_{self.name}")
        recipe.MODEL["num_hidden_layers"] = 1
        eager = functools.partial(tedcompile.parallelize, backend="eager")
        options = f"main --ep 2 --tp 2 --steps 2 --seq 12 --out {self.folder}"
        with (
            mock.patch.object(tedcompile, "parallelize", eager),
            mock.patch.object(dist, "destroy_process_group"),
            mock.patch.object(sys, "argv", options.split()),
        ):
            recipe.main()


@pytest.fixture(scope="module")
def pool():
    with Pool(4, device="cpu") as pool:
        yield pool


def call(pool, task):
    replies = pool.call(task)
    failed = [f"rank {r}: {x.text}" for r, x in replies.items() if isinstance(x, Failure)]
    assert not failed, "\n".join(failed)
    return replies


every_recipe = pytest.mark.parametrize(
    "name",
    [
        pytest.param("trainer", marks=[needs("accelerate"), needs("transformers", (5, 23))]),
        pytest.param("accelerate", marks=needs("accelerate")),
        pytest.param("lightning", marks=needs("lightning")),
    ],
)


@every_recipe
def test_recipe_is_the_plain_run(name, pool, tmp_path):
    replies = call(pool, Recipe(name, str(tmp_path)))
    losses, norms, before, after = plain(unequal=name == "trainer")
    for rank in range(4):
        found, lengths, weights = replies[rank]
        assert found == pytest.approx(losses, rel=1e-5)
        assert lengths == pytest.approx(norms if lengths else [], rel=1e-5)
        for n, w in weights.items():
            step, want = w - before[n], after[n] - before[n]
            assert (step - want).norm() <= 1e-4 * want.norm() + 1e-7, n


@every_recipe
def test_recipe_as_it_is_trains_and_exports(name, pool, tmp_path):
    from transformers import AutoModelForCausalLM

    call(pool, Program(name, str(tmp_path)))
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.num_hidden_layers == 1
