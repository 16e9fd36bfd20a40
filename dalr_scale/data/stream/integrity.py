"""Checks of the shards of a source before the first read, and digests of their content."""

from __future__ import annotations

import hashlib
import os
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from dalr_scale.data.shards.features_store import feature_facts, features_path, open_features
from dalr_scale.data.shards.files import companion, shard_names
from dalr_scale.data.stream.records import TOKENS
from dalr_scale.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from dalr_scale.data.shards.index_file import IndexFile

_OPENED_AT_START = 128  # shards whose feature sets are checked in full before the first batch


def refuse_equal(files: Sequence[IndexFile]) -> None:
    """Refuse two shards of the same content.

    Raises:
        UserError: two shards have the same SHA-256.
    """
    for one, two in pairwise(sorted(files, key=lambda file: file.header.sha256)):
        if one.header.sha256 == two.header.sha256:
            raise UserError(f"{one.shard} and {two.shard} have the same content; name one")


def split_parts(files: Sequence[IndexFile], sizes: Sequence[int]) -> list[list[IndexFile]]:
    """Split the shards into parts of some sizes, each part sorted by the shards' SHA-256."""
    if sum(sizes) != len(files) or min(sizes) < 1:
        raise ValueError(f"parts of {list(sizes)} shards do not add up to {len(files)}")
    ends = np.cumsum(sizes).tolist()
    return [
        sorted(files[end - size : end], key=lambda file: file.header.sha256)
        for end, size in zip(ends, sizes, strict=True)
    ]


def used_samples(file: IndexFile) -> np.ndarray:
    """Return which samples of a shard have an item: bool [samples]."""
    return np.bincount(file.load().items["sample"], minlength=file.header.samples) > 0


def require_images(files: Sequence[IndexFile]) -> None:
    """Refuse shards with a sample that has items but no image.

    Raises:
        UserError: an image is missing.
    """
    for file in files:
        missing = file.header.samples - file.header.images
        if missing:
            missing = int((used_samples(file) & (file.load().samples["image_size"] == 0)).sum())
        if missing:
            raise UserError(
                f"{file.shard}: {missing} of {file.header.samples} samples have no image; "
                "prepare the shard from images, or use stored features"
            )


def check_features(
    files: Sequence[IndexFile], features: Mapping[str, str]
) -> tuple[dict[str, int], list[str]]:
    """Check every feature set: equal widths over the shards, levels that fit the roles.

    The sets of the first shards are opened and checked in full; those of further shards when they
    are read.

    Args:
        files: indexes of the shards.
        features: feature set name by role.

    Returns:
        Width by role, and a line ``ROLE SHA256`` for each shard and role.

    Raises:
        UserError: a set is missing, damaged, of another width, or of a level that does not fit.
    """
    dims: dict[str, int] = {}
    sums: list[str] = []
    roles = sorted(features.items())
    for number, file in enumerate(files):
        for role, name in roles:
            if number < _OPENED_AT_START:
                open_features(file.shard, name, file.header)
            level, dim, sha256 = feature_facts(file.shard, name, file.header)
            if (level == "token") != (role == TOKENS):
                path = features_path(file.shard, name)
                raise UserError(f"{path}: level {level} cannot serve as {role!r} features")
            if dims.setdefault(role, dim) != dim:
                path = features_path(file.shard, name)
                raise UserError(
                    f"{path}: width {dim}, but {dims[role]} in other shards; "
                    "compute these features again with one model"
                )
            sums.append(f"{role} {sha256}")
    return dims, sums


def without_companion(files: Sequence[IndexFile], ending: str) -> list[IndexFile]:
    """Return the shards that lack a companion file; each directory is listed once."""
    paths = [os.path.split(companion(file.shard, ending)) for file in files]
    listed = {directory: set(os.listdir(directory or ".")) for directory in {d for d, _ in paths}}
    return [
        file
        for file, (directory, name) in zip(files, paths, strict=True)
        if name not in listed[directory]
    ]


def fingerprint(files: Sequence[IndexFile], feature_sums: Sequence[str]) -> str:
    """Return a digest of the content of shards and feature sets; their names do not matter."""
    lines = [f"{file.header.sha256} {file.header.items} {file.header.samples}" for file in files]
    listed = [file for file in files if file.header.quarantined]
    lines += [f"aside {file.load().quarantined.tobytes().hex()}" for file in listed]
    return hashlib.sha256("\n".join(["source 1", *lines, *feature_sums]).encode()).hexdigest()


def digests(files: Sequence[IndexFile], feature_sums: Sequence[str]) -> dict[str, str]:
    """Return a digest for each shard, and for each shard and role of its features."""
    names = shard_names([file.shard for file in files])
    found = {name: fingerprint([file], [])[:32] for name, file in zip(names, files, strict=True)}
    roles = len(feature_sums) // len(files)
    for number, line in enumerate(feature_sums):
        role, sha256 = line.split(" ")
        found[f"{names[number // roles]} ({role} features)"] = sha256[:32]
    return found
