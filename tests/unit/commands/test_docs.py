"""What the commands say about themselves."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys

import pytest

from dalr_scale import __version__
from dalr_scale.cli import COMMANDS, main, module_of

HELP_OF_ALL = """
import importlib, sys
from dalr_scale.cli import module_of
for name in sys.argv[1:]:
    module = importlib.import_module(module_of(name))
    try:
        module.main(["--help"])
    except SystemExit as end:
        assert not end.code, name
    print("== end of", name)
assert "deepspeed" not in sys.modules, "help must not wait for heavy imports"
"""


def test_every_command_prints_help_without_loading_deepspeed() -> None:
    shown = subprocess.run(
        [sys.executable, "-c", HELP_OF_ALL, *COMMANDS],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert shown.returncode == 0, shown.stderr[-3000:]
    for name in COMMANDS:
        text, _, rest = shown.stdout.partition(f"== end of {name}\n")
        assert text.startswith("usage: ") and name in text.splitlines()[0], name
        assert len(text.splitlines()) > 4
        shown.stdout = rest


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_a_module_with_a_main(name: str) -> None:
    module = importlib.import_module(module_of(name))
    assert callable(module.main) and module.__doc__


def test_the_command_line_lists_and_refuses_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed and text in listed for name, text in COMMANDS.items())
    assert main(["--version"]) == 0 and __version__ in capsys.readouterr().out
    assert main([]) == 2
    capsys.readouterr()
    assert main(["trian"]) == 2
    assert "no command 'trian'; did you mean 'train'?" in capsys.readouterr().err


def test_user_errors_are_one_line_with_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--config=smoke", "--optim.lerning_rate=1"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: unknown key")


def test_all_settings_are_in_the_help_of_train(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["train", "--help"])
    shown = capsys.readouterr().out
    assert "--objective.cross_weight=0.1" in shown and "recipes: " in shown
