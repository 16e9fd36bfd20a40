"""A configuration as text: the TOML that is saved with a run, and the text of ``--help``."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import typing
from typing import Any, cast

from dalr_scale.config.limits import RANGES
from dalr_scale.config.loading import list_length, recipe_names
from dalr_scale.config.presets import PRESETS
from dalr_scale.config.schema import Config


def to_toml(config: Config) -> str:
    """The resolved configuration as TOML text that ``load_config`` reads back to an equal one."""
    lines = [f"# Resolved configuration of run {_toml_text(config.run.name)}."]
    for section in dataclasses.fields(config):
        lines += ["", f"[{section.name}]"]
        entries = getattr(config, section.name)
        lines += [
            f"{f.name} = {_toml_text(getattr(entries, f.name))}"
            for f in dataclasses.fields(entries)
        ]
    return "\n".join(lines) + "\n"


def _toml_text(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # JSON's escapes are TOML's too; TOML alone wants DEL escaped
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_toml_text, cast("list[object]", value))) + "]"
    if isinstance(value, dict):
        table = cast("dict[str, object]", value)
        entries = (f"{_toml_key(k)} = {_toml_text(v)}" for k, v in table.items())
        return "{" + ", ".join(entries) + "}"
    if value is None:
        raise TypeError("TOML has no null")
    return repr(value)


def _toml_key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _toml_text(key)


def settings_help() -> str:
    """The end of the help of a command that takes settings."""
    return f"recipes: {', '.join(recipe_names())}\n\nsettings:\n{help_text()}"


def help_text() -> str:
    """Every section and key with its default, meaning and allowed values, for ``--help``."""
    lines: list[str] = []
    for section in dataclasses.fields(Config):
        lines += ["", f"[{section.name}]"]
        cls = typing.get_type_hints(Config)[section.name]
        hints = typing.get_type_hints(cls)
        group = cls
        for f in dataclasses.fields(cls):
            if _group(cls, f.name) is not group:
                group = _group(cls, f.name)
                lines += ["", f"  # {group.__doc__}"]
            name = f"{section.name}.{f.name}"
            lines.append(f"  --{name}={_toml_text(default_of(f))}")
            lines.append(f"      {f.metadata['help']}")
            lines.append(f"      [{allowed_values(name, hints[f.name])}]")
    return "\n".join(lines[1:])


def default_of(entry: dataclasses.Field[Any]) -> object:
    """The default value of a key; tables have a factory."""
    factory = entry.default_factory
    return factory() if factory is not dataclasses.MISSING else entry.default


def _group(cls: type, name: str) -> type:
    """The class that declares a key: `cls`, or the group of it that the key belongs to."""
    return next(c for c in cls.__mro__ if name in inspect.get_annotations(c))


def allowed_values(name: str, hint: Any) -> str:
    """The allowed values of a key, in words: ``"whole number, at least 1 and at most 256"``."""
    if name == "objective.preset":
        return " | ".join(PRESETS)
    if typing.get_origin(hint) is typing.Literal:
        return " | ".join(value or "''" for value in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        items = typing.get_args(hint)
        length = list_length(items)
        count = f"list of {length}" if length is not None else "list"
        return f"{count}: {allowed_values(name, items[0])}"
    kinds = {bool: "true | false", int: "whole number", float: "number", str: "text"}
    kind = kinds.get(hint, "table")
    return f"{kind}, {RANGES[name]}" if name in RANGES else kind
