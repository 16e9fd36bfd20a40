"""What a fused call computes, as plain numbers: terms, exponents, sizes. Needs no Triton.

Custom operators take lists of numbers, so a call travels as two named tuples: `Scalars` (values)
and `Layout` (which terms, which matrix each of them reads).
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from dalr_kernels.terms import AlignmentKL, InfoNCE, ListMLE, ListNet, Term

if TYPE_CHECKING:
    from dalr_kernels.similarity import Similarity

LOG2E = math.log2(math.e)
# Shifts of a student similarity: none, the whole margin, the margin softened by labels.
PLAIN, HARD, SOFT = 0, 1, 2
# Largest angle for which the polynomials of the kernels are exact in float32.
POLYNOMIAL_ANGLE = 0.5
# A fixed exponent offset must leave this many bits of the 252 between 2^-126 and 2^126 to spare.
GUARD_BITS = 8
# Head room for sums of up to 2^22 columns, so that another N does not recompile a kernel.
COLUMN_BITS = 22
# Rows and columns are padded to this many elements: 32 bytes in the narrowest type.
PAD = 16
# Below this many rows per chunk the sums over columns move more bytes than the chunk saves.
MIN_WORKSPACE_ROWS = 512
# Types that cosines can be rounded to before they are mixed; others change nothing here.
ROUNDING_CODES: dict[torch.dtype | None, int] = {torch.float16: 1, torch.bfloat16: 2}
LOGGER = logging.getLogger("dalr_kernels")


class Scalars(NamedTuple):
    """Values of the terms; those of absent terms are 1 (temperatures) or 0 (weights)."""

    margin: float = 0.0
    threshold: float = 0.0
    nce_weight: float = 0.0
    nce_temperature: float = 1.0
    kl_weight: float = 0.0
    kl_temperature: float = 1.0
    kl_teacher_temperature: float = 1.0
    list_net_weight: float = 0.0
    list_net_temperature: float = 1.0
    list_net_teacher_temperature: float = 1.0


class Layout(NamedTuple):
    """Which terms there are, their shift, and the index of each matrix they read (-1: none)."""

    nce: int = 0
    kl: int = 0
    list_net: int = 0
    nce_shift: int = PLAIN
    kl_shift: int = PLAIN
    list_net_shift: int = PLAIN
    clamp: int = 0
    kl_matrix: int = -1
    list_net_matrix: int = -1
    label_matrix: int = -1
    mask_matrix: int = -1


class Matrices(NamedTuple):
    """Constant similarities flattened: factors of all of them, and which belongs to which."""

    tensors: list[Tensor]
    weights: list[float]
    owners: list[int]
    rounded: list[int]


class Limits(NamedTuple):
    """How much temporary memory a call may take, and in which mode."""

    workspace_bytes: int
    chunk: int | None
    mode: str


class Exponents(NamedTuple):
    """Factors to base-2 logits and fixed offsets of the five softmaxes of a call."""

    nce: tuple[float, float]
    kl: tuple[float, float]
    kl_teacher: tuple[float, float]
    list_net: tuple[float, float]
    list_net_teacher: tuple[float, float]
    online: bool


class Sizes(NamedTuple):
    """Mode and block of a call: `rows` x `cols` elements of every matrix exist at a time."""

    mode: str
    rows: int
    cols: int


def groups(terms: Sequence[Term]) -> list[list[int]]:
    """Indices of the terms that one call can share; ListMLE and other margins get their own."""
    found: dict[tuple[bool, float], list[int]] = {}
    margins = [t.margin for t in terms if not isinstance(t, ListMLE) and t.margin > 0.0]
    common = margins[0] if margins else 0.0
    for index, term in enumerate(terms):
        sorts = isinstance(term, ListMLE)
        margin = common if term.margin == 0.0 or sorts else term.margin
        found.setdefault((sorts, margin), []).append(index)
    return list(found.values())


def describe(terms: Sequence[Term]) -> tuple[Scalars, Layout, list[Similarity]]:
    """The numbers of terms that share a call, and the distinct matrices they read."""
    scalars, layout = Scalars(), Layout()
    matrices: list[Similarity] = []
    for term in terms:
        if term.margin > 0.0:
            scalars = scalars._replace(margin=term.margin)
        if isinstance(term, InfoNCE):
            scalars, layout = _add_info_nce(term, scalars, layout, matrices)
        elif isinstance(term, AlignmentKL):
            scalars = scalars._replace(
                kl_weight=term.weight,
                kl_temperature=term.temperature * term.student_temperature,
                kl_teacher_temperature=term.teacher_temperature,
            )
            matrix = _index(term.teacher, matrices)
            layout = layout._replace(kl=1, kl_shift=_shift(term), kl_matrix=matrix)
        elif isinstance(term, ListNet):
            scalars = scalars._replace(
                list_net_weight=term.weight,
                list_net_temperature=term.temperature,
                list_net_teacher_temperature=term.teacher_temperature,
            )
            matrix = _index(term.teacher, matrices)
            layout = layout._replace(
                list_net=1, list_net_shift=_shift(term), list_net_matrix=matrix
            )
    return scalars, layout, matrices


def _add_info_nce(
    term: InfoNCE, scalars: Scalars, layout: Layout, matrices: list[Similarity]
) -> tuple[Scalars, Layout]:
    scalars = scalars._replace(nce_weight=term.weight, nce_temperature=term.temperature)
    layout = layout._replace(nce=1, nce_shift=_shift(term), clamp=int(term.clamp_soft_labels))
    if layout.nce_shift == SOFT:
        layout = layout._replace(label_matrix=_index(term.soft_labels, matrices))
    if term.mask_above is not None:
        layout = layout._replace(mask_matrix=_index(term.mask_above[0], matrices))
        scalars = scalars._replace(threshold=term.mask_above[1])
    return scalars, layout


def _shift(term: Term) -> int:
    """PLAIN, HARD or SOFT."""
    shift = term.shift()
    if shift.margin == 0.0:
        return PLAIN
    return HARD if shift.labels is None else SOFT


def _index(similarity: Similarity | None, matrices: list[Similarity]) -> int:
    """Position of a similarity among the known ones; a new one is appended."""
    assert similarity is not None
    for index, known in enumerate(matrices):
        if known is similarity:
            return index
    matrices.append(similarity)
    return len(matrices) - 1


def flatten(similarities: Sequence[Similarity]) -> Matrices:
    """All factors in one list each."""
    found = Matrices([], [], [], [])
    for owner, similarity in enumerate(similarities):
        for weight, rows, cols in similarity.factors:
            found.tensors.extend((rows.detach(), cols.detach()))
            found.weights.append(float(weight))
            found.owners.append(owner)
        found.rounded.append(ROUNDING_CODES.get(similarity.dtype, 0))
    return found


def pack(
    scalars: Scalars, layout: Layout, matrices: Matrices
) -> tuple[list[Tensor], list[float], list[int]]:
    """Tensors, numbers and codes of a call, for an operator; no list of numbers is ever empty."""
    numbers = [*scalars, *matrices.weights]
    return matrices.tensors, numbers, [*layout, *matrices.owners, *matrices.rounded]


def unpack(
    factors: list[Tensor], numbers: Sequence[float], codes: Sequence[int]
) -> tuple[Scalars, Layout, Matrices]:
    """The inverse of `pack`."""
    first, middle = len(Scalars._fields), len(Layout._fields)
    last = middle + len(factors) // 2
    matrices = Matrices(
        factors, list(numbers[first:]), list(codes[middle:last]), list(codes[last:])
    )
    return Scalars(*numbers[:first]), Layout(*codes[:middle]), matrices


def exponents(scalars: Scalars, layout: Layout, matrices: Matrices) -> Exponents:
    """Offsets for which no sum of exponentials can overflow and no row's best term vanish.

    Student logits lie in +-1 / temperature, teacher logits in +-(sum of absolute weights) /
    temperature. While their span fits below 1, the offset is the largest possible logit: exponents
    of the terms that matter are small and exact. A wider span is centered, so that the largest
    possible term is 2^(126 - COLUMN_BITS). One that fits neither makes every exponential of the
    call run with an online maximum.
    """
    online = False

    def pair(present: int, temperature: float, bound: float) -> tuple[float, float]:
        nonlocal online
        factor = LOG2E / temperature
        reach = bound * factor
        online |= bool(present) and 2.0 * reach > 252 - COLUMN_BITS - GUARD_BITS
        plain = 2.0 * reach <= 126 - GUARD_BITS
        return factor, reach if plain else reach - (126 - COLUMN_BITS)

    def bound(matrix: int) -> float:
        weights = zip(matrices.weights, matrices.owners, strict=True)
        return sum(abs(weight) for weight, owner in weights if owner == matrix)

    s, has = scalars, layout
    return Exponents(
        pair(has.nce, s.nce_temperature, 1.0),
        pair(has.kl, s.kl_temperature, 1.0),
        pair(has.kl, s.kl_teacher_temperature, bound(has.kl_matrix)),
        pair(has.list_net, s.list_net_temperature, 1.0),
        pair(has.list_net, s.list_net_teacher_temperature, bound(has.list_net_matrix)),
        online,
    )


def polynomial(scalars: Scalars, layout: Layout, matrices: Matrices) -> bool:
    """Whether every softened margin stays where the kernels' polynomials are exact."""
    if layout.nce_shift != SOFT:
        return True
    weights = zip(matrices.weights, matrices.owners, strict=True)
    largest = sum(abs(weight) for weight, owner in weights if owner == layout.label_matrix)
    return scalars.margin * (1.0 if layout.clamp else 1.0 + largest) <= POLYNOMIAL_ANGLE


def gradient_scale(scalars: Scalars, itemsize: int) -> float:
    """Power of two by which stored derivatives are multiplied; float32 needs none.

    Derivatives are stored in float16, whose 11 bits are three more than those of bfloat16. Their
    bound away from |cos| = 1 is mapped to 2^11 .. 2^12: room for 16 times more (the derivative of
    the margin itself), while 2^-26 times the bound is still a normal number. Larger ones saturate.
    """
    if itemsize == 4:
        return 1.0
    bound = (
        abs(scalars.nce_weight) / scalars.nce_temperature
        + abs(scalars.kl_weight) / scalars.kl_temperature
        + abs(scalars.list_net_weight) / scalars.list_net_temperature
    )
    return 1.0 if bound == 0.0 else 2.0 ** (12 - math.ceil(math.log2(bound)))


def padded(length: int) -> int:
    """Length rounded up to whole vectors of the widest load."""
    return -(-length // PAD) * PAD


def full_wave(width: int) -> int:
    """Rows for which a gradient product of this width fills 132 processors with 128 x 256 tiles."""
    return max(1, 132 // -(-width // 256)) * 128


def sizes(
    num_rows: int, num_cols: int, width: int, num_matrices: int, itemsize: int, limits: Limits
) -> Sizes:
    """Mode and block for a memory limit; see `row_losses` for the meaning of the options."""
    wave = full_wave(width)
    cols = padded(num_cols)
    row_bytes = cols * itemsize * (1 + num_matrices)
    fit = limits.workspace_bytes // row_bytes
    mode = limits.mode
    if mode == "auto":
        mode = "workspace" if fit >= min(num_rows, MIN_WORKSPACE_ROWS) else "stream"
    if mode == "workspace":
        rows = limits.chunk or max(1, min(fit, wave))
        return Sizes(mode, even(num_rows, rows), cols)
    side = math.isqrt(limits.workspace_bytes // (itemsize * (1 + num_matrices)))
    side = limits.chunk or max(PAD, min(side, wave))
    return Sizes(mode, even(num_rows, side), min(cols, padded(side)))


def even(total: int, step: int) -> int:
    """Largest equal share below `step`, in whole tiles of 128 where there are several."""
    if total <= step:
        return total
    share = -(-total // -(-total // step))
    whole = -(-share // 128) * 128
    return whole if whole <= step else share


@functools.cache
def log_choice(sizes_: Sizes, num_rows: int, num_cols: int, width: int, dtype: torch.dtype) -> None:
    """Log once per process and shape which mode and block were chosen."""
    LOGGER.info(
        "row losses %d x %d, width %d, %s: mode %s, R = %d, C = %d",
        num_rows, num_cols, width, dtype, sizes_.mode, sizes_.rows, sizes_.cols,
    )  # fmt: skip
