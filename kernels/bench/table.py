"""The Markdown table of a results file. Predictions have a column of their own."""

from __future__ import annotations

from typing import Any

from bench import counts, targets
from bench.peers import OURS, ROOMY
from bench.problems import OBJECTIVES, TITLES, Shape, group_of

MODE_OF = {OURS[0]: "workspace", ROOMY: "workspace", OURS[1]: "stream"}
HEADER: tuple[str, ...] = (
    "implementation", "loss only, ms", "forward, ms", "backward, ms", "both, ms [p10 - p90]",
    "runs", "TFLOP/s", "% of GEMM rate", "peak, GiB", "error of loss / gradient",
    "predicted floor, ms", "what ran",
)  # fmt: skip


def render(results: dict[str, Any]) -> str:
    """The whole document."""
    goals = [] if results["settings"].get("sweep") else [_targets(results)]
    parts = [_title(results), *goals, *_cells(results)]
    return "\n".join(parts).rstrip() + "\n"


def _title(results: dict[str, Any]) -> str:
    host, machine = results["host"], results["machine"]
    packages = ", ".join(f"{name} {version or '-'}" for name, version in host["packages"].items())
    gemm, copy = machine.get("gemm_flops"), machine.get("copy_bytes")
    lines = [
        f"# {host['device']}",
        "",
        f"Measured {host['date']}, commit {host['commit'] or 'unknown'}; {packages}, "
        f"CUDA {host['cuda'] or '-'}, driver {host.get('driver_version') or '-'}, "
        f"Python {host['python']}.",
        "",
        f"Dense bf16 product (8192 cubed, random data): "
        f"{_number(gemm, 1e12, 0)} TFLOP/s; device copy: {_number(copy, 1e12, 2)} TB/s.",
        "",
        "Written by `kernels/bench/run.py`; `kernels/bench/README.md` explains the columns.",
    ]
    if not results["complete"]:
        lines += ["", "The run ended before every cell was reached."]
    return "\n".join([*lines, ""])


def _targets(results: dict[str, Any]) -> str:
    rows = [("goal (N = 32k, forward + backward)", "must", "stretch", "measured", "verdict", "")]
    for goal in targets.check(results):
        value = "" if goal.value is None else f"{goal.value:.3g} {goal.unit}"
        bounds = f"{goal.must:g} {goal.unit}", f"{goal.stretch:g} {goal.unit}"
        rows.append((goal.name, *bounds, value, goal.verdict, goal.note))
    return "\n".join(["## Goals", "", *markdown(rows), ""])


def _cells(results: dict[str, Any]) -> list[str]:
    return [_cell(cell, results["machine"].get("gemm_flops")) for cell in results["cells"]]


def _cell(cell: dict[str, Any], gemm: float | None) -> str:
    size = f"{cell['rows']} x {cell['cols']}, d = {cell['width']}"
    if cell["problem"] == "global_to_local" or cell["problem"].endswith("-full"):
        size += f", {cell['tokens']} tokens"
    rows = [HEADER]
    unmeasured: list[str] = []
    for name, row in cell["contestants"].items():
        if row["status"] == "measured":
            rows.append((name, *_measured(cell, name, row, gemm)))
        else:
            unmeasured.append(f"- {name}: {row['status']}")
    lines = [
        f"## {TITLES[cell['problem']]}, {size}, {cell['data']} data",
        "",
        f"FLOP counted: {cell['flop_formula']} = {cell['flop'] / 1e12:.3g} TFLOP.{_state(cell)}",
        "",
        *(markdown(rows) if len(rows) > 1 else []),
        *([""] if len(rows) > 1 and unmeasured else []),
        *unmeasured,
        "",
    ]
    return "\n".join(lines)


def _state(cell: dict[str, Any]) -> str:
    state = cell["state"]
    if not state:
        return ""
    slowed = ", ".join(state.get("slowed_by") or []) or "nothing"
    return (
        f" After the cell: SM clock {state.get('clocks.sm')}, memory {state.get('clocks.mem')}, "
        f"{state.get('power.draw')}, slowed by {slowed}."
    )


def _measured(
    cell: dict[str, Any], name: str, row: dict[str, Any], gemm: float | None
) -> tuple[str, ...]:
    times = row["milliseconds"]
    both = times["both"]
    rate = cell["flop"] / (both["median"] / 1e3)
    floor = predicted_floor(cell, name)
    note = row.get("backend", "")
    if floor is not None and both["median"] < floor:
        note = f"{note} faster than its floor: look for an error".strip()
    errors = row.get("errors")
    return (
        *(_time(times.get(phase)) for phase in ("evaluation", "forward", "backward")),
        f"{_digits(both['median'])} [{_digits(both['p10'])} - {_digits(both['p90'])}]",
        str(row["runs"]),
        f"{rate / 1e12:.3g}",
        f"{100 * rate / gemm:.0f}" if gemm else "",
        _number(row.get("peak_bytes") or None, 2**30, 3),
        f"{errors['loss']:.0e} / {errors['gradient']:.0e}" if errors else "",
        "" if floor is None else _digits(floor),
        note,
    )


def predicted_floor(cell: dict[str, Any], name: str) -> float | None:
    """Milliseconds our own modes cannot beat on an H200; None for everybody else."""
    problem = cell["problem"]
    if name not in MODE_OF or problem in OBJECTIVES or problem not in counts.EPILOGUES:
        return None
    shape = Shape(cell["rows"], cell["cols"], cell["width"], cell["tokens"])
    (group,) = group_of(problem, shape.width)
    line = counts.roofline(problem, shape.rows, shape.cols, group, MODE_OF[name])
    return 1e3 * line.bound


def _time(value: dict[str, float] | None) -> str:
    return "" if value is None else _digits(value["median"])


def _digits(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _number(value: float | None, unit: float, digits: int) -> str:
    return "" if value is None else f"{value / unit:.{digits}f}"


def markdown(rows: list[tuple[str, ...]]) -> list[str]:
    head, *body = [f"| {' | '.join(row)} |" for row in rows]
    return [head, "|" + "---|" * len(rows[0]), *body]
