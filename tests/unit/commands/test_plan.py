"""The dry run: arithmetic and memory without training or writing."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from common import tiny_config, tree, write_config
from dalr_kernels.eager import chunked

from dalr_scale.commands.plan import main, time_step
from dalr_scale.config import Config, build_config
from dalr_scale.distributed.world import World
from dalr_scale.errors import UserError
from dalr_scale.estimate import predict
from dalr_scale.estimate.predict import (
    TRIAL_WORKSPACE,
    LiveBytes,
    column_transfers,
    loss_bytes_per_row,
    parameter_traffic,
    plan_memory,
    random_batch,
)
from dalr_scale.models import dalr
from dalr_scale.models.dalr import DalrModel, FeatureWidths, LossSpec
from dalr_scale.training.build import build_model, build_streams


@pytest.fixture(scope="module")
def model(tiny_data: Path) -> DalrModel:
    config = tiny_config(tiny_data)
    world = World(0, 1, torch.device("cpu"))
    return build_model(config, build_streams(config), world).model


@pytest.fixture
def no_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves out the measured part of a plan, for tests of its arithmetic."""
    monkeypatch.setattr(predict, "loss_bytes_per_row", lambda model, *, paired: 0)


def test_plan_prints_the_numbers_and_writes_nothing(
    tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = write_config(tiny_config(tiny_data, {"batch.micro_size": 5}), tmp_path / "own.toml")
    build_streams(tiny_config(tiny_data))  # missing indexes are built on first use
    before = tree(tmp_path), tree(tiny_data)
    assert main(["--config", str(path), "--ranks", "2"]) == 0
    shown = capsys.readouterr().out
    for text in (
        "24 rows",
        "2 x 12",
        "3 of up to 5 rows",
        "170, 7",
        "144, 6",
        "12 (7 + 5)",
        "predicted memory",
        "text 2, pairs 0",
        "text 1.00, pairs 0.83",
        "zero2, fp32",
        "token features",
        "s a step",
    ):
        assert text in shown, text
    assert (tree(tmp_path), tree(tiny_data)) == before


@pytest.mark.usefixtures("no_trial")
def test_sharding_divides_what_it_says(tiny_data: Path, model: DalrModel) -> None:
    parameters = sum(p.numel() for p in model.parameters())

    def plan(kind: str, ranks: int):
        return plan_memory(tiny_config(tiny_data, {"engine.kind": kind}), model, ranks)

    assert plan("ddp", 4).optimizer == 8 * parameters
    assert plan("zero1", 4).optimizer == 12 * parameters // 4
    assert plan("zero2", 4).weights == 4 * parameters
    assert plan("zero3", 4).weights == parameters
    one, four = plan("zero2", 1), plan("zero2", 4)
    assert four.cached_states == one.cached_states // 4
    assert (one.columns, four.columns > 0) == (0, True)  # the rows themselves are the columns
    assert four.token_features == one.token_features // 4 == 24 // 4 * 31 * 12 * 4
    assert one.total == sum(vars(one).values())


Bytes = dict[str, int]
# Bytes a parameter on 4 ranks: weights, gradients (with what sums and averages them), optimizer
# times ranks; engines in chunks, AdamW.
STATES: dict[tuple[str, str], Bytes] = {
    ("ddp", "fp32"): {"weights": 4, "gradients": 8, "optimizer": 8},
    ("ddp", "bf16"): {"weights": 4, "gradients": 8, "optimizer": 8},  # autocast only
    ("ddp", "fp64"): {"weights": 8, "gradients": 16, "optimizer": 16},
    ("zero2", "fp32"): {"weights": 4, "gradients": 4, "optimizer": 3},
    ("zero2", "bf16"): {"weights": 2, "gradients": 6, "optimizer": 3},
    ("zero3", "bf16"): {"weights": 2, "gradients": 6, "optimizer": 3},
}


@pytest.mark.usefixtures("no_trial")
@pytest.mark.parametrize(("kind", "precision"), STATES)
def test_states_in_each_engine_and_precision(
    kind: str, precision: str, tiny_data: Path, model: DalrModel
) -> None:
    changes = {"engine.kind": kind, "engine.precision": precision, "batch.micro_size": 3}
    plan = plan_memory(tiny_config(tiny_data, changes), model, 4)
    parameters = sum(p.numel() for p in model.parameters())
    expected = {name: each * parameters for name, each in STATES[kind, precision].items()}
    expected["weights"] //= 4 if kind == "zero3" else 1
    assert {name: getattr(plan, name) for name in expected} == expected
    number = 8 if precision == "fp64" else 2 if precision == "bf16" and kind != "ddp" else 4
    assert plan.cached_states == 6 * 4 * 16 * number  # rows, two views with gradients, width


@pytest.mark.usefixtures("no_trial")
def test_one_chunk_needs_no_sum_and_one_rank_no_copy(tiny_data: Path, model: DalrModel) -> None:
    parameters = sum(p.numel() for p in model.parameters())
    changes = {"engine.precision": "bf16"}
    assert plan_memory(tiny_config(tiny_data, changes), model, 4).gradients == 2 * parameters
    changes = {"engine.kind": "ddp"}
    assert plan_memory(tiny_config(tiny_data, changes), model, 1).gradients == 4 * parameters


@pytest.mark.usefixtures("no_trial")
def test_an_offloaded_optimizer_is_not_on_the_device(tiny_data: Path, model: DalrModel) -> None:
    config = tiny_config(tiny_data, {"engine.offload_optimizer": True})
    on = {d: plan_memory(config, model, 2, torch.device(d)).optimizer for d in ("cpu", "cuda")}
    assert on == {"cpu": 12 * sum(p.numel() for p in model.parameters()) // 2, "cuda": 0}
    sgd = tiny_config(tiny_data, {"engine.kind": "ddp", "optim.name": "sgd"})
    assert plan_memory(sgd, model, 1).optimizer == 0


def test_columns_and_vectors_follow_the_precision(tiny_data: Path, model: DalrModel) -> None:
    """A column is held as it came, widened if it had 16 bits, of unit length, with gradient."""

    def plan(kind: str, precision: str, preset: str = "dalr"):
        changes = {"engine.kind": kind, "engine.precision": precision, "objective.preset": preset}
        return plan_memory(tiny_config(tiny_data, changes), model, 2)

    assert plan("ddp", "bf16").columns == plan("ddp", "fp32").columns
    assert plan("ddp", "fp64").loss_vectors == 2 * plan("ddp", "fp32").loss_vectors
    config = tiny_config(tiny_data, {"objective.preset": "simcse"})
    alone = build_model(config, build_streams(config), World(0, 1, torch.device("cpu"))).model
    held = {"fp32": 3 * 4, "bf16": 2 + 3 * 4, "fp64": 3 * 8}  # bytes of a number of z2
    for precision, each in held.items():
        kind = "ddp" if precision == "fp64" else "zero2"
        changes = {"engine.kind": kind, "engine.precision": precision}
        found = plan_memory(
            tiny_config(tiny_data, changes | {"objective.preset": "simcse"}), alone, 2
        )
        assert found.columns == 12 * (16 * each + 16)  # and row numbers


@pytest.mark.usefixtures("no_trial")
@pytest.mark.parametrize("preset", ["simcse", "mcse", "kdmcse", "dalr"])
def test_the_batch_is_what_a_step_holds(preset: str, tiny_data: Path) -> None:
    changes = {"objective.preset": preset, "teachers.caption": "features:cap"}
    config = tiny_config(tiny_data, changes)
    model = build_model(config, build_streams(config), World(0, 1, torch.device("cpu"))).model
    rows, length = config.batch.global_size, config.data.max_length
    batch = random_batch(model, rows, paired=True)
    tokens = model.widths.tokens if model.spec.needs.tokens else ()
    batch.token_features = [torch.zeros(rows, length - 1, width) for width in tokens]
    batch.token_masks = [torch.ones(rows, length - 1, dtype=torch.bool) for _ in tokens]
    held: list = [torch.zeros(2, rows, length, dtype=torch.long), batch.image_ids, *batch.text]
    held += [*batch.token_masks, batch.image, batch.caption]
    plan = plan_memory(config, model, 1)
    assert plan.batch == sum(t.nbytes for t in held if t is not None)
    assert plan.token_features == sum(t.nbytes for t in batch.token_features)
    stored = [t for t in (*batch.text, batch.image, batch.caption) if t is not None]
    assert plan.loaded_features == sum(4 * t.numel() for t in stored)


@pytest.mark.parametrize(
    ("device", "shown"),
    [
        ("cuda", ("cuda (as asked for), bf16", "zero2, bf16")),
        ("cpu", ("cpu (as asked for), fp32", "zero2, fp32")),
    ],
)
def test_a_login_node_plans_for_another_device(
    device: str, shown: tuple[str, ...], tiny_data: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    path = write_config(tiny_config(tiny_data), tmp_path / "own.toml")
    assert main(["--config", str(path), "--device", device, "--no-timing"]) == 0
    printed = capsys.readouterr().out
    assert all(text in printed for text in shown), printed
    workspace = {"cpu": 256, "cuda": 1024}[device]
    line = next(line for line in printed.splitlines() if "workspace" in line)
    assert float(line.split()[-1].replace(",", "")) == workspace, line


def test_a_run_has_the_same_steps_at_any_number_of_ranks(
    tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """170 sentences are 7 batches and a last one of 2 rows, which `simcse` keeps."""
    settings = {"objective.preset": "simcse", "objective.tail": "keep", "data.pairs": []}
    settings |= {"optim.steps": 0, "optim.epochs": 3.0}
    path = write_config(tiny_config(tiny_data, settings), tmp_path / "own.toml")
    lines = []
    for ranks in (1, 2, 3):
        assert main(["--config", str(path), "--no-timing", f"--ranks={ranks}"]) == 0
        printed = capsys.readouterr().out.splitlines()
        lines.append(next(line for line in printed if "steps (text + paired)" in line))
    assert "24 (24 + 0)" in lines[0]
    assert len(set(lines)) == 1


def transfers(config: Config, *, paired: bool = True) -> dict[str, tuple[int, int]]:
    world = World(0, 1, torch.device("cpu"))
    model = build_model(config, build_streams(config), world).model
    return {w.name: (w.out, w.back) for w in column_transfers(config, model, paired=paired)}


def test_columns_are_those_of_the_objective(tiny_data: Path) -> None:
    found = transfers(tiny_config(tiny_data))
    assert found["z2"] == (4 * 16, 4 * 16)
    assert found["images"] == (2 * 20, 0)  # float16, as stored; nothing comes back
    assert found["text teachers"] == (2 * 12, 0)
    assert found["u"] == (4 * 8, 4 * 8)
    assert found["z1 for token teachers"] == (4 * 12 + 4, 4 * 14)  # no token travels
    assert not any("caption" in name for name in found)
    assert set(transfers(tiny_config(tiny_data), paired=False)) == {"z2", "row numbers"}


def test_columns_of_the_caption_branch(tiny_data: Path) -> None:
    changes = {"objective.preset": "kdmcse", "teachers.caption": "features:cap"}
    found = transfers(tiny_config(tiny_data, changes))
    assert found["u of captions"] == found["u"] == (4 * 8, 4 * 8)
    assert found["captions"] == (2 * 20, 0)
    assert not any("token" in name for name in found)


# What no design avoids at BERT-base's widths with two teachers, bytes a row: 16 bits out, float32
# gradients back; z2, u, images, teachers, and z1 on its visit to the teachers' tokens.
FLOORS = {
    "simcse": 768 * (2 + 4),
    "mcse": 768 * (2 + 4) + 256 * (2 + 4),
    "dalr": 768 * (2 + 4) + 256 * (2 + 4) + 768 * 2 + 2 * 768 * 2 + 768 * (2 + 4),
}


@pytest.mark.parametrize("preset", FLOORS)
def test_columns_cost_no_more_than_they_must(preset: str) -> None:
    """Within 5 % of the floor; what is above it are the aligned images and a few scalars."""
    teachers = {"image": "features:i", "text": ["features:a", "features:b"]}
    layer = {"objective": {"preset": preset}, "engine": {"precision": "bf16"}, "teachers": teachers}
    config = build_config([layer | {"data": {"pairs": ["any"]}}])
    encoder = torch.nn.Module()
    encoder.width = 768  # type: ignore[assignment]
    widths = FeatureWidths(768, 768, (768, 768), (768,))
    spec = LossSpec(config.objective, (0.33, 0.67))
    with torch.device("meta"):
        model = DalrModel(encoder, config.model, spec, widths)  # type: ignore[arg-type]
    cost = sum(w.out + w.back for w in column_transfers(config, model))
    assert FLOORS[preset] <= cost <= 1.05 * FLOORS[preset]


def test_half_precision_halves_what_goes_out_not_what_comes_back(tiny_data: Path) -> None:
    found = transfers(tiny_config(tiny_data, {"engine.precision": "bf16"}))
    assert found["z2"] == (2 * 16, 4 * 16)
    on_ddp = transfers(tiny_config(tiny_data, {"engine.precision": "bf16", "engine.kind": "ddp"}))
    assert on_ddp["z2"] == (4 * 16, 4 * 16)  # heads outside of autocast return float32
    exact = transfers(tiny_config(tiny_data, {"engine.precision": "fp64", "engine.kind": "ddp"}))
    assert exact["z2"] == (8 * 16, 8 * 16)


@pytest.mark.parametrize(
    ("kind", "precision", "each"),
    [("ddp", "bf16", 4), ("ddp", "fp64", 8), ("zero1", "bf16", 2), ("zero2", "fp32", 4)],
)
def test_parameters_travel_in_the_precision_they_are_kept_in(
    kind: str, precision: str, each: int, tiny_data: Path, model: DalrModel
) -> None:
    config = tiny_config(tiny_data, {"engine.kind": kind, "engine.precision": precision})
    parameters = sum(p.numel() for p in model.parameters())
    assert parameter_traffic(config, model, 2) == 2 * parameters * each / 2


def row_costs(model: DalrModel) -> tuple[float, float]:
    """Bytes of a row of a loss pass: as predicted, and between 96 and 448 rows.

    That many, because with more of them the workspace holds one row at a time.
    """
    predicted, peaks = loss_bytes_per_row(model), []
    with chunked.limited_workspace(TRIAL_WORKSPACE):
        for rows in (96, 448):
            states = [torch.randn(rows, 16).requires_grad_() for _ in range(2)]
            batch = random_batch(model, rows, paired=True)
            with LiveBytes() as live:
                model.loss(states, batch, step=0, offset=0)[0].backward()
            peaks.append(live.peak)
    return predicted, (peaks[1] - peaks[0]) / 352 + 2 * 16 * 4


@pytest.mark.parametrize("preset", ["simcse", "mcse", "dalr"])
def test_the_memory_of_a_loss_pass_is_linear_in_its_rows(preset: str, tiny_data: Path) -> None:
    """The cost of a row, measured on two small batches, is that of a larger one."""
    config = tiny_config(tiny_data, {"objective.preset": preset})
    world = World(0, 1, torch.device("cpu"))
    predicted, measured = row_costs(build_model(config, build_streams(config), world).model)
    assert measured == pytest.approx(predicted, rel=0.1)


def test_control_a_matrix_of_all_pairs_is_not_linear(
    model: DalrModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = dalr.batch_loss

    def keeping_all_pairs(objective, batch):
        loss = plain(objective, batch)
        pairs = (batch.rows.z1 @ batch.cols.z2.T).exp()  # in the graph until the backward pass
        return dataclasses.replace(loss, total=loss.total + 0.0 * pairs.sum())

    monkeypatch.setattr(dalr, "batch_loss", keeping_all_pairs)
    predicted, measured = row_costs(model)
    assert measured > 1.2 * predicted


def test_no_ranks_are_refused() -> None:
    for ranks in ("0", "-1"):
        with pytest.raises(UserError, match="at least 1 process"):
            main(["--ranks", ranks])


def test_a_step_takes_time(tiny_data: Path, model: DalrModel) -> None:
    assert 0 < time_step(tiny_config(tiny_data, {"data.max_length": 8}), model, 1) < 60
