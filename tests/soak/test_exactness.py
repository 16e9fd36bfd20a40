"""Every combination of ranks, engine, chunks, batch kind, preset and dropout against one process.

`make test` runs a pairwise cover of the same axes. Results are written next to this file; a run
that was cut is taken up where it stopped when ``DALR_SOAK_DIR`` names its directory.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections import defaultdict
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))

from cases import GROUPS, WORLDS, Case, agreement, load, product, run
from test_global_batch import launch, tolerance

from dalr_scale.distributed.world import leave_world, start_world
from dalr_scale.training.fingerprint import package_versions

RESULTS = Path(__file__).parent / "results"
pytestmark = pytest.mark.soak


@pytest.mark.timeout(4 * 3600)
def test_the_full_product(tmp_path: Path) -> None:
    directory = Path(os.environ.get("DALR_SOAK_DIR", tmp_path))
    for size in WORLDS:
        (directory / str(size)).mkdir(parents=True, exist_ok=True)
        launch(size, directory / str(size), "product", timeout=3600)
    worst: dict[str, dict[str, float]] = defaultdict(dict)
    failed = []
    counts: dict[str, int] = defaultdict(int)
    world = start_world(timeout_minutes=2, threads=1)
    references: dict[Case, dict] = {}
    for case in product():
        if case.reference not in references:
            references[case.reference] = run(case.reference, world)
        results = load(directory / str(case.world), case)
        bf16 = case.option == "bf16"
        found = agreement(results, references[case.reference], norms=bf16)
        if max(found.values()) >= tolerance(case):
            failed.append({"case": case.name, **found})
        row = summary_row(case)
        counts[row] += 1
        for group, value in found.items():
            worst[row][group] = max(worst[row].get(group, 0.0), value)
    leave_world()
    write(worst, counts, failed)
    assert not failed, f"{len(failed)} of {len(product())}: {failed[:5]}"


def summary_row(case: Case) -> str:
    parts = f"{case.world} ranks", case.kind, f"dropout {case.dropout}", case.option or "sgd"
    return ", ".join(parts)


def write(worst: dict, counts: dict[str, int], failed: list) -> None:
    limits = {summary_row(case): tolerance(case) for case in product()}
    versions = package_versions()
    record = {"versions": versions, "worst": worst, "counts": counts, "failed": failed}
    text = json.dumps(record, indent=1) + "\n"
    (RESULTS / "exactness.json").write_text(text, encoding="utf-8")
    lines = [
        "# Ranks, engines and chunks against one process",
        "",
        f"{sum(counts.values())} of {len(product())} cases, 5 steps each: "
        + ", ".join(f.name for f in dataclasses.fields(Case))
        + ". Largest max|difference| / max|value| of any tensor; bf16: of the norms of a group.",
        "",
        "| cases | number | loss | embedding gradient | parameter gradient | weights | limit |",
        "|---|---|---|---|---|---|---|",
    ]
    for row, values in worst.items():
        cells = [f"{values[group]:.1e}" for group in GROUPS]
        lines.append(f"| {row} | {counts[row]} | {' | '.join(cells)} | {limits[row]:.0e} |")
    lines += ["", "Versions: " + ", ".join(f"{k} {v}" for k, v in versions.items()), ""]
    (RESULTS / "exactness.md").write_text("\n".join(lines), encoding="utf-8")
