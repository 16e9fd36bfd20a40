"""Fixtures of the tests of whole commands."""

from __future__ import annotations

from pathlib import Path

import pytest
from picture_folders import NAMES, jpeg


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, name in enumerate(NAMES):
        (folder / name).write_bytes(jpeg(number))
    return folder
