"""Kernels compiled ahead of time, without a GPU: registers, spills, shared memory, tensor cores."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

import torch
from dalr_kernels import compile_report as report
from dalr_kernels.fused import tile_tables

# One architecture for most kernels here, all three for one; everything in the soak test.
QUICK = [
    ("row_kernel", "triple, one margin", 90),
    ("statistics_kernel", "InfoNCE", 90),
    ("statistics_kernel", "triple, one margin", 90),
    ("gradient_kernel", "triple, one margin", 80),
    ("gradient_kernel", "triple, one margin", 90),
    ("gradient_kernel", "triple, one margin", 100),
]


@pytest.mark.parametrize(("kernel", "objective", "architecture"), QUICK)
def test_shipped_configurations(kernel: str, objective: str, architecture: int) -> None:
    (case,) = [
        case
        for case in report.cases(architecture, [objective])
        if (case.kernel.__name__, case.dtype) == (kernel, torch.float16)
        and case.constants.get("GRADIENT", True)
    ]
    row = report.build(case, architecture)
    assert row.faults() == []
    assert row.registers > 16
    assert row.wgmma == (row.dots and architecture == 90)


def test_a_tile_that_is_too_large_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    # Negative control: a tile without column slices and with more stages than fit.
    key = torch.float16, tile_tables.WITH_TEACHER
    monkeypatch.setitem(
        tile_tables.HOPPER_GRADIENT_TILES, key, tile_tables.Tile(128, 256, 64, 1, 8, 5)
    )
    (case,) = [
        case
        for case in report.cases(90, ["triple, one margin"])
        if case.kernel.__name__ == "gradient_kernel" and case.dtype == torch.float16
    ]
    faults = " ".join(report.build(case, 90).faults())
    assert "stack" in faults and "shared memory" in faults


def test_spills_inside_loops_are_counted() -> None:
    sass = """
        /*0000*/ LDL R1, [R2] ;
        /*0010*/ IADD3 R1, R1, R2 ;
        /*0020*/ STL [R2], R1 ;
        /*0030*/ @P0 BRA 0x10 ;
        /*0040*/ STL.64 [R2], R4 ;
        /*0050*/ BRA 0x50 ;
    """
    assert report.loop_spills(sass) == 1


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_every_shipped_configuration() -> None:
    faults = {}
    for architecture in report.ARCHITECTURES:
        for case in report.cases(architecture):
            row = report.build(case, architecture)
            if row.faults():
                faults[row[:5]] = row.faults()
    assert faults == {}
