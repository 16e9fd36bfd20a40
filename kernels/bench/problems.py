"""The benchmarked problems: inputs, what is differentiated, and the exact float64 answer.

Inputs are 16-bit vectors that are *not* normalized, as an encoder leaves them: normalizing and
casting is inside the time of every implementation. The positive of row i is column i + offset.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import dalr_kernels as kernels
import torch
from dalr_kernels import Similarity
from torch import Tensor

from bench import counts
from dalr_scale.config import ObjectiveConfig, build_config
from dalr_scale.objective.cons import unmatched_rows
from dalr_scale.objective.total import batch_loss
from dalr_scale.objective.views import KernelOptions, LossBatch, Views

if TYPE_CHECKING:
    from bench.counts import Group

TEMPERATURE = 0.05
MARGIN = 0.18
KL_STUDENT, KL_TEACHER = 0.45, 0.5
RANK_TEACHER = 0.05
# weights of InfoNCE, KL and ListNet in the triple, as the `dalr` preset has them
WEIGHTS = (1.0, 0.2, 0.2)
# the upstream gradient: never 1, which some implementations treat apart
UPSTREAM = 0.37

ROW_LOSSES = ("info_nce", "margin", "alignment_kl", "list_net", "list_mle", "triple")
OBJECTIVES = ("dalr", "dalr-reference", "dalr-full", "dalr-reference-full")
PROBLEMS = (*ROW_LOSSES, "global_to_local", *OBJECTIVES)
TITLES = {
    "info_nce": "plain InfoNCE",
    "margin": "InfoNCE with soft margin (a)",
    "alignment_kl": "alignment KL (b)",
    "list_net": "ListNet (c)",
    "list_mle": "ListMLE",
    "triple": "(a) + (b) + (c) on one S and one T",
    "global_to_local": "global-to-local",
    "dalr": "objective `dalr`, all pair terms, without L_g2l",
    "dalr-reference": "objective `dalr-reference`, all pair terms, without L_g2l",
    "dalr-full": "objective `dalr`, all eight terms",
    "dalr-reference-full": "objective `dalr-reference`, all eight terms",
}


@dataclass(frozen=True)
class Shape:
    """R local rows, N columns, width d; T tokens a sentence where the problem has any."""

    rows: int
    cols: int
    width: int
    tokens: int = 32

    @property
    def offset(self) -> int:
        """Where a rank in the middle of the batch has its positives."""
        return (self.cols - self.rows) // 2


def square(size: int, width: int, tokens: int = 32) -> Shape:
    return Shape(size, size, width, tokens)


@dataclass
class Problem:
    """Inputs of one entry of the benchmark.

    Attributes:
        leaves: Differentiated inputs by name; ``rows [R, d]`` and ``cols [N, d]`` at least.
        constants: Teachers, tokens, masks and ids by name.
    """

    name: str
    shape: Shape
    data: str
    leaves: dict[str, Tensor]
    constants: dict[str, Tensor] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        return self.leaves["rows"].device

    @property
    def own(self) -> slice:
        """Columns of the local rows."""
        return slice(self.shape.offset, self.shape.offset + self.shape.rows)

    @property
    def teacher(self) -> Similarity:
        """The constant matrix T ``[R, N]``."""
        columns = self.constants["teacher"]
        return Similarity(((1.0, columns[self.own], columns),))

    def to(self, dtype: torch.dtype) -> Problem:
        """The same numbers in another floating-point type, with leaves of their own."""

        def cast(tensor: Tensor) -> Tensor:
            return tensor.detach().to(dtype) if tensor.is_floating_point() else tensor

        leaves = {k: cast(v).clone().requires_grad_() for k, v in self.leaves.items()}
        return Problem(
            self.name,
            self.shape,
            self.data,
            leaves,
            {k: cast(v) for k, v in self.constants.items()},
        )

    def gradients(self) -> list[Tensor]:
        """Gradients of the leaves that got one, in their order, in float64."""
        return [leaf.grad.double() for leaf in self.leaves.values() if leaf.grad is not None]

    def clear(self) -> None:
        for leaf in self.leaves.values():
            leaf.grad = None


# Counts


def group_of(name: str, width: int) -> list[Group]:
    """Matrices of a problem; of an objective with teachers and images of `width`."""
    if name == "info_nce":
        return [counts.row_losses(width)]
    if name in ROW_LOSSES:
        return [counts.row_losses(width, width)]
    if name == "global_to_local":
        return [counts.row_losses(width, sides=1)]
    projected = min(256, width)
    if name.startswith("dalr-reference"):
        return counts.dalr_groups(width=width, image=width, projected=projected)
    return counts.default_dalr_groups(
        width=width, image=width, projected=projected, consistency=projected
    )


def operations(name: str, shape: Shape, mode: str = "workspace") -> tuple[int, str]:
    """Useful operations of forward and backward, and the formula as printed."""
    pairs = shape.rows * shape.cols
    tokens = counts.global_to_local(shape.width, shape.tokens, mode)
    if name == "global_to_local":
        return pairs * tokens, f"{tokens} R N (4uL)"
    a_pair = counts.summed(group_of(name, shape.width), mode)
    if name.endswith("-full"):
        a_pair += tokens
    if name in OBJECTIVES:
        return pairs * a_pair, f"{a_pair} R N"
    return pairs * a_pair, f"{a_pair // shape.width}u, u = R N d"


# Inputs


def vectors(
    rows: int, width: int, data: str, generator: torch.Generator, device: torch.device
) -> Tensor:
    """``[rows, width]`` float32 directions, lengths spread by a factor of about two.

    "random" is uniform on the sphere; "clustered" has about sqrt(rows) centres with cosines of 0.8
    to 1 inside a cluster: large exponents, and cells on both sides of the margin's gate.
    """
    noise = torch.randn(rows, width, generator=generator, device=device)
    if data == "clustered":
        count = max(2, math.isqrt(rows))
        centres = torch.randn(count, width, generator=generator, device=device)
        chosen = torch.randint(count, (rows,), generator=generator, device=device)
        spread = 0.45 * torch.rand(rows, 1, generator=generator, device=device)
        noise = centres[chosen] + spread * noise
    elif data != "random":
        raise ValueError(f"data={data!r} does not exist; choose random or clustered")
    length = 0.5 + torch.rand(rows, 1, generator=generator, device=device)
    return noise * length


def make(
    name: str, shape: Shape, device: torch.device, *, data: str = "random",
    dtype: torch.dtype = torch.bfloat16, seed: int = 0,
) -> Problem:  # fmt: skip
    """Inputs of a problem, positives at a cosine of about 0.3 with their rows.

    Closer positives would have probabilities of almost 1, whose complement is only rounding in 16
    bits: no check could tell a right gradient from a wrong one.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def draw(rows: int, width: int) -> Tensor:
        return vectors(rows, width, data, generator, device).to(dtype)

    cols = draw(shape.cols, shape.width)
    problem = Problem(name, shape, data, {"cols": cols})
    near = cols[problem.own].float() + 3.0 * draw(shape.rows, shape.width).float()
    problem.leaves = {"rows": near.to(dtype), "cols": cols}
    if name in ROW_LOSSES and name != "info_nce":
        problem.constants["teacher"] = draw(shape.cols, shape.width)
    elif name == "global_to_local":
        del problem.leaves["cols"]
        problem.constants |= _tokens(shape, dtype, generator, device)
    elif name in OBJECTIVES:
        _add_objective(problem, draw, dtype, generator)
    problem.leaves = {k: v.detach().requires_grad_() for k, v in problem.leaves.items()}
    return problem


def _tokens(
    shape: Shape, dtype: torch.dtype, generator: torch.Generator, device: torch.device
) -> dict[str, Tensor]:
    sizes = shape.cols, shape.tokens, shape.width
    tokens = torch.randn(sizes, generator=generator, device=device, dtype=torch.float32)
    lengths = torch.randint(
        1, shape.tokens + 1, (shape.cols, 1), generator=generator, device=device
    )
    mask = torch.arange(shape.tokens, device=device) < lengths
    return {"tokens": tokens.to(dtype), "mask": mask}


def _add_objective(
    problem: Problem,
    draw: Callable[[int, int], Tensor],
    dtype: torch.dtype,
    generator: torch.Generator,
) -> None:
    """Everything an objective sees of a batch on one GPU: images 1.2 captions each."""
    shape, device = problem.shape, problem.device
    if shape.rows != shape.cols:
        raise ValueError(f"an objective runs on all rows, got {shape.rows} x {shape.cols}")
    size, projected = shape.cols, min(256, shape.width)
    for key in ("p1", "p2", "u", "aligned_text", "aligned_image"):
        problem.leaves[key] = draw(size, projected)
    for key in ("image", "text0", "text1"):
        problem.constants[key] = draw(size, shape.width)
    images = max(1, int(size / 1.2))
    problem.constants["ids"] = torch.randint(
        images, (size,), generator=generator, device=device
    )  # fmt: skip
    if problem.name.endswith("-full"):
        problem.constants |= _tokens(shape, dtype, generator, device)


# Losses through dalr_kernels, for every implementation it has


def objective_config(name: str) -> ObjectiveConfig:
    """The preset, its L_g2l only in the "-full" problems."""
    preset, full = name.removesuffix("-full"), name.endswith("-full")
    changes: dict[str, Any] = {} if full else {"g2l_weight": 0.0}
    return build_config([{"objective": {"preset": preset, **changes}}]).objective


def objective_loss(problem: Problem, options: KernelOptions | None = None) -> Tensor:
    """The total of the product's own objective on the problem's inputs."""
    config = objective_config(problem.name)
    views = _views(problem)
    shifted = unmatched_rows(config, problem.shape.cols, seed=0, step=1)
    assert views.aligned_image is not None
    partners = torch.as_tensor(shifted, device=views.ids.device)
    views.aligned_unmatched = views.aligned_image[partners]
    batch = LossBatch(
        views, views, text_weights=(0.33, 0.67), unmatched=shifted,
        options=options or KernelOptions(),
    )  # fmt: skip
    return batch_loss(config, batch).total


def _views(problem: Problem) -> Views:
    leaves, constants = problem.leaves, problem.constants
    tokens = "tokens" in constants
    return Views(
        z1=leaves["rows"],
        z2=leaves["cols"],
        ids=constants["ids"],
        p1=leaves["p1"],
        p2=leaves["p2"],
        u=leaves["u"],
        z1_image=leaves["rows"],
        aligned_text=leaves["aligned_text"],
        aligned_image=leaves["aligned_image"],
        image=constants["image"],
        text=(constants["text0"], constants["text1"]),
        tokens=(constants["tokens"],) if tokens else (),
        token_masks=(constants["mask"],) if tokens else (),
        z1_tokens=(leaves["rows"],) if tokens else (),
    )


def arguments(problem: Problem, name: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of ``dalr_kernels.<function>`` for one row loss of the problem."""
    pair = problem.leaves["rows"], problem.leaves["cols"]
    place = {"col_offset": problem.shape.offset}
    match name:
        case "info_nce":
            return pair, {"temperature": TEMPERATURE, **place}
        case "margin":
            soft = {"margin": MARGIN, "soft_labels": problem.teacher}
            return pair, {"temperature": TEMPERATURE, **soft, **place}
        case "alignment_kl":
            temperatures = {"student_temperature": KL_STUDENT, "teacher_temperature": KL_TEACHER}
            return (*pair, problem.teacher), {**temperatures, **place}
        case "list_net":
            temperatures = {"temperature": TEMPERATURE, "teacher_temperature": RANK_TEACHER}
            return (*pair, problem.teacher), {**temperatures, **place}
        case "list_mle":
            return (*pair, problem.teacher), {"temperature": TEMPERATURE, **place}
    raise ValueError(f"{name!r} is no single row loss")


FUNCTIONS = {"margin": "info_nce"}
TRIPLE = ("margin", "alignment_kl", "list_net")


def separate_losses(problem: Problem, **how: Any) -> Tensor:
    """The problem's loss from the public functions, one call for each loss."""
    if problem.name == "global_to_local":
        tokens, mask = problem.constants["tokens"], problem.constants["mask"]
        own = tokens[problem.own], mask[problem.own]
        place = {"temperature": TEMPERATURE, "col_offset": problem.shape.offset}
        return kernels.global_to_local(
            problem.leaves["rows"], *own, tokens, mask, **place, **how
        )  # fmt: skip
    names = TRIPLE if problem.name == "triple" else (problem.name,)
    weights = WEIGHTS if problem.name == "triple" else (1.0,)
    total: Tensor | None = None
    for name, weight in zip(names, weights, strict=True):
        positional, named = arguments(problem, name)
        value = weight * getattr(kernels, FUNCTIONS.get(name, name))(*positional, **named, **how)
        total = value if total is None else total + value
    assert total is not None
    return total
