"""What a run from a pretrained encoder, over batches that alternate, must not do silently."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from common import history, tiny_config, weights_hash, write_config
from launching import train

from dalr_scale.engines import deepspeed as engine_module
from dalr_scale.errors import UserError
from dalr_scale.models.dalr import DalrModel
from dalr_scale.training import trainer as trainer_module
from dalr_scale.training.build import build_encoder
from dalr_scale.training.trainer import Trainer

NO_EVALUATION = ("--eval.every=0", "--eval.graded_dev=")


@pytest.fixture(scope="module")
def pretrained(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration file of a run that starts from an encoder directory."""
    root = tmp_path_factory.mktemp("pretrained")
    build_encoder(tiny_config(tiny_data)).save(root / "encoder")
    changes = {
        "model.encoder": str(root / "encoder"),
        "model.architecture": {},
        "data.tokenizer": "",
        "optim.steps": 4,
        "save.every_steps": 0,
    }
    return write_config(tiny_config(tiny_data, changes), root / "run.toml")


def test_a_pretrained_encoder_trains_with_dropout_from_the_first_step(
    pretrained: Path, tmp_path: Path
) -> None:
    """No evaluation switches it on in passing, before the run or after a resume."""
    words = [f"--config={pretrained}", *NO_EVALUATION]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train([*words, f"--run.dir={whole}"], tmp_path / "0.log").codes == (0,)
    train([*words, f"--run.dir={parts}"], tmp_path / "1.log", end_at=(2, "STOP"))
    resumed = train([*words, f"--run.dir={parts}"], tmp_path / "2.log")
    assert resumed.codes == (0,), resumed.output
    assert "resumed at step 2" in resumed.output
    assert history(parts) == history(whole)
    assert weights_hash(parts / "final") == weights_hash(whole / "final")

    evaluated = tmp_path / "evaluated"  # as the fault hid: an evaluation first
    train([f"--config={pretrained}", f"--run.dir={evaluated}"], tmp_path / "3.log")
    assert history(evaluated) == history(whole)


def leave_evaluation_mode_on() -> None:
    DalrModel.train = lambda self, mode=True: self  # type: ignore[method-assign]


def test_control_a_model_left_in_evaluation_mode_is_refused(
    pretrained: Path, tmp_path: Path
) -> None:
    words = [f"--config={pretrained}", f"--run.dir={tmp_path / 'run'}", *NO_EVALUATION]
    outcome = train(words, tmp_path / "log", setup=leave_evaluation_mode_on)
    assert outcome.codes == (1,)
    assert "is in evaluation mode" in outcome.output


def leave_old_gradients() -> None:
    """As DeepSpeed does by itself: parameters without a gradient are left out."""

    def name_only(module, optimizer):
        return [n for n, p in module.named_parameters() if p.requires_grad and p.grad is None]

    engine_module.zero_missing_gradients = name_only


@pytest.mark.parametrize(
    "words", [("--engine.kind=zero3",), ("--engine.kind=zero2", "--engine.offload_optimizer=true")]
)
def test_control_a_gradient_of_an_earlier_step_is_refused(
    tiny_data: Path, tmp_path: Path, words: tuple[str, ...]
) -> None:
    file = write_config(tiny_config(tiny_data), tmp_path / "run.toml")
    common = [f"--config={file}", f"--run.dir={tmp_path / 'run'}", *NO_EVALUATION, *words]
    outcome = train(common, tmp_path / "log", setup=leave_old_gradients)
    assert outcome.codes == (1,)
    assert "no term of this text batch reaches" in outcome.output


def test_a_checkpoint_of_two_saves_is_refused(tmp_path: Path) -> None:
    checkpoint = SimpleNamespace(path=tmp_path, state=SimpleNamespace(step=5))
    for steps in (5, None):  # None: saved before engines counted
        ran = SimpleNamespace(engine=SimpleNamespace(steps=steps))
        Trainer._require_same_step(ran, checkpoint)  # type: ignore[arg-type]
    ran = SimpleNamespace(engine=SimpleNamespace(steps=4))
    with pytest.raises(UserError, match="step 5, but its engine state has taken 4 steps"):
        Trainer._require_same_step(ran, checkpoint)  # type: ignore[arg-type]


@pytest.mark.parametrize(("own", "rank_0", "kept"), [(0.5, 0.4, False), (0.4, 0.5, True)])
def test_rank_0_alone_decides_which_encoder_is_best(own: float, rank_0: float, kept: bool) -> None:
    """Scores of two hosts may differ in the last bit, and the export is a collective."""
    exported: list[Path] = []
    ran = SimpleNamespace(
        engine=None,
        world=SimpleNamespace(broadcast_object=lambda _: rank_0),
        suite=SimpleNamespace(score_dev=lambda _: {"dev": own}, select="dev"),
        best_score=0.45,
        best_step=1,
        step=2,
        run_dir=Path("run"),
        export=lambda directory, scores: exported.append(directory),
        _arm=lambda _: None,
    )
    trainer_module.Trainer.evaluate(ran, SimpleNamespace(scores=lambda *_: None))  # type: ignore[arg-type]
    assert bool(exported) is kept
    assert ran.best_score == (rank_0 if kept else 0.45)


@pytest.mark.parametrize(
    ("pooler", "rate", "said"), [("cls_before_pooler", 2e-5, True), ("mean", 1e-3, False)]
)
def test_a_run_that_learns_nothing_says_so(
    tiny_data: Path, tmp_path: Path, pooler: str, rate: float, said: bool
) -> None:
    """A small encoder from scratch that pools by its first token stays at ln N."""
    changes = {
        "objective.preset": "simcse",
        "model.pooler": pooler,
        "optim.lr": rate,
        "optim.steps": 100,
        "save.every_steps": 0,
    }
    file = write_config(tiny_config(tiny_data, changes), tmp_path / "run.toml")
    words = [f"--config={file}", f"--run.dir={tmp_path / 'run'}", *NO_EVALUATION]
    outcome = train(words, tmp_path / "log")
    assert outcome.codes == (0,), outcome.output
    assert ("has not left ln N" in outcome.output) is said
