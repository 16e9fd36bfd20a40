"""The results of ``exactness_peers.py`` as JSON and Markdown."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

from peers import case

PACKAGES = (
    "dalr-scale", "torch", "deepspeed", "accelerate", "transformers",
    "sentence-transformers", "datasets", "GradCache", "tevatron", "peft",
)  # fmt: skip
# Columns of the short table: engine and dtype of a cell.
COLUMNS = {
    "ddp float64": "DDP, float64",
    "ddp float32": "DDP, float32",
    "zero1 float32": "ZeRO-1",
    "zero2 float32": "ZeRO-2",
    "zero3 float32": "ZeRO-3",
}
WRONG = 1e-3  # far above the rounding of float32: another gradient
METHOD = """\
Every contestant makes one SGD step on the same global batch ({pairs} pairs of sentences, one BERT
with 2 layers and width 32 from a random seed, no dropout), cut over 1, 2 or 4 CPU processes (gloo)
and, within each, into chunks of {chunk} pairs. An element is the largest relative error of a
tensor's gradient, `|found - exact| / |exact|`, over all tensors and over the numbers of ranks. The
exact gradient is that of one process with the whole batch and no chunks, by plain autograd in
float64, of the loss that the contestant means to compute (InfoNCE over all pairs of all ranks). The
gradient of a contestant is read from the weights before and after the step, `(before - after) /
rate`, with one method for all: it is what training applies, on any engine. The rounding of float32
alone gives {floor:.1e} (one process, no chunks), and {floor_1:.1e} at temperature 1 (tevatron).
DeepSpeed trains no float64. At ZeRO-3 the persistence threshold is 0, since the tensors of a small
model would not be partitioned otherwise. The last table lists every measurement with its number of
ranks.
"""
NOTES = """\
## How each one is run

* **sentence-transformers**: `SentenceTransformerTrainer` under `torchrun`, as its
  [page on distributed training](https://sbert.net/docs/sentence_transformer/training/distributed.html)
  says; `gather_across_devices=True` makes the negatives global
  ([#3442](https://github.com/huggingface/sentence-transformers/pull/3442)). DeepSpeed comes in by
  `SentenceTransformerTrainingArguments(deepspeed=...)`, with a number for `reduce_bucket_size`, as
  the maintainer advises in
  [#3531](https://github.com/huggingface/sentence-transformers/issues/3531); the same comment does
  not expect the cached losses to work with it. Users report the assertion in
  [#3173](https://github.com/huggingface/sentence-transformers/issues/3173). Under DDP version 6.2
  reduces gradients once a step
  ([#4039](https://github.com/huggingface/sentence-transformers/pull/4039)).
* **GradCache**: as its [README](https://github.com/luyug/GradCache#distributed-training-with-multiple-gpus)
  says for several GPUs, with `no_sync_except_last=True`. `DistributedContrastiveLoss` is multiplied
  by the number of ranks, as tevatron does: gradients flow to a rank's own rows only
  ([#25](https://github.com/luyug/GradCache/issues/25)), so DDP's mean would be too small by that
  factor. The package has no instructions for DeepSpeed
  ([#37](https://github.com/luyug/GradCache/issues/37)): the first row hands it engines in place of
  DDP models and calls `engine.step()`; the second one wraps the cache step in
  `engine.coalesce_grad_reduction()`, which DeepSpeed 0.19 offers for several backwards in one step
  ([#7992](https://github.com/deepspeedai/DeepSpeed/pull/7992)).
* **tevatron**: `GradCacheTrainer` with `--grad_cache` and its own model class; DeepSpeed by
  `--deepspeed` ([#206](https://github.com/texttron/tevatron/issues/206)). "No step" means that
  training ends without an error and without a change of any weight: under DeepSpeed a Hugging Face
  trainer steps inside `accelerator.backward`, which the cache does not call. The loss of
  `GradCacheTrainer` has no temperature, whatever `--temperature` says, so it is compared with the
  exact gradient at temperature 1.
* **Controls**: the loss without chunks shows that the method reads exact gradients on every engine;
  gradient accumulation over chunks, with negatives from one chunk of each rank, shows how far
  another loss is.

Others whose users ask for the combination:
[VLM2Vec #70](https://github.com/TIGER-AI-Lab/VLM2Vec/issues/70),
[UniME #8](https://github.com/deepglint/UniME/issues/8),
[DeepSpeed #1902](https://github.com/deepspeedai/DeepSpeed/issues/1902).
"""


def versions() -> dict[str, str]:
    """Installed versions, with the commit of what was installed from a repository."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            package = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        commit = _commit(json.loads(package.read_text("direct_url.json") or "{}"))
        found[name] = package.version + (f" ({commit[:12]})" if commit else "")
    return found


def _commit(source: Mapping[str, Any]) -> str:
    """The commit that a package was installed from; of a local clone, the one it is at."""
    if "vcs_info" in source:
        return source["vcs_info"]["commit_id"]
    clone = source.get("url", "").removeprefix("file://")
    if "dir_info" not in source or source["dir_info"].get("editable"):
        return ""
    head = ["git", "-C", clone, "rev-parse", "HEAD"]
    return subprocess.run(head, capture_output=True, text=True, check=False).stdout.strip()


def write(
    path: Path,
    cells: dict[str, Any],
    packages: Mapping[str, str],
    floor: Mapping[str, Any],
    labels: Mapping[str, str],
) -> None:
    """Writes `path` with the suffixes ``.json`` and ``.md``.

    Args:
        cells: contestant -> "engine dtype ranks" -> what was measured.
        packages: name -> version.
        floor: inverse temperature -> errors of one float32 process with the whole batch.
        labels: contestant -> its name for readers, in the order of the rows.
    """
    path.parent.mkdir(exist_ok=True)
    facts = {
        "date": date.today().isoformat(),
        "host": f"{os.cpu_count()} cores, {platform.machine()}",
        "versions": dict(packages),
        "pairs": case.PAIRS,
        "chunk": case.CHUNK,
        "rounding_float32": dict(floor),
        "cells": cells,
    }
    path.with_suffix(".json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(_markdown(facts, labels), encoding="utf-8")


def _markdown(facts: Mapping[str, Any], labels: Mapping[str, str]) -> str:
    cells = facts["cells"]
    installed = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    method = METHOD.format(
        pairs=facts["pairs"],
        chunk=facts["chunk"],
        floor=facts["rounding_float32"][str(case.SCALE)]["relative"],
        floor_1=facts["rounding_float32"]["1.0"]["relative"],
    )
    short = [
        f"| largest relative error | {' | '.join(COLUMNS.values())} |",
        f"|---|{'---|' * len(COLUMNS)}",
    ]
    for name, label in labels.items():
        row = [_over_ranks(_of_column(cells.get(name, {}), column)) for column in COLUMNS]
        short.append(f"| {label} | {' | '.join(row)} |")
    parts = [
        "# Gradients of chunked contrastive losses against one process with the whole batch\n",
        f"{facts['date']}; {facts['host']}; {installed}.\n",
        method,
        "\n".join(short) + "\n",
        "-: not measured. Bold: another gradient, an exception, or no step.\n",
        *_messages(cells, labels),
        NOTES,
        "## All measurements\n",
        "\n".join(_long_table(cells, labels)) + "\n",
    ]
    return "\n".join(parts)


def _of_column(cells: Mapping[str, Any], column: str) -> dict[int, Any]:
    """Number of ranks -> cell, of one engine and dtype."""
    found: dict[int, Any] = {}
    for key, cell in cells.items():
        kind, ranks = key.rsplit(" ", 1)
        if kind == column:
            found[int(ranks)] = cell
    return dict(sorted(found.items()))


def _over_ranks(cells: Mapping[int, Any]) -> str:
    """One element of the short table: the largest error, or what happened instead."""
    if not cells:
        return "-"
    errors = [c["relative"] for c in cells.values() if c["status"] == "measured"]
    agreed = not any(c.get("ranks_differ", False) for c in cells.values())
    if agreed and len(errors) == len(cells) and len({error > WRONG for error in errors}) == 1:
        return _error(max(errors))
    texts = {ranks: _outcome(cell) for ranks, cell in cells.items()}
    if len(set(texts.values())) == 1:
        return next(iter(texts.values()))
    return "; ".join(f"{ranks} ranks: {text}" for ranks, text in texts.items())


def _outcome(cell: Mapping[str, Any]) -> str:
    if cell["status"] == "measured":
        return _error(cell["relative"]) + (", ranks differ" if cell["ranks_differ"] else "")
    if cell["status"] == "exception":
        return f"**{cell['exception']}**"
    return f"**{cell['status']}**"


def _error(relative: float) -> str:
    return f"**{relative:.2g}**" if relative > WRONG else f"{relative:.1e}"


def _messages(cells: Mapping[str, Any], labels: Mapping[str, str]) -> list[str]:
    """The first line of every different exception, with where it came."""
    where: dict[tuple[str, str, str], list[str]] = {}
    for name in labels:
        for key, cell in cells.get(name, {}).items():
            if cell["status"] == "exception":
                engine, _, ranks = key.split()
                what = (labels[name], cell["exception"], cell["message"])
                where.setdefault(what, []).append(f"{engine} at {ranks}")
    lines = [
        f"* {label} ({', '.join(places)}): `{kind}: {message}`"
        for (label, kind, message), places in where.items()
    ]
    return ["Exceptions, with engine and ranks:\n", "\n".join(lines) + "\n"] if lines else []


def _long_table(cells: Mapping[str, Any], labels: Mapping[str, str]) -> list[str]:
    lines = [
        "| contestant | engine | dtype | ranks | largest relative error, of a tensor | of all "
        "tensors as one | largest absolute error | length over exact length |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, label in labels.items():
        for key, cell in sorted(cells.get(name, {}).items()):
            place = " | ".join(key.split())
            if cell["status"] == "measured":
                numbers = (
                    f"{cell['relative']:.2e} | {cell['whole']:.2e} | {cell['max_abs']:.2e} | "
                    f"{cell['length']:.4f}"
                )
            else:
                numbers = f"{_outcome(cell)} | | | "
            lines.append(f"| {label} | {place} | {numbers} |")
    return lines
