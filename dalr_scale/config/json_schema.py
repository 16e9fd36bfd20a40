"""The JSON schema of a configuration, for completion and checks in editors of TOML files.

    python -m dalr_scale.config.json_schema > dalr_scale/config/config.schema.json

It describes one file. The checks that need several keys, the ranks or the data are those of
``dalr-scale plan``.
"""

from __future__ import annotations

import dataclasses
import json
import typing
from typing import Any, Literal

from dalr_scale.config.limits import RANGES
from dalr_scale.config.loading import list_length
from dalr_scale.config.presets import PRESETS
from dalr_scale.config.schema import Config
from dalr_scale.config.text import default_of

# The newest draft that TOML editors (taplo, Even Better TOML, tombi) support throughout.
DRAFT = "http://json-schema.org/draft-07/schema#"
_KINDS = {bool: "boolean", int: "integer", float: "number", str: "string"}


def json_schema() -> dict[str, object]:
    """The schema: one object a section, every key with description, default, range and values."""
    hints = typing.get_type_hints(Config)
    return {
        "$schema": DRAFT,
        "title": "dalr_scale configuration",
        "description": "A run of dalr-scale; keys that are not set have the defaults named here.",
        **_object({name: _section(name, hint) for name, hint in hints.items()}),
    }


def _section(section: str, cls: type) -> dict[str, object]:
    hints = typing.get_type_hints(cls)
    keys: dict[str, object] = {}
    for entry in dataclasses.fields(cls):
        name = f"{section}.{entry.name}"
        shown = {"description": entry.metadata["help"], "default": default_of(entry)}
        keys[entry.name] = shown | _value(name, hints[entry.name])
    described = {"description": cls.__doc__} if cls.__doc__ else {}
    return described | _object(keys)


def _object(properties: dict[str, object]) -> dict[str, object]:
    return {"type": "object", "properties": properties, "additionalProperties": False}


def _value(name: str, hint: Any) -> dict[str, object]:
    """The values of a type; `name` is the dotted key, for its range."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if name == "objective.preset":
        return {"type": "string", "enum": list(PRESETS)}
    if origin is Literal:
        return {"type": "string", "enum": list(arguments)}
    if origin is tuple:
        return _list(name, arguments)
    if origin is dict:
        free = arguments[1] is Any
        entries = {} if free else {"additionalProperties": _value(name, arguments[1])}
        return {"type": "object", **entries}
    return {"type": _KINDS[hint], **_range(name)}


def _list(name: str, arguments: tuple[Any, ...]) -> dict[str, object]:
    """A list; one of any length may also be given as its only entry."""
    item, length = _value(name, arguments[0]), list_length(arguments)
    if length is not None:
        return {"type": "array", "items": item, "minItems": length, "maxItems": length}
    return {"anyOf": [{"type": "array", "items": item}, item]}


def _range(name: str) -> dict[str, object]:
    if name not in RANGES:
        return {}
    allowed = RANGES[name]
    return {
        "exclusiveMinimum" if allowed.open_low else "minimum": allowed.low,
        "exclusiveMaximum" if allowed.open_high else "maximum": allowed.high,
    }


def main() -> None:
    """Prints the schema."""
    print(json.dumps(json_schema(), indent=1))


if __name__ == "__main__":
    main()
