"""The ends of every range train two steps: what the configuration accepts breaks nothing later."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import launching
import pytest
from common import records, tiny_config, write_config

from dalr_scale.config.limits import RANGES

# How large things are and how long a run is: their upper ends ask for memory and time.
SIZES = {
    "batch.global_size",
    "data.max_length",
    "data.workers",
    "engine.threads",
    "model.consistency_width",
    "model.grounding_width",
    "optim.epochs",
    "optim.steps",
    "optim.warmup",
    "batch.micro_size",
}
LISTS = {"data.pair_weights": 1, "data.text_weights": 1, "optim.betas": 2}
FIXED = {"teachers.text_weights"}  # one teacher has one weight, which is 1


def ends(high: bool) -> dict[str, Any]:
    """Every other number at its upper or lower end, or just inside of an open one."""
    found: dict[str, Any] = {}
    for name, allowed in RANGES.items():
        if name in SIZES | FIXED:
            continue
        value = allowed.high if high else allowed.low
        if allowed.open_high if high else allowed.open_low:
            value = math.nextafter(value, 0.5)
        found[name] = [value] * LISTS[name] if name in LISTS else value
    return found


@pytest.mark.parametrize("high", [True, False], ids=["high", "low"])
def test_the_ends_of_all_ranges_train(high: bool, tiny_data: Path, tmp_path: Path) -> None:
    changes = ends(high) | {"optim.steps": 2, "engine.kind": "ddp", "data.workers": 0}
    if high:
        changes |= {"optim.lr": 1e-12, "optim.embedding_lr": 1e3, "model.head_init_std": 0.02}
        changes |= {"optim.weight_decay": 1e3, "data.pair_fraction": 1}
        changes |= {"teachers.caption": "features:cap"}
    file = write_config(tiny_config(tiny_data, changes), tmp_path / "tiny.toml")
    run = tmp_path / "run"
    outcome = launching.train([f"--config={file}", f"--run.dir={run}"], tmp_path / "log")
    assert outcome.codes == (0,), outcome.output
    assert len(records(run)) == 2
