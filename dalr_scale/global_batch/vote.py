"""One small collective in which ranks tell each other all that they have to agree on in a step.

Numbers that lie on the device (losses, terms) and integers of the host (flags, counts, keys) travel
together as 64 bits each. The vote runs in the background; only `Vote.result` waits for it, and it
is the one place of a step in which the host reads what the device has computed.
"""

# Some methods of torch are typed in part only.
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from dalr_scale.distributed.collectives import column_group, several_ranks

if TYPE_CHECKING:
    from collections.abc import Mapping

_copies: dict[torch.device, torch.cuda.Stream] = {}


@dataclass(frozen=True)
class Outcome:
    """What the ranks said.

    Attributes:
        means: by name, the mean over ranks, float64.
        integers: by name, one of each rank, in rank order.
    """

    means: dict[str, float]
    integers: dict[str, list[int]]

    def largest(self, name: str) -> int:
        """The largest integer of this name."""
        return max(self.integers[name])


class Vote:
    """One vote; constructing it sends this rank's numbers. All ranks name the same ones.

    Args:
        numbers: scalars on the device.
        integers: up to 63 bits each.
        device: of the ranks' process group.
        alone: whether the device must not compute beside this collective. Kernels of two NCCL
            communicators that run at the same time may each hold what the other needs, so this is
            for engines that gather weights (ZeRO-3).
    """

    def __init__(
        self,
        numbers: Mapping[str, Tensor],
        integers: Mapping[str, int],
        device: torch.device,
        *,
        alone: bool = False,
    ) -> None:
        self._numbers, self._integers = tuple(numbers), tuple(integers)
        own = _packed(list(numbers.values()), list(integers.values()), device)
        ranks = dist.get_world_size() if several_ranks() else 1
        self._all = own.new_empty(ranks, len(own))
        self._work: dist.Work | None = None
        if ranks > 1:
            self._work = dist.all_gather_into_tensor(
                self._all.view(-1), own, group=column_group(), async_op=True
            )
        else:
            self._all[0] = own
        if device.type == "cuda":
            self._copy_early(alone=alone)

    def _copy_early(self, *, alone: bool) -> None:
        """Copies the result to the host as soon as it is there, beside what is computed meanwhile.

        To read it later would wait for everything that the device was given until then.
        """
        current = torch.cuda.current_stream(self._all.device)
        stream = _copies.setdefault(self._all.device, torch.cuda.Stream(self._all.device))
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            if self._work is not None:
                self._work.wait()  # makes the stream wait, not the host
            host = torch.empty(self._all.shape, dtype=self._all.dtype, pin_memory=True)
            host.copy_(self._all, non_blocking=True)
            self._all.record_stream(stream)
            self._copied = torch.cuda.Event()
            self._copied.record(stream)
        self._host = host
        if alone:
            current.wait_stream(stream)

    def result(self) -> Outcome:
        """Waits for all ranks and returns what they said, the same on each of them."""
        if self._all.is_cuda:
            self._copied.synchronize()
            rows = self._host
        else:
            if self._work is not None:
                self._work.wait()
            rows = self._all
        return self._read(rows.tolist())

    def _read(self, rows: list[list[int]]) -> Outcome:
        count = len(self._numbers)
        columns = list(zip(*rows, strict=True))
        means = {
            name: sum(map(_as_float, column)) / len(rows)
            for name, column in zip(self._numbers, columns[:count], strict=True)
        }
        named = zip(self._integers, columns[count:], strict=True)
        return Outcome(means, {name: list(column) for name, column in named})


def _packed(numbers: list[Tensor], integers: list[int], device: torch.device) -> Tensor:
    """Numbers and integers as int64: a gather carries bits, whatever they mean."""
    whole = torch.tensor(integers, dtype=torch.int64).to(device, non_blocking=True)
    if not numbers:
        return whole
    return torch.cat([torch.stack([n.double() for n in numbers]).view(torch.int64), whole])


def _as_float(bits: int) -> float:
    return struct.unpack("<d", struct.pack("<q", bits))[0]
