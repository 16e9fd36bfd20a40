"""Mode "workspace": a chunk of rows at a time; every product and matrix is made once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import triton

from dalr_kernels.eager.chunked import spans
from dalr_kernels.fused.call import PreparedCall, add_gradients, constants_of, ids_of
from dalr_kernels.fused.products import scores
from dalr_kernels.fused.row_kernel import row_kernel

if TYPE_CHECKING:
    from torch import Tensor

EVERYTHING = slice(None)


def run(call: PreparedCall) -> None:
    """Fill in the losses and gradients of a call."""
    buffers = call.buffers()
    for start, stop in spans(len(call.inputs.rows), call.sizes.rows):
        rows = slice(start, stop)
        chunk = buffers[:, : stop - start]
        scores(call.student.rows[rows], call.student.cols, chunk[0])
        for teacher, out in zip(call.teachers, chunk[1:], strict=True):
            teacher.block(rows, EVERYTHING, out)
        launch_rows(call, buffers, rows)
        if call.wants_gradient:
            add_gradients(call, chunk[0], rows, EVERYTHING)


def launch_rows(call: PreparedCall, buffers: Tensor, rows: slice) -> None:
    """Losses of a chunk; where wanted, derivatives replace the cosines in the first buffer."""
    inputs, cols = call.inputs, call.sizes.cols
    cosines = buffers[0, : rows.stop - rows.start]
    shared = call.arguments
    kernel: Any = row_kernel  # Triton adds launch options to the parameters of a kernel
    kernel[(rows.stop - rows.start,)](
        cosines, constants_of(inputs.layout, buffers), cosines, call.losses,
        ids_of(inputs, EVERYTHING), len(inputs.rows), len(inputs.cols), rows.start,
        inputs.col_offset + rows.start, cols, cols,
        shared.margin, shared.threshold, shared.factors, shared.offsets, shared.weights,
        shared.flags, call.wants_gradient, **row_launch(cols),
    )  # fmt: skip


def row_launch(num_cols: int) -> dict[str, int]:
    """Columns per step and warps of the row kernel."""
    size = min(2048, max(128, triton.next_power_of_2(num_cols)))
    return {"BLOCK": size, "num_warps": max(1, min(8, size // 256))}
