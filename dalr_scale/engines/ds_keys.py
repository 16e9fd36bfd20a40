"""The keys of a DeepSpeed configuration: which ones DeepSpeed knows, and which ones a run decides.

DeepSpeed ignores unknown keys outside of its typed tables silently, and a known key may contradict
what the trainer does. So a user's file is checked here key by key: a key that DeepSpeed does not
know is a misspelling; a key that the run decides must agree with the run; everything else passes.
The known keys come from DeepSpeed's own classes where it has some.
"""

# pyright: reportMissingTypeStubs=false
# DeepSpeed has no stubs; its classes are pydantic models, which is all that is used of them.

from __future__ import annotations

import difflib
import functools
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from dalr_scale.errors import UserError
from dalr_scale.run.files import JsonTable, JsonValue

if TYPE_CHECKING:
    from pydantic import BaseModel
    from pydantic.fields import FieldInfo

# The type of a key's value, or the keys of a table; None: not checked here.
KeyType: TypeAlias = "type | KeyTree | None"
KeyTree: TypeAlias = "Mapping[str, KeyType]"

# Keys that DeepSpeed reads from plain dicts.
_PLAIN: dict[str, KeyType] = {
    "train_batch_size": int,
    "train_micro_batch_size_per_gpu": int,
    "gradient_accumulation_steps": int,
    "managed_gradient_accumulation": bool,
    "gradient_clipping": float,
    "gradient_allreduce_op": str,
    "prescale_gradients": bool,
    "gradient_predivide_factor": float,
    "communication_data_type": str,
    "seq_parallel_communication_data_type": str,
    "sequence_parallel_size": int,
    "use_data_before_expert_parallelism": bool,
    "steps_per_print": float,
    "wall_clock_breakdown": bool,
    "memory_breakdown": bool,
    "dump_state": bool,
    "disable_python_gc": bool,
    "disable_allgather": bool,
    "dataloader_drop_last": bool,
    "log_level": str,
    "vocabulary_size": int,
    "zero_allow_untested_optimizer": bool,
    "zero_force_ds_cpu_optimizer": bool,
    "torch_autocast": {"enabled": bool, "dtype": str, "lower_precision_safe_modules": list},
    "data_types": {
        "grad_accum_dtype": str,
        "param_dtype": str,
        "buffer_dtype": str,
        "keep_in_fp32_modules": None,
    },
    "activation_checkpointing": {
        "partition_activations": bool,
        "number_checkpoints": int,
        "contiguous_memory_optimization": bool,
        "synchronize_checkpoint_boundary": bool,
        "profile": bool,
        "cpu_checkpointing": bool,
    },
    "flops_profiler": {
        "enabled": bool,
        "recompute_fwd_factor": float,
        "profile_step": int,
        "module_depth": int,
        "top_modules": int,
        "detailed": bool,
        "output_file": str,
    },
    "aio": {
        "block_size": int,
        "queue_depth": int,
        "intra_op_parallelism": int,
        "single_submit": bool,
        "overlap_events": bool,
        "use_gds": bool,
    },
    "checkpoint": {
        "tag_validation": str,
        "load_universal": bool,
        "use_node_local_storage": bool,
        "checkpoint_serialization": bool,
        "parallel_write": {"pipeline_stage": bool},
        "writer": None,
    },
    "autotuning": None,
    "data_efficiency": None,
    "datastates_ckpt": None,
    "expert_parallel": None,
    "optimizer": None,
    "pipeline": None,
    "scheduler": None,
    "tensor_parallel": None,
    "weight_quantization": None,
}

# Tables and keys that must be absent, with what the trainer does instead.
_ABSENT = {
    "optimizer": "the optimizer is built from [optim]",
    "scheduler": "the learning rate is built from [optim]",
    "data_efficiency": "the order of the data is the trainer's own",
    "autotuning": "a tuned batch would have other negatives",
    "pipeline": "the trainer shards data only",
    "tensor_parallel": "the trainer shards data only",
    "expert_parallel": "the trainer shards data only",
    "weight_quantization": "weights are trained as they are",
    "datastates_ckpt": "checkpoints are written and verified by the trainer",
    "checkpoint.writer": "checkpoints are written and verified by the trainer",
    "zero_optimization.zenflow": "it delays the update of most weights",
    "zero_optimization.cpu_offload": "set engine.offload_optimizer",
    "zero_optimization.cpu_offload_param": "its name is offload_param now",
    "zero_optimization.cpu_offload_use_pin_memory": "set pin_memory in the offload table",
}

_EXACT = "the step must be exact"
_SHARDS = "the trainer shards data only"
_MASTERS = "weights are kept and exported in float32"
_MEAN = "the step averages gradients over the ranks, once"
_PRECISION = "engine.precision decides it"

# The only values that a key may have whatever the run's settings, and why.
_FIXED: dict[str, tuple[tuple[JsonValue, ...], str]] = {
    "gradient_accumulation_steps": (
        (1,),
        "accumulating would reduce the effective batch (batch.micro_size does not)",
    ),
    "managed_gradient_accumulation": ((True,), "the reduction at the end of a step needs it"),
    "gradient_allreduce_op": (("mean",), _MEAN),
    "prescale_gradients": ((False,), _MEAN),
    "gradient_predivide_factor": ((1.0,), _MEAN),
    "communication_data_type": (("fp32", "bf16"), "float16 overflows without a loss scale"),
    "sequence_parallel_size": ((1,), _SHARDS),
    "use_data_before_expert_parallelism": ((False,), _SHARDS),
    "steps_per_print": ((1_000_000_000,), "log.every decides how often a run reports"),
    "zero_allow_untested_optimizer": ((True,), "the optimizer is torch's"),
    "zero_force_ds_cpu_optimizer": ((False,), "the optimizer is torch's, also with offload"),
    "torch_autocast.enabled": ((False,), _PRECISION),
    "data_types.buffer_dtype": (("fp32",), "statistics of BatchNorm stay in float32"),
    "bf16.check_grad_overflow": ((True,), "a step without finite gradients is skipped and counted"),
    "bf16.immediate_grad_update": ((False,), "gradients of all chunks make one update"),
    "bf16.bf16_master_weights_and_grads": ((False,), _MASTERS),
    "bf16.bf16_optimizer_states": ((False,), _MASTERS),
    "fp16.enabled": ((False,), "engine.precision knows fp32 and bf16, which need no loss scale"),
    "fp16.fp16_master_weights_and_grads": ((False,), _MASTERS),
    "checkpoint.load_universal": ((False,), "the trainer reads its checkpoints at any ranks"),
    "checkpoint.use_node_local_storage": (
        (False,),
        "checkpoints are verified in the run directory",
    ),
    "checkpoint.checkpoint_serialization": ((True,), "checkpoints are read piece by piece"),
    "compile.deepcompile": ((False,), "it replaces the backward pass"),
    "hybrid_engine.enabled": ((False,), "it is for generation"),
    "zero_optimization.zero_quantized_weights": ((False,), _EXACT),
    "zero_optimization.zero_quantized_nontrainable_weights": ((False,), _EXACT),
    "zero_optimization.zero_quantized_gradients": ((False,), _EXACT),
    "zero_optimization.compute_grad_norm": ((True,), "the norm of every step is reported"),
    "zero_optimization.load_from_fp32_weights": (
        (True,),
        "a resumed run continues bit-identically",
    ),
    "zero_optimization.elastic_checkpoint": (
        (False,),
        "the trainer reads its checkpoints at any ranks",
    ),
    "zero_optimization.legacy_stage1": ((False,), "DeepSpeed has removed it"),
    "zero_optimization.ignore_unused_parameters": (
        (True,),
        "text-only steps leave the image heads out",
    ),
    "zero_optimization.offload_optimizer.ratio": ((1.0,), "the optimizer is torch's"),
    "zero_optimization.offload_optimizer.super_offload": ((False,), "the optimizer is torch's"),
}

_AUTO_ALLOWED = {"data_types.keep_in_fp32_modules"}


@dataclass(frozen=True)
class Decided:
    """The values that a key may have in a file of this run, and the setting that decides it.

    The first value is the run's own.
    """

    values: tuple[JsonValue, ...]
    why: str


def fixed() -> dict[str, Decided]:
    """The keys that every run decides in the same way."""
    return {key: Decided(values, why) for key, (values, why) in _FIXED.items()}


def check_keys(file: str, given: JsonTable, decided: Mapping[str, Decided]) -> None:
    """Refuses the first key of a file that DeepSpeed does not know or that contradicts the run.

    Args:
        file: its name, for the message.
        given: its content.
        decided: dotted key -> the decision of the run.

    Raises:
        UserError: naming file, key and reason.
    """
    for path, value, level in _walk(file, given, known_keys()):
        key = path.rpartition(".")[2]
        if path in _removed_keys():
            raise UserError(f"{file}: DeepSpeed has removed '{path}'; leave it out")
        if key not in level:
            raise UserError(f"{file}: unknown key '{key}'; did you mean '{_nearest(path, level)}'?")
        if value == "auto" and path not in _AUTO_ALLOWED:
            raise UserError(f"{file}: '{path}' is \"auto\"; write the value")
        if path in _ABSENT and value is not None:
            raise UserError(f"{file}: '{path}' is not possible here: {_ABSENT[path]}; leave it out")
        _check_type(file, path, value, level[key])
        if path in decided:
            _check_value(file, path, value, decided[path])


def _check_value(file: str, path: str, value: JsonValue, decided: Decided) -> None:
    if any(value == own and _is_bool(value) == _is_bool(own) for own in decided.values):
        return
    own = " or ".join(_shown(v) for v in decided.values)
    raise UserError(
        f"{file}: '{path}' is {_shown(value)}, but this run has {own} ({decided.why}); change one "
        "of them, or leave the key out"
    )


def _check_type(file: str, path: str, value: JsonValue, kind: KeyType) -> None:
    """The types that DeepSpeed does not check itself."""
    if kind is None or value is None:
        return
    if not isinstance(kind, type):
        if not isinstance(value, Mapping):
            raise UserError(f"{file}: '{path}' is {_shown(value)}, but must be a table")
        return
    numbers = int | float if kind is float else kind
    if not isinstance(value, numbers) or _is_bool(value) != (kind is bool):
        name = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
        raise UserError(
            f"{file}: '{path}' is {_shown(value)}, but must be {name.get(kind, 'a list')}"
        )
    if not isinstance(value, bool) and isinstance(value, int | float) and not abs(value) <= 2**53:
        raise UserError(f"{file}: '{path}' is {_shown(value)}, which is out of range")


def _is_bool(value: JsonValue) -> bool:
    return isinstance(value, bool)


def _shown(value: JsonValue) -> str:
    """A value as JSON writes it, cut where it is long."""
    if value is None or isinstance(value, bool):
        return {True: "true", False: "false", None: "null"}[value]
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def _walk(
    file: str, given: JsonTable, level: KeyTree, prefix: str = ""
) -> Iterator[tuple[str, JsonValue, KeyTree]]:
    """Every key of nested tables with its dotted path, its value and the keys known beside it."""
    for key, value in given.items():
        yield f"{prefix}{key}", value, level
        below = level.get(key)
        if isinstance(value, Mapping) and below is not None and not isinstance(below, type):
            yield from _walk(file, value, below, f"{prefix}{key}.")


def _nearest(path: str, level: KeyTree) -> str:
    """The key that was meant: the same name in another table, else the most similar name."""
    key = path.rpartition(".")[2]
    elsewhere = [p for p in _paths(known_keys()) if p.rpartition(".")[2] == key]
    if len(elsewhere) == 1 and "." in elsewhere[0]:
        return elsewhere[0]
    return difflib.get_close_matches(key, list(level), n=1, cutoff=0.0)[0]


def _paths(level: KeyTree, prefix: str = "") -> Iterator[str]:
    for key, below in level.items():
        yield f"{prefix}{key}"
        if below is not None and not isinstance(below, type):
            yield from _paths(below, f"{prefix}{key}.")


@functools.cache
def known_keys() -> dict[str, KeyType]:
    """Every key that the installed DeepSpeed reads; a table's value is the table of its keys."""
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.compile.config import CompileConfig
    from deepspeed.monitor.config import DeepSpeedMonitorConfig
    from deepspeed.runtime.config import HybridEngineConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.utils.config import DeepSpeedThroughputTimerConfig

    return _PLAIN | {
        "zero_optimization": _fields(DeepSpeedZeroConfig),
        "bf16": _fields(DeepSpeedBF16Config),
        "fp16": _fields(DeepSpeedFP16Config),
        "comms_logger": _fields(CommsLoggerConfig),
        "compile": _fields(CompileConfig),
        "hybrid_engine": _fields(HybridEngineConfig),
        "timers": {"throughput": _fields(DeepSpeedThroughputTimerConfig)},
        **_fields(DeepSpeedMonitorConfig),
    }


def _fields(model: type[BaseModel]) -> dict[str, KeyType]:
    """Names and aliases of a typed table's keys; DeepSpeed checks their values itself."""
    found: dict[str, KeyType] = {}
    for name, field in model.model_fields.items():
        inner = next(filter(None, map(_model, (field.annotation, *_arguments(field)))), None)
        for key in filter(None, (field.alias, name)):
            found[key] = _fields(inner) if inner is not None else None
    return found


def _arguments(field: FieldInfo) -> tuple[object, ...]:
    return typing.get_args(field.annotation)


def _model(kind: object) -> type[BaseModel] | None:
    """The class of a typed table, None for other types."""
    from pydantic import BaseModel

    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


@functools.cache
def _removed_keys() -> set[str]:
    """Keys that DeepSpeed had once and now refuses in several lines."""
    from deepspeed.runtime import config

    top: Iterable[str] = getattr(config, "_REMOVED_TOP_LEVEL_CONFIG_KEYS", ())
    zero: Iterable[str] = getattr(config, "_REMOVED_ZERO_CONFIG_KEYS", ())
    return {*top, *(f"zero_optimization.{key}" for key in zero), "amp"}
