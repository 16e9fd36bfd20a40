"""CONTRIBUTING.md's recipe for a loss term, executed on a copy of the sources."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[3]
SOURCES = ("dalr_scale", "kernels/dalr_kernels", "tests/support")
# "`PATH`, what it is:" and a code block
BLOCK = re.compile(
    r"^`(?P<path>[\w/.]+)`[^`]*?:\n\n```(?P<kind>\w+)\n(?P<text>.*?)^```", re.MULTILINE | re.DOTALL
)


def blocks() -> dict[str, tuple[str, str]]:
    """The recipe's code blocks: path -> (kind, text)."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    recipe = text.split("## Add a loss term")[1].split("\n## ")[0]
    return {m["path"]: (m["kind"], m["text"]) for m in BLOCK.finditer(recipe)}


def insert(original: str, diff: str) -> str:
    """Each line with a plus goes behind the line that stands before it in the block."""
    lines, before = original.splitlines(), ""
    for line in diff.splitlines():
        if line.startswith("+"):
            lines.insert(lines.index(before) + 1, line[1:])
        before = line[1:]
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sources with the recipe's term added."""
    root = tmp_path_factory.mktemp("copy")
    for name in SOURCES:
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", root)
    for name, (kind, text) in blocks().items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(insert(path.read_text(), text) if kind == "diff" else text)
    return root


def run(root: Path, *options: str) -> subprocess.CompletedProcess[str]:
    test = next(name for name in blocks() if name.startswith("tests/"))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", test, *options]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)


def test_the_recipe_works(copy: Path) -> None:
    done = run(copy)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert "3 passed" in done.stdout and "skipped" not in done.stdout


def test_the_recipe_touches_its_file_its_test_and_one_entry_of_the_registry() -> None:
    kinds = {path: kind for path, (kind, _) in blocks().items()}
    assert kinds == {
        "dalr_scale/objective/uniformity.py": "python",
        "dalr_scale/objective/registry.py": "diff",
        "tests/unit/objective/test_uniformity.py": "python",
    }
    added = [line for line in blocks()["dalr_scale/objective/registry.py"][1].splitlines()
             if line.startswith("+")]  # fmt: skip
    assert [line.strip("+ ").startswith("from ") for line in added] == [True, False]


def test_control_a_wrong_formula_fails(copy: Path) -> None:
    """The positive of a chunk's or a rank's rows, looked for where those of the first rows are."""
    term = copy / "dalr_scale/objective/uniformity.py"
    right = term.read_text()
    assert right.count("batch.offset") == 1
    term.write_text(right.replace("batch.offset", "0"))
    done = run(copy, "-k", "chunks")
    term.write_text(right)
    assert done.returncode == 1 and "are not close" in done.stdout
