"""Everything that a run is made of, built and checked before its directory is touched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dalr_scale.engines.build import build_engine
from dalr_scale.engines.ds_config import DeepSpeedSettings
from dalr_scale.engines.precision import resolve_precision
from dalr_scale.engines.protocol import Engine
from dalr_scale.eval.suite import EvaluationSuite
from dalr_scale.training import report
from dalr_scale.training.build import ModelParts, Streams, prepare_data
from dalr_scale.training.fingerprint import Fingerprint, run_fingerprint
from dalr_scale.training.optim import build_optimizer
from dalr_scale.training.preflight import (
    assemble,
    engine_settings,
    warn_of_streams,
    warn_without_effect,
)

if TYPE_CHECKING:
    from dalr_scale.config import Config
    from dalr_scale.data.stream.source import Source
    from dalr_scale.distributed.world import World


@dataclass(frozen=True)
class Prepared:
    """Everything that a run is made of; nothing has been written into its directory yet."""

    streams: Streams
    parts: ModelParts
    suite: EvaluationSuite
    engine: Engine
    ds_config: DeepSpeedSettings | None
    fingerprint: Fingerprint


def prepare(config: Config, world: World) -> Prepared:
    """Builds all parts of a run, checks them and reports them on rank 0.

    Raises:
        UserError: settings or files are wrong.
    """
    prepare_data(config, world)
    streams, parts, suite, held_out = assemble(config, world)
    fingerprint = fingerprint_of(config, world, streams, held_out)
    if world.rank == 0:
        print(report.arithmetic(config, streams, parts.model, world.size))
        print(report.needs(config, parts.model, world.size), flush=True)
        warn_without_effect(config)
        warn_of_streams(streams)
    optimizer = build_optimizer(parts.model, config.optim)
    engine, ds_config = build_engine(
        parts.model,
        optimizer,
        engine_settings(config),
        rows=config.batch.global_size // world.size,
        clip=config.optim.clip,
        world=world,
    )
    return Prepared(streams, parts, suite, engine, ds_config, fingerprint)


def fingerprint_of(
    config: Config, world: World, streams: Streams, held_out: Source | None
) -> Fingerprint:
    """What must not change in this run, so that a resume can compare it."""
    shards = streams.contents | ({"eval.retrieval": held_out.contents} if held_out else {})
    return run_fingerprint(
        config,
        world,
        precision=resolve_precision(config.engine),
        total_steps=streams.total_steps,
        data=streams.fingerprint,
        shards=shards,
    )
