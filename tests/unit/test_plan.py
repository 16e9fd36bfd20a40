"""The dry run: arithmetic and memory without training or writing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from common import tiny_config, tree, write_config
from dalr_kernels import chunked

from dalr_scale.assembly import build_model, build_streams
from dalr_scale.config import Config, build_config
from dalr_scale.dist.world import World
from dalr_scale.errors import UserError
from dalr_scale.models.dalr import DalrModel, FeatureWidths, LossSpec
from dalr_scale.plan import main, time_step
from dalr_scale.predict import (
    TRIAL_WORKSPACE,
    LiveBytes,
    column_wires,
    loss_bytes_per_row,
    plan_memory,
    random_teachers,
)


@pytest.fixture(scope="module")
def model(tiny_data: Path) -> DalrModel:
    config = tiny_config(tiny_data)
    world = World(0, 1, torch.device("cpu"))
    return build_model(config, build_streams(config), world).model


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


def wires(config: Config, *, paired: bool = True) -> dict[str, tuple[int, int]]:
    world = World(0, 1, torch.device("cpu"))
    model = build_model(config, build_streams(config), world).model
    return {w.name: (w.out, w.back) for w in column_wires(config, model, paired=paired)}


def test_columns_are_those_of_the_objective(tiny_data: Path) -> None:
    found = wires(tiny_config(tiny_data))
    assert found["z2"] == (4 * 16, 4 * 16)
    assert found["pictures"] == (2 * 20, 0)  # float16, as stored; nothing comes back
    assert found["text teachers"] == (2 * 12, 0)
    assert found["u"] == (4 * 8, 4 * 8)
    assert found["z1 for token teachers"] == (4 * 12 + 4, 4 * 14)  # no token travels
    assert not any("caption" in name for name in found)
    assert set(wires(tiny_config(tiny_data), paired=False)) == {"z2", "row numbers"}


def test_columns_of_the_caption_branch(tiny_data: Path) -> None:
    changes = {"objective.preset": "kdmcse", "teachers.caption": "features:cap"}
    found = wires(tiny_config(tiny_data, changes))
    assert found["u of captions"] == found["u"] == (4 * 8, 4 * 8)
    assert found["captions"] == (2 * 20, 0)
    assert not any("token" in name for name in found)


# What no design avoids at BERT-base's widths with two teachers, bytes a row: 16 bits out, float32
# gradients back; z2, u, pictures, teachers, and z1 on its visit to the teachers' tokens.
FLOORS = {
    "simcse": 768 * (2 + 4),
    "mcse": 768 * (2 + 4) + 256 * (2 + 4),
    "dalr": 768 * (2 + 4) + 256 * (2 + 4) + 768 * 2 + 2 * 768 * 2 + 768 * (2 + 4),
}


@pytest.mark.parametrize("preset", FLOORS)
def test_columns_cost_no_more_than_they_must(preset: str) -> None:
    """Within 5 % of the floor; what is above it are the aligned pictures and a few scalars."""
    teachers = {"image": "features:i", "text": ["features:a", "features:b"]}
    layer = {"objective": {"preset": preset}, "engine": {"precision": "bf16"}, "teachers": teachers}
    config = build_config([layer | {"data": {"pairs": ["any"]}}])
    encoder = torch.nn.Module()
    encoder.width = 768  # type: ignore[assignment]
    widths = FeatureWidths(768, 768, (768, 768), (768,))
    spec = LossSpec(config.objective, (0.33, 0.67))
    with torch.device("meta"):
        model = DalrModel(encoder, config.model, spec, widths)  # type: ignore[arg-type]
    cost = sum(w.out + w.back for w in column_wires(config, model))
    assert FLOORS[preset] <= cost <= 1.05 * FLOORS[preset]


def test_half_precision_halves_what_goes_out_not_what_comes_back(tiny_data: Path) -> None:
    found = wires(tiny_config(tiny_data, {"engine.precision": "bf16"}))
    assert found["z2"] == (2 * 16, 4 * 16)


@pytest.mark.parametrize("preset", ["simcse", "mcse", "dalr"])
def test_the_memory_of_a_loss_pass_is_linear_in_its_rows(preset: str, tiny_data: Path) -> None:
    """The cost of a row, measured on two small batches, is that of a larger one."""
    config = tiny_config(tiny_data, {"objective.preset": preset})
    world = World(0, 1, torch.device("cpu"))
    model = build_model(config, build_streams(config), world).model
    per_row = loss_bytes_per_row(model)
    peaks = []
    with chunked.limited_workspace(TRIAL_WORKSPACE):
        for rows in (96, 288):
            states = torch.randn(2, rows, 16).requires_grad_()
            teachers = random_teachers(model, rows, paired=True)
            with LiveBytes() as live:
                model.loss(states, teachers, step=0, offset=0)[0].backward()
            peaks.append(live.peak)
    slope = (peaks[1] - peaks[0]) / 192 + 2 * 16 * 4
    assert per_row == pytest.approx(slope, rel=0.1)


def test_no_ranks_are_refused() -> None:
    for ranks in ("0", "-1"):
        with pytest.raises(UserError, match="at least 1 process"):
            main(["--ranks", ranks])


def test_a_step_takes_time(tiny_data: Path, model: DalrModel) -> None:
    assert 0 < time_step(tiny_config(tiny_data, {"data.max_length": 8}), model, 1) < 60
