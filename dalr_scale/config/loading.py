"""Reads configurations: TOML recipes, dotted overrides, presets of the objective.

A configuration is built from layers: the dataclass defaults, then a recipe or file, then the
command line. Later layers win key by key, with two exceptions: a layer that names
``objective.preset`` starts the whole ``[objective]`` section afresh from that preset, so that
``--objective.preset=simcse`` never inherits weights that a recipe had tuned for another one; and
a layer that gives the length of the run in steps or in epochs replaces the other one below it.

Values are `Any` until they have been checked against the annotation of their key.
"""

from __future__ import annotations

import difflib
import functools
import math
import tomllib
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeGuard

from dalr_scale.config.limits import check_ranges, shown
from dalr_scale.config.presets import PRESETS
from dalr_scale.config.schema import Config
from dalr_scale.errors import UserError

RECIPES = Path(__file__).parents[1] / "recipes"
DEFAULT_RECIPE = "quickstart"


@functools.cache
def _type_hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def load_config(source: str | None, overrides: Sequence[str] = ()) -> Config:
    """Builds a configuration from a recipe name, a file or a run directory, and overrides.

    Args:
        source: recipe name, TOML path or run directory (its ``config.toml``); None: `quickstart`.
        overrides: ``--section.key=value`` words (or ``--section.key`` followed by ``value``).

    Raises:
        UserError: unknown key (the nearest one is named), wrong type, unknown recipe.
    """
    layers = [_read_source(source or DEFAULT_RECIPE), parse_overrides(overrides)]
    return build_config(layers)


def build_config(layers: Iterable[Mapping[str, Mapping[str, Any]]]) -> Config:
    """Merges layers of ``{section: {key: value}}``, types every value and checks its range.

    A dotted key (``architecture.hidden_size``) changes one entry of a table-valued key.

    Raises:
        UserError: unknown key (the nearest one is named), wrong type, number out of range.
    """
    values: dict[str, dict[str, Any]] = {}
    for layer in layers:
        for section, entries in layer.items():
            _merge(values.setdefault(section, {}), section, entries)
    hints = _type_hints(Config)
    for section in values:
        _known(section, hints, "section")
    config = Config(
        **{name: _section(hint, name, values.get(name, {})) for name, hint in hints.items()}
    )
    check_ranges(config)
    return config


def _merge(target: dict[str, Any], section: str, entries: object) -> None:
    """Lays the entries of one layer over those of the layers below it."""
    if not _is_table(entries):
        raise UserError(f"'{section}' is not in a table: write it below [section]")
    if section == "objective" and "preset" in entries:
        target.clear()
        target.update(_preset(str(entries["preset"])))
    if section == "optim":
        _replace_length(target, entries)
    for key, value in entries.items():
        _assign(target, key, value)


def _replace_length(target: dict[str, Any], entries: Mapping[str, Any]) -> None:
    """Steps in place of the epochs of earlier layers, and the reverse."""
    if entries.get("steps") and "epochs" not in entries:
        target.pop("epochs", None)
    if "epochs" in entries and "steps" not in entries:
        target.pop("steps", None)


def _assign(target: dict[str, Any], dotted: str, value: Any) -> None:
    """Sets a key, or one entry of a table below it; tables of earlier layers are not changed."""
    key, dot, rest = dotted.partition(".")
    if dot:
        before = target.get(key)
        table: dict[str, Any] = dict(before) if _is_table(before) else {}
        _assign(table, rest, value)
        value = table
    target[key] = value


def _preset(name: str) -> dict[str, Any]:
    _known(name, PRESETS, "preset")
    return dict(PRESETS[name])


def _section(cls: type, section: str, entries: Mapping[str, Any]) -> Any:
    hints = _type_hints(cls)
    for key in entries:
        _known(key, hints, f"key in [{section}]")
    return cls(**{k: _typed(v, hints[k], f"{section}.{k}") for k, v in entries.items()})


def _known(name: str, names: Iterable[str], kind: str) -> None:
    names = list(names)
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.0)
        raise UserError(f"unknown {kind} '{name}'; did you mean '{near[0]}'?")


def _typed(value: Any, hint: Any, where: str) -> Any:
    """Checks one value against its field's type; whole floats and strings are not coerced."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if value not in arguments:
            allowed = ", ".join(map(str, arguments))
            raise UserError(f"{where} = {shown(value)} is not one of: {allowed}")
        return value
    if origin is tuple:
        return _list(value, arguments, where)
    if origin is dict:
        return _table(value, where, arguments[1])
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = _float(value)
    right = isinstance(value, hint) and not (hint is int and isinstance(value, bool))
    if not right or (isinstance(value, float) and value != value):
        raise UserError(f"{where} = {shown(value)} must be of type {hint.__name__}")
    return _text(value, where) if isinstance(value, str) else value


def _list(value: Any, items: tuple[Any, ...], where: str) -> tuple[Any, ...]:
    """A list of any length (``tuple[X, ...]``) or of a fixed one; one value is a list of one."""
    values = value if _is_list(value) else [value]
    if (length := list_length(items)) is not None and len(values) != length:
        raise UserError(f"{where} has {len(values)} entries; it needs {length}")
    return tuple(_typed(v, items[0], where) for v in values)


def list_length(items: tuple[Any, ...]) -> int | None:
    """The number of entries that the arguments of a tuple type prescribe; None: any."""
    return None if items[-1] is Ellipsis else len(items)


def _float(value: int) -> float:
    """An integer as a float; one beyond all floats is infinite, and its range refuses it."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def _text(value: str, where: str) -> str:
    """Text that files and paths can hold."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UserError(f"{where} = {shown(value)} is not valid UTF-8") from None
    if "\0" in value:
        raise UserError(f"{where} = {shown(value)} contains a NUL character")
    return value


def _table(value: Any, where: str, hint: Any) -> dict[str, Any]:
    """A table of values of one type, or a free one (``model.architecture``).

    A free table holds text, numbers, booleans, lists and tables.
    """
    if not _is_table(value):
        raise UserError(f"{where} = {shown(value)} must be of type dict")
    table: dict[str, Any] = {}
    for key, entry in value.items():
        name = f"{where}.{key}"
        table[_text(str(key), where)] = (
            _entry(entry, name) if hint is Any else _typed(entry, hint, name)
        )
    return table


def _entry(value: Any, where: str) -> Any:
    if _is_table(value):
        return _table(value, where, Any)
    if _is_list(value):
        return [_entry(v, where) for v in value]
    match value:
        case str():
            return _text(value, where)
        case bool():
            return value
        case int() | float() if abs(value) < 2**63:  # neither infinite nor beyond TOML; not NaN
            return value
        case _:
            raise UserError(f"{where} = {shown(value)} must be text, a number, a list or a table")


def _is_table(value: object) -> TypeGuard[Mapping[str, Any]]:
    return isinstance(value, Mapping)


def _is_list(value: object) -> TypeGuard[list[Any] | tuple[Any, ...]]:
    return isinstance(value, list | tuple)


def parse_overrides(words: Sequence[str]) -> dict[str, dict[str, Any]]:
    """``--optim.lr=1e-4 --run.name x`` as a layer; values are TOML where they parse as TOML."""
    layer: dict[str, dict[str, Any]] = {}
    pending = list(words)
    while pending:
        word = pending.pop(0)
        name, equals, text = word.removeprefix("--").partition("=")
        if not word.startswith("--") or name.count(".") == 0:
            raise UserError(f"'{word}' is not an override: write --section.key=value")
        if not equals:
            if not pending:
                raise UserError(f"'{word}' has no value: write {word}=VALUE")
            text = pending.pop(0)
        section, key = name.split(".", 1)
        entries = layer.setdefault(section, {})
        entries.pop(key, None)  # the last of repeated words counts, at its own position
        entries[key] = _parse_value(text, section, key)
    return layer


def _parse_value(text: str, section: str, key: str) -> Any:
    hint = _field_hint(section, key)
    if hint is str or typing.get_origin(hint) is Literal:
        return text.strip("\"'") if text[:1] in "\"'" else text
    if typing.get_origin(hint) is tuple and not text.startswith("["):
        item = typing.get_args(hint)[0]
        words = item is str or typing.get_origin(item) is Literal
        return [w if words else _toml_value(w) for w in text.split(",") if w]
    return _toml_value(text)


def _field_hint(section: str, key: str) -> Any:
    cls = _type_hints(Config).get(section)
    return _type_hints(cls).get(key) if isinstance(cls, type) else None


def _toml_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):  # no TOML, a number of thousands of digits, deep nesting
        return text


def _read_source(source: str) -> dict[str, Any]:
    path = Path(source).expanduser()
    if path.is_dir():
        path = path / "config.toml"
    if not path.exists():
        names = recipe_names()
        if "/" in source or source.endswith(".toml"):
            raise UserError(f"no such file or run directory: {source}")
        if source not in names:
            near = difflib.get_close_matches(source, names, n=1, cutoff=0.0)
            raise UserError(
                f"no recipe, file or run directory '{source}'; did you mean '{near[0]}'? "
                f"Recipes: {', '.join(names)}"
            )
        path = RECIPES / f"{source}.toml"
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid TOML: {error}") from None


def recipe_names() -> list[str]:
    """The names of the recipes that come with this package, sorted."""
    return sorted(p.stem for p in RECIPES.glob("*.toml"))
