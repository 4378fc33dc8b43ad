"""Rates as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from benchmarks.measure import Measure


def draw(measures: Mapping[str, tuple[str, Measure]], title: str, path: Path) -> None:
    """Write a PNG of horizontal bars: the median, and a line from the slowest repeat to the fastest.

    Args:
        measures: By key, the contestant's name and what it took; the first is what the others are compared with.
        title: What was measured, on what.
        path: The file to write.
    """
    from matplotlib.figure import Figure  # not `pyplot`, which looks for a display

    names = [name for name, _ in measures.values()]
    taken = [measure for _, measure in measures.values()]
    medians = [m.median for m in taken]
    spread = [
        [median - min(m.edits_per_second) for median, m in zip(medians, taken, strict=True)],
        [max(m.edits_per_second) - median for median, m in zip(medians, taken, strict=True)],
    ]
    figure = Figure(figsize=(9, 1.2 + 0.55 * len(names)), layout="constrained")
    axes = figure.subplots()
    colours = ["#9aa5b1" if name.startswith("diffusers") else "#2f6f4f" for name in names]
    axes.barh(names, medians, xerr=spread, color=colours, capsize=3)
    for place, (median, m) in enumerate(zip(medians, taken, strict=True)):
        text = f" {median:.2f} edits/s · {median / medians[0]:.1f}×"
        axes.text(max(m.edits_per_second), place, text, va="center", fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(right=1.35 * max(max(m.edits_per_second) for m in taken))
    axes.set_xlabel("edits/s: median, fastest and slowest repeat")
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150, format="png")
