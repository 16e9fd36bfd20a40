"""The dry run: arithmetic and memory without training or writing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from common import tiny_config, tree, write_config

from dalr_scale.assembly import build_model, build_streams
from dalr_scale.dist.world import World
from dalr_scale.errors import UserError
from dalr_scale.models import dalr as dalr_module
from dalr_scale.models.dalr import DalrModel, TeacherBatch
from dalr_scale.plan import TOKENS, column_widths, main, plan_memory, time_step


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
        "z2 (with gradient)",
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
    assert four.columns == one.columns  # every rank sees the global batch
    assert four.token_features == one.token_features == 24 * 31 * 12 * 4
    assert one.total == sum(vars(one).values())


def test_columns_are_those_of_the_objective(model: DalrModel) -> None:
    widths = column_widths(model, max_length=8)
    assert widths["z2 (with gradient)"] == 16
    assert widths["picture features"] == 20 == widths["z1 for pictures (with gradient)"]
    assert widths["text teachers"] == 12
    assert widths["u (with gradient)"] == 8
    assert widths[TOKENS] == 7 * 12
    assert not any("caption" in name for name in widths)


def test_columns_of_the_caption_branch(tiny_data: Path) -> None:
    changes = {"objective.preset": "kdmcse", "teachers.caption": "features:cap"}
    config = tiny_config(tiny_data, changes)
    world = World(0, 1, torch.device("cpu"))
    widths = column_widths(build_model(config, build_streams(config), world).model, max_length=8)
    assert widths["u of captions (with gradient)"] == widths["u (with gradient)"] == 8
    assert widths["caption features"] == 20
    assert TOKENS not in widths


def test_gathers_are_counted_as_they_are_sent(tiny_data: Path, model: DalrModel) -> None:
    """The planned floats are those of the views that a paired batch really gathers."""
    rows = 4
    teachers = TeacherBatch(
        ids=torch.arange(rows),
        paired=True,
        image=torch.randn(rows, 20),
        text=[torch.randn(rows, 12)],
        tokens=[torch.randn(rows, 7, 12)],
        token_masks=[torch.ones(rows, 7)],
    )
    sent: list[int] = []

    def note(local: torch.Tensor, *, grad: bool = True) -> torch.Tensor:
        if local.is_floating_point():
            sent.append(local[0].numel())
        return local

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dalr_module, "gather_rows", note)
        model.loss(torch.randn(2, rows, 16), teachers, 0, 0)
    sent.remove(7)  # the mask
    assert sorted(sent) == sorted(column_widths(model, max_length=8).values())


def test_no_ranks_are_refused() -> None:
    for ranks in ("0", "-1"):
        with pytest.raises(UserError, match="at least 1 process"):
            main(["--ranks", ranks])


def test_a_step_takes_time(tiny_data: Path, model: DalrModel) -> None:
    assert 0 < time_step(tiny_config(tiny_data, {"data.max_length": 8}), model, 1) < 60
