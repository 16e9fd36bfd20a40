"""Operation and byte formulas against sums done by hand."""

from __future__ import annotations

import pytest
from bench import counts
from bench.counts import H200, Group, row_losses

N, D = 32768, 768
U = N * N * D


@pytest.mark.parametrize(
    ("group", "forward", "stream", "workspace", "separate"),
    [
        (row_losses(D), 2, 8, 6, 10),
        (row_losses(D, D), 4, 12, 8, 16),
    ],
)
def test_multiples_of_u(
    group: Group, forward: int, stream: int, workspace: int, separate: int
) -> None:
    pairs = N * N
    assert group.forward * pairs == forward * U
    assert group.total("stream") * pairs == stream * U
    assert group.total("workspace") * pairs == workspace * U
    assert group.separate_gradient_kernels * pairs == separate * U


@pytest.mark.parametrize(("ds", "dt"), [(768, 1536), (256, 768), (33, 97)])
def test_general_widths(ds: int, dt: int) -> None:
    group = row_losses(ds, dt)
    assert group.forward == 2 * (ds + dt)
    assert group.total("stream") == 8 * ds + 4 * dt
    assert group.symmetric_teacher == 8 * ds + 2 * dt
    assert group.separate_gradient_kernels == 10 * ds + 6 * dt
    assert group.total("workspace") == 6 * ds + 2 * dt


def test_one_teacher_half_of_it() -> None:
    assert row_losses(D, D).symmetric_teacher * N * N == 10 * U


def test_a_frozen_side_saves_its_gradient_product() -> None:
    both, one = row_losses(D, D), row_losses(D, D, sides=1)
    for mode in counts.MODES:
        assert both.total(mode) - one.total(mode) == 2 * D


def test_real_dalr_with_and_without_sharing() -> None:
    inside, across = counts.dalr_groups(), counts.dalr_groups(share_across=True)
    assert [g.total("stream") for g in inside] == [15360, 10752, 7168]
    assert [g.total("workspace") for g in inside] == [9216, 6144, 4608]
    assert [g.total("stream") for g in across] == [15360, 7680, 4096]
    assert [g.total("workspace") for g in across] == [9216, 4608, 3072]
    sums = {
        name: (counts.summed(groups, "stream"), counts.summed(groups, "workspace"))
        for name, groups in {
            "separate": counts.dalr_separate(),
            "inside": inside,
            "across": across,
        }.items()
    }
    assert sums == {"separate": (53248, 33792), "inside": (33280, 19968), "across": (27136, 16896)}


def test_global_to_local() -> None:
    assert counts.global_to_local(D, 32, "stream") * N * N == 6 * U * 32
    assert counts.global_to_local(D, 32, "workspace") * N * N == 4 * U * 32


@pytest.mark.parametrize(("rows", "milliseconds"), [(N, 0.14), (2**20, 4.5)])
def test_tower_traffic(rows: int, milliseconds: float) -> None:
    assert counts.tower_bytes(rows, D) / H200.memory * 1e3 == pytest.approx(milliseconds, rel=0.05)


def test_resident_memory() -> None:
    giga = 1e9
    assert counts.resident_bytes(N, D, "stream") / giga == pytest.approx(0.47, abs=0.01)
    assert counts.resident_bytes(2 * N, D, "stream") / giga == pytest.approx(0.87, abs=0.01)
    assert counts.resident_bytes(N, D, "workspace") / giga == pytest.approx(0.54, abs=0.01)
    growth = counts.resident_bytes(2 * N, D, "stream") - counts.resident_bytes(N, D, "stream")
    assert growth == 16 * D * N


@pytest.mark.parametrize(
    ("arguments", "kilobytes"),
    [
        ({"student": 2 * D, "gradient_item": 2}, 6.1),  # OpenCLIP: both towers gathered
        ({"student": D, "teacher": D}, 6.1),
        ({"student": D, "teacher": D, "gradient_item": 2}, 4.6),
        ({"student": D}, 4.6),
    ],
)
def test_bytes_received(arguments: dict[str, int], kilobytes: float) -> None:
    assert counts.gathered_bytes(1, **arguments) / 1e3 == pytest.approx(kilobytes, abs=0.1)


@pytest.mark.parametrize(
    ("width", "mode", "milliseconds"),
    [
        (256, "stream", 4.18),
        (768, "stream", 12.5),
        (1024, "stream", 16.7),
        (768, "workspace", 12.5 * 2 / 3),
    ],
)
def test_matmul_floor(width: int, mode: str, milliseconds: float) -> None:
    line = counts.roofline("triple", N, N, row_losses(width, width), mode)
    assert line.matmul * 1e3 == pytest.approx(milliseconds, rel=0.01)
    assert line.bound >= line.matmul
    assert line.without_overlap > line.bound


def test_small_widths_are_bound_by_the_epilogue() -> None:
    """At d = 64 the exponentials of three losses outlast the products."""
    line = counts.roofline("triple", N, N, row_losses(64, 64), "stream")
    assert line.bound == line.special > line.matmul


def test_operand_traffic_limits_small_tiles() -> None:
    """A 128 x 128 tile needs 12.3 TB/s of L2 at the full matrix rate, 128 x 256 needs 9.3."""
    for tile, rate in (((128, 128), 12.3e12), ((128, 256), 9.3e12)):
        line = counts.roofline("info_nce", N, N, row_losses(D), "stream", tile=tile)
        assert line.l2 * H200.l2 / line.matmul == pytest.approx(rate, rel=0.01)


def test_token_cells() -> None:
    line = counts.roofline("global_to_local", N, N, row_losses(D), "stream", tokens=32)
    assert line.matmul == pytest.approx(0.2, rel=0.01)
