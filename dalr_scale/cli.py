"""The ``dalr-scale`` command: one word chooses the module that does the work."""

from __future__ import annotations

import difflib
import importlib
import sys
from typing import TYPE_CHECKING

from dalr_scale import __version__
from dalr_scale.process import run_command, set_passive_omp_wait

if TYPE_CHECKING:
    from collections.abc import Sequence

COMMANDS = {
    "prepare": "raw images, captions and text to shards",
    "index": "build or check the index beside each shard",
    "features": "teacher features into shards",
    "tokens": "token ids into shards, so that training need not tokenise",
    "train": "train on this process alone (many: accelerate launch -m dalr_scale.train)",
    "evaluate": "score a sentence encoder",
    "export": "a run's encoder as a directory for other tools",
    "plan": "dry run: batch arithmetic, memory, bytes, time",
    "doctor": "check this node, or all nodes of a job, before training",
}


def module_of(command: str) -> str:
    """The module whose ``main`` does the work of a command."""
    return f"dalr_scale.{command}" if command == "train" else f"dalr_scale.commands.{command}"


def usage() -> str:
    """The list of commands, as ``dalr-scale --help`` prints it."""
    rows = "\n".join(f"  {name:<10}{text}" for name, text in COMMANDS.items())
    return f"usage: dalr-scale COMMAND [ARGUMENTS]   (dalr-scale COMMAND --help)\n\n{rows}"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command that the first word names; returns its exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return 0 if words else 2
    if words[0] == "--version":
        print(__version__)
        return 0
    if words[0] not in COMMANDS:
        near = difflib.get_close_matches(words[0], COMMANDS, n=1, cutoff=0.0)[0]
        problem = f"error: no command '{words[0]}'; did you mean '{near}'?"
        print(f"{problem}\n\n{usage()}", file=sys.stderr)
        return 2
    set_passive_omp_wait()
    module = importlib.import_module(module_of(words[0]))
    return run_command(module.main, words[1:])
