"""A tedcompile model in the Hugging Face Trainer (transformers 5.23 or newer).

    torchrun --nproc-per-node 4 examples/recipe_trainer.py --ep 2 --tp 2

The model is not wrapped in DDP: its gradients are averaged over the dp x ep ranks already. The tp ranks of one data
rank get the same batches, so they do not count among the processes that the Trainer scales its loss by.
Checkpoints are tedcompile's: `trainer.train(resume_from_checkpoint=...)` reads them on any mesh.
"""

import argparse
import functools
import sysconfig
from pathlib import Path

import torch
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler
from transformers import MixtralConfig, MixtralForCausalLM, Trainer, TrainingArguments

import tedcompile

SIZES = dict(hidden_size=128, intermediate_size=256, num_attention_heads=4, num_key_value_heads=4)
MODEL = dict(vocab_size=256, num_hidden_layers=4, **SIZES)


class ParallelTrainer(Trainer):
    def __init__(self, model, mesh, **options):
        self.mesh = mesh
        model._is_accelerate_prepared = True  # Accelerate takes it as it is
        super().__init__(model, **options)

    def _move_model_to_device(self, model, device):
        pass  # it is there, and DTensors take long to say so

    def get_tp_size(self) -> int:
        return self.mesh["tp"].size()

    def _loader(self, dataset, batch, order):
        loader = DataLoader(dataset, batch, sampler=order(dataset), collate_fn=self.data_collator, drop_last=True)
        world, rank = tedcompile.data_world(self.mesh), tedcompile.data_rank(self.mesh)
        seed = self.args.data_seed or self.args.seed
        return prepare_data_loader(
            loader, num_processes=world, process_index=rank, use_seedable_sampler=True, data_seed=seed
        )

    def get_train_dataloader(self):
        order = SequentialSampler if self.args.train_sampling_strategy == "sequential" else RandomSampler
        return self._loader(self.train_dataset, self.args.per_device_train_batch_size, order)

    def get_eval_dataloader(self, eval_dataset=None):
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        return self._loader(dataset, self.args.per_device_eval_batch_size, SequentialSampler)

    def save_model(self, output_dir=None, _internal_call=False):
        tedcompile.save_pretrained(self.model, output_dir or self.args.output_dir)

    @functools.cached_property
    def checkpoints(self):
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)  # without Accelerate's wrapper
        return tedcompile.Checkpoints(self.args.output_dir, self.model, optimizer, self.lr_scheduler)

    def _save_optimizer_and_scheduler(self, output_dir):
        self.checkpoints.folder = Path(output_dir)
        self.checkpoints.save(self.state.global_step)
        self.checkpoints.wait()

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        pass  # the weights come with the optimizer's state

    def _load_optimizer_and_scheduler(self, checkpoint):
        if checkpoint is not None:
            self.checkpoints.folder = Path(checkpoint)
            self.checkpoints.load()


def main() -> None:
    parser = argparse.ArgumentParser()
    for axis in ("dp", "ep", "tp"):
        parser.add_argument(f"--{axis}", type=int, default=1)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--seq", type=int, default=128)
    parser.add_argument("--out", default="trained")
    options = parser.parse_args()

    cpu = not torch.cuda.is_available()
    arguments = TrainingArguments(  # starts the processes' group
        options.out,
        max_steps=options.steps,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=1e-3,
        logging_steps=10,
        save_steps=options.steps,
        report_to="none",
        use_cpu=cpu,
    )
    sizes = (options.dp, options.ep, options.tp)
    mesh = torch.distributed.init_device_mesh(arguments.device.type, sizes, mesh_dim_names=("dp", "ep", "tp"))
    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(**MODEL)).to(arguments.device)
    ids = torch.zeros(4, options.seq, dtype=torch.int64)
    example = dict(input_ids=ids, labels=ids, num_items_in_batch=torch.tensor(1.0))  # as the Trainer calls the model
    model = tedcompile.parallelize(model, mesh, example_inputs=example)

    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))  # the data: the standard library's own
    text = torch.frombuffer(bytearray(b"".join(f.read_bytes() for f in sources)), dtype=torch.uint8)
    rows = text[: len(text) // options.seq * options.seq].view(-1, options.seq).long()
    trainer = ParallelTrainer(model, mesh, args=arguments, train_dataset=[dict(input_ids=r, labels=r) for r in rows])
    trainer.train()
    trainer.save_model()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
