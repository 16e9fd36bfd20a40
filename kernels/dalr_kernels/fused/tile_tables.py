"""Shapes of the tiles of mode "stream", by architecture, type and terms.

Chosen by the ahead-of-time report: no spills, and shared memory of every supported card.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from triton.language import constexpr

from dalr_kernels.fused.arguments import Flags, TileShape
from dalr_kernels.fused.tuning import HARD, SOFT


class Tile(NamedTuple):
    """Shape of a tile (see `TileShape`), warps and pipeline stages."""

    BM: int
    BN: int
    BK: int
    SLICES: int
    num_warps: int
    num_stages: int

    def shape(self, padded_width: int) -> TileShape:
        """As a compile-time argument for unit vectors of this width."""
        even = padded_width % self.BK == 0
        return TileShape(*map(constexpr, (self.BM, self.BN, self.BK, self.SLICES, even)))


TileTable = dict[tuple[torch.dtype, str], Tile]
# Products in full float32 do not use tensor cores: small tiles.
EXACT = Tile(64, 64, 32, 2, 8, 2)
# Plain InfoNCE; one term with margin, ids or online maximum; terms that read a constant matrix.
PLAIN_INFO_NCE, SINGLE, WITH_TEACHER = "plain", "single", "with teacher"
EXACT_TILES = dict.fromkeys(
    [(torch.float32, kind) for kind in (PLAIN_INFO_NCE, SINGLE, WITH_TEACHER)], EXACT
)
STATISTICS_TILES: TileTable = {
    (torch.float16, PLAIN_INFO_NCE): Tile(128, 256, 64, 4, 8, 3),
    (torch.float16, SINGLE): Tile(128, 128, 64, 2, 8, 4),
    (torch.float16, WITH_TEACHER): Tile(128, 64, 64, 2, 8, 4),
    **EXACT_TILES,
}
GRADIENT_TILES: TileTable = {
    (torch.float16, PLAIN_INFO_NCE): Tile(128, 256, 64, 4, 8, 3),
    (torch.float16, SINGLE): Tile(128, 128, 64, 2, 8, 4),
    (torch.float16, WITH_TEACHER): Tile(128, 64, 64, 2, 8, 4),
    **EXACT_TILES,
}
# Without wgmma the operands take registers too.
AMPERE_STATISTICS_TILES = STATISTICS_TILES | {
    (torch.float16, PLAIN_INFO_NCE): Tile(128, 128, 64, 2, 8, 3),
    (torch.float16, WITH_TEACHER): Tile(64, 64, 64, 1, 8, 4),
}
# Only on Hopper do 16 warps keep the wide epilogue in registers and the products on wgmma.
HOPPER_GRADIENT_TILES = GRADIENT_TILES | {
    (torch.float16, WITH_TEACHER): Tile(128, 128, 64, 4, 16, 3)
}
BLACKWELL_GRADIENT_TILES = GRADIENT_TILES | {
    (torch.float16, WITH_TEACHER): Tile(128, 128, 64, 4, 8, 3)
}


def tables(architecture: int) -> tuple[TileTable, TileTable]:
    """Tiles of the statistics and the gradient kernel for sm_80, sm_90 or sm_100."""
    if architecture < 90:
        return AMPERE_STATISTICS_TILES, GRADIENT_TILES
    hopper = architecture < 100
    return STATISTICS_TILES, HOPPER_GRADIENT_TILES if hopper else BLACKWELL_GRADIENT_TILES


def architecture_of(device: torch.device) -> int:
    """Compute capability times ten; the interpreter runs Hopper's tiles."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def kind_of(flags: Flags) -> str:
    """How many values per element a kernel has to hold beside the products."""
    if flags.kl or flags.list_net or flags.mask or flags.nce_shift == SOFT:
        return WITH_TEACHER
    single = flags.nce_shift == HARD or flags.ids or flags.online
    return SINGLE if single else PLAIN_INFO_NCE
