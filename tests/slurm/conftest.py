"""One cluster for the whole session; starting it and training on it is what takes the time."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from cluster import Cluster, NoSlurm, install


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Eight nodes, idle; tests that need it skip where Slurm cannot be installed or started."""
    running = Cluster(tmp_path_factory.mktemp("cluster"))
    try:
        install()
        running.start()
        yield running
    except NoSlurm as error:
        pytest.skip(f"no Slurm here: {error}")
    finally:
        running.stop()
