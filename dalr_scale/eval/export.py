"""The encoder of a run, with its scores, as a directory for other tools."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dalr_scale.eval.unit import read_scores
from dalr_scale.models import directories
from dalr_scale.models.encoder import SentenceEncoder

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


def export(
    run: str | Path,
    output: Path,
    *,
    which: str | None = None,
    pooler: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Export an encoder to a directory that appears complete or not at all.

    It loads with `transformers.AutoModel`, `sentence_transformers.SentenceTransformer` and
    `SentenceEncoder.from_directory`, and gives the same embeddings in all three. Every weight is
    compared with the shape that the configuration requires and must be finite.

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
    config = directories.read_json(directories.transformer_directory(source) / "config.json")
    facts = directories.own_facts(config)
    encoder.base = str(facts.get("base") or encoder.base)
    known = facts.get("scores")
    scores: dict[str, float] = dict(known) if isinstance(known, dict) else {}
    if source.name == "best":
        scores |= _final_scores(source.parent)
    return encoder.save(output, overwrite=overwrite, scores=scores)


def _final_scores(run: Path) -> Mapping[str, float]:
    """Return the scores x 100 of a finished run, {} for one that has not finished."""
    path = run / "result.json"
    try:
        trained = read_scores(path)["trained"]
        return {str(name): float(value) for name, value in trained.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
