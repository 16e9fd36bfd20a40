"""The DeepSpeed configuration of a run: a complete dict, numbers only, no "auto".

DeepSpeed accepts unknown top-level keys in silence and takes a missing ``gradient_clipping`` for
1.0; "auto" fails for models without ``config.hidden_size``. So the dict is made here from the
run's own settings, or from an edited copy of ``ds_configs/STAGE.json`` whose keys are checked.
"""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

from dalr_scale.config import Config
from dalr_scale.errors import UserError

STAGES = {"zero1": 1, "zero2": 2, "zero3": 3}


def stage_template(kind: str, *, offload_optimizer: bool = False) -> dict[str, Any]:
    """What ``ds_configs/KIND.json`` holds; the trainer fills in batch, precision and clipping."""
    zero: dict[str, Any] = {
        "stage": STAGES[kind],
        "overlap_comm": False,
        "contiguous_gradients": True,
        "reduce_scatter": True,
        # an all-reduce of every bucket would send gradients twice
        "use_multi_rank_bucket_allreduce": False,
        "reduce_bucket_size": 50_000_000,
        "allgather_bucket_size": 50_000_000,
    }
    if kind == "zero3":
        del zero["allgather_bucket_size"], zero["reduce_scatter"]
        del zero["use_multi_rank_bucket_allreduce"]
        zero |= {
            "stage3_prefetch_bucket_size": 50_000_000,
            "stage3_param_persistence_threshold": 10_000,
            "stage3_max_live_parameters": 1_000_000_000,
            "stage3_max_reuse_distance": 1_000_000_000,
        }
    if offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "steps_per_print": 1_000_000_000,
        "wall_clock_breakdown": False,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": False},
        "zero_optimization": zero,
    }


def ds_config(config: Config, rows_per_rank: int, *, bf16: bool) -> dict[str, Any]:
    """The dict that this run's engine is built from; also written to ``RUN/ds_config.json``."""
    kind, offload = config.engine.kind, config.engine.offload_optimizer
    template = stage_template(kind, offload_optimizer=offload)
    filled = (
        _read_edited(config.engine.ds_config, template) if config.engine.ds_config else template
    )
    filled["train_micro_batch_size_per_gpu"] = rows_per_rank
    filled["gradient_accumulation_steps"] = 1
    filled["gradient_clipping"] = config.optim.clip
    filled["bf16"] = {"enabled": bf16}
    return filled


def _read_edited(path: str, template: dict[str, Any]) -> dict[str, Any]:
    file = Path(path)
    if not file.is_file():
        raise UserError(f"engine.ds_config: no file '{path}'; copy one from ds_configs/")
    try:
        edited = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(edited, dict) or not isinstance(edited.get("zero_optimization"), dict):
        raise UserError(f"{path} has no table zero_optimization; start from a copy of ds_configs/")
    _check_keys(edited, template, path)
    stage = edited["zero_optimization"].get("stage")
    if stage != template["zero_optimization"]["stage"]:
        raise UserError(
            f"{path} is for ZeRO stage {stage}, but engine.kind asks for "
            f"{template['zero_optimization']['stage']}; change one of them"
        )
    return edited


def _check_keys(edited: dict[str, Any], template: dict[str, Any], path: str) -> None:
    known = {**template, "zero_optimization": {**template["zero_optimization"]}}
    known["zero_optimization"].setdefault("offload_optimizer", {})
    for key in edited:
        _known_key(key, known, path)
    for key in edited["zero_optimization"]:
        _known_key(key, known["zero_optimization"], path)
    if '"auto"' in json.dumps(edited):
        raise UserError(f'{path} contains "auto"; write the number')


def _known_key(key: str, known: dict[str, Any], path: str) -> None:
    if key not in known:
        near = difflib.get_close_matches(key, list(known), n=1, cutoff=0.0)[0]
        raise UserError(f"{path}: unknown key '{key}'; did you mean '{near}'?")


def write_templates(folder: Path) -> None:
    """Writes ``ds_configs/*.json`` (a test compares the committed files with these)."""
    variants = {"zero1": {}, "zero2": {}, "zero3": {}, "zero2_offload": {"offload_optimizer": True}}
    for name, options in variants.items():
        text = json.dumps(stage_template(name.split("_")[0], **options), indent=2)
        (folder / f"{name}.json").write_text(text + "\n", encoding="utf-8")
