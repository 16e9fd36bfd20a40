"""Line plots of the benchmarks; needs matplotlib (``pip install dalr-scale[bench]``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Panel:
    """One set of axes, logarithmic in both directions.

    Attributes:
        title: Above the axes.
        label: Of the vertical axis, with its unit.
        lines: Points ``(N, value)`` by legend entry.
    """

    title: str
    label: str
    lines: Mapping[str, Sequence[tuple[float, float]]]


def save(path: Path, panels: Sequence[Panel], caption: str) -> None:
    """Write the panels side by side as a PNG.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    figure = Figure(figsize=(5.2 * len(panels), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        ticks = sorted({x for points in panel.lines.values() for x, _ in points})
        for (name, points), marker in zip(panel.lines.items(), "osD^v", strict=False):
            axes.plot(*zip(*points, strict=True), marker=marker, label=name)
        axes.set(xscale="log", yscale="log", xlabel="N", ylabel=panel.label, title=panel.title)
        axes.set_xticks(ticks, [f"{x / 1024:g}k" for x in ticks])
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(which="both", alpha=0.3)
        axes.legend(fontsize="small")
    figure.text(0.01, -0.04, caption, fontsize="x-small")
    figure.savefig(path, dpi=110, bbox_inches="tight", metadata={"Software": ""})
