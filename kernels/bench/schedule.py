"""Which cells are measured, in which order, and how much time each may take.

The order is the order of importance: what the time does not reach is named as not measured.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from bench.peers import CHUNKS, COMPILED, DENSE_REFERENCE, EAGER, OURS, PRODUCTS, ROOMY
from bench.problems import Shape, square

K = 1024
LIBRARIES = (
    "inf-cl",
    "memeff",
    "cut-cross-entropy",
    "liger-kernel, FLCE",
    "liger-kernel, scaled CE",
)
TORCH_ROWS = (*CHUNKS.values(), *EAGER, COMPILED)
BEST_CHUNK = CHUNKS[2048]
BOTH_MODES = OURS[:2]


@dataclass(frozen=True)
class Cell:
    """One problem at one shape, and who takes part.

    Attributes:
        rounds: Timed runs of each implementation.
        seconds: Most time the cell may take, compilation included.
        warm: Run once before timing; off where a single run takes many seconds.
    """

    problem: str
    shape: Shape
    implementations: tuple[str, ...]
    rounds: int
    seconds: float
    data: str = "random"
    warm: bool = True

    @property
    def key(self) -> str:
        shape = self.shape
        return f"{self.problem}/{shape.rows}x{shape.cols}x{shape.width}/{self.data}"


def gpu_cells() -> list[Cell]:
    """The cells of ``make gpu`` on one large GPU."""
    main, size = 768, 32 * K
    few = (*BOTH_MODES, PRODUCTS, BEST_CHUNK)
    return [
        # the headline: three losses and plain InfoNCE, everybody
        Cell("triple", square(size, main), (*BOTH_MODES, PRODUCTS, *TORCH_ROWS), 30, 110),
        Cell("info_nce", square(size, main), (*few, *LIBRARIES, *EAGER, COMPILED), 30, 100),
        Cell("triple", square(size, 256), (*few, EAGER[1]), 30, 25),
        Cell("triple", square(size, 1024), (*few, EAGER[1]), 30, 25),
        # memory, and the largest batch
        Cell("triple", square(64 * K, main), (*few, *EAGER), 5, 25),
        Cell("triple", square(K * K, main), (ROOMY,), 1, 40, warm=False),
        *_objectives(),
        Cell("info_nce", square(size, 256), (*few, *LIBRARIES), 30, 20),
        Cell("info_nce", square(size, 1024), (*few, *LIBRARIES), 30, 20),
        Cell("triple", square(size, main), few, 30, 12, data="clustered"),
        Cell("info_nce", square(size, main), (*few, *LIBRARIES), 10, 20, data="clustered"),
        *(Cell("triple", square(n * K, main), few, 10, 12) for n in (8, 16, 128, 256, 4)),
        Cell("list_mle", square(size, main), (OURS[2], DENSE_REFERENCE), 3, 15),
        Cell("global_to_local", square(8 * K, main), (OURS[2], DENSE_REFERENCE), 3, 12),
        # a rank's share, a prime, and a width in between
        Cell("triple", Shape(4 * K, size, main), few, 30, 8),
        Cell("triple", square(32749, main), few, 10, 12),
        Cell("triple", square(size, 512), few, 10, 12),
        *(
            Cell(name, square(size, main), (*few, EAGER[1]), 10, 12)
            for name in ("margin", "alignment_kl", "list_net")
        ),
        Cell("triple", square(K * K, main), OURS[1:2], 1, 60, warm=False),
        Cell("triple", square(2 * K * K, main), (ROOMY,), 1, 120, warm=False),
    ]


def _objectives() -> Iterator[Cell]:
    ours = (OURS[2], "ours, torch path")
    for name in ("dalr", "dalr-reference"):
        yield Cell(name, square(8 * K, 768), (*ours, DENSE_REFERENCE), 5, 15)
        yield Cell(name, square(32 * K, 768), (*ours, DENSE_REFERENCE), 3, 25)
    yield Cell("dalr-full", square(8 * K, 768), (OURS[2], DENSE_REFERENCE), 3, 15)
    yield Cell("dalr-reference-full", square(8 * K, 768), (OURS[2], DENSE_REFERENCE), 3, 15)


def dry_cells() -> list[Cell]:
    """The whole machinery at sizes a CPU does in seconds."""
    plain = (OURS[2], "ours, torch path", PRODUCTS, *EAGER, CHUNKS[512], *LIBRARIES, OURS[0])
    return [
        Cell("triple", square(96, 32), (*plain[:6], OURS[0]), 3, 20),
        Cell("info_nce", square(96, 256), plain, 3, 20),
        Cell("triple", Shape(33, 96, 32), plain[:2], 2, 10, data="clustered"),
        Cell("list_mle", square(64, 16), (OURS[2], DENSE_REFERENCE), 2, 10),
        Cell("global_to_local", square(24, 16, tokens=5), (OURS[2], DENSE_REFERENCE), 2, 10),
        Cell("dalr-reference", square(48, 16), (OURS[2], DENSE_REFERENCE), 2, 10),
        Cell("dalr-full", square(48, 16, tokens=5), (OURS[2], DENSE_REFERENCE), 2, 10),
    ]
