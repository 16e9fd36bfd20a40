"""Real ranks over gloo against one process that holds the whole batch."""

from __future__ import annotations

import dataclasses
import itertools
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from cases import FAULTS, ROWS, Case, build, run, step_inputs, wanted_cases

from dalr_scale.dist import gradcache
from dalr_scale.dist.gradcache import backward_global_batch
from dalr_scale.dist.world import World, leave_world, start_world

# ZeRO keeps fp32 gradients and master weights whatever the model's precision
TOLERANCE = {"ddp": 1e-10, "zero1": 1e-5, "zero2": 1e-5, "zero3": 1e-5}


def launch(size: int, folder: Path) -> None:
    """Starts `size` processes that run all cases of that world size."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    base = os.environ | {
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    script = str(Path(__file__).with_name("worker.py"))
    ranks = [
        subprocess.Popen(
            [sys.executable, script, str(folder)],
            env=base | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(size)
    ]
    try:
        outputs = [process.communicate(timeout=400)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    for process, output in zip(ranks, outputs, strict=True):
        assert process.returncode == 0, output[-3000:]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Results of world sizes 2 and 4, one launch each."""
    folders = {}
    for size in (2, 4):
        folders[size] = tmp_path_factory.mktemp(f"world{size}")
        launch(size, folders[size])
    return folders


@pytest.fixture(scope="module")
def world() -> object:
    world = start_world(timeout_minutes=2, threads=1)
    yield world
    leave_world()


_references: dict[Case, dict[str, np.ndarray]] = {}


def reference(case: Case, world: World) -> dict[str, np.ndarray]:
    """One process, float64, the whole batch in one chunk."""
    plain = dataclasses.replace(case, kind="ddp", micro=0, fault="")
    if plain not in _references:
        _references[plain] = run(plain, world)
    return _references[plain]


def difference(results: dict[str, np.ndarray], truth: dict[str, np.ndarray]) -> float:
    """Largest max|difference| / max|value| of any array; tiny arrays count absolutely."""
    assert results.keys() >= truth.keys()
    return max(
        float(np.abs(results[k] - v).max() / max(np.abs(v).max(), 1e-3)) for k, v in truth.items()
    )


def load(folder: Path, case: Case) -> dict[str, np.ndarray]:
    with np.load(folder / f"{case.name}.npz") as stored:
        return dict(stored)


CASES = [(size, case) for size in (2, 4) for case in wanted_cases(size) if not case.fault]


@pytest.mark.parametrize(("size", "case"), CASES, ids=[f"{s}-{c.name}" for s, c in CASES])
def test_ranks_equal_one_process(
    size: int, case: Case, folders: dict[int, Path], world: World
) -> None:
    """Losses, gradient norms and the weights after three steps."""
    assert difference(load(folders[size], case), reference(case, world)) < TOLERANCE[case.kind]


@pytest.mark.parametrize("case", FAULTS, ids=lambda c: c.name)
def test_control_each_guarantee_is_needed(
    case: Case, folders: dict[int, Path], world: World
) -> None:
    """With one guarantee off the same comparison fails, by far."""
    assert difference(load(folders[2], case), reference(case, world)) > 1e-3


def gradients(case: Case, world: World, *, one_graph: bool) -> dict[str, torch.Tensor]:
    """Parameter gradients of one step with dropout: in two passes, or with all chunks alive."""
    engine, config = build(case, world)
    inputs = step_inputs(case, config, world, step=0)
    if not one_graph:
        backward_global_batch(engine, inputs)
    else:
        chunks = list(enumerate(gradcache._chunks(ROWS, case.micro)))
        pieces = [gradcache._encode(engine, inputs, i, chunk, grad=True) for i, chunk in chunks]
        states = torch.cat(pieces, dim=1)
        with engine.gradients():
            loss, _ = engine.forward(
                "loss", states=states, teachers=inputs.teachers, step=0, offset=0
            )
            engine.backward(loss)
    return {name: p.grad.clone() for name, p in engine.module.named_parameters()}


def worst(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return max(
        float((one[k] - other[k]).abs().max() / other[k].abs().max().clamp(min=1e-6)) for k in one
    )


def test_the_second_pass_draws_the_dropout_of_the_first(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two passes over chunks equal one graph over the same chunks, dropout on."""
    case = Case("dalr", "ddp", micro=5, dropout=0.3)
    truth = gradients(case, world, one_graph=True)
    assert worst(gradients(case, world, one_graph=False), truth) < 1e-10
    calls = itertools.count()
    plain = gradcache.seed_dropout
    monkeypatch.setattr(gradcache, "seed_dropout", lambda *key: plain(*key, next(calls)))
    assert worst(gradients(case, world, one_graph=False), truth) > 1e-3  # control: other masks
