"""Counts of a preparation: samples written, samples left out by reason, with examples."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

_EXAMPLES = 3


@dataclass
class Report:
    """Counts of one preparation.

    Attributes:
        shards: the shards written.
        written: number by kind, e.g. ``{"images": 6000}``.
        skipped: number by reason.
        examples: the first few skipped names, by reason; one more than is shown.
    """

    shards: list[Path] = field(default_factory=list)
    written: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def skip(self, reason: str, example: str | None = None, count: int = 1) -> None:
        """Count items that were left out, with the name of one of them."""
        self.skipped[reason] += count
        kept = self.examples.setdefault(reason, [])
        if example is not None and example not in kept and len(kept) <= _EXAMPLES:
            kept.append(example)

    def counts(self) -> dict[str, dict[str, object]]:
        """Return all counts, for ``restore``."""
        return {
            "written": dict(self.written),
            "skipped": dict(self.skipped),
            "examples": dict(self.examples),
        }

    def restore(self, counts: Mapping[str, Mapping[str, Any]]) -> None:
        """Continue from the counts that ``counts`` returned."""
        self.written.update(counts.get("written", {}))
        self.skipped.update(counts.get("skipped", {}))
        self.examples.update({k: list(v) for k, v in counts.get("examples", {}).items()})

    def add(self, other: Report) -> None:
        """Add the counts of another part of the preparation."""
        self.written.update(other.written)
        for reason, number in other.skipped.items():
            self.skip(reason, count=number)
            for example in other.examples[reason]:
                self.skip(reason, example, count=0)

    def lines(self) -> list[str]:
        """Return the summary, a line each."""
        size = sum(shard.stat().st_size for shard in self.shards) / 1e6
        what = ", ".join(f"{number:,} {name}" for name, number in self.written.items())
        directory = self.shards[0].parent if self.shards else "-"
        found = [f"wrote {what} to {len(self.shards):,} shards ({size:.1f} MB) in {directory}"]
        for reason, number in self.skipped.items():
            # Names are user input: repr keeps control characters off the terminal.
            kept = self.examples[reason]
            shown = ", ".join(
                [*map(repr, kept[:_EXAMPLES]), *(["..."] if kept[_EXAMPLES:] else [])]
            )
            found.append(f"left out {number:,} {reason}" + (f" ({shown})" if shown else ""))
        return found
