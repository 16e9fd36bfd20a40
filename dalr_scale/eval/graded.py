"""Graded similarity: pairs of sentences with a known degree of similarity.

One JSON object a line, `{"a": "...", "b": "...", "score": 0.7}`. The encoder's score is reported
with a baseline that only compares words: an encoder below it has not learned meaning.
"""

import json
from pathlib import Path

import numpy as np

from dalr_scale.errors import UserError
from dalr_scale.eval.sts import EncodeFn, STSTask, score_sts, spearman


def load_graded(path: Path) -> STSTask:
    """Read graded pairs from a JSON-lines file; blank lines are skipped.

    Raises:
        UserError: the file is missing, a line is malformed, or there are fewer than two pairs.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a readable file of graded pairs: {error}") from error
    rows = [_row(line, path, i) for i, line in enumerate(lines, start=1) if line.strip()]
    if len(rows) < 2:
        raise UserError(f"{path} holds {len(rows)} graded pairs; two are needed for a correlation")
    pairs = [(first, second) for first, second, _ in rows]
    return STSTask(path.stem, pairs, np.array([score for _, _, score in rows], dtype=np.float64))


def _row(line: str, path: Path, number: int) -> tuple[str, str, float]:
    try:
        row = json.loads(line)
        first, second, score = row["a"], row["b"], float(row["score"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f'{path}, line {number}: expected {{"a": text, "b": text, "score": number}}'
        ) from error
    if not isinstance(first, str) or not isinstance(second, str) or not np.isfinite(score):
        raise UserError(f"{path}, line {number}: a and b must be text and score a finite number")
    return first, second, score


def lexical_overlap(first: str, second: str) -> float:
    """Jaccard overlap of the lower-cased word sets of two sentences, in [0, 1]."""
    a, b = set(first.lower().split()), set(second.lower().split())
    return len(a & b) / len(a | b) if a | b else 0.0


def score_lexical(task: STSTask) -> float:
    """Spearman correlation of the word overlap with the known similarity."""
    overlaps = np.array([lexical_overlap(first, second) for first, second in task.pairs])
    return spearman(overlaps, task.scores)


def score_graded(encode_fn: EncodeFn, task: STSTask) -> float:
    """Spearman correlation of the cosine with the known similarity, in [-1, 1]."""
    return score_sts(encode_fn, task)
