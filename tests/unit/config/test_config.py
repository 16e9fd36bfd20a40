"""Configuration: layers, types, ranges, presets, and errors that name the right key."""

from __future__ import annotations

import dataclasses
import math
import re
import tomllib
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dalr_scale import train
from dalr_scale.commands import plan
from dalr_scale.config import (
    Config,
    build_config,
    load_config,
    parse_overrides,
    recipe_names,
)
from dalr_scale.config.limits import RANGES
from dalr_scale.config.presets import PRESETS
from dalr_scale.config.text import allowed_values, help_text, to_toml
from dalr_scale.errors import UserError

SECTIONS = {f.name: typing.get_type_hints(Config)[f.name] for f in dataclasses.fields(Config)}
KEYS = [(name, f.name) for name, cls in SECTIONS.items() for f in dataclasses.fields(cls)]
HINTS = {f"{s}.{k}": typing.get_type_hints(SECTIONS[s])[k] for s, k in KEYS}
NUMBERS = (int, float, tuple[int, ...], tuple[float, ...], tuple[float, float])


def override(*words: str) -> Config:
    return build_config([parse_overrides(words)])


def misspelt(word: str) -> Iterator[str]:
    """`word` with each letter dropped, and with each two neighbours swapped."""
    for i in range(len(word)):
        yield word[:i] + word[i + 1 :]
    for i in range(len(word) - 1):
        if word[i] != word[i + 1]:
            yield word[:i] + word[i + 1] + word[i] + word[i + 2 :]


# Unknown names


@pytest.mark.parametrize(("section", "key"), KEYS, ids=[".".join(k) for k in KEYS])
def test_a_misspelt_key_names_the_right_one(section: str, key: str) -> None:
    for typo in misspelt(key):
        with pytest.raises(UserError) as error:
            build_config([{section: {typo: 1}}])
        assert f"'{typo}'" in str(error.value)
        assert f"did you mean '{key}'?" in str(error.value), typo


@pytest.mark.parametrize("section", SECTIONS)
def test_a_misspelt_section_names_the_right_one(section: str) -> None:
    for typo in misspelt(section):
        with pytest.raises(UserError, match=f"did you mean '{section}'"):
            override(f"--{typo}.key=1")


def test_a_misspelt_preset_and_recipe_name_the_right_one() -> None:
    with pytest.raises(UserError, match="did you mean 'kdmcse'"):
        override("--objective.preset=kdmsce")
    for path in ("runs/gone", "mine.toml", "/no/such/mine.toml"):
        with pytest.raises(UserError, match=f"^no such file or run directory: {path}$"):
            load_config(path)
    with pytest.raises(UserError, match="no recipe, file or run directory"):
        load_config("no-such-recipe")


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--optim.lr"], "has no value"),
        (["--lr=1"], "write --section.key=value"),
        (["optim.lr=1"], "write --section.key=value"),
    ],
)
def test_words_that_are_no_override_are_refused(words: list[str], problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        override(*words)


# Types and ranges


@pytest.mark.parametrize(
    ("setting", "problem"),
    [
        ("optim.lr=fast", "must be of type float"),
        ("optim.lr=nan", "must be of type float"),
        ("optim.lr=true", "must be of type float"),
        ("optim.steps=3.5", "must be of type int"),
        ("optim.steps=true", "must be of type int"),
        ("run.from_scratch=1", "must be of type bool"),
        ("run.from_scratch=True", "must be of type bool"),
        ("optim.betas=0.9,x", "must be of type float"),
        ("model.architecture=3", "must be of type dict"),
        ("engine.kind=zero4", "is not one of: zero1, zero2, zero3, ddp"),
        ("objective.same_image=maks", "is not one of: keep, mask"),
        ("optim.lr.x=1", "must be of type float"),
    ],
)
def test_a_wrong_type_is_refused_with_key_and_expected_type(setting: str, problem: str) -> None:
    with pytest.raises(UserError, match=problem) as error:
        override(f"--{setting}")
    key = setting.split("=")[0]
    assert key in str(error.value) or key.rpartition(".")[0] in str(error.value)


@pytest.mark.parametrize(
    "setting",
    [
        "optim.lr=-1e-4",
        "optim.lr=0",
        "optim.lr=inf",
        "optim.embedding_lr=-1",
        "optim.betas=[0.9]",
        "optim.betas=[0.9, 1.0]",
        "optim.eps=0",
        "optim.clip=-1",
        "optim.steps=-5",
        "optim.epochs=0",
        "optim.warmup=-1",
        "optim.weight_decay=-0.1",
        "objective.temperature=0",
        "objective.vl_temperature=-0.05",
        "objective.margin=-0.1",
        "objective.margin=4",
        "objective.kl_teacher_temperature=0",
        "objective.rank_teacher_temperature=0",
        "objective.cross_weight=-1",
        "objective.rank_weight=-1",
        "objective.false_negative_threshold=1.5",
        "data.pair_fraction=1.5",
        "data.pair_fraction=-0.1",
        "data.max_length=0",
        "data.workers=-1",
        "model.grounding_width=0",
        "model.consistency_width=-1",
        "batch.global_size=0",
        "batch.micro_size=-1",
        "engine.timeout_minutes=0",
        "engine.threads=-1",
        "eval.every=-1",
        "eval.batch_size=0",
        "save.every_steps=-1",
        "save.every_minutes=-1",
        "save.keep=0",
        "log.every=0",
        "run.seed=-1",
        "run.watchdog_minutes=-1",
        "run.max_minutes=-1",
        "teachers.text_weights=[0.5, -0.5]",
    ],
)
def test_a_value_out_of_range_is_refused_before_anything_starts(setting: str) -> None:
    key = setting.split("=")[0]
    with pytest.raises(UserError, match=key.replace(".", r"\.")) as error:
        override(f"--{setting}")
    assert len(str(error.value).splitlines()) == 1


def test_the_ends_of_ranges_are_allowed() -> None:
    config = override("--optim.clip=0", "--data.pair_fraction=1", "--objective.margin=0")
    assert (config.optim.clip, config.data.pair_fraction, config.objective.margin) == (0, 1, 0)


def test_whole_numbers_serve_as_floats_and_text_stays_text() -> None:
    config = override("--optim.lr=1", "--run.name=7", "--eval.tasks=STS12,STS-B", "--run.dir=''")
    assert config.optim.lr == 1.0 and isinstance(config.optim.lr, float)
    assert config.run.name == "7" and config.run.dir == ""
    assert config.eval.tasks == ("STS12", "STS-B")
    assert override("--run.name", "x=y").run.name == "x=y"


def test_every_number_has_a_range_with_two_ends() -> None:
    assert set(RANGES) == {name for name, hint in HINTS.items() if hint in NUMBERS}
    for name, allowed in RANGES.items():
        assert math.isfinite(allowed.low) and math.isfinite(allowed.high), name
        section, key = name.split(".")
        value = getattr(getattr(Config(), section), key)
        assert all(v in allowed for v in (value if isinstance(value, tuple) else (value,))), name


@pytest.mark.parametrize("name", RANGES)
def test_a_number_far_beyond_its_range_is_refused_in_one_short_line(name: str) -> None:
    section, key = name.split(".")
    for value in (1e22, 10**22, 10**400, 10**5000, -(10**400), math.inf, -math.inf, math.nan):
        length = 2 if HINTS[name] == tuple[float, float] else 1
        typed = [value] * length if HINTS[name] not in (int, float) else value
        with pytest.raises(UserError, match=name) as error:
            build_config([{section: {key: typed}}])
        assert len(str(error.value)) < 300


# What any number may be: the ends of all ranges are among them.
ENDS = sorted({e for r in RANGES.values() for e in (r.low, r.high)} | {-1, 0, 2**63, 10**400})
SCALARS = st.one_of(
    st.sampled_from(ENDS), st.integers(), st.floats(), st.booleans(), st.text(), st.none()
)
VALUES = st.one_of(
    SCALARS, st.lists(SCALARS, max_size=3), st.dictionaries(st.text(), SCALARS, max_size=2)
)


@settings(max_examples=1500, deadline=None, derandomize=True)
@given(key=st.sampled_from(KEYS), value=VALUES)
def test_any_value_for_any_key_is_a_configuration_or_one_line(key: tuple, value) -> None:
    """And what is accepted is saved with the run as text that reads back equal."""
    section, name = key
    try:
        config = build_config([{section: {name: value}}])
    except UserError as error:
        assert str(error) and len(str(error)) < 500
        return
    text = to_toml(config)
    assert build_config([tomllib.loads(text)]) == config
    text.encode()


@settings(max_examples=500, deadline=None, derandomize=True)
@given(key=st.sampled_from(KEYS), text=st.text(st.characters(codec=None), max_size=20))
def test_any_text_on_the_command_line_too(key: tuple, text: str) -> None:
    """Bytes that are no UTF-8 reach Python as lone surrogates."""
    try:
        config = override(f"--{'.'.join(key)}={text}")
    except UserError:
        return
    to_toml(config).encode()


@pytest.mark.parametrize(
    "word", ["--optim.lr=" + "9" * 5000, "--eval.tasks=" + "[" * 10_000, "--optim.steps=1e5000"]
)
def test_absurd_text_is_refused_or_taken_as_text(word: str) -> None:
    try:
        assert override(word).eval.tasks
    except UserError as error:
        assert len(str(error)) < 300


# Layers


def test_later_layers_win_key_by_key(tmp_path) -> None:
    file = tmp_path / "own.toml"
    file.write_text("[optim]\nlr = 0.5\nsteps = 7\n[data]\ntext = ['a', 'b']\n")
    config = load_config(str(file), ["--optim.lr=0.25", "--data.text=c"])
    assert (config.optim.lr, config.optim.steps) == (0.25, 7)
    assert config.data.text == ("c",)
    assert config.optim.eps == 1e-6  # untouched default


def test_a_layer_that_names_a_preset_starts_the_objective_afresh(tmp_path) -> None:
    file = tmp_path / "own.toml"
    file.write_text("[objective]\npreset = 'dalr'\ntemperature = 0.1\nrank_weight = 32.0\n")
    assert load_config(str(file)).objective.rank_weight == 32
    kept = load_config(str(file), ["--objective.margin=0.2"]).objective
    assert (kept.temperature, kept.rank_weight, kept.margin) == (0.1, 32, 0.2)
    fresh = load_config(str(file), ["--objective.preset=mcse", "--objective.margin=0.2"]).objective
    assert (fresh.temperature, fresh.rank_weight, fresh.margin) == (0.05, 0, 0.2)


def test_a_length_in_steps_replaces_one_in_epochs_and_the_reverse(tmp_path) -> None:
    """A recipe's 300 steps would otherwise hide the two epochs that the command line asks for."""
    steps, epochs = tmp_path / "steps.toml", tmp_path / "epochs.toml"
    steps.write_text("[optim]\nsteps = 300\n")
    epochs.write_text("[optim]\nepochs = 4\n")

    def length(file: Path, *words: str) -> tuple[int, float]:
        optim = load_config(str(file), words).optim
        return optim.steps, optim.epochs

    assert length(steps, "--optim.epochs=2") == (0, 2)
    assert length(epochs, "--optim.steps=3") == (3, 1)
    assert length(epochs, "--optim.steps=0") == (0, 4)
    assert length(steps, "--optim.lr=1") == (300, 1)
    assert length(steps, "--optim.steps=3", "--optim.epochs=2") == (3, 2)  # refused before a run
    (tmp_path / "config.toml").write_text(to_toml(load_config(str(steps))))
    assert length(tmp_path, "--optim.epochs=2") == (0, 2)


def test_a_dotted_word_changes_one_entry_of_a_table(tmp_path) -> None:
    file = tmp_path / "own.toml"
    file.write_text("[model]\narchitecture = { model_type = 'bert', hidden_size = 8 }\n")
    changed = load_config(str(file), ["--model.architecture.hidden_size=16"]).model.architecture
    assert changed == {"model_type": "bert", "hidden_size": 16}
    assert load_config(str(file), ["--model.architecture={}"]).model.architecture == {}
    new = load_config(str(file), ["--model.architecture={ a = 1 }", "--model.architecture.b=x"])
    assert new.model.architecture == {"a": 1, "b": "x"}


@pytest.mark.parametrize(
    ("text", "problem"),
    [("lr = 1", "table"), ("objective = 3", "table"), ("[optim]\nlr = ", "not valid TOML")],
)
def test_a_malformed_file_is_refused(text: str, problem: str, tmp_path) -> None:
    file = tmp_path / "bad.toml"
    file.write_text(text)
    with pytest.raises(UserError, match=problem):
        load_config(str(file))


# Written and read back


@pytest.mark.parametrize("preset", PRESETS)
def test_the_resolved_configuration_reads_back_equal(preset: str, tmp_path) -> None:
    config = build_config(
        [
            {
                "run": {"name": 'quo"te \\ back\nline\ttab \x7f ü', "seed": 5},
                "objective": {"preset": preset, "temperature": 0.07},
                "model": {"architecture": {"model_type": "bert", "a.b c": [1, {"x": True}]}},
                "optim": {"lr": 1e-05, "betas": [0.9, 0.95]},
            }
        ]
    )
    (tmp_path / "config.toml").write_text(to_toml(config), encoding="utf-8")
    assert load_config(str(tmp_path)) == config
    assert load_config(str(tmp_path / "config.toml")) == config


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_parses(name: str) -> None:
    config = load_config(name)
    assert config.run.name == name
    assert build_config([dataclasses.asdict(config)]) == config


def test_help_names_every_key_with_its_default_and_allowed_values() -> None:
    entries = dict(re.findall(r"^  --([\w.]+)=(.*\n(?:      .*\n?)+)", help_text(), re.MULTILINE))
    assert list(entries) == [".".join(key) for key in KEYS]
    for cls in SECTIONS.values():
        for f in dataclasses.fields(cls):
            assert f.metadata["help"] in help_text()
    assert "--objective.margin=0.2" in help_text()
    for name, hint in HINTS.items():
        allowed = allowed_values(name, hint)
        assert f"[{allowed}]" in entries[name]
        if typing.get_origin(hint) is typing.Literal:
            assert all((value or "''") in allowed for value in typing.get_args(hint))
        if name in RANGES:
            assert str(RANGES[name]) in allowed
        if hint is bool:
            assert allowed == "true | false"
    assert "list of 2" in entries["optim.betas"]
    assert all(preset in entries["objective.preset"] for preset in PRESETS)


@pytest.mark.parametrize("words", [["--help"], ["--config", "gone", "--optim.lr=x", "-h"]])
@pytest.mark.parametrize("command", [train.main, plan.main])
def test_help_is_shown_whatever_else_is_said(
    command: Any, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        command(words)
    assert ended.value.code == 0
    assert help_text() in capsys.readouterr().out


def test_a_message_about_a_value_says_what_help_says() -> None:
    """The values that `--help` allows are those that are accepted."""
    for name, hint in HINTS.items():
        section, key = name.split(".")
        if typing.get_origin(hint) is typing.Literal:
            for value in typing.get_args(hint):
                assert getattr(getattr(override(f"--{name}={value}"), section), key) == value
        if name in RANGES and not (RANGES[name].open_low or RANGES[name].open_high):
            for end in (RANGES[name].low, RANGES[name].high):
                typed = end if hint in (int, float) else [end]
                build_config([{section: {key: typed}}])


def test_the_data_directory_comes_from_the_key_or_the_environment(monkeypatch) -> None:
    monkeypatch.delenv("DALR_DATA", raising=False)
    with pytest.raises(UserError, match=r"--data\.root"):
        Config().path("{root}/x")
    monkeypatch.setenv("DALR_DATA", "/from/environment")
    assert str(Config().path("{root}/x")) == "/from/environment/x"
    assert str(override("--data.root=/from/key").path("{root}/x")) == "/from/key/x"
    assert str(override("--data.shards=/s").path("{shards}/x")) == "/s/x"


# Presets. The published values, written out: SimCSE (arXiv 2104.08821), MCSE (2204.10931), KDMCSE
# (2403.17486), DALR (2506.21096) and the code published for each; the last column is the default.

COMMON = {"temperature": 0.05, "kl_student_temperature": 0.45, "kl_teacher_temperature": 0.5}
COMMON |= {"rank_teacher_temperature": 0.05, "margin_in_text_batches": True}
COMMON |= {"false_negative_threshold": 0.0, "distil_text_batches": False, "rank_loss": "listmle"}
NO_DISTILLATION = {
    "intra_weight": 0.0,
    "soft_labels": "none",
    "caption_soft_labels": "none",
    "same_image": "keep",
    "consistency_weight": 0.0,
    "cross_kl_weight": 0.0,
}
TABLE = {
    "simcse": NO_DISTILLATION | {"margin": 0.0, "cross_weight": 0.0},
    "mcse": NO_DISTILLATION
    | {
        "margin": 0.0,
        "vl_margin": 0.0,
        "vl_temperature": 0.05,
        "cross_weight": 0.01,
        "image_weight": 1.0,
        "caption_weight": 0.0,
        "alternation": "reference",
    },
    "kdmcse": NO_DISTILLATION
    | {
        "margin": 0.15,
        "vl_margin": 0.15,
        "vl_temperature": 0.05,
        "cross_weight": 0.01,
        "image_weight": 1.0,
        "caption_weight": 1.0,
        "soft_labels": "image",
        "caption_soft_labels": "caption",
        "clamp_soft_labels": False,
        "alternation": "reference",
    },
    "dalr-reference": {
        "margin": 0.18,
        "vl_margin": 0.18,
        "vl_temperature": 0.05,
        "cross_weight": 0.1,
        "image_weight": 1.0,
        "caption_weight": 0.0,
        "cross_kl_weight": 1.0,
        "consistency_weight": 0.01,
        "intra_weight": 0.2,
        "intra_kl_weight": 1.0,
        "rank_weight": 1.0,
        "g2l_weight": 1.0,
        "soft_labels": "image",
        "clamp_soft_labels": False,
        "same_image": "keep",
        "cross_kl_student": "margin",
        "intra_kl_student": "margin",
        "rank_student": "margin",
        "listmle_reduction": "sum",
        "listmle_eps": 1e-7,
        "g2l_norm": "axis",
        "g2l_unit_rows": False,
        "g2l_mix": "features",
        "unmatched": "roll",
        "alternation": "reference",
        "tail": "keep",
        "teacher_mix": "features",
        "teacher_similarity_dtype": "float16",
        "teacher_tokenizer": "must_match",
        "image_projection": "identity",
        "token_projection": "identity",
    },
    "dalr": {
        "margin": 0.2,
        "vl_margin": 0.2,
        "vl_temperature": 0.05,
        "cross_weight": 0.1,
        "image_weight": 1.0,
        "caption_weight": 0.0,
        "cross_kl_weight": 1.0,
        "consistency_weight": 1.0,
        "intra_weight": 0.2,
        "intra_kl_weight": 1.0,
        "rank_weight": 1.0,
        "g2l_weight": 1.0,
        "soft_labels": "consistency",
        "clamp_soft_labels": True,
        "same_image": "mask",
        "cross_kl_student": "cosine",
        "intra_kl_student": "cosine",
        "rank_student": "cosine",
        "listmle_reduction": "mean",
        "listmle_eps": 0.0,
        "g2l_norm": "token",
        "g2l_unit_rows": True,
        "g2l_mix": "auto",
        "unmatched": "shift",
        "alternation": "proportional",
        "tail": "drop",
        "teacher_mix": "similarities",
        "teacher_similarity_dtype": "float32",
        "teacher_tokenizer": "retokenise",
        "image_projection": "learned",
        "token_projection": "learned",
    },
}


def test_presets_are_the_published_table() -> None:
    assert set(TABLE) == set(PRESETS)
    for name, expected in TABLE.items():
        objective = override(f"--objective.preset={name}").objective
        for key, value in (COMMON | expected).items():
            assert getattr(objective, key) == value, f"{name}: {key}"
        assert objective.preset == name
    assert override().objective == override("--objective.preset=dalr").objective


def test_presets_differ_in_nothing_that_the_table_leaves_out() -> None:
    """A key that a preset sets without effect on that preset's loss may be missing above."""
    without_effect = {
        "simcse": {"vl_margin", "image_weight", "clamp_soft_labels", "tail", "alternation"},
        "mcse": {"clamp_soft_labels", "tail"},
        "kdmcse": {"tail"},
    }
    zero_weights = {"intra_kl_weight", "rank_weight", "g2l_weight"}
    for name, changes in PRESETS.items():
        unknown = set(changes) - set(TABLE[name]) - zero_weights
        assert unknown <= without_effect.get(name, set())


def test_reference_margin_is_in_radians() -> None:
    assert 10 < math.degrees(TABLE["dalr-reference"]["margin"]) < 10.5
