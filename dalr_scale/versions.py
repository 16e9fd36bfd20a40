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


def version_line() -> str:
    """Python, processors and package versions in one line."""
    parts = [f"python {platform.python_version()}", f"{len(os.sched_getaffinity(0))} cores"]
    for name in PACKAGES:
        try:
            parts.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            parts.append(f"{name} absent")
    return ", ".join(parts)


if __name__ == "__main__":
    print(version_line(), flush=True)
