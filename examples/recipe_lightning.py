"""A tedcompile model in Lightning.

    torchrun --nproc-per-node 4 examples/recipe_lightning.py --ep 2 --tp 2

`ModelParallelStrategy` leaves the model as `configure_model` makes it (no DDP: gradients are averaged over the dp x ep
ranks already), and does not scale the loss by the number of processes. The loader deals batches over the dp x ep ranks;
one without a `DistributedSampler` would get Lightning's, which shuffles for training whatever order was asked for.
Lightning's own checkpoints are off: `tedcompile.Checkpoints` and `save_pretrained` know the layouts.
"""

import argparse
import os
import sysconfig
from pathlib import Path

import lightning
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.utils.data import DataLoader, DistributedSampler
from transformers import MixtralConfig, MixtralForCausalLM

import tedcompile

SIZES = dict(hidden_size=128, intermediate_size=256, num_attention_heads=4, num_key_value_heads=4)
MODEL = dict(vocab_size=256, num_hidden_layers=4, **SIZES)


class Module(lightning.LightningModule):
    """`sizes`: of dp, ep and tp; `batch`: rows of `data` that a data rank takes at once; `options`: of parallelize."""

    def __init__(self, model, sizes: tuple[int, int, int], optimizer, data, batch: int, shuffle=True, **options):
        super().__init__()
        self.model, self.sizes, self.optimizer, self.options = model, sizes, optimizer, options
        self.data, self.batch, self.shuffle = data, batch, shuffle
        self.mesh = None

    def configure_model(self) -> None:
        if self.mesh is None:
            device = self.trainer.strategy.root_device
            names = ("dp", "ep", "tp")
            self.mesh = torch.distributed.init_device_mesh(device.type, self.sizes, mesh_dim_names=names)
            self.model = tedcompile.parallelize(self.model.to(device), self.mesh, **self.options)

    def train_dataloader(self):  # called when the mesh is there
        world, rank = tedcompile.data_world(self.mesh), tedcompile.data_rank(self.mesh)
        order = DistributedSampler(self.data, world, rank, shuffle=self.shuffle, drop_last=True)
        return DataLoader(self.data, self.batch, sampler=order, drop_last=True)

    def configure_optimizers(self):
        return self.optimizer(self.model.parameters())

    def training_step(self, batch, index):
        loss = self.model(**batch).loss
        self.log("loss", loss, prog_bar=True, sync_dist=True)  # tp ranks have the same one: the mean is right
        return loss


class Strategy(ModelParallelStrategy):
    def __init__(self, sizes: tuple[int, int, int]):
        dp, ep, tp = sizes
        super().__init__(data_parallel_size=dp * ep, tensor_parallel_size=tp)

    def model_to_device(self) -> None:
        pass  # it is there, and DTensors take long to say so


def main() -> None:
    parser = argparse.ArgumentParser()
    for axis in ("dp", "ep", "tp"):
        parser.add_argument(f"--{axis}", type=int, default=1)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--seq", type=int, default=128)
    parser.add_argument("--out", default="trained")
    options = parser.parse_args()

    sizes = (options.dp, options.ep, options.tp)
    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(**MODEL))
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))  # the data: the standard library's own
    text = torch.frombuffer(bytearray(b"".join(f.read_bytes() for f in sources)), dtype=torch.uint8)
    rows = text[: len(text) // options.seq * options.seq].view(-1, options.seq).long()
    data = [dict(input_ids=r, labels=r) for r in rows]
    module = Module(model, sizes, lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, fused=True), data, batch=4)
    local = int(os.environ["LOCAL_WORLD_SIZE"])
    trainer = lightning.Trainer(
        accelerator="gpu" if torch.cuda.is_available() else "cpu",
        devices=local,
        num_nodes=int(os.environ["WORLD_SIZE"]) // local,
        strategy=Strategy(sizes),
        max_steps=options.steps,
        accumulate_grad_batches=2,
        gradient_clip_val=1.0,
        enable_checkpointing=False,
        logger=False,
    )
    trainer.fit(module)
    tedcompile.save_pretrained(module.model, options.out)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
