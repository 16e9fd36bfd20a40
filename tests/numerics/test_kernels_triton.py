"""Runs the tests of the fused kernels in a process with Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

TESTS = Path(__file__).with_name("interpreted_kernels.py")
ROOT = Path(__file__).parents[2]


def run(*options: str, interpret: str = "1") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(TESTS), *options]
    environment = os.environ | {"TRITON_INTERPRET": interpret, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_under_the_interpreter() -> None:
    done = run("-m", "not soak")
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_the_full_product_under_the_interpreter() -> None:
    done = run("-m", "soak")
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


def test_a_failure_is_passed_on() -> None:
    # Negative control: without the interpreter the same tests fail, and their launcher sees it.
    assert run("-k", "interpreter_runs", interpret="0").returncode == 1
