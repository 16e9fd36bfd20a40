"""The check before training: nodes that differ, cannot see, cannot write or cannot be reached."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from common import tiny_config, write_config

from dalr_scale.cli import main as command
from dalr_scale.cluster.node_report import NodeReport
from dalr_scale.cluster.rendezvous import collect_reports
from dalr_scale.commands.doctor import compare


@pytest.fixture(scope="module")
def recipe(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("recipe")
    return f"--config={write_config(tiny_config(tiny_data), directory / 'tiny.toml')}"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Nodes:
    """Processes that play the nodes n1, n2, ... of a job."""

    def __init__(self, directory: Path, recipe: str) -> None:
        self.directory, self.recipe, self.port = directory, recipe, free_port()
        self.processes: list[subprocess.Popen[str]] = []

    def start(
        self,
        rank: int,
        *training: str,
        nodes: int = 2,
        patience: float = 30,
        run: str = "run",
        **environment: str,
    ) -> None:
        words = [sys.executable, "-m", "dalr_scale", "doctor", f"--nodes={nodes}"]
        words += [f"--node-rank={rank}", f"--port={self.port}", f"--patience={patience}"]
        words += [f"--run-dir={self.directory / run}", "--", self.recipe, *training]
        # a restarted job: the configuration was tried before
        own = {"SLURMD_NODENAME": f"n{rank + 1}", "SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}
        own |= {"NODE_NAMES": "n1 n2"}
        process = subprocess.Popen(
            words,
            env=os.environ | own | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.processes.append(process)

    def ends(self) -> list[tuple[int, str]]:
        """Exit status and output of each, in the order in which they were started."""
        outputs = [process.communicate(timeout=100)[0] for process in self.processes]
        return [(p.returncode, out) for p, out in zip(self.processes, outputs, strict=True)]


@pytest.fixture
def nodes(tmp_path: Path, recipe: str) -> Nodes:
    (tmp_path / "run").mkdir()
    return Nodes(tmp_path, recipe)


def problems_of(nodes: Nodes) -> list[str]:
    return json.loads((nodes.directory / "run" / "doctor.json").read_text())["problems"]


def test_equal_nodes_pass(nodes: Nodes) -> None:
    nodes.start(1)  # before there is anybody to connect to
    time.sleep(0.5)
    nodes.start(0, SLURM_RESTART_COUNT="0")  # with a look into the shards
    (second, _), (first, output) = nodes.ends()
    assert (first, second) == (0, 0), output
    assert "doctor: 2 nodes agree" in output and "3 shards" in output
    assert "port reachable" in output and problems_of(nodes) == []
    assert not list((nodes.directory / "run").glob(".doctor*"))


def test_another_version_is_named_with_its_node(nodes: Nodes) -> None:
    info = nodes.directory / "torch-0.0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 0.0.1\n")
    nodes.start(0, nodes=3)
    nodes.start(1, nodes=3)
    path = f"{nodes.directory}:{os.environ.get('PYTHONPATH', '')}"
    nodes.start(2, nodes=3, PYTHONPATH=path)
    ends = nodes.ends()
    assert [code for code, _ in ends] == [1, 1, 1]
    (problem,) = problems_of(nodes)
    assert problem.startswith("node n3: torch is 0.0.1, on the other nodes ")
    assert ends[0][1].splitlines()[-1] == f"doctor: {problem}"


@pytest.mark.parametrize(
    ("word", "wanted"),
    [
        ("--optim.lr_rate=1", "unknown key in [optim] 'lr_rate'"),
        ("--batch.global_size=25", "batch.global_size = 25 cannot be cut into equal shares for 2"),
    ],
)
def test_one_line_for_a_mistake_that_all_nodes_see(word: str, wanted: str, nodes: Nodes) -> None:
    for rank in (0, 1):
        nodes.start(rank, word)
    assert [code for code, _ in nodes.ends()] == [1, 1]
    (problem,) = problems_of(nodes)
    assert problem.startswith(f"nodes n1, n2: {wanted}")


def test_a_directory_that_is_not_shared(nodes: Nodes) -> None:
    nodes.start(0)
    nodes.start(1, run="elsewhere")
    assert [code for code, _ in nodes.ends()] == [1, 1]
    found = "\n".join(problems_of(nodes))
    assert "node n2: the output directory" in found and "not shared with the first node" in found


def test_a_directory_that_cannot_be_written(nodes: Nodes) -> None:
    (nodes.directory / "file").write_text("x")
    nodes.start(0)
    nodes.start(1, run="file/run")
    assert [code for code, _ in nodes.ends()] == [1, 1]
    assert any(
        "n2: the output directory" in p and "cannot be written" in p for p in problems_of(nodes)
    )


def test_a_silent_node_is_named(nodes: Nodes) -> None:
    nodes.start(0, patience=2)
    ((code, output),) = nodes.ends()
    assert code == 1
    assert "node 1 of 0 to 1 (n2) did not report within 2 s" in output


def test_a_first_node_that_cannot_be_reached(nodes: Nodes) -> None:
    nodes.start(1, "--data.pairs=/none/x.tar", patience=1)
    ((code, output),) = nodes.ends()
    assert code == 1
    assert f"node n2 cannot reach the first node at 127.0.0.1 port {nodes.port}" in output
    assert "node n2: " in output.splitlines()[-1] and "/none/x.tar" in output.splitlines()[-1]


def test_a_stranger_on_the_port_is_no_node(nodes: Nodes) -> None:
    """Whatever it says, it is not counted, and the real node is still heard."""
    nodes.start(0)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            with socket.create_connection(("127.0.0.1", nodes.port), timeout=1) as stranger:
                stranger.sendall(b'{"node": 3}\n' + b"\xff" * 100 + b"\n")
                break
        except OSError:
            time.sleep(0.1)
    nodes.start(1)
    assert [code for code, _ in nodes.ends()] == [0, 0]


def test_a_taken_port_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        assert command(["doctor", "--nodes=2", f"--port={port}", f"--run-dir={tmp_path}"]) == 2
    assert f"cannot listen on port {port}" in capsys.readouterr().err


def test_alone_it_checks_this_machine(
    tmp_path: Path, recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["doctor", f"--run-dir={tmp_path}", "--", recipe]
    assert command([*words, "--batch.global_size=25", "--batch.micro_size=26"]) == 1
    assert "micro_size = 26 does not fit" in capsys.readouterr().err
    assert command(words) == 0
    assert "doctor: 1 node: " in capsys.readouterr().out


def report(node: str, offset: float = 0.0, **facts: str) -> NodeReport:
    return NodeReport(node, 0, dict(facts), [], clock_offset=offset)


def test_clocks_and_majorities() -> None:
    assert compare([report("n1", torch="2"), report("n2", torch="2", offset=1.9)]) == []
    skew = compare([report("n1"), report("n2", offset=-7.25)])
    assert skew == ["node n2: its clock is -7.2 s off the first node's; set it by NTP"]
    odd = [report("n1", torch="1"), *(report(f"n{k}", torch="2") for k in range(2, 6))]
    assert compare(odd) == ["node n1: torch is 1, on the other nodes 2"]


def test_a_clock_that_differs_is_measured(tmp_path: Path) -> None:
    """A node whose clock is an hour ahead, played over the real connection."""
    port = free_port()
    script = (
        "import time, sys; real = time.time; time.time = lambda: real() + 3600\n"
        "from pathlib import Path\n"
        "from dalr_scale.cluster.rendezvous import send_report\n"
        "from dalr_scale.cluster.node_report import NodeReport\n"
        "send_report('127.0.0.1', int(sys.argv[1]), NodeReport('n2', 1), Path(sys.argv[2]), 20)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(port), str(tmp_path)])
    with collect_reports(port, 2, tmp_path, 20) as collected:
        (found,) = collected.reports
        collected.release(False)
    assert process.wait(timeout=20) == 0
    assert found.clock_offset == pytest.approx(3600, abs=2) and found.problems == []
    assert len(compare([report("n1"), found])) == 1
