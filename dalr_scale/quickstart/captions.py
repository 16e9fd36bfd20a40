"""Captions of scenes, and the true similarity of two captions.

Every value of a fact is expressed by one of four words (crimson, scarlet ...). Only the images show
that these are synonyms. The words are put into one of several sentence frames, which carry no
information about the scene. A caption leaves some facts out.

The similarity of two captions is the information that they share divided by the information that
either of them has, in bits: a fact counts log2(number of its values), and is shared if both
captions mention it with the same value.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from dalr_scale.quickstart.scenes import FACTS, Scene

SYNONYMS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "one": ("one", "a", "single", "lone"),
        "two": ("two", "twin", "double", "paired"),
        "three": ("three", "triple", "treble", "threefold"),
        "small": ("small", "little", "tiny", "minor"),
        "large": ("large", "big", "huge", "great"),
        "red": ("red", "crimson", "scarlet", "ruby"),
        "orange": ("orange", "tangerine", "amber", "apricot"),
        "yellow": ("yellow", "lemon", "golden", "mustard"),
        "green": ("green", "emerald", "jade", "lime"),
        "blue": ("blue", "cobalt", "sapphire", "azure"),
        "purple": ("purple", "violet", "plum", "mauve"),
        "white": ("white", "ivory", "chalky", "milky"),
        "black": ("black", "ebony", "inky", "sable"),
        "circle": ("circle", "disc", "ball", "dot"),
        "square": ("square", "block", "tile", "cube"),
        "triangle": ("triangle", "wedge", "pyramid", "cone"),
        "star": ("star", "asterisk", "spark", "starlet"),
        "ring": ("ring", "hoop", "band", "loop"),
        "bar": ("bar", "beam", "plank", "stick"),
        "sun": ("sunny", "sunlit", "fair", "cloudless"),
        "rain": ("rainy", "wet", "drizzly", "showery"),
        "fog": ("foggy", "misty", "hazy", "murky"),
        "storm": ("stormy", "thundery", "wild", "rough"),
        "lawn": ("grass", "turf", "lawn", "meadow"),
        "sea": ("sea", "ocean", "water", "waves"),
        "sand": ("sand", "beach", "desert", "dunes"),
        "snow": ("snow", "ice", "frost", "winter"),
        "night": ("night", "darkness", "midnight", "starlight"),
        "brick": ("bricks", "masonry", "brickwork", "stonework"),
    }
)

ALWAYS_MENTIONED = ("count", "shape")
BITS: Mapping[str, float] = MappingProxyType({name: math.log2(len(v)) for name, v in FACTS.items()})


@dataclass(frozen=True)
class Frame:
    """The words of a sentence that do not depend on the scene, and the order of the others.

    `things` has the slots count, shape and looks; `looks` joins size and colour (colour first if
    `colour_first`) and is empty without both of them. `sentence` has the slots things, weather and
    scenery; the last two are empty when they are not mentioned.
    """

    sentence: str
    things: str
    looks: str
    joint: str
    colour_first: bool
    weather: str
    scenery: str


FRAMES = (
    Frame(
        "this picture shows {things} {weather} {scenery}",
        "{count} {looks} {shape}",
        "{}",
        " ",
        False,
        "in {} weather",
        "against {}",
    ),
    Frame(
        "{scenery} we can see {things} {weather}",
        "{count} {shape} {looks}",
        "of {} look",
        " and ",
        False,
        "during a {} hour",
        "with {} behind",
    ),
    Frame(
        "{things} {weather} {scenery}",
        "{count} {looks} {shape}",
        "{}",
        " ",
        True,
        "on a {} day",
        "over {}",
    ),
    Frame(
        "{weather} there lies {things} {scenery}",
        "{count} {shape} {looks}",
        "painted {}",
        " and ",
        True,
        "at some {} time",
        "amid {}",
    ),
    Frame(
        "someone drew {things} {scenery} {weather}",
        "{count} {looks} {shape}",
        "{}",
        " and ",
        True,
        "under {} skies",
        "upon {}",
    ),
    Frame(
        "{scenery} {weather} {things} appears",
        "{count} {looks} {shape}",
        "{}",
        " ",
        False,
        "in a {} season",
        "before {}",
    ),
    Frame(
        "here {things} {weather} {scenery} please",
        "{count} {shape} {looks}",
        "that is {}",
        " , ",
        False,
        "with {} air",
        "by the {}",
    ),
    Frame(
        "{things} {scenery} {weather} is what a child made",
        "{count} {looks} {shape}",
        "{}",
        " ",
        True,
        "through {} hours",
        "beside {}",
    ),
)


@dataclass(frozen=True)
class Caption:
    """A sentence, and the facts (name -> value) that it mentions."""

    text: str
    mentioned: Mapping[str, str]


def similarity(first: Caption, second: Caption) -> float:
    """Return the true similarity of two captions, 0 (nothing shared) to 1 (same facts)."""
    either = sum(BITS[name] for name in first.mentioned.keys() | second.mentioned.keys())
    shared = sum(
        BITS[name] for name, value in first.mentioned.items() if second.mentioned.get(name) == value
    )
    return shared / either


def choose_mentioned(rng: np.random.Generator, keep: float) -> tuple[str, ...]:
    """Draw the facts of a caption: `ALWAYS_MENTIONED`, any other one with probability `keep`."""
    return tuple(name for name in FACTS if name in ALWAYS_MENTIONED or rng.random() < keep)


def write_caption(
    scene: Scene, mentioned: Iterable[str], frame: Frame, rng: np.random.Generator
) -> Caption:
    """Write a caption with the facts `mentioned`, each by one of its words, drawn from `rng`."""
    facts = {name: scene.fact(name) for name in mentioned}
    words = {name: SYNONYMS[value][rng.integers(4)] for name, value in facts.items()}
    return Caption(_fill(frame, words, plural=scene.count != "one"), MappingProxyType(facts))


def _fill(frame: Frame, words: Mapping[str, str], plural: bool) -> str:
    order = ("colour", "size") if frame.colour_first else ("size", "colour")
    looks = frame.joint.join(words[name] for name in order if name in words)
    things = frame.things.format(
        count=words["count"],
        shape=words["shape"] + ("s" if plural else ""),
        looks=frame.looks.format(looks) if looks else "",
    )
    weather = frame.weather.format(words["weather"]) if "weather" in words else ""
    scenery = frame.scenery.format(words["scenery"]) if "scenery" in words else ""
    return " ".join(frame.sentence.format(things=things, weather=weather, scenery=scenery).split())


def vocabulary() -> list[str]:
    """Return every word piece of the captions, sorted; plurals are the noun and `##s`."""
    frames = " ".join(
        " ".join(
            (frame.sentence, frame.things, frame.looks, frame.weather, frame.scenery, frame.joint)
        )
        for frame in FRAMES
    )
    fixed = {word for word in frames.split() if "{" not in word}
    return sorted(fixed | {word for words in SYNONYMS.values() for word in words} | {"##s"})
