"""CPU benchmark: the row-chunked torch path against dense torch, time and peak memory.

usage: python kernels/bench/cpu.py [--only TEXT] [--plot-only]

Every measurement has a process of its own. Times of one cell are interleaved in one process, so
that load on the machine affects all implementations alike; peak memory is the growth of the
resident set of a process that runs one implementation once.
"""

# ruff: noqa: E402
from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

# a checkout runs as it is, without an installation
sys.path[:0] = [str(directory) for directory in Path(__file__).resolve().parents[1:3]]

import torch

from bench import host, problems, results, table
from bench.peers import DENSE_REFERENCE, EAGER, Implementation, dense_reference, implementations
from bench.problems import TITLES, square
from bench.timing import Budget, HostClock, interleave, step

HERE = Path(__file__).resolve().parent
OURS = "ours, torch path"
DENSE = (EAGER[0], DENSE_REFERENCE)
# timed rounds of every implementation at each N, after one that is thrown away
ROUNDS = {2048: 9, 4096: 5, 8192: 3, 16384: 2}
CELLS = tuple(
    (name, size, width)
    for name, width in (("triple", 256), ("info_nce", 256), ("triple", 768))
    for size in ROUNDS
)
# seconds after which no further round of a cell begins
CELL_SECONDS = 120.0
# a dense implementation starts only with this share of the free memory in hand
MEMORY_SHARE = 0.7
GOALS = (("time", 2.0, "x faster"), ("memory", 20.0, "x smaller"))


def known() -> dict[str, Implementation]:
    """The three implementations; the dense definition does every row loss here."""
    found = implementations()
    definition = Implementation(DENSE_REFERENCE, problems.ROW_LOSSES, dense_reference)
    return {OURS: found[OURS], EAGER[0]: found[EAGER[0]], DENSE_REFERENCE: definition}


# In a process of its own


def child(request: dict[str, Any]) -> dict[str, Any]:
    """Measure one cell: the time of several implementations, or the memory of one."""
    problem = problems.make(
        request["problem"], square(request["size"], request["width"]), torch.device("cpu"),
        dtype=torch.float32,
    )  # fmt: skip
    found = known()
    losses = {name: found[name].build(problem) for name in request["implementations"]}
    if request["what"] == "memory":
        (loss,) = losses.values()
        tiny = problems.make(
            request["problem"], square(64, 16), torch.device("cpu"), dtype=torch.float32
        )
        step(tiny, found[request["implementations"][0]].build(tiny))  # libraries are loaded here
        before = _status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        step(problem, loss)
        return {request["implementations"][0]: {"peak_bytes": _status("VmHWM") - before}}
    samples = interleave(
        problem, losses, HostClock(), Budget(CELL_SECONDS), rounds=request["rounds"], warmups=1
    )
    return {name: sample.summary() for name, sample in samples.items()}


def _status(name: str) -> int:
    """A size from /proc/self/status, bytes."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}")


# In the parent


def ask(**request: Any) -> dict[str, Any]:
    """Run `child` in a new process."""
    command = [sys.executable, str(Path(__file__).resolve()), "--child", json.dumps(request)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        reason = lines[-1] if lines else f"ended with {done.returncode} (out of memory?)"
        return {name: {"status": f"failed: {reason}"} for name in request["implementations"]}
    return json.loads(done.stdout)


def cell(name: str, size: int, width: int, rounds: int, bytes_a_pair: dict[str, float]) -> dict:
    """One cell: memory of each implementation first, then the interleaved times of what fits."""
    what = {"problem": name, "size": size, "width": width}
    rows: dict[str, dict[str, Any]] = {}
    for implementation in (OURS, *DENSE):
        need = bytes_a_pair.get(implementation, 0.0) * size * size
        if implementation != OURS and need > MEMORY_SHARE * _available():
            rows[implementation] = {"status": f"not measured: needs about {need / 1e9:.0f} GB"}
            continue
        found = ask(what="memory", implementations=[implementation], **what)
        rows[implementation] = found[implementation]
        if "peak_bytes" in rows[implementation]:
            bytes_a_pair[implementation] = rows[implementation]["peak_bytes"] / size**2
    names = [key for key, row in rows.items() if "peak_bytes" in row]
    for key, row in ask(what="time", implementations=names, rounds=rounds, **what).items():
        rows[key] |= {**row, "peak_bytes": rows[key]["peak_bytes"]}
    return {**what, "contestants": rows}


def _available() -> int:
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/meminfo has no MemAvailable")


def merge(path: Path, found: list[dict[str, Any]]) -> dict[str, Any]:
    """The results file with the new cells in place of their older measurements."""
    before = results.read(path)["cells"] if path.exists() else []
    cells = {(c["problem"], c["width"], c["size"]): c for c in [*before, *found]}
    about = host.describe(torch.device("cpu"))
    return {"host": about, "cells": [cells[key] for key in sorted(cells)]}


# Tables


def ratio(entry: dict[str, Any], dense: str, what: str) -> float | None:
    """How much slower or larger the dense implementation is than ours; None when not measured."""
    values = []
    for name in (dense, OURS):
        row = entry["contestants"].get(name, {})
        value = row.get("peak_bytes") if what == "memory" else results.median(row)
        values.append(value)
    return values[0] / values[1] if all(values) else None


def render(document: dict[str, Any]) -> str:
    about = document["host"]
    lines = [
        "# CPU: row chunks against dense torch",
        "",
        f"{about['device']}, torch {about['packages']['torch']}, commit "
        f"{about['commit'] or 'unknown'}, {about['date']}. float32, forward and backward. Times "
        "are medians of interleaved runs, memory is the growth of the resident set of a process "
        "of its own. Written by `kernels/bench/cpu.py`.",
    ]
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for entry in document["cells"]:
        groups.setdefault((entry["problem"], entry["width"]), []).append(entry)
    for (name, width), entries in groups.items():
        lines += ["", f"## {TITLES[name]}, d = {width}", ""]
        rows = [
            (
                "N",
                *(f"{key}: s / MiB" for key in (OURS, *DENSE)),
                *(f"{key}: time, memory over ours" for key in DENSE),
            )
        ]
        rows += [(str(entry["size"]), *_values(entry), *_ratios(entry)) for entry in entries]
        lines += table.markdown(rows)
    lines += ["", "## Goals", "", *table.markdown(goals(document))]
    return "\n".join(lines) + "\n"


def _values(entry: dict[str, Any]) -> list[str]:
    found = []
    for key in (OURS, *DENSE):
        row = entry["contestants"].get(key, {"status": "not measured"})
        if (time := results.median(row)) is None:
            found.append(row["status"])
        else:
            found.append(f"{time / 1e3:.3g} / {row['peak_bytes'] / 2**20:.0f} ({row['runs']} runs)")
    return found


def _ratios(entry: dict[str, Any]) -> list[str]:
    found = []
    for key in DENSE:
        values = [ratio(entry, key, what) for what in ("time", "memory")]
        found.append("" if None in values else "{:.2f}x, {:.1f}x".format(*values))
    return found


def goals(document: dict[str, Any]) -> list[tuple[str, ...]]:
    """At N = 8k, three losses; and never slower than dense from 2k to 16k."""
    rows: list[tuple[str, ...]] = [("goal", "wanted", "measured", "verdict")]
    for entry in document["cells"]:
        if entry["problem"] != "triple" or entry["size"] != 8192:
            continue
        for what, wanted, unit in GOALS:
            for dense in DENSE:
                name = f"{what} at N = 8k, d = {entry['width']}, against {dense}"
                rows.append(
                    (name, f"{wanted:g} {unit}", *_verdict(ratio(entry, dense, what), wanted))
                )
    slowest = [
        (value, entry)
        for entry in document["cells"]
        for dense in DENSE
        if (value := ratio(entry, dense, "time")) is not None
    ]
    if slowest:
        value, entry = min(slowest, key=lambda pair: pair[0])
        name = f"never slower; worst: {entry['problem']}, N = {entry['size']}, d = {entry['width']}"
        rows.append((name, "1 x faster", *_verdict(value, 1.0)))
    return rows


def _verdict(value: float | None, wanted: float) -> tuple[str, str]:
    if value is None:
        return "", "not measured"
    return f"{value:.2f}", "reached" if value >= wanted else "**missed**"


def plot(path: Path, document: dict[str, Any]) -> None:
    """Time and memory of the three losses at d = 256 over N."""
    from bench import plots

    entries = [c for c in document["cells"] if (c["problem"], c["width"]) == ("triple", 256)]
    times: dict[str, list[tuple[float, float]]] = {}
    memory: dict[str, list[tuple[float, float]]] = {}
    for entry in entries:
        for name, row in entry["contestants"].items():
            if (time := results.median(row)) is not None:
                times.setdefault(name, []).append((entry["size"], time / 1e3))
                memory.setdefault(name, []).append((entry["size"], row["peak_bytes"] / 2**20))
    about = document["host"]
    caption = f"{about['device']}, torch {about['packages']['torch']}, {about['date'][:10]}"
    panels = [
        plots.Panel("forward + backward, three losses, d = 256", "seconds", times),
        plots.Panel("peak memory, three losses, d = 256", "MiB", memory),
    ]
    plots.save(path, panels, caption)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="CPU benchmark of the torch path")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="directory for results")
    parser.add_argument("--only", default="", help="cells whose key (problem/N/d) has this text")
    parser.add_argument("--plot-only", action="store_true", help="table and plot of what is there")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        print(json.dumps(child(json.loads(options.child))))
        return 0
    path = options.out / "cpu.json"
    per_pair: dict[tuple[str, int], dict[str, float]] = {}
    for name, size, width in CELLS:
        if options.plot_only or options.only not in f"{name}/{size}/{width}":
            continue
        known_bytes = per_pair.setdefault((name, width), {})
        entry = cell(name, size, width, ROUNDS[size], known_bytes)
        document = merge(path, [entry])
        results.write(path, document)
        print(f"{name}/{size}/{width}: {_values(entry)} {_ratios(entry)}", flush=True)
    document = results.read(path)
    path.with_suffix(".md").write_text(render(document), encoding="utf-8")
    try:
        plot(path.with_suffix(".png"), document)
    except ModuleNotFoundError as error:
        print(f"no plot: {error}; pip install 'dalr-scale[bench]'")
    print(f"{path.with_suffix('.md')} is written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
