"""Fixtures shared by all directories; helpers without pytest are in ``support/``."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of tiny shards, features, vocabulary and graded pairs; do not change it."""
    # here, because a GPU host runs tests/gpu without the packages that data need
    from common import write_tiny_data

    return write_tiny_data(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def same_environment() -> Iterator[None]:
    """Environment variables that the code under test sets are taken back."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
