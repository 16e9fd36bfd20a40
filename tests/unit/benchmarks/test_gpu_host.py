"""What `make gpu` and `make gpu-test` run on a host that has torch and little else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
# Dependencies of the trainer and of other tests that such a host lacks, by module.
ABSENT = (
    "PIL", "datasets", "deepspeed", "hypothesis", "matplotlib", "open_clip", "scipy",
    "sentence_transformers", "sklearn", "tensorboard", "webdataset",
)  # fmt: skip
PRELUDE = f"""
import sys
class Hiding:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, *rest):
        return None if name.split(".")[0] in {ABSENT!r} else self.finder.find_spec(name, *rest)
sys.meta_path[:] = [Hiding(finder) for finder in sys.meta_path]
sys.path[:0] = ["kernels", "benchmarks", "."]
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PRELUDE + code]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_gpu_tests_and_benchmarks_need_few_packages() -> None:
    options = ["-m", "gpu", "--collect-only", "-q", "-p", "no:hypothesispytest", "tests/gpu"]
    done = run(
        "import bench.run, bench.tune, gpu_batch\n"
        f"import pytest; sys.exit(pytest.main({options!r}))"
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "tests/gpu/test_row_losses.py::" in done.stdout


def test_a_missing_package_would_be_noticed() -> None:
    # Negative control: the tiny data set of the other tests does need them.
    done = run("sys.path.insert(0, 'tests/support'); import common")
    assert done.returncode != 0 and "ModuleNotFoundError" in done.stderr


def test_gpu_tests_have_a_directory_of_their_own() -> None:
    mark = "pytest.mark." + "gpu"
    marked = {p.parent.name for p in (ROOT / "tests").rglob("*.py") if mark in p.read_text("utf-8")}
    assert marked == {"gpu"}
