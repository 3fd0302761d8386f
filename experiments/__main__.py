"""All commands under one name: `ktg COMMAND`, in a checkout `python -m experiments COMMAND`."""

import runpy
import sys

from ktg_jax import __version__
from ktg_jax.errors import InputError

from .runs import signals
from .runs.command_line import as_called

COMMANDS = {
    "train": "train a knowledge transfer graph",
    "evaluate": "evaluate every node of a run, or a file, and export one",
    "record": "record what a network puts out, for others to learn from",
    "search": "search for the graph that makes its target best",
    "report": "write one HTML file that shows a search",
    "represent": "make a prior from a teacher, and train a student with it",
    "ablation": "find out what of Knowledge Representing does what",
}


def main() -> None:
    """Runs the command that the first word names; the others are its options."""
    signals.begin_process()
    word, *words = sys.argv[1:] or ["--help"]
    if word in COMMANDS:
        module = f"{__package__}.{word}"
        sys.argv = [module, *words]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    elif word in ("-h", "--help"):
        print(_help())
    elif word == "--version":
        print(f"ktg_jax {__version__}")
    else:
        error = InputError("command", word, ", ".join([*COMMANDS, "--help", "--version"]))
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def _help() -> str:
    program = as_called("python -m experiments.").strip(". ")
    width = max(map(len, COMMANDS))
    commands = [f"  {name:{width}}  {about}" for name, about in COMMANDS.items()]
    lines = [
        f"usage: {program} COMMAND [OPTIONS]",
        "",
        "Train several networks together, each learning from the others.",
        "",
        "Commands:",
        *commands,
        "",
        f"The options of a command: {program} COMMAND --help",
        "",
        "Examples:",
        f"  {program} train --graph mutual --models resnet8 resnet20 --data cifar10",
        f"  {program} evaluate runs/dml",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
