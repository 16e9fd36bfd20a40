"""Training with an edited DeepSpeed file: what passes is used, and trains the same model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import launching
import pytest
from common import history, tiny_config, weights_hash, write_config

from dalr_scale.engines.ds_config import stage_template

# None of these changes a number; each of them was refused or overwritten once.
EDITS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "zero2": (
        {
            "communication_data_type": "fp32",
            "data_types": {"grad_accum_dtype": "fp32"},
            "comms_logger": {"enabled": True, "verbose": False},
            "activation_checkpointing": {"partition_activations": False},
        },
        {
            "overlap_comm": True,
            "parameter_alignment": True,
            "use_multi_rank_bucket_allreduce": True,
            "contiguous_gradients": False,
            "reduce_bucket_size": 500,
        },
    ),
    "zero3": (
        {"communication_data_type": "fp32", "aio": {"block_size": 1048576}},
        {
            "offload_param": {"device": "cpu", "pin_memory": False},
            "overlap_comm": True,
            "stage3_param_persistence_threshold": 0,
            "sub_group_size": 1000,
        },
    ),
}


@pytest.mark.parametrize("kind", EDITS)
def test_an_edited_file_trains_the_same_model(kind: str, tiny_data: Path, tmp_path: Path) -> None:
    changes = {"eval.graded_dev": "", "eval.every": 125, "optim.steps": 4, "data.workers": 0}
    file = write_config(tiny_config(tiny_data, changes), tmp_path / "tiny.toml")
    top, zero = EDITS[kind]
    edited = stage_template(kind) | top
    edited["zero_optimization"] |= zero
    (tmp_path / "own.json").write_text(json.dumps(edited))
    runs = []
    for name, words in (("plain", []), ("own", [f"--engine.ds_config={tmp_path / 'own.json'}"])):
        run = tmp_path / name
        words = [f"--config={file}", f"--engine.kind={kind}", f"--run.dir={run}", *words]
        outcome = launching.train(words, tmp_path / f"{name}.log", ranks=2)
        assert outcome.codes == (0, 0), outcome.output
        runs.append((history(run), weights_hash(run / "final")))
    assert runs[0] == runs[1]
    used = json.loads((tmp_path / "own" / "ds_config.json").read_text())
    assert all(used[key] == value for key, value in top.items())
    assert all(used["zero_optimization"][key] == value for key, value in zero.items())
    assert used["gradient_clipping"] == 1.0  # the run's, which the file leaves to it
