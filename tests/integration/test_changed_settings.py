"""``--run.allow_change=true`` through the public command: what changes, and what cannot."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from common import history, records, tiny_config, tree, write_config
from launching import train

from dalr_scale.config import load_config
from dalr_scale.training.optim import learning_rate

NEW = {
    "lr": "3e-3",
    "embedding_lr": "1e-4",
    "weight_decay": "0.3",
    "betas": "[0.7, 0.9]",
    "eps": "1e-4",
    "clip": "0.2",
    "warmup": "6",
}
NO_DROPOUT = (
    "--model.architecture.hidden_dropout_prob=0.0",
    "--model.architecture.attention_probs_dropout_prob=0.0",
)


def test_engines_agree_on_a_run_whose_settings_change(tiny_data: Path, tmp_path: Path) -> None:
    file = write_config(tiny_config(tiny_data, {"optim.steps": 8}), tmp_path / "tiny.toml")
    fixed = [f"--config={file}", "--eval.every=0", "--data.workers=0", *NO_DROPOUT]
    new = [f"--optim.{key}={value}" for key, value in NEW.items()]
    for kind in ("ddp", "zero2"):
        words = [*fixed, f"--engine.kind={kind}", f"--run.dir={tmp_path / kind}"]
        first = train(words, tmp_path / f"{kind}.log", end_at=(3, "STOP"))
        assert first.codes == (0,), first.output
        shutil.copytree(tmp_path / kind, tmp_path / f"{kind}-copy")
        words += [*new, "--run.allow_change=true"]
        changed = train(words, tmp_path / f"{kind}-2.log")
        assert changed.codes == (0,), changed.output
        assert "continuing although config.optim.lr: checkpoint 0.001, now 0.003" in changed.output
    found, wanted = history(tmp_path / "zero2"), history(tmp_path / "ddp")
    assert [line[:3] for line in found] == [line[:3] for line in wanted]
    losses = [[float.fromhex(line[3]) for line in lines] for lines in (found, wanted)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    optim = load_config(str(tmp_path / "zero2")).optim
    rates = [record["lr"] for record in records(tmp_path / "zero2")]
    assert rates[3:] == pytest.approx([learning_rate(optim, step, 8) for step in range(3, 8)])

    copy = tmp_path / "zero2-copy"
    before = tree(copy / "checkpoints")
    words = [*fixed, f"--run.dir={copy}", "--run.allow_change=true"]
    other = train([*words, "--model.grounding_width=4"], tmp_path / "width.log")
    assert other.codes == (2,) and "Traceback" not in other.output
    assert "of a model with other parameters: " in other.output
    assert "config.model.grounding_width: checkpoint 8, now 4" in other.output
    assert tree(copy / "checkpoints") == before
