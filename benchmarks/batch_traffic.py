"""Bytes that a rank sends per step at the widths of a BERT-base, counted at the collectives.

Part of ``make batch-bench``. Real ranks over gloo take one step of ZeRO-2 in bf16; the encoder has
a single layer, since the columns do not depend on how deep it is.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from accelerate.state import AcceleratorState
from batch_step import Shape, backward, build

from dalr_scale.distributed.traffic import TrafficCounter
from dalr_scale.distributed.world import leave_world, start_world
from dalr_scale.estimate.predict import column_traffic, parameter_traffic
from dalr_scale.process import end_process

RANKS = (2, 4)
ROWS, MICRO = 1024, 128
D, P = 768, 256
SHAPE = Shape(D, 1, 8, P, D, (D, D), (D,))
PRESETS = ("simcse", "mcse", "dalr")
# The least that a column can cost, bytes: 16 bits on its way out, a float32 gradient back. Token
# features of teachers stay where they are (32 of them would be 49 kB): z1 visits them.
Z2, U = {"z2": 2 * D + 4 * D}, {"u": 2 * P + 4 * P}
FROZEN = {"images": 2 * D, "text teachers": 2 * 2 * D}
FLOORS: Mapping[str, Mapping[str, int]] = {
    "simcse": Z2,
    "mcse": Z2 | U,
    "dalr": Z2 | U | FROZEN | {"z1 for token teachers": 2 * D + 4 * D},
}


def count(preset: str, world: Any) -> dict[str, Any]:
    """One step's bytes of this rank: sent, predicted, and the floor of its columns."""
    AcceleratorState._reset_state(reset_partial_state=True)  # one engine after the other
    engine, batch, config = build(
        {"preset": preset}, ROWS, MICRO, SHAPE, world=world, engine="zero2", precision="bf16"
    )
    with TrafficCounter() as counter:
        backward(engine, batch, MICRO)
        engine.step(0.0)
    model: Any = engine.module
    floor = sum(FLOORS[preset].values()) * ROWS * (world.size - 1) / world.size
    return {
        "preset": preset,
        "ranks": world.size,
        "columns": counter.total("columns"),
        "columns_predicted": sum(column_traffic(config, model, world.size).values()),
        "columns_floor": floor,
        "parameters": counter.total("engine"),
        "parameters_predicted": parameter_traffic(config, model, world.size),
    }


def measure() -> list[dict[str, Any]]:
    """Every preset at every number of ranks; a launch for each number."""
    found: list[dict[str, Any]] = []
    for ranks in RANKS:
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            f"--nproc-per-node={ranks}",
            __file__,
        ]
        done = subprocess.run(
            command, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True,
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        rows = [line for line in done.stdout.splitlines() if line.startswith("{")]
        found += [json.loads(row) for row in rows]
        print(*rows, sep="\n", flush=True)
    return found


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Lines of Markdown."""
    lines = [
        "| preset | ranks | columns, kB a row | floor | over floor | over prediction | gradients "
        "and weights over prediction |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        per_row = 1000 * ROWS * (r["ranks"] - 1) / r["ranks"]
        lines.append(
            f"| {r['preset']} | {r['ranks']} | {r['columns'] / per_row:.2f} | "
            f"{r['columns_floor'] / per_row:.2f} | {r['columns'] / r['columns_floor']:.3f} | "
            f"{r['columns'] / r['columns_predicted']:.3f} | "
            f"{r['parameters'] / r['parameters_predicted']:.3f} |"
        )
    return lines


def main() -> None:
    world = start_world(timeout_minutes=2, threads=1)
    for preset in PRESETS:
        found = count(preset, world)
        if world.rank == 0:
            print(json.dumps(found), flush=True)
    leave_world()
    end_process(0)


if __name__ == "__main__":
    main()
