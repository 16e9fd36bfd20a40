"""What a measurement ran on: card, clocks, driver, versions, commit and date."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "triton", "inf-cl", "memeff", "liger-kernel", "cut-cross-entropy")
CARD = ("driver_version", "power.limit", "clocks.max.sm", "clocks.max.mem")
STATE = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu", "clocks_event_reasons.active")
# clocks_event_reasons bits that mean the card was slowed: power, hardware, thermal
SLOWED = {0x4: "power cap", 0x8: "hardware", 0x20: "thermal", 0x40: "thermal", 0x80: "power brake"}


def describe(device: torch.device) -> dict[str, Any]:
    """Host, device and versions; None for what cannot be read."""
    found: dict[str, Any] = {
        "device": device_name(device),
        "memory_bytes": None,
        "multiprocessors": None,
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "packages": {name: _version(name) for name in PACKAGES},
        "commit": _commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["memory_bytes"] = properties.total_memory
        found["multiprocessors"] = properties.multi_processor_count
        found |= _query(CARD)
    return found


def device_name(device: torch.device) -> str:
    """The card's name, or the processor's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    model = re.search(r"model name\s*:\s*(.+)", text)
    name = model.group(1).strip() if model else platform.machine()
    return f"{name}, {torch.get_num_threads()} threads"


def slug(name: str) -> str:
    """File name of a card: ``NVIDIA H200`` is nvidia-h200."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def state(device: torch.device) -> dict[str, Any]:
    """Clocks, power and what slows the card right now; empty without a GPU."""
    if device.type != "cuda":
        return {}
    found = _query(STATE)
    bits = found.pop("clocks_event_reasons.active", None)
    if bits:
        number = int(bits, 16)
        found["slowed_by"] = sorted({why for bit, why in SLOWED.items() if number & bit})
    return found


def _query(fields: tuple[str, ...]) -> dict[str, Any]:
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return dict.fromkeys(fields)
    return dict(zip(fields, (part.strip() for part in done.stdout.split(",")), strict=False))


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The checkout's commit; COMMIT names it where the files travelled without their history."""
    if os.environ.get("COMMIT"):
        return os.environ["COMMIT"]
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=ROOT, capture_output=True, text=True, timeout=20, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
