"""An image for people: some scenes with two of their captions each."""

import textwrap
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from dalr_scale.quickstart.captions import FRAMES, choose_mentioned, write_caption
from dalr_scale.quickstart.scenes import NUM_SCENES, Scene, render

_CELL, _IMAGE, _MARGIN, _LINE = 260, 176, 12, 12
_TEXT_HEIGHT = 7 * _LINE


def contact_sheet(path: Path, *, rows: int = 2, columns: int = 4, seed: int = 0) -> None:
    """Write a PNG grid of scenes, as large images, each above two captions of it."""
    rng = np.random.default_rng(seed)
    height = _IMAGE + _TEXT_HEIGHT + 2 * _MARGIN
    sheet = Image.new("RGB", (columns * _CELL, rows * height), "white")
    draw = ImageDraw.Draw(sheet)
    for cell, number in enumerate(rng.choice(NUM_SCENES, rows * columns, replace=False).tolist()):
        scene = Scene.from_number(number)
        x, y = cell % columns * _CELL + _MARGIN, cell // columns * height + _MARGIN
        sheet.paste(render(scene, _IMAGE, rng), (x, y))
        y += _IMAGE + _LINE // 2
        for frame in rng.choice(len(FRAMES), 2, replace=False):
            text = write_caption(scene, choose_mentioned(rng, 0.75), FRAMES[frame], rng).text
            lines = textwrap.wrap(text, 38)
            draw.multiline_text((x, y), "\n".join(lines), fill="black", spacing=2)
            y += (len(lines) + 0.5) * _LINE
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
