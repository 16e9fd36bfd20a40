"""``dalr-scale doctor``: finds in seconds what would break a job after an hour.

Without --nodes it checks this machine. In a job every node runs it (`slurm/common.sh`): the nodes
report to the first one over the port that training will use, it compares the reports, and all nodes
get its verdict.
A problem names the node. The checks of one node are in `dalr_scale.cluster.node_report`, the
communication between nodes in `dalr_scale.cluster.rendezvous`.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from dalr_scale.cluster.node_report import NodeReport, examine, node_name
from dalr_scale.cluster.rendezvous import NodeReports, collect_reports, send_report
from dalr_scale.errors import UserError
from dalr_scale.run.files import write_json
from dalr_scale.run.status import job_identity

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

MAX_CLOCK_SKEW = 2.0  # seconds; the order of the nodes' log lines depends on it
# Seconds for the slowest node; a failing check must end the job within a minute.
NODE_TIMEOUT = 40.0


class _Options(argparse.Namespace):
    run_dir: Path | None
    processes: int
    nodes: int
    node_rank: int
    head: str
    port: int
    patience: float


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; the exit status is 1 where training must not start."""
    words = list(sys.argv[1:] if argv is None else argv)
    cut = words.index("--") if "--" in words else len(words)
    args = _parser().parse_args(words[:cut], _Options())
    training = words[cut + 1 :]
    if {"-h", "--help"} & set(training):
        return 0  # the trainer will print its help
    started = time.monotonic()
    if args.node_rank:
        return _report_to_first(args, training)
    reports, problems = _examine_all(args, training)
    if not problems and not int(os.environ.get("SLURM_RESTART_COUNT") or 0):
        problems = _try_configuration(args, training)
    if not problems and args.nodes > 1 and reports[0].gpus:
        problems = _all_reduce(args)
    _record(args.run_dir, problems)
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        print(f"doctor: {count}, training does not start", file=sys.stderr)
        print("\n".join(f"doctor: {p}" for p in problems), file=sys.stderr, flush=True)
        return 1
    print(f"doctor: {_summary(reports)} ({time.monotonic() - started:.1f} s)", flush=True)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dalr-scale doctor",
        description="Check this machine, or with --nodes all nodes of a job, before training.",
        epilog="After -- come the arguments of training: dalr-scale doctor -- --config RECIPE",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--run-dir", type=Path, help="output directory to check (default: the configuration's)")
    add("--processes", type=int, default=1, help="training processes on each node (default 1)")
    add("--nodes", type=int, default=1, help="nodes of the job (default 1)")
    add("--node-rank", type=int, default=0, help="number of this node; 0 listens")
    add("--head", default="127.0.0.1", help="address of node 0")
    add("--port", type=int, default=29500, help="port that training will use")
    add("--patience", type=float, default=NODE_TIMEOUT, help="seconds to wait for the slowest node")
    return parser


def _report_to_first(args: _Options, training: list[str]) -> int:
    """One of the other nodes: reports to the first, and prints only failures unknown to that."""
    report = examine(args.run_dir, args.processes, training, args.nodes, args.node_rank)
    try:
        good = send_report(args.head, args.port, report, args.run_dir, args.patience)
    except OSError as error:
        print(
            f"doctor: node {report.node} cannot reach the first node at {args.head} port "
            f"{args.port}: {error}; check HEAD_ADDR, NETWORK_INTERFACE and the firewall",
            *(f"doctor: node {report.node}: {problem}" for problem in report.problems),
            sep="\n",
            file=sys.stderr,
            flush=True,
        )
        return 1
    if good and report.gpus:
        failures = _all_reduce(args)
        for failure in failures:
            print(f"doctor: {failure}", file=sys.stderr, flush=True)
        good = not failures
    return 0 if good else 1


def _examine_all(args: _Options, training: list[str]) -> tuple[list[NodeReport], list[str]]:
    """The first node: reports and problems of all nodes."""
    own = examine(args.run_dir, args.processes, training, args.nodes)
    if args.nodes == 1:
        return [own], compare([own])
    try:
        with collect_reports(args.port, args.nodes, args.run_dir, args.patience) as collected:
            reports = [own, *collected.reports]
            problems = compare(reports) + missing(collected, args)
            collected.release(not problems)
    except OSError as error:
        raise UserError(
            f"doctor: node {own.node} cannot listen on port {args.port}: {error}; another job on "
            "this node may use it"
        ) from error
    return reports, problems


def compare(reports: Sequence[NodeReport]) -> list[str]:
    """Problems of single nodes, and facts in which a node differs from most others."""
    problems = _grouped((r.node, problem) for r in reports for problem in r.problems)
    names = {name for report in reports for name in report.facts}
    for name in sorted(names):
        values = [report.facts.get(name, "absent") for report in reports]
        usual = Counter(values).most_common(1)[0][0]
        problems += _grouped(
            (report.node, f"{name} is {value}, on the other nodes {usual}")
            for report, value in zip(reports, values, strict=True)
            if value != usual
        )
    problems += [
        f"node {r.node}: its clock is {r.clock_offset:+.1f} s off the first node's; set it by NTP"
        for r in reports
        if abs(r.clock_offset) > MAX_CLOCK_SKEW
    ]
    return problems


def _grouped(found: Iterable[tuple[str, str]]) -> list[str]:
    """One line for each problem, however many nodes have it."""
    nodes: dict[str, list[str]] = {}
    for node, problem in found:
        nodes.setdefault(problem, []).append(node)
    return [
        f"node{'s' if len(who) > 1 else ''} {', '.join(who)}: {problem}"
        for problem, who in nodes.items()
    ]


def missing(collected: NodeReports, args: _Options) -> list[str]:
    """Nodes that did not report, under Slurm's names where there are some."""
    silent = sorted(set(range(1, args.nodes)) - {r.rank for r in collected.reports})
    if not silent:
        return []
    return [
        f"node {number} of 0 to {args.nodes - 1} ({_name_of(number)}) did not report within "
        f"{args.patience:.0f} s: it cannot reach {args.head} port {args.port}, or it is too slow"
        for number in silent
    ]


def _name_of(number: int) -> str:
    names = os.environ.get("NODE_NAMES", "").split()
    return names[number] if number < len(names) else "name not known"


def _try_configuration(args: _Options, training: list[str]) -> list[str]:
    """Checks settings and opens shards as training will; torch is imported on one node only."""
    from dalr_scale.train import configuration
    from dalr_scale.training.build import build_streams
    from dalr_scale.training.preflight import check_settings

    try:
        config, ranks = configuration(training), args.nodes * args.processes
        check_settings(config, ranks)
        if config.data.builder == "none":
            build_streams(config)
    except UserError as error:
        return [f"node {node_name()}: {error}"]
    return []


def _all_reduce(args: _Options) -> list[str]:
    from dalr_scale.cluster.nccl_check import all_reduce

    failure = all_reduce(args.head, args.port, args.nodes, args.node_rank)
    return [f"node {node_name()}: {failure}"] if failure else []


def _record(run_dir: Path | None, problems: list[str]) -> None:
    """Writes RUN/doctor.json; the job script repeats it in its last lines."""
    if run_dir is None:
        return
    with suppress(OSError):  # reported as a problem already
        write_json(run_dir / "doctor.json", {"problems": problems, **job_identity()})


def _summary(reports: Sequence[NodeReport]) -> str:
    first = reports[0]
    count = "1 node" if len(reports) == 1 else f"{len(reports)} nodes agree"
    skew = max(abs(r.clock_offset) for r in reports)
    clocks = "" if len(reports) == 1 else f", clocks within {skew:.2f} s, port reachable"
    gpus = f"{first.gpus} GPUs a node" if first.gpus else "no GPUs"
    packages = len(first.facts)
    return f"{count}: {packages} versions and files, {first.shards} shards{clocks}, {gpus}"
