"""Prints what this environment consists of; the first thing to put into a bug report."""

from __future__ import annotations

import os
import platform
from importlib import metadata

PACKAGES = (
    "dalr-scale",
    "torch",
    "torchvision",
    "triton",
    "deepspeed",
    "accelerate",
    "transformers",
    "open_clip_torch",
    "webdataset",
    "tensorboard",
    "numpy",
    "safetensors",
)


def versions() -> dict[str, str]:
    """Python and package versions by name, "absent" for what is not installed; imports nothing."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def version_line() -> str:
    """Python, processors and package versions in one line."""
    parts = [f"{name} {version}" for name, version in versions().items()]
    return ", ".join([parts[0], f"{len(os.sched_getaffinity(0))} cores", *parts[1:]])


if __name__ == "__main__":
    print(version_line(), flush=True)
