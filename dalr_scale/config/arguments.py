"""The command line of training: which configuration its arguments describe."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from dalr_scale.config import Config, load_config
from dalr_scale.config.text import settings_help

if TYPE_CHECKING:
    from collections.abc import Sequence


def configuration(argv: Sequence[str] | None = None) -> Config:
    """The configuration that the command's arguments describe."""
    parser = argparse.ArgumentParser(
        prog="accelerate launch -m dalr_scale.train",
        description="Train a sentence encoder with DALR.",
        epilog=settings_help(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", help="recipe name, TOML file or run directory (default quickstart)"
    )
    options, overrides = parser.parse_known_args(argv)
    return load_config(options.config, overrides)
