"""Random whole runs against the reference trainer, and stops after every single step.

`make test` runs a cover of the same rows (``tests/distributed/test_real_runs.py``). A row is a
function of its number: ``cd tests; python -m reference NUMBER`` repeats it. A search that was cut
goes on where it stopped when ``DALR_SOAK_DIR`` names its directory.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from reference.__main__ import recorded
from reference.draw import VERSION, draw
from reference.engines import (
    BOUNDS,
    ENGINES,
    Engine,
    alternating,
    differences,
    stopped_after_every_step,
)
from reference.material import write_material

from dalr_scale.training.fingerprint import package_versions

RESULTS = Path(__file__).parent / "results"
ROWS = 336
PROCESSES = 2
pytestmark = pytest.mark.soak


@pytest.mark.timeout(4 * 3600)
def test_random_runs_train_what_the_reference_trains(tmp_path: Path) -> None:
    directory = Path(os.environ.get("DALR_SOAK_DIR", tmp_path))
    write_material(tmp_path / "data")
    files = [directory / f"real_runs.{number}.jsonl" for number in range(PROCESSES)]
    searches = [
        subprocess.Popen(
            [sys.executable, "-m", "reference", str(number), f"--to={ROWS}",
             f"--every={PROCESSES}", f"--data={tmp_path / 'data'}", f"--record={file}"],
            cwd=Path(__file__).parents[1],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        for number, file in enumerate(files)
    ]  # fmt: skip
    for search in searches:
        search.wait()
    results = sorted((r for file in files for r in recorded(file)), key=lambda r: r["number"])
    write(results)
    assert [r["number"] for r in results] == list(range(ROWS))
    bad = [r for r in results if r["kind"] not in ("agrees", "refused")]
    assert not bad, bad[:5]


def write(results: list[dict]) -> None:
    versions = package_versions()
    record = {"versions": versions, "draw": VERSION, "rows": results}
    text = json.dumps(record, indent=1) + "\n"
    (RESULTS / "real_runs.json").write_text(text, encoding="utf-8")
    kinds = Counter(r["kind"] for r in results)
    lines = [
        "# Whole runs against the reference trainer",
        "",
        f"{len(results)} random configurations: "
        + ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
        + ". Largest relative difference from the reference, over the loss, every term, the "
        "gradient norm and the learning rate of each step, and over the final weights "
        "(largest element; bf16: norm of each weight).",
        "",
        "| engine | runs | with a stop | steps compared | steps | weights | limit |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, members in sorted(by_engine(results).items()):
        worst = {key: max(r[key] for r in members) for key in ("steps", "weights")}
        stopped = sum(bool(draw(r["number"]).stops) for r in members)
        compared = sum(r["compared"] for r in members)
        limits = sorted({f"{draw(r['number']).bounds.steps:.0e}" for r in members})
        lines.append(
            f"| {name} | {len(members)} | {stopped} | {compared} | {worst['steps']:.1e} | "
            f"{worst['weights']:.1e} | {', '.join(limits)} |"
        )
    lines += [
        "",
        "Repeat a row: `cd tests; python -m reference NUMBER`. Numbers that are not in order: "
        + (", ".join(f"{r['number']} ({r['kind']})" for r in results if _bad(r)) or "none")
        + ".",
        "",
        "Versions: " + ", ".join(f"{k} {v}" for k, v in versions.items()),
        "",
    ]
    (RESULTS / "real_runs.md").write_text("\n".join(lines), encoding="utf-8")


def _bad(result: dict) -> bool:
    return result["kind"] not in ("agrees", "refused")


def by_engine(results: list[dict]) -> dict[str, list[dict]]:
    """Rows that trained, by engine, precision and bound."""
    groups: dict[str, list[dict]] = {}
    for result in results:
        row = draw(result["number"])
        if row.broken:
            continue
        name = f"{row.changes['engine.kind']} {row.precision}"
        if row.changes.get("engine.offload_optimizer"):
            name += ", offload"
        if row.precision == "fp64" and row.bounds.steps > 1e-6:
            name += ", frozen encoders in float32"
        groups.setdefault(name, []).append(result)
    return groups


@pytest.mark.parametrize("encoder", ["scratch", "pretrained"])
@pytest.mark.parametrize("engine", ENGINES, ids=str)
def test_a_stop_after_every_step_changes_no_bit(
    engine: Engine, encoder: str, tmp_path: Path
) -> None:
    data = write_material(tmp_path / "data")
    config = alternating(data, engine, encoder)
    assert stopped_after_every_step(config, tmp_path, ranks=2) == []


@pytest.mark.parametrize(("engine", "ranks"), list(itertools.product(ENGINES, (1, 2))), ids=str)
def test_every_engine_trains_what_the_reference_trains(
    engine: Engine, ranks: int, tmp_path: Path
) -> None:
    data = write_material(tmp_path / "data")
    found = differences(data, engine, ranks, tmp_path)
    assert found.within(BOUNDS), found
