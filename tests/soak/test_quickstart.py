"""What the quickstart promises, held to the figures: about eight minutes on two cores."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dalr_scale.versions import version_line

RESULTS = Path(__file__).parent / "results" / "quickstart.json"
TASK = "graded-test"


def run(preset: str, directory: Path) -> dict:
    """Trains the recipe with a preset in `directory`; both presets share the drawn data."""
    command = [sys.executable, "-m", "dalr_scale.train", "--run.name", preset]
    if preset != "dalr":
        command += ["--objective.preset", preset]
    subprocess.run(command, cwd=directory, check=True, env=os.environ | {"DALR_DATA": ""})
    return json.loads((directory / "runs" / preset / "result.json").read_text())


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_the_trained_student_closes_the_gap_and_beats_its_baselines(tmp_path: Path) -> None:
    dalr, simcse = run("dalr", tmp_path), run("simcse", tmp_path)
    record = {"host": version_line(), "dalr": dalr, "simcse": simcse}
    RESULTS.write_text(json.dumps(record, indent=1) + "\n")
    untrained, trained = dalr["untrained"][TASK], dalr["trained"][TASK]
    assert untrained <= 50
    assert trained - untrained >= 0.6 * (100 - untrained)
    assert trained > dalr["lexical"][TASK]
    assert trained > simcse["trained"][TASK]
    assert dalr["seconds"] <= 240  # data, teacher, training and evaluation on two free cores
