"""Worlds without a process group, and small runs to save and damage."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dalr_scale.run.checkpoint import SaveErrors, save_checkpoint
from dalr_scale.run.manifest import MANIFEST, MANIFEST_SUM, _sum_line
from dalr_scale.run.state import RunState, StreamState


class SoloWorld:
    """A world of one."""

    rank = 0
    size = 1

    def barrier(self) -> None: ...

    def all_max(self, value: int) -> int:
        return value

    def gather_objects(self, obj: Any) -> list[Any] | None:
        return [obj]

    def broadcast_object(self, obj: Any, src: int = 0) -> Any:
        return obj


class ThreadWorld:
    """One rank of several that are threads; a rank that skips a collective breaks the test."""

    def __init__(self, rank: int, size: int, border: threading.Barrier, box: list[Any]) -> None:
        self.rank, self.size, self._border, self._box = rank, size, border, box

    def barrier(self) -> None:
        self._border.wait()

    def _exchange(self, obj: Any) -> list[Any]:
        self._box[self.rank] = obj
        self._border.wait()
        everything = list(self._box)
        self._border.wait()
        return everything

    def all_max(self, value: int) -> int:
        return max(self._exchange(value))

    def gather_objects(self, obj: Any) -> list[Any] | None:
        everything = self._exchange(obj)
        return everything if self.rank == 0 else None

    def broadcast_object(self, obj: Any, src: int = 0) -> Any:
        return self._exchange(obj)[src]


def run_ranks(size: int, action: Callable[[ThreadWorld], Any]) -> list[Any]:
    """Run `action` on every rank; its result or its exception, in rank order."""
    border = threading.Barrier(size, timeout=10)
    box: list[Any] = [None] * size
    results: list[Any] = [None] * size

    def rank_main(rank: int) -> None:
        try:
            results[rank] = action(ThreadWorld(rank, size, border, box))
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=rank_main, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def state_at(step: int, **changes: Any) -> RunState:
    values: dict[str, Any] = {
        "order_version": 1,
        "seed": 7,
        "step": step,
        "streams": {"text": StreamState(0, step)},
        "global_batch": 24,
        "tail_rule": "drop",
        "dataset_fingerprint": "f00d",
    }
    return RunState(**(values | changes))


def write_files(directory: Path, step: int, rank: int = 0) -> None:
    """What a save callback does: a file of its own per rank, and shared ones from rank 0."""
    (directory / "model").mkdir(exist_ok=True)
    (directory / "model" / f"shard{rank}.bin").write_bytes(bytes([step % 256]) * 3000 + b"end")
    if rank == 0:
        (directory / "weights.safetensors").write_bytes(step.to_bytes(4, "big") * 500)
        (directory / "latest").write_text(f"step {step}")


def save(run: Path, step: int, world: Any = None, keep: int = 9, **changes: Any) -> Path | None:
    world = world or SoloWorld()
    return save_checkpoint(
        run,
        step,
        world,
        changes.pop("write", lambda directory: write_files(directory, step, world.rank)),
        changes.pop("state", None) or state_at(step),
        fingerprint=changes.pop("fingerprint", {"torch": "2.15"}),
        keep=keep,
        on_error=changes.pop("on_error", None) or SaveErrors(),
    )


def flip_bit(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << (bit % 8)
    path.write_bytes(data)


def forge_manifest(directory: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the manifest as someone would who also corrects its checksum."""
    plain = json.loads((directory / MANIFEST).read_bytes())
    change(plain)
    data = json.dumps(plain).encode()
    (directory / MANIFEST).write_bytes(data)
    (directory / MANIFEST_SUM).write_bytes(_sum_line(data))
