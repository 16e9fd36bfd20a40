"""DeepSpeed configurations: complete, numeric, and closed to unknown keys."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dalr_scale.config import Config, build_config
from dalr_scale.dist.ds_config import ds_config, stage_template, write_templates
from dalr_scale.errors import UserError

FOLDER = Path(__file__).parents[2] / "ds_configs"
FILES = sorted(FOLDER.glob("*.json"))


def config(kind: str = "zero2", **sections: dict[str, Any]) -> Config:
    return build_config([{"engine": {"kind": kind}}, sections])


def test_committed_files_are_what_the_code_writes(tmp_path: Path) -> None:
    write_templates(tmp_path)
    written = {path.name: path.read_text() for path in tmp_path.glob("*.json")}
    assert {path.name: path.read_text() for path in FILES} == written
    assert {"zero1.json", "zero2.json", "zero3.json", "zero2_offload.json"} == set(written)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_every_file_is_complete_and_numeric(path: Path) -> None:
    text = path.read_text()
    values = json.loads(text)
    assert '"auto"' not in text
    assert type(values["gradient_clipping"]) is float
    assert values["gradient_accumulation_steps"] == 1
    kind = path.stem.split("_")[0]
    assert values == stage_template(kind, offload_optimizer=path.stem.endswith("offload"))
    assert values["zero_optimization"]["stage"] == int(kind[-1])


def test_the_run_fills_in_batch_clipping_and_precision() -> None:
    filled = ds_config(config(optim={"clip": 0.25}), 48, bf16=True)
    assert filled["train_micro_batch_size_per_gpu"] == 48
    assert filled["gradient_clipping"] == 0.25
    assert filled["bf16"] == {"enabled": True}
    assert "offload_optimizer" not in filled["zero_optimization"]
    offload = config(engine={"offload_optimizer": True})
    assert "offload_optimizer" in ds_config(offload, 1, bf16=False)["zero_optimization"]


def edited(tmp_path: Path, **changes: Any) -> Config:
    """A configuration with an edited copy of zero2.json; ``zero_`` goes into the inner table."""
    values = stage_template("zero2")
    values["zero_optimization"] |= changes.pop("zero_", {})
    path = tmp_path / "own.json"
    path.write_text(json.dumps(values | changes))
    return config(engine={"ds_config": str(path)})


def test_an_edited_copy_keeps_its_own_numbers(tmp_path: Path) -> None:
    filled = ds_config(edited(tmp_path, zero_={"reduce_bucket_size": 77}), 5, bf16=False)
    assert filled["zero_optimization"]["reduce_bucket_size"] == 77
    assert filled["train_micro_batch_size_per_gpu"] == 5


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"gradient_cliping": 1.0}, "did you mean 'gradient_clipping'"),
        ({"optimzer": {}}, "unknown key 'optimzer'"),
        ({"zero_": {"stage": 3}}, "ZeRO stage 3, but engine.kind asks for 2"),
        ({"gradient_clipping": "auto"}, 'contains "auto"; write the number'),
        ({"zero_optimization": 2}, "no table zero_optimization"),
    ],
)
def test_an_edited_copy_with_a_mistake_is_refused(
    changes: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=problem):
        ds_config(edited(tmp_path, **changes), 1, bf16=False)


def test_every_misspelt_key_names_the_right_one(tmp_path: Path) -> None:
    """DeepSpeed itself takes unknown top-level keys in silence."""
    template = stage_template("zero2")
    for inner, keys in ((False, template), (True, template["zero_optimization"])):
        for key in keys:
            for typo in (key[:-1], key[1:], key[:2] + key[3:]):
                changes = {"zero_": {typo: 1}} if inner else {typo: 1}
                with pytest.raises(UserError, match=f"'{typo}'; did you mean '{key}'"):
                    ds_config(edited(tmp_path, **changes), 1, bf16=False)


@pytest.mark.parametrize(
    ("text", "problem"),
    [(None, "no file"), ("{", "not valid JSON"), ("[1]", "no table"), ("{}", "no table")],
)
def test_a_file_that_is_no_configuration_is_refused(
    text: str | None, problem: str, tmp_path: Path
) -> None:
    path = tmp_path / "own.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=problem):
        ds_config(config(engine={"ds_config": str(path)}), 1, bf16=False)
