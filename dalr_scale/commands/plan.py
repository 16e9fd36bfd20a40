"""``dalr-scale plan --config RECIPE``: what a run would need, without training.

Prints the batch arithmetic, the memory of a rank by purpose, the bytes a rank sends per step, and
the time a step takes on this host (one chunk is really encoded). No run directory is written;
but what a run would do to its data first is done here too, since the numbers come from them: a
recipe with a builder draws its data and trains its teachers (``data.builder``), and missing indexes
are built. Settings and data that a run refuses are refused here in the same words; what the run
directory already holds is not looked at.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from typing import TYPE_CHECKING

import torch

from dalr_scale.config import Config, load_config
from dalr_scale.config.text import settings_help
from dalr_scale.distributed.world import World
from dalr_scale.engines.precision import resolve_precision
from dalr_scale.errors import UserError
from dalr_scale.training import report
from dalr_scale.training.build import prepare_data
from dalr_scale.training.preflight import (
    assemble,
    check_settings,
    warn_of_streams,
    warn_without_effect,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dalr_scale.models.dalr import DalrModel


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 0."""
    parser = argparse.ArgumentParser(
        prog="dalr-scale plan",
        description="Dry run: batch arithmetic, memory, bytes and time, without training. Writes "
        "no run directory; a recipe with data.builder first makes its data, as a run would. "
        "Refuses the settings and the data that a run refuses.",
        epilog=settings_help(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", help="recipe name, TOML file or run directory")
    parser.add_argument("--ranks", type=int, default=1, help="processes to plan for")
    parser.add_argument("--no-timing", action="store_true", help="do not time a chunk here")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto",
        help="what the run will compute on: it decides workspace and automatic precision; auto: "
        "this host's",
    )  # fmt: skip
    options, overrides = parser.parse_known_args(argv)
    if options.ranks < 1:
        raise UserError(f"--ranks {options.ranks}: plan for at least 1 process")
    config, device = plan_device(load_config(options.config, overrides), options.device)
    world = World(0, options.ranks, torch.device("cpu"))
    check_settings(config, options.ranks)
    warn_without_effect(config)
    if config.data.builder != "none":
        print(f"{config.data.builder} data: drawn in {config.data.shards} unless they are there")
    prepare_data(config, World(0, 1, world.device))
    streams, parts, *_ = assemble(config, world)
    warn_of_streams(streams)
    where = "this host's" if options.device == "auto" else "as asked for"
    print(f"planned for: {device.type} ({where}), {config.engine.precision}")
    print(report.arithmetic(config, streams, parts.model, options.ranks))
    print(report.needs(config, parts.model, options.ranks, device))
    if not options.no_timing:
        seconds = time_step(config, parts.model, options.ranks)
        hours = seconds * streams.total_steps / 3600
        print(
            f"\nencoder time on this host's CPU: {seconds:.2f} s a step, {hours:.2f} h for "
            f"{streams.total_steps:,} steps (loss, teachers and communication not counted)"
        )
    return 0


def plan_device(config: Config, asked: str) -> tuple[Config, torch.device]:
    """The device to plan for, and the configuration with the precision that ``auto`` means there.

    A CUDA device that this host does not have is taken to compute in bf16, as every one since
    Ampere does.
    """
    here = "cuda" if torch.cuda.is_available() else "cpu"
    device = here if asked == "auto" else asked
    precision = resolve_precision(config.engine)
    if config.engine.precision == "auto" and device != here:
        precision = "bf16" if device == "cuda" else "fp32"
    engine = dataclasses.replace(config.engine, precision=precision)
    return dataclasses.replace(config, engine=engine), torch.device(device)


def time_step(config: Config, model: DalrModel, ranks: int) -> float:
    """Seconds of the encoder passes of one step of one rank, from one timed chunk."""
    rows = config.batch.global_size // ranks
    micro = config.batch.micro_size or rows
    length, vocabulary = config.data.max_length, model.encoder.backbone.config.vocab_size
    ids = torch.randint(0, vocabulary, (2 * micro, length))
    mask = torch.ones_like(ids)
    model.encode(ids[:2], mask[:2])  # first call: allocations, not arithmetic
    started = time.perf_counter()
    states = model.encode(ids, mask)
    forward = time.perf_counter() - started
    states.sum().backward()
    both = time.perf_counter() - started
    chunks = -(-rows // micro)
    return chunks * both + (chunks - 1) * forward
