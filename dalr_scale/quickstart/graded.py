"""Pairs of captions with a known degree of similarity, for scoring sentence encoders.

The second scene of a pair is the first one with 0 to 6 facts changed, so that all degrees occur.
Which words and which frame are used has nothing to do with the degree: equal scenes are often told
with different words, and half of all pairs, the least alike ones included, share their frame.
"""

import dataclasses
from typing import TypedDict

import numpy as np

from dalr_scale.quickstart.captions import FRAMES, choose_mentioned, similarity, write_caption
from dalr_scale.quickstart.scenes import FACTS, Scene


class GradedPair(TypedDict):
    """Two captions and their true similarity, 0 to 1."""

    a: str
    b: str
    score: float


def graded_pairs(
    scenes: np.ndarray, count: int, keep: float, rng: np.random.Generator
) -> list[GradedPair]:
    """Draw pairs of captions whose scenes are all among some.

    Args:
        scenes: numbers of the scenes to draw from.
        count: how many pairs.
        keep: chance that a caption tells a fact it may leave out.
        rng: source of every choice.
    """
    allowed = frozenset(scenes.tolist())
    pairs: list[GradedPair] = []
    while len(pairs) < count:
        first = Scene.from_number(int(rng.choice(scenes)))
        second = _changed(first, int(rng.integers(len(FACTS) + 1)), allowed, rng)
        if second is not None:
            pairs.append(_pair(first, second, keep, rng))
    return pairs


def _changed(
    scene: Scene, changes: int, allowed: frozenset[int], rng: np.random.Generator
) -> Scene | None:
    """Return an allowed scene that differs in `changes` facts; None if 200 attempts find none."""
    names = list(FACTS)
    for _ in range(200):
        new = {}
        for index in rng.choice(len(names), changes, replace=False):
            others = [v for v in FACTS[names[index]] if v != scene.fact(names[index])]
            new[names[index]] = others[rng.integers(len(others))]
        changed = dataclasses.replace(scene, **new)
        if changed.number in allowed:
            return changed
    return None


def _pair(first: Scene, second: Scene, keep: float, rng: np.random.Generator) -> GradedPair:
    """Tell two scenes; in half of the pairs with the same frame, in half the same facts."""
    frame, mentioned = FRAMES[rng.integers(len(FRAMES))], choose_mentioned(rng, keep)
    other_frame = frame if rng.random() < 0.5 else FRAMES[rng.integers(len(FRAMES))]
    other_mentioned = mentioned if rng.random() < 0.5 else choose_mentioned(rng, keep)
    a, b = (
        write_caption(first, mentioned, frame, rng),
        write_caption(second, other_mentioned, other_frame, rng),
    )
    return {"a": a.text, "b": b.text, "score": round(similarity(a, b), 6)}
