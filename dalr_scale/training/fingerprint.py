"""What the result of a run depends on: versions, settings, and the content of its files.

The fingerprint lies in every checkpoint and in RUN/fingerprint.json. Files count by their content
and their name inside their directory, so that moving data or a model changes nothing, while another
vocabulary, teacher or shard is named when a run is to be continued with it. The weights of
``model.encoder`` count too: they decide nothing after the first checkpoint, but the run began with
them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import platform
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, cast

from dalr_scale import __version__
from dalr_scale.config import Config, new_encoder_pooler
from dalr_scale.errors import UserError
from dalr_scale.run.files import JsonTable, JsonValue
from dalr_scale.teachers.mixing import text_weights

if TYPE_CHECKING:
    from dalr_scale.run.ranks import Ranks

# Keys that may change between a run and its continuation: they do not touch the result.
FREE_SECTIONS = ("log", "save", "run")
FREE_KEYS = {
    "data": ("root", "shards", "workers", "max_bad_fraction", "remote", "cache"),
    "engine": ("timeout_minutes", "threads"),
}
# Keys that say where something lies: its content is compared instead.
PLACES = {
    "data": ("pairs", "text", "tokenizer"),
    "model": ("encoder",),
    "engine": ("ds_config",),
    "eval": ("graded_dev", "graded_test", "retrieval"),
}
# What no resume can change: optimizer states and weights are stored in their form.
FIXED = ("config.optim.name", "config.engine.kind", "precision")
CONTENTS = "contents"
BY_NAME = "by its name"  # a model of the Hub
_FORM = "checkpoint {}, now {}"
_SHARDS = ("data.text", "data.pairs")
_MODEL_FILES = (".json", ".txt", ".model", ".safetensors")

Fingerprint: TypeAlias = dict[str, JsonValue]
"""All that decides the numbers of a run, in tables of JSON."""


def run_fingerprint(
    config: Config,
    world: Ranks,
    *,
    precision: str,
    total_steps: int,
    data: str,
    shards: Mapping[str, Mapping[str, str]],
) -> Fingerprint:
    """The fingerprint of a run; rank 0 reads the files, all ranks get the same answer.

    Args:
        precision: in which the engine computes, "auto" resolved.
        data: identity of all shards and features that the run reads.
        shards: the same shard by shard, by stream.

    Raises:
        UserError: on every rank, if a file cannot be read.
    """
    contents: Fingerprint | str = {}
    if world.rank == 0:
        try:
            contents = {**shards, **file_contents(config)}
        except OSError as error:
            contents = f"{error.filename}: {error.strerror or error}"
    contents = world.broadcast_object(contents)
    if isinstance(contents, str):
        raise UserError(contents)
    versions = package_versions()
    if any(spec.startswith("open_clip:") for _, spec in _teachers(config)):
        versions["open_clip_torch"] = _version("open_clip_torch")
    return {
        "versions": versions,
        "config": settings_of(config),
        "precision": precision,
        "data": data,
        "total_steps": total_steps,
        CONTENTS: contents,
    }


# Settings


def settings_of(config: Config) -> Fingerprint:
    """The settings that decide a run's result, as plain tables; places of files are left out.

    What an empty value means is written out, so that another default shows as a change.
    """
    settings = json.loads(json.dumps(dataclasses.asdict(config)))
    if len(config.teachers.text) > 1:
        settings["teachers"]["text_weights"] = list(text_weights(config))
    if config.model.architecture:
        settings["model"]["pooler"] = new_encoder_pooler(config.model)
    for section in FREE_SECTIONS:
        settings.pop(section)
    for keys in (FREE_KEYS, PLACES):
        for section, names in keys.items():
            for name in names:
                settings[section].pop(name)
    teachers = settings["teachers"]
    for key in ("image", "caption"):
        teachers[key] = _without_place(teachers[key])
    for key in ("text", "tokens"):
        teachers[key] = [_without_place(spec) for spec in teachers[key]]
    return settings | {"run": {"seed": config.run.seed}}


def _without_place(spec: str) -> str:
    kind, colon, _ = spec.partition(":")
    return spec if kind == "features" else kind + colon


# Versions


def package_versions() -> dict[str, str | None]:
    """Versions that can change the numbers of a run, without importing the packages."""
    versions: dict[str, str | None] = {
        "python": ".".join(platform.python_version_tuple()[:2]),
        "dalr_scale": __version__,
        "dalr_kernels": _kernels_version(),
    }
    names = ("torch", "accelerate", "deepspeed", "transformers", "triton", "numpy")
    return versions | {name: _version(name) for name in (*names, "tokenizers", "safetensors")}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _kernels_version() -> str | None:
    """A digest of the sources: the kernels come with this package and have no version."""
    spec = importlib.util.find_spec("dalr_kernels")
    if spec is None or not spec.submodule_search_locations:
        return None
    root = Path(spec.submodule_search_locations[0])
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return f"sources {digest.hexdigest()[:16]}"


# Files


def file_contents(config: Config) -> dict[str, dict[str, str]]:
    """Digests of the files that a run reads besides its shards: role -> file name -> SHA-256."""
    places = [
        ("data.tokenizer", config.data.tokenizer),
        ("model.encoder", config.model.encoder),
        ("engine.ds_config", config.engine.ds_config),
        ("eval.graded_dev", config.eval.graded_dev),
        ("eval.graded_test", config.eval.graded_test),
    ]
    places += [
        (role, spec.partition(":")[2])
        for role, spec in _teachers(config)
        if not spec.startswith("features:")
    ]
    known: dict[str, dict[str, str]] = {}  # one model often has several roles
    found = {}
    for role, place in places:
        if place:
            if place not in known:
                known[place] = _digests(config, place)
            found[role] = known[place]
    return found


def _teachers(config: Config) -> list[tuple[str, str]]:
    teachers = config.teachers
    named = [("teachers.image", teachers.image), ("teachers.caption", teachers.caption)]
    named += [(f"teachers.text[{k}]", spec) for k, spec in enumerate(teachers.text)]
    named += [(f"teachers.tokens[{k}]", spec) for k, spec in enumerate(teachers.tokens)]
    return [(role, spec) for role, spec in named if spec]


def _digests(config: Config, place: str) -> dict[str, str]:
    """Files by name inside their directory; a Hub name or tag takes their place."""
    from dalr_scale.models.directories import resolve_directory

    path = config.path(place)
    if not path.exists() and Path(place.partition("@")[2]).expanduser().is_file():
        path = Path(place.partition("@")[2]).expanduser()  # open_clip:ARCHITECTURE@FILE
    if path.is_file():
        return {path.name: _sha256(path)}
    try:
        directory = path if path.is_dir() else resolve_directory(place)
    except UserError:
        return {place: BY_NAME}
    files = [p for p in sorted(directory.rglob("*")) if p.suffix in _MODEL_FILES and p.is_file()]
    names = [(p, p.relative_to(directory)) for p in files]
    return {
        name.as_posix(): _sha256(p)
        for p, name in names
        if not any(part.startswith(".") or part in ("onnx", "openvino") for part in name.parts)
    }


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:32]


# Comparing


def check_fingerprint(saved: JsonTable, current: JsonTable, *, allow_change: bool) -> list[str]:
    """Compare what a checkpoint was made with and what would continue it.

    Returns:
        One line for each field that differs, nested tables as dotted names; empty if none does.

    Raises:
        UserError: with those lines, if there are any and `allow_change` is False; or if something
            differs that no resume can change (`FIXED`).
    """
    lines = changes(saved, json.loads(json.dumps(dict(current))))
    fixed = [
        line for line in lines if line.startswith(FIXED) and "checkpoint absent, now" not in line
    ]
    if fixed and allow_change:
        raise UserError(
            "no resume can change this, --run.allow_change=true neither; choose another "
            "--run.name, or move the run aside with --run.from_scratch=true: " + "; ".join(fixed)
        )
    if lines and not allow_change:
        raise UserError(
            "the checkpoint was made with other versions, settings or files; restore them, use a "
            "new run directory, or accept the change with --run.allow_change=true:\n  "
            + "\n  ".join(lines)
        )
    return lines


def changes(saved: JsonTable, current: JsonTable, form: str = _FORM) -> list[str]:
    """One line for each difference; of files, the names of those that were changed."""
    before = {name: value for name, value in saved.items() if name != CONTENTS}
    now = {name: value for name, value in current.items() if name != CONTENTS}
    files = []
    if CONTENTS in saved and CONTENTS in current:
        files = _changed_files(saved, current)
        if any(line.startswith(_SHARDS) for line in files):
            del before["data"], now["data"]
    elif CONTENTS in current:
        before = _without_places(before)
        files = [
            "contents: not recorded in this checkpoint, an earlier version wrote it; whether "
            "vocabulary, encoder, teachers and DeepSpeed file are still the same is not known"
        ]
    return _changed_values(_flatten(before), _flatten(now), form) + files


def _without_places(fingerprint: Fingerprint) -> Fingerprint:
    """Earlier versions recorded where files lie; teachers keep their kind."""
    config = json.loads(json.dumps(fingerprint.get("config", {})))
    for section, names in PLACES.items():
        for name in names:
            config.get(section, {}).pop(name, None)
    teachers = config.get("teachers", {})
    for key, value in teachers.items():
        if key in ("image", "caption"):
            teachers[key] = _without_place(value)
        if key in ("text", "tokens"):
            teachers[key] = [_without_place(spec) for spec in value]
    return fingerprint | {"config": config}


def _changed_values(before: JsonTable, now: JsonTable, form: str) -> list[str]:
    return [
        f"{name}: {form.format(_shown(before, name), _shown(now, name))}"
        for name in sorted(before.keys() | now.keys())
        if name not in before or name not in now or before[name] != now[name]
    ]


def _changed_files(saved: JsonTable, current: JsonTable) -> list[str]:
    before, now = _files(saved), _files(current)
    roles = sorted(before.keys() | now.keys())
    if saved.get("data") == current.get("data"):  # the same shards, whatever their names
        roles = [role for role in roles if role not in _SHARDS]
    return [
        f"{role}: {', '.join(names)}"
        for role in roles
        if (names := list(_changed_names(before.get(role, {}), now.get(role, {}))))
    ]


def _files(fingerprint: JsonTable) -> Mapping[str, Mapping[str, str]]:
    """Role -> file name -> digest."""
    return cast("Mapping[str, Mapping[str, str]]", fingerprint[CONTENTS])


def _changed_names(before: Mapping[str, str], now: Mapping[str, str]) -> Iterable[str]:
    single = len(before) == len(now) == 1 and BY_NAME not in before.values()
    if single and set(before.values()) == set(now.values()):
        return  # a file of its own may be renamed
    for name in sorted(before.keys() | now.keys()):
        if name not in before:
            yield f"{name} added"
        elif name not in now:
            yield f"{name} removed"
        elif before[name] != now[name]:
            yield f"{name} changed"


def _flatten(tree: JsonTable, prefix: str = "") -> Fingerprint:
    flat: Fingerprint = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _shown(values: JsonTable, name: str) -> str:
    return json.dumps(values[name]) if name in values else "absent"
