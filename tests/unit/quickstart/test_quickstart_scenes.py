"""The drawn data: scenes, captions, their true similarity, and the graded pairs."""

import dataclasses

import numpy as np
import pytest

from dalr_scale.eval.graded import lexical_overlap
from dalr_scale.eval.sts import spearman
from dalr_scale.quickstart import captions
from dalr_scale.quickstart.captions import (
    BITS,
    FRAMES,
    SYNONYMS,
    similarity,
    vocabulary,
    write_caption,
)
from dalr_scale.quickstart.graded import graded_pairs
from dalr_scale.quickstart.scenes import FACTS, NUM_SCENES, Scene, partition, render

SCENE = Scene("two", "large", "red", "star", "rain", "sea")


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_every_number_is_one_scene():
    scenes = [Scene.from_number(number) for number in range(NUM_SCENES)]
    assert [scene.number for scene in scenes] == list(range(NUM_SCENES))
    assert len(set(scenes)) == NUM_SCENES
    with pytest.raises(ValueError, match="outside"):
        Scene.from_number(NUM_SCENES)


def test_the_parts_share_no_scene_and_miss_none():
    parts = partition(3)
    assert sorted(np.concatenate(parts).tolist()) == list(range(NUM_SCENES))
    assert not np.array_equal(parts[0], partition(4)[0])


def test_rendering_depends_on_scene_and_generator_only():
    first, again, other = (np.asarray(render(SCENE, 48, rng(seed))) for seed in (1, 1, 2))
    assert first.shape == (48, 48, 3) and first.dtype == np.uint8
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("fact", FACTS)
def test_every_fact_can_be_seen(fact: str):
    images = [
        np.asarray(render(dataclasses.replace(SCENE, **{fact: value}), 48, rng(1)), float)
        for value in FACTS[fact]
    ]
    for i, first in enumerate(images):
        for second in images[:i]:
            assert (np.abs(first - second).max(axis=2) > 40).sum() > 20  # pixels


def test_each_value_has_four_words_of_its_own():
    assert set(SYNONYMS) == {value for values in FACTS.values() for value in values}
    words = [word for own in SYNONYMS.values() for word in own]
    assert all(len(own) == 4 for own in SYNONYMS.values())
    assert len(set(words)) == len(words)


def test_captions_tell_the_named_facts_and_no_others():
    for frame in FRAMES:
        for mentioned in (("count", "shape"), tuple(FACTS)):
            caption = write_caption(SCENE, mentioned, frame, rng())
            words = {w for word in caption.text.split() for w in (word, word.removesuffix("s"))}
            found = {name for name in FACTS if words & set(SYNONYMS[SCENE.fact(name)])}
            assert found == set(mentioned) == set(caption.mentioned), caption.text
            assert "{" not in caption.text and "  " not in caption.text


def test_the_vocabulary_covers_every_caption():
    known = set(vocabulary())
    for number in rng().choice(NUM_SCENES, 300):
        scene = Scene.from_number(int(number))
        for word in write_caption(scene, FACTS, FRAMES[number % len(FRAMES)], rng()).text.split():
            assert word in known or (word.endswith("s") and word[:-1] in known)


def test_similarity_by_hand():
    def mentioned(scene: Scene, *names: str):
        return write_caption(scene, names, FRAMES[0], rng())

    red = mentioned(SCENE, "count", "shape", "colour")
    assert similarity(red, mentioned(SCENE, "colour", "shape", "count")) == 1.0
    blue = mentioned(dataclasses.replace(SCENE, colour="blue"), "count", "shape", "colour")
    shared = BITS["count"] + BITS["shape"]
    assert similarity(red, blue) == pytest.approx(shared / (shared + 3))
    assert similarity(red, mentioned(SCENE, "count", "shape")) == similarity(red, blue)
    assert similarity(red, blue) == similarity(blue, red)
    other = Scene("one", "small", "blue", "bar", "fog", "sand")
    assert similarity(red, mentioned(other, *FACTS)) == 0.0


def test_graded_pairs_cover_all_degrees_within_their_scenes():
    scenes = partition(0)[1]
    pairs = graded_pairs(scenes, 600, 0.75, rng())
    scores = np.array([pair["score"] for pair in pairs])
    assert pairs == graded_pairs(scenes, 600, 0.75, rng())
    assert (np.histogram(scores, 5, (0, 1))[0] > 60).all()
    assert scores.min() == 0 and scores.max() == 1


def correlation(pairs: list) -> float:
    overlaps = np.array([lexical_overlap(pair["a"], pair["b"]) for pair in pairs])
    return spearman(overlaps, np.array([pair["score"] for pair in pairs]))


def test_word_overlap_is_no_shortcut(monkeypatch: pytest.MonkeyPatch):
    scenes = partition(0)[1]
    assert correlation(graded_pairs(scenes, 600, 0.75, rng())) < 0.35
    # Control: with one word for each value, overlap would tell the degree.
    plain = {value: words[:1] * 4 for value, words in SYNONYMS.items()}
    monkeypatch.setattr(captions, "SYNONYMS", plain)
    assert correlation(graded_pairs(scenes, 600, 0.75, rng())) > 0.5
