"""Memory and time of the global batch on one CPU process: ``make batch-bench``.

Writes ``benchmarks/results/global_batch.{json,md,png}``.

* Memory: one step at a growing global batch and a fixed chunk, each in a process of its own. The
  peak of the resident memory above what was there before the step, against the prediction that
  the trainer prints.
* Cost: steps with and without gradient caching at one batch size that fits both, interleaved.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch
from dalr_kernels import chunked
from transformers import BertConfig, BertModel

from dalr_scale.checkpoint import package_versions
from dalr_scale.config import Config, build_config
from dalr_scale.dist.engine import PlainEngine
from dalr_scale.dist.gradcache import StepInputs, backward_global_batch
from dalr_scale.dist.world import World
from dalr_scale.models.dalr import DalrModel, FeatureWidths, LossSpec
from dalr_scale.models.encoder import pool
from dalr_scale.optim import build_optimizer
from dalr_scale.predict import MemoryPlan, plan_memory, random_teachers

RESULTS = Path(__file__).parent / "results"
WIDTH, HEAD, IMAGE, TEXT, TOKENS, MICRO = 64, 32, 48, (48,), 8, 64
# Curves, and how far they go: all pairs of 64k rows take minutes for one term, an hour for all.
CURVES: dict[str, tuple[dict[str, Any], int]] = {
    "simcse": ({"preset": "simcse"}, 65536),
    "dalr, ListNet, no tokens": ({"rank_loss": "listnet", "g2l_weight": 0.0}, 16384),
    "ListMLE alone": (
        {"cross_weight": 0.0, "intra_kl_weight": 0.0, "g2l_weight": 0.0},
        8192,
    ),
    "global-to-local alone": (
        {"cross_weight": 0.0, "intra_kl_weight": 0.0, "rank_weight": 0.0},
        8192,
    ),
}


class Encoder(torch.nn.Module):
    """A BERT of one or more layers with mean pooling, without a tokenizer."""

    def __init__(self, width: int, layers: int, dropout: float) -> None:
        super().__init__()
        config = BertConfig(
            vocab_size=1000,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=2,
            intermediate_size=4 * width,
            max_position_embeddings=64,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
        )
        self.backbone = BertModel(config, add_pooling_layer=False)
        self.width, self.row_keys = width, None

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        hidden = self.backbone(input_ids=input_ids, attention_mask=attention_mask)
        return pool(hidden.last_hidden_state, attention_mask, "mean")


def build(
    objective: dict[str, Any], size: int, micro: int, *, width: int, layers: int, length: int
) -> tuple[PlainEngine, StepInputs, Config]:
    """An engine of one process and a random paired batch."""
    config = build_config(
        [
            {
                "objective": {"preset": "dalr", **objective},
                "batch": {"global_size": size, "micro_size": micro},
                "engine": {"kind": "ddp", "precision": "fp32"},
                "model": {"grounding_width": HEAD, "consistency_width": HEAD},
                "data": {"pairs": ["random"], "max_length": length},
            }
        ]
    )
    torch.manual_seed(0)
    encoder: Any = Encoder(width, layers, dropout=0.1)
    widths = FeatureWidths(IMAGE, IMAGE, TEXT, TEXT)
    model = DalrModel(encoder, config.model, LossSpec(config.objective, (1.0,)), widths)
    world = World(0, 1, torch.device("cpu"))
    engine = PlainEngine(model, build_optimizer(model, config.optim), config, world)
    teachers = random_teachers(model, size, paired=True)
    lengths = torch.randint(length // 4, length + 1, (size, 1))
    mask = (torch.arange(length) < lengths).long()
    ids = torch.randint(0, 1000, (size, length))
    return engine, StepInputs(ids, mask, teachers, 0, 0, 1, micro), config


def peak_of_step(curve: str, size: int) -> dict[str, float]:
    """Peak of resident memory during one step, above the level before it, in bytes."""
    engine, inputs, config = build(
        CURVES[curve][0], size, MICRO, width=WIDTH, layers=1, length=TOKENS
    )
    model: Any = engine.module
    plan = plan_memory(config, model, 1)
    warm = build(CURVES[curve][0], 2 * MICRO, MICRO, width=WIDTH, layers=1, length=TOKENS)
    backward_global_batch(warm[0], warm[1])  # libraries allocate at first use
    del warm
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    started = time.perf_counter()
    backward_global_batch(engine, inputs)
    seconds = time.perf_counter() - started
    return {"peak": _resident("VmHWM") - before, "linear": linear_part(plan), "seconds": seconds}


def linear_part(plan: MemoryPlan) -> int:
    """Cached states and loss vectors; the batch itself is there before the step."""
    return plan.cached_states + plan.loss_vectors + plan.columns


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def measure_memory(limit: int) -> list[dict[str, Any]]:
    found = []
    for curve, (_, largest) in CURVES.items():
        size = 1024
        while size <= min(largest, limit):
            command = [sys.executable, __file__, "--one", curve, str(size)]
            # without this, freed blocks stay with the process and blur the peak
            environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
            output = subprocess.run(
                command, env=environment, check=True, capture_output=True, text=True
            ).stdout
            row = {"curve": curve, "size": size, **json.loads(output.splitlines()[-1])}
            print(row, flush=True)
            found.append(row)
            size *= 2
    return found


def measure_cost(rounds: int) -> dict[str, float]:
    """Ratio of step times, a batch of 256 in chunks of 32 against one chunk, interleaved."""
    both = {micro: build({}, 256, micro, width=128, layers=4, length=32)[:2] for micro in (256, 32)}
    times: dict[int, list[float]] = {micro: [] for micro in both}
    for number in range(rounds + 1):
        for micro, (engine, inputs) in both.items():
            started = time.process_time()
            backward_global_batch(engine, inputs)
            if number:  # the first round allocates
                times[micro].append(time.process_time() - started)
    ratios = [cached / whole for whole, cached in zip(times[256], times[32], strict=True)]
    return {
        "ratio": statistics.median(ratios),
        "low": min(ratios),
        "high": max(ratios),
        "seconds": statistics.median(times[256]),
    }


def unsorted_cost(rounds: int) -> float:
    """The same ratio with chunks cut from the rows as they come: what sorting by length saves."""
    import dataclasses

    engine, inputs = build({}, 256, 32, width=128, layers=4, length=32)[:2]
    ratios = []
    for number in range(rounds + 1):
        seconds = {}
        for sort in (True, False):
            started = time.process_time()
            backward_global_batch(engine, dataclasses.replace(inputs, sort=sort))
            seconds[sort] = time.process_time() - started
        if number:
            ratios.append(seconds[False] / seconds[True])
    return statistics.median(ratios)


def growth(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Measured growth from the smallest to the largest batch over what it may be.

    Allowed: the growth of the linear part, and the workspace, which small batches do not fill.
    """
    workspace = chunked.default_workspace(torch.device("cpu"))
    result = {}
    for curve in CURVES:
        own = [row for row in rows if row["curve"] == curve]
        if len(own) > 1:
            first, last = own[0], own[-1]
            measured = last["peak"] - first["peak"]
            allowed = last["linear"] - first["linear"] + workspace
            result[curve] = {
                "from": first["size"], "to": last["size"], "measured": measured,
                "allowed": allowed, "ratio": measured / allowed,
            }  # fmt: skip
    return result


def write(record: dict[str, Any]) -> None:
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps(record, indent=1) + "\n"
    (RESULTS / "global_batch.json").write_text(text, encoding="utf-8")
    cost, mib = record["cost"], 2**20
    lines = [
        "# The global batch on one CPU process",
        "",
        f"{record['date']}, {record['host']}; "
        + ", ".join(f"{name} {version}" for name, version in record["versions"].items()),
        "",
        f"Width {WIDTH}, chunks of {MICRO} rows, fp32. Peak: resident memory of one step above "
        "the level before it. Linear part: cached states and loss vectors as the trainer predicts "
        "them.",
        "",
        "| curve | global batch | peak, MiB | predicted linear part, MiB | step, s |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['curve']} | {r['size']} | {r['peak'] / mib:.0f} | {r['linear'] / mib:.1f} | "
        f"{r['seconds']:.1f} |"
        for r in record["memory"]
    ]
    lines += [
        "",
        "| curve | growth | measured, MiB | predicted, MiB | ratio |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {name} | {g['from']} to {g['to']} | {g['measured'] / mib:.1f} | "
        f"{g['allowed'] / mib:.1f} | {g['ratio']:.2f} |"
        for name, g in record["growth"].items()
    ]
    lines += [
        "",
        "## Gradient caching",
        "",
        f"A step of 256 rows in 8 chunks takes {cost['ratio']:.2f} times the CPU time of the same "
        f"step in one chunk (median of interleaved rounds; {cost['low']:.2f} to "
        f"{cost['high']:.2f}). "
        f"Without sorting by length the chunked step takes {record['unsorted']:.2f} times as "
        "long.",
        "",
        "![memory](global_batch.png)",
        "",
    ]
    (RESULTS / "global_batch.md").write_text("\n".join(lines), encoding="utf-8")


def plot(record: dict[str, Any]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5))
    for number, curve in enumerate(CURVES):
        rows = [row for row in record["memory"] if row["curve"] == curve]
        sizes = [row["size"] for row in rows]
        line = axes.plot(sizes, [r["peak"] / 2**20 for r in rows], "o-", label=curve)[0]
        predicted = [r["linear"] / 2**20 for r in rows]
        name = "predicted linear part" if number == 0 else None
        axes.plot(sizes, predicted, ":", color=line.get_color(), label=name)
    sizes = [1024, 65536]
    axes.plot(sizes, [4 * n * n / 2**20 for n in sizes], "k--", label="one N x N matrix, fp32")
    axes.set(xscale="log", yscale="log", xlabel="global batch N", ylabel="MiB", ylim=(1, 20000))
    axes.set_xscale("log", base=2)
    axes.set_title("Peak memory of one step, chunks of 64 rows")
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(RESULTS / "global_batch.png", dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--one", nargs=2, metavar=("CURVE", "SIZE"), help="one measurement, as JSON"
    )
    parser.add_argument("--largest", type=int, default=65536, help="largest global batch")
    parser.add_argument(
        "--rounds", type=int, default=7, help="interleaved rounds of the step times"
    )
    options = parser.parse_args()
    if options.one:
        print(json.dumps(peak_of_step(options.one[0], int(options.one[1]))))
        return
    memory = measure_memory(options.largest)
    record = {
        "date": date.today().isoformat(),
        "host": f"{os.cpu_count()} CPU cores, {platform.machine()}",
        "versions": package_versions(),
        "memory": memory,
        "growth": growth(memory),
        "cost": measure_cost(options.rounds),
        "unsorted": unsorted_cost(options.rounds),
    }
    write(record)
    plot(record)


if __name__ == "__main__":
    main()
