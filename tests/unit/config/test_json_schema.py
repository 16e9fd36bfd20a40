"""The JSON schema of a configuration: up to date, and of one mind with the loader."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from dalr_scale import config as config_package
from dalr_scale.config import RECIPES, Config, build_config, recipe_names
from dalr_scale.config.json_schema import json_schema
from dalr_scale.config.limits import RANGES
from dalr_scale.config.text import to_toml
from dalr_scale.errors import UserError

FILE = Path(config_package.__file__).with_name("config.schema.json")
VALIDATOR = jsonschema.Draft7Validator(json_schema())


def test_the_committed_file_is_up_to_date() -> None:
    told = "run: python -m dalr_scale.config.json_schema > dalr_scale/config/config.schema.json"
    assert json.loads(FILE.read_text(encoding="utf-8")) == json.loads(json.dumps(json_schema())), (
        told
    )
    jsonschema.Draft7Validator.check_schema(json_schema())


@pytest.mark.parametrize("name", recipe_names())
def test_recipes_are_valid(name: str) -> None:
    VALIDATOR.validate(tomllib.loads((RECIPES / f"{name}.toml").read_text(encoding="utf-8")))


def test_saved_configurations_are_valid() -> None:
    VALIDATOR.validate(tomllib.loads(to_toml(Config())))


def test_every_key_is_described() -> None:
    for section in json_schema()["properties"].values():  # type: ignore[union-attr]
        for key in section["properties"].values():
            assert key["description"]
            assert "default" in key


@pytest.mark.parametrize(
    "table",
    [
        {"optim": {"betas": [0.9]}},
        {"optim": {"lr": "fast"}},
        {"optim": {"lrr": 0.1}},
        {"optimizer": {"lr": 0.1}},
        {"engine": {"kind": "zero4"}},
        {"objective": {"preset": "kdmsce"}},
        {"eval": {"tasks": ["STS99"]}},
        {"data": {"remote": "ftp"}},
        {"log": {"tensorboard": 1}},
        {"save": {"keep": 1}},
    ],
)
def test_what_the_loader_refuses_the_schema_refuses(table: dict[str, Any]) -> None:
    assert not VALIDATOR.is_valid(table)
    with pytest.raises(UserError):
        build_config([table])


@pytest.mark.parametrize("name", RANGES)
def test_ranges_are_those_of_the_loader(name: str) -> None:
    section, key = name.split(".")
    default = getattr(getattr(Config(), section), key)
    size = len(default) if key == "betas" else 1
    for value in (RANGES[name].low, RANGES[name].high, RANGES[name].high * 2, -1):
        number = int(value) if isinstance(default, int) else float(value)
        table = {section: {key: [number] * size if isinstance(default, tuple) else number}}
        try:
            build_config([table])
        except UserError:
            assert not VALIDATOR.is_valid(table), value
        else:
            assert VALIDATOR.is_valid(table), value
