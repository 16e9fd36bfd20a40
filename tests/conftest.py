"""Fixtures shared by all folders; helpers without pytest are in ``common.py``."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from common import write_tiny_data


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of tiny shards, features, vocabulary and graded pairs; do not change it."""
    return write_tiny_data(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def same_environment() -> Iterator[None]:
    """Environment variables that the code under test sets are taken back."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
