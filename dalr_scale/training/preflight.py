"""All that a run refuses before its first step; ``train`` and ``plan`` call the same functions.

``check_settings`` looks at the configuration alone, before a process group exists. ``assemble``
opens the data and builds the model, every rank for itself.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import TYPE_CHECKING, NamedTuple

from dalr_scale.config.limits import check_arithmetic
from dalr_scale.engines.ds_config import ds_config
from dalr_scale.engines.precision import resolve_precision
from dalr_scale.errors import UserError
from dalr_scale.eval.suite import EvaluationPaths, EvaluationSuite, build_suite
from dalr_scale.objective.registry import needs_of
from dalr_scale.training.build import (
    ModelParts,
    Streams,
    build_model,
    build_streams,
    open_held_out,
    pair_roles,
    quickstart_spec,
    text_weights,
)
from dalr_scale.training.contradictions import check_contradictions, settings_without_effect
from dalr_scale.training.optim import check_warmup

if TYPE_CHECKING:
    from dalr_scale.config import Config, EngineConfig
    from dalr_scale.data.stream.source import Source
    from dalr_scale.distributed.world import World

log = logging.getLogger(__name__)


class Assembly(NamedTuple):
    """The parts of a run that need no engine."""

    streams: Streams
    parts: ModelParts
    suite: EvaluationSuite
    held_out: Source | None


def check_settings(config: Config, ranks: int) -> None:
    """Refuses what the configuration alone shows to be wrong, for a run on so many ranks.

    Raises:
        UserError: one sentence that names the setting and the fix.
    """
    if config.run_dir.exists() and not config.run_dir.is_dir():
        raise UserError(f"{config.run_dir} cannot be a run directory: it is a file; choose another")
    rows = check_arithmetic(config.batch, ranks)
    check_contradictions(config)
    if config.optim.steps:
        check_warmup(config.optim, config.optim.steps)
    pair_roles(config, needs_of(config.objective))
    text_weights(config)
    if config.data.builder == "quickstart":
        quickstart_spec(config)
    if config.engine.kind != "ddp":
        bf16 = resolve_precision(config.engine) == "bf16"
        clip = config.optim.clip
        ds_config(engine_settings(config), rows=rows, ranks=ranks, clip=clip, bf16=bf16)


def engine_settings(config: Config) -> EngineConfig:
    """The section ``engine`` with the path of its DeepSpeed file filled in."""
    file = config.engine.ds_config
    return dataclasses.replace(config.engine, ds_config=str(config.path(file)) if file else "")


def warn_without_effect(config: Config) -> None:
    """Says once which of the user's settings change nothing in this run."""
    if idle := settings_without_effect(config):
        log.warning("without effect in this run: %s", ", ".join(idle))


def warn_of_streams(streams: Streams) -> None:
    """Says which stream is never read, and which one never fills a batch.

    The reference rule may leave the text out for good; kept tails may be all that there is.
    """
    given = {"data.text": streams.text, "data.pairs": streams.pairs}
    batches = streams.plan.batches_before(streams.total_steps)
    for (key, source), count in zip(given.items(), batches, strict=True):
        if source is not None and not count:
            log.warning(
                "%s is never read: none of the %d batches comes from it (alternation %s); set "
                "data.pair_fraction, or leave %s empty",
                key, streams.total_steps, streams.plan.alternation, key,
            )  # fmt: skip
        elif source is not None and source.num_items < streams.plan.global_batch:
            log.warning(
                "%s has %d items: each of its batches is shorter than batch.global_size = %d",
                key, source.num_items, streams.plan.global_batch,
            )  # fmt: skip


def assemble(config: Config, world: World) -> Assembly:
    """Opens the streams, builds the model and loads the evaluations.

    `world` is the run's; nothing of it is called but its size and its device.

    Raises:
        UserError: a file is missing, damaged, or does not fit the settings.
    """
    streams = build_streams(config)
    parts = build_model(config, streams, world)
    held_out = open_held_out(config)
    paths = EvaluationPaths(config.data_root, config.path)
    suite = build_suite(config.eval, paths, parts.model.encoder, held_out, world)
    return Assembly(streams, parts, suite, held_out)
