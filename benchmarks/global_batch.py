"""Memory, time and bytes of the global batch on CPU processes: ``make batch-bench``.

Writes ``benchmarks/results/global_batch.{json,md,png}``.

* Memory: one step at a growing global batch and a fixed chunk, each in a process of its own. The
  peak of the resident memory above what was there before the step, against the prediction that
  the trainer prints.
* Cost: steps with and without gradient caching at one batch size that fits both, interleaved.
* Traffic: bytes that a rank sends per step, counted on two and four ranks (``batch_traffic.py``).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import batch_traffic
import torch
from batch_step import Shape, backward, build, random_rows
from dalr_kernels.eager import chunked

from dalr_scale.config import BatchConfig
from dalr_scale.estimate.predict import plan_memory
from dalr_scale.training.fingerprint import package_versions

RESULTS = Path(__file__).parent / "results"
MICRO = 64
NARROW = Shape(width=64, layers=1, length=8, heads=32, image=48, text=(48,), tokens=(48,))
DEEPER = Shape(width=128, layers=4, length=32, heads=32, image=48, text=(48,), tokens=(48,))
LARGE, SMALL = (1024, 4096, 16384, 65536), (1024, 2048, 4096, 8192)
# Curves and their batches. Lists are sorted and tokens multiplied, so these two go to 8k.
CURVES: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "simcse": ({"preset": "simcse"}, LARGE),
    "dalr, ListNet, no tokens": ({"rank_loss": "listnet", "g2l_weight": 0.0}, LARGE),
    "ListMLE alone": ({"cross_weight": 0.0, "intra_kl_weight": 0.0, "g2l_weight": 0.0}, SMALL),
    "global-to-local alone": (
        {"cross_weight": 0.0, "intra_kl_weight": 0.0, "rank_weight": 0.0},
        SMALL,
    ),
}
# What may be: growth of memory over what is allowed to grow, time over that of one chunk, bytes
# over their floor.
MOST_MEMORY, MOST_TIME, MOST_BYTES = 1.10, 1.40, 1.05


def peak_of_step(curve: str, size: int) -> dict[str, float]:
    """Peak of resident memory over one step and its batch, above the level before, in bytes."""
    engine, small, config = build(CURVES[curve][0], 2 * MICRO, MICRO, NARROW)
    backward(engine, small, MICRO)  # libraries allocate at first use
    model: Any = engine.module
    model.zero_grad(set_to_none=True)
    config = dataclasses.replace(config, batch=BatchConfig(size, MICRO))
    plan = plan_memory(config, model, 1)
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    batch = random_rows(model, NARROW, size)
    started = time.perf_counter()
    backward(engine, batch, MICRO)
    seconds = time.perf_counter() - started
    # random features come as float16: there are no loaded ones beside them
    parts = {"cached": plan.cached_states + plan.loss_vectors, "tokens": plan.token_features}
    parts["batch"] = plan.batch
    return {"peak": _resident("VmHWM") - before, **parts, "seconds": seconds}


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def measure_memory(limit: int) -> list[dict[str, Any]]:
    found = []
    for curve, (_, sizes) in CURVES.items():
        for size in sizes:
            if size > limit:
                continue
            command = [sys.executable, __file__, "--one", curve, str(size)]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            row = {"curve": curve, "size": size, **json.loads(output.splitlines()[-1])}
            print(row, flush=True)
            found.append(row)
    return found


def measure_cost(rounds: int) -> dict[str, dict[str, float]]:
    """CPU time of a batch of 256 in chunks of 32 over that of one chunk, steps interleaved."""
    steps = {}
    for name, micro in (("one chunk", 256), ("chunks", 32), ("chunks, not sorted", 32)):
        steps[name] = *build({}, 256, micro, DEEPER)[:2], micro
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 1):
        for name, (engine, batch, micro) in steps.items():
            started = time.process_time()
            backward(engine, batch, micro, sort=name == "chunks")
            if number:  # the first round allocates
                times[name].append(time.process_time() - started)
    whole = times.pop("one chunk")
    cost = {}
    for name, own in times.items():
        ratios = [one / other for one, other in zip(own, whole, strict=True)]
        cost[name] = {
            "ratio": statistics.median(ratios), "low": min(ratios), "high": max(ratios)
        }  # fmt: skip
    return cost


def linear(row: dict[str, Any]) -> int:
    """What may grow with the batch, bytes: the batch itself, cached vectors, teachers' tokens."""
    return row["batch"] + row["cached"] + row["tokens"]


def growth(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Measured growth from the smallest to the largest batch over what it may be.

    Allowed: the growth of the linear part, and the workspace, which small batches do not fill.
    """
    workspace = chunked.default_workspace(torch.device("cpu"))
    result = {}
    for curve in CURVES:
        own = [row for row in rows if row["curve"] == curve]
        if len(own) > 1:
            first, last = own[0], own[-1]
            measured = last["peak"] - first["peak"]
            allowed = linear(last) - linear(first) + workspace
            result[curve] = {
                "from": first["size"], "to": last["size"], "measured": measured,
                "allowed": allowed, "ratio": measured / allowed,
            }  # fmt: skip
    return result


def write(record: dict[str, Any]) -> None:
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps(record, indent=1) + "\n"
    (RESULTS / "global_batch.json").write_text(text, encoding="utf-8")
    mib = 2**20
    lines = [
        "# The global batch on CPU processes",
        "",
        f"{record['date']}, {record['host']}; "
        + ", ".join(f"{name} {version}" for name, version in record["versions"].items()),
        "",
        f"Width {NARROW.width}, chunks of {MICRO} rows, fp32. Peak: resident memory of a batch and "
        "its step above the level before them. Cached vectors, of states and loss, and token "
        "features as the trainer predicts them.",
        "",
        "| curve | global batch | peak, MiB | batch | cached vectors | token features | step, s |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['curve']} | {r['size']} | {r['peak'] / mib:.0f} | {r['batch'] / mib:.1f} | "
        f"{r['cached'] / mib:.1f} | {r['tokens'] / mib:.1f} | {r['seconds']:.1f} |"
        for r in record["memory"]
    ]
    lines += [
        "",
        f"Allowed to grow: those three and the workspace of "
        f"{chunked.default_workspace(torch.device('cpu')) // mib} MiB, which small batches do not "
        "fill.",
        "",
        "| curve | growth | measured, MiB | allowed, MiB | ratio |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {name} | {g['from']} to {g['to']} | {g['measured'] / mib:.1f} | "
        f"{g['allowed'] / mib:.1f} | {g['ratio']:.2f} |"
        for name, g in record["growth"].items()
    ]
    lines += [
        "",
        "## Gradient caching",
        "",
        "A step of 256 rows in 8 chunks of 32, over the same step in one chunk; CPU time, median "
        "of interleaved rounds:",
        "",
        "| | ratio | least | most |",
        "|---|---|---|---|",
        *(
            f"| {name} | {c['ratio']:.2f} | {c['low']:.2f} | {c['high']:.2f} |"
            for name, c in record["cost"].items()
        ),
        "",
        "## Bytes that a rank sends",
        "",
        f"BERT-base's widths, two sentence teachers, {batch_traffic.ROWS} rows, ZeRO-2, bf16; "
        "counted at the collectives over (W - 1) / W of the batch. The floor is 16 bits a number "
        "on its way out and a float32 gradient back, of what no design avoids: z2, u, images "
        "and sentence teachers as stored, and z1's visit to the teachers' tokens.",
        "",
        *batch_traffic.table(record["traffic"]),
        "",
        "![memory](global_batch.png)",
        "",
    ]
    (RESULTS / "global_batch.md").write_text("\n".join(lines), encoding="utf-8")


def plot(record: dict[str, Any]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5))
    for number, curve in enumerate(CURVES):
        rows = [row for row in record["memory"] if row["curve"] == curve]
        sizes = [row["size"] for row in rows]
        line = axes.plot(sizes, [r["peak"] / 2**20 for r in rows], "o-", label=curve)[0]
        predicted = [linear(r) / 2**20 for r in rows]
        name = "batch, cached vectors, token features" if number == 0 else None
        axes.plot(sizes, predicted, ":", color=line.get_color(), label=name)
    sizes = [1024, 65536]
    axes.plot(sizes, [4 * n * n / 2**20 for n in sizes], "k--", label="one N x N matrix, fp32")
    axes.set(xscale="log", yscale="log", xlabel="global batch N", ylabel="MiB", ylim=(1, 20000))
    axes.set_xscale("log", base=2)
    axes.set_title("Peak memory of one step, chunks of 64 rows")
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(RESULTS / "global_batch.png", dpi=120)


def misses(record: dict[str, Any]) -> list[str]:
    """What is more than it may be, a line each."""
    found = [
        f"memory of {name} grows by {g['ratio']:.2f} of what it may (at most {MOST_MEMORY})"
        for name, g in record["growth"].items()
        if g["ratio"] > MOST_MEMORY
    ]
    ratio = record["cost"]["chunks"]["ratio"]
    if ratio > MOST_TIME:
        found.append(f"chunks take {ratio:.2f} of the time of one chunk (at most {MOST_TIME})")
    return found + [
        f"{r['preset']} on {r['ranks']} ranks sends {r['columns'] / r['columns_floor']:.3f} of the "
        f"floor (at most {MOST_BYTES})"
        for r in record["traffic"]
        if r["columns"] > MOST_BYTES * r["columns_floor"]
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--one", nargs=2, metavar=("CURVE", "SIZE"), help="one measurement, as JSON"
    )
    parser.add_argument("--largest", type=int, default=65536, help="largest global batch")
    parser.add_argument(
        "--rounds", type=int, default=7, help="interleaved rounds of the step times"
    )
    options = parser.parse_args()
    if options.one:
        print(json.dumps(peak_of_step(options.one[0], int(options.one[1]))))
        return
    memory = measure_memory(options.largest)
    record = {
        "date": date.today().isoformat(),
        "host": f"{os.cpu_count()} CPU cores, {torch.get_num_threads()} thread(s), "
        f"{platform.machine()}",
        "versions": package_versions(),
        "memory": memory,
        "growth": growth(memory),
        "cost": measure_cost(options.rounds),
        "traffic": batch_traffic.measure(),
    }
    write(record)
    plot(record)
    if missed := misses(record):
        raise SystemExit("\n".join(missed))


if __name__ == "__main__":
    main()
