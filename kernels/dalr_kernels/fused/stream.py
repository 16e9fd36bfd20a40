"""Mode "stream": two sweeps over blocks of columns with a constant workspace."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from dalr_kernels.eager.chunked import spans
from dalr_kernels.fused.arguments import PerSoftmax, Strides, Student, Sums
from dalr_kernels.fused.call import PreparedCall, add_gradients, constants_of, ids_of
from dalr_kernels.fused.gradient_kernel import gradient_kernel
from dalr_kernels.fused.statistics_kernel import NUM_STATES, statistics_kernel, sums_of_states
from dalr_kernels.fused.tile_tables import Tile, architecture_of, kind_of, tables

# Programs of the statistics kernel: some waves on the 132 processors of an H200.
PROGRAMS = 4 * 132
SOFTMAXES = len(PerSoftmax._fields)


class Block(NamedTuple):
    """Rows and (padded) columns that are computed at a time, and their buffers ``[1 + M, ...]``."""

    rows: slice
    cols: slice
    buffers: Tensor


def run(call: PreparedCall) -> None:
    """Fill in the losses and gradients of a call, a block of rows at a time."""
    num_cols = len(call.student.cols)
    buffers = call.buffers()
    # Without teacher blocks nothing limits the columns of the first sweep.
    sweep = call.sizes.cols if call.teachers else num_cols
    for start, stop in spans(len(call.inputs.rows), call.sizes.rows):
        rows = slice(start, stop)
        states = first_states(call, stop - start, sweep)
        for low, high in spans(num_cols, sweep):
            block = Block(rows, slice(low, high), buffers)
            fill_teachers(call, block)
            launch_statistics(call, block, states)
        call.losses[:, rows], row_sums = finish(call, states)
        if not call.wants_gradient:
            continue
        for low, high in spans(num_cols, call.sizes.cols):
            block = Block(rows, slice(low, high), buffers)
            fill_teachers(call, block)
            launch_gradients(call, block, row_sums)
            grads = buffers[0, : stop - start, : high - low]
            add_gradients(call, grads, rows, block.cols)


def fill_teachers(call: PreparedCall, block: Block) -> None:
    """Write the products of the teachers for one block into its buffers."""
    rows, cols = block.rows, block.cols
    for teacher, buffer in zip(call.teachers, block.buffers[1:], strict=True):
        teacher.block(rows, cols, buffer[: rows.stop - rows.start, : cols.stop - cols.start])


def tile_of(call: PreparedCall, kernel: int) -> Tile:
    """Tile of the statistics (0) or the gradient kernel (1)."""
    operand = call.student.rows
    table = tables(architecture_of(operand.device))[kernel]
    return table[operand.dtype, kind_of(call.arguments.flags)]


def first_states(call: PreparedCall, num_rows: int, sweep: int) -> Tensor:
    """Sums of nothing, ``[NUM_STATES, splits, num_rows]``: fixed offsets or a lowest maximum."""
    tile = tile_of(call, 0)
    row_tiles = triton.cdiv(num_rows, tile.BM)
    splits = min(triton.cdiv(sweep, tile.BN), triton.cdiv(PROGRAMS, row_tiles))
    states = torch.zeros(
        NUM_STATES, splits, num_rows, dtype=torch.float32, device=call.losses.device
    )
    _, sums = sums_of_states(states)
    for state, offset in zip(sums.running_max, call.arguments.offsets, strict=True):
        state.fill_(-1e38 if call.arguments.flags.online else offset)
    return states


def launch_statistics(call: PreparedCall, block: Block, states: Tensor) -> None:
    """Continue the sums of a block of rows over a block of columns."""
    inputs, rows, cols, shared = call.inputs, block.rows, block.cols, call.arguments
    tile = tile_of(call, 0)
    num_rows, splits = rows.stop - rows.start, states.shape[1]
    tiles = triton.cdiv(cols.stop - cols.start, tile.BN)
    kernel: Any = statistics_kernel  # Triton adds launch options to its parameters
    kernel[(triton.cdiv(num_rows, tile.BM), splits)](
        student_of(call, rows), constants_of(inputs.layout, block.buffers), states,
        ids_of(inputs, rows), num_rows, len(inputs.cols), strides_of(call),
        block.buffers.stride(1), cols.start, cols.stop, inputs.col_offset + rows.start,
        triton.cdiv(tiles, splits),
        shared.margin, shared.threshold, shared.factors, shared.offsets, shared.flags,
        tile.shape(call.student.rows.shape[1]),
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip


def launch_gradients(call: PreparedCall, block: Block, row_sums: Tensor) -> None:
    """Make the tiles of a block again and write their derivatives into the first buffer."""
    inputs, rows, cols, shared = call.inputs, block.rows, block.cols, call.arguments
    tile = tile_of(call, 1)
    num_rows = rows.stop - rows.start
    grid = triton.cdiv(num_rows, tile.BM), triton.cdiv(cols.stop - cols.start, tile.BN)
    kernel: Any = gradient_kernel  # as above
    kernel[grid](
        student_of(call, rows), constants_of(inputs.layout, block.buffers), block.buffers[0],
        row_sums, ids_of(inputs, rows), num_rows, len(inputs.cols), strides_of(call),
        block.buffers.stride(1), cols.start, cols.stop, inputs.col_offset + rows.start,
        shared.margin, shared.threshold, shared.factors, shared.offsets, shared.weights,
        shared.flags, tile.shape(call.student.rows.shape[1]),
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip


def student_of(call: PreparedCall, rows: slice) -> Student:
    """Unit vectors of some rows and all columns."""
    return Student(call.student.rows[rows], call.student.cols)


def strides_of(call: PreparedCall) -> Strides:
    """Padded width of the unit vectors, and elements from one to the next on either side."""
    rows, cols = call.student.rows, call.student.cols
    return Strides(rows.shape[1], rows.stride(0), cols.stride(0))


def finish(call: PreparedCall, states: Tensor) -> tuple[Tensor, Tensor]:
    """Losses ``[3, rows]``, and ``[10, rows]``: 1 / sum and running max of each softmax.

    The column splits merge in a fixed order.
    """
    positive, sums = sums_of_states(states)
    layout, factors = call.inputs.layout, call.arguments.factors
    losses = states.new_zeros(3, states.shape[2])
    row_sums = states.new_zeros(2 * SOFTMAXES, states.shape[2])
    if layout.nce:
        (log_sum,) = merge_splits(sums, row_sums, "nce")
        losses[0] = log_sum - (positive.sum(dim=0) * factors.nce - row_sums[5])
    if layout.kl:
        (log_sum,) = merge_splits(sums, row_sums, "kl")
        expected = sums.expected.kl_student, sums.expected.kl_teacher
        log_teacher, student, teacher = merge_splits(sums, row_sums, "kl_teacher", *expected)
        log_q = (teacher * factors.kl_teacher - row_sums[7]) - log_teacher
        log_r = (student * factors.kl - row_sums[6]) - log_sum
        losses[1] = log_q - log_r
    if layout.list_net and len(call.inputs.cols) > 1:  # a list of one column is empty
        (log_sum,) = merge_splits(sums, row_sums, "list_net")
        expected = (sums.expected.list_net_student,)
        _, student = merge_splits(sums, row_sums, "list_net_teacher", *expected)
        losses[2] = log_sum - (student * factors.list_net - row_sums[8])
    return losses * math.log(2.0), row_sums


def merge_splits(
    sums: Sums[Tensor], row_sums: Tensor, name: str, *expected: Tensor
) -> list[Tensor]:
    """Merge the column splits of one softmax and note 1 / sum and maximum in `row_sums`.

    Returns:
        ``log2(sum)`` relative to the maximum, and the means of `expected`, ``[rows]`` each.
    """
    index = PerSoftmax._fields.index(name)
    split_max = sums.running_max[index]
    row_max = split_max.amax(dim=0)
    decay = torch.exp2(split_max - row_max)
    total = (sums.total[index] * decay).sum(dim=0)
    row_sums[index], row_sums[SOFTMAXES + index] = 1.0 / total, row_max
    return [torch.log2(total), *((part * decay).sum(dim=0) / total for part in expected)]
