"""The goals of the project, compared with what was measured; a miss is reported as one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from bench.peers import CHUNKS, EAGER, OURS, ROOMY
from bench.results import find, median

SIZE = 32768
WIDE = 768


@dataclass(frozen=True)
class Target:
    """One goal: `value` must reach `must`, and may reach `stretch`; None: not measured."""

    name: str
    unit: str
    must: float
    stretch: float
    value: float | None
    note: str = ""

    @property
    def verdict(self) -> str:
        if self.value is None:
            return "not measured"
        if self.value >= self.stretch:
            return "stretch reached"
        return "reached" if self.value >= self.must else "**missed**"


def check(results: dict[str, Any]) -> list[Target]:
    """Every goal for one GPU, in the order of the table."""
    return [*_rates(results), *_ratios(results), _largest(results), _memory(results)]


def _rates(results: dict[str, Any]) -> Iterable[Target]:
    peak = results["machine"].get("gemm_flops")
    for width, must, stretch in ((768, 56, 70), (256, 42, 55), (1024, 58, 74)):
        time = median(find(results, "triple", SIZE, width).get(OURS[0]))
        share = None
        if time and peak:
            share = 100 * 8 * SIZE * SIZE * width / (time / 1e3) / peak
        name = f"three losses, mode W, d = {width}: share of the measured bf16 rate (8u)"
        yield Target(name, "%", must, stretch, share)


def _ratios(results: dict[str, Any]) -> Iterable[Target]:
    goals = (
        ("triple", "row-chunked torch.compile, its best chunk", tuple(CHUNKS.values()), 1.2, 1.5),
        ("triple", "torch eager, its faster precision", EAGER, 8, 12),
        ("info_nce", "inf-cl", ("inf-cl",), 6, 10),
        ("info_nce", "memeff", ("memeff",), 1.5, 2),
        ("info_nce", "cut-cross-entropy", ("cut-cross-entropy",), 1.5, 2),
    )
    for problem, label, others, must, stretch in goals:
        rows = find(results, problem, SIZE, WIDE)
        ours, theirs = _fastest(rows, OURS), _fastest(rows, others)
        losses = "three losses" if problem == "triple" else "plain InfoNCE"
        name = f"{losses}, d = {WIDE}: faster than {label}"
        value = theirs[0] / ours[0] if ours and theirs else None
        note = f"{ours[1]} against {theirs[1]}" if ours and theirs else _reasons(rows, others)
        yield Target(name, "x", must, stretch, value, note)


def _fastest(rows: dict[str, Any], names: Iterable[str]) -> tuple[float, str] | None:
    times = [(time, name) for name in names if (time := median(rows.get(name))) is not None]
    return min(times, default=None)


def _reasons(rows: dict[str, Any], names: Iterable[str]) -> str:
    found = [rows[name]["status"] for name in names if name in rows]
    return "; ".join(sorted(set(found) - {"measured"}))


def _largest(results: dict[str, Any]) -> Target:
    sizes = [
        cell["rows"]
        for cell in results["cells"]
        if cell["problem"] == "triple" and cell["width"] == WIDE and cell["rows"] == cell["cols"]
        for name in (*OURS, ROOMY)
        if median(cell["contestants"].get(name)) is not None
    ]
    name = f"three losses, d = {WIDE}: largest N on one GPU"
    value = max(sizes) / 2**20 if sizes else None
    return Target(name, "M", 1, 2, value)


def _memory(results: dict[str, Any]) -> Target:
    """Eager's peak over ours; where eager ran out of memory, the card's memory bounds it below."""
    rows = find(results, "triple", 2 * SIZE, WIDE)
    ours = rows.get(OURS[1], {}).get("peak_bytes")
    eager = rows.get(EAGER[0], {})
    note, theirs = "", eager.get("peak_bytes")
    if theirs is None and "out of memory" in eager.get("status", ""):
        theirs = results["host"].get("memory_bytes")
        note = "eager ran out of memory: the ratio is at least this"
    value = theirs / ours if ours and theirs else None
    name = f"three losses, N = 64k, d = {WIDE}: memory of eager (fp32) over mode S"
    return Target(name, "x", 100, 130, value, note)
