"""Student tiles of mode "stream": made in registers from the unit vectors, never stored.

Both sweeps multiply in the same order, so that they see the same cosines. The rest of a kernel
works on column slices of a tile, because a whole tile of intermediate values does not fit into
registers.
"""

# pyright: reportCallIssue=false, reportOperatorIssue=false, reportIndexIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportGeneralTypeIssues=false
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
# Inside @triton.jit functions pyright sees Python, not the language that Triton compiles.

from __future__ import annotations

import triton
import triton.language as tl

from dalr_kernels.fused.arguments import Constants


@triton.jit
def cosine_tile(student, rows, cols, strides, TILE):
    """Products of BM rows and BN columns in float32, ``[BM, BN]``.

    The unit vectors come from global memory through shared memory, BK elements at a time in as many
    pipeline stages as the launch asks for; sums stay in registers (sm_100: tensor memory).
    """
    depth = tl.arange(0, TILE.BK)
    left = student.rows + rows.to(tl.int64)[:, None] * strides.row + depth[None, :]
    right = student.cols + cols.to(tl.int64)[None, :] * strides.col + depth[:, None]
    total = tl.zeros([TILE.BM, TILE.BN], tl.float32)
    for start in range(0, strides.width, TILE.BK):
        if TILE.EVEN:
            a = tl.load(left)
            b = tl.load(right)
        else:
            a = tl.load(left, mask=(start + depth)[None, :] < strides.width, other=0.0)
            b = tl.load(right, mask=(start + depth)[:, None] < strides.width, other=0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
        left += TILE.BK
        right += TILE.BK
    return total


@triton.jit
def halves(tile):
    """Left and right half of a tile's columns."""
    BM: tl.constexpr = tile.shape[0]
    BN: tl.constexpr = tile.shape[1]
    return tl.split(tl.permute(tl.reshape(tile, [BM, 2, BN // 2]), [0, 2, 1]))


@triton.jit
def offset_constants(constants, base):
    """`Constants` from an offset on: a tile begins at a 64-bit address, inside 32 bits suffice."""
    return Constants(
        constants.kl_teacher + base, constants.list_net_teacher + base,
        constants.labels + base, constants.scores + base,
    )  # fmt: skip
