"""`dalr-scale evaluate`: score a sentence encoder on semantic textual similarity."""

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from dalr_scale.errors import UserError
from dalr_scale.eval.graded import load_graded, score_graded, score_lexical
from dalr_scale.eval.sts import MAIN_TASKS, TASKS, percent, score_tasks
from dalr_scale.models import directories
from dalr_scale.models.encoder import POOLERS, SentenceEncoder, make_encode_fn
from dalr_scale.teachers.extract import default_device

DATA_VARIABLE = "DALR_DATA"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns 0."""
    args = _parser().parse_args(argv)
    if args.batch_size < 1:
        raise UserError(f"--batch-size {args.batch_size}: use at least 1")
    tasks = args.tasks or ([] if args.graded else list(MAIN_TASKS))
    unknown = [task for task in tasks if task not in TASKS]
    if unknown:
        raise UserError(f"unknown task {unknown[0]!r}; choose from {', '.join(TASKS)}")
    if args.json and args.json.exists() and args.json.stat().st_size and not args.overwrite:
        raise UserError(f"{args.json} exists; name another file or pass --overwrite")
    root = data_root(args.data) if tasks else Path()
    graded = [load_graded(path) for path in args.graded or ()]
    encoder = SentenceEncoder.from_directory(directories.run_encoder(args.model), args.pooler)
    encoder.to(args.device or default_device()).eval()
    encode = make_encode_fn(
        encoder,
        batch_size=args.batch_size,
        max_length=args.max_length,
        progress=not args.quiet,
    )
    table = score_tasks(encode, root, tasks) if tasks else {}
    notes: dict[str, str] = {}
    for task in graded:
        table[task.name] = percent(score_graded(encode, task))
        notes[task.name] = f"word overlap alone {100 * score_lexical(task):.2f}"
    print(format_scores(table, notes))
    if args.json:
        _write(args.json, table)
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


def data_root(given: Path | None) -> Path:
    """The directory given, else $DALR_DATA; see `load_sts` for what it holds.

    Raises:
        UserError: neither is set, or the directory does not exist.
    """
    root = given or (Path(os.environ[DATA_VARIABLE]) if os.environ.get(DATA_VARIABLE) else None)
    if root is None:
        raise UserError(f"name the directory with STS/ and SICK/ by --data or ${DATA_VARIABLE}")
    if not root.is_dir():
        raise UserError(f"{root} is not a directory; --data names the one with STS/ and SICK/")
    return root


def format_scores(table: Mapping[str, float], notes: Mapping[str, str]) -> str:
    """A two-column table, one line per task."""
    width = max(len(name) for name in table)
    rows = [
        f"{name:<{width}}  {value:6.2f}  {notes.get(name, '')}" for name, value in table.items()
    ]
    return "\n".join(row.rstrip() for row in rows)


def _write(path: Path, table: Mapping[str, float]) -> None:
    """Write the scores through a temporary file, so that an interruption leaves no half file."""
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
