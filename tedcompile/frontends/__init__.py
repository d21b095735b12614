"""What a library's models need during capture, and nothing about any one model."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch


def _library(model: torch.nn.Module):
    base = getattr(sys.modules.get("transformers"), "PreTrainedModel", None)
    if base is not None and isinstance(model, base):
        from tedcompile.frontends import transformers

        return transformers
    return None


@contextlib.contextmanager
def prepared(model: torch.nn.Module) -> Iterator[None]:
    """Puts the model into a state that a graph can hold, for the time of the capture."""
    library = _library(model)
    with library.prepared(model) if library else contextlib.nullcontext():
        yield


def example_inputs(model: torch.nn.Module) -> dict[str, Any] | None:
    """Inputs of a training step where the library says what they are, else None."""
    library = _library(model)
    return library.example_inputs(model) if library else None
