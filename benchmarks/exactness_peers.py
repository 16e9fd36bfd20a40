"""Gradients of chunked contrastive losses against one process with the whole batch, on the CPU.

Writes ``benchmarks/results/exactness_peers.{json,md}``: this package's step of a global batch,
sentence-transformers, GradCache and tevatron, on plain data parallelism and DeepSpeed ZeRO-1/2/3.
The peers that are not installed are left out, and the table says so. To install them, in an
environment of their own beside this package:

    pip install -e .
    pip install "sentence-transformers>=6.2" datasets peft
    pip install git+https://github.com/luyug/GradCache@906f03835fbc183132a9db32612a9e8f180ca3b4
    pip install git+https://github.com/texttron/tevatron@dd063104c81a76d6a77c845f667b46b9e5abd625

then

    python benchmarks/exactness_peers.py
    python benchmarks/exactness_peers.py --only sbert-cached --engines ddp zero2 --ranks 2

What is measured again replaces its part of the results; the rest stays. Every combination is a
launch of its own with a time limit, about half a minute on 2 cores. What is measured, and how, is
in ``peers/case.py``; each contestant has a file of its own beside it.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peers import case, report

RESULTS = Path(__file__).parent / "results" / "exactness_peers"
LIMIT_S = 600


@dataclass(frozen=True)
class Contestant:
    """A row of the table.

    Attributes:
        label: for readers.
        call: ``module:function`` in ``peers/``.
        needs: importable modules.
        scale: inverse temperature of the loss that it computes.
        engines: what it runs on.
    """

    label: str
    call: str
    needs: tuple[str, ...]
    scale: float = case.SCALE
    engines: tuple[str, ...] = ("ddp", *case.STAGES)


CONTESTANTS = {
    "own": Contestant("dalr_scale.global_batch", "own_peer:step", ("dalr_scale",)),
    "sbert-cached": Contestant(
        "sentence-transformers, CachedMultipleNegativesRankingLoss",
        "sbert_peer:cached",
        ("sentence_transformers", "datasets"),
    ),
    "gradcache": Contestant("GradCache", "gradcache_peer:step", ("grad_cache",)),
    "gradcache-coalesced": Contestant(
        "GradCache in DeepSpeed's coalesce_grad_reduction",
        "gradcache_peer:coalesced",
        ("grad_cache",),
        engines=tuple(case.STAGES),
    ),
    "tevatron": Contestant(
        "tevatron, GradCacheTrainer", "tevatron_peer:step", ("tevatron", "grad_cache"), scale=1.0
    ),
    "sbert-uncached": Contestant(
        "control, no chunks: sentence-transformers, MultipleNegativesRankingLoss",
        "sbert_peer:uncached",
        ("sentence_transformers", "datasets"),
    ),
    "sbert-accumulated": Contestant(
        "control, another loss: the same with gradient accumulation",
        "sbert_peer:accumulated",
        ("sentence_transformers", "datasets"),
    ),
}
# engine, dtype, ranks; DeepSpeed trains no float64
CELLS = [
    *(("ddp", "float32", ranks) for ranks in (1, 2, 4)),
    *(("ddp", "float64", ranks) for ranks in (1, 2, 4)),
    *((f"zero{stage}", "float32", ranks) for stage in (1, 2, 3) for ranks in (2, 4)),
]


def work(arguments: argparse.Namespace) -> None:
    """One rank of one cell: the contestant's step, then weights or the exception in a file."""
    rank, directory = int(os.environ["RANK"]), Path(arguments.directory)
    job = case.Job(
        engine=arguments.engines[0],
        dtype=arguments.dtype,
        rank=rank,
        ranks=int(os.environ["WORLD_SIZE"]),
        model=directory / "model",
        work=directory / "trainer",
    )
    module, function = CONTESTANTS[arguments.work].call.split(":")
    status = 0
    try:
        model = getattr(importlib.import_module(f"peers.{module}"), function)(job)
        torch.save(case.unsharded_loading(model), directory / f"weights-{rank}.pt")
    except Exception as error:  # whatever a peer raises is the result
        status = 1
        text = f"{type(error).__name__}\n{first_line(error)}\n"
        (directory / f"error-{rank}.txt").write_text(text)
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # an engine of which another rank is gone may wait at the end


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or the statement that raised one without."""
    for line in str(error).splitlines():
        if line.strip():
            return " ".join(line.split())
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{Path(place.filename).name}: {place.line}"


def measure(name: str, engine: str, dtype: str, ranks: int, log: Path | None) -> dict[str, Any]:
    """One cell: a launch, and the distance of what it applied from the reference."""
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        case.write_model(directory / "model")
        output, ended = _launch(name, engine, dtype, ranks, directory)
        if log is not None:
            (log / f"{name}-{engine}-{dtype}-{ranks}.txt").write_text(output)
        failed = sorted(directory.glob("error-*.txt"), key=lambda file: file.stat().st_mtime)
        if failed:
            kind, message, *_ = failed[0].read_text().split("\n")
            status = "unsupported" if kind == case.Unsupported.__name__ else "exception"
            return {"status": status, "exception": kind, "message": message}
        if not ended:
            return {"status": "hang", "message": f"no end in {LIMIT_S} s"}
        if len(list(directory.glob("weights-*.pt"))) < ranks:
            return {"status": "died", "message": "a process ended without an exception"}
        return _compare(directory, ranks, CONTESTANTS[name].scale)


def _launch(name: str, engine: str, dtype: str, ranks: int, directory: Path) -> tuple[str, bool]:
    """Runs the ranks of a cell; their output, and whether they ended in time."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *(f"--nproc-per-node={ranks}", __file__, "--work", name, "--engines", engine),
        *("--dtype", dtype, "--directory", str(directory)),
    ]
    settings = {
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }
    with (directory / "output.txt").open("w+", encoding="utf-8") as output:
        process = subprocess.Popen(
            command, env=os.environ | settings, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            process.wait(LIMIT_S)
            ended = True
        except subprocess.TimeoutExpired:
            ended = False
            process.terminate()  # the launcher ends the ranks, which are sessions of their own
            process.wait()
        output.seek(0)
        return output.read(), ended


def _compare(directory: Path, ranks: int, scale: float) -> dict[str, Any]:
    before = case.start_weights(directory / "model")
    weights = [torch.load(directory / f"weights-{rank}.pt") for rank in range(ranks)]
    apart = any(not torch.equal(weights[0][n], w[n]) for w in weights for n in w)
    if all(torch.equal(before[name], weights[0][name]) for name in before):
        return {"status": "no step", "message": "the weights did not change"}
    found = case.applied_gradient(before, weights[0])
    wanted = _reference(directory / "model", "float64", scale)
    return {"status": "measured", "ranks_differ": apart, **case.errors(found, wanted)}


def _reference(model: Path, dtype: str, scale: float) -> dict[str, torch.Tensor]:
    job = case.Job("ddp", dtype, 0, 1, model, model)
    return case.reference(job, scale)[0]


def rounding(dtype: str, scale: float) -> dict[str, Any]:
    """The error of one process without chunks in `dtype`: what rounding alone costs."""
    with tempfile.TemporaryDirectory() as temporary:
        model = Path(temporary)
        case.write_model(model)
        return case.errors(_reference(model, dtype, scale), _reference(model, "float64", scale))


def missing(contestant: Contestant) -> list[str]:
    return [name for name in contestant.needs if importlib.util.find_spec(name) is None]


def run(arguments: argparse.Namespace) -> None:
    """Measures the chosen cells, writing the results after each one."""
    cells, versions = _earlier()
    if arguments.log is not None:
        arguments.log.mkdir(parents=True, exist_ok=True)
    scales = sorted({contestant.scale for contestant in CONTESTANTS.values()})
    floor = {str(scale): rounding("float32", scale) for scale in scales}
    labels = {key: contestant.label for key, contestant in CONTESTANTS.items()}
    report.write(RESULTS, cells, versions, floor, labels)
    for name in arguments.only or CONTESTANTS:
        absent = missing(CONTESTANTS[name])
        if absent:
            print(f"{name}: skipped, not installed: {', '.join(absent)}", flush=True)
            continue
        for engine, dtype, ranks in CELLS:
            if engine not in CONTESTANTS[name].engines:
                continue
            if engine not in (arguments.engines or [engine]):
                continue
            if ranks not in (arguments.ranks or [ranks]):
                continue
            cell = measure(name, engine, dtype, ranks, arguments.log)
            print(f"{name} {engine} {dtype} {ranks}: {json.dumps(cell)}", flush=True)
            if cell["status"] == "unsupported":
                continue
            cells.setdefault(name, {})[f"{engine} {dtype} {ranks}"] = cell
            report.write(RESULTS, cells, versions, floor, labels)


def _earlier() -> tuple[dict[str, Any], dict[str, str]]:
    """The cells measured before, and the versions of what was and will be measured."""
    file, versions = RESULTS.with_suffix(".json"), report.versions()
    if not file.is_file():
        return {}, versions
    kept = json.loads(file.read_text())
    changed = [n for n, v in kept["versions"].items() if versions.get(n, v) != v]
    if changed:
        sys.exit(f"{file} was measured with another {', '.join(changed)}; move it away first")
    return kept["cells"], kept["versions"] | versions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", nargs="+", choices=list(CONTESTANTS), help="contestants")
    parser.add_argument("--engines", nargs="+", choices=["ddp", *case.STAGES], default=[])
    parser.add_argument("--ranks", nargs="+", type=int, choices=[1, 2, 4], default=[])
    parser.add_argument("--log", type=Path, help="directory for the output of every cell")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--dtype", default="float32", help=argparse.SUPPRESS)
    parser.add_argument("--directory", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work(arguments)
    else:
        run(arguments)


if __name__ == "__main__":
    main()
