"""The registry: added terms, their weights, row chunks and what the log says."""

from __future__ import annotations

import ast
import dataclasses
import logging
from collections.abc import Iterator
from pathlib import Path

import dalr_kernels as kernels
import pytest
import torch
from dalr_kernels.eager.chunked import LIVE_MATRICES
from objective_tools import ROWS, objective, views
from torch import Tensor

import dalr_scale.objective
from dalr_scale.config import ObjectiveConfig, build_config, parse_overrides
from dalr_scale.config.text import help_text, to_toml
from dalr_scale.errors import UserError
from dalr_scale.objective import row_chunks
from dalr_scale.objective.registry import TERMS, active_terms, needs_of
from dalr_scale.objective.row_chunks import cosines
from dalr_scale.objective.term import FusedTerm, Needs, RowTerm, Term
from dalr_scale.objective.total import batch_loss
from dalr_scale.objective.views import KernelOptions, LossBatch


class Spread(RowTerm):
    """The mean squared cosine with all columns."""

    name = "spread"
    title = "spread"

    def rows_loss(self, objective: ObjectiveConfig, batch: LossBatch) -> Tensor:
        return cosines(batch.rows.z1, batch.cols.z2).square().mean(dim=1)

    def needs(self, objective: ObjectiveConfig) -> Needs:
        return Needs(image=True)


class Sharper(FusedTerm):
    """L_con once more, at another temperature."""

    name = "sharper"
    title = "sharper"

    def kernel_term(self, objective: ObjectiveConfig, batch: LossBatch) -> kernels.InfoNCE:
        return kernels.InfoNCE(0.01)


class Flat(Spread):
    """Not one loss per row."""

    name = "flat"

    def rows_loss(self, objective: ObjectiveConfig, batch: LossBatch) -> Tensor:
        return super().rows_loss(objective, batch).mean()


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    """Some terms beyond DALR's, for the time of a test."""
    before = list(TERMS)
    TERMS.extend([Spread(), Sharper(), Flat()])
    row_chunks._log_once.cache_clear()
    yield
    TERMS[:] = before


def test_an_added_term_has_its_weight_from_the_configuration() -> None:
    words = ("--objective.preset=simcse", "--objective.terms.spread=0.5")
    config = build_config([parse_overrides(words)])
    assert config.objective.terms == {"spread": 0.5}
    assert "terms = {spread = 0.5}" in to_toml(config)
    assert [t.name for t in active_terms(config.objective)] == ["con", "spread"]
    assert needs_of(config.objective).image and not needs_of(objective("simcse")).image
    for terms in ({}, {"spread": 0.0}):
        assert [t.name for t in active_terms(objective("simcse", terms=terms))] == ["con"]


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ({"spred": 1.0}, "unknown term 'spred' in objective.terms; did you mean 'spread'"),
        ({"ima": 1.0}, "the weight of L_IMA is objective.intra_weight and objective.intra_kl_w"),
        ({"con": 1.0}, "the weight of L_con is always 1"),
        ({"spread": -1.0}, r"objective.terms.spread = -1.0 is out of range: it must be at least 0"),
        ({"spread": "x"}, "objective.terms.spread = 'x' must be of type float"),
    ],
)
def test_a_weight_that_cannot_be_meant_is_refused(terms: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        needs_of(objective(terms=terms))


def test_without_added_terms_the_message_says_where_they_are_registered() -> None:
    TERMS[:] = [term for term in TERMS if term.weight_keys is not None]
    with pytest.raises(UserError, match=r"no term without a key of its own is in .*registry\.py"):
        needs_of(objective(terms={"spread": 1.0}))


def test_an_added_term_is_weighted_into_the_total() -> None:
    v = views()
    plain = batch_loss(objective("simcse"), LossBatch(v, v))
    both = batch_loss(objective("simcse", terms={"spread": 0.5}), LossBatch(v, v))
    assert set(both.terms) == {"con", "spread"}
    torch.testing.assert_close(both.total, plain.total + 0.5 * both.terms["spread"])


def test_two_terms_of_one_fused_form_run_in_two_passes() -> None:
    v = views()
    v.z1.requires_grad_()
    spec = objective("simcse", terms={"sharper": 0.5})
    found = batch_loss(spec, LossBatch(v, v))
    apart = [kernels.info_nce(v.z1, v.z2, temperature=t) for t in (0.05, 0.01)]
    assert torch.equal(found.terms["sharper"], apart[1].detach())
    expected = apart[0] + 0.5 * apart[1]
    for got, want in zip(
        torch.autograd.grad(found.total, v.z1), torch.autograd.grad(expected, v.z1), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-15)


def saved_matrices(options: KernelOptions) -> int:
    """Tensors as wide as the batch that the term keeps for the backward pass."""
    v, found = views(), []
    v.z1.requires_grad_()

    def keep(tensor: Tensor) -> Tensor:
        found.append(tensor.shape[-1:] == (ROWS,) and tensor.ndim == 2)
        return tensor

    batch = LossBatch(v, v, options=options)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        row_chunks.mean_over_row_chunks(Spread(), objective("simcse"), batch)
    return sum(found)


def test_row_chunks_keep_no_rows_by_columns() -> None:
    assert saved_matrices({"impl": "torch", "chunk_rows": 3}) == 0
    assert saved_matrices({"impl": "reference"}) > 0  # control: all at once, it does


def test_a_chunk_fits_the_workspace() -> None:
    v, seen = views(), []

    class Counting(Spread):
        def rows_loss(self, objective: ObjectiveConfig, batch: LossBatch) -> Tensor:
            seen.append((batch.offset, len(batch.rows.z1), len(batch.rows.tokens[0])))
            return super().rows_loss(objective, batch)

    batch = LossBatch(v, v, options={"workspace_bytes": LIVE_MATRICES * ROWS * 8 * 4})
    row_chunks.mean_over_row_chunks(Counting(), objective("simcse"), batch)
    assert seen == [(0, 4, 4), (4, 4, 4), (8, 2, 2)]


def test_the_log_says_once_that_a_term_has_no_fused_form(
    caplog: pytest.LogCaptureFixture,
) -> None:
    v = views()
    spec = objective("simcse", terms={"spread": 0.5, "sharper": 0.5})
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            batch_loss(spec, LossBatch(v, v))
    assert caplog.messages == [
        "term spread has no fused form: it runs in row chunks of plain PyTorch"
    ]


def test_what_is_no_term_is_refused() -> None:
    v = views()
    with pytest.raises(ValueError, match="of term 'flat' must give one loss per row, "):
        batch_loss(objective("simcse", terms={"flat": 1.0}), LossBatch(v, v))

    class Bare(Term):
        name = title = "bare"

    TERMS.append(Bare())
    with pytest.raises(TypeError, match="Bare must be a FusedTerm, RowTerm or BatchTerm"):
        batch_loss(objective("simcse", terms={"bare": 1.0}), LossBatch(v, v))


def test_names_are_unique_and_every_key_of_the_objective_has_a_reader() -> None:
    names = [term.name for term in TERMS]
    assert len(set(names)) == len(names)
    spec = ObjectiveConfig()
    read = {key for term in TERMS for key in (*term.settings(spec), *(term.weight_keys or ()))}
    keys = {f.name for f in dataclasses.fields(spec)}
    assert keys - read == {"preset", "terms", "alternation", "tail"}  # of the section as a whole
    assert read <= keys


def test_help_prints_each_group_once_above_its_keys() -> None:
    headings = [line for line in help_text().splitlines() if line.startswith("  # ")]
    assert len(set(headings)) == len(headings) > 10
    lines = help_text().splitlines()
    at = lines.index("  # Intra-modal group, L_rank: ranking distillation.")
    assert lines[at + 1] == "  --objective.rank_weight=1.0"


def test_the_objective_makes_no_collective_call() -> None:
    for path in Path(dalr_scale.objective.__path__[0]).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [n for n in names if "distributed" in n], path.name
