"""DeepSpeed configurations: nothing unknown, nothing against the run, and all else as written."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dalr_scale.config import Config, build_config
from dalr_scale.engines.ds_config import ds_config, stage_template, write_templates
from dalr_scale.errors import UserError

DIRECTORY = Path(__file__).parents[3] / "ds_configs"
FILES = sorted(DIRECTORY.glob("*.json"))
pytestmark = pytest.mark.usefixtures("same_environment")


def config(kind: str = "zero2", **sections: dict[str, Any]) -> Config:
    return build_config([{"engine": {"kind": kind}}, sections])


def made(config: Config, rows: int, *, bf16: bool) -> dict[str, Any]:
    """The dict of a run with so many rows a rank."""
    ranks = config.batch.global_size // rows
    return ds_config(config.engine, rows=rows, ranks=ranks, clip=config.optim.clip, bf16=bf16)


def test_committed_files_are_what_the_code_writes(tmp_path: Path) -> None:
    write_templates(tmp_path)
    written = {path.name: path.read_text() for path in tmp_path.glob("*.json")}
    assert {path.name: path.read_text() for path in FILES} == written
    assert {"zero1.json", "zero2.json", "zero3.json", "zero2_offload.json"} == set(written)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_a_copy_of_a_committed_file_is_what_runs_without_it(path: Path) -> None:
    """At any batch, clipping and precision: the file says nothing about them."""
    assert '"auto"' not in path.read_text()
    offload = path.stem.endswith("offload")
    kind = path.stem.split("_")[0]
    for bf16 in (False, True):
        own = {"optim": {"clip": 0.25}, "batch": {"global_size": 96}}
        engine = {"kind": kind, "offload_optimizer": offload}
        plain = made(config(**own, engine=engine), 48, bf16=bf16)
        copied = config(**own, engine=engine | {"ds_config": str(path)})
        assert made(copied, 48, bf16=bf16) == plain


def test_the_run_fills_in_batch_clipping_and_precision() -> None:
    filled = made(config(optim={"clip": 0.25}), 48, bf16=True)
    assert filled["train_micro_batch_size_per_gpu"] == 48
    assert filled["gradient_clipping"] == 0.25
    assert filled["bf16"] == {"enabled": True}
    assert "offload_optimizer" not in filled["zero_optimization"]
    offload = config(engine={"offload_optimizer": True})
    assert "offload_optimizer" in made(offload, 1, bf16=False)["zero_optimization"]


def put(values: dict[str, Any], dotted: str, value: Any) -> dict[str, Any]:
    """A copy of nested tables with one entry set."""
    values = copy.deepcopy(values)
    *parents, key = dotted.split(".")
    table = values
    for parent in parents:
        table = table.setdefault(parent, {})
    table[key] = value
    return values


def filled(tmp_path: Path, dotted: str, value: Any, kind: str = "zero2", **engine: Any) -> Any:
    """The dict from a copy of a stage's file with one more entry, at 64 of 128 rows a rank."""
    template = stage_template(kind, offload_optimizer=engine.get("offload_optimizer", False))
    path = tmp_path / "own.json"
    path.write_text(json.dumps(put(template, dotted, value)))
    own = config(engine={"kind": kind, "ds_config": str(path), **engine})
    return made(own, 64, bf16=False)


ZERO = "zero_optimization"
PASS = [
    ("communication_data_type", "fp32"),
    ("communication_data_type", "bf16"),
    ("seq_parallel_communication_data_type", "fp32"),
    ("data_types", {"grad_accum_dtype": "fp32", "param_dtype": "fp32"}),
    ("data_types.keep_in_fp32_modules", "auto"),
    ("comms_logger", {"enabled": True, "verbose": False, "prof_ops": ["all_reduce"]}),
    ("aio", {"block_size": 1048576, "queue_depth": 8, "overlap_events": True}),
    ("activation_checkpointing.cpu_checkpointing", False),
    ("flops_profiler", {"enabled": True, "profile_step": 3, "output_file": "flops.txt"}),
    ("tensorboard", {"enabled": True, "output_path": "logs", "job_name": "x"}),
    ("csv_monitor.enabled", False),
    ("wandb.project", "p"),
    ("comet.samples_log_interval", 10),
    ("timers.throughput.synchronized", False),
    ("checkpoint.tag_validation", "Fail"),
    ("wall_clock_breakdown", True),
    ("memory_breakdown", True),
    ("dump_state", True),
    ("log_level", "warning"),
    ("fp16.initial_scale_power", 12),
    (f"{ZERO}.round_robin_gradients", False),
    (f"{ZERO}.parameter_alignment", True),
    (f"{ZERO}.overlap_comm", True),
    (f"{ZERO}.contiguous_gradients", False),
    (f"{ZERO}.allgather_partitions", False),
    (f"{ZERO}.reduce_bucket_size", 77),
    (f"{ZERO}.reduce_bucket_size", 5e8),
    (f"{ZERO}.zero_hpz_partition_size", 1),
    (f"{ZERO}.leaf_module.names", ["x"]),
    (f"{ZERO}.prefetch_bucket_size", 5),
    (f"{ZERO}.offload_param.device", "none"),
    # what the run does already
    ("train_micro_batch_size_per_gpu", 64),
    ("gradient_accumulation_steps", 1),
    ("gradient_clipping", 1),
    ("bf16", {"enabled": False, "check_grad_overflow": True}),
    ("fp16.enabled", False),
    ("gradient_predivide_factor", 1),
    (f"{ZERO}.zenflow", None),
]


@pytest.mark.parametrize(("key", "value"), PASS, ids=[f"{k}={v}" for k, v in PASS])
def test_what_deepspeed_knows_passes(key: str, value: Any, tmp_path: Path) -> None:
    found = filled(tmp_path, key, value)
    for part in key.split("."):
        found = found[part]
    if isinstance(value, dict):
        assert value.items() <= found.items()
    else:
        assert found == value


def test_the_global_batch_may_be_repeated(tmp_path: Path) -> None:
    assert filled(tmp_path, "train_batch_size", 128)["train_micro_batch_size_per_gpu"] == 64


def test_secondary_groups_divide_the_ranks(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is 3, which does not divide the 2 ranks"):
        filled(tmp_path, f"{ZERO}.zero_hpz_partition_size", 3, "zero3")


STAGE3 = [
    (f"{ZERO}.offload_param", {"device": "cpu", "pin_memory": False}),
    (f"{ZERO}.zero_hpz_partition_size", 2),
    (f"{ZERO}.stage3_param_persistence_threshold", 0),
    (f"{ZERO}.stage3_gather_16bit_weights_on_model_save", True),
    (f"{ZERO}.sub_group_size", 1000),
    (f"{ZERO}.round_robin_gradients", True),
]


@pytest.mark.parametrize(("key", "value"), STAGE3, ids=[k for k, _ in STAGE3])
def test_what_stage_3_knows_passes_there(key: str, value: Any, tmp_path: Path) -> None:
    assert filled(tmp_path, key, value, "zero3")[ZERO][key.removeprefix(f"{ZERO}.")] == value


REFUSED = [
    ("gradient_clipping", 5.0, "'gradient_clipping' is 5.0, but this run has 1.0 \\(optim.clip"),
    ("gradient_clipping", 0, "optim.clip"),
    ("gradient_accumulation_steps", 2, "would reduce the effective batch"),
    ("gradient_accumulation_steps", True, "must be a whole number"),
    ("train_micro_batch_size_per_gpu", 1, "this run has 64 .*global_size"),
    ("train_batch_size", 64, "this run has 128"),
    ("bf16.enabled", True, "engine.precision"),
    ("bf16.check_grad_overflow", False, "skipped and counted"),
    ("bf16.bf16_master_weights_and_grads", True, "float32"),
    ("fp16.enabled", True, "loss scale"),
    ("torch_autocast.enabled", True, "engine.precision"),
    ("data_types.grad_accum_dtype", "bf16", "float32"),
    ("data_types.param_dtype", "bf16", "engine.precision"),
    ("communication_data_type", "fp16", "overflows"),
    ("optimizer", {"type": "Adam"}, "built from \\[optim\\]"),
    ("scheduler", {}, "built from \\[optim\\]"),
    ("data_efficiency", {"enabled": True}, "order of the data"),
    ("pipeline", {}, "shards data only"),
    ("tensor_parallel", {"autotp_size": 2}, "shards data only"),
    ("prescale_gradients", True, "averages gradients"),
    ("gradient_predivide_factor", 2.0, "averages gradients"),
    ("gradient_allreduce_op", "sum", "averages gradients"),
    ("managed_gradient_accumulation", False, "reduction"),
    ("steps_per_print", 10, "log.every"),
    ("zero_force_ds_cpu_optimizer", True, "torch's"),
    ("checkpoint.load_universal", True, "at any ranks"),
    ("checkpoint.writer", {"type": "FAST"}, "verified by the trainer"),
    ("compile.deepcompile", True, "backward pass"),
    (f"{ZERO}.stage", 3, "is 3, but this run has 2 \\(engine.kind"),
    (f"{ZERO}.zero_quantized_gradients", True, "exact"),
    (f"{ZERO}.zero_quantized_weights", True, "exact"),
    (f"{ZERO}.zenflow", {"topk_ratio": 0.1}, "delays"),
    (f"{ZERO}.round_robin_gradients", True, "reads weights back wrongly"),
    (f"{ZERO}.compute_grad_norm", False, "norm of every step"),
    (f"{ZERO}.load_from_fp32_weights", False, "bit-identically"),
    (f"{ZERO}.ignore_unused_parameters", False, "text-only"),
    (f"{ZERO}.offload_param", {"device": "cpu"}, "zero3 only"),
    (f"{ZERO}.offload_param", {"device": "nvme"}, "zero3 only"),
    (f"{ZERO}.offload_optimizer", {"device": "cpu"}, "engine.offload_optimizer decides"),
    (f"{ZERO}.cpu_offload", True, "set engine.offload_optimizer"),
    (f"{ZERO}.mics_shard_size", 2, "has removed"),
    ("amp", {"enabled": True}, "has removed 'amp'"),
    ("sparse_gradients", True, "has removed"),
    ("elasticity", {"enabled": True}, "has removed"),
    # misspelt, at any depth
    ("gradient_cliping", 1.0, "did you mean 'gradient_clipping'"),
    ("optimzer", {}, "unknown key 'optimzer'; did you mean 'optimizer'"),
    ("overlap_comm", True, "did you mean 'zero_optimization.overlap_comm'"),
    (f"{ZERO}.offload_param.pin_memry", True, "did you mean 'pin_memory'"),
    (f"{ZERO}.leaf_module.nmes", [], "did you mean 'names'"),
    ("aio.queue_dept", 8, "did you mean 'queue_depth'"),
    ("comms_logger.enable", True, "did you mean 'enabled'"),
    ("timers.throughput.enable", True, "did you mean 'enabled'"),
    ("checkpoint.parallel_write.pipeline", True, "pipeline_stage"),
    ("tensorboard.job", "x", "did you mean 'job_name'"),
    # values
    ("gradient_clipping", "auto", 'is "auto"; write the value'),
    (f"{ZERO}.stage3_prefetch_bucket_size", "auto", 'is "auto"'),
    (ZERO, 2, "no table zero_optimization"),
    (f"{ZERO}.reduce_bucket_size", "many", "'reduce_bucket_size'.*integer"),
    (f"{ZERO}.reduce_bucket_size", 0, "'reduce_bucket_size'.*greater than 0"),
    (f"{ZERO}.overlap_comm", 7, "'overlap_comm'.*boolean"),
    (f"{ZERO}.offload_param.device", "disk", "offload_param.device"),
    ("aio", 3, "'aio' is 3, but must be a table"),
    ("aio.block_size", 1.5, "must be a whole number"),
    ("dump_state", "yes", "must be true or false"),
    ("communication_data_type", 32, "must be text"),
    ("checkpoint.tag_validation", "maybe", "MAYBE"),
    ("vocabulary_size", 1e400, "whole number"),
    ("flops_profiler.recompute_fwd_factor", 1e400, "out of range"),
    ("comms_logger", {"prof_ops": 3}, "'prof_ops'"),
]


@pytest.mark.parametrize(
    ("key", "value", "problem"), REFUSED, ids=[f"{r[0]}={r[1]}" for r in REFUSED]
)
def test_what_contradicts_the_run_or_is_unknown_is_refused(
    key: str, value: Any, problem: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=problem) as error:
        filled(tmp_path, key, value)
    assert len(str(error.value).splitlines()) == 1
    assert "own.json" in str(error.value)


def test_offload_in_the_file_agrees_with_the_run(tmp_path: Path) -> None:
    table = {"device": "cpu", "pin_memory": False}
    found = filled(tmp_path, f"{ZERO}.offload_optimizer", table, offload_optimizer=True)
    assert found[ZERO]["offload_optimizer"] == table
    for changes in (
        {"device": "nvme"},
        {"device": "none"},
        {"ratio": 0.5},
        {"super_offload": True},
    ):
        with pytest.raises(UserError, match="offload_optimizer"):
            filled(tmp_path, f"{ZERO}.offload_optimizer", table | changes, offload_optimizer=True)
    path = tmp_path / "silent.json"
    path.write_text(json.dumps(stage_template("zero2")))
    own = config(engine={"ds_config": str(path), "offload_optimizer": True})
    assert made(own, 1, bf16=False)[ZERO]["offload_optimizer"]["device"] == "cpu"


def leaves(table: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in table.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")


def test_every_misspelt_key_is_refused_at_any_depth(tmp_path: Path) -> None:
    """DeepSpeed itself takes unknown top-level keys in silence."""
    from dalr_scale.engines.ds_keys import check_keys, known_keys

    known = set(leaves(known_keys()))
    count = 0
    for key in sorted(known):
        parent, _, name = key.rpartition(".")
        siblings = {k.rpartition(".")[2] for k in known if k.rpartition(".")[0] == parent}
        for typo in {name[:-1], name[1:], name[:2] + name[3:], f"{name}s"} - siblings - {""}:
            dotted = f"{parent}.{typo}" if parent else typo
            if dotted.startswith("zero_optimization.zenflow.") or len(name) < 4:
                continue  # the table is refused whole; too short to tell
            with pytest.raises(UserError) as error:
                check_keys("f", put({}, dotted, 1), {})
            assert f"unknown key '{typo}'; did you mean '" in str(error.value), dotted
            count += 1
    assert count > 500


def test_control_the_same_key_spelt_right_is_accepted(tmp_path: Path) -> None:
    from dalr_scale.engines.ds_keys import check_keys

    check_keys("f", {"zero_optimization": {"offload_param": {"pin_memory": True}}}, {})


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (None, "no file"),
        ("{", "not valid JSON"),
        ("\udcff", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[1]", "no table"),
        ("{}", "no table"),
        ('{"zero_optimization": {}}', "no 'stage'"),
        ('{"zero_optimization": {"stage": 2, "stage": 3}}', "'stage' is there twice"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused(
    text: str | None, problem: str, tmp_path: Path
) -> None:
    path = tmp_path / "own.json"
    if text is not None:
        path.write_bytes(os.fsencode(text))
    with pytest.raises(UserError, match=problem):
        made(config(engine={"ds_config": str(path)}), 1, bf16=False)
