"""Mode "stream": two sweeps over blocks of columns with a constant workspace."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from dalr_kernels.eager.chunked import spans
from dalr_kernels.fused.launch import Pass, add_gradients, ids_of, read_by_terms
from dalr_kernels.fused.tiles import STATES, slopes_kernel, statistics_kernel
from dalr_kernels.fused.tuning import HARD, SOFT

# Programs of the statistics kernel: some waves on the 132 processors of an H200.
PROGRAMS = 4 * 132
SLOPE_ARGUMENTS = ("nce_weight", "kl_weight", "net_weight")


class Tile(NamedTuple):
    """Shape of a tile, column slices of its epilogue, warps and pipeline stages."""

    BM: int
    BN: int
    BK: int
    SLICES: int
    num_warps: int
    num_stages: int


TileTable = dict[tuple[torch.dtype, str], Tile]
# Products in full float32 do not use tensor cores: small tiles.
EXACT = Tile(64, 64, 32, 2, 8, 2)


# Chosen by the ahead-of-time report: no spills, shared memory of every supported card. "lean" is
# the plain InfoNCE, "alone" one with margin, ids or online maximum, "taught" whatever reads a
# constant matrix.
LEAN, ALONE, TAUGHT = "lean", "alone", "taught"
EXACT_TILES = dict.fromkeys([(torch.float32, kind) for kind in (LEAN, ALONE, TAUGHT)], EXACT)
STATISTICS = {
    (torch.float16, LEAN): Tile(128, 256, 64, 4, 8, 3),
    (torch.float16, ALONE): Tile(128, 128, 64, 2, 8, 4),
    (torch.float16, TAUGHT): Tile(128, 64, 64, 2, 8, 4),
    **EXACT_TILES,
}
SLOPES = {
    (torch.float16, LEAN): Tile(128, 256, 64, 4, 8, 3),
    (torch.float16, ALONE): Tile(128, 128, 64, 2, 8, 4),
    (torch.float16, TAUGHT): Tile(128, 64, 64, 2, 8, 4),
    **EXACT_TILES,
}
# Without wgmma the operands take registers too.
AMPERE_STATISTICS = STATISTICS | {
    (torch.float16, LEAN): Tile(128, 128, 64, 2, 8, 3),
    (torch.float16, TAUGHT): Tile(64, 64, 64, 1, 8, 4),
}
# Only on Hopper do 16 warps keep the wide epilogue in registers and the products on wgmma.
HOPPER_SLOPES = SLOPES | {(torch.float16, TAUGHT): Tile(128, 128, 64, 4, 16, 3)}
BLACKWELL_SLOPES = SLOPES | {(torch.float16, TAUGHT): Tile(128, 128, 64, 4, 8, 3)}


def tables(architecture: int) -> tuple[TileTable, TileTable]:
    """Tiles of the statistics and the slopes kernel for sm_80, sm_90 or sm_100."""
    if architecture < 90:
        return AMPERE_STATISTICS, SLOPES
    return STATISTICS, HOPPER_SLOPES if architecture < 100 else BLACKWELL_SLOPES


def architecture_of(device: torch.device) -> int:
    """Compute capability times ten; the interpreter runs Hopper's tiles."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def kind_of(switches: dict[str, Any]) -> str:
    """How much the epilogue of a pass has to hold."""
    taught = switches["KL"] or switches["NET"] or switches["MASK"]
    if taught or switches["NCE_SHIFT"] == SOFT:
        return TAUGHT
    busy = switches["NCE_SHIFT"] == HARD or switches["IDS"] or switches["ONLINE"]
    return ALONE if busy else LEAN


def blocks(task: Pass) -> None:
    """A block of rows at a time: sums over all columns, then slopes and gradients."""
    inputs, sizes = task.inputs, task.sizes
    padded_cols = len(task.student.cols)
    buffers = torch.empty(
        (1 + len(task.teachers), sizes.rows, sizes.cols),
        dtype=task.student.rows.dtype,
        device=inputs.rows.device,
    )
    want = task.gradients.rows is not None or task.gradients.cols is not None
    # Without teacher blocks nothing limits the columns of the first sweep.
    sweep = sizes.cols if task.teachers else padded_cols
    for start, stop in spans(len(inputs.rows), sizes.rows):
        rows = slice(start, stop)
        states = first_states(task, stop - start, sweep)
        for low, high in spans(padded_cols, sweep):
            cols = slice(low, high)
            fill_teachers(task, buffers, rows, cols)
            gather(task, buffers, states, rows, cols)
        task.losses[:, rows], row_sums = finish(task, states)
        if not want:
            continue
        for low, high in spans(padded_cols, sizes.cols):
            cols = slice(low, high)
            fill_teachers(task, buffers, rows, cols)
            slopes = buffers[0, : stop - start, : high - low]
            write_slopes(task, buffers, row_sums, rows, cols)
            add_gradients(task, slopes, rows, cols)


def fill_teachers(task: Pass, buffers: Tensor, rows: slice, cols: slice) -> None:
    """Products of the teachers for one block."""
    for teacher, buffer in zip(task.teachers, buffers[1:], strict=True):
        part = buffer[: rows.stop - rows.start, : cols.stop - cols.start]
        teacher.block(rows, cols, part)


def tile_of(task: Pass, kernel: int) -> dict[str, Any]:
    """Tile and launch options of the statistics (0) or the slopes kernel (1)."""
    operand = task.student.rows
    table = tables(architecture_of(operand.device))[kernel]
    tile = table[operand.dtype, kind_of(task.switches)]
    return {**tile._asdict(), "EVEN": operand.shape[1] % tile.BK == 0}


def first_states(task: Pass, num_rows: int, sweep: int) -> Tensor:
    """Empty sums ``[states, splits, rows]``: fixed offsets or an unreachable peak."""
    tile = tile_of(task, 0)
    row_tiles = triton.cdiv(num_rows, tile["BM"])
    splits = min(triton.cdiv(sweep, tile["BN"]), triton.cdiv(PROGRAMS, row_tiles))
    states = torch.zeros(
        len(STATES), splits, num_rows, dtype=torch.float32, device=task.losses.device
    )
    for index, name in enumerate(STATES):
        if name.endswith("_peak"):
            offset = task.values[name.replace("_peak", "_offset")]
            states[index] = -1e38 if task.switches["ONLINE"] else offset
    return states


def gather(task: Pass, buffers: Tensor, states: Tensor, rows: slice, cols: slice) -> None:
    """Continue the sums of a block of rows over a block of columns."""
    inputs = task.inputs
    tile = tile_of(task, 0)
    num_rows, splits = rows.stop - rows.start, states.shape[1]
    tiles = triton.cdiv(cols.stop - cols.start, tile["BN"])
    row_ids, col_ids = ids_of(inputs)
    values = {name: v for name, v in task.values.items() if name not in SLOPE_ARGUMENTS}
    kernel: Any = statistics_kernel
    kernel[(triton.cdiv(num_rows, tile["BM"]), splits)](
        task.student.rows[rows], task.student.cols,
        *read_by_terms(inputs.layout, buffers[0], buffers[1:]), states, row_ids[rows], col_ids,
        num_rows, len(inputs.cols), task.student.rows.shape[1],
        task.student.rows.stride(0), task.student.cols.stride(0), buffers.stride(1),
        cols.start, cols.stop, inputs.col_offset + rows.start, triton.cdiv(tiles, splits),
        **values, **task.switches, **tile,
    )  # fmt: skip


def write_slopes(task: Pass, buffers: Tensor, row_sums: Tensor, rows: slice, cols: slice) -> None:
    """Make the tiles of a block again and write their slopes into the first buffer."""
    inputs = task.inputs
    tile = tile_of(task, 1)
    num_rows = rows.stop - rows.start
    row_ids, col_ids = ids_of(inputs)
    grid = triton.cdiv(num_rows, tile["BM"]), triton.cdiv(cols.stop - cols.start, tile["BN"])
    kernel: Any = slopes_kernel
    kernel[grid](
        task.student.rows[rows], task.student.cols,
        *read_by_terms(inputs.layout, buffers[0], buffers[1:]), buffers[0], row_sums,
        row_ids[rows], col_ids,
        num_rows, len(inputs.cols), task.student.rows.shape[1],
        task.student.rows.stride(0), task.student.cols.stride(0), buffers.stride(1),
        cols.start, cols.stop, inputs.col_offset + rows.start,
        **task.values, **task.switches, **tile,
    )  # fmt: skip


def finish(task: Pass, states: Tensor) -> tuple[Tensor, Tensor]:
    """Losses ``[3, rows]``, and for `slopes_kernel` shares and peaks ``[10, rows]``.

    The shares of the columns merge in a fixed order.
    """
    part = dict(zip(STATES, states.unbind(), strict=True))
    has, values = task.inputs.layout, task.values
    losses = states.new_zeros(3, states.shape[2])
    row_sums = states.new_zeros(10, states.shape[2])

    def log_share(row: int, name: str, *means: str) -> list[Tensor]:
        """Fill in a share and a peak; ``log2(2^peak * sum)`` less the peak, and the means."""
        top = part[f"{name}_peak"].amax(dim=0)
        decay = torch.exp2(part[f"{name}_peak"] - top)
        mass = (part[f"{name}_sum"] * decay).sum(dim=0)
        row_sums[row], row_sums[5 + row] = 1.0 / mass, top
        return [torch.log2(mass), *((part[m] * decay).sum(dim=0) / mass for m in means)]

    if has.nce:
        (log_mass,) = log_share(0, "nce")
        positive = part["positive"].sum(dim=0)
        losses[0] = log_mass - (positive * values["nce_factor"] - row_sums[5])
    if has.kl:
        (log_mass,) = log_share(1, "kl")
        teacher_log_mass, student, teacher = log_share(2, "klt", "klt_student", "klt_teacher")
        log_q = (teacher * values["klt_factor"] - row_sums[7]) - teacher_log_mass
        log_r = (student * values["kl_factor"] - row_sums[6]) - log_mass
        losses[1] = log_q - log_r
    if has.net and len(task.inputs.cols) > 1:  # a list of one column is empty
        (log_mass,) = log_share(3, "net")
        _, student = log_share(4, "nett", "nett_student")
        losses[2] = log_mass - (student * values["net_factor"] - row_sums[8])
    return losses * math.log(2.0), row_sums
