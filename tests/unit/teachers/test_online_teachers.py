"""Teachers beside the student: some rows at a time, and no collective that ranks could miss."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from dalr_scale.data.stream.batch import Batch
from dalr_scale.teachers import online as online_teachers
from dalr_scale.teachers.online import OnlineTeachers, OnlineText

ROWS, LENGTH = 7, 6
PAD = 3  # the teacher's padding id


class Teacher:
    """Looks tokens up in a table; cuts token features at the longest row, as some towers do."""

    def __init__(self) -> None:
        self.table = torch.randn(20, 5, generator=torch.Generator().manual_seed(0))
        self.seen: list[tuple[int, ...]] = []
        self.tokenizer = SimpleNamespace(pad_token_id=PAD)

    def tokenize(self, sentences: Sequence[str]) -> tuple[Tensor, Tensor]:
        ids = torch.tensor([[len(s) % 20] * LENGTH for s in sentences])
        return ids, torch.ones_like(ids)

    def encode_ids(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self.seen.append(tuple(ids.shape))
        longest = int(mask.sum(1).max())
        own = self.table[ids] * mask[..., None]
        return own.sum(1), own[:, 1:longest], mask[:, 1:longest].bool()

    def encode(self, images: Tensor) -> Tensor:
        self.seen.append(tuple(images.shape))
        return images.flatten(1)


def batch(kind: Any = "pair") -> Batch:
    draw = torch.Generator().manual_seed(1)
    lengths = torch.tensor([6, 2, 3, 3, 2, 4, 2])
    mask = (torch.arange(LENGTH) < lengths[:, None]).long()
    ids = torch.randint(0, 20, (ROWS, LENGTH), generator=draw)
    rows = torch.arange(ROWS)
    images = torch.randn(ROWS, 3, 2, 2, generator=draw)
    sentences = ["x" * int(n) for n in lengths]
    return Batch(0, kind, rows, sentences, ids, mask, rows, {}, images=images)


def teachers(micro_rows: int, **options: Any) -> tuple[OnlineTeachers, Teacher]:
    teacher = Teacher()
    texts = [OnlineText(teacher, ("text0", "tokens0"))]
    counts = {"num_text": 1, "num_tokens": 1, "micro_rows": micro_rows}
    return OnlineTeachers(teacher, texts, **counts, **options), teacher


@pytest.mark.parametrize("student_ids", [True, False])
def test_some_rows_at_a_time_give_what_all_rows_give(student_ids: bool) -> None:
    whole = teachers(0, student_ids=student_ids)[0].batch(batch(), with_text=True)
    online, teacher = teachers(2, student_ids=student_ids)
    parts = online.batch(batch(), with_text=True)
    assert max(shape[0] for shape in teacher.seen) == 2 and len(teacher.seen) == 2 * 4
    for one, other in zip(
        whole.text + whole.token_features, parts.text + parts.token_features, strict=True
    ):
        assert torch.equal(one, other)
    assert torch.equal(whole.token_masks[0], parts.token_masks[0])
    assert whole.image is not None and parts.image is not None
    assert torch.equal(whole.image, parts.image)


@pytest.mark.parametrize("student_ids", [True, False])
@pytest.mark.parametrize("kind", ["pair", "text"])
def test_ranks_pad_alike_in_every_step_or_in_none(
    kind: str, student_ids: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank with a batch of another kind must meet the others in the same collective."""
    calls = []

    def pad(ids: Tensor, mask: Tensor, fill: int) -> tuple[Tensor, Tensor]:
        calls.append(fill)
        extra = torch.nn.functional.pad
        return extra(ids, (0, 3), value=fill), extra(mask, (0, 3))

    monkeypatch.setattr(online_teachers, "pad_to_common_length", pad)
    teachers(2, student_ids=student_ids)[0].batch(batch(kind), with_text=False)
    assert not calls
    online, teacher = teachers(2, student_ids=student_ids, pad_alike=True)
    online.batch(batch(kind), with_text=False)
    assert calls == [PAD]
    assert all(shape[1] == LENGTH + 3 for shape in teacher.seen if len(shape) == 2)
