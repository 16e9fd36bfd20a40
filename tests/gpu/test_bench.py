"""The benchmark on a GPU: our rows are right there, and the clock and a short run work."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from bench import checking, peers, problems, results, run, schedule
from bench.peers import CHUNKS, EAGER, OURS, PRODUCTS, Unavailable, implementations
from bench.problems import square
from bench.timing import Budget, CudaClock

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
GPU = torch.device("cuda")
OWN_ROWS = (*OURS, "ours, torch path", CHUNKS[512], EAGER[0])


@pytest.mark.parametrize("data", ["random", "clustered"])
@pytest.mark.parametrize("name", peers.FUSED)
def test_rows_pass_the_check_that_lets_them_be_timed(name: str, data: str) -> None:
    problem = problems.make(name, square(1000, 256), GPU, data=data)
    answer = checking.exact(problem)
    eager16 = checking.errors(problem, implementations()[EAGER[1]].build(problem), answer)
    for row in OWN_ROWS:
        found = checking.errors(problem, implementations()[row].build(problem), answer)
        assert not checking.verdict(found, eager16), row


def test_libraries_run_or_name_a_reason() -> None:
    problem = problems.make("info_nce", square(1024, 256), GPU)
    answer = checking.exact(problem)
    eager16 = checking.errors(problem, implementations()[EAGER[1]].build(problem), answer)
    for name in schedule.LIBRARIES:
        row = implementations()[name]
        try:
            found = checking.errors(problem, row.build(problem), answer)
        except Unavailable as reason:
            print(f"{name}: {reason}")
            continue
        print(f"{name}: {row.backend(problem)} {found} {checking.verdict(found, eager16)}")


def test_clock_and_peak_memory() -> None:
    """One fp32 matrix of 4096 x 4096 is 64 MiB; eager needs several, its time is positive."""
    problem = problems.make("info_nce", square(4096, 256), GPU)
    clock = CudaClock()
    took = clock.step(problem, implementations()[EAGER[0]].build(problem))
    assert took["both"] == pytest.approx(took["forward"] + took["backward"], rel=0.05)
    assert clock.peak_bytes > 2 * 64 * 2**20


def test_a_short_run(tmp_path: Path) -> None:
    names = (*OURS[:2], PRODUCTS, EAGER[1])
    cells = [schedule.Cell("triple", square(2048, 256), names, 3, 60)]
    document = results.new({"packages": {}, "device": "x", "date": "", "commit": None,
                            "cuda": None, "python": ""}, cells, {})  # fmt: skip
    run.run(GPU, tmp_path / "gpu.json", document, cells, Budget(120), implementations())
    rows = document["cells"][0]["contestants"]
    assert {row["status"] for row in rows.values()} == {"measured"}
    assert document["machine"]["gemm_flops"] > 1e13 and document["machine"]["copy_bytes"] > 1e11
    assert all(row["peak_bytes"] > 0 for name, row in rows.items() if name != PRODUCTS)
