"""Scenes that can be drawn: one to three like objects before a backdrop, in some weather.

A scene is six facts (count, size, colour, shape, weather, scenery), each one of a few values, so
there are 6,912 scenes and every one has a number. What an image shows beyond its facts (exact
place, tilt, shade, light, grain) is drawn from the generator it is rendered with.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from PIL import Image, ImageDraw

FACTS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "count": ("one", "two", "three"),
        "size": ("small", "large"),
        "colour": ("red", "orange", "yellow", "green", "blue", "purple", "white", "black"),
        "shape": ("circle", "square", "triangle", "star", "ring", "bar"),
        "weather": ("sun", "rain", "fog", "storm"),
        "scenery": ("lawn", "sea", "sand", "snow", "night", "brick"),
    }
)
NUM_SCENES = math.prod(len(values) for values in FACTS.values())

_PAINT = {
    "red": (214, 32, 38),
    "orange": (246, 138, 22),
    "yellow": (247, 226, 48),
    "green": (38, 196, 60),
    "blue": (38, 84, 226),
    "purple": (150, 48, 190),
    "white": (250, 250, 250),
    "black": (16, 16, 16),
}
# Where the single objects of a group lie around its centre, in units of their radius.
_GROUPS = {
    "one": ((0.0, 0.0),),
    "two": ((-1.05, 0.35), (1.05, -0.35)),
    "three": ((-1.1, 0.75), (1.1, 0.75), (0.0, -1.0)),
}
_BARS = {
    "one": ((0.0, 0.0),),
    "two": ((0.0, -0.55), (0.0, 0.55)),
    "three": ((0.0, -1.0), (0.0, 0.0), (0.0, 1.0)),
}
_RADIUS = {"small": 0.11, "large": 0.19}
_OVERSAMPLE = 4


@dataclass(frozen=True)
class Scene:
    """One scene: a value for every fact of `FACTS`."""

    count: str
    size: str
    colour: str
    shape: str
    weather: str
    scenery: str

    @classmethod
    def from_number(cls, number: int) -> "Scene":
        """Return scene `number`, 0 <= number < `NUM_SCENES` (mixed radix, last fact fastest)."""
        if not 0 <= number < NUM_SCENES:
            raise ValueError(f"scene number {number} is outside 0..{NUM_SCENES - 1}")
        facts = {}
        for name, values in reversed(list(FACTS.items())):
            number, index = divmod(number, len(values))
            facts[name] = values[index]
        return cls(**facts)

    @property
    def number(self) -> int:
        """The number that `from_number` turns back into this scene."""
        number = 0
        for name, values in FACTS.items():
            number = number * len(values) + values.index(self.fact(name))
        return number

    def fact(self, name: str) -> str:
        """Return the value of the fact called `name`."""
        return getattr(self, name)


def partition(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Split the numbers of all scenes into those for training (60 %), dev and test (20 % each).

    No combination of facts is in two of the three; each is in random order.
    """
    order = np.random.default_rng([seed, 0]).permutation(NUM_SCENES)
    dev, test = NUM_SCENES * 3 // 5, NUM_SCENES * 4 // 5
    return order[:dev], order[dev:test], order[test:]


def render(scene: Scene, size: int, rng: np.random.Generator) -> Image.Image:
    """Draw `scene` as a square RGB image of `size` pixels; equal generators give equal pixels."""
    backdrop = _weather(scene.weather, _backdrop(scene.scenery, size, rng), rng)
    cover, rim = _masks(scene, size, rng)
    paint = np.array(_PAINT[scene.colour], np.float32) * rng.uniform(0.9, 1.05)
    # A rim against the paint's lightness keeps every colour visible on every backdrop.
    line = np.full(3, 20.0 if paint.mean() > 70 else 235.0, np.float32)
    image = backdrop * (1 - rim) + line * rim
    image = image * (1 - cover) + paint * cover
    image = image * rng.uniform(0.88, 1.08) + rng.normal(0, 4, image.shape)
    return Image.fromarray(np.clip(image, 0, 255).astype(np.uint8))


def _masks(scene: Scene, size: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return how much of each pixel [size, size, 1] the objects and their rimmed outline cover."""
    canvas = size * _OVERSAMPLE
    inner, outer = Image.new("L", (canvas, canvas)), Image.new("L", (canvas, canvas))
    radius = _RADIUS[scene.size] * canvas * rng.uniform(0.93, 1.07)
    centre = (0.52 + rng.uniform(-0.05, 0.05, 2)) * canvas
    tilt = rng.uniform(-0.2, 0.2)
    turn = np.array([[math.cos(tilt), -math.sin(tilt)], [math.sin(tilt), math.cos(tilt)]])
    for offset in (_BARS if scene.shape == "bar" else _GROUPS)[scene.count]:
        where = centre + turn @ np.array(offset) * radius * 1.15
        for image, grown in ((inner, 1.0), (outer, 1.0 + 1.1 * _OVERSAMPLE / radius)):
            _draw_shape(ImageDraw.Draw(image), scene.shape, where, radius * grown, tilt)
    small = [image.resize((size, size), Image.Resampling.BOX) for image in (inner, outer)]
    cover, rim = (np.asarray(image, np.float32)[..., None] / 255 for image in small)
    return cover, rim


def _draw_shape(
    draw: ImageDraw.ImageDraw, shape: str, where: np.ndarray, radius: float, tilt: float
) -> None:
    x, y = where
    box = (x - radius, y - radius, x + radius, y + radius)
    if shape == "circle":
        draw.ellipse(box, fill=255)
    elif shape == "ring":
        draw.ellipse(box, outline=255, width=max(1, round(radius * 0.42)))
    else:
        draw.polygon([tuple(corner) for corner in _corners(shape, radius, tilt) + where], fill=255)


def _corners(shape: str, radius: float, tilt: float) -> np.ndarray:
    """Return the corners [n, 2] of a polygon around the origin."""
    if shape == "bar":
        points = np.array([(-1.25, -0.32), (1.25, -0.32), (1.25, 0.32), (-1.25, 0.32)])
    elif shape == "square":
        points = np.array([(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)])
    elif shape == "triangle":
        points = np.array([(0, -1.1), (1.1, 0.85), (-1.1, 0.85)])
    else:
        angles = np.arange(10) * math.pi / 5 - math.pi / 2
        reach = np.where(np.arange(10) % 2 == 0, 1.25, 0.5)
        points = np.stack([np.cos(angles) * reach, np.sin(angles) * reach], axis=1)
    turn = np.array([[math.cos(tilt), math.sin(tilt)], [-math.sin(tilt), math.cos(tilt)]])
    return points @ turn * radius


def _backdrop(scenery: str, size: int, rng: np.random.Generator) -> np.ndarray:
    """Return the backdrop float32 [size, size, 3], values about 0..255."""
    down, across = np.mgrid[0:size, 0:size].astype(np.float32) / size
    grain = rng.normal(0, 1, (size, size)).astype(np.float32)
    phase = rng.uniform(0, 2 * math.pi)
    if scenery == "lawn":
        blades = np.broadcast_to(rng.normal(0, 1, (1, size)), (size, size))
        return _tint((74, 122, 58), 9 * blades + 7 * grain)
    if scenery == "sea":
        return _tint((70, 130, 160), 20 * np.sin(40 * down + 2 * np.sin(9 * across) + phase))
    if scenery == "sand":
        return _tint((206, 176, 124), 9 * grain + 8 * np.sin(14 * (down + across) + phase))
    if scenery == "snow":
        return _tint((220, 228, 236), 6 * grain - 14 * down)
    if scenery == "night":
        return _tint((28, 30, 62), 150.0 * (grain > 2.6) + 10 * down)
    rows = np.floor(down * 8)
    joint = (np.mod(down * 8, 1) < 0.16) | (np.mod(across * 4 + 0.5 * (rows % 2), 1) < 0.09)
    return _tint((138, 72, 56), 60.0 * joint + 6 * grain)


def _weather(weather: str, backdrop: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return the backdrop as it looks in some weather."""
    size = len(backdrop)
    if weather == "fog":
        return 0.45 * backdrop + 0.55 * np.float32(185)
    sky = Image.new("L", (size, size))
    draw = ImageDraw.Draw(sky)
    if weather == "rain":
        for x, y in rng.uniform(-0.1, 1.0, (size // 2, 2)) * size:
            draw.line((x, y, x + 0.05 * size, y + 0.14 * size), fill=190)
        colour = np.array((190, 205, 225), np.float32)
    elif weather == "sun":
        x, y = (0.12 + rng.uniform(-0.03, 0.03, 2)) * size
        radius = 0.13 * size
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
        colour = np.array((255, 236, 110), np.float32)
    else:
        backdrop = backdrop * np.float32(0.55)
        x, y = rng.uniform(0.75, 0.85) * size, 0.0
        steps = ((0.0, 0.0), (-0.1, 0.17), (0.03, 0.15), (-0.08, 0.36))
        draw.line([(x + a * size, y + b * size) for a, b in steps], fill=255, width=2)
        colour = np.array((255, 255, 170), np.float32)
    cover = np.asarray(sky, np.float32)[..., None] / 255
    return backdrop * (1 - cover) + colour * cover


def _tint(colour: tuple[int, int, int], light: np.ndarray) -> np.ndarray:
    return np.array(colour, np.float32) + light[..., None].astype(np.float32)
