"""Fixtures of the tests of whole commands."""

from __future__ import annotations

from pathlib import Path

import pytest
from image_directories import NAMES, jpeg


@pytest.fixture
def images(tmp_path: Path) -> Path:
    directory = tmp_path / "images"
    directory.mkdir()
    for number, name in enumerate(NAMES):
        (directory / name).write_bytes(jpeg(number))
    return directory
