"""Wrong arguments are refused with the offending value in the message."""

from __future__ import annotations

from typing import Any

import dalr_kernels as K
import pytest
import torch

ROWS, COLS = torch.randn(3, 4), torch.randn(5, 4)
TOKENS, MASK = torch.randn(5, 2, 4), torch.ones(5, 2)
TEACHER = K.Similarity(((1.0, COLS[:3], COLS),))
TEMPERATURE = {"temperature": 0.05}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": torch.randn(3, 6)}, r"\(3, 6\) and \(5, 4\)"),
        ({"rows": torch.randn(0, 4)}, r"rows .* not empty; got \(0, 4\)"),
        ({"cols": torch.randn(5)}, r"cols must be \[rows, width\].* got \(5,\)"),
        ({"rows": torch.ones(3, 4, dtype=torch.int64)}, "rows must be floating point.*int64"),
        ({"cols": torch.randn(5, 4, device="meta")}, "cols is on meta, rows on cpu"),
        ({"temperature": 0.0}, "temperature must be positive and finite, got 0.0"),
        ({"temperature": -1.0}, "got -1.0"),
        ({"temperature": float("nan")}, "got nan"),
        ({"temperature": torch.tensor(0.05)}, "temperature must be a plain number"),
        ({"temperature": 1e-31}, "temperature = 1e-31 overflows float32: .* at least 1e-30"),
        ({"mode": "tile"}, "mode='tile' does not exist; choose one of auto, workspace, stream"),
        ({"rows": torch.full((3, 4), float("nan"))}, "rows must be .* 3 of 3 rows hold NaN"),
        ({"cols": COLS / 0.0}, "cols must be finite.* first is row 0"),
        ({"impl": "triton"}, "impl='triton' needs CUDA tensors, rows are on cpu"),
        ({"impl": "triton", "rows": ROWS.double()}, "computes in float32, rows are torch.float64"),
        ({"margin": -0.1}, "margin must be an angle .* got -0.1"),
        ({"margin": 10.0}, "got 10.0"),
        ({"col_offset": 3}, "col_offset=3 .* 0 .. 2"),
        ({"col_offset": -1}, "col_offset=-1"),
        ({"impl": "cuda"}, "'cuda' does not exist; choose one of auto, triton, torch, reference"),
        ({"chunk_rows": 0}, "chunk_rows must be at least 1, got 0"),
        ({"workspace_bytes": -5}, "workspace_bytes must be at least 1, got -5"),
        ({"soft_labels": K.Similarity(((1.0, COLS, COLS),))}, "soft_labels is 5 x 5, .* 3 x 5"),
        ({"mask_above": (K.Similarity(((1.0, ROWS, ROWS),)), 0.5)}, "mask_above is 3 x 3"),
        ({"row_ids": torch.arange(3)}, "go together"),
        (
            {"row_ids": torch.arange(5), "col_ids": torch.arange(5)},
            r"row_ids .* \(3,\), got \(5,\)",
        ),
        ({"row_ids": torch.rand(3), "col_ids": torch.arange(5)}, "row_ids must be integers"),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(value),
)
def test_info_nce(change: dict[str, Any], message: str) -> None:
    arguments = {"rows": ROWS, "cols": COLS, **TEMPERATURE}
    K.info_nce(**arguments)
    with pytest.raises(ValueError, match=message):
        K.info_nce(**(arguments | change))


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        (K.alignment_kl, {"student_temperature": 0}, "student_temperature must be positive"),
        (K.alignment_kl, {"teacher_temperature": -0.5}, "teacher_temperature .* got -0.5"),
        (K.list_net, {**TEMPERATURE, "teacher_temperature": 0.0}, "teacher_temperature"),
        (K.alignment_kl, {"temperature": 1e-16, "student_temperature": 1e-16}, "overflows float32"),
        (K.list_mle, {**TEMPERATURE, "impl": "triton"}, "choose one of auto, torch, reference"),
        (K.list_mle, {**TEMPERATURE, "reduction": "max"}, "'mean' or 'sum', got 'max'"),
        (K.list_mle, {**TEMPERATURE, "eps": -1e-7}, "eps must not be negative, got -1e-07"),
        (K.list_mle, {**TEMPERATURE, "impl": "cuda"}, "impl='cuda' does not exist"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_teacher_losses(function: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        function(ROWS, COLS, TEACHER, **arguments)


@pytest.mark.parametrize("function", [K.alignment_kl, K.list_net, K.list_mle])
def test_teacher_of_another_shape(function: Any) -> None:
    arguments = {"temperature": 0.05}
    if function is K.list_net:
        arguments["teacher_temperature"] = 0.05
    with pytest.raises(ValueError, match="teacher is 5 x 3, the loss is 3 x 5"):
        function(ROWS, COLS, K.Similarity(((1.0, COLS, ROWS),)), **arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"own_tokens": torch.randn(2, 2, 4), "own_mask": MASK[:2]}, "2 sentences for 3 rows"),
        ({"tokens": torch.randn(5, 2, 6)}, r"tokens must be \[n, T, 4\].* got \(5, 2, 6\)"),
        ({"mask": MASK[:4]}, r"mask of tokens must be \(5, 2\), got \(4, 2\)"),
        ({"tokens": torch.ones(5, 2, 4, dtype=torch.int8)}, "tokens must be floating point"),
        ({"norm": "row"}, "'token' or 'axis', got 'row'"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"col_offset": 4}, "col_offset=4"),
        ({"impl": "triton"}, "impl='triton'"),
        ({"row_ids": torch.arange(3), "col_ids": torch.arange(4)}, r"col_ids .* \(5,\)"),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(value),
)
def test_global_to_local(change: dict[str, Any], message: str) -> None:
    arguments = {
        "rows": ROWS, "own_tokens": TOKENS[:3], "own_mask": MASK[:3], "tokens": TOKENS,
        "mask": MASK, **TEMPERATURE,
    }  # fmt: skip
    K.global_to_local(**arguments)
    with pytest.raises(ValueError, match=message):
        K.global_to_local(**(arguments | change))


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        ((), "at least one"),
        (((1.0, torch.randn(3, 4), torch.randn(5, 6)),), r"one width, got \(3, 4\) and \(5, 6\)"),
        (((1.0, torch.randn(3), torch.randn(3)),), r"got \(3,\)"),
        (((1.0, torch.ones(3, 4, dtype=torch.int64), COLS),), "floating-point tensors"),
        (((1.0, ROWS, COLS), (1.0, COLS, COLS)), "factor 1 is 5 x 5, factor 0 is 3 x 5"),
        (((1.0, ROWS, COLS.to("meta")),), "move them together"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_similarity(factors: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        K.Similarity(factors)


def test_consistency() -> None:
    with pytest.raises(ValueError, match=r"image_BD is \(5, 4\), text_BD \(3, 4\)"):
        K.consistency(ROWS, COLS, ROWS)
    with pytest.raises(ValueError, match=r"keep_B must be \(3,\), got \(5,\)"):
        K.consistency(ROWS, ROWS, ROWS, torch.ones(5))


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ({}, "at least one term"),
        ({"alignment_kl": K.AlignmentKL()}, "needs a teacher"),
        ({"list_net": K.ListNet(0.05, 0.05, teacher=K.Similarity(((1.0, COLS, COLS),)))}, "5 x 5"),
        ({"info_nce": K.InfoNCE(0.05, weight=float("nan"))}, "weight must be a finite number"),
        ({"info_nce": K.InfoNCE(0.0)}, "temperature must be positive"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_row_losses(terms: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        K.row_losses(ROWS, COLS, **terms)


def test_nan_goes_through_where_nobody_checks() -> None:
    rows = ROWS.clone()
    rows[1, 2] = float("nan")
    assert torch.isnan(K.info_nce(rows, COLS, temperature=0.05, check_finite=False))
