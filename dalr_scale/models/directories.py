"""Model directories: resolving a name, reading the pooling, writing a new directory.

A model directory can be read by `transformers` and by `sentence-transformers`: it has
`config.json`, weights in safetensors, a tokenizer, and `modules.json` with the pooling. Weights in
any other format are refused, because unpickling them can run code of the file's author.
"""

import importlib.util
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from dalr_scale.errors import UserError

PACKAGE_PREFIX = "package:"
META_KEY = "dalr_scale"  # our own entry in config.json; other tools keep and ignore it
_HUB_FILES = ["*.json", "*.txt", "*.model", "*.safetensors"]
_HUB_SKIP = ["onnx/*", "openvino/*", "*/onnx/*", "*/openvino/*"]
_LEGACY_MODES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_MODE_TO_POOLER = {"cls": "cls_before_pooler", "mean": "mean"}


def resolve_directory(spec: str | Path) -> Path:
    """Turn a model name into a local directory.

    Accepted, in this order: `package:NAME/SUB` (a directory inside an installed Python package), an
    existing directory, the bare name of an installed package that has a directory `model`, and a
    Hugging Face Hub name, `org/name` or `org/name@revision`, of which only JSON, text and
    safetensors files are downloaded.

    Raises:
        UserError: nothing is found under that name.
    """
    text = str(spec)
    if text.startswith(PACKAGE_PREFIX):
        name, _, sub = text.removeprefix(PACKAGE_PREFIX).partition("/")
        return _package_directory(name, sub or "model")
    directory = Path(text).expanduser()
    if directory.is_dir():
        return directory
    if text.isidentifier() and importlib.util.find_spec(text) is not None:
        return _package_directory(text, "model")
    if directory.is_absolute() or text.startswith((".", "~")) or text.count("/") > 1:
        raise UserError(f"there is no model directory {text}")
    return _hub_directory(text)


def _package_directory(name: str, sub: str) -> Path:
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"the Python package {name!r} is not installed; install it with pip")
    directory = Path(spec.submodule_search_locations[0]) / sub
    if not directory.is_dir():
        raise UserError(f"the Python package {name!r} has no directory {sub!r}")
    return directory


def _hub_directory(text: str) -> Path:
    from huggingface_hub import snapshot_download

    name, _, revision = text.partition("@")
    try:
        found = snapshot_download(
            name, revision=revision or None, allow_patterns=_HUB_FILES, ignore_patterns=_HUB_SKIP
        )
    except Exception as error:  # the hub client raises a dozen unrelated types
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{text!r} is neither a directory nor a model that could be downloaded ({reason}); "
            "give the path of a local model directory"
        ) from error
    return Path(found)


def directory_label(directory: Path) -> str:
    """Return the name of a model directory for manifests and model cards, never a full path."""
    directory = directory.resolve()
    if (
        directory.parent.name == "snapshots"
    ):  # the Hub's cache: models--org--name/snapshots/revision
        return directory.parent.parent.name.removeprefix("models--").replace("--", "/")
    generic = directory.name in ("model", "best", "final", "teacher")
    return f"{directory.parent.name}/{directory.name}" if generic else directory.name


def read_json(path: Path) -> Any:  # noqa: ANN401 - JSON of a model, whose readers check it
    """Parse a small JSON file, naming it when it is missing or broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not readable JSON: {error}") from error


def transformer_directory(directory: Path) -> Path:
    """Return the part of a model directory that holds the transformer: the root or a subfolder."""
    candidates = [directory]
    for module in _modules(directory):
        if _module_class(module) == "Transformer":
            candidates.insert(0, directory / str(module.get("path", "")))
    candidates.append(directory / "0_Transformer")
    for candidate in candidates:
        if (candidate / "config.json").is_file():
            return candidate
    raise UserError(f"{directory} has no config.json; it is not a Hugging Face model directory")


def _modules(directory: Path) -> list[dict[str, object]]:
    path = directory / "modules.json"
    return read_json(path) if path.is_file() else []


def _module_class(module: Mapping[str, object]) -> str:
    return str(module.get("type", "")).rsplit(".", 1)[-1]


def stored_pooler(directory: Path) -> str | None:
    """Return the pooler that a directory records, or None when it records none.

    Raises:
        UserError: the recorded pooling is not supported.
    """
    modules = _modules(directory)
    if not modules:
        return None
    classes = [_module_class(module) for module in modules]
    # A final normalization changes no cosine; every other module after the pooling does.
    plain = [name for name in classes if name != "Normalize"]
    if plain == ["Transformer", "Pooling"]:
        pooling = next(m for m in modules if _module_class(m) == "Pooling")
        return _pooler_of(directory / str(pooling.get("path", "1_Pooling")) / "config.json")
    config = read_json(transformer_directory(directory) / "config.json")
    if plain == ["Transformer", "Pooling", "Dense"] and own_facts(config).get("pooler") == "cls":
        return "cls"
    raise UserError(
        f"{directory} chains the modules {', '.join(classes)}, which are more than an encoder with "
        "a pooler; name a pooler to use the encoder alone"
    )


def own_facts(config: Mapping[str, object]) -> dict[str, object]:
    """Return what an export of this project records in its config.json: pooler, base, scores."""
    facts = config.get(META_KEY)
    return cast("dict[str, object]", facts) if isinstance(facts, dict) else {}


def _pooler_of(path: Path) -> str:
    config = read_json(path)
    mode = config.get("pooling_mode")
    modes = [mode] if isinstance(mode, str) else list(mode or [])
    modes = modes or [name for key, name in _LEGACY_MODES.items() if config.get(key)]
    if len(modes) != 1 or modes[0] not in _MODE_TO_POOLER:
        raise UserError(
            f"{path} pools with {' + '.join(modes) or 'nothing'}; "
            "only cls and mean are supported, name one of them to use it instead"
        )
    return _MODE_TO_POOLER[modes[0]]


def require_safetensors(directory: Path) -> None:
    """Refuse a directory whose weights are not stored as safetensors.

    Raises:
        UserError: no safetensors weights; the message names the pickle file found instead.
    """
    if any((directory / name).is_file() for name in _WEIGHT_FILES):
        return
    other = sorted(path.name for path in directory.glob("*.bin")) or ["no weights"]
    raise UserError(
        f"{directory} has {other[0]} instead of model.safetensors; only safetensors weights are "
        "read, because other formats can run code: convert the model first"
    )


_WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json")


def run_encoder(spec: str | Path, which: str | None = None) -> Path:
    """Return the encoder directory of a name: a model directory, or a run's `best` or `final`.

    Args:
        spec: a run directory, or any name that `resolve_directory` takes.
        which: `best` or `final` of a run; by default the best, or the final one of a run that
            has no best.

    Raises:
        UserError: a run without that encoder, or nothing under that name.
    """
    directory = resolve_directory(spec)
    if (directory / "config.json").is_file() or not (directory / "config.toml").is_file():
        return directory
    for name in (which,) if which else ("best", "final"):
        if (directory / name / "config.json").is_file():
            return directory / name
    raise UserError(
        f"the run {directory} has no {which or 'finished'} encoder; let it reach an evaluation or "
        "its end, or choose --which best or final"
    )


@contextmanager
def new_directory(final: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty directory next to `final` that replaces it when the block succeeds.

    A reader sees the old directory or the complete new one (between two renames, for an instant,
    neither); a failed block leaves the old one unchanged. The next call restores or removes what a
    killed process left behind, so only one process may write to `final` at a time.

    Raises:
        UserError: `final` exists and `overwrite` is off.
    """
    _recover(final)
    check_free(final, overwrite=overwrite)
    final.parent.mkdir(parents=True, exist_ok=True)
    fresh = final.with_name(f".{final.name}.new-{os.getpid()}")
    stale = final.with_name(f".{final.name}.old-{os.getpid()}")
    fresh.mkdir()
    try:
        yield fresh
        if final.exists():
            final.rename(stale)
        fresh.rename(final)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.rmtree(stale, ignore_errors=True)


def _recover(final: Path) -> None:
    """Undo a replacement that was interrupted between its two renames."""
    for stale in final.parent.glob(f".{final.name}.old-*"):
        if final.exists():
            shutil.rmtree(stale, ignore_errors=True)
        else:
            stale.rename(final)
    for fresh in final.parent.glob(f".{final.name}.new-*"):
        shutil.rmtree(fresh, ignore_errors=True)


def check_free(final: Path, *, overwrite: bool) -> None:
    """Refuse to overwrite an existing directory unless `overwrite` is set.

    Raises:
        UserError: `final` is a file, or a non-empty directory without `overwrite`.
    """
    if final.exists() and not final.is_dir():
        raise UserError(f"{final} is a file; name a directory to write to")
    if final.is_dir() and any(final.iterdir()) and not overwrite:
        raise UserError(f"{final} exists; name another directory or pass --overwrite")


def write_sentence_transformers_files(
    directory: Path, *, pooler: str, width: int, max_length: int, dense: bool = False
) -> None:
    """Write the files that make a Hugging Face directory loadable by `SentenceTransformer`.

    The long-standing module and key names are used, because versions before and after 6.0 both
    read them. With `dense` a module `2_Dense` follows the pooling (the checkpoint's own MLP); its
    weights are written by the caller.
    """
    mode = "mean" if pooler == "mean" else "cls"
    pooling: dict[str, object] = {"word_embedding_dimension": width}
    pooling |= {key: name == mode for key, name in _LEGACY_MODES.items()}
    pooling["include_prompt"] = True
    modules = [("", "Transformer"), ("1_Pooling", "Pooling")]
    if dense:
        modules.append(("2_Dense", "Dense"))
        dense_config = {"in_features": width, "out_features": width, "bias": True}
        dense_config["activation_function"] = "torch.nn.modules.activation.Tanh"
        write_json(directory / "2_Dense" / "config.json", dense_config)
    entries = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(modules)
    ]
    write_json(directory / "modules.json", entries)
    write_json(directory / "1_Pooling" / "config.json", pooling)
    limits = {"max_seq_length": max_length, "do_lower_case": False}
    write_json(directory / "sentence_bert_config.json", limits)
    similarity = {"prompts": {}, "default_prompt_name": None, "similarity_fn_name": "cosine"}
    write_json(directory / "config_sentence_transformers.json", similarity)


def write_json(path: Path, value: object) -> None:
    """Write readable JSON with a final newline, creating the directory."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def model_card(
    *, pooler: str, base: str, width: int, max_length: int, scores: Mapping[str, float] | None
) -> str:
    """Return the README.md of an exported encoder."""
    pooling = {
        "mean": "mean of the last hidden states over the attention mask",
        "cls_before_pooler": "last hidden state of the first token, before any MLP",
        "cls": "last hidden state of the first token through the MLP (`pooler_output`)",
    }[pooler]
    lines = [
        "---",
        "library_name: sentence-transformers",
        "pipeline_tag: sentence-similarity",
        "---",
        "",
        "# Sentence encoder trained with dalr_scale",
        "",
        f"- Base: {base}",
        f"- Pooling: `{pooler}`: {pooling}",
        f"- Width: {width}; longest input: {max_length} tokens",
        "",
        "```python",
        "from sentence_transformers import SentenceTransformer",
        "",
        'embeddings = SentenceTransformer("PATH").encode(["A dog runs on the beach."])',
        "```",
        "",
        "With `transformers`, load `AutoModel` and pool `last_hidden_state` as stated above.",
    ]
    if pooler != "cls":
        lines.append("Do not read `pooler_output`: this encoder has no trained pooler.")
    if scores:
        lines += ["", "| task | score x 100 |", "|---|---|"]
        lines += [f"| {name} | {value:.2f} |" for name, value in scores.items()]
    return "\n".join(lines) + "\n"
