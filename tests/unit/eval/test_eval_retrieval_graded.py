"""Recall at k and graded similarity."""

import math

import pytest
import torch

from dalr_scale.errors import UserError
from dalr_scale.eval.graded import lexical_overlap, load_graded, score_graded, score_lexical
from dalr_scale.eval.retrieval import recall_at_k


def test_recall_of_a_small_example_by_hand():
    images = torch.eye(3)
    # Texts 0 and 1 belong to image 0; text 1 is nearer to image 1. Text 2 is right.
    texts = torch.tensor([[1.0, 0.1, 0.0], [0.4, 1.0, 0.0], [0.0, 0.0, 2.0]])
    scores = recall_at_k(texts, images, [0, 0, 2], ks=(1, 2))
    assert scores["text_to_image_r1"] == pytest.approx(2 / 3)
    assert scores["text_to_image_r2"] == 1.0
    assert scores["image_to_text_r1"] == 1.0  # image 1 has no text and does not count


def test_recall_over_chunks_equals_the_whole(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    texts, images = torch.randn(50, 8, generator=generator), torch.randn(20, 8, generator=generator)
    owner = torch.arange(50) % 20
    whole = recall_at_k(texts, images, owner)
    monkeypatch.setattr("dalr_scale.eval.retrieval._CHUNK", 7)
    assert recall_at_k(texts, images, owner) == whole
    assert 0 < whole["text_to_image_r1"] < whole["text_to_image_r10"] < 1


def test_perfect_collapsed_and_shuffled_embeddings():
    images = torch.randn(30, 16, generator=torch.Generator().manual_seed(0))
    assert recall_at_k(images, images, range(30))["text_to_image_r1"] == 1.0
    collapsed = recall_at_k(torch.ones(30, 16), torch.ones(30, 16), range(30))
    assert set(collapsed.values()) == {0.0}
    assert recall_at_k(images.roll(1, 0), images, range(30))["text_to_image_r1"] < 0.2


def test_misfitting_input_is_refused():
    with pytest.raises(ValueError, match="widths differ"):
        recall_at_k(torch.ones(2, 3), torch.ones(2, 4), [0, 1])
    with pytest.raises(ValueError, match="2 texts, but 1"):
        recall_at_k(torch.ones(2, 3), torch.ones(2, 3), [0])
    with pytest.raises(ValueError, match="outside the 2 images"):
        recall_at_k(torch.ones(2, 3), torch.ones(2, 3), [0, 2])
    with pytest.raises(ValueError, match="not finite"):
        recall_at_k(torch.full((2, 3), torch.nan), torch.ones(2, 3), [0, 1])


def test_graded_pairs_and_the_lexical_baseline(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(
        '{"a": "red ball", "b": "Red ball", "score": 1}\n\n'
        '{"a": "red ball", "b": "blue ball", "score": 0.5}\n'
        '{"a": "red ball", "b": "green box", "score": 0.0}\n'
    )
    task = load_graded(path)
    assert task.name == "pairs" and len(task.pairs) == 3
    assert lexical_overlap("red ball", "blue ball") == pytest.approx(1 / 3)
    assert lexical_overlap("", "") == 0.0
    assert score_lexical(task) == pytest.approx(1.0)
    angles = {"red ball": 0.0, "Red ball": 0.1, "blue ball": 0.5, "green box": 1.0}
    assert score_graded(by_angle(angles), task) == pytest.approx(1.0)
    swapped = angles | {"Red ball": 1.0, "green box": 0.1}
    assert score_graded(by_angle(swapped), task) == pytest.approx(-1.0)


def by_angle(angles):
    """An encoder that places each text at a known angle in the plane."""
    return lambda texts: torch.tensor([[math.cos(angles[t]), math.sin(angles[t])] for t in texts])


@pytest.mark.parametrize(
    "line",
    [
        "{",
        '{"a": "x", "b": "y"}',
        '{"a": "x", "b": 3, "score": 1}',
        "[1]",
        "3",
        '{"a": "x", "b": "y", "score": NaN}',
    ],
)
def test_malformed_graded_lines_are_named(line, tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"a": "x", "b": "y", "score": 1}\n' + line + "\n")
    with pytest.raises(UserError, match=r"pairs\.jsonl, line 2"):
        load_graded(path)


def test_missing_and_too_short_graded_files(tmp_path):
    with pytest.raises(UserError, match=r"none\.jsonl is not a readable"):
        load_graded(tmp_path / "none.jsonl")
    (tmp_path / "one.jsonl").write_text('{"a": "x", "b": "y", "score": 1}\n')
    with pytest.raises(UserError, match="holds 1 graded pairs"):
        load_graded(tmp_path / "one.jsonl")
