"""Operations and bytes each loss needs, and the time no implementation can beat.

Everything here is arithmetic on shapes. A *pair* is one element of the R x N matrix. A product of
``[R, d]`` with ``[N, d]`` costs ``2 d`` operations a pair, so with u = R N d one matrix costs 2u.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

MODES = ("workspace", "stream")


@dataclass(frozen=True)
class Group:
    """Losses that share their matrices: one pass computes every matrix once.

    Attributes:
        students: ``(width, sides)`` of each student matrix; `sides` is how many of its two
            factors receive a gradient.
        teachers: Widths of the constant matrices.
    """

    students: tuple[tuple[int, int], ...]
    teachers: tuple[int, ...] = ()

    @property
    def forward(self) -> int:
        """Operations a pair to make every matrix once."""
        return 2 * (sum(width for width, _ in self.students) + sum(self.teachers))

    @property
    def gradients(self) -> int:
        """Operations a pair of the gradient products alone."""
        return sum(2 * width * sides for width, sides in self.students)

    def total(self, mode: str) -> int:
        """Operations a pair, forward and gradient: "stream" makes the matrices twice."""
        passes = {"workspace": 1, "stream": 2}[mode]
        return passes * self.forward + self.gradients

    @property
    def separate_gradient_kernels(self) -> int:
        """As "stream", with one recomputation for each factor's gradient."""
        return 3 * self.forward + self.gradients

    @property
    def symmetric_teacher(self) -> int:
        """As "stream", with half of every (symmetric) teacher matrix computed."""
        return self.total("stream") - 2 * sum(self.teachers)


def row_losses(width: int, teacher_width: int = 0, sides: int = 2) -> Group:
    """Any set of row losses on one student and at most one teacher matrix."""
    return Group(((width, sides),), (teacher_width,) if teacher_width else ())


def global_to_local(width: int, tokens: int, mode: str) -> int:
    """Operations a pair of rows and *sentences* with frozen tokens: 4uL, streaming 6uL."""
    return {"workspace": 4, "stream": 6}[mode] * width * tokens


def dalr_groups(
    *, width: int = 768, image: int = 768, projected: int = 256, share_across: bool = False
) -> list[Group]:
    """The pair terms of ``dalr-reference`` with two teachers of `width` (L_g2l apart).

    Text against text (mixed and concatenated teachers), text against image (KL by rows and by
    columns, gradient into the text only), two projected views against the images. With
    `share_across` T and the image matrix are made once for all three groups.
    """
    again = () if share_across else (width,)
    soft = () if share_across else (image,)
    return [
        Group(((width, 2),), (width, 2 * width)),
        Group(((width, 1),), (*again, image)),
        Group(((projected, 2), (projected, 2)), soft),
    ]


def dalr_separate(*, width: int = 768, image: int = 768, projected: int = 256) -> list[Group]:
    """The same terms, each loss in a kernel of its own."""
    return [
        Group(((width, 2),)),
        Group(((width, 2),), (width,)),
        Group(((width, 2),), (2 * width,)),
        Group(((width, 1),), (width,)),
        Group(((width, 1),), (image,)),
        Group(((projected, 2),), (image,)),
        Group(((projected, 2),), (image,)),
    ]


def default_dalr_groups(
    *, width: int = 768, image: int = 768, projected: int = 256, consistency: int = 256
) -> list[Group]:
    """The pair terms of the default preset: one concatenated teacher, labels of S_aux."""
    return [
        Group(((width, 2),), (2 * width,)),
        Group(((width, 1),), (2 * width, image)),
        Group(((projected, 2), (projected, 2)), (consistency,)),
    ]


def summed(groups: Sequence[Group], mode: str) -> int:
    """Operations a pair of several groups."""
    return sum(group.total(mode) for group in groups)


# Memory


def tower_bytes(rows: int, width: int) -> int:
    """Floor of device-memory traffic: four 16-bit towers read twice, two fp32 gradients."""
    return rows * width * (4 * 2 * 2 + 2 * 4)


def resident_bytes(rows: int, width: int, mode: str, chunk_rows: int = 1024) -> int:
    """Predicted memory of the row losses: 16-bit towers, fp32 gradients, and the workspace.

    "stream" holds one block of about 63 MB, "workspace" two fp16 matrices of `chunk_rows` rows.
    """
    towers = 16 * width * rows
    return towers + (63_000_000 if mode == "stream" else 4 * chunk_rows * rows)


# Communication: bytes received per GPU and step for N global rows (7.1 of the design)


def gathered_bytes(
    rows: int, student: int, teacher: int = 0, *, item: int = 2, gradient_item: int = 4
) -> int:
    """All-gather of student and teacher columns plus reduce-scatter of the student gradient."""
    return rows * (item * (student + teacher) + gradient_item * student)


# Roofline


@dataclass(frozen=True)
class Device:
    """Rates of one GPU, in operations or bytes a second."""

    name: str
    matmul: float
    memory: float
    l2: float
    special: float
    fp32: float


# Matrix and memory rates are measured ones; L2 is an assumption (5.5 to 6.6 TB/s), the last two
# follow from 132 multiprocessors at 1.7 GHz.
H200 = Device("H200", matmul=790e12, memory=4.3e12, l2=6.0e12, special=3.6e12, fp32=2.9e13)


@dataclass(frozen=True)
class Epilogue:
    """Least work on one element: special functions, other fp32 instructions, workspace bytes."""

    special: float
    fp32: float
    workspace_bytes: float


# exp2 and rsqrt of one sweep over the elements; additions and products that no formulation avoids.
# Workspace traffic: fp16 S and T written and read once, bf16 dS written once and read twice; plain
# InfoNCE keeps e^logit only.
EPILOGUES = {
    "info_nce": Epilogue(special=1, fp32=2, workspace_bytes=6),
    "margin": Epilogue(special=2, fp32=4, workspace_bytes=14),
    "alignment_kl": Epilogue(special=2, fp32=4, workspace_bytes=14),
    "list_net": Epilogue(special=2, fp32=4, workspace_bytes=14),
    "triple": Epilogue(special=5, fp32=10, workspace_bytes=14),
    "global_to_local": Epilogue(special=1, fp32=2, workspace_bytes=6),
}


@dataclass(frozen=True)
class Roofline:
    """Seconds each unit is busy; a kernel that overlaps everything takes `bound`."""

    matmul: float
    memory: float
    l2: float
    special: float
    fp32: float

    @property
    def bound(self) -> float:
        """The longest term that rests on a measured or published rate (L2 left out)."""
        return max(self.matmul, self.memory, self.special, self.fp32)

    @property
    def with_l2(self) -> float:
        """The longest term, the assumed L2 rate included."""
        return max(self.bound, self.l2)

    @property
    def without_overlap(self) -> float:
        """All terms one after the other."""
        return self.matmul + self.memory + self.special + self.fp32


def roofline(
    problem: str,
    rows: int,
    cols: int,
    group: Group,
    mode: str,
    *,
    tokens: int = 1,
    chunk_rows: int = 1024,
    tile: tuple[int, int] = (128, 256),
    device: Device = H200,
) -> Roofline:
    """Prediction for forward and backward of one kernel of `EPILOGUES`.

    `cols` counts sentences where `tokens` > 1. "stream" evaluates the elements twice and keeps no
    workspace; its gradient of the columns is accumulated once per block of rows.
    """
    width = max(width for width, _ in group.students)
    cells = rows * cols * tokens
    if problem == "global_to_local":
        operations = rows * cols * global_to_local(width, tokens, mode)
    else:
        operations = rows * cols * group.total(mode)
    cost = EPILOGUES[problem]
    passes = 2 if mode == "stream" else 1
    traffic = float(tower_bytes(max(rows, cols), width))
    if mode == "workspace":
        # the fp32 gradient of the columns is read and written once per chunk of rows
        traffic += cells * (cost.workspace_bytes + 8 * width / chunk_rows)
    tile_rows, tile_cols = tile
    operand_bytes = operations * (tile_rows + tile_cols) / (tile_rows * tile_cols)
    return Roofline(
        matmul=operations / device.matmul,
        memory=traffic / device.memory,
        l2=operand_bytes / device.l2,
        special=passes * cells * cost.special / device.special,
        fp32=passes * cells * cost.fp32 / device.fp32,
    )
