"""Stored teacher features: a small tar beside each shard, joined to it by row number.

The feature set NAME of ``X.tar`` is ``X.NAME.features.tar`` with three members:

    00000000.manifest.json  what the values are and which state of the shard they belong to
    00000000.values.npy     float16, C order
    00000000.offsets.npy    int64 [rows + 1], level ``token`` only

A row is a sample of the shard (level ``sample``) or an item of it (``item``, ``token``). At level
``token`` the values of row i are ``values[offsets[i]:offsets[i + 1]]``. The values are
memory-mapped where they lie in the tar.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dalr_scale.data.index import IndexHeader, ensure_index
from dalr_scale.data.shards import FEATURE_SUFFIX, Member, open_regular, read_exactly, walk_tar
from dalr_scale.data.writer import open_tar_writer
from dalr_scale.errors import UserError
from dalr_scale.runstate import process_name

LEVELS = ("sample", "item", "token")
SCHEMA = 1

_EXTENSIONS = frozenset(("manifest.json", "values.npy", "offsets.npy"))
_KEY = "00000000"
_MANIFEST_LIMIT = 1 << 20
_NPY_HEADER_LIMIT = 10_000
_HALF = np.dtype("<f2")
_INT64 = np.dtype("<i8")


def features_path(shard: Path, name: str) -> Path:
    """Return where the feature set ``name`` of a shard lies."""
    if not name or not all(letter.isalnum() or letter in "-_" for letter in name):
        raise UserError(f"feature set name {name!r}: use letters, digits, - and _ only")
    return shard.with_name(f"{shard.stem}.{name}{FEATURE_SUFFIX}")


def feature_names(shard: Path) -> list[str]:
    """Return the names of the feature sets that lie beside a shard."""
    head = f"{shard.stem}."
    return sorted(
        path.name[len(head) : -len(FEATURE_SUFFIX)]
        for path in shard.parent.iterdir()
        if path.name.startswith(head) and path.name.endswith(FEATURE_SUFFIX)
    )


@dataclass(frozen=True)
class FeatureTable:
    """One feature set of one shard.

    Attributes:
        path: the feature shard.
        level: ``sample``, ``item`` or ``token``.
        dim: width of a feature vector.
        rows: samples or items.
        manifest: everything that was recorded with the values.
        values: float16 [rows, dim], or [tokens, dim] at level ``token``; memory-mapped.
        offsets: int64 [rows + 1] at level ``token``, else None.
    """

    path: Path
    level: str
    dim: int
    rows: int
    manifest: dict[str, Any]
    values: np.ndarray
    offsets: np.ndarray | None

    def read(self, rows: np.ndarray) -> np.ndarray:
        """Return the vectors of some rows: float32 [len(rows), dim] (levels sample and item).

        Raises:
            UserError: a value is not finite.
        """
        if self.offsets is not None:
            raise ValueError(f"{self.path}: holds token features; use read_tokens")
        found = self.values[rows].astype(np.float32)
        self._require_finite(found, rows)
        return found

    def read_tokens(self, rows: np.ndarray) -> list[np.ndarray]:
        """Return float32 [tokens of the row, dim] for each of some rows (level token).

        Raises:
            UserError: a value is not finite.
        """
        if self.offsets is None:
            raise ValueError(f"{self.path}: holds one vector a row; use read")
        found = []
        for row in rows.tolist():
            part = self.values[self.offsets[row] : self.offsets[row + 1]].astype(np.float32)
            self._require_finite(part, np.full(len(part), row))
            found.append(part)
        return found

    def verify(self) -> None:
        """Compare the stored values with their SHA-256.

        Raises:
            UserError: they have changed.
        """
        if _digest(self.values, self.offsets) != self.manifest["values_sha256"]:
            raise UserError(f"{self.path}: the values have changed; compute these features again")

    def _require_finite(self, values: np.ndarray, rows: np.ndarray) -> None:
        # One sum is much cheaper than a test per value, and any NaN or infinity shows in it.
        if not np.isfinite(values.sum(dtype=np.float64)):
            row = rows[np.flatnonzero(~np.isfinite(values).all(axis=1))[0]]
            raise UserError(
                f"{self.path}: the feature of {_row_word(self.level)} {row} is not finite; "
                "compute these features again"
            )


def write_features(
    shard: Path,
    name: str,
    values: np.ndarray,
    *,
    level: str,
    manifest_extra: Mapping[str, Any],
    offsets: np.ndarray | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a feature set beside its shard, by temporary file and rename.

    Args:
        shard: the shard the features belong to; its index is built when missing.
        name: name of the feature set.
        values: [samples, dim], [items, dim] or [tokens, dim]; stored as float16.
        level: ``sample``, ``item`` or ``token``.
        manifest_extra: what made them: model, revision, pooling, normalized, tokenizer_sha256 ...
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
        offsets = np.ascontiguousarray(offsets, _INT64)
    _check_values(path, half, level, offsets, header.samples, header.items)
    manifest = {
        "schema": SCHEMA,
        "model": None,
        "revision": None,
        "pooling": None,
        "normalized": None,
        "tokenizer_sha256": None,
        **manifest_extra,
        "name": name,
        "level": level,
        "dim": half.shape[1],
        "rows": header.samples if level == "sample" else header.items,
        "dtype": "float16",
        "shard_sha256": header.sha256,
        "values_sha256": _digest(half, offsets),
    }
    members = {
        "manifest.json": json.dumps(manifest, sort_keys=True, indent=1).encode(),
        "values.npy": _npy_bytes(half),
    }
    if offsets is not None:
        members["offsets.npy"] = _npy_bytes(offsets)
    temporary = path.with_name(f"{path.name}.tmp-{process_name()}")
    try:
        with temporary.open("wb") as stream, open_tar_writer(stream) as writer:
            writer.write({"__key__": _KEY, **members})
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def open_features(shard: Path, name: str, header: IndexHeader | None = None) -> FeatureTable:
    """Open the feature set ``name`` of a shard and check that it belongs to it.

    Sizes and shapes are compared with the file before anything is mapped; nothing is unpickled.

    Args:
        shard: the shard.
        name: name of the feature set.
        header: the header of the shard's index where it is known; None reads or builds it.

    Raises:
        UserError: it is missing, malformed, or made from another state of the shard.
    """
    path = features_path(shard, name)
    if not path.exists():
        raise UserError(
            f"{path}: missing; compute the feature set {name!r} with dalr-scale features {shard}"
        )
    members = {member.name: member for member in walk_tar(path, extensions=_EXTENSIONS)}
    for part in ("manifest.json", "values.npy"):
        if f"{_KEY}.{part}" not in members:
            raise _malformed(path, f"has no member {_KEY}.{part}")
    manifest = _read_manifest(path, members[f"{_KEY}.manifest.json"], name)
    header = header or ensure_index(shard).header
    if manifest["shard_sha256"] != header.sha256:
        raise UserError(
            f"{path}: was made from another state of {shard.name}; compute these features again"
        )
    values = _map_npy(path, members[f"{_KEY}.values.npy"], _HALF, 2)
    offsets = None
    if manifest["level"] == "token":
        if f"{_KEY}.offsets.npy" not in members:
            raise _malformed(path, f"has no member {_KEY}.offsets.npy")
        offsets = _map_npy(path, members[f"{_KEY}.offsets.npy"], _INT64, 1)
    level, rows, dim = manifest["level"], manifest["rows"], manifest["dim"]
    _check_shape(path, values, level, offsets, header.samples, header.items)
    if values.shape[1] != dim or rows != (header.samples if level == "sample" else header.items):
        raise _malformed(path, "has a manifest that disagrees with its values")
    return FeatureTable(path, level, dim, rows, manifest, values, offsets)


def _read_manifest(path: Path, member: Member, name: str) -> dict[str, Any]:
    if member.size > _MANIFEST_LIMIT:
        raise _malformed(path, f"has a manifest of {member.size} bytes")
    try:
        manifest = json.loads(_read_member(path, member))
    except (ValueError, RecursionError):
        manifest = None
    if not isinstance(manifest, dict) or manifest.get("schema") != SCHEMA:
        raise _malformed(path, f"has no manifest of schema {SCHEMA}")
    if manifest.get("name") != name or manifest.get("level") not in LEVELS:
        raise _malformed(path, "has a manifest with a wrong name or level")
    if not all(isinstance(manifest.get(key), int) for key in ("rows", "dim")):
        raise _malformed(path, "has a manifest without rows and dim")
    if not all(isinstance(manifest.get(key), str) for key in ("shard_sha256", "values_sha256")):
        raise _malformed(path, "has a manifest without checksums")
    return manifest


def _map_npy(path: Path, member: Member, dtype: np.dtype, dimensions: int) -> np.ndarray:
    """Map the array of a ``.npy`` member after checking type, order, shape and size."""
    start = io.BytesIO(_read_member(path, member._replace(size=min(member.size, 16_384))))
    try:
        version = np.lib.format.read_magic(start)
        read = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        shape, fortran, found = read(start, max_header_size=_NPY_HEADER_LIMIT)
    except (ValueError, KeyError) as error:
        raise _malformed(path, f"has an unreadable array in {member.name}") from error
    if found != dtype or fortran or len(shape) != dimensions:
        raise _malformed(
            path, f"has {found} {shape} in {member.name}, not a {dimensions}-d {dtype.name} array"
        )
    count = 1
    for extent in shape:  # Python integers: a product of absurd extents cannot wrap around
        count *= int(extent)
    if min(shape) < 1 or count * dtype.itemsize != member.size - start.tell():
        raise _malformed(path, f"has an array of shape {shape} in {member.size} bytes")
    return np.memmap(path, dtype, "r", member.offset + start.tell(), shape)


def _check_values(
    path: Path, values: np.ndarray, level: str, offsets: np.ndarray | None, samples: int, items: int
) -> None:
    if level not in LEVELS:
        raise UserError(f"{path}: level {level!r} is not one of {', '.join(LEVELS)}")
    if values.ndim != 2 or values.shape[1] < 1:
        raise UserError(f"{path}: values of shape {values.shape}; they must be [rows, dim]")
    if (offsets is None) == (level == "token"):
        raise UserError(f"{path}: offsets go with level token and with no other")
    _check_shape(path, values, level, offsets, samples, items)
    bad = np.flatnonzero(~np.isfinite(values).all(axis=1))
    if len(bad):
        raise UserError(f"{path}: row {bad[0]} of the values is not finite in float16; mend it")


def _check_shape(
    path: Path, values: np.ndarray, level: str, offsets: np.ndarray | None, samples: int, items: int
) -> None:
    expected = samples if level == "sample" else items
    if offsets is None:
        if len(values) != expected:
            raise _malformed(path, f"has {len(values)} rows for {expected} {_row_word(level)}s")
        return
    if offsets.shape != (expected + 1,):
        raise _malformed(path, f"has offsets {offsets.shape} for {expected} {_row_word(level)}s")
    if offsets[0] != 0 or offsets[-1] != len(values) or not np.all(np.diff(offsets) > 0):
        raise _malformed(path, "has offsets that do not rise from 0 to the number of tokens")


def _row_word(level: str) -> str:
    return "sample" if level == "sample" else "item"


def _read_member(path: Path, member: Member) -> bytes:
    descriptor = open_regular(path)
    try:
        return read_exactly(descriptor, member.size, member.offset)
    finally:
        os.close(descriptor)


def _npy_bytes(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


def _digest(values: np.ndarray, offsets: np.ndarray | None) -> str:
    digest = hashlib.sha256(np.ascontiguousarray(values).data)
    if offsets is not None:
        digest.update(np.ascontiguousarray(offsets).data)
    return digest.hexdigest()


def _malformed(path: Path, why: str) -> UserError:
    return UserError(f"{path}: {why}; compute these features again")
