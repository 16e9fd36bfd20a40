"""`dalr-scale evaluate`: score a sentence encoder on semantic textual similarity."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from dalr_scale.errors import UserError
from dalr_scale.eval.score import DATA_VARIABLE, Score, ScoreRequest, data_root, score_encoder
from dalr_scale.eval.sts import MAIN_TASKS, TASKS
from dalr_scale.models.directories import run_encoder
from dalr_scale.models.encoder import POOLERS, SentenceEncoder
from dalr_scale.teachers.extract import default_device

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns 0."""
    args = _parser().parse_args(argv)
    request = ScoreRequest(
        tasks=args.tasks or ([] if args.graded else list(MAIN_TASKS)),
        graded=args.graded or (),
        data=args.data,
        batch_size=args.batch_size,
        max_length=args.max_length,
        progress=not args.quiet,
    )
    if args.json and args.json.exists() and args.json.stat().st_size and not args.overwrite:
        raise UserError(f"{args.json} exists; name another file or pass --overwrite")
    if request.tasks:
        data_root(request.data)  # before a model is loaded
    encoder = SentenceEncoder.from_directory(run_encoder(args.model), args.pooler)
    scores = score_encoder(encoder.to(args.device or default_device()).eval(), request)
    print(format_scores(scores))
    if args.json:
        _write(args.json, {name: score.value for name, score in scores.items()})
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dalr-scale evaluate",
        description="Spearman correlation x 100 of cosine similarities and gold scores.",
    )
    add = parser.add_argument
    add("model", help="model directory, run directory (its best encoder) or package:NAME/SUB")
    add("--data", type=Path, help=f"directory with STS/ and SICK/ (default: ${DATA_VARIABLE})")
    add("--tasks", nargs="+", metavar="TASK", help=f"from {', '.join(TASKS)} (default: the seven)")
    add("--graded", nargs="+", type=Path, metavar="FILE", help='lines {"a":, "b":, "score":}')
    add("--json", type=Path, metavar="FILE", help="write task name to score")
    add("--overwrite", action="store_true", help="replace an existing --json file")
    add("--pooler", choices=POOLERS, help="for directories that do not state their pooling")
    add("--batch-size", type=int, default=128, help="sentences per forward pass (default 128)")
    add("--max-length", type=int, help="tokens kept of a sentence (default: all that fit)")
    add("--device", help="cpu, cuda, cuda:1 ... (default: a GPU where there is one)")
    add("--quiet", action="store_true", help="no progress bar")
    return parser


def format_scores(scores: Mapping[str, Score]) -> str:
    """Return a table of two columns, one line per task."""
    width = max(len(name) for name in scores)
    return "\n".join(
        f"{name:<{width}}  {score.value:6.2f}"
        + ("" if score.lexical is None else f"  word overlap alone {score.lexical:.2f}")
        for name, score in scores.items()
    )


def _write(path: Path, table: Mapping[str, float]) -> None:
    """Write the scores through a temporary file, so that an interruption leaves no partial file."""
    fresh = path.with_name(f".{path.name}.new-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
        fresh.replace(path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error}") from error
    finally:
        fresh.unlink(missing_ok=True)
    print(f"scores written to {path}", file=sys.stderr)
