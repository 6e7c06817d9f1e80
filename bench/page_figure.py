"""What the results page's pictures have in common: the figure and its title, colours, file names."""

import re
from pathlib import Path
from typing import Any, NamedTuple

from bench.results_files import Suite
from trsd.plots import _plain, _save

# Blues are ours, warm colours are others; hue, lightness and marker all differ, for colour-blind eyes.
OURS = (("#0072b2", "o"), ("#56b4e9", "s"), ("#003a5c", "^"), ("#7a8fd1", "P"))
OTHERS = (("#d55e00", "D"), ("#e69f00", "v"), ("#8c2d5e", "X"), ("#6b7280", "<"))
BLUE, ORANGE, GREY = OURS[0][0], OTHERS[0][0], "#9aa1ab"
TEXT, FAINT = "#374151", "#6b7280"
SECONDS_FROM = 2000  # milliseconds
WIDTH = 9.6  # inches
MARGIN = 0.012


class Picture(NamedTuple):
    """A picture that was made."""

    path: Path
    alt: str
    """What it shows, for who cannot see it."""


def make_figure(panels: int, height: float, title: str, subtitle: str) -> tuple[Any, list[Any]]:
    """A figure of panels side by side under a title and a line that says on what was measured; height in inches."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, panels, figsize=(WIDTH, height), dpi=150, layout="constrained", squeeze=False)
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.06, rect=(0, 0, 1, 1 - 0.5 / height))
    for text, size, color, inches in ((title, 11.5, "black", 0.12), (subtitle, 8.5, FAINT, 0.34)):
        figure.text(MARGIN, 1 - inches / height, text, fontsize=size, color=color, va="top")
    for panel in axes[0]:
        _plain(panel)
        panel.tick_params(labelsize=9)
    return figure, list(axes[0])


def save(figure: Any, path: Path) -> None:
    """As PNG; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _save(figure, path)


def slug(text: str) -> str:
    """A part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def with_arrows(text: str) -> str:
    """A group's name as a title shows it."""
    return text.replace("->", "→").replace("<-", "←")


def measured_on(suite: Suite, how: str) -> str:
    """A picture's second line."""
    return f"{suite.environment['device']}; {how}"


def style(palette: tuple[tuple[str, str], ...], place: int) -> dict[str, str]:
    """Colour and marker of the palette's ``place``-th curve."""
    color, marker = palette[place % len(palette)]
    return {"color": color, "marker": marker}
