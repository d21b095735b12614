"""The launch files of examples/launch parse, and name only options that torchrun and `tedcompile train` have."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from tedcompile.settings import Settings

LAUNCH = Path(__file__).parent.parent / "examples" / "launch"


def command_of(name: str) -> list[str]:
    """From torchrun on."""
    text = (LAUNCH / name).read_text()
    if name.endswith(".yaml"):
        yaml = pytest.importorskip("yaml")
        spec = yaml.safe_load(text)["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]
        (container,) = spec["containers"]
        return container["command"] + container["args"]
    subprocess.run(["bash", "-n", str(LAUNCH / name)], check=True)
    (line,) = re.findall(r"torchrun --nnodes (?:.|\n)*?(?<!\\)\n", text)
    return shlex.split(line.replace("\\\n", " "))


@pytest.mark.parametrize("name", sorted(p.name for p in LAUNCH.iterdir()))
def test_options_exist(name):
    from torch.distributed.run import get_args_parser

    command = command_of(name)
    place = command.index("train")
    assert command[0] == "torchrun" and command[place - 1] == "tedcompile"
    known = {option for action in get_args_parser()._actions for option in action.option_strings}
    assert {word for word in command[:place] if word.startswith("--")} <= known
    words = [
        part for word in command[place + 1 :] for part in (word.split("=", 1) if word.startswith("--") else [word])
    ]
    given = {flag[2:].replace("-", "_"): value for flag, value in zip(words[::2], words[1::2], strict=True)}
    settings = Settings.of({n: [v] if n == "data" else v for n, v in given.items()})  # refuses what there is not
    assert settings.mesh == "dp=2,ep=4,tp=2" and settings.steps == 2000
