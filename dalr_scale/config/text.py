"""A configuration as text: the TOML that is saved with a run, and what ``--help`` prints."""

from __future__ import annotations

import dataclasses
import json
import re
import types
import typing
from typing import Any

from dalr_scale.config import Config, recipe_names
from dalr_scale.config.limits import LENGTHS, RANGES
from dalr_scale.config.presets import PRESETS


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


def _toml_text(value: Any) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case str():
            # JSON's escapes are TOML's too; TOML alone wants DEL escaped
            return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
        case list() | tuple():
            return "[" + ", ".join(map(_toml_text, value)) + "]"
        case dict():
            entries = (f"{_toml_key(k)} = {_toml_text(v)}" for k, v in value.items())
            return "{" + ", ".join(entries) + "}"
        case types.NoneType():
            raise TypeError("TOML has no null")
        case _:
            return repr(value)


def _toml_key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _toml_text(key)


def settings_help() -> str:
    """What the help of a command that takes settings ends with."""
    return f"recipes: {', '.join(recipe_names())}\n\nsettings:\n{help_text()}"


def help_text() -> str:
    """Every section and key with its default, meaning and allowed values, for ``--help``."""
    lines: list[str] = []
    for section in dataclasses.fields(Config):
        lines += ["", f"[{section.name}]"]
        cls = typing.get_type_hints(Config)[section.name]
        hints = typing.get_type_hints(cls)
        for f in dataclasses.fields(cls):
            name = f"{section.name}.{f.name}"
            default = f.default if f.default is not dataclasses.MISSING else {}
            lines.append(f"  --{name}={_toml_text(default)}")
            lines.append(f"      {f.metadata['help']}")
            lines.append(f"      [{allowed_values(name, hints[f.name])}]")
    return "\n".join(lines[1:])


def allowed_values(name: str, hint: Any) -> str:
    """What a key may be set to, in words: ``"whole number, at least 1 and at most 256"``."""
    if name == "objective.preset":
        return " | ".join(PRESETS)
    if typing.get_origin(hint) is typing.Literal:
        return " | ".join(value or "''" for value in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        count = f"list of {LENGTHS[name]}" if name in LENGTHS else "list"
        return f"{count}: {allowed_values(name, typing.get_args(hint)[0])}"
    kinds = {bool: "true | false", int: "whole number", float: "number", str: "text"}
    kind = kinds.get(hint, "table")
    return f"{kind}, {RANGES[name]}" if name in RANGES else kind
