"""The largest global batch that one GPU trains a BERT-base student with: ``make gpu-batch``.

usage: python benchmarks/gpu_batch.py [--seconds 470] [--only TEXT] [--dry-run]

One process, no sharding, bf16, gradient caching over micro-batches, random token ids and random
frozen features. Every row is one optimizer step at one batch size: seconds, sentences per second
and the peak of the device's memory, everything included (weights, optimizer, batch, features).
Writes ``benchmarks/results/gpu_batch_<gpu>.{json,md}`` after every row; what the time does not
reach or the memory does not hold is a row that says so.
"""

# ruff: noqa: E402
from __future__ import annotations

import argparse
import gc
import os
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# a checkout runs as it is, without an installation
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

import torch
from bench import host, results, table
from transformers import BertConfig, BertModel

from dalr_scale.config import build_config
from dalr_scale.data.stream.batch import Batch
from dalr_scale.distributed.world import World
from dalr_scale.engines.ddp import DDPEngine
from dalr_scale.global_batch import GlobalBatchStep
from dalr_scale.models.dalr import DalrModel, FeatureWidths, LossSpec
from dalr_scale.models.encoder import pool
from dalr_scale.training.optim import build_optimizer
from dalr_scale.training.task import DalrTask

K = 1024
# A step at a larger batch may take this much longer than in proportion to its rows: the encoder
# grows with the rows, the losses with their square.
SAFETY = 1.3
GRACE = 30.0
OBJECTIVES: dict[str, dict[str, Any]] = {
    "dalr, ListNet, without L_g2l": {"rank_loss": "listnet", "g2l_weight": 0.0},
    "dalr, all eight terms": {},
    "simcse": {"preset": "simcse"},
}


@dataclass(frozen=True)
class Scale:
    """Sizes of a run.

    Attributes:
        encoder: Changes to BERT-base.
        length: Most tokens of a sentence.
        micro: Sentences encoded at a time (two views each).
        widths: Image features, then one per text teacher.
        rows: Which batches each objective is tried at, in this order.
    """

    encoder: dict[str, int]
    length: int
    micro: int
    widths: tuple[int, ...]
    rows: tuple[tuple[str, int], ...]


# ListMLE sorts every row and L_g2l reads all tokens: both are left out where they take hours.
FULL = Scale(
    {}, 32, 512, (768, 768, 768),
    (
        ("dalr, ListNet, without L_g2l", 32 * K),
        ("dalr, ListNet, without L_g2l", 256 * K),
        ("dalr, all eight terms", 32 * K),
        ("dalr, ListNet, without L_g2l", 1024 * K),
        ("simcse", 1024 * K),
    ),
)  # fmt: skip
TOY = Scale(
    {
        "vocab_size": 100, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 32,
    },
    8, 8, (16, 12, 12), tuple((name, rows) for name in OBJECTIVES for rows in (16, 40)),
)  # fmt: skip


class Encoder(torch.nn.Module):
    """BERT with random weights, the CLS state, no tokenizer."""

    row_keys = None

    def __init__(self, changes: dict[str, int]) -> None:
        super().__init__()
        config = BertConfig(**changes)  # pyright: ignore[reportArgumentType]
        self.backbone = BertModel(config, add_pooling_layer=False)
        self.width: int = config.hidden_size

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        hidden = self.backbone(input_ids=input_ids, attention_mask=attention_mask)
        return pool(hidden.last_hidden_state, attention_mask, "cls_before_pooler")


def build(objective: str, rows: int, scale: Scale, device: torch.device) -> tuple[DDPEngine, Batch]:
    """An engine of one process, and a random paired batch that is on the device already."""
    config = build_config(
        [
            {
                "objective": {"preset": "dalr", **OBJECTIVES[objective]},
                "batch": {"global_size": rows, "micro_size": scale.micro},
                "engine": {"kind": "ddp", "precision": "bf16"},
                "data": {"pairs": ["random"], "max_length": scale.length},
            }
        ]
    )
    torch.manual_seed(0)
    image, *text = scale.widths
    encoder: Any = Encoder(scale.encoder)
    widths = FeatureWidths(image, image, tuple(text), tuple(text[:1]))
    spec = LossSpec(config.objective, (0.33, 0.67))
    model = DalrModel(encoder, config.model, spec, widths)
    optimizer = build_optimizer(model, config.optim)
    clip = config.optim.clip
    engine = DDPEngine(model, optimizer, World(0, 1, device), precision="bf16", clip=clip)
    lengths = torch.randint(scale.length // 4, scale.length + 1, (rows, 1), device=device)
    mask = (torch.arange(scale.length, device=device) < lengths).long()
    vocabulary = encoder.backbone.config.vocab_size
    ids = torch.randint(0, vocabulary, (rows, scale.length), device=device)
    return engine, random_rows(spec, ids, mask, scale)


def random_rows(spec: LossSpec, ids: torch.Tensor, mask: torch.Tensor, scale: Scale) -> Batch:
    """A paired batch with the features that the objective reads, float16 as they are stored."""
    needs, (image, *text) = spec.needs, scale.widths
    rows, length = ids.shape

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=ids.device, dtype=torch.float16)

    widths = {"image": image} if needs.image else {}
    widths |= {"caption": image} if needs.caption else {}
    widths |= {f"text{k}": width for k, width in enumerate(text if needs.text else ())}
    numbers = torch.arange(rows, device=ids.device)
    return Batch(
        step=0,
        kind="pair",
        item_ids=numbers,
        sentences=[],
        input_ids=ids,
        attention_mask=mask,
        image_ids=numbers,
        features={role: draw(rows, width) for role, width in widths.items()},
        token_features=[draw(rows, length - 1, text[0])] if needs.tokens else [],
        token_masks=[mask[:, 1:]] if needs.tokens else [],
    )


def measure(objective: str, rows: int, scale: Scale, device: torch.device) -> dict[str, Any]:
    """One optimizer step; the kernels were compiled before."""
    engine, batch = build(objective, rows, scale, device)
    model: Any = engine.module
    step = GlobalBatchStep(engine, DalrTask(model.spec.needs, None), chunk_rows=scale.micro)
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    loss, _ = step.backward(batch, step=0, lengths=batch.attention_mask.sum(1))
    applied = engine.step(1e-5).applied
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    if not applied:
        return {"status": f"failed: loss {float(loss)}, a gradient that is not finite"}
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    return {"status": "measured", "seconds": seconds, "loss": float(loss), "peak_bytes": peak}


def attempt(objective: str, rows: int, scale: Scale, device: torch.device) -> dict[str, Any]:
    """`measure`, where running out of memory is a result."""
    try:
        return measure(objective, rows, scale, device)
    except torch.OutOfMemoryError:
        return {"status": "out of memory"}
    except Exception as error:  # a row that fails must not take the others with it
        lines = str(error).strip().splitlines()
        return {"status": f"failed: {type(error).__name__}: {lines[0][:160] if lines else ''}"}
    finally:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def run(path: Path, scale: Scale, device: torch.device, seconds: float, only: str) -> None:
    """All rows in their order while the time lasts."""
    end = time.monotonic() + seconds
    rows = [
        {"objective": name, "rows": size, "status": results.NOT_REACHED}
        for name, size in scale.rows
    ]
    settings = {"length": scale.length, "micro": scale.micro, "widths": scale.widths}
    document = {"host": host.describe(device), "settings": settings, "rows": rows}
    keep_measured(path, document)
    write(path, document)
    warm: set[str] = set()
    for row in rows:
        name, size = row["objective"], row["rows"]
        if row["status"] == "measured" or only not in f"{name}/{size}":
            continue
        if time.monotonic() + expected(rows, name, size) > end:
            continue
        if name not in warm:  # compile and load libraries
            attempt(name, 2 * scale.micro, scale, device)
            warm.add(name)
        row |= attempt(name, size, scale, device)
        write(path, document)
        print(f"{name}, {size} rows: {row}", flush=True)


def keep_measured(path: Path, document: dict[str, Any]) -> None:
    """Take over the rows that the same commit measured on the same card before."""
    if not path.exists():
        return
    before = results.read(path)
    same = ("device", "packages", "commit")
    if any(before["host"].get(key) != document["host"].get(key) for key in same):
        return
    known = {(r["objective"], r["rows"]): r for r in before["rows"] if r["status"] == "measured"}
    for row in document["rows"]:
        row |= known.get((row["objective"], row["rows"]), {})


def expected(rows: Sequence[dict[str, Any]], name: str, size: int) -> float:
    """Seconds a step may take, judged by the largest batch of its objective so far."""
    done = [r for r in rows if r["objective"] == name and r["status"] == "measured"]
    return SAFETY * done[-1]["seconds"] * size / done[-1]["rows"] if done else 0.0


def write(path: Path, document: dict[str, Any]) -> None:
    results.write(path, document)
    path.with_suffix(".md").write_text(render(document), encoding="utf-8")


def render(document: dict[str, Any]) -> str:
    about, settings = document["host"], document["settings"]
    cells: list[tuple[str, ...]] = [
        ("objective", "global batch", "step, s", "sentences / s", "peak memory, GiB", "")
    ]
    for row in document["rows"]:
        known = row["status"] == "measured"
        peak = row.get("peak_bytes")
        cells.append(
            (
                row["objective"],
                str(row["rows"]),
                f"{row['seconds']:.2f}" if known else "",
                f"{row['rows'] / row['seconds']:.0f}" if known else "",
                f"{peak / 2**30:.1f}" if peak else "",
                "" if known else row["status"],
            )
        )
    lines = [
        "# The global batch on one GPU",
        "",
        f"{about['device']}, torch {about['packages']['torch']}, commit "
        f"{about['commit'] or 'unknown'}, {about['date']}. BERT-base student with random weights, "
        f"bf16, AdamW, at most {settings['length']} tokens, {settings['micro']} sentences encoded "
        "at a time, one step each. Written by `benchmarks/gpu_batch.py`.",
        "",
        *table.markdown(cells),
    ]
    return "\n".join(lines) + "\n"


def end_in_time(seconds: float) -> threading.Timer:
    """End the process when a step takes longer than expected; every row before is on disk."""
    timer = threading.Timer(seconds, lambda: os._exit(0))
    timer.daemon = True
    timer.start()
    return timer


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="The largest global batch on one GPU")
    parser.add_argument("--seconds", type=float, default=470.0, help="time for all rows")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--only", default="", help="rows whose OBJECTIVE/SIZE has this text")
    parser.add_argument("--dry-run", action="store_true", help="toy sizes on the CPU")
    options = parser.parse_args(arguments)
    if not options.dry_run and not torch.cuda.is_available():
        print("gpu batch benchmark skipped: torch sees no CUDA device")
        return 0
    device = torch.device("cpu" if options.dry_run else "cuda")
    name = "dry-run" if options.dry_run else host.slug(host.device_name(device))
    path = options.out / f"gpu_batch_{name}.json"
    timer = end_in_time(options.seconds + GRACE)
    scale = TOY if options.dry_run else FULL
    run(path, scale, device, options.seconds, options.only)
    timer.cancel()
    print(f"{path} and {path.with_suffix('.md')} are written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
