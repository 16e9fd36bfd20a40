"""Tokenizers: loading with a check that the vocabulary arrived, and batches of similar length."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, cast

import torch
from torch import Tensor
from transformers import AutoTokenizer, BertTokenizer, PreTrainedTokenizerBase
from transformers import logging as hf_logging

from dalr_scale.errors import UserError
from dalr_scale.models import directories

_PROBE_WORDS = 200
_MAX_PROBE_UNKNOWN = 0.5


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Load a fast tokenizer from a directory, a Hub name or a WordPiece `vocab.txt`.

    A vocabulary file without settings is read as lower-casing when no entry has an upper-case
    letter. The result pads on the right. Its vocabulary is probed, because a tokenizer built from
    a wrong argument can come out empty and map every word to "unknown" without an error
    (`BertTokenizerFast(vocab_file=...)` in transformers 5).

    Raises:
        UserError: no tokenizer there, an empty vocabulary, or one that does not know its own words.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        directory = directories.resolve_directory(path)
        inner = (
            directory if has_tokenizer(directory) else directories.transformer_directory(directory)
        )
        bare = not (inner / "tokenizer.json").is_file() and not _has_settings(inner)
        file = inner / "vocab.txt" if bare else inner
    with quiet():
        tokenizer = _wordpiece(file) if file.is_file() else _auto_tokenizer(file)
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(f"{file} has no fast tokenizer; save its tokenizer.json first")
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    _probe(tokenizer, file)
    return tokenizer


def token_id(
    tokenizer: PreTrainedTokenizerBase, name: Literal["pad", "cls", "sep", "unk"]
) -> int | None:
    """Return the id of a special token; None where the tokenizer lacks it."""
    return cast("int | None", getattr(tokenizer, f"{name}_token_id"))


def has_tokenizer(directory: Path) -> bool:
    """Whether a directory itself holds tokenizer files."""
    return any(
        (directory / name).is_file() for name in ("tokenizer.json", "vocab.txt", "vocab.json")
    )


def _has_settings(directory: Path) -> bool:
    return (directory / "tokenizer_config.json").is_file() or (directory / "config.json").is_file()


def _wordpiece(file: Path) -> PreTrainedTokenizerBase:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is not a readable WordPiece vocabulary: {error}") from error
    words = [line for line in lines if not (line.startswith("[") and line.endswith("]"))]
    lower = not any("A" <= character <= "Z" for word in words for character in word)
    return BertTokenizer(vocab=str(file), do_lower_case=lower)


def _auto_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False)
    except Exception as error:  # missing files surface as several unrelated types
        raise UserError(f"no tokenizer loads from {directory}: {first_line(error)}") from error


def _probe(tokenizer: PreTrainedTokenizerBase, source: Path) -> None:
    special = set(tokenizer.all_special_tokens)
    marks = "\u0120\u2581"  # word starts in byte-level BPE and in SentencePiece vocabularies
    entries = (word.lstrip(marks) for word in tokenizer.get_vocab() if word not in special)
    words = [word for word in entries if word.isascii() and word.isalpha()][:_PROBE_WORDS]
    if not words:
        raise UserError(f"the vocabulary of {source} holds no words; the tokenizer did not load")
    share = unknown_share(tokenizer, words)
    if share > _MAX_PROBE_UNKNOWN:
        raise UserError(
            f"the tokenizer of {source} does not know {share:.0%} of its own words; "
            "its vocabulary and its settings do not belong together"
        )


def unknown_share(tokenizer: PreTrainedTokenizerBase, sentences: Iterable[str]) -> float:
    """Share of tokens, special ones left out, that are the unknown token (0 without one)."""
    unknown = token_id(tokenizer, "unk")
    ids = tokenizer(list(sentences), add_special_tokens=False, truncation=False)["input_ids"]
    total = sum(len(row) for row in ids)
    if unknown is None or total == 0:
        return 0.0
    return sum(token == unknown for row in ids for token in row) / total


def length_sorted_batches(
    tokenizer: PreTrainedTokenizerBase,
    sentences: Sequence[str],
    *,
    max_length: int,
    batch_size: int,
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Tokenize all sentences once and yield batches of similar length, longest first.

    Yields:
        (row numbers into `sentences`, input ids int64 [b, L], attention mask int64 [b, L]).
    """
    rows = tokenizer(
        list(sentences), truncation=True, max_length=max_length, return_token_type_ids=False
    )["input_ids"]
    # Longest first: an out-of-memory condition then shows in the first batch, not the last.
    order = sorted(range(len(rows)), key=lambda row: -len(rows[row]))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        longest = len(rows[chosen[0]])
        ids = torch.full((len(chosen), longest), token_id(tokenizer, "pad") or 0, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(chosen):
            ids[i, : len(rows[row])] = torch.tensor(rows[row])
            mask[i, : len(rows[row])] = 1
        yield chosen, ids, mask


def same_tokenizer(first: PreTrainedTokenizerBase, second: PreTrainedTokenizerBase) -> bool:
    """Whether two tokenizers give every text the same ids: same vocabulary and same settings."""
    return tokenizer_hash(first) == tokenizer_hash(second)


def compare_tokenizers(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> None:
    """Require that student and teacher share their tokenizer.

    Raises:
        UserError: they differ; the message names the difference.
    """
    if same_tokenizer(student, teacher):
        return
    ours, theirs = _vocabulary(student), _vocabulary(teacher)
    differing = sum(theirs.get(word) != number for word, number in ours.items())
    what = (
        f"{len(ours)} and {len(theirs)} entries, {differing} of the student's at another place"
        if ours != theirs
        else "the same vocabulary, but other settings (casing, special tokens)"
    )
    raise UserError(
        f"the tokenizers of student and teacher differ: {what}; "
        "set --objective.teacher_tokenizer=retokenise"
    )


def _vocabulary(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    # open_clip's own tokenizer has a dictionary `encoder` instead
    known = tokenizer.get_vocab() if hasattr(tokenizer, "get_vocab") else tokenizer.encoder
    return dict(cast("dict[str, int]", known))


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a SHA-256 of what determines a tokenizer's ids; truncation and padding do not."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        state: dict[str, object] = {
            "kind": type(tokenizer).__name__,
            "vocab": _vocabulary(tokenizer),
        }
    else:
        state = json.loads(backend.to_str())
        for key in ("truncation", "padding"):
            state.pop(key, None)
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' progress bars and warnings; real problems raise errors here."""
    level, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's text: libraries append pages of advice."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
