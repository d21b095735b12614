"""tedcompile: a plain Mixture-of-Experts model in, the same model trained by tensor x expert x data parallelism out."""

from tedcompile import optim
from tedcompile.api import parallelize
from tedcompile.checkpoint import Checkpoints
from tedcompile.explain import explain
from tedcompile.mesh import data_rank, data_world
from tedcompile.save import save_pretrained
from tedcompile.verify import verify

__all__ = ["Checkpoints", "data_rank", "data_world", "explain", "optim", "parallelize", "save_pretrained", "verify"]
