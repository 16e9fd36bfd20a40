"""The DeepSpeed configuration of a run: a complete dict, numbers only, no "auto".

DeepSpeed accepts unknown top-level keys in silence and takes a missing ``gradient_clipping`` for
1.0; "auto" fails for models without ``config.hidden_size``. So the dict is made here from the
run's own settings, or from an edited copy of ``ds_configs/STAGE.json``, in which nothing may
contradict them.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from pydantic import ValidationError

from dalr_scale.engines.ds_keys import Decided, check_keys, fixed
from dalr_scale.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from dalr_scale.config import EngineConfig

DeepSpeedSettings: TypeAlias = dict[str, Any]
"""DeepSpeed's own format: nested tables as in its JSON files."""
STAGES = {"zero1": 1, "zero2": 2, "zero3": 3}


def stage_template(kind: str, *, offload_optimizer: bool = False) -> DeepSpeedSettings:
    """What ``ds_configs/KIND.json`` holds: all but what the settings of a run decide."""
    zero: DeepSpeedSettings = {
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
        "gradient_accumulation_steps": 1,
        "steps_per_print": 1_000_000_000,
        "wall_clock_breakdown": False,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
    }


def ds_config(
    engine: EngineConfig, *, rows: int, ranks: int, clip: float, bf16: bool
) -> DeepSpeedSettings:
    """The dict that this run's engine is built from; also written to ``RUN/ds_config.json``.

    Args:
        rows: rows of the global batch on each of the `ranks`.
        clip: global gradient norm; 0: off.

    Raises:
        UserError: the user's file has an unknown key, contradicts the run, or is refused by
            DeepSpeed.
    """
    file, offload = engine.ds_config, engine.offload_optimizer
    filled = stage_template(engine.kind, offload_optimizer=offload)
    if file:
        _choose_accelerator()
        edited = _read(file, Path(file).expanduser())
        check_keys(file, edited, _decided(engine, rows, ranks, clip, bf16=bf16))
        _check_secondary_groups(file, edited, ranks)
        # a copy holds the whole template; what it leaves out, DeepSpeed has its own default for
        filled = _fixed_part(filled) | edited
        _require_offload(filled, offload)
    filled.pop("train_batch_size", None)  # follows from the rows of a rank
    filled["train_micro_batch_size_per_gpu"] = rows
    filled["gradient_clipping"] = clip
    filled["bf16"] = {**(filled.get("bf16") or {}), "enabled": bf16}
    if file:
        _let_deepspeed_read(file, filled)
    return filled


def _decided(
    engine: EngineConfig, rows: int, ranks: int, clip: float, *, bf16: bool
) -> dict[str, Decided]:
    """Dotted key -> what this run's settings say; a file may repeat the same value only."""
    own = ("bf16", "bfloat16") if bf16 else ("fp32", "float32", "float")
    precision = "engine.precision decides it"
    whole = engine.kind == "zero3"
    parameters = ("none", "cpu") if whole else ("none",)
    zero = "zero_optimization"
    return fixed() | {
        "train_micro_batch_size_per_gpu": Decided(
            (rows,), "batch.global_size divided by the ranks decides it"
        ),
        "train_batch_size": Decided((rows * ranks,), "batch.global_size decides it"),
        "gradient_clipping": Decided((clip,), "optim.clip decides it"),
        "bf16.enabled": Decided((bf16,), precision),
        "data_types.param_dtype": Decided(own, precision),
        "data_types.grad_accum_dtype": Decided(own, "chunks add up in float32 already"),
        f"{zero}.stage": Decided((STAGES[engine.kind],), "engine.kind decides it"),
        f"{zero}.offload_optimizer.device": Decided(
            ("cpu" if engine.offload_optimizer else "none",), "engine.offload_optimizer decides it"
        ),
        # seen with 0.19.8 at two ranks: right losses, and weights read back from wrong places
        f"{zero}.round_robin_gradients": Decided(
            (False, True) if whole else (False,),
            "with it DeepSpeed reads weights back wrongly, for the export and on other ranks",
        ),
        f"{zero}.offload_param.device": Decided(
            parameters, "weights are kept in host memory at zero3 only, and never on NVMe"
        ),
    }


def _check_secondary_groups(file: str, edited: DeepSpeedSettings, ranks: int) -> None:
    size = edited["zero_optimization"].get("zero_hpz_partition_size", 1)
    if isinstance(size, int) and size > 1 and ranks % size:
        raise UserError(
            f"{file}: 'zero_hpz_partition_size' is {size}, which does not divide the {ranks} ranks"
        )


def _fixed_part(template: DeepSpeedSettings) -> DeepSpeedSettings:
    """What a file may leave out although DeepSpeed's own default is another one."""
    return {key: value for key, value in template.items() if key != "zero_optimization"}


def _require_offload(filled: DeepSpeedSettings, offload: bool) -> None:
    """``engine.offload_optimizer`` also holds for a file that does not set it."""
    if offload:
        table = filled["zero_optimization"].get("offload_optimizer") or {"pin_memory": True}
        filled["zero_optimization"]["offload_optimizer"] = {**table, "device": "cpu"}


def _choose_accelerator() -> None:
    """DeepSpeed looks at the host as soon as it is imported; without a GPU it would warn."""
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def _read(path: str, file: Path) -> DeepSpeedSettings:
    if not file.is_file():
        raise UserError(f"engine.ds_config: no file '{path}'; copy one from ds_configs/")

    def once(pairs: Iterable[tuple[str, Any]]) -> DeepSpeedSettings:
        table: DeepSpeedSettings = {}
        for key, value in pairs:
            if key in table:
                raise UserError(f"{path}: the key '{key}' is there twice; leave one out")
            table[key] = value
        return table

    try:
        edited: DeepSpeedSettings = json.loads(
            file.read_text(encoding="utf-8"), object_pairs_hook=once
        )
    except UserError:
        raise
    except (ValueError, RecursionError, OSError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    # the file may hold anything, whatever the annotation hopes for
    if not isinstance(edited, dict) or not isinstance(edited.get("zero_optimization"), dict):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise UserError(f"{path} has no table zero_optimization; start from a copy of ds_configs/")
    if "stage" not in edited["zero_optimization"]:
        raise UserError(f"{path}: zero_optimization has no 'stage'; write the one of engine.kind")
    return edited


def _let_deepspeed_read(path: str, filled: DeepSpeedSettings) -> None:
    """Has DeepSpeed's own classes look at types and ranges, before an engine is built."""
    from deepspeed.runtime.config import (  # pyright: ignore[reportMissingTypeStubs]
        DeepSpeedConfig,
    )

    try:
        DeepSpeedConfig(json.loads(json.dumps(filled)))
    except Exception as error:  # it raises whatever its readers trip over
        raise UserError(f"{path}: DeepSpeed refuses it: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    """The words of an error; of a typed table's, the first key with its problem."""
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"'{'.'.join(map(str, first['loc']))}': {first['msg']}"
    return " ".join(str(error).split()) or type(error).__name__


def write_templates(directory: Path) -> None:
    """Writes ``ds_configs/*.json`` (a test compares the committed files with these)."""
    variants = {"zero1": {}, "zero2": {}, "zero3": {}, "zero2_offload": {"offload_optimizer": True}}
    for name, options in variants.items():
        text = json.dumps(stage_template(name.split("_")[0], **options), indent=2)
        (directory / f"{name}.json").write_text(text + "\n", encoding="utf-8")
