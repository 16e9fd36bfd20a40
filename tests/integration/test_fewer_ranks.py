"""A ZeRO run goes on with another number of ranks: same batches, same losses to rounding."""

from __future__ import annotations

from pathlib import Path

import pytest
from common import history, records, status, tiny_config, write_config
from launching import train

from dalr_scale.training.build import build_streams

COMPARED = ("cons", "cma", "xce", "ima", "rank", "g2l")
NO_DROPOUT = (
    "--model.architecture.hidden_dropout_prob=0.0",
    "--model.architecture.attention_probs_dropout_prob=0.0",
)


def test_last_batches_are_the_same_at_one_two_and_three_ranks(
    tiny_data: Path, tmp_path: Path
) -> None:
    """One pass over 170 sentences, the last 2 a batch of their own: at 3 ranks one holds a copy."""
    settings = {"data.workers": 0, "objective.tail": "keep", "optim.steps": 17, "optim.clip": 1.0}
    file = write_config(tiny_config(tiny_data, settings), tmp_path / "tiny.toml")
    words = [f"--config={file}", "--engine.kind=zero2", "--eval.every=0", *NO_DROPOUT]
    runs = [tmp_path / name for name in ("whole", "three", "moved")]
    for directory, ranks in zip(runs, (1, 3), strict=False):
        outcome = train([*words, f"--run.dir={directory}"], tmp_path / f"w{ranks}.log", ranks=ranks)
        assert set(outcome.codes) == {0}, outcome.output
    for ranks, end in ((1, (4, "STOP")), (2, None)):
        log = tmp_path / f"moved{ranks}.log"
        outcome = train([*words, f"--run.dir={runs[2]}"], log, ranks=ranks, end_at=end)
        assert set(outcome.codes) == {0}, outcome.output
    wanted = records(runs[0])
    plan = build_streams(tiny_config(tiny_data, settings)).plan
    assert [plan.batch_rows(r["step"] - 1) for r in wanted].count(2) == 1
    for directory in runs[1:]:
        found = records(directory)
        assert [(r["step"], r["ids"]) for r in found] == [(r["step"], r["ids"]) for r in wanted]
        for one, other in zip(found, wanted, strict=True):
            terms = [name for name, value in other.items() if isinstance(value, float)]
            for name in {"loss", "con", "grad_norm", *COMPARED} & {*terms}:
                assert one[name] == pytest.approx(other[name], rel=1e-4), (one["step"], name)


@pytest.mark.parametrize("kind", ["zero1", "zero2", "zero3"])
def test_two_ranks_then_three_then_one(kind: str, tiny_data: Path, tmp_path: Path) -> None:
    """Adam's states and the fp32 weights are resharded twice, in both directions."""
    file = write_config(tiny_config(tiny_data, {"data.workers": 0}), tmp_path / "tiny.toml")
    words = [f"--config={file}", f"--engine.kind={kind}", "--eval.every=0", *NO_DROPOUT]
    whole, run = tmp_path / "whole", tmp_path / "run"
    outcome = train([*words, f"--run.dir={whole}"], tmp_path / "whole.log", ranks=2)
    assert outcome.codes == (0, 0), outcome.output
    words.append(f"--run.dir={run}")
    for ranks, end in ((2, (4, "STOP")), (3, (8, "STOP")), (1, None)):
        outcome = train(words, tmp_path / f"{ranks}.log", ranks=ranks, end_at=end)
        assert set(outcome.codes) == {0}, outcome.output
    assert "saved by 3 ranks, continuing with 1" in outcome.output
    assert status(run)["outcome"] == "finished"
    found, wanted = history(run), history(whole)
    assert [line[:3] for line in found] == [line[:3] for line in wanted]
    assert found[:4] == wanted[:4]
    for one, other in zip(found, wanted, strict=True):
        assert float.fromhex(one[3]) == pytest.approx(float.fromhex(other[3]), rel=1e-5)
    norms = [[r["grad_norm"] for r in records(directory)] for directory in (run, whole)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
