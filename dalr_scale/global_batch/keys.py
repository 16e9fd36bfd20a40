"""Keys for everything random in a step, so that no random state is saved or replayed."""

# Some methods of torch are typed in part only.
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false

from __future__ import annotations

import hashlib

import torch


def integer_key(*parts: object) -> int:
    """63 bits of a key, the same on every host."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_dropout(*key: int) -> None:
    """Seeds torch's generators from a key: both encodings of a chunk draw the same masks."""
    torch.manual_seed(integer_key(*key))
