"""Settings that contradict each other, and settings without effect.

Both are found in the configuration alone: no file is opened, no other rank is asked. A setting
counts as the user's own where it differs from the preset or the default.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from dalr_scale.config.presets import PRESETS
from dalr_scale.errors import UserError
from dalr_scale.objective import registry
from dalr_scale.objective.registry import needs_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dalr_scale.config import Config
    from dalr_scale.objective.term import Needs

STORED = "features:"


def check_contradictions(config: Config) -> None:
    """Refuses the first two settings that cannot both hold.

    Raises:
        UserError: one sentence that names the keys and the fix.
    """
    for problem in _contradictions(config):
        raise UserError(problem)


def _contradictions(config: Config) -> Iterator[str]:
    yield from _of_encoder(config)
    yield from _of_engine(config)
    yield from _of_schedule(config)
    yield from _of_data(config)
    yield from _of_evaluation(config)


def _of_encoder(config: Config) -> Iterator[str]:
    model = config.model
    if bool(model.encoder) == bool(model.architecture):
        yield "set exactly one of model.encoder (a directory) and model.architecture"
    if model.encoder and config.data.tokenizer:
        yield "data.tokenizer is for a new encoder; model.encoder brings its own"
    if not model.encoder and not config.data.tokenizer:
        yield "a new encoder needs data.tokenizer: a directory or a vocab.txt"


def _of_engine(config: Config) -> Iterator[str]:
    engine = config.engine
    if engine.kind == "ddp":
        if engine.ds_config:
            yield (
                "engine.ds_config configures DeepSpeed, which engine.kind = ddp does not use; "
                "choose zero1, zero2 or zero3, or leave engine.ds_config empty"
            )
        if engine.offload_optimizer:
            yield "engine.offload_optimizer exists with zero1, zero2 and zero3 only, not with ddp"
    elif engine.precision == "fp64":
        yield "precision fp64 exists on --engine.kind=ddp only: ZeRO keeps fp32 states"


def _of_schedule(config: Config) -> Iterator[str]:
    optim = config.optim
    if optim.steps and _is_own(config, "optim", "epochs"):
        yield (
            f"optim.steps = {optim.steps} and optim.epochs = {optim.epochs:g} both say how long to "
            "train; set optim.steps=0 to count in epochs, or leave optim.epochs out"
        )


def _of_data(config: Config) -> Iterator[str]:
    data = config.data
    if not data.pairs and not data.text:
        yield "data.pairs and data.text are both empty: name shards for one of them"
    needs = needs_of(config.objective)
    if not data.pairs and (needs.image or needs.caption or needs.tokens):
        yield (
            f"objective {config.objective.preset} learns from images: name their shards in "
            "data.pairs, or set --objective.preset=simcse"
        )
    for name in ("pairs", "text"):
        sources, weights = getattr(data, name), getattr(data, f"{name.removesuffix('s')}_weights")
        if weights and len(weights) != len(sources):
            yield (
                f"{len(weights)} weights for {len(sources)} sources; "
                "give each entry of data.pairs or data.text one weight"
            )
    own_rule = _is_own(config, "objective", "alternation")
    if data.pair_fraction and own_rule and config.objective.alternation == "reference":
        yield (
            f"data.pair_fraction = {data.pair_fraction:g} and objective.alternation = reference "
            "both say which batches are paired; leave one of them out"
        )


def _of_evaluation(config: Config) -> Iterator[str]:
    options = config.eval
    names = (*options.tasks, *(("graded-dev",) if options.graded_dev else ()))
    if options.select and options.select not in names:
        listed = ", ".join(names) or "none: eval.tasks and eval.graded_dev are empty"
        yield f"eval.select = '{options.select}' is not one of the tasks {listed}"
    if options.retrieval and not config.teachers.image.startswith(STORED):
        yield (
            "eval.retrieval reads stored image features: set teachers.image = features:NAME, or "
            "leave eval.retrieval empty"
        )


def settings_without_effect(config: Config) -> list[str]:
    """The user's own settings that change nothing in this run, each with the reason."""
    idle = dict([*_idle_objective(config), *_idle_data(config), *_idle_others(config)])
    return [f"{key} ({why})" for key, why in idle.items() if _is_own(config, *key.split("."))]


def _is_own(config: Config, section: str, key: str) -> bool:
    """Whether a value is another one than the preset's or the default."""
    value = getattr(getattr(config, section), key)
    if section == "objective" and key in PRESETS[config.objective.preset]:
        return value != PRESETS[config.objective.preset][key]
    fields = {f.name: f for f in dataclasses.fields(getattr(config, section))}
    default: Any = fields[key].default
    return value != ({} if default is dataclasses.MISSING else default)


def _idle_objective(config: Config) -> Iterator[tuple[str, str]]:
    data, teachers = config.data, config.teachers
    for key, why in registry.keys_without_effect(config.objective).items():
        yield f"objective.{key}", why
    if not data.text:
        yield "objective.margin_in_text_batches", "there are no text batches"
        yield "objective.distil_text_batches", "there are no text batches"
    if not data.pairs:
        yield "objective.same_image", "there are no images"
    if len(teachers.text) < 2:
        yield "objective.teacher_mix", "there is one sentence teacher"
    if len(teachers.tokens) < 2:
        yield "objective.g2l_mix", "there is one token teacher"
    if not (data.text and data.pairs):
        yield "objective.alternation", "there is one stream"
    elif data.pair_fraction:
        yield "objective.alternation", "data.pair_fraction decides"


def _idle_data(config: Config) -> Iterator[tuple[str, str]]:
    data, teachers, needs = config.data, config.teachers, needs_of(config.objective)
    if data.builder == "none":
        yield "data.builder_options", "data.builder is none"
    if not data.remote:
        yield "data.cache", "data.remote is empty"
    if not (needs.image and teachers.image and not teachers.image.startswith(STORED)):
        for key in ("crop_area", "flip"):
            yield f"data.{key}", "no teacher reads images online"
    yield from _idle_teachers(config, needs)


def _idle_teachers(config: Config, needs: Needs) -> Iterator[tuple[str, str]]:
    teachers, why = config.teachers, "no term of the objective reads it"
    if not needs.image and not config.eval.retrieval:
        yield "teachers.image", why
    if not needs.caption:
        yield "teachers.caption", why
    if not needs.tokens:
        yield "teachers.tokens", why
    if not needs.text:
        yield "teachers.text", why
    if not needs.text or not any(spec.startswith("hf:") for spec in teachers.text):
        yield "teachers.text_poolers", "no 'hf:' sentence teacher is used"
    if len(teachers.text) < 2 or not (needs.text or needs.tokens):
        yield "teachers.text_weights", "no sentence teachers are mixed"


def _idle_others(config: Config) -> Iterator[tuple[str, str]]:
    needs, options = needs_of(config.objective), config.eval
    if not needs.grounding:
        yield "model.grounding_width", "no term compares texts with images"
    if not (needs.grounding and config.objective.image_weight > 0):
        yield "eval.retrieval", "no term compares texts with images"
    if not needs.consistency:
        yield "model.consistency_width", "the consistency module is not used"
    if config.optim.name == "sgd":
        for key in ("betas", "eps"):
            yield f"optim.{key}", "optim.name is sgd"
    if not options.tasks and not options.graded_dev:
        yield "eval.every", "eval.tasks and eval.graded_dev are empty"
    elif not options.every:
        yield "eval.select", "eval.every is 0"
    if not (options.tasks or options.final_tasks or options.graded_dev or options.graded_test):
        yield "eval.batch_size", "nothing is evaluated"
