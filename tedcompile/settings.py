"""What `tedcompile train` can be told: by options, or by a TOML file whose keys are the options' names."""

from __future__ import annotations

import dataclasses
import difflib
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tedcompile.mesh import MeshShape

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SCHEDULES = ("cosine", "linear", "constant")


def _option(default: Any, metavar: str, text: str, choices: tuple = ()) -> Any:
    return field(default=default, metadata={"metavar": metavar, "help": text, "choices": choices})


@dataclass(frozen=True)
class Settings:
    """`batch` sequences are a micro-batch, one call of the model; `micro_batches` of them are a step, on any mesh."""

    model: str = _option("", "MODEL", "folder with weights, config.json (random weights), or file.py:function")
    data: tuple[str, ...] = _option((), "PATH", "text, .jsonl, .parquet, .npy, a saved dataset or a folder of them")
    tokenizer: str = _option("", "FOLDER", "folder with a tokenizer, or bytes (default: the model's folder)")
    mesh: str = _option(
        "",
        "dp=1,ep=2,tp=2",
        "sizes of the axes (default: dp=processes); several by /, as in ep=8/ep=4, for restarts with fewer processes",
    )
    out: str = _option("run", "FOLDER", "checkpoints, metrics and tokens; a run goes on from what is there")
    export: str = _option("", "FOLDER", "at the end, write the model as the plain model's library would")
    steps: int = _option(100, "N", "optimizer steps of the whole run")
    batch: int = _option(1, "N", "sequences of a micro-batch")
    seq: int = _option(1024, "N", "tokens of a sequence")
    micro_batches: int = _option(0, "N", "micro-batches of a step, all ranks together (default: dp x ep)")
    lr: float = _option(3e-4, "X", "learning rate")
    min_lr: float = _option(0.1, "X", "the last learning rate, as a fraction of --lr")
    schedule: str = _option("cosine", "NAME", "cosine, linear or constant", SCHEDULES)
    warmup: int = _option(0, "N", "steps of linear warm-up")
    weight_decay: float = _option(0.1, "X", "of weights; norms and biases have none")
    beta2: float = _option(0.95, "X", "AdamW's second beta")
    eps: float = _option(1e-8, "X", "AdamW's epsilon")
    clip: float = _option(1.0, "X", "largest norm of all gradients, 0 for none")
    dtype: str = _option("bf16", "NAME", "of the parameters: bf16 (with fp32 masters) or fp32", ("bf16", "fp32"))
    master: str = _option("fp32", "KIND", "of bf16 parameters: fp32 or split", ("fp32", "split"))
    moments: str = _option("fp32", "KIND", "how AdamW's moments are kept: fp32, bf16 or int8", ("fp32", "bf16", "int8"))
    offload: str = _option("", "cpu", "keep optimizer state in host memory", ("", "cpu"))
    zero: int = _option(1, "N", "ZeRO stage", (0, 1, 2, 3))
    aux_loss: float = _option(0.0, "X", "coefficient of the routers' auxiliary loss, and a report of the experts' load")
    backend: str = _option("inductor", "NAME", "inductor or eager", ("inductor", "eager"))
    checkpoint: str = _option("none", "KIND", "recomputation: none, full or selective", ("none", "full", "selective"))
    memory_budget: float = _option(0.0, "X", "for selective: bytes, or a fraction of what none keeps")
    off: tuple[str, ...] = _option((), "PASS", "leave an optimisation out (may be repeated)")
    plan: tuple[str, ...] = _option((), "CHOICE=VALUE", "force a choice of the cost model (may be repeated)")
    machine: str = _option("", "NAME", "whose costs decide")
    device: str = _option("", "NAME", "cuda or cpu (default: cuda where there is one)", ("", "cuda", "cpu"))
    seed: int = _option(0, "N", "of weights and of the order of the data")
    save_every: int = _option(100, "N", "steps between checkpoints, 0 for only one at the end")
    keep: int = _option(3, "N", "checkpoints that stay")
    eval_data: tuple[str, ...] = _option((), "PATH", "held-out data (default: the last sequences of --data)")
    eval_every: int = _option(0, "N", "steps between evaluations, 0 for none")
    eval_batches: int = _option(8, "N", "micro-batches of an evaluation")
    log_every: int = _option(10, "N", "steps between lines of the log and of metrics.jsonl")
    timeout: float = _option(600.0, "X", "seconds that a rank may wait for another one")

    @staticmethod
    def of(given: Mapping[str, Any], file: str = "") -> Settings:
        """Options as typed, over those of a TOML file. Raises ValueError that names the option."""
        values: dict[str, Any] = {}
        for source, options in ((f"{file}: ", _read(file) if file else {}), ("", given)):
            for name, value in options.items():
                values[name] = _converted(source, name, value)
        made = Settings(**values)
        made._check()
        return made

    def _check(self) -> None:
        if not self.model:
            raise ValueError("train needs --model: a folder with weights, a config.json, or file.py:function")
        if not self.data:
            raise ValueError("train needs --data: files of text, .jsonl, .parquet or .npy")
        for name in ("steps", "batch", "seq", "keep", "eval_batches", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{_flag(name)} must be at least 1, got {getattr(self, name)}")
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if f.metadata["choices"] and value not in f.metadata["choices"]:
                choices = " or ".join(str(c) for c in f.metadata["choices"] if c != "")
                raise ValueError(f"{_flag(f.name)} cannot be {value!r}: choose {choices}")
            if isinstance(value, (int, float)) and value < 0:
                raise ValueError(f"{_flag(f.name)} must not be negative, got {value}")
        for text in self.plan:
            if "=" not in text:
                raise ValueError(f"--plan takes CHOICE=VALUE, as in dispatch=all_gather, not {text!r}")
        self.meshes()
        if self.warmup > self.steps:
            raise ValueError(f"--warmup {self.warmup} is more than --steps {self.steps}")

    def meshes(self) -> list[MeshShape]:
        """For elastic runs several, of which the first one for as many processes as there are is taken."""
        return [MeshShape.parse(text) for text in self.mesh.split("/")] if self.mesh else []

    def rate(self, step: int) -> float:
        """The learning rate of a step (from 0)."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        done = (step - self.warmup) / max(self.steps - self.warmup, 1)
        left = {"cosine": (1 + math.cos(math.pi * done)) / 2, "linear": 1 - done, "constant": 1.0}[self.schedule]
        return self.lr * (self.min_lr + (1 - self.min_lr) * left)

    def as_dict(self) -> dict[str, Any]:
        return {n: list(v) if isinstance(v, tuple) else v for n, v in dataclasses.asdict(self).items()}


FIELDS = {f.name: f for f in dataclasses.fields(Settings)}


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def add_options(add: Any) -> None:
    """Puts all options into a parser, as texts without defaults."""
    add("--config", metavar="FILE.toml", help="a file with any of these options, as in lr = 1e-3")
    for f in FIELDS.values():
        default = f" ({f.default})" if f.default not in ("", (), 0) and "default" not in f.metadata["help"] else ""
        several = dict(nargs="+", action="extend") if str(f.type).startswith("tuple") else {}
        add(_flag(f.name), metavar=f.metadata["metavar"], help=f.metadata["help"] + default, **several)


def _read(file: str) -> dict[str, Any]:
    try:
        found = tomllib.loads(Path(file).read_text())
    except OSError as error:
        raise ValueError(f"cannot read {file}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not TOML: {error}") from None
    values = {name.replace("-", "_"): value for name, value in found.items()}
    for name in values:
        if name not in FIELDS:
            close = difflib.get_close_matches(name, FIELDS, 1)
            raise ValueError(f"{file}: there is no option {name!r}" + (f": did you mean {close[0]}?" if close else ""))
    return values


def _converted(source: str, name: str, value: Any) -> Any:
    kind = str(FIELDS[name].type)
    wrong = ValueError(f"{source}{_flag(name)} takes {KINDS[kind]}, not {value!r}")
    if kind.startswith("tuple"):
        value = [value] if isinstance(value, str) else value
        if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
            raise wrong
        return tuple(value)
    if kind == "str":
        if not isinstance(value, str):
            raise wrong
        return value
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise wrong
    try:
        number = int(value) if kind == "int" else float(value)
    except ValueError:
        raise wrong from None
    if kind == "int" and not isinstance(value, str) and number != value or number != number:
        raise wrong
    return number


KINDS = {"int": "a whole number", "float": "a number", "str": "a text", "tuple[str, ...]": "texts"}
