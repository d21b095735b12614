"""The command line: `tedcompile explain MODEL --mesh ep=4,tp=2`, `verify`, `train`, `experts` and `calibrate`."""

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

from tedcompile import calibrate, settings, trials
from tedcompile.compile import BACKENDS
from tedcompile.explain import BATCH, SEQ, analyse
from tedcompile.load import DTYPES
from tedcompile.mesh import MeshShape
from tedcompile.options import Options
from tedcompile.report import Style, choose, render
from tedcompile.verify import STEPS

EPILOG = """MODEL is a transformers model type (mixtral, qwen3_moe: its default configuration), a config.json or a
folder with one, or file.py:function, a function that returns (model, example_inputs).
No weights, devices or processes are needed."""
VERIFY_EPILOG = """MODEL is what `tedcompile explain` takes. The processes are started here (gloo, or NCCL with a GPU
for each); under torchrun its processes are used. A function's example inputs are the first batch's values, shuffled for
other ranks and steps. Exit code 2: the input cannot work."""


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
    check = commands.add_parser(
        "verify",
        help="plain against parallel, on this machine",
        description="Trains a model plain and parallel on processes of this machine and compares losses, gradients and "
        "updates, module by module. Transformers models are shrunk first. Exit code 0: they agree; 1: they do not.",
        epilog=VERIFY_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = check.add_argument
    add("model", metavar="MODEL", help="model type, config.json, folder, or file.py:function")
    add("--mesh", metavar="dp=1,ep=2,tp=2", help="sizes of the axes; an axis left out has size 1")
    add("--full", action="store_true", help="the model as it is, not shrunk; of a folder with safetensors its weights")
    add("--batch", type=int, metavar="N", help=f"sequences in one rank's batch ({trials.BATCH})")
    add("--seq", type=int, metavar="N", help=f"positions in a sequence ({trials.SEQ})")
    add("--dtype", metavar="NAME", help="of the parameters: fp32 (default), bf16 or fp16")
    add("--steps", type=int, default=STEPS, metavar="N", help=f"of SGD ({STEPS})")
    add("--seed", type=int, default=0, metavar="N", help="of the weights and batches (0)")
    add("--tolerance", type=float, metavar="X", help="of gradients and updates, relative (fp32: 1e-5); of losses X/10")
    add("--backend", default="eager", metavar="NAME", help="eager (default) or inductor")
    add("--module", default="", metavar="PATH", help="a row for each parameter of a module, or of all")
    add("--no-diagnosis", action="store_true", help="do not run again to find what makes the difference")
    add("--timeout", type=float, default=600.0, metavar="S", help="seconds that one run may take (600)")
    add("--device", default="", metavar="NAME", help="cpu or cuda (default: cuda with a GPU for each rank)")
    add("--off", action="append", default=[], metavar="PASS", help="leave an optimisation out (may be repeated)")
    add("--plan", action="append", default=[], metavar="CHOICE=VALUE", help="force a choice: dispatch, experts")
    add("--checkpoint", default="none", metavar="KIND", help="none (default), full or selective")
    add("--memory-budget", type=float, metavar="X", help="for selective: bytes, or a fraction of what none keeps")
    add("--machine", default="", metavar="NAME", help="whose costs decide: a known machine, or a file NAME.toml")
    add("--zero", type=int, default=0, metavar="N", help="ZeRO stage: 0 (default), 1, 2 or 3")
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
    for command in (explain, check, measure, train, experts):
        known = [name for action in command._actions for name in action.option_strings if name.startswith("--")]
        command.set_defaults(known=known)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit code: 0, 1 where `verify` finds a difference, or 2 for input that cannot work
    (one sentence on stderr)."""
    try:
        options = parser().read(argv)
        made = COMMANDS[options.command](options)
        text, code = made if isinstance(made, tuple) else (made, 0)
    except (ValueError, TypeError) as error:
        print(f"tedcompile: {error}", file=sys.stderr)
        return 2
    try:
        print(text, end="", flush=True)
    except BrokenPipeError:  # the reader has seen enough; nothing is left to flush at exit
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code


def _shape(options: argparse.Namespace) -> MeshShape:
    if options.mesh is None:
        raise ValueError(f"{options.command} needs --mesh, the sizes of the axes, as in --mesh ep=4,tp=2")
    shape = MeshShape.parse(options.mesh)
    if options.dtype is not None and options.dtype not in DTYPES:
        raise ValueError(f"unknown dtype {options.dtype!r}: choose bf16, fp16 or fp32")
    if ".py:" in options.model:
        given = [f"--{name}" for name in ("batch", "seq", "dtype") if getattr(options, name) is not None]
        if given:
            raise ValueError(f"{given[0]} is for transformers models: {options.model} makes its own inputs and weights")
    return shape


def _verify(options: argparse.Namespace) -> tuple[str, int]:
    """What to print, and the exit code."""
    shape = _shape(options)
    for name in ("batch", "seq", "steps", "timeout", "tolerance"):
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise ValueError(f"--{name} must be positive, got {value:g}")
    if options.backend not in BACKENDS:
        raise ValueError(f"unknown backend {options.backend!r}: choose {' or '.join(BACKENDS)}")
    chosen = dict(
        off=options.off, plan=_pairs(options.plan), checkpoint=options.checkpoint,
        memory_budget=options.memory_budget, machine=options.machine, zero=options.zero,
    )  # fmt: skip
    Options.of(**chosen)
    with _quiet():
        trial, notes = trials.prepare(
            options.model,
            shape,
            full=options.full,
            batch=trials.BATCH if options.batch is None else options.batch,
            seq=trials.SEQ if options.seq is None else options.seq,
            dtype=DTYPES[options.dtype or "fp32"],
            device=options.device,
            seed=options.seed,
            timeout=options.timeout,
            options=chosen | dict(steps=options.steps, tolerance=options.tolerance, backend=options.backend),
        )
        found = trials.run(trial, diagnose=not options.no_diagnosis)
    if isinstance(found, trials.Broken):
        answer = {"ok": False, "notes": notes, "wrong": [found.text], "diagnosis": found.diagnosis}
        text = "\n".join([*notes, f"FAILED: {found.text}", *found.diagnosis]) + "\n"
    else:
        found.notes[:0] = notes
        answer, text = found.as_dict(), found.text(options.module)
    if not trials.speaks():
        text = ""
    elif options.json:
        text = json.dumps(answer, indent=2) + "\n"
    return text, 0 if found.ok else 1


def _explain(options: argparse.Namespace) -> str:
    shape = _shape(options)
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


# what each prints, and its exit code where that may be another than 0
COMMANDS: dict[str, Callable[[argparse.Namespace], str | tuple[str, int]]] = {
    "explain": _explain,
    "verify": _verify,
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
