"""The schema of a run: one frozen dataclass a section, every key with the sentence of its help.

The annotation of a key is its allowed type, at run time too: `loading` checks values against it,
`json_schema` and ``--help`` print it. Ranges of numbers are in `limits`.
"""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar

from dalr_scale.errors import UserError

T = TypeVar("T")

# A table whose keys another library defines: transformers' configuration, a builder's options.
FreeTable: TypeAlias = dict[str, Any]
Pooler = Literal["cls_before_pooler", "cls", "mean"]
StsTask = Literal[
    "STS12", "STS13", "STS14", "STS15", "STS16", "STS-B", "STS-B-dev", "SICK-R", "SICK-R-dev"
]
Scheme = Literal["https", "http", "s3", "gs", "hf", "memory"]


def opt(default: T, text: str) -> T:
    """A field with a default and the sentence that ``--help`` and the docs print for it.

    Of a table, every configuration gets its own copy.
    """
    copied = functools.partial(copy.copy, default)
    if isinstance(default, Mapping):
        return field(default_factory=copied, metadata={"help": text})
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class RunConfig:
    """Identity of the run and the limits of its start."""

    name: str = opt("run", "name of the run; the default directory is runs/NAME")
    dir: str = opt("", "run directory; empty: runs/NAME")
    seed: int = opt(1, "seed of the order, the initialisation and every random draw")
    from_scratch: bool = opt(
        False, "start again although the run directory holds a run (the old one is moved aside)"
    )
    allow_change: bool = opt(
        False, "resume although versions, settings or files that change the result differ"
    )
    watchdog_minutes: float = opt(30.0, "abort a rank that makes no progress this long; 0: never")
    max_minutes: float = opt(0.0, "stop with a checkpoint after this many minutes; 0: no limit")


@dataclass(frozen=True)
class DataConfig:
    """Shards, their order, and the loader."""

    root: str = opt(
        "", "directory of raw and evaluation data; empty: environment variable DALR_DATA"
    )
    shards: str = opt("shards", "directory of prepared shards; {shards} in other paths")
    builder: Literal["none", "quickstart"] = opt(
        "none", "'quickstart' draws the data and trains the teachers first"
    )
    builder_options: FreeTable = opt({}, "settings of the builder (QuickstartSpec)")
    pairs: tuple[str, ...] = opt((), "shards of captioned images (paths, globs, braces)")
    text: tuple[str, ...] = opt((), "shards of sentences without images")
    tokenizer: str = opt(
        "", "directory or vocab.txt of the student's tokenizer; empty: the encoder's"
    )
    pair_fraction: float = opt(
        0.0, "share of paired batches, in place of objective.alternation; 0: off"
    )
    max_length: int = opt(32, "longest sentence in tokens, special tokens included")
    workers: int = opt(1, "loader processes per rank; 0: in the training process")
    pair_weights: tuple[float, ...] = opt(
        (), "weight of each entry of `pairs` in a paired batch; empty: by their sizes"
    )
    text_weights: tuple[float, ...] = opt((), "the same for `text`")
    max_bad_fraction: float = opt(
        0.01, "stop when more than this share of a stream's items cannot be used"
    )
    crop_area: float = opt(
        1.0, "images read online: smallest share of the area that a random crop keeps; 1: off"
    )
    flip: float = opt(0.0, "images read online: probability of the mirror image")
    remote: tuple[Scheme, ...] = opt((), "URL schemes that shards may have")
    cache: str = opt("", "directory for remote shards; empty: ~/.cache/dalr_scale")


@dataclass(frozen=True)
class ModelConfig:
    """The student: encoder, pooler and heads."""

    encoder: str = opt(
        "", "Hugging Face directory or name; empty: from scratch from `architecture`"
    )
    architecture: FreeTable = opt({}, "configuration of a new encoder (model_type, ...)")
    pooler: Literal["", Pooler] = opt(
        "", "token states to the sentence state h; empty: the encoder directory's own, mean if new"
    )
    grounding_width: int = opt(256, "width P of the shared image-text space")
    consistency_width: int = opt(256, "output width of the consistency module's aligners")
    head_init_std: float = opt(0.02, "standard deviation of the sentence head's weights")
    activation_checkpointing: bool = opt(False, "recompute activations in the backward pass")


def new_encoder_pooler(model: ModelConfig) -> Pooler:
    """The pooler of an encoder from scratch: as configured, else the mean of the token states.

    An untrained encoder's first state hardly depends on the sentence: all sentences get one vector,
    and the contrastive loss stays at log N for hundreds of steps.
    """
    return model.pooler or "mean"


@dataclass(frozen=True)
class TeachersConfig:
    """Frozen teachers: stored features or models."""

    image: str = opt("", "image features V: 'features:NAME' or 'open_clip:DIRECTORY'")
    caption: str = opt("", "caption features of the same space (KDMCSE): as `image`")
    text: tuple[str, ...] = opt(
        (), "sentence teachers e_k: 'features:NAME', 'hf:DIRECTORY' or 'open_clip:DIRECTORY'"
    )
    text_poolers: tuple[Literal["", Pooler], ...] = opt(
        (), "pooler of each entry of `text`; empty for all but 'hf:'"
    )
    text_weights: tuple[float, ...] = opt(
        (), "mixing weights alpha_k; empty: 0.33, 0.67 for two teachers, else equal"
    )
    tokens: tuple[str, ...] = opt(
        (),
        "token teachers for global-to-local: at most one 'features:NAME', any 'hf:DIRECTORY'; "
        "several are weighted as the sentence teachers at their positions",
    )


# The objective. Each group of keys is a class, and `ObjectiveConfig` is all of them: keys stay flat
# (``objective.rank_weight``), and a term takes the one group that it reads.


@dataclass(frozen=True)
class PresetConfig:
    """Preset: where every other key of this section starts from."""

    preset: str = opt("dalr", "simcse, mcse, kdmcse, dalr-reference or dalr")


@dataclass(frozen=True)
class SimilarityConfig:
    """Text-text similarities: read by several terms."""

    temperature: float = opt(0.05, "tau of text-text similarities")
    margin: float = opt(0.2, "angular margin m1 of L_con, radians")


@dataclass(frozen=True)
class NegativesConfig:
    """Negatives."""

    same_image: Literal["keep", "mask"] = opt(
        "mask", "captions of the same image: negatives, or out of the denominators"
    )


@dataclass(frozen=True)
class ContrastiveConfig(SimilarityConfig, NegativesConfig):
    """Contrastive loss L_con."""

    margin_in_text_batches: bool = opt(True, "keep m1 in batches without images")


@dataclass(frozen=True)
class TextTeacherConfig:
    """Sentence teachers: S_TT, read by L_CMA, L_IMA and L_rank."""

    teacher_mix: Literal["features", "similarities"] = opt(
        "similarities", "what two text teachers mix for S_TT"
    )
    teacher_similarity_dtype: Literal["float16", "float32", "float64"] = opt(
        "float32",
        "what the teachers' cosines are rounded to; float64: computed and mixed in it, rounded to "
        "the precision of the losses at the end",
    )
    teacher_tokenizer: Literal["must_match", "retokenise"] = opt(
        "retokenise", "a teacher whose vocabulary differs: refuse, or use its own tokenizer"
    )


@dataclass(frozen=True)
class DivergenceConfig(SimilarityConfig):
    """Alignment by KL divergence: read by L_CMA and L_IMA."""

    kl_student_temperature: float = opt(0.45, "student temperature of both KLs")
    kl_teacher_temperature: float = opt(0.5, "teacher temperature of both KLs")


@dataclass(frozen=True)
class CrossModalConfig:
    """Cross-modal group."""

    cross_weight: float = opt(0.1, "lambda, weight of the cross-modal group")


@dataclass(frozen=True)
class BranchConfig(CrossModalConfig, NegativesConfig):
    """Cross-modal group, L_xce: InfoNCE of texts against images and against CLIP captions."""

    image_weight: float = opt(1.0, "w_v of L_xce with images as columns")
    caption_weight: float = opt(0.0, "w_t of L_xce with CLIP captions as columns (KDMCSE)")
    vl_temperature: float = opt(0.05, "tau of image-text similarities")
    vl_margin: float = opt(0.2, "angular margin m2 of L_xce, radians")
    soft_labels: Literal["none", "image", "caption", "consistency"] = opt(
        "consistency", "what softens the margin of the image branch"
    )
    caption_soft_labels: Literal["none", "image", "caption", "consistency"] = opt(
        "none", "what softens the margin of the caption branch"
    )
    clamp_soft_labels: bool = opt(True, "clamp soft labels to [0, 1]")
    false_negative_threshold: float = opt(
        0.0, "drop negatives whose caption-image cosine exceeds this (KDMCSE option); 0: off"
    )


@dataclass(frozen=True)
class ConsistencyConfig(CrossModalConfig):
    """Cross-modal group, L_cons: the auxiliary task whose cosines are soft labels."""

    consistency_weight: float = opt(1.0, "w_cons of L_cons")
    unmatched: Literal["roll", "shift"] = opt(
        "shift", "unmatched image of L_cons: five rows earlier, or a random shift"
    )


@dataclass(frozen=True)
class CrossAlignmentConfig(CrossModalConfig, DivergenceConfig, TextTeacherConfig):
    """Cross-modal group, L_CMA: alignment between texts and images."""

    cross_kl_weight: float = opt(1.0, "w_cma of L_CMA")
    cross_kl_student: Literal["margin", "cosine"] = opt("cosine", "student matrix of L_CMA")
    image_projection: Literal["identity", "learned"] = opt(
        "learned", "z_1 against image features of another width: refuse, or a learned projection"
    )


@dataclass(frozen=True)
class IntraModalConfig:
    """Intra-modal group."""

    intra_weight: float = opt(0.2, "mu, weight of the intra-modal group")
    distil_text_batches: bool = opt(
        False, "L_IMA and L_rank in text-only batches too (needs teachers; not in the paper)"
    )


@dataclass(frozen=True)
class IntraAlignmentConfig(IntraModalConfig, DivergenceConfig, TextTeacherConfig):
    """Intra-modal group, L_IMA: alignment between both views of the texts."""

    intra_kl_weight: float = opt(1.0, "w_ima of L_IMA")
    intra_kl_student: Literal["margin", "cosine"] = opt("cosine", "student matrix of L_IMA")


@dataclass(frozen=True)
class RankingConfig(IntraModalConfig, SimilarityConfig, TextTeacherConfig):
    """Intra-modal group, L_rank: ranking distillation."""

    rank_weight: float = opt(1.0, "gamma of L_rank")
    rank_loss: Literal["listmle", "listnet"] = opt("listmle", "form of L_rank")
    rank_student: Literal["margin", "cosine"] = opt("cosine", "student matrix of L_rank")
    rank_teacher_temperature: float = opt(0.05, "tau_2 of the ranking list R")
    listmle_reduction: Literal["sum", "mean"] = opt("mean", "over the list, in ListMLE")
    listmle_eps: float = opt(0.0, "constant inside ListMLE's logarithm")


@dataclass(frozen=True)
class GlobalToLocalConfig(IntraModalConfig, SimilarityConfig, NegativesConfig):
    """Intra-modal group, L_g2l: global-to-local matching with the teachers' tokens."""

    g2l_weight: float = opt(1.0, "w_g2l of L_g2l")
    token_projection: Literal["identity", "learned"] = opt(
        "learned", "z_1 against token features of another width: refuse, or a learned projection"
    )
    g2l_norm: Literal["axis", "token"] = opt("token", "norm of token features in L_g2l")
    g2l_unit_rows: bool = opt(True, "unit z_1 in L_g2l")
    g2l_mix: Literal["auto", "features", "losses"] = opt(
        "auto",
        "several token teachers: mix their tokens, or sum their losses; auto: mix tokens of equal"
        " tokenizers, lengths and widths",
    )


@dataclass(frozen=True)
class AddedTermsConfig:
    """Terms without a key of their own (see CONTRIBUTING.md)."""

    terms: dict[str, float] = opt({}, "weight of each such term by its name; 0 or absent: off")


@dataclass(frozen=True)
class BatchOrderConfig:
    """Order of the batches."""

    alternation: Literal["reference", "proportional"] = opt(
        "proportional", "how text-only and paired batches take turns"
    )
    tail: Literal["drop", "keep"] = opt(
        "drop", "the last batch of an epoch when it is not full (keep: if it has two rows or more)"
    )


# dataclasses collect the fields of the last base first: this list is read from below
@dataclass(frozen=True)
class ObjectiveConfig(
    BatchOrderConfig,
    AddedTermsConfig,
    GlobalToLocalConfig,
    RankingConfig,
    IntraAlignmentConfig,
    CrossAlignmentConfig,
    ConsistencyConfig,
    BranchConfig,
    ContrastiveConfig,
    PresetConfig,
):
    """Every quantity in which the presets differ, and the temperatures they share."""


@dataclass(frozen=True)
class BatchConfig:
    """The global batch and its chunks."""

    global_size: int = opt(128, "rows of one optimizer step over all ranks: the effective batch")
    micro_size: int = opt(0, "rows a rank encodes at a time; 0: its whole share")
    sort_by_length: bool = opt(True, "cut chunks from the rows sorted by length: less padding")
    dropout_keys: Literal["rank", "row"] = opt(
        "rank", "dropout masks keyed by rank and chunk, or by the row's number in the global batch"
    )


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer, schedule and length of the run."""

    lr: float = opt(2e-5, "peak learning rate")
    embedding_lr: float = opt(0.0, "learning rate of the embedding tables; 0: lr")
    weight_decay: float = opt(0.0, "decoupled weight decay (not on biases and norms)")
    betas: tuple[float, float] = opt((0.9, 0.999), "AdamW")
    eps: float = opt(1e-6, "AdamW")
    clip: float = opt(1.0, "global gradient norm; 0: off")
    steps: int = opt(0, "optimizer steps; 0: from epochs")
    epochs: float = opt(
        1.0,
        "epochs of N_text + N_pair steps, the batches that read each stream once; alternation "
        "'reference' and a pair_fraction share these steps out in other proportions",
    )
    warmup: int = opt(
        0, "steps of linear warm-up before the linear decay to 0; fewer than the run has"
    )
    name: Literal["adamw", "sgd"] = opt("adamw", "sgd is for exactness tests")


@dataclass(frozen=True)
class EngineConfig:
    """Distribution over ranks, and precision."""

    kind: Literal["zero1", "zero2", "zero3", "ddp"] = opt("zero2", "DeepSpeed stage, or plain DDP")
    precision: Literal["auto", "fp32", "bf16", "fp64"] = opt(
        "auto", "auto: bf16 where the accelerator has it, else fp32; fp64: ddp only"
    )
    offload_optimizer: bool = opt(False, "keep optimizer state in host memory")
    ds_config: str = opt(
        "", "an edited copy of ds_configs/STAGE.json; it may not contradict the run's settings"
    )
    timeout_minutes: float = opt(30.0, "of every collective")
    threads: int = opt(0, "CPU threads per rank; 0: cores divided by the ranks of this host")


@dataclass(frozen=True)
class EvalConfig:
    """Evaluations before, during and after training."""

    every: int = opt(125, "steps between evaluations; 0: only before and after training")
    tasks: tuple[StsTask, ...] = opt((), "STS tasks during training, e.g. STS-B-dev")
    final_tasks: tuple[StsTask, ...] = opt((), "STS tasks before and after training")
    graded_dev: str = opt("", "JSONL of graded pairs scored during training")
    graded_test: str = opt("", "JSONL of graded pairs scored before and after training")
    retrieval: tuple[str, ...] = opt((), "held-out pair shards for caption-image recall")
    select: str = opt("", "task whose best score keeps a checkpoint; empty: the first one")
    batch_size: int = opt(128, "sentences encoded at a time")


@dataclass(frozen=True)
class SaveConfig:
    """Checkpoints."""

    every_steps: int = opt(0, "steps between checkpoints; 0: at the end of training only")
    every_minutes: float = opt(15.0, "minutes between checkpoints; 0: off")
    keep: int = opt(2, "valid checkpoints kept, at least 2")
    on_error: Literal["continue", "stop"] = opt("continue", "when a checkpoint cannot be written")


@dataclass(frozen=True)
class LogConfig:
    """Log lines and TensorBoard."""

    every: int = opt(10, "steps between log lines")
    tensorboard: bool = opt(True, "write RUN/tensorboard")


@dataclass(frozen=True)
class Config:
    """One run. Sections are separate so that ``--section.key=value`` names exactly one field."""

    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    teachers: TeachersConfig = field(default_factory=TeachersConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    save: SaveConfig = field(default_factory=SaveConfig)
    log: LogConfig = field(default_factory=LogConfig)

    @property
    def run_dir(self) -> Path:
        """The run directory."""
        return Path(self.run.dir or f"runs/{self.run.name}").expanduser()

    def path(self, text: str) -> Path:
        """A configured path with ``{root}``, ``{shards}`` and ``~`` filled in."""
        if "{root}" in text and not self.data_root:
            raise UserError(
                f"'{text}' needs the data directory: set --data.root or the environment "
                "variable DALR_DATA"
            )
        filled = text.replace("{shards}", self.data.shards).replace("{root}", str(self.data_root))
        return Path(filled).expanduser()

    @property
    def data_root(self) -> Path | None:
        """The directory of raw and evaluation data, None where none is set."""
        root = self.data.root or os.environ.get("DALR_DATA", "")
        return Path(root).expanduser() if root else None
