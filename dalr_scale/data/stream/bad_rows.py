"""Counts the items of a run that could not be used, and stops when there are too many.

Every rank counts the bad rows of all ranks, so that all ranks stop at the same step.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from dalr_scale.data.stream.batch import BadRow
from dalr_scale.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from dalr_scale.run.ranks import Ranks

_SHOWN = 10
_MAX_STORED = 10_000  # numbers kept per stream in a checkpoint
log = logging.getLogger(__name__)


class BadRows:
    """Bad items met so far, by stream; each item counts once, however often it is met.

    Attributes:
        items: stream -> numbers of the items that could not be used.
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        quarantine: Mapping[str, Sequence[str]],
        max_fraction: float,
    ) -> None:
        """Start with the quarantined lines and samples of the indexes.

        Args:
            sizes: usable items of each stream.
            quarantine: by stream, a sentence for each quarantined line or sample.
            max_fraction: largest share of a stream that may be bad, 0 to 1.

        Raises:
            UserError: more than that is quarantined already.
        """
        self.items: dict[str, set[int]] = {kind: set() for kind in sizes}
        self._sizes = dict(sizes)
        self._quarantined = {kind: len(quarantine.get(kind, ())) for kind in sizes}
        self._max = max_fraction
        self._reasons: dict[str, list[str]] = {
            kind: list(quarantine.get(kind, ()))[:_SHOWN] for kind in sizes
        }
        for kind in sizes:
            self._check(kind)

    def restore(self, items: Mapping[str, Iterable[int]]) -> None:
        """Restore the bad items of the run before a resume."""
        for kind, numbers in items.items():
            self.items.setdefault(kind, set()).update(numbers)

    def state(self) -> dict[str, list[int]]:
        """Return the item numbers for a checkpoint, streams without any left out."""
        return {kind: sorted(found)[:_MAX_STORED] for kind, found in self.items.items() if found}

    def count(self, bad: Sequence[BadRow], world: Ranks) -> None:
        """Count the bad rows of one step, over all ranks; a collective.

        Raises:
            UserError: a stream has more than its share of bad items. The report names them.
        """
        if not world.all_max(len(bad)):
            return
        everyone = world.broadcast_object(world.gather_objects(list(bad))) or []
        rows = [BadRow(*row) for part in everyone for row in part]
        for row in rows:
            known = self.items.setdefault(row.kind, set())
            if row.item not in known:
                known.add(row.item)
                self._reasons.setdefault(row.kind, []).append(row.why)
                if world.rank == 0:
                    log.warning("not used, replaced by another item: %s", row.why)
        for kind in dict.fromkeys(row.kind for row in rows):
            self._check(kind)

    def _check(self, kind: str) -> None:
        found = len(self.items[kind]) + self._quarantined[kind]
        total = self._sizes[kind] + self._quarantined[kind]
        if found <= self._max * total:
            return
        shown = self._reasons[kind][-_SHOWN:]
        more = [f"... and {found - len(shown)} more"] if found > len(shown) else []
        lines = "\n  ".join([*shown, *more])
        raise UserError(
            f"{found} of {total} items of the {kind} stream cannot be used, more than "
            f"data.max_bad_fraction = {self._max:g}; repair the shards or raise it:\n  {lines}"
        )
