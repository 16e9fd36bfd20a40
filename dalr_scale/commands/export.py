"""`dalr-scale export`: a run's encoder as a directory for other tools."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from dalr_scale.eval.export import export
from dalr_scale.models.encoder import POOLERS

if TYPE_CHECKING:
    from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns 0."""
    args = _parser().parse_args(argv)
    export(args.run, args.output, which=args.which, pooler=args.pooler, overwrite=args.overwrite)
    print(f"{args.output} loads with AutoModel and SentenceTransformer", file=sys.stderr)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dalr-scale export",
        description="Write a run's encoder as a Hugging Face and sentence-transformers directory.",
    )
    add = parser.add_argument
    add("run", help="run directory, model directory, or package:NAME/SUB")
    add("--output", required=True, type=Path, help="directory to write")
    add("--which", choices=("best", "final"), help="encoder of the run (default: best)")
    add("--pooler", choices=POOLERS, help="for model directories that do not state their pooling")
    add("--overwrite", action="store_true", help="replace an existing directory")
    return parser
