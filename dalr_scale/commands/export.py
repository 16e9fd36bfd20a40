"""`dalr-scale export`: a run's encoder as a directory for other tools.

The directory loads with `transformers.AutoModel`, with `sentence_transformers.SentenceTransformer`
and with `SentenceEncoder.from_directory`, and gives the same embeddings in all three. It appears
complete or not at all.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from dalr_scale.eval.unit import read_scores
from dalr_scale.models import directories
from dalr_scale.models.encoder import POOLERS, SentenceEncoder


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns 0."""
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
    args = parser.parse_args(argv)
    export(args.run, args.output, which=args.which, pooler=args.pooler, overwrite=args.overwrite)
    print(f"{args.output} loads with AutoModel and SentenceTransformer", file=sys.stderr)
    return 0


def export(
    run: str | Path,
    output: Path,
    *,
    which: str | None = None,
    pooler: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Export an encoder; see the module's first lines.

    Every weight is compared with the shape the configuration asks for and must be finite.

    Args:
        run: run directory, or a model directory.
        output: directory to write.
        which: `best` or `final` encoder of a run; by default the best.
        pooler: only for directories that do not state their pooling.
        overwrite: replace `output`.

    Raises:
        UserError: nothing to export, damaged weights, or `output` exists.
    """
    directories.check_free(output, overwrite=overwrite)
    source = directories.run_encoder(run, which)
    encoder = SentenceEncoder.from_directory(source, pooler)
    facts = directories.own_facts(
        directories.read_json(directories.transformer_directory(source) / "config.json")
    )
    encoder.base = str(facts.get("base") or encoder.base)
    known = facts.get("scores")
    scores = dict(known) if isinstance(known, dict) else {}
    if source.name == "best":
        scores |= _final_scores(source.parent)
    return encoder.save(output, overwrite=overwrite, scores=scores)


def _final_scores(run: Path) -> Mapping[str, float]:
    """Scores x 100 of a finished run, {} for one that has not finished."""
    path = run / "result.json"
    try:
        trained = read_scores(path)["trained"]
        return {str(name): float(value) for name, value in trained.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
