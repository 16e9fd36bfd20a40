"""Training as a user meets it: interrupted, resumed, repeated, on several ranks.

Two runs are the same when every step has the same stream, item ids and loss (to the last bit) and
the final weights have the same SHA-256.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from common import (
    curves,
    history,
    records,
    reports,
    status,
    tiny_config,
    tree,
    weights_hash,
    write_config,
)
from launching import Outcome, accelerate, train
from safetensors.torch import load_file

from dalr_scale.config import load_config
from dalr_scale.data.shards.features_store import open_features
from dalr_scale.training.build import build_encoder, build_streams

STEPS = 12
DRAWN = "--log.tensorboard=true"
Launch = Callable[..., Outcome]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("train")


@pytest.fixture(scope="module")
def launch(tiny_data: Path, directory: Path) -> Launch:
    """``launch("run name", "--section.key=value", ...)``; all runs share one configuration."""
    file = write_config(tiny_config(tiny_data), directory / "tiny.toml")

    def run(name: str, *words: str, **options) -> Outcome:
        number = len(list(directory.glob("*.log")))
        log = directory / f"{number:02}-{name}.log"
        return train([f"--config={file}", f"--run.dir={directory / name}", *words], log, **options)

    return run


@pytest.fixture(scope="module")
def reference(launch: Launch, directory: Path) -> Path:
    """An uninterrupted run: ZeRO-2, dropout on, both streams, all seven terms."""
    outcome = launch("reference", DRAWN)
    assert outcome.codes == (0,), outcome.output
    return directory / "reference"


@pytest.fixture(scope="module")
def interrupted(launch: Launch, directory: Path) -> dict[str, Any]:
    """The same run, interrupted four times.

    By a kill before its first checkpoint, a STOP file, a signal, and a kill inside a save.
    """
    run, copy = directory / "interrupted", directory / "copy"
    early = {"DALR_FAULT": "save:before-tmp@3"}  # before the first checkpoint: all begins again
    outcomes: dict[str, Any] = {
        "early": launch("interrupted", DRAWN, end_at=(3, "STOP"), environment=early)
    }
    (run / "STOP").unlink(missing_ok=True)
    outcomes["stop"] = launch("interrupted", DRAWN, end_at=(3, "STOP"))
    outcomes["stop status"] = status(run)
    shutil.copytree(run, copy)  # for the controls
    outcomes["signal"] = launch("interrupted", DRAWN, end_at=(6, "SIGTERM"))
    outcomes["signal status"] = status(run)
    fault = {"DALR_FAULT": "save:before-rename@10"}
    outcomes["kill"] = launch("interrupted", DRAWN, environment=fault)
    outcomes["kill steps"] = sorted(p.name for p in (run / "checkpoints").iterdir())
    outcomes["end"] = launch("interrupted", DRAWN)
    return outcomes


# One process


def test_a_run_leaves_what_it_promises(reference: Path) -> None:
    assert [r["step"] for r in records(reference)] == list(range(1, STEPS + 1))
    kinds = {r["stream"]: set(r) for r in records(reference)}
    terms = {"con", "cons", "cma", "xce", "ima", "rank", "g2l"}
    assert terms & kinds["text"] == {"con"} and terms <= kinds["pair"]
    assert [r["step"] for r in records(reference, "scores")] == [0, 4, 8, 12]
    assert status(reference)["outcome"] == "finished" and status(reference)["step"] == STEPS
    assert (reference / status(reference)["checkpoint"] / "manifest.json").is_file()
    steps = {p.name for p in (reference / "checkpoints").iterdir()}
    assert steps == {"step-10", "step-12"}
    result = json.loads((reference / "result.json").read_text())
    assert set(result["trained"]) == {"graded-dev"} == set(result["untrained"])
    assert load_config(str(reference)).optim.steps == STEPS
    clipping = json.loads((reference / "ds_config.json").read_text())["gradient_clipping"]
    assert clipping == 1.0
    for name in ("best", "final"):
        assert (reference / name / "model.safetensors").is_file()


def test_each_end_is_recorded_for_what_it_was(interrupted: dict, directory: Path) -> None:
    assert interrupted["stop"].codes == interrupted["signal"].codes == (0,)
    stop, signal = interrupted["stop status"], interrupted["signal status"]
    assert (stop["outcome"], stop["step"]) == ("stopped", 3)
    assert (signal["outcome"], signal["step"]) == ("preempted", 6)
    assert stop["checkpoint"] == "checkpoints/step-3"
    assert "stopped at step 3 (STOP file); run the same command" in interrupted["stop"].output
    assert interrupted["kill"].codes == (-9,)
    assert ".tmp-step-10" in interrupted["kill steps"] and "step-6" in interrupted["kill steps"]
    assert "step-10" not in interrupted["kill steps"]
    assert interrupted["end"].codes == (0,)
    assert "resumed at step 6" in interrupted["end"].output
    assert not (directory / "interrupted" / "STOP").exists()


def test_an_interrupted_run_is_the_uninterrupted_one(
    reference: Path, interrupted: dict, directory: Path
) -> None:
    run = directory / "interrupted"
    assert history(run) == history(reference)  # no step twice either
    assert weights_hash(run / "final") == weights_hash(reference / "final")
    assert weights_hash(run / "best") == weights_hash(reference / "best")
    assert status(run)["outcome"] == "finished"


def test_an_interrupted_run_reports_what_the_uninterrupted_one_does(
    reference: Path, interrupted: dict, directory: Path
) -> None:
    """Every record and every point of every curve once, whatever was killed in between."""
    assert interrupted["early"].codes == (-9,)
    found, wanted = reports(directory / "interrupted"), reports(reference)
    assert found == wanted
    for tag, points in wanted[1].items():
        assert len({step for step, _ in points}) == len(points), tag


def test_a_run_killed_after_its_last_step_reports_its_final_scores_once(
    launch: Launch, reference: Path, directory: Path
) -> None:
    """No step remains, and the final scores were written, but not that the run is finished."""
    run = shutil.copytree(reference, directory / "ended")
    (run / "status.json").write_text(json.dumps(status(run) | {"outcome": "failed"}))
    outcome = launch("ended", DRAWN)
    assert outcome.codes == (0,) and f"resumed at step {STEPS}" in outcome.output
    assert reports(run) == reports(reference)
    assert status(run)["outcome"] == "finished"


def test_curves_are_drawn_by_stream_and_end_with_the_final_scores(reference: Path) -> None:
    found, result = curves(reference), json.loads((reference / "result.json").read_text())
    assert [step for step, _ in found["scores/graded-dev"]] == [0, 4, 8, 12]
    ((step, best),) = found["best/graded-dev"]
    assert (step, best) == (STEPS, pytest.approx(result["trained"]["graded-dev"], rel=1e-6))
    before = result["untrained"]["graded-dev"]  # x 100 in all of them
    assert found["scores/graded-dev"][0][1] == pytest.approx(before, rel=1e-6)
    assert abs(before) > 1
    by_stream = {r["step"]: r["stream"] for r in records(reference)}
    for stream in ("text", "pair"):
        steps = [step for step, _ in found[f"train/{stream}/loss"]]
        assert steps == [step for step in by_stream if by_stream[step] == stream]
    assert [step for step, _ in found["train/lr"]] == list(by_stream)
    assert "train/loss" not in found and "train/text/xce" not in found


def test_control_another_seed_is_refused_and_would_show(
    launch: Launch, reference: Path, interrupted: dict, directory: Path
) -> None:
    copy = directory / "copy"
    before = tree(copy / "checkpoints"), (copy / "metrics.jsonl").read_bytes()
    refused = launch("copy", "--run.seed=4")
    assert refused.codes == (2,)
    assert "run.seed: checkpoint 3, now 4" in refused.output
    assert "--run.allow_change=true" in refused.output and "Traceback" not in refused.output
    assert (tree(copy / "checkpoints"), (copy / "metrics.jsonl").read_bytes()) == before
    assert load_config(str(copy)).run.seed == 3

    changed = launch("copy", "--run.seed=4", "--run.allow_change=true")
    assert changed.codes == (0,) and "continuing although" in changed.output
    found, wanted = history(copy), history(reference)
    assert found[:3] == wanted[:3]
    assert all(a[2:] != b[2:] for a, b in zip(found[3:], wanted[3:], strict=True))
    assert weights_hash(copy / "final") != weights_hash(reference / "final")


def test_a_finished_run_is_shown_and_not_trained_again(
    launch: Launch, reference: Path, directory: Path
) -> None:
    shutil.copytree(reference, directory / "finished")
    run = directory / "finished"

    def kept() -> dict[str, str]:
        return {name: hash_ for name, hash_ in tree(run).items() if not name.startswith("log/")}

    before = kept()
    shown = launch("finished", "--log.every=3")
    assert shown.codes == (0,) and kept() == before
    assert "is finished; train again with --run.from_scratch=true" in shown.output
    assert "graded-dev" in shown.output

    refused = launch("finished", "--optim.lr=0.5")
    assert refused.codes == (2,) and kept() == before
    assert "optim.lr: 0.001 there, 0.5 here" in refused.output

    again = launch("finished", "--run.from_scratch=true", "--optim.steps=2", "--eval.every=0")
    assert again.codes == (0,), again.output
    aside = directory / "finished.old-1"
    assert {n: h for n, h in tree(aside).items() if not n.startswith("log/")} == before
    assert [r["step"] for r in records(run)] == [1, 2]


def test_an_attempt_without_checkpoint_leaves_no_trace_in_the_next(
    launch: Launch, directory: Path
) -> None:
    """Killed before its first checkpoint, a directory may be told to go on with other settings."""
    fault = {"DALR_FAULT": "save:before-tmp@2"}
    first = launch("attempt", "--save.every_steps=2", environment=fault)
    assert first.codes == (-9,)
    untrained = records(directory / "attempt", "scores")[0]
    words = ("--optim.steps=2", "--run.seed=9")
    refused = launch("attempt", *words)
    assert refused.codes == (2,) and "run.seed: 3 there, 9 here" in refused.output
    second = launch("attempt", *words, "--run.allow_change=true")
    assert second.codes == (0,), second.output
    steps = [
        (r["kind"], r["step"])
        for k in ("scores", "train")
        for r in records(directory / "attempt", k)
    ]
    assert steps == [("scores", 0), ("scores", 2), ("train", 1), ("train", 2)]
    result = json.loads((directory / "attempt" / "result.json").read_text())
    assert result["untrained"]["graded-dev"] != untrained["graded-dev"]
    assert (
        result["untrained"]["graded-dev"]
        == records(directory / "attempt", "scores")[0]["graded-dev"]
    )


def test_a_stop_before_the_first_step_is_honoured(launch: Launch, directory: Path) -> None:
    """The time limit is over before training starts; nothing is lost and nothing is skipped."""
    outcome = launch("early", "--run.max_minutes=0.00001", "--optim.steps=2")
    assert outcome.codes == (0,) and status(directory / "early")["outcome"] == "preempted"
    assert launch("early", "--optim.steps=2").codes == (0,)
    assert [r["step"] for r in records(directory / "early")] == [1, 2]


def test_text_alone_trains_with_ragged_batches_and_two_rates(
    launch: Launch, tiny_data: Path, directory: Path
) -> None:
    """SimCSE without images: 170 sentences are 7 batches of 24 and one of 2, in chunks of 5."""
    words = ("--objective.preset=simcse", "--data.pairs=", "--batch.micro_size=5")
    rates = ("--optim.steps=8", "--eval.every=0", "--optim.embedding_lr=1e-12")
    outcome = launch("text", *words, *rates)
    assert outcome.codes == (0,), outcome.output
    run = directory / "text"
    assert {r["stream"] for r in records(run)} == {"text"}
    assert {"con"} == set(records(run)[0]) & {"con", "xce", "cma", "ima", "rank", "g2l"}
    after = load_file(run / "final" / "model.safetensors")
    torch.manual_seed(3)
    before = build_encoder(load_config(str(run))).backbone.state_dict()
    moved = {name: float((after[name] - before[name]).abs().max()) for name in after}
    assert moved["embeddings.word_embeddings.weight"] < 1e-8
    assert moved["encoder.layer.0.output.dense.weight"] > 1e-4
    assert f"encoder: {run / 'final'} " in outcome.output  # nothing chose a best one


@pytest.mark.parametrize(
    ("preset", "words", "terms"),
    [
        ("kdmcse", ("--teachers.caption=features:cap",), {"con", "xce", "xce_caption"}),
        (
            "dalr-reference",
            (
                "--objective.g2l_norm=token",
                "--objective.teacher_tokenizer=retokenise",
                "--objective.image_projection=learned",
                "--objective.token_projection=learned",
            ),
            {"con", "cons", "cma", "xce", "ima", "rank", "g2l"},
        ),
    ],
)
def test_other_presets_train_all_their_terms(
    preset: str, words: tuple[str, ...], terms: set[str], launch: Launch, directory: Path
) -> None:
    """Reference alternation: with 8 text and 6 paired batches a pass, every step is paired."""
    outcome = launch(preset, f"--objective.preset={preset}", *words, "--optim.steps=2")
    assert outcome.codes == (0,), outcome.output
    for record in records(directory / preset):
        assert record["stream"] == "pair"
        assert terms == set(record) & {*terms, "con", "cons", "cma", "xce", "ima", "rank", "g2l"}


# Several ranks

NO_DROPOUT = (
    "--model.architecture.hidden_dropout_prob=0.0",
    "--model.architecture.attention_probs_dropout_prob=0.0",
)


def test_plain_data_parallel_runs_resume_on_another_number_of_ranks(
    launch: Launch, directory: Path
) -> None:
    """Same order and ids at any world size; without dropout the same losses to rounding."""
    words = ("--engine.kind=ddp", "--eval.every=0", *NO_DROPOUT)
    assert launch("plain", *words).codes == (0,)
    two = launch("elastic", *words, ranks=2, end_at=(4, "SIGTERM"))
    assert two.codes == (0, 0), two.output
    assert status(directory / "elastic")["outcome"] == "preempted"
    three = launch("elastic", *words, ranks=3, end_at=(8, "STOP"))
    assert three.codes == (0, 0, 0), three.output
    assert launch("elastic", *words).codes == (0,)
    found, wanted = history(directory / "elastic"), history(directory / "plain")
    assert [line[:3] for line in found] == [line[:3] for line in wanted]
    for one, other in zip(found, wanted, strict=True):
        assert float.fromhex(one[3]) == pytest.approx(float.fromhex(other[3]), rel=2e-6)


def test_a_bad_row_that_only_one_rank_met_stops_them_all(
    launch: Launch, tiny_data: Path, directory: Path
) -> None:
    """Where no bad row is allowed; by default another item would replace it."""
    data = shutil.copytree(tiny_data, directory / "bad-data")
    plan = build_streams(tiny_config(data)).plan
    first = next(step for step in range(STEPS) if plan.kind(step) == "pair")
    item = int(plan.batch_ids(first)[-1])  # the last rank's last row
    per_shard = plan.pair_items // 2
    shard = data / f"train-{item // per_shard:06}.tar"
    table = open_features(shard, "t0")
    row = table.values.rows(np.array([item % per_shard]))
    stored = table.path.read_bytes()
    assert stored.count(row.tobytes()) == 1
    table.path.write_bytes(stored.replace(row.tobytes(), np.full_like(row, np.nan).tobytes()))
    words = ("--engine.kind=ddp", f"--data.shards={data}", "--eval.every=0")
    found = launch("bad", *words, "--data.max_bad_fraction=0", ranks=2)
    assert found.codes == (2, 2), found.output
    assert "1 of 144 items of the pair stream cannot be used" in found.output
    assert f"train-{item // per_shard:06}.t0.features.tar: the feature of item" in found.output
    assert status(directory / "bad")["outcome"] == "failed"
    assert [r["step"] for r in records(directory / "bad")] == list(range(1, first + 1))


@pytest.fixture(scope="module")
def sharded(launch: Launch, directory: Path) -> Path:
    """Two ranks of ZeRO-3 in micro-chunks, started by the launcher that users run."""
    run = directory / "sharded"
    found = accelerate(
        *("--use_deepspeed", "--num_processes=2", "-m", "dalr_scale.train"),
        *(f"--config={directory / 'tiny.toml'}", f"--run.dir={run}", "--engine.kind=zero3"),
        *("--batch.micro_size=5", "--optim.steps=6", "--eval.every=1", "--save.every_steps=0"),
        "--optim.lr=0.3",  # so high that the last encoder is hardly the best one
    )
    assert found.returncode == 0, found.stdout[-4000:]
    (directory / "sharded.txt").write_text(found.stdout)
    return run


def test_two_ranks_of_one_world_train(sharded: Path, directory: Path) -> None:
    output = (directory / "sharded.txt").read_text()
    for rank in (0, 1):
        assert output.count(f"rank {rank} of a world of 2") == 1
    assert "2 x 12" in output and "3 of up to 5 rows" in output
    assert [r["step"] for r in records(sharded)] == list(range(1, 7))
    assert status(sharded)["outcome"] == "finished"


def test_the_best_encoder_is_scored_whole_when_ranks_hold_parts(sharded: Path) -> None:
    result = json.loads((sharded / "result.json").read_text())
    scores = {r["step"]: r["graded-dev"] for r in records(sharded, "scores") if r["step"]}
    best = max(scores, key=lambda step: scores[step])
    assert result["best_step"] == best
    assert result["trained"]["graded-dev"] == pytest.approx(scores[best], abs=1e-4)


def test_the_exported_encoder_loads_in_other_tools(sharded: Path) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    from transformers import AutoModel, AutoTokenizer

    from dalr_scale.models.encoder import SentenceEncoder, encode_sentences

    sentences = ["baa bab bac", "bbb", "bca bcb " * 4]
    for name in ("best", "final"):
        files = {p.suffix for p in (sharded / name).rglob("*") if p.is_file()}
        assert not files & {".bin", ".pt", ".pkl"}
        ours = encode_sentences(SentenceEncoder.from_directory(sharded / name), sentences)
        other = sentence_transformers.SentenceTransformer(str(sharded / name), device="cpu")
        theirs = torch.from_numpy(other.encode(sentences))
        torch.testing.assert_close(theirs, ours, atol=1e-6, rtol=0)
        model = AutoModel.from_pretrained(sharded / name)
        tokenizer = AutoTokenizer.from_pretrained(sharded / name)
        batch = tokenizer(sentences, padding=True, return_tensors="pt")
        with torch.no_grad():
            hidden = model(batch["input_ids"], batch["attention_mask"]).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1)
        mean = (hidden * mask).sum(1) / mask.sum(1)
        torch.testing.assert_close(mean, ours, atol=1e-6, rtol=0)
    assert weights_hash(sharded / "final")  # whole, although each rank holds a part
    assert ours.std() > 0.01


@pytest.mark.skipif(torch.cuda.is_available(), reason="this launch is right on a GPU host")
def test_a_launch_that_would_start_one_process_is_refused(launch: Launch, directory: Path) -> None:
    words = ("-m", "dalr_scale.train", f"--config={directory / 'tiny.toml'}")
    found = accelerate("--num_processes=2", *words, f"--run.dir={directory / 'silent'}")
    assert found.returncode != 0
    assert "accelerate launch --use_deepspeed --num_processes 2 -m" in found.stdout
    assert not (directory / "silent").exists()
