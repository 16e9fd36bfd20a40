"""From a configuration to the parts of a run: streams, order, model, frozen teachers.

Everything that can be wrong with a configuration and its files is found here, before a process
waits for another one and before a weight is trained.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedTokenizerBase

from dalr_scale.data.shards.token_id_store import Encoding
from dalr_scale.data.stream.bad_rows import BadRows
from dalr_scale.data.stream.opening import (
    count_bad_rows,
    find_shards,
    open_source,
    plan_stream,
)
from dalr_scale.data.stream.order import StreamPlan
from dalr_scale.data.stream.source import Source, Sources
from dalr_scale.errors import UserError
from dalr_scale.models.build import build_encoder as build_student
from dalr_scale.models.dalr import DalrModel, FeatureWidths, LossSpec
from dalr_scale.models.tokenizer import tokenizer_hash
from dalr_scale.objective.registry import needs_of
from dalr_scale.teachers.mixing import resolve_token_mix, text_weights, token_weights
from dalr_scale.teachers.online import (
    STORED,
    OnlineOptions,
    OnlineTeachers,
    build_online_teachers,
    check_stored_tokenizers,
)
from dalr_scale.training.optim import count_steps

if TYPE_CHECKING:
    from dalr_scale.config import Config
    from dalr_scale.distributed.world import World
    from dalr_scale.models.encoder import SentenceEncoder
    from dalr_scale.objective.term import Needs
    from dalr_scale.quickstart.build import QuickstartSpec

MODELS = ("hf", "open_clip")


@dataclass(frozen=True)
class Streams:
    """The data of a run: both sources and the order that makes batches of them."""

    text: Source | None
    pairs: Source | None
    plan: StreamPlan
    total_steps: int
    bad_rows: BadRows

    @property
    def fingerprint(self) -> str:
        parts = [s.fingerprint for s in (self.text, self.pairs) if s is not None]
        return "+".join(parts)

    @property
    def contents(self) -> dict[str, dict[str, str]]:
        """Digests of the shards and their features, by stream."""
        given = {"data.text": self.text, "data.pairs": self.pairs}
        return {name: s.contents for name, s in given.items() if s is not None}


def prepare_data(config: Config, world: World) -> None:
    """Draws the quickstart's data and trains its teachers, once, on rank 0."""
    if config.data.builder != "quickstart":
        return
    from dalr_scale.quickstart.build import build_quickstart

    refusal = None
    if world.rank == 0:
        try:
            build_quickstart(config.path("{shards}"), quickstart_spec(config))
        except UserError as error:
            refusal = str(error)
    if (refusal := world.broadcast_object(refusal)) is not None:
        raise UserError(refusal)


def quickstart_spec(config: Config) -> QuickstartSpec:
    """``data.builder_options``, typed and checked."""
    from dalr_scale.quickstart.build import QuickstartSpec

    kinds = {f.name: type(f.default) for f in dataclasses.fields(QuickstartSpec)}
    options = config.data.builder_options
    if unknown := sorted(set(options) - set(kinds)):
        raise UserError(f"data.builder_options: unknown {unknown}; known: {sorted(kinds)}")
    for name, value in options.items():
        wanted = int | float if kinds[name] is float else int
        if not isinstance(value, wanted) or isinstance(value, bool):
            raise UserError(
                f"data.builder_options.{name} = {value!r} must be of type {kinds[name].__name__}"
            )
    return QuickstartSpec(**options)


def build_streams(config: Config) -> Streams:
    """Opens the shards and their features, and lays out the order of the batches."""
    needs, data = needs_of(config.objective), config.data
    roles = pair_roles(config, needs)
    online = needs.image and _online(config.teachers.image)
    pairs = open_source(
        data, config.path, data.pairs, data.pair_weights, features=roles, with_images=online
    )
    roles = _text_roles(config, needs) if config.objective.distil_text_batches else {}
    text = open_source(data, config.path, data.text, data.text_weights, features=roles)
    sources = Sources(text, pairs)
    plan = plan_stream(
        data,
        sources,
        seed=config.run.seed,
        global_batch=config.batch.global_size,
        alternation=config.objective.alternation,
        tail=config.objective.tail,
    )
    steps = count_steps(config.optim, plan.steps_per_epoch)
    return Streams(text, pairs, plan, steps, count_bad_rows(data, sources))


def pair_roles(config: Config, needs: Needs) -> dict[str, str]:
    """Role -> stored feature set, for the features that the objective reads.

    Raises:
        UserError: a teacher that the objective needs is missing, misspelt or of the wrong kind.
    """
    teachers = config.teachers
    roles = _text_roles(config, needs)
    for role, wanted, specs in (
        ("image", needs.image, (teachers.image,)),
        ("caption", needs.caption, (teachers.caption,)),
        ("tokens", needs.tokens, teachers.tokens),
    ):
        if wanted and not any(specs):
            raise UserError(
                f"this objective needs {role} features: set teachers.{role} "
                f"(features:NAME, or a model directory), or weight 0 on the terms that use them"
            )
        for spec in specs if wanted else ():
            _check_teacher(role, spec, ("open_clip",) if role == "image" else MODELS)
        stored = [spec.removeprefix(STORED) for spec in specs if spec.startswith(STORED)]
        if wanted and len(stored) > 1:
            raise UserError(f"teachers.{role} names {len(stored)} stored feature sets; one at most")
        if wanted and stored:
            roles[role] = stored[0]
    if "tokens" in roles and config.objective.g2l_norm == "axis":
        raise UserError(
            "objective.g2l_norm = axis divides by a norm over padding positions too, and stored "
            "token features have none: use an hf:DIRECTORY teacher, or --objective.g2l_norm=token"
        )
    return roles


def _text_roles(config: Config, needs: Needs) -> dict[str, str]:
    if needs.text and not config.teachers.text:
        raise UserError(
            "this objective needs a sentence teacher: set teachers.text (features:NAME, "
            "hf:DIRECTORY or open_clip:DIRECTORY), or weight 0 on ranking and alignment"
        )
    specs = config.teachers.text if needs.text else ()
    for spec in specs:
        _check_teacher("text", spec, MODELS)
    return {
        f"text{k}": spec.removeprefix(STORED)
        for k, spec in enumerate(specs)
        if spec.startswith(STORED)
    }


def _check_teacher(role: str, spec: str, models: tuple[str, ...]) -> None:
    """A misspelt teacher would otherwise show as a shard without images, or much later."""
    kind, _, name = spec.partition(":")
    if not name or (f"{kind}:" != STORED and kind not in models):
        forms = " or ".join([f"{STORED}NAME", *(f"{model}:DIRECTORY" for model in models)])
        raise UserError(f"teachers.{role}: '{spec}' must be {forms}")


def _online(spec: str) -> bool:
    return bool(spec) and not spec.startswith(STORED)


@dataclass(frozen=True)
class ModelParts:
    """The trainable module and what stands frozen beside it."""

    model: DalrModel
    teachers: OnlineTeachers
    tokenizer: PreTrainedTokenizerBase


def build_model(config: Config, streams: Streams, world: World) -> ModelParts:
    """Builds the trainable module from the seed, and the online teachers.

    Called before any DeepSpeed object exists: under ZeRO-3 every ``from_pretrained`` after that
    would be sharded, frozen teachers included.
    """
    torch.manual_seed(config.run.seed)
    encoder = build_encoder(config)
    needs = needs_of(config.objective)
    options = OnlineOptions(
        path_of=config.path,
        max_length=config.data.max_length,
        student_ids=config.objective.teacher_tokenizer == "must_match",
        norm_over_axis=config.objective.g2l_norm == "axis",
        micro_rows=config.batch.micro_size,
    )
    teachers = build_online_teachers(
        config.teachers, needs, encoder.tokenizer, world.device, options
    )
    _use_stored_ids(config, streams, encoder.tokenizer)
    if streams.pairs is not None and needs.text and options.student_ids:
        check_stored_tokenizers(config.teachers, streams.pairs, encoder.tokenizer)
    widths = _widths(config, streams, teachers, needs)
    objective = resolve_token_mix(config, streams.pairs, teachers)
    weights, shares = text_weights(config), token_weights(config) if needs.tokens else ()
    spec = LossSpec(objective, weights, config.run.seed, shares)
    # a pretrained encoder comes in evaluation mode: without dropout and activation checkpointing
    model = DalrModel(encoder, config.model, spec, widths).train()
    return ModelParts(model, teachers, encoder.tokenizer)


def _use_stored_ids(config: Config, streams: Streams, tokenizer: PreTrainedTokenizerBase) -> None:
    padding = tokenizer.pad_token_id
    assert padding is None or isinstance(padding, int)
    encoding = Encoding(tokenizer_hash(tokenizer), config.data.max_length, padding or 0)
    for source in (streams.text, streams.pairs):
        if source is not None:
            source.use_token_ids(encoding)


def build_encoder(config: Config) -> SentenceEncoder:
    """The student's encoder, see ``models.build``."""
    return build_student(
        config.model,
        config.data,
        config.path,
        row_keyed_dropout=config.batch.dropout_keys == "row",
        use_reentrant=config.engine.kind == "zero3",
    )


def _widths(
    config: Config, streams: Streams, teachers: OnlineTeachers, needs: Needs
) -> FeatureWidths:
    stored = streams.pairs
    online = teachers.widths

    if stored is None:
        return FeatureWidths()

    def width(role: str) -> int:
        if role in online:
            return online[role]
        return stored.feature_dim("tokens" if role.startswith("tokens") else role)

    count = len(config.teachers.tokens) if needs.tokens else 0
    tokens = tuple(width(f"tokens{k}") for k in range(count))
    texts = tuple(width(f"text{k}") for k in range(len(config.teachers.text) if needs.text else 0))
    if config.objective.teacher_mix == "features" and len(set(texts)) > 1:
        raise UserError(
            f"sentence teachers of widths {texts} cannot be mixed as features; set "
            "--objective.teacher_mix=similarities"
        )
    return FeatureWidths(
        image=width("image") if needs.image else 0,
        caption=width("caption") if needs.caption else 0,
        text=texts,
        tokens=tokens,
    )


def open_held_out(config: Config) -> Source | None:
    """The pairs for caption-image recall, where the images' features are stored."""
    if not config.eval.retrieval:
        return None
    name = config.teachers.image.removeprefix(STORED)
    shards = find_shards(config.data, config.path, config.eval.retrieval, (name,))
    return Source(shards, features={"image": name})
