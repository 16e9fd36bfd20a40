"""Stored teacher features: a small tar next to each shard, joined to it by row number.

The feature set NAME of ``X.tar`` is ``X.NAME.features.tar`` with three members:

    00000000.manifest.json  origin of the values, and the state of the shard that they belong to
    00000000.values.npy     float16, C order
    00000000.offsets.npy    int64 [rows + 1], level ``token`` only
    00000000.sums.npy       uint32 [rows], the checksum of each row (absent in the oldest files)

A row is a sample of the shard (level ``sample``) or an item of it (``item``, ``token``). At level
``token`` the values of row i are ``values[offsets[i]:offsets[i + 1]]``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dalr_scale.data.shards.arrays import FileArray, row_sums
from dalr_scale.data.shards.files import FEATURE_SUFFIX, companion
from dalr_scale.data.shards.indexing import ensure_index
from dalr_scale.data.shards.packed import (
    CRC,
    OFFSET,
    PackedTar,
    digest,
    peek_manifest,
    write_packed,
)
from dalr_scale.errors import UserError

if TYPE_CHECKING:
    from dalr_scale.data.shards.index_file import IndexHeader

LEVELS = ("sample", "item", "token")
SCHEMA = 1

_ARRAYS = frozenset(("values", "offsets", "sums"))
_REMEDY = "compute these features again"
_HALF = np.dtype("<f2")
_FACTS = ("model", "revision", "pooling", "normalized", "tokenizer_sha256")


def features_path(shard: Path, name: str) -> Path:
    """Return the path of the feature set ``name`` of a shard."""
    return Path(_place(shard, name))


def _place(shard: Path, name: str) -> str:
    """``features_path`` as a string: for thousands of shards, paths are much slower."""
    return companion(shard, _ending(name))


@lru_cache(maxsize=64)
def _ending(name: str) -> str:
    if not name or not all(letter.isalnum() or letter in "-_" for letter in name):
        raise UserError(f"feature set name {name!r}: use letters, digits, - and _ only")
    return f".{name}{FEATURE_SUFFIX}"


def feature_names(shard: Path) -> list[str]:
    """Return the names of the feature sets of a shard."""
    head = f"{shard.stem}."
    return sorted(
        path.name[len(head) : -len(FEATURE_SUFFIX)]
        for path in shard.parent.iterdir()
        if path.name.startswith(head) and path.name.endswith(FEATURE_SUFFIX)
    )


class FoundFeatures(NamedTuple):
    """Features of some rows.

    Attributes:
        values: float32 [rows, dim]; at level ``token`` [tokens of all rows, dim].
        lengths: int64 [rows], the tokens of each row; None at the other levels.
        faults: position -> what is wrong with that row (bytes that changed, values that are not
            finite); its values must not be used.
    """

    values: np.ndarray
    lengths: np.ndarray | None
    faults: dict[int, str]


@dataclass(frozen=True)
class FeatureTable:
    """One feature set of one shard, read from its file row by row.

    Attributes:
        path: the feature shard.
        level: ``sample``, ``item`` or ``token``.
        dim: width of a feature vector.
        rows: samples or items.
        manifest: the facts that were recorded with the values.
        values: float16 [rows, dim], or [tokens, dim] at level ``token``.
        offsets: int64 [rows + 1] at level ``token``, else None.
        sums: CRC-32 of each row's bytes, uint32 [rows]; None in the oldest files.
    """

    path: Path
    level: str
    dim: int
    rows: int
    manifest: Mapping[str, object]
    values: FileArray
    offsets: FileArray | None
    sums: FileArray | None = None

    def read(self, rows: np.ndarray) -> FoundFeatures:
        """Read the vectors of some rows, int64 [n] in 0 ... rows - 1.

        Raises:
            TruncatedFile: the file has become shorter.
            OSError: the storage fails.
        """
        lengths = None
        if self.offsets is None:
            half = self.values.rows(rows)
        else:
            starts, ends = np.split(self.offsets.rows(np.concatenate([rows, rows + 1])), 2)
            lengths = ends - starts
            half = self.values.spans(starts, lengths)
        values = half.astype(np.float32)
        return FoundFeatures(values, lengths, self._faults(rows, half, values, lengths))

    def _faults(
        self, rows: np.ndarray, half: np.ndarray, values: np.ndarray, lengths: np.ndarray | None
    ) -> dict[int, str]:
        bad: dict[int, str] = {}
        # One sum is much cheaper than a test per value, and any NaN or infinity shows in it;
        # finite halves cannot overflow it.
        if not np.isfinite(values.sum()):
            wrong = np.flatnonzero(~np.isfinite(values).all(axis=1))
            if lengths is not None:
                wrong = np.unique(np.repeat(np.arange(len(rows)), lengths)[wrong])
            bad |= {int(n): f"{self._name(int(rows[n]))} is not finite; {_REMEDY}" for n in wrong}
        if self.sums is not None:
            for n in np.flatnonzero(row_sums(half, lengths) != self.sums.rows(rows)).tolist():
                bad[n] = f"{self._name(int(rows[n]))} has changed; {_REMEDY}"
        return bad

    def _name(self, row: int) -> str:
        return f"{self.path}: the feature of {_row_word(self.level)} {row}"

    def verify(self) -> None:
        """Compare the stored values with their SHA-256.

        Raises:
            UserError: they have changed.
        """
        arrays = [array for array in (self.values, self.offsets) if array is not None]
        if digest(arrays) != self.manifest["values_sha256"]:
            raise UserError(f"{self.path}: the values have changed; {_REMEDY}")


def write_features(
    shard: Path,
    name: str,
    values: np.ndarray,
    *,
    level: str,
    manifest_extra: Mapping[str, object],
    offsets: np.ndarray | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a feature set next to its shard, by temporary file and rename.

    Args:
        shard: the shard the features belong to; its index is built when missing.
        name: name of the feature set.
        values: [samples, dim], [items, dim] or [tokens, dim]; stored as float16.
        level: ``sample``, ``item`` or ``token``.
        manifest_extra: their origin: model, revision, pooling, normalized, tokenizer_sha256 ...
        offsets: int64 [items + 1], level ``token`` only; every item has at least one token.
        overwrite: replace an earlier set of that name.

    Returns:
        The feature shard.

    Raises:
        UserError: the set exists and ``overwrite`` is off, or shape, level or values do not fit.
    """
    path = features_path(shard, name)
    if path.exists() and not overwrite:
        raise UserError(f"{path}: exists already; use another name, or --overwrite")
    header = ensure_index(shard).header
    with np.errstate(over="ignore"):  # reported below, with its row
        half = np.ascontiguousarray(values, _HALF)
    if offsets is not None:
        offsets = np.ascontiguousarray(offsets, OFFSET)
    _check_values(path, half, level, offsets, header)
    arrays = {"values": half} | ({} if offsets is None else {"offsets": offsets})
    manifest = {
        **dict.fromkeys(_FACTS),
        **manifest_extra,
        "schema": SCHEMA,
        "name": name,
        "level": level,
        "dim": half.shape[1],
        "rows": header.rows(level),
        "dtype": "float16",
        "shard_sha256": header.sha256,
        "values_sha256": digest(list(arrays.values())),
    }
    lengths = None if offsets is None else np.diff(offsets)
    write_packed(path, manifest, arrays | {"sums": row_sums(half, lengths)})
    return path


def open_features(shard: Path, name: str, header: IndexHeader | None = None) -> FeatureTable:
    """Open the feature set ``name`` of a shard and check that it belongs to it.

    Sizes and shapes are compared with the file before anything is read; nothing is unpickled.

    Args:
        shard: the shard.
        name: name of the feature set.
        header: the header of the shard's index where it is known; None reads or builds it.

    Raises:
        UserError: it is missing, malformed, or belongs to another state of the shard.
    """
    path = features_path(shard, name)
    if not path.exists():
        raise UserError(
            f"{path}: missing; compute the feature set {name!r} with dalr-scale features {shard}"
        )
    packed = PackedTar(path, _ARRAYS, _REMEDY)
    facts = _checked_manifest(packed, name)
    header = header or ensure_index(shard).header
    if facts.shard_sha256 != header.sha256:
        raise packed.malformed(f"belongs to another state of {shard.name}")
    values = packed.array("values", _HALF, 2)
    level, rows, dim = facts.level, facts.rows, facts.dim
    offsets = packed.array("offsets", OFFSET, 1) if level == "token" else None
    rising = None if offsets is None else offsets.whole()
    _check_shape(path, len(values), level, rising, header.rows(level))
    if values.shape[1] != dim or rows != header.rows(level):
        raise packed.malformed("has a manifest that disagrees with its values")
    sums = packed.array("sums", CRC, 1) if packed.has("sums") else None
    if sums is not None and len(sums) != rows:
        raise packed.malformed(f"has {len(sums)} checksums for {rows} rows")
    return FeatureTable(path, level, dim, rows, packed.manifest, values, offsets, sums)


def feature_facts(shard: Path, name: str, header: IndexHeader) -> tuple[str, int, str]:
    """Return level, width and SHA-256 of a feature set from its manifest alone.

    For lists of thousands of shards; the arrays are checked when the set is opened.

    Raises:
        UserError: as ``open_features``, as far as the manifest shows the fault.
    """
    try:
        manifest = peek_manifest(_place(shard, name))
    except UserError:
        manifest = None
    if manifest is not None and manifest.get("shard_sha256") == header.sha256:
        facts = manifest.get("level"), manifest.get("dim"), manifest.get("values_sha256")
        level, dim, sha256 = facts
        if isinstance(level, str) and isinstance(dim, int) and isinstance(sha256, str):
            return level, dim, sha256
    table = open_features(shard, name, header)
    return table.level, table.dim, str(table.manifest["values_sha256"])


class _Facts(NamedTuple):
    level: str
    rows: int
    dim: int
    shard_sha256: str


def _checked_manifest(packed: PackedTar, name: str) -> _Facts:
    manifest = packed.manifest
    if manifest.get("schema") != SCHEMA:
        raise packed.malformed(f"has no manifest of schema {SCHEMA}")
    level, rows, dim = manifest.get("level"), manifest.get("rows"), manifest.get("dim")
    if manifest.get("name") != name or level not in LEVELS:
        raise packed.malformed("has a manifest with a wrong name or level")
    if not isinstance(rows, int) or not isinstance(dim, int):
        raise packed.malformed("has a manifest without rows and dim")
    shard, values = manifest.get("shard_sha256"), manifest.get("values_sha256")
    if not isinstance(shard, str) or not isinstance(values, str):
        raise packed.malformed("has a manifest without checksums")
    return _Facts(str(level), rows, dim, shard)


def _check_values(
    path: Path, values: np.ndarray, level: str, offsets: np.ndarray | None, header: IndexHeader
) -> None:
    if level not in LEVELS:
        raise UserError(f"{path}: level {level!r} is not one of {', '.join(LEVELS)}")
    if values.ndim != 2 or values.shape[1] < 1:
        raise UserError(f"{path}: values of shape {values.shape}; they must be [rows, dim]")
    if (offsets is None) == (level == "token"):
        raise UserError(f"{path}: offsets go with level token and with no other")
    _check_shape(path, len(values), level, offsets, header.rows(level))
    bad = np.flatnonzero(~np.isfinite(values).all(axis=1))
    if len(bad):
        raise UserError(f"{path}: row {bad[0]} of the values is not finite in float16; fix it")


def _check_shape(
    path: Path, count: int, level: str, offsets: np.ndarray | None, expected: int
) -> None:
    if offsets is None:
        if count != expected:
            raise _malformed(path, f"has {count} rows for {expected} {_row_word(level)}s")
        return
    if offsets.shape != (expected + 1,):
        raise _malformed(path, f"has offsets {offsets.shape} for {expected} {_row_word(level)}s")
    if offsets[0] != 0 or offsets[-1] != count or not np.all(np.diff(offsets) > 0):
        raise _malformed(path, "has offsets that do not rise from 0 to the number of tokens")


def _row_word(level: str) -> str:
    return "sample" if level == "sample" else "item"


def _malformed(path: Path, why: str) -> UserError:
    return UserError(f"{path}: {why}; {_REMEDY}")
