"""The benchmark of the largest batch on one GPU, at toy sizes on a CPU."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "benchmarks"))
import gpu_batch  # pyright: ignore[reportMissingImports]


def document(directory: Path) -> dict:
    return json.loads((directory / "gpu_batch_dry-run.json").read_text(encoding="utf-8"))


def test_every_objective_takes_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu_batch.main(["--dry-run", "--out", str(tmp_path)]) == 0
    rows = document(tmp_path)["rows"]
    assert [(r["objective"], r["rows"]) for r in rows] == list(gpu_batch.TOY.rows)
    assert {r["objective"] for r in rows} == set(gpu_batch.OBJECTIVES)
    assert all(r["status"] == "measured" and r["seconds"] > 0 for r in rows)
    text = (tmp_path / "gpu_batch_dry-run.md").read_text(encoding="utf-8")
    assert text.count("| simcse |") == 2
    # measured rows of the same commit are kept, so a second run has nothing to do
    monkeypatch.setattr(gpu_batch, "measure", lambda *_: pytest.fail("measured again"))
    assert gpu_batch.main(["--dry-run", "--out", str(tmp_path)]) == 0
    assert document(tmp_path)["rows"] == rows


def test_what_fails_or_is_not_reached_is_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(objective: str, rows: int, *_: object) -> dict:
        if rows == 40:
            raise torch.OutOfMemoryError("too large")
        if objective == "simcse":
            raise ValueError("a mistake\nin two lines")
        return {"status": "measured", "seconds": 1.0, "loss": 1.0, "peak_bytes": None}

    monkeypatch.setattr(gpu_batch, "measure", measure)
    gpu_batch.main(["--dry-run", "--out", str(tmp_path)])
    found = [r["status"] for r in document(tmp_path)["rows"]]
    assert found == ["measured", "out of memory"] * 2 + [
        "failed: ValueError: a mistake", "out of memory",
    ]  # fmt: skip
    monkeypatch.setattr(
        gpu_batch.host,
        "describe",
        lambda _: {"device": "other", "packages": {"torch": "1"}, "commit": None, "date": ""},
    )
    gpu_batch.main(["--dry-run", "--out", str(tmp_path), "--only", "nothing"])
    assert {r["status"] for r in document(tmp_path)["rows"]} == {gpu_batch.results.NOT_REACHED}


def test_a_step_that_would_not_fit_the_time_is_not_begun() -> None:
    rows = [{"objective": "a", "rows": 10, "status": "measured", "seconds": 5.0}]
    assert gpu_batch.expected(rows, "a", 40) == pytest.approx(gpu_batch.SAFETY * 20.0)
    assert gpu_batch.expected(rows, "b", 40) == 0.0


def test_the_full_scale_is_bert_base() -> None:
    sizes = {rows for _, rows in gpu_batch.FULL.rows}
    assert sizes == {2**15, 2**18, 2**20} and gpu_batch.FULL.encoder == {}


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert gpu_batch.main([]) == 0
    assert "no CUDA device" in capsys.readouterr().out
