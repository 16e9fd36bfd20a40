"""The two losses that ranks compute together, over shards of one process, against their whole."""

from __future__ import annotations

import threading
from collections.abc import Callable

import dalr_kernels as kernels
import pytest
import torch
from dalr_kernels import Similarity
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor


class Ranks:
    """Threads that stand for ranks: a merge waits for all of them."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.barrier = threading.Barrier(size, timeout=30)
        self.slots: list[Tensor] = [torch.empty(0)] * size

    def run(self, work: Callable[[int], Tensor]) -> list[Tensor]:
        results: list[Tensor] = [torch.empty(0)] * self.size
        errors: list[BaseException] = []

        def body(rank: int) -> None:
            try:
                results[rank] = work(rank)
            except BaseException as error:
                errors.append(error)
                self.barrier.abort()

        threads = [threading.Thread(target=body, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors, errors
        return results

    def merge(self, rank: int, values: Tensor, reduce: Callable[[Tensor], Tensor]) -> Tensor:
        self.slots[rank] = values
        self.barrier.wait()
        merged = reduce(torch.stack(self.slots))
        self.barrier.wait()
        return merged


def normal(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@settings(max_examples=20, deadline=None)
@given(
    ranks=st.sampled_from([1, 2, 3]),
    rows=st.integers(1, 5),
    margin=st.sampled_from([0.0, 0.18]),
    workspace=st.sampled_from([1, 10**6]),
    seed=st.integers(0, 99),
)
def test_column_kl_of_shards_is_row_kl_of_the_transpose(
    ranks: int, rows: int, margin: float, workspace: int, seed: int
) -> None:
    total = ranks * rows
    texts, images, labels = normal(seed, total, 6), normal(seed + 1, total, 6), normal(9, total, 4)
    options = {"margin": margin, "temperature": 0.05 if margin else 1.0}
    whole = texts.clone().requires_grad_()
    same = Similarity(((1.0, labels, labels),))
    truth = kernels.alignment_kl(images, whole, same, impl="reference", **options)
    truth.backward()
    world = Ranks(ranks)
    shards = [texts[r * rows :][:rows].clone().requires_grad_() for r in range(ranks)]

    def work(rank: int) -> Tensor:
        loss = kernels.column_alignment_kl(
            shards[rank],
            images,
            Similarity(((1.0, labels[rank * rows :][:rows], labels),)),
            col_offset=rank * rows,
            merge_max=lambda x: world.merge(rank, x, lambda s: s.amax(0)),
            merge_sum=lambda x: world.merge(rank, x, lambda s: s.sum(0)),
            workspace_bytes=workspace,
            **options,
        )
        loss.backward()
        return loss.detach()

    values = world.run(work)
    assert torch.stack(values).mean().item() == pytest.approx(truth.item(), rel=1e-10, abs=1e-13)
    gradient = torch.cat([shard.grad for shard in shards]) / ranks  # type: ignore[misc]
    torch.testing.assert_close(gradient, whole.grad, rtol=1e-9, atol=1e-12)


def test_control_unmerged_column_statistics_are_wrong() -> None:
    texts, images, labels = normal(1, 8, 6), normal(2, 8, 6), normal(3, 8, 4)
    truth = kernels.alignment_kl(images, texts, Similarity(((1.0, labels, labels),)))
    alone = [
        kernels.column_alignment_kl(
            texts[own], images, Similarity(((1.0, labels[own], labels),)), col_offset=own.start
        )
        for own in (slice(0, 4), slice(4, 8))
    ]
    assert abs(torch.stack(alone).mean().item() - truth.item()) > 1e-3


def merged(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    negatives = torch.stack([p[0] for p in parts])
    weight = (negatives - negatives.logsumexp(0)).exp().nan_to_num()
    centre = (torch.stack([p[1] for p in parts]) * weight[:, :, None]).sum(0)
    return negatives.logsumexp(0), centre


@settings(max_examples=20, deadline=None)
@given(
    ranks=st.sampled_from([1, 2, 3]),
    rows=st.integers(1, 4),
    norm=st.sampled_from(["token", "axis"]),
    unit_rows=st.booleans(),
    masked=st.booleans(),
    seed=st.integers(0, 99),
)
def test_tokens_that_stay_give_the_loss_of_tokens_that_travel(
    ranks: int, rows: int, norm: str, unit_rows: bool, masked: bool, seed: int
) -> None:
    total = ranks * rows
    vectors, tokens = normal(seed, total, 5), normal(seed + 1, total, 3, 5)
    mask = torch.arange(3) < torch.arange(total)[:, None] % 4  # some sentences without any token
    ids = torch.arange(total) // 2 if masked else None
    options = {"temperature": 0.2, "norm": norm, "unit_rows": unit_rows}
    whole = vectors.clone().requires_grad_()
    truth = kernels.global_to_local(
        whole, tokens, mask, tokens, mask, row_ids=ids, col_ids=ids, impl="reference", **options
    )
    truth.backward()
    shares = [slice(r * rows, (r + 1) * rows) for r in range(ranks)]
    parts = [
        kernels.token_negatives(
            vectors, tokens[own], mask[own], first_own=own.start, row_ids=ids,
            col_ids=None if ids is None else ids[own], workspace_bytes=2000, **options,
        )
        for own in shares
    ]  # fmt: skip
    negatives, centre = merged(parts)
    losses, gradients = [], []
    for own in shares:
        local = vectors[own].clone().requires_grad_()
        loss = kernels.own_token_loss(
            local, tokens[own], mask[own], negatives[own], centre[own], **options
        )
        (3.0 * loss).backward()
        losses.append(loss.detach())
        gradients.append(local.grad / 3.0 / ranks)  # type: ignore[operator]
    assert torch.stack(losses).mean().item() == pytest.approx(truth.item(), rel=1e-10, abs=1e-13)
    torch.testing.assert_close(torch.cat(gradients), whole.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": torch.zeros(4, 3)}, r"tokens must be \[n, T, 3\]"),
        ({"norm": "row"}, "norm must be 'token' or 'axis'"),
        ({"temperature": 0.0}, "temperature"),
        ({"first_own": 9}, "col_offset=9"),
    ],
)
def test_arguments_that_do_not_fit_are_named(changes: dict, message: str) -> None:
    arguments = {
        "rows": torch.ones(4, 5), "tokens": torch.ones(2, 3, 5), "mask": torch.ones(2, 3),
        "temperature": 0.1,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        kernels.token_negatives(**(arguments | changes))
