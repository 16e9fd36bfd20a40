"""Sweep of the block sizes: rows per chunk of both modes and of the compiled baseline.

usage: python kernels/bench/tune.py [--seconds 300] [--only TEXT]

Writes ``results/<gpu>-tune.json`` and its table; nothing is chosen automatically.
"""

# ruff: noqa: E402
from __future__ import annotations

import argparse
import sys
from pathlib import Path

# a checkout runs as it is, without an installation
sys.path[:0] = [str(directory) for directory in Path(__file__).resolve().parents[1:3]]

import torch

from bench import host, results, run
from bench.peers import EAGER, FUSED, Implementation, chunks, implementations, own
from bench.problems import square
from bench.schedule import Cell
from bench.timing import Budget

ROWS = (512, 1024, 2048, 4096, 8192)
WIDTHS = (768, 256, 1024)


def sweep() -> dict[str, Implementation]:
    """An implementation for every block size, and eager for the limits of the check."""
    rows = [implementations()[EAGER[1]]]
    for size in ROWS:
        modes = (("W", "workspace"), ("S", "stream"))
        rows += [
            Implementation(f"mode {name}, R = {size}", FUSED, own("triton", mode, chunk_rows=size))
            for name, mode in modes
        ]
        rows.append(Implementation(f"torch.compile, R = {size}", FUSED, chunks(size), family="c"))
    return {row.name: row for row in rows}


def cells(rows: dict[str, Implementation]) -> list[Cell]:
    names = tuple(name for name in rows if name != EAGER[1])
    return [
        Cell(problem, square(32768, width), names, 10, 60)
        for problem in ("triple", "info_nce")
        for width in WIDTHS
    ]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="block sizes of dalr_kernels on a GPU")
    parser.add_argument("--seconds", type=float, default=300.0, help="time for all cells")
    parser.add_argument("--out", type=Path, default=run.HERE / "results", help="directory")
    parser.add_argument("--only", default="", help="cells whose key contains this text")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("sweep skipped: torch sees no CUDA device")
        return 0
    device = torch.device("cuda")
    budget = Budget(options.seconds)
    run.prepare_torch()
    rows = sweep()
    wanted = [cell for cell in cells(rows) if options.only in cell.key]
    about = host.describe(device)
    path = options.out / f"{host.slug(about['device'])}-tune.json"
    document = results.new(about, wanted, {"seconds": options.seconds, "sweep": True})
    timer = run.end_in_time(options.seconds + run.GRACE)
    run.run(device, path, document, wanted, budget, rows)
    timer.cancel()
    print(f"{path.with_suffix('.md')} is written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
