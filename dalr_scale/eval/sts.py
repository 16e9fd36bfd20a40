"""Semantic textual similarity in SentEval's directory layout, scored in the "all" setting.

Protocol: the cosine of two sentence embeddings against the gold score, one Spearman correlation
over all pairs of a task; the subsets of a year are concatenated, not averaged. Sentences are
whitespace tokens joined by one space, casing and punctuation stay. Pairs without a gold score are
left out.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dalr_scale.errors import UserError

EncodeFn = Callable[[list[str]], Tensor]

# STS13 is used without its SMT subset, which is not freely available.
SUBSETS: Mapping[str, tuple[str, ...]] = {
    "STS12": ("MSRpar", "MSRvid", "SMTeuroparl", "surprise.OnWN", "surprise.SMTnews"),
    "STS13": ("FNWN", "headlines", "OnWN"),
    "STS14": ("deft-forum", "deft-news", "headlines", "images", "OnWN", "tweet-news"),
    "STS15": ("answers-forums", "answers-students", "belief", "headlines", "images"),
    "STS16": ("answer-answer", "headlines", "plagiarism", "postediting", "question-question"),
}
_TABLES: Mapping[str, str] = {
    "STS-B": "STS/STSBenchmark/sts-test.csv",
    "STS-B-dev": "STS/STSBenchmark/sts-dev.csv",
    "SICK-R": "SICK/SICK_test_annotated.txt",
    "SICK-R-dev": "SICK/SICK_trial.txt",
}
MAIN_TASKS = (*SUBSETS, "STS-B", "SICK-R")
"""The seven tasks whose mean is reported as "Avg"."""
TASKS = (*SUBSETS, *_TABLES)


@dataclass(frozen=True)
class STSTask:
    """One task: sentence pairs and their gold scores.

    Attributes:
        name: task name as in `TASKS`.
        pairs: n sentence pairs.
        scores: float64 [n], higher is more similar.
    """

    name: str
    pairs: list[tuple[str, str]]
    scores: np.ndarray


def load_sts(root: Path, task: str) -> STSTask:
    """Read one task below `root`.

    Args:
        root: directory with `STS/` and `SICK/` (SentEval's layout), or the one above, which has
            them in `senteval/`.
        task: one of `TASKS`.

    Raises:
        UserError: unknown task, or a file that is missing or malformed, named with its line.
    """
    root = root / "senteval" if (root / "senteval").is_dir() else root
    if task in SUBSETS:
        directory = root / "STS" / f"{task}-en-test"
        rows = [row for name in SUBSETS[task] for row in _read_subset(directory, name)]
    elif task.startswith("STS-B") and task in _TABLES:
        rows = list(_read_table(root / _TABLES[task], score=4, first=5, header=False))
    elif task in _TABLES:
        rows = list(_read_table(root / _TABLES[task], score=3, first=1, header=True))
    else:
        raise UserError(f"unknown task {task!r}; choose from {', '.join(TASKS)}")
    if len(rows) < 2:
        raise UserError(f"{task} below {root} has {len(rows)} scored pairs; two are needed")
    pairs = [(first, second) for first, second, _ in rows]
    return STSTask(task, pairs, np.array([score for _, _, score in rows], dtype=np.float64))


def _read_subset(directory: Path, name: str) -> Iterator[tuple[str, str, float]]:
    source, gold = directory / f"STS.input.{name}.txt", directory / f"STS.gs.{name}.txt"
    sentences, scores = _lines(source), _lines(gold)
    if len(sentences) != len(scores):
        raise UserError(f"{source} has {len(sentences)} lines, {gold} has {len(scores)}")
    for number, (line, score) in enumerate(zip(sentences, scores, strict=True), start=1):
        if not score.strip():
            continue
        fields = line.split("\t")
        if len(fields) < 2:
            raise UserError(f"{source}, line {number}: no tab between the two sentences")
        yield _clean(fields[0]), _clean(fields[1]), _number(score, gold, number)


def _read_table(
    path: Path, *, score: int, first: int, header: bool
) -> Iterator[tuple[str, str, float]]:
    """Rows of a tab-separated file without quoting: some lines hold single quotation marks."""
    for number, line in enumerate(_lines(path), start=1):
        fields = line.split("\t")
        if header and number == 1:
            continue
        if len(fields) <= max(score, first + 1):
            raise UserError(f"{path}, line {number}: {len(fields)} tab-separated fields, too few")
        value = _number(fields[score], path, number)
        yield _clean(fields[first]), _clean(fields[first + 1]), value


def _lines(path: Path) -> list[str]:
    # Not splitlines(): it also breaks at U+2028 and U+0085, which occur inside sentences.
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UserError(
            f"{path} is missing; --data names the directory with STS/ and SICK/"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not readable as UTF-8 text: {error}") from error
    return text.removesuffix("\n").split("\n")


def _clean(sentence: str) -> str:
    return " ".join(sentence.split())


def _number(text: str, path: Path, line: int) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not np.isfinite(value):
        raise UserError(f"{path}, line {line}: {text.strip()!r} is not a score")
    return value


def average_ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1, equal values sharing the mean of their ranks; float64 [n]."""
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[group.reshape(-1)]


def spearman(first: np.ndarray, second: np.ndarray) -> float:
    """Spearman's rank correlation of two [n] arrays, ties by average ranks.

    Returns:
        A value in [-1, 1]; 0 when one side is constant (the correlation is then undefined, and a
        collapsed encoder should not score).

    Raises:
        ValueError: different lengths, fewer than two values, or values that are not numbers.
    """
    a, b = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if a.shape != b.shape or a.ndim != 1 or len(a) < 2:
        raise ValueError(f"need two equally long lists of at least 2 values: {a.shape}, {b.shape}")
    if np.isnan(a).any() or np.isnan(b).any():
        raise ValueError("cannot rank values that are not numbers (NaN)")
    ranks_a, ranks_b = average_ranks(a), average_ranks(b)
    ranks_a, ranks_b = ranks_a - ranks_a.mean(), ranks_b - ranks_b.mean()
    norm = np.sqrt((ranks_a @ ranks_a) * (ranks_b @ ranks_b))
    return float(np.clip(ranks_a @ ranks_b / norm, -1.0, 1.0)) if norm > 0 else 0.0


def pair_cosines(encode_fn: EncodeFn, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
    """Cosine of each pair of sentences, float64 [n]; undefined ones (a zero or NaN vector) are 0.

    Every distinct sentence is encoded once.
    """
    sentences = list(dict.fromkeys(text for pair in pairs for text in pair))
    row = {sentence: i for i, sentence in enumerate(sentences)}
    vectors = encode_fn(sentences).to(torch.float64)
    first = vectors[[row[a] for a, _ in pairs]]
    second = vectors[[row[b] for _, b in pairs]]
    norms = first.norm(dim=1) * second.norm(dim=1)
    return torch.nan_to_num((first * second).sum(1) / norms, 0.0, 0.0, 0.0).numpy()


def score_sts(encode_fn: EncodeFn, task: STSTask) -> float:
    """Spearman correlation of cosine and gold score over all pairs of a task, in [-1, 1]."""
    return spearman(pair_cosines(encode_fn, task.pairs), task.scores)


def percent(score: float) -> float:
    """A score as tables print it: times 100, two decimals."""
    return round(100 * score, 2)


def score_tasks(encode_fn: EncodeFn, root: Path, tasks: Sequence[str]) -> dict[str, float]:
    """Score several tasks x 100, rounded; with all of `MAIN_TASKS`, "Avg" is the mean of these.

    All files are read before the first sentence is encoded, so a missing one is found at once.
    """
    loaded = [load_sts(root, task) for task in dict.fromkeys(tasks)]
    table = {task.name: percent(score_sts(encode_fn, task)) for task in loaded}
    if all(task in table for task in MAIN_TASKS):
        table["Avg"] = round(sum(table[task] for task in MAIN_TASKS) / len(MAIN_TASKS), 2)
    return table
