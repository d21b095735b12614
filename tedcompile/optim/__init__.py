"""Optimizers that update flat memory tile by tile, one compiled kernel for any rule."""

from tedcompile.optim import rules
from tedcompile.optim.rules import Rule
from tedcompile.optim.tiled import Tiled, TiledAdamW

__all__ = ["Rule", "Tiled", "TiledAdamW", "rules"]
