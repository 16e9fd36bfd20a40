"""``dalr-scale plan --config RECIPE``: what a run would need, without training.

Prints the batch arithmetic, the memory of a rank by purpose, the bytes a rank sends per step, and
the time a step takes on this host (one chunk is really encoded). No run folder is written; but what
a run would do to its data first is done here too, since the numbers come from them: a recipe with a
builder draws its data and trains its teachers (``data.builder``), and missing indexes are built.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dalr_scale import report
from dalr_scale.assembly import build_model, build_streams, check_arithmetic, prepare_data
from dalr_scale.config import Config, load_config
from dalr_scale.dist.engine import resolve_precision
from dalr_scale.dist.world import World
from dalr_scale.errors import UserError
from dalr_scale.metrics import print_table
from dalr_scale.models.dalr import DalrModel

GIB = 2**30
TOKENS = "token features, all at full length"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="dalr-scale plan",
        description="Dry run: batch arithmetic, memory, bytes and time, without training. Writes "
        "no run folder; a recipe with data.builder first makes its data, as a run would.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", help="recipe name, TOML file or run folder")
    parser.add_argument("--ranks", type=int, default=1, help="processes to plan for")
    parser.add_argument("--no-timing", action="store_true", help="do not time a chunk here")
    options, overrides = parser.parse_known_args(argv)
    if options.ranks < 1:
        raise UserError(f"--ranks {options.ranks}: plan for at least 1 process")
    config = load_config(options.config, overrides)
    world = World(0, options.ranks, torch.device("cpu"))
    check_arithmetic(config, options.ranks)
    if config.data.builder != "none":
        print(f"{config.data.builder} data: drawn in {config.data.shards} unless they are there")
    prepare_data(config, World(0, 1, world.device))
    streams = build_streams(config, options.ranks)
    parts = build_model(config, streams, world)
    print(report.arithmetic(config, streams, parts.model, options.ranks))
    print_table("memory of one rank", _memory_rows(config, parts.model, options.ranks))
    print_table("sent per rank and paired step", _traffic_rows(config, parts.model, options.ranks))
    if not options.no_timing:
        seconds = time_step(config, parts.model, options.ranks)
        hours = seconds * streams.total_steps / 3600
        print(
            f"\nencoder time on this host: {seconds:.2f} s a step, {hours:.2f} h for "
            f"{streams.total_steps:,} steps (loss, teachers and communication not counted)"
        )
    return 0


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of one rank by purpose."""

    weights: int
    gradients: int
    optimizer: int
    cached_states: int
    columns: int
    token_features: int

    @property
    def total(self) -> int:
        return sum(vars(self).values())


def plan_memory(config: Config, model: DalrModel, ranks: int) -> MemoryPlan:
    """Bytes that do not depend on the host: states of the model and of the global batch.

    ZeRO-1 shards the optimizer, ZeRO-2 also gradients once reduced (a step holds them whole while
    its chunks add up), ZeRO-3 also weights. Activations of one chunk come on top.
    """
    parameters = sum(p.numel() for p in model.parameters())
    bf16 = resolve_precision(config) == "bf16"
    width = 2 if bf16 else 4
    kind = config.engine.kind
    shards = 1 if kind == "ddp" else ranks
    masters = 0 if kind == "ddp" else 4  # DeepSpeed keeps fp32 masters beside fp32 weights too
    rows, size = config.batch.global_size // ranks, config.batch.global_size
    columns = column_widths(model, config.data.max_length)
    tokens = columns.pop(TOKENS, 0)
    return MemoryPlan(
        weights=parameters * width // (ranks if kind == "zero3" else 1),
        gradients=parameters * width,
        optimizer=parameters * (8 + masters) // shards,
        cached_states=2 * 2 * rows * model.encoder.width * 4,
        columns=size * sum(columns.values()) * 4,
        token_features=size * tokens * 4,
    )


def column_widths(model: DalrModel, max_length: int) -> dict[str, int]:
    """Floats of everything a rank gathers per row of a paired global batch, by name.

    Sentences of fewer than ``max_length`` tokens have fewer token features than stated. Row
    numbers and masks, a few bytes a row, are left out.
    """
    needs, widths = model.spec.needs, model.widths
    columns = {"z2 (with gradient)": model.encoder.width}
    if hasattr(model, "image_grounding"):
        columns["u (with gradient)"] = model.grounding_width
    if hasattr(model, "caption_grounding"):
        columns["u of captions (with gradient)"] = model.grounding_width
    if needs.image_rows:
        columns["z1 for pictures (with gradient)"] = widths.image
    if needs.consistency:
        columns["aligned pictures (with gradient)"] = model.consistency_width
    if needs.image:
        columns["picture features"] = widths.image
    if needs.caption:
        columns["caption features"] = widths.caption
    if needs.text:
        columns["text teachers"] = sum(widths.text)
    if needs.tokens:
        columns[TOKENS] = (max_length - 1) * sum(widths.tokens)  # CLS has none
    return columns


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


def _memory_rows(config: Config, model: DalrModel, ranks: int) -> list[dict[str, object]]:
    memory = plan_memory(config, model, ranks)
    rows: list[dict[str, object]] = [
        {"what": name.replace("_", " "), "GiB": value / GIB} for name, value in vars(memory).items()
    ]
    return [*rows, {"what": "total, activations of one chunk excluded", "GiB": memory.total / GIB}]


def _traffic_rows(config: Config, model: DalrModel, ranks: int) -> list[dict[str, object]]:
    """Ring volumes: a gather or a reduce-scatter sends (W-1)/W of the whole once."""
    share = (ranks - 1) / ranks
    size = config.batch.global_size
    rows: list[dict[str, object]] = []
    for name, width in column_widths(model, config.data.max_length).items():
        times = 2 if "gradient" in name else 1
        rows.append({"what": name, "MiB": times * share * size * width * 4 / 2**20})
    parameters = sum(p.numel() for p in model.parameters())
    rows.append(
        {"what": "parameter gradients, all-reduced", "MiB": 2 * share * parameters * 4 / 2**20}
    )
    return rows


if __name__ == "__main__":
    from dalr_scale.cli import run_command

    raise SystemExit(run_command(main, None))
