"""Groups of kernel arguments: Triton takes a named tuple as one parameter.

A tuple travels from the host through a kernel to its device functions, which read its members by
name. Inside kernels the members are pointers, scalars or blocks instead of tensors and floats.

Two rules of Triton (3.6 to 3.9) decide what is grouped:

- `do_not_specialize` does not reach the members of a tuple. Counts that change between launches
  therefore stay parameters of their own: inside a tuple, each of their multiples of 16 and each 1
  would compile another kernel.
- Members of a parameter annotated `tl.constexpr` cannot be read by name in 3.6. `Flags` and
  `TileShape` therefore hold `tl.constexpr` members and their parameters have no annotation; they
  are written in capitals like other compile-time parameters.

The order of parameters is part of the tuning: it alone decides between 0 and 40 bytes of stack for
some kernels on sm_90 (see compile_report.py after a change).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

if TYPE_CHECKING:
    import triton.language as tl
    from torch import Tensor

T = TypeVar("T")


class PerSoftmax(NamedTuple, Generic[T]):
    """One value for each softmax of a row: student logits per term, and two teachers."""

    nce: T
    kl: T
    kl_teacher: T
    list_net: T
    list_net_teacher: T


class PerTerm(NamedTuple):
    """One number for each term."""

    nce: float
    kl: float
    list_net: float


class Expectations(NamedTuple, Generic[T]):
    """Similarities summed with the weights of a teacher's softmax, not yet divided by its sum."""

    kl_student: T
    kl_teacher: T
    list_net_student: T


class Sums(NamedTuple, Generic[T]):
    """Everything that the first sweep over a row collects.

    Attributes:
        total: Sums of ``2^(logit - running_max)``.
        running_max: Largest base-2 logit so far, or a fixed offset.
        expected: Weighted sums of similarities.
    """

    total: PerSoftmax[T]
    running_max: PerSoftmax[T]
    expected: Expectations[T]


class Margin(NamedTuple):
    """The angular margin in radians, its cosine and its sine."""

    angle: float
    cosine: float
    sine: float


class Constants(NamedTuple):
    """Blocks of the constant matrices that the terms read; any block where a term is absent."""

    kl_teacher: Tensor
    list_net_teacher: Tensor
    labels: Tensor
    scores: Tensor


class Student(NamedTuple):
    """Unit vectors of rows and columns, ``[R, D']`` and ``[N', D']``."""

    rows: Tensor
    cols: Tensor


class Strides(NamedTuple):
    """Padded width of the unit vectors, and elements from one row or column to the next."""

    width: int
    row: int
    col: int


class Ids(NamedTuple):
    """Image ids of rows and columns, int64; any tensors where there are none."""

    rows: Tensor
    cols: Tensor


class Flags(NamedTuple):
    """Compile-time choices that follow from the terms of a call.

    Attributes:
        nce: Whether InfoNCE is computed.
        kl: Whether the alignment KL is computed.
        list_net: Whether ListNet is computed.
        nce_shift: Margin of InfoNCE: PLAIN, HARD or SOFT (by labels).
        kl_shift: Margin of the alignment KL: PLAIN or HARD.
        list_net_shift: Margin of ListNet: PLAIN or HARD.
        clamp: Clamp soft labels to [0, 1].
        polynomial: Polynomials in place of cosine and sine of softened margins.
        ids: Leave out negatives of the same image.
        mask: Leave out negatives whose score exceeds the threshold.
        one_teacher: KL and ListNet read the same matrix.
        teacher_labels: The soft labels are the KL teacher's matrix.
        online: Running maxima in place of fixed offsets.
    """

    nce: tl.constexpr
    kl: tl.constexpr
    list_net: tl.constexpr
    nce_shift: tl.constexpr
    kl_shift: tl.constexpr
    list_net_shift: tl.constexpr
    clamp: tl.constexpr
    polynomial: tl.constexpr
    ids: tl.constexpr
    mask: tl.constexpr
    one_teacher: tl.constexpr
    teacher_labels: tl.constexpr
    online: tl.constexpr


class TileShape(NamedTuple):
    """Compile-time shape of a student tile.

    Attributes:
        BM: Rows.
        BN: Columns.
        BK: Elements of the vectors multiplied at a time.
        SLICES: Column slices in which the tile is processed further: 1, 2 or 4.
        EVEN: Whether BK divides the padded width.
    """

    BM: tl.constexpr
    BN: tl.constexpr
    BK: tl.constexpr
    SLICES: tl.constexpr
    EVEN: tl.constexpr
