"""Models by name: a transformers model type, a config.json or its folder, `file.py:function`."""

from __future__ import annotations

import difflib
import importlib.util
import json
from pathlib import Path
from typing import Any

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DTYPES |= {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def load(spec: str, dtype: torch.dtype = torch.bfloat16, device: str = "meta") -> tuple[torch.nn.Module, Any]:
    """A model without weights, and its example inputs (None for a transformers model), from what a user types.

    `spec` is a transformers model type, a config.json or a folder with one, or `file.py:function`, where the function
    takes no arguments and returns `(model, example_inputs)`. On another `device` than meta the model has the values of
    its initialisation. Raises ValueError that says what is wrong with `spec`.
    """
    file, colon, function = spec.rpartition(":")
    if colon and file.endswith(".py"):
        return _call(Path(file), function, device)
    return from_config(configuration(spec), dtype, device), None


def configuration(spec: str) -> Any:
    """The transformers configuration of a model type, a config.json or its folder. Raises ValueError as `load`."""
    path = Path(spec)
    if spec.endswith(".py"):
        raise ValueError(f"{spec} names no function: write {spec}:FUNCTION, which returns (model, example_inputs)")
    if path.is_dir():
        path = path / "config.json"
        if not path.exists():
            raise ValueError(f"{spec} holds no config.json")
    if path.suffix == ".json" or path.is_file():
        return _read_config(path)
    types = _transformers().CONFIG_MAPPING
    kind = spec.replace("-", "_")
    if kind not in types:
        close = difflib.get_close_matches(kind, list(types), 3)
        hint = f"did you mean {' or '.join(close)}?" if close else "give a transformers model type, as mixtral,"
        rest = "" if close else " a config.json or its folder, or file.py:function"
        raise ValueError(f"unknown model {spec!r}: {hint}{rest}")
    return types[kind]()


def _transformers():
    try:
        import transformers
    except ImportError:
        raise ValueError("this model needs the package transformers: pip install 'tedcompile[hf]'") from None
    return transformers


def _read_config(path: Path) -> Any:
    types = _transformers().CONFIG_MAPPING
    try:
        values = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    kind = values.get("model_type") if isinstance(values, dict) else None
    if kind not in types:
        raise ValueError(f"{path}: model_type {kind!r} is not one of the installed transformers")
    try:
        return types[kind].from_dict(values)
    except Exception as error:
        raise ValueError(f"{path} is not a configuration of {kind}: {first_line(error)}") from None


def from_config(config: Any, dtype: torch.dtype = torch.bfloat16, device: str = "meta") -> torch.nn.Module:
    """The causal or sequence-to-sequence language model of a transformers configuration."""
    auto = auto_class(config)
    if config.is_encoder_decoder and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = config.pad_token_id or 0  # transformers 5 keeps it elsewhere
    try:
        with torch.device(device):
            return auto.from_config(config, dtype=dtype)
    except Exception as error:
        raise ValueError(f"a model of type {config.model_type!r} cannot be built: {first_line(error)}") from error


def auto_class(config: Any) -> Any:
    """What makes models of a transformers configuration. Raises TypeError and ValueError where there is nothing."""
    transformers = _transformers()
    if not isinstance(config, getattr(transformers, "PreTrainedConfig", transformers.PretrainedConfig)):
        raise TypeError(
            f"model must be an nn.Module, a transformers configuration or a name, got {type(config).__name__}"
        )
    classes = [transformers.AutoModelForCausalLM, transformers.AutoModelForSeq2SeqLM]
    for auto in classes[::-1] if config.is_encoder_decoder else classes:
        if type(config) in auto._model_mapping:
            return auto
    raise ValueError(f"transformers has no causal or sequence-to-sequence language model of type {config.model_type!r}")


def _call(file: Path, function: str, device: str) -> tuple[torch.nn.Module, Any]:
    if not file.is_file():
        raise ValueError(f"there is no file {file}")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"{file} cannot be imported: {first_line(error)}") from error
    make = getattr(module, function, None)
    if not callable(make):
        raise ValueError(f"{file} has no function {function!r}")
    try:
        try:
            with torch.device(device):
                made = make()
        except Exception:  # what reads values cannot run without them
            made = make()
    except Exception as error:
        raise ValueError(f"{file}:{function} failed: {first_line(error)}") from error
    if not isinstance(made, tuple) or len(made) != 2 or not isinstance(made[0], torch.nn.Module):
        kinds = f"({', '.join(type(m).__name__ for m in made)})" if isinstance(made, tuple) else type(made).__name__
        raise ValueError(f"{file}:{function} must return (model, example_inputs), an nn.Module and a dict, not {kinds}")
    if not isinstance(made[1], (dict, tuple)):
        raise ValueError(f"{file}:{function}: example_inputs must be a dict or a tuple, not {type(made[1]).__name__}")
    return made


def first_line(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__
