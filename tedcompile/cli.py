"""The command line: `tedcompile explain MODEL --mesh ep=4,tp=2`, `tedcompile train` and `tedcompile calibrate`."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import io
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn

from tedcompile import calibrate, settings
from tedcompile.explain import BATCH, DTYPES, SEQ, Style, analyse, choose, render
from tedcompile.mesh import MeshShape
from tedcompile.options import Options

EPILOG = """MODEL is a transformers model type (mixtral, qwen3_moe: its default configuration), a config.json or a
folder with one, or file.py:function, a function that returns (model, example_inputs).
No weights, devices or processes are needed."""


class Parser(argparse.ArgumentParser):
    """Raises ValueError for what it cannot read, and names an unknown option before a missing one."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see {self.prog} --help)")

    def read(self, argv: Sequence[str] | None) -> argparse.Namespace:
        options, rest = self.parse_known_args(argv)
        if rest:
            name = next((r.partition("=")[0] for r in rest if r.startswith("-")), "")
            if not name:
                raise ValueError(f"{options.command} has no use for {rest[0]!r}")
            close = difflib.get_close_matches(name, options.known, 1)
            hint = f"did you mean {close[0]}?" if close else f"the options are {', '.join(options.known)}"
            raise ValueError(f"unknown option {name}: {hint}")
        return options


def parser() -> Parser:
    top = Parser(prog="tedcompile", description="Tensor x expert x data parallelism for plain MoE models.")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    explain = commands.add_parser(
        "explain",
        help="what the compiler makes of a model on a mesh",
        description="Shows what tedcompile makes of a model on a mesh: passes, graph, layouts, collectives.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = explain.add_argument
    add("model", metavar="MODEL", help="model type, config.json, folder, or file.py:function")
    add("--mesh", metavar="dp=1,ep=2,tp=2", help="sizes of the axes; an axis left out has size 1")
    add("--batch", type=int, metavar="N", help="sequences in one rank's batch (1)")
    add("--seq", type=int, metavar="N", help="positions in a sequence (2048)")
    add("--dtype", metavar="NAME", help="of the parameters: bf16 (default), fp16 or fp32")
    add("--layer", metavar="K", help="layer to print, or all (default: the first one with an MoE block)")
    add("--pass", dest="dump", default="", metavar="NAME", help="print that layer before and after one pass, only")
    add("--off", action="append", default=[], metavar="PASS", help="leave an optimisation out (may be repeated)")
    add("--plan", action="append", default=[], metavar="CHOICE=VALUE", help="force a choice: dispatch, experts")
    add("--checkpoint", default="none", metavar="KIND", help="none (default), full or selective")
    add("--memory-budget", type=float, metavar="X", help="for selective: bytes, or a fraction of what none keeps")
    add("--machine", default="", metavar="NAME", help="whose costs decide: a known machine, or a file NAME.toml")
    add("--json", action="store_true", help="print one JSON object")
    measure = commands.add_parser(
        "calibrate",
        help="measure this machine, for --machine",
        description="Measures products and memory of this machine, and its links if torchrun starts several processes: "
        "torchrun --nproc-per-node 8 --no-python tedcompile calibrate --out machine.toml",
    )
    measure.add_argument("--out", metavar="FILE.toml", help="where to write the result (default: printed)")
    train = commands.add_parser(
        "train",
        help="train a model on local files",
        description="Trains a model on local files, on one process or under torchrun: "
        "torchrun --nproc-per-node 8 --no-python tedcompile train --model FOLDER --data PATH --mesh ep=4,tp=2",
    )
    settings.add_options(train.add_argument)
    experts = commands.add_parser(
        "experts",
        help="checkpoints with more or fewer experts",
        description="experts merge A B --out C: the experts of both, and their routers' rows. "
        "experts prune A --out C --keep N: the experts that held-out data use most (or random ones), in each layer.",
    )
    experts.add_argument("what", metavar="merge|prune", choices=("merge", "prune"))
    experts.add_argument("folders", metavar="FOLDER", nargs="+", help="Hugging Face folders with safetensors files")
    experts.add_argument("--out", metavar="FOLDER", required=True, help="where to write the result")
    experts.add_argument("--dense", metavar="KIND", default="first", help="merge: other weights: first or mean")
    experts.add_argument("--keep", metavar="N", type=int, help="prune: how many experts stay")
    experts.add_argument("--by", metavar="KIND", default="utilisation", help="prune: utilisation or random")
    experts.add_argument("--data", metavar="PATH", nargs="+", default=[], help="prune: held-out text to count on")
    experts.add_argument("--batches", metavar="N", type=int, default=16, help="prune: sequences of it (16)")
    experts.add_argument("--seq", metavar="N", type=int, default=512, help="prune: their tokens (512)")
    experts.add_argument("--seed", metavar="N", type=int, default=0, help="prune: of random ones")
    for command in (explain, measure, train, experts):
        known = [name for action in command._actions for name in action.option_strings if name.startswith("--")]
        command.set_defaults(known=known)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit code: 0, or 2 for input that cannot work (one sentence on stderr)."""
    try:
        options = parser().read(argv)
        text = COMMANDS[options.command](options)
    except (ValueError, TypeError) as error:
        print(f"tedcompile: {error}", file=sys.stderr)
        return 2
    try:
        print(text, end="", flush=True)
    except BrokenPipeError:  # the reader has seen enough; nothing is left to flush at exit
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _explain(options: argparse.Namespace) -> str:
    if options.mesh is None:
        raise ValueError("explain needs --mesh, the sizes of the axes, as in --mesh ep=4,tp=2")
    shape = MeshShape.parse(options.mesh)
    if options.dtype is not None and options.dtype not in DTYPES:
        raise ValueError(f"unknown dtype {options.dtype!r}: choose bf16, fp16 or fp32")
    if ".py:" in options.model:
        given = [f"--{name}" for name in ("batch", "seq", "dtype") if getattr(options, name) is not None]
        if given:
            raise ValueError(f"{given[0]} is for transformers models: {options.model} makes its own inputs and weights")
    if options.layer is not None and options.layer != "all" and not options.layer.isdigit():
        raise ValueError(f"--layer takes a number or all, not {options.layer!r}")
    with _quiet():
        found = analyse(
            options.model,
            shape,
            batch=BATCH if options.batch is None else options.batch,
            seq=SEQ if options.seq is None else options.seq,
            dtype=DTYPES[options.dtype or "bf16"],
            dump=options.dump,
            options=Options.of(
                options.off, _pairs(options.plan), options.checkpoint, options.memory_budget, options.machine
            ),
        )
    choose(found.lines, options.layer)
    if options.json:
        return json.dumps(found.facts, indent=2) + "\n"
    return render(found, options.layer, Style.of(sys.stdout).colour)


def _pairs(texts: Sequence[str]) -> dict[str, str]:
    for text in texts:
        if "=" not in text:
            raise ValueError(f"--plan takes CHOICE=VALUE, as in dispatch=all_gather, not {text!r}")
    return dict(text.split("=", 1) for text in texts)  # type: ignore[misc]


def _train(options: argparse.Namespace) -> str:
    given = {n: v for n in settings.FIELDS if (v := getattr(options, n)) is not None}
    chosen = settings.Settings.of(given, options.config or "")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from tedcompile import train

    train.run(chosen)
    return ""


def _experts(options: argparse.Namespace) -> str:
    from tedcompile import experts

    wanted = {"merge": 2, "prune": 1}[options.what]
    if len(options.folders) != wanted:
        raise ValueError(f"experts {options.what} takes {wanted} folders, not {len(options.folders)}")
    if options.what == "merge":
        return experts.merge(options.folders[0], options.folders[1], options.out, options.dense)
    if options.keep is None:
        raise ValueError("experts prune needs --keep, how many experts stay in each layer")
    o = options
    return experts.prune(o.folders[0], o.out, o.keep, o.by, o.data, o.batches, o.seq, o.seed)


COMMANDS: dict[str, Callable[[argparse.Namespace], str]] = {
    "explain": lambda options: _explain(options),
    "calibrate": lambda options: calibrate.run(options.out),
    "train": _train,
    "experts": _experts,
}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What models print and libraries log is not part of the answer: on stderr, and not beside an error."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    noise = io.StringIO()
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(noise), contextlib.redirect_stderr(noise):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
    sys.stderr.write(noise.getvalue())


if __name__ == "__main__":
    sys.exit(main())
