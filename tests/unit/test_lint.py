"""The import rules of pyproject.toml hold, and every caller of the linters runs the same ones."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = "from importlinter.cli import lint_imports_command; lint_imports_command()"


def lint_imports(root: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, "--no-cache", "--no-logo"],
        cwd=root,
        env=os.environ | {"PYTHONPATH": f"{root}:{root / 'kernels'}", "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_import_rules_hold() -> None:
    checked = lint_imports(ROOT)
    assert checked.returncode == 0, checked.stdout[-3000:] + checked.stderr[-1000:]


@pytest.mark.parametrize(
    ("file", "line", "broken"),
    [
        (
            "dalr_scale/config/text.py",
            "from dalr_scale.training import session",
            "packages import downwards only BROKEN",
        ),
        (
            "dalr_scale/training/build.py",
            "def later():\n    import deepspeed",
            "only the engines import DeepSpeed and Accelerate BROKEN",
        ),
        (
            "dalr_scale/run/manifest.py",
            "import torch",
            "configuration and run directories need no torch BROKEN",
        ),
    ],
)
def test_broken_rule_is_named(tmp_path: Path, file: str, line: str, broken: str) -> None:
    for name in ("dalr_scale", "kernels/dalr_kernels"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with (tmp_path / file).open("a", encoding="utf-8") as source:
        source.write(f"\n\n{line}\n")
    checked = lint_imports(tmp_path)
    assert checked.returncode == 1, checked.stderr[-1000:]
    assert broken in checked.stdout


@pytest.mark.parametrize("file", [".ci/run", ".pre-commit-config.yaml", ".github/workflows/ci.yml"])
def test_one_command_lints_everywhere(file: str) -> None:
    text = (ROOT / file).read_text(encoding="utf-8")
    assert "make lint" in text
    assert "ruff" not in text, "linters are called by the Makefile alone"
