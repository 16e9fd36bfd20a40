"""Fixtures shared by all directories; helpers without pytest are in ``support/``.

Workers of ``make test`` take whole files. Those that take longest start first, so that no worker
waits for the other at the end. ``--shuffle SEED`` runs files, and the tests of each file, in an
order of its own: no test may need another one to have run before it.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # A core for each worker: more threads would wait for each other, and spin while they do.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Longest first, as measured; all others follow in the order of their names.
LONG_FILES = (
    "distributed/test_global_batch.py",
    "distributed/test_real_runs.py",
    "numerics/test_kernels_triton.py",
    "numerics/test_kernels_compile.py",
    "integration/test_train.py",
    "integration/test_one_process.py",
    "integration/test_own_data.py",
    "integration/test_fewer_ranks.py",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--shuffle", metavar="SEED", help="run files and their tests in an order drawn from SEED"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The same order in every worker: longest files first, or shuffled as asked."""
    seed = config.getoption("--shuffle")
    if seed is None:
        places = {name: place for place, name in enumerate(LONG_FILES)}
        items.sort(key=lambda item: places.get(_file(item), len(places)))
    else:
        items.sort(key=lambda item: (_draw(seed, _file(item)), _draw(seed, item.nodeid)))


def _file(item: pytest.Item) -> str:
    return item.path.relative_to(Path(__file__).parent).as_posix()


def _draw(seed: str, name: str) -> bytes:
    return hashlib.sha256(f"{seed} {name}".encode()).digest()


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of tiny shards, features, vocabulary and graded pairs; do not change it."""
    # here, because a GPU host runs tests/gpu without the packages that data need
    from common import write_tiny_data

    return write_tiny_data(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module", autouse=True)
def same_process() -> Iterator[None]:
    """The next file finds directory, environment and threads as this one found them."""
    directory, environment, threads = Path.cwd(), dict(os.environ), _threads()
    yield
    os.chdir(directory)
    _set_environment(environment)
    if threads not in (None, _threads()):
        sys.modules["torch"].set_num_threads(threads)


def _threads() -> int | None:
    """Threads of torch, where it has been imported."""
    torch = sys.modules.get("torch")
    return None if torch is None else torch.get_num_threads()


@pytest.fixture
def same_environment() -> Iterator[None]:
    """Environment variables that the code under test sets are taken back."""
    before = dict(os.environ)
    yield
    _set_environment(before)


def _set_environment(variables: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(variables)
