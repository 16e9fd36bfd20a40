"""The sentence encoder: a Hugging Face transformer with an explicit pooler.

The pooler is read from the directory's metadata or given by the caller, and never guessed from a
name, because a wrong guess silently scores another model.
"""

import difflib
import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModel,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_MAPPING

from dalr_scale.errors import UserError
from dalr_scale.models import directories
from dalr_scale.models.tokenizer import (
    first_line,
    has_tokenizer,
    length_sorted_batches,
    load_tokenizer,
    quiet,
)

if TYPE_CHECKING:
    from dalr_scale.models.row_dropout import RowKeys

__all__ = [
    "POOLERS",
    "SentenceEncoder",
    "check_weights",
    "encode_sentences",
    "load_backbone",
    "load_tokenizer",
    "make_encode_fn",
    "max_length_of",
    "pool",
]

Pooler = Literal["cls_before_pooler", "cls", "mean"]
POOLERS: tuple[Pooler, ...] = ("cls_before_pooler", "cls", "mean")
_DEFAULT_MAX_LENGTH = 512


def pool(
    hidden: Tensor, mask: Tensor, pooler: str, backbone: PreTrainedModel | None = None
) -> Tensor:
    """Reduce token states to one vector per sentence.

    Args:
        hidden: last hidden states [B, L, H]; the first token must be at position 0 (right padding).
        mask: attention mask [B, L], 1 for real tokens.
        pooler: `cls_before_pooler` (state of the first token), `cls` (the same through the
            checkpoint's own MLP, taken from `backbone.pooler`) or `mean` (over real tokens,
            summed in float32 for half-precision states).
        backbone: the transformer, only needed for `cls`.

    Returns:
        [B, H] in the dtype of `hidden`.
    """
    if pooler == "cls_before_pooler":
        return hidden[:, 0]
    if pooler == "cls":
        mlp = getattr(backbone, "pooler", None)
        if mlp is None:
            raise UserError("pooler 'cls' needs a checkpoint with an MLP pooler; this one has none")
        return mlp(hidden)
    if pooler != "mean":
        raise UserError(f"unknown pooler {pooler!r}; choose one of {', '.join(POOLERS)}")
    wide = hidden.float() if hidden.dtype in (torch.float16, torch.bfloat16) else hidden
    weights = mask.to(wide.dtype).unsqueeze(-1)
    return ((wide * weights).sum(1) / weights.sum(1).clamp(min=1e-9)).to(hidden.dtype)


class SentenceEncoder(nn.Module):
    """A transformer, its tokenizer and its pooler.

    `forward(input_ids, attention_mask)` maps [B, L] token ids to [B, H]. Token type ids are never
    passed, so they are zero, as in the published training code. The MLP pooler of BERT-like models
    is only built when it is used: sharded optimizers do not handle parameters without a gradient.

    Attributes:
        row_keys: keys of row-keyed dropout, where it is installed.
    """

    def __init__(
        self,
        backbone: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        pooler: str,
        *,
        base: str = "scratch",
    ):
        super().__init__()
        _check_pooler(pooler)
        self.backbone = backbone
        self.tokenizer = tokenizer
        self.pooler = pooler
        self.base = base
        self.row_keys: RowKeys | None = None
        _check_padding(backbone, tokenizer)
        if pooler == "cls" and getattr(backbone, "pooler", None) is None:
            raise UserError(
                f"a {backbone.config.model_type} model has no MLP pooler; choose pooler "
                "cls_before_pooler or mean"
            )

    @classmethod
    def from_directory(cls, path: str | Path, pooler: str | None = None) -> "SentenceEncoder":
        """Load a Hugging Face or sentence-transformers directory (safetensors only).

        Args:
            path: directory, `package:NAME/SUB`, installed package, or Hub name (`name@revision`).
            pooler: one of `POOLERS`; needed when the directory does not state one.

        Raises:
            UserError: weights missing or not safetensors, custom code, or no pooler known.
        """
        directory = directories.resolve_directory(path)
        pooler = pooler or directories.stored_pooler(directory)
        if pooler is None:
            raise UserError(
                f"{directory} does not say how it pools; name one of {', '.join(POOLERS)}: "
                "--model.pooler for a run, --pooler for other commands, teachers.text_poolers for "
                "teachers"
            )
        _check_pooler(pooler)
        inner = directories.transformer_directory(directory)
        backbone = load_backbone(inner, with_pooler=pooler == "cls")
        holder = directory if has_tokenizer(directory) else inner
        return cls(
            backbone, load_tokenizer(holder), pooler, base=directories.directory_label(directory)
        )

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, pooler: str
    ) -> "SentenceEncoder":
        """Build an untrained encoder, e.g. `{"model_type": "bert", "hidden_size": 128, ...}`.

        Vocabulary size and special token ids come from the tokenizer unless stated. Weights are
        drawn from torch's global generator: seed it first.

        Raises:
            UserError: unknown key or model type, or a vocabulary smaller than the tokenizer's.
        """
        _check_pooler(pooler)
        full = _model_config(config, tokenizer)
        with quiet():
            backbone = AutoModel.from_config(
                full, dtype=torch.float32, **_pooling_switch(full, pooler == "cls")
            )
        return cls(backbone, tokenizer, pooler, base=f"{full.model_type}, from scratch")

    @property
    def width(self) -> int:
        """Width H of the embedding."""
        return int(self.backbone.config.hidden_size)

    @property
    def max_length(self) -> int:
        """Longest input in tokens, special tokens included, that the model has positions for."""
        return max_length_of(self.backbone, self.tokenizer)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Embed token ids [B, L] with mask [B, L]; returns [B, H]."""
        output = self.backbone(input_ids=input_ids, attention_mask=attention_mask)
        if self.pooler == "cls":
            return output.pooler_output
        return pool(output.last_hidden_state, attention_mask, self.pooler)

    def gradient_checkpointing(self, enabled: bool = True, *, use_reentrant: bool = False) -> None:
        """Switch activation checkpointing.

        ZeRO-3 with frozen parameters needs `use_reentrant`
        (https://github.com/huggingface/transformers/issues/47254).
        """
        # Renamed during transformers 5; the old name warns in versions that have the new one.
        renamed = hasattr(self.backbone, "activation_checkpointing_enable")
        name = "activation_checkpointing" if renamed else "gradient_checkpointing"
        if use_reentrant:
            # true of the forward pass without a graph, where it is harmless
            warnings.filterwarnings("ignore", message="None of the inputs have requires_grad")
        if enabled:
            options = {f"{name}_kwargs": {"use_reentrant": use_reentrant}}
            getattr(self.backbone, f"{name}_enable")(**options)
        else:
            getattr(self.backbone, f"{name}_disable")()

    def save(
        self,
        directory: str | Path,
        *,
        overwrite: bool = False,
        state_dict: Mapping[str, Tensor] | None = None,
        scores: Mapping[str, float] | None = None,
    ) -> Path:
        """Write a directory that `AutoModel`, `SentenceTransformer` and `from_directory` load.

        Args:
            directory: destination; written next to it first, then renamed into place.
            overwrite: replace an existing directory.
            state_dict: complete weights under this module's names (`backbone. ...`), for a module
                whose own parameters are sharded; by default the module's own.
            scores: task name to score x 100, for the model card and its config.json.

        Raises:
            UserError: the directory exists, or a weight is missing, misshaped or not finite.
        """
        final = Path(directory)
        weights = self._weights(state_dict)
        dense = self._dense(weights)
        config = self.backbone.config
        facts = {"pooler": self.pooler, "base": self.base, "scores": dict(scores or {})}
        setattr(config, directories.META_KEY, facts)
        with directories.new_directory(final, overwrite=overwrite) as fresh, quiet():
            self.backbone.save_pretrained(str(fresh), state_dict=weights)
            _save_tokenizer(self.tokenizer, fresh, self.max_length)
            directories.write_sentence_transformers_files(
                fresh,
                pooler=self.pooler,
                width=self.width,
                max_length=self.max_length,
                dense=dense is not None,
            )
            if dense is not None:
                save_file(dense, fresh / "2_Dense" / "model.safetensors", {"format": "pt"})
            card = directories.model_card(
                pooler=self.pooler,
                base=self.base,
                width=self.width,
                max_length=self.max_length,
                scores=scores,
            )
            (fresh / "README.md").write_text(card, encoding="utf-8")
        return final

    def _weights(self, state_dict: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        """The backbone's weights as float32 on the CPU, checked against the configuration."""
        source = self.state_dict() if state_dict is None else state_dict
        prefix = "backbone."
        weights = {
            name.removeprefix(prefix): value.detach().to("cpu", torch.float32).contiguous()
            for name, value in source.items()
            if name.startswith(prefix)
        }
        # DeepSpeed's ZeRO-3 leaves empty parameters behind that remember their shape.
        own = self.backbone.state_dict(keep_vars=True)
        shapes = {name: getattr(value, "ds_shape", value.shape) for name, value in own.items()}
        check_weights(weights, shapes)
        return weights

    def _dense(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        """Weights of the MLP pooler as a `Dense` module, or None when the pooler has no MLP."""
        if self.pooler != "cls":
            return None
        activation = getattr(self.backbone.pooler, "activation", None)
        if "pooler.dense.weight" not in weights or not isinstance(activation, nn.Tanh):
            raise UserError(
                f"the MLP pooler of {self.backbone.config.model_type} has no sentence-transformers "
                "counterpart; train with pooler mean or cls_before_pooler to export it"
            )
        return {
            "linear.weight": weights["pooler.dense.weight"].clone(),
            "linear.bias": weights["pooler.dense.bias"].clone(),
        }


def _save_tokenizer(tokenizer: PreTrainedTokenizerBase, directory: Path, max_length: int) -> None:
    """Save with the model's limit, so that others truncate before the positions run out."""
    stated, tokenizer.model_max_length = tokenizer.model_max_length, max_length
    try:
        tokenizer.save_pretrained(str(directory))
    finally:
        tokenizer.model_max_length = stated


def check_weights(weights: Mapping[str, Tensor], expected: Mapping[str, Sequence[int]]) -> None:
    """Refuse weights that do not fit a model name by name, shape by shape, or are not finite."""
    missing = sorted(expected.keys() - weights.keys())
    surplus = sorted(weights.keys() - expected.keys())
    if missing or surplus:
        problem = (
            f"lack {missing[0]}" if missing else f"hold {surplus[0]}, which is no weight of it"
        )
        raise UserError(f"the weights do not fit the model: they {problem}")
    for name, shape in expected.items():
        if tuple(weights[name].shape) != tuple(shape):
            found = tuple(weights[name].shape)
            raise UserError(f"weight {name} has shape {found}, the model needs {tuple(shape)}")
        if not bool(torch.isfinite(weights[name]).all()):
            raise UserError(f"weight {name} holds values that are not finite")


def load_backbone(directory: Path, *, with_pooler: bool) -> PreTrainedModel:
    """Load a transformer in float32 from a local directory, refusing incomplete checkpoints.

    Raises:
        UserError: not safetensors, custom model code, or weights the model needs are absent.
    """
    directories.require_safetensors(directory)
    with quiet():
        config = _load_config(directory)
        # float32 explicitly: transformers 5 otherwise takes the dtype of the file.
        try:
            loaded = AutoModel.from_pretrained(
                str(directory),
                config=config,
                dtype=torch.float32,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                **_pooling_switch(config, with_pooler),
            )
        except (ValueError, RuntimeError, OSError) as error:
            raise UserError(
                f"the model in {directory} does not load: {first_line(error)}"
            ) from error
    backbone, info = cast("tuple[PreTrainedModel, dict[str, list[str]]]", loaded)
    if info["missing_keys"]:
        first = sorted(info["missing_keys"])[0]
        raise UserError(
            f"the weights in {directory} lack {first}, so the model would be partly untrained"
            + ("; it has no MLP pooler, choose another pooler" if "pooler" in first else "")
        )
    return backbone


def _load_config(directory: Path) -> PretrainedConfig:
    try:
        config = AutoConfig.from_pretrained(str(directory), trust_remote_code=False)
    except (ValueError, OSError, KeyError) as error:
        raise UserError(
            f"{directory} is not a model that transformers knows without custom code: "
            f"{first_line(error)}"
        ) from error
    if getattr(config, "is_encoder_decoder", False) or not hasattr(config, "hidden_size"):
        raise UserError(
            f"{directory} holds a {config.model_type} model, which is not a text encoder"
        )
    return config


def _model_config(
    config: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase
) -> PretrainedConfig:
    settings = dict(config)
    kind = settings.pop("model_type", None)
    if kind is None:
        raise UserError('an encoder from scratch needs "model_type", for example "bert"')
    try:
        known = AutoConfig.for_model(kind)
    except ValueError as error:
        raise UserError(f"transformers knows no model type {kind!r}") from error
    names = {*known.to_dict(), *getattr(known, "attribute_map", {})}
    for key in settings:
        if key not in names:
            near = difflib.get_close_matches(key, names, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise UserError(f"a {kind} configuration has no key {key!r}{hint}")
    ids = {
        f"{role}_token_id": getattr(tokenizer, f"{name}_token_id")
        for role, name in (("pad", "pad"), ("bos", "cls"), ("eos", "sep"))
        if getattr(tokenizer, f"{name}_token_id") is not None
    }
    defaults = {"vocab_size": len(tokenizer), **ids}
    settings = defaults | settings
    if settings["vocab_size"] < len(tokenizer):
        raise UserError(
            f"vocab_size {settings['vocab_size']} is smaller than the tokenizer's {len(tokenizer)}"
        )
    return AutoConfig.for_model(kind, **settings)


def _pooling_switch(config: PretrainedConfig, with_pooler: bool) -> dict[str, bool]:
    """Return the argument that omits the MLP pooler, for model classes that have one."""
    model = MODEL_MAPPING[type(config)]
    model = model[0] if isinstance(model, tuple) else model
    has_switch = "add_pooling_layer" in inspect.signature(model.__init__).parameters
    return {"add_pooling_layer": with_pooler} if has_switch else {}


def _check_pooler(pooler: str) -> None:
    if pooler not in POOLERS:
        raise UserError(f"unknown pooler {pooler!r}; choose one of {', '.join(POOLERS)}")


def _check_padding(backbone: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    if tokenizer.pad_token_id is None:
        raise UserError("the tokenizer has no padding token; sentences cannot be batched")
    rows = cast("nn.Embedding", backbone.get_input_embeddings()).num_embeddings
    if len(tokenizer) > rows:
        raise UserError(f"the tokenizer has {len(tokenizer)} tokens, the model only {rows}")
    padding = _position_padding(backbone)
    if padding is not None and padding != tokenizer.pad_token_id:
        # RoBERTa counts positions by the ids that differ from its own padding id.
        raise UserError(
            f"the model's padding id is {padding}, the tokenizer's {tokenizer.pad_token_id}; "
            "they belong to different models"
        )


def _position_padding(backbone: PreTrainedModel) -> int | None:
    """Return the padding id up to which RoBERTa-like models reserve positions, else None."""
    positions = getattr(getattr(backbone, "embeddings", None), "position_embeddings", None)
    return getattr(positions, "padding_idx", None)


def max_length_of(backbone: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the longest input in tokens: the model's positions or the tokenizer's limit."""
    positions = getattr(backbone.config, "max_position_embeddings", None) or _DEFAULT_MAX_LENGTH
    padding = _position_padding(backbone)
    limit = positions - (padding + 1 if padding is not None else 0)
    stated = int(getattr(tokenizer, "model_max_length", 0) or 0)
    return min(limit, stated) if stated > 0 else limit


def encode_sentences(
    encoder: nn.Module,
    sentences: Sequence[str],
    *,
    batch_size: int = 128,
    max_length: int | None = None,
    progress: bool = False,
) -> Tensor:
    """Embed sentences without dropout and gradient; equal sentences are computed once.

    Args:
        encoder: a `SentenceEncoder`, or a module with its `forward`, `tokenizer`, `max_length`.
        sentences: n strings.
        batch_size: sentences per forward pass, of similar length.
        max_length: tokens kept per sentence; by default all the model has positions for.
        progress: show a progress bar.

    Returns:
        float32 [n, H] on the CPU.
    """
    module = cast("SentenceEncoder", encoder)
    unique = list(dict.fromkeys(sentences))
    number = {sentence: row for row, sentence in enumerate(unique)}
    device = next(encoder.parameters()).device
    limit = min(max_length or module.max_length, module.max_length)
    batches = length_sorted_batches(
        module.tokenizer, unique, max_length=limit, batch_size=batch_size
    )
    training, out = encoder.training, None
    encoder.eval()
    try:
        # no_grad, not inference_mode: sharded parameters gathered here are reused in training.
        with torch.no_grad(), tqdm(total=len(unique), disable=not progress, unit="sent") as bar:
            for chosen, ids, mask in batches:
                rows = module(ids.to(device), mask.to(device)).float().cpu()
                out = rows.new_empty(len(unique), rows.shape[1]) if out is None else out
                out[chosen] = rows
                bar.update(len(chosen))
    finally:
        encoder.train(training)
    if out is None:
        raise ValueError("there are no sentences to encode")
    return out[[number[sentence] for sentence in sentences]]


def make_encode_fn(
    encoder: nn.Module,
    *,
    batch_size: int = 128,
    max_length: int | None = None,
    progress: bool = False,
) -> Callable[[Sequence[str]], Tensor]:
    """Return a function from sentences to float32 [n, H], as evaluations call it."""
    return lambda sentences: encode_sentences(
        encoder, sentences, batch_size=batch_size, max_length=max_length, progress=progress
    )
