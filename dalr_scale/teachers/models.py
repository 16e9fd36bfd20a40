"""Frozen teachers: Hugging Face text encoders and the two towers of open_clip models.

Teachers always stay in evaluation mode, compute without gradient, return float32, and are never
part of the engine, the optimizer or a checkpoint. Each text teacher reads raw sentences with its
own tokenizer, so its features are correct for any vocabulary of the student.
"""

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from dalr_scale.errors import UserError
from dalr_scale.models import directories
from dalr_scale.models.encoder import POOLERS, load_backbone, max_length_of, pool
from dalr_scale.models.tokenizer import (
    first_line,
    length_sorted_batches,
    load_tokenizer,
    token_id,
    tokenizer_hash,
)

if TYPE_CHECKING:
    from PIL.Image import Image

HF_PREFIX, OPEN_CLIP_PREFIX = "hf:", "open_clip:"
TokenBatch = tuple[list[int], Tensor, Tensor]
"""Row numbers of the sentences, token ids int64 [b, L] and attention mask int64 [b, L]."""


class _Frozen(nn.Module):
    """A module that cannot be trained: no gradients, and `train()` leaves it in evaluation mode."""

    def freeze(self) -> None:
        self.requires_grad_(False)
        for module in self.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                if parameter.ndim == 0:
                    # open_clip's logit_scale: DeepSpeed cannot take 0-dim parameters, should this
                    # module ever be attached to one that it prepares.
                    module.register_parameter(name, nn.Parameter(parameter.reshape(1), False))
        super().train(False)

    def train(self, mode: bool = True) -> "_Frozen":  # noqa: ARG002 - the signature of nn.Module
        return self

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device


class TextTeacher(_Frozen):
    """Base of both kinds of text teachers.

    Attributes:
        width: width H_k of the sentence feature.
        token_width: width H_t of the token features.
        tokenizer: the teacher's own tokenizer.
        facts: identity of the features: model, revision, pooling, tokenizer_sha256 ...
    """

    width: int
    token_width: int
    tokenizer: PreTrainedTokenizerBase
    facts: Mapping[str, object]
    tokens: bool

    def batches(self, sentences: Sequence[str], batch_size: int) -> Iterator[TokenBatch]:
        """Tokenize all sentences and yield batches of similar length."""
        raise NotImplementedError

    def encode_ids(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Encode one batch of token ids; see `encode` for the result."""
        raise NotImplementedError

    def tokenize(self, sentences: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token ids and mask [B, L] of sentences, in their order, on the teacher's device."""
        ((rows, ids, mask),) = self.batches(sentences, len(sentences))
        inverse = torch.empty(len(rows), dtype=torch.long)
        inverse[rows] = torch.arange(len(rows))
        return ids[inverse].to(self.device), mask[inverse].to(self.device)

    @torch.no_grad()
    def encode(self, sentences: Sequence[str]) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Encode one batch of sentences.

        Returns:
            Sentence features [B, H_k]; token features [B, T, H_t] without the first token (CLS),
            the end token kept, and their mask [B, T] (bool), both None unless the teacher was
            loaded with `tokens`. All float32, on the teacher's device.
        """
        return self.encode_ids(*self.tokenize(sentences))


class HFTextTeacher(TextTeacher):
    """A Hugging Face encoder with an explicit pooler."""

    def __init__(
        self, path: str, pooler: str, *, tokens: bool = False, max_length: int | None = None
    ):
        super().__init__()
        directory = directories.resolve_directory(path)
        inner = directories.transformer_directory(directory)
        self.backbone = load_backbone(inner, with_pooler=pooler == "cls")
        self.tokenizer = load_tokenizer(directory)
        self.pooler, self.tokens = pooler, tokens
        limit = max_length_of(self.backbone, self.tokenizer)
        self.max_length = min(limit, max_length or limit)
        self.width = self.token_width = int(self.backbone.config.hidden_size)
        if tokens:
            _require_first_cls(self.tokenizer, directory)
        self.facts = {
            "model": directories.directory_label(directory),
            "revision": weights_hash(inner),
            "pooling": pooler,
            "normalized": False,
            "tokenizer_sha256": tokenizer_hash(self.tokenizer),
            "max_length": self.max_length,
        }
        self.freeze()

    def batches(self, sentences: Sequence[str], batch_size: int) -> Iterator[TokenBatch]:
        """Tokenize all sentences and yield batches of similar length, longest first."""
        return length_sorted_batches(
            self.tokenizer, sentences, max_length=self.max_length, batch_size=batch_size
        )

    @torch.no_grad()
    def encode_ids(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Encode token ids and mask [b, L] on the teacher's device; see `encode`."""
        hidden = self.backbone(input_ids=ids, attention_mask=mask).last_hidden_state
        pooled = pool(hidden, mask, self.pooler, self.backbone).float()
        if not self.tokens:
            return pooled, None, None
        return pooled, hidden[:, 1:].float(), mask[:, 1:].bool()


class OpenClipTextTeacher(TextTeacher):
    """The text tower of an open_clip model; sentences are padded to its fixed context length."""

    def __init__(self, spec: str, *, tokens: bool = False):
        super().__init__()
        model, self.tokenizer_fn, self.facts = _open_clip(spec)
        model.visual = nn.Identity()  # only the text tower is needed
        self.model, self.tokens = model, tokens
        self.tokenizer = getattr(self.tokenizer_fn, "tokenizer", self.tokenizer_fn)
        self.facts = {
            **self.facts,
            "pooling": "open_clip text",
            "tokenizer_sha256": tokenizer_hash(self.tokenizer),
            "max_length": int(self.tokenizer_fn.context_length),
        }
        self.freeze()
        try:
            pooled, own = self._run(self.tokenizer_fn(["a"]))
        except (AttributeError, NotImplementedError) as error:
            raise UserError(f"the text tower of {spec} gives no token features: {error}") from error
        self.width = pooled.shape[1]
        self.token_width = own.shape[2] if own is not None else self.width

    def batches(self, sentences: Sequence[str], batch_size: int) -> Iterator[TokenBatch]:
        """Tokenize batch by batch, in order: every sentence has the same padded length."""
        for start in range(0, len(sentences), batch_size):
            part = list(sentences[start : start + batch_size])
            ids = self.tokenizer_fn(part)
            yield list(range(start, start + len(part))), ids, self._mask(ids).long()

    @torch.no_grad()
    def encode_ids(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Encode token ids [b, context length] on the teacher's device; see `encode`."""
        pooled, own = self._run(ids)
        if own is None:
            return pooled, None, None
        longest = int(mask.sum(1).max())
        return pooled, own[:, 1:longest], mask[:, 1:longest].bool()

    @torch.no_grad()
    def _run(self, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        if not self.tokens:
            return self.model.encode_text(ids).float(), None
        out = self.model.forward_intermediates(
            text=ids, text_indices=1, normalize_intermediates=True, normalize=False
        )
        return out["text_features"].float(), out["text_intermediates"][-1].float()

    def _mask(self, ids: Tensor) -> Tensor:
        """Return the mask of real tokens, including the end token.

        The padding id does not decide: in CLIP's own tokenizer it is also the id of a word piece.
        """
        end = getattr(self.tokenizer, "eot_token_id", None)
        if end is None:
            return ids != (token_id(self.tokenizer, "pad") or 0)
        last = (ids == end).int().argmax(1, keepdim=True)
        return torch.arange(ids.shape[1])[None] <= last


class ImageTeacher(_Frozen):
    """The image tower of an open_clip model.

    Attributes:
        width: width d_v of the feature.
        transform: image (PIL) to float tensor [3, S, S], as the model was evaluated.
        facts: identity of the features.
    """

    def __init__(self, spec: str):
        super().__init__()
        from open_clip.transform import PreprocessCfg, image_transform_v2

        model, _, facts = _open_clip(spec)
        self.visual = model.visual
        settings = PreprocessCfg(**model.visual.preprocess_cfg)
        self.transform = cast(
            "Callable[[Image], Tensor]", image_transform_v2(settings, is_train=False)
        )
        self.facts = facts | {"pooling": "open_clip image"}
        self.freeze()
        size = settings.size if isinstance(settings.size, int) else settings.size[0]
        self.width = int(self.encode(torch.zeros(1, 3, size, size)).shape[1])

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Encode transformed images [B, 3, S, S]; returns float32 [B, d_v], not normalised."""
        return self.visual(images.to(self.device)).float()


def load_text_teacher(
    spec: str, pooler: str | None = None, *, tokens: bool = False, max_length: int | None = None
) -> TextTeacher:
    """Load a text teacher.

    Args:
        spec: `hf:DIRECTORY`, `hf:package:NAME/SUB`, a plain directory (read as `hf:`),
            `open_clip:DIRECTORY`, `open_clip:ARCHITECTURE@FILE.safetensors`, or
            `open_clip:ARCHITECTURE@TAG`, which is downloaded from the Hub.
        pooler: for Hugging Face teachers, one of `cls_before_pooler`, `cls`, `mean`. It is never
            guessed from the name.
        tokens: also return token features.
        max_length: tokens kept of a sentence (Hugging Face teachers); by default all the model has
            positions for.

    Raises:
        UserError: nothing there, weights that are not safetensors, or a missing pooler.
    """
    if spec.startswith(OPEN_CLIP_PREFIX):
        if pooler:
            raise UserError(f"{spec} has its own pooling; leave its pooler empty")
        return OpenClipTextTeacher(spec.removeprefix(OPEN_CLIP_PREFIX), tokens=tokens)
    path = spec.removeprefix(HF_PREFIX)
    if pooler not in POOLERS:
        raise UserError(f"the text teacher {path} needs a pooler: one of {', '.join(POOLERS)}")
    return HFTextTeacher(path, pooler, tokens=tokens, max_length=max_length)


def load_image_teacher(spec: str) -> ImageTeacher:
    """Load the image tower of an open_clip model.

    `spec` is a directory with `open_clip_config.json` and safetensors weights,
    `ARCHITECTURE@FILE.safetensors`, or `ARCHITECTURE@TAG` (from the Hub). The prefix `open_clip:`
    is optional.

    Raises:
        UserError: nothing there, or weights that are not safetensors.
    """
    return ImageTeacher(spec.removeprefix(OPEN_CLIP_PREFIX))


def _open_clip(spec: str) -> tuple[Any, Any, dict[str, Any]]:
    """Build an open_clip model and load its safetensors weights.

    Left alone, open_clip prefers some pickled files over `model.safetensors`; the weights are
    therefore chosen here.

    Returns:
        The model (float32, on the CPU), its tokenizer function, and identifying facts.
    """
    import open_clip
    from open_clip.factory import load_checkpoint

    name, weights = _open_clip_source(spec)
    try:
        with _without_warnings():
            model: Any = open_clip.create_model(name, load_weights=False, pretrained_text=False)
            load_checkpoint(model, str(weights), strict=True)
            tokenizer = open_clip.get_tokenizer(name)
    except Exception as error:  # configurations fail in whatever layer first trips over them
        raise UserError(f"the open_clip model {spec} does not load: {first_line(error)}") from error
    for key, value in model.state_dict().items():
        if not bool(torch.isfinite(value).all()):
            raise UserError(f"{weights}: weight {key} holds values that are not finite")
    label = directories.directory_label(weights.parent) if name.startswith("local-dir:") else name
    facts = {"model": label, "revision": _file_hash([weights]), "normalized": False}
    return model, tokenizer, facts


def _open_clip_source(spec: str) -> tuple[str, Path]:
    """Split a spec into open_clip's model name and the safetensors file."""
    import open_clip

    architecture, _, file = spec.partition("@")
    if file and not Path(spec).is_dir() and architecture in open_clip.list_models():
        if open_clip.is_pretrained_cfg(architecture, file):
            return _open_clip_source(_hub_name(architecture, file))
        weights = Path(file).expanduser()
        if weights.suffix != ".safetensors" or not weights.is_file():
            tags = ", ".join(open_clip.list_pretrained_tags_by_model(architecture)) or "none"
            raise UserError(
                f"{file} is no safetensors file and no tag of {architecture} ({tags}); give "
                f"{architecture}@FILE.safetensors"
            )
        return architecture, weights
    directory = directories.resolve_directory(spec)
    if not (directory / "open_clip_config.json").is_file():
        raise UserError(
            f"{directory} has no open_clip_config.json; it is not an open_clip directory"
        )
    for name in _OPEN_CLIP_WEIGHTS:
        if (directory / name).is_file():
            return f"local-dir:{directory}", directory / name
    raise UserError(
        f"{directory} has none of {', '.join(_OPEN_CLIP_WEIGHTS)}; only safetensors weights are "
        "read, because other formats can run code: convert the model first"
    )


def _hub_name(architecture: str, tag: str) -> str:
    """The Hub repository of a pre-trained tag; its own configuration decides on the details."""
    import open_clip

    name, slash, file = str(
        open_clip.get_pretrained_cfg(architecture, tag).get("hf_hub") or ""
    ).rpartition("/")
    if not slash or file:
        raise UserError(
            f"{architecture}@{tag} has no Hub repository with safetensors weights; convert the "
            "weights and give the directory"
        )
    return name


_OPEN_CLIP_WEIGHTS = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "model.safetensors",
)


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Silence "initialized randomly": the weights follow one line later."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _require_first_cls(tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    ids = tokenizer("a")["input_ids"]
    if tokenizer.cls_token_id is None or ids[0] != tokenizer.cls_token_id:
        raise UserError(
            f"the tokenizer of {directory} does not start sentences with a CLS token; "
            "its token features cannot be used"
        )


def weights_hash(directory: Path) -> str:
    """Short hash of the safetensors files of a model directory."""
    return _file_hash(sorted(directory.glob("*.safetensors")))


def _file_hash(paths: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]
