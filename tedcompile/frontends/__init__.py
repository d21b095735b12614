"""What a library's models need during capture, and nothing about any one model."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch


@dataclass
class Mapped:
    """A checkpoint's tensors as those of a model.

    tensors: by name in the model, or the error of the conversion; sources: the names in the checkpoint of what each is
    made of; unexpected: names that the model has no place for; loaded: to be called when the model has the values.
    """

    tensors: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, list[str]] = field(default_factory=dict)
    unexpected: list[str] = field(default_factory=list)
    loaded: Callable[[], None] = lambda: None


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


def from_checkpoint(model: torch.nn.Module, found: dict[str, Any]) -> Mapped:
    """The tensors of a checkpoint under the names and in the shapes of the model; a plain module's as they are."""
    library = _library(model)
    if library:
        return library.from_checkpoint(model, found)
    known = model.state_dict()
    tensors = {name: t for name, t in found.items() if name in known}
    return Mapped(tensors, {name: [name] for name in tensors}, [name for name in found if name not in known])


def to_checkpoint(model: torch.nn.Module, state: dict[str, Any]) -> dict[str, Any]:
    """The other way: the model's tensors as its library would write them."""
    library = _library(model)
    return library.to_checkpoint(model, state) if library else state


def save_config(model: torch.nn.Module, folder: Path) -> None:
    """Writes what a library keeps beside the weights."""
    library = _library(model)
    if library:
        library.save_config(model, folder)
