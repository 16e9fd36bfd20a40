"""The node check on a GPU: devices are counted, and NCCL adds them up."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import torch

from dalr_scale.cluster.nccl_check import all_reduce
from dalr_scale.cluster.node_report import examine

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]


def test_gpus_are_counted_and_sum_over_nccl(tmp_path: Path) -> None:
    count = torch.cuda.device_count()
    assert examine(tmp_path, count, []).gpus == count
    assert any("processes for" in p for p in examine(tmp_path, count + 1, []).problems)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    assert all_reduce("127.0.0.1", port, 1, 0) is None
