"""The neurons of a fact as a picture: attribution by layers, in the terminal and as PNG."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from easyeditor.cli.heatmap import need_plots, shortened

if TYPE_CHECKING:
    from easyeditor.core.neurons import Attribution, Chosen

COLOUR = (8, 81, 156)
STRONGEST = 20  # neurons of a layer that the picture shows
NAMED = 3  # neurons of a layer that the terminal names
BAR = 24  # characters of the longest bar


@dataclass(frozen=True)
class Layer:
    """What one layer does for an answer.

    Args:
        index: Which layer.
        total: The sum of the scores of its neurons.
        count: How many of its neurons were chosen.
        strongest: Its neurons with the largest scores, and the scores.
    """

    index: int
    total: float
    count: int
    strongest: list[tuple[int, float]]


def layers_of(found: Attribution, chosen: Chosen) -> list[Layer]:
    """The layers of an attribution."""
    out = []
    for index, (scores, mine) in enumerate(zip(found.scores, chosen, strict=True)):
        top = scores.topk(min(STRONGEST, len(scores)))
        pairs = [(int(i), float(v)) for v, i in zip(top.values, top.indices, strict=True)]
        out.append(Layer(index, float(scores.sum()), int(mine.sum()), pairs))
    return out


def draw(console: Console, layers: Sequence[Layer]) -> None:
    """Draw a line per layer: its attribution as a number and a bar, its chosen neurons, its strongest ones.

    Args:
        console: Where to; one without colours gets plain letters.
        layers: The layers.
    """
    console.print()
    console.print(Text("layer  attribution".ljust(20) + " ".ljust(BAR + 2) + "neurons  strongest", style="bold"))
    most = max(max(layer.total for layer in layers), 1e-9)
    coloured = console.is_terminal and console.color_system is not None and not console.no_color
    for layer in layers:
        filled = round(BAR * max(layer.total, 0.0) / most)
        line = Text(f"{layer.index:5d}  {layer.total:+11.3f}  ")
        line.append("#" * filled, f"rgb({','.join(map(str, COLOUR))})" if coloured else "")
        named = ", ".join(f"{i} ({score:+.3f})" for i, score in layer.strongest[:NAMED])
        line.append(" " * (BAR + 2 - filled) + f"{layer.count:7d}  {named}")
        console.print(line, no_wrap=True, crop=True)


def summary(layers: Sequence[Layer], threshold: float) -> Iterator[str]:
    """How many neurons were chosen, and where."""
    count = sum(layer.count for layer in layers)
    where = ", ".join(f"{layer.count} in layer {layer.index}" for layer in layers if layer.count)
    yield f"{count} neurons above {threshold:.0%} of the largest attribution: {where or 'none'}."


def save(layers: Sequence[Layer], path: Path, title: str) -> None:
    """Draw into a PNG file: the strongest neurons of each layer as a map, and how many neurons it has as bars.

    Args:
        layers: The layers.
        path: The file; what stood there is replaced when the new one is complete.
        title: What stands above.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    need_plots()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, max(2.6, 0.24 * len(layers) + 1.7)), dpi=160)
    figure.set_layout_engine("constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 1))
    values = [[score for _, score in layer.strongest] for layer in layers]
    width = max(map(len, values))
    grid = [row + [0.0] * (width - len(row)) for row in values]
    image = left.imshow(grid, cmap="Blues", vmin=0.0, aspect="auto", interpolation="nearest")
    left.set_title(f"the {width} strongest neurons of each layer", fontsize=9)
    left.set_xlabel("rank in the layer", fontsize=9)
    left.set_ylabel("layer", fontsize=9)
    bar = figure.colorbar(image, ax=left, shrink=0.9)
    bar.set_label("attribution", fontsize=8)
    right.barh([layer.index for layer in layers], [layer.count for layer in layers], color=[c / 255 for c in COLOUR])
    right.set_title("neurons of the fact", fontsize=9)
    for axis in (left.xaxis, left.yaxis, right.xaxis):
        axis.get_major_locator().set_params(integer=True)
    for place in (left, right, bar.ax):
        place.tick_params(labelsize=8)
    figure.suptitle(shortened(title, 90), fontsize=10).set_parse_math(False)  # a dollar in a prompt is a dollar
    temporary = path.with_name(f".{path.name}.partial")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a box stands for a letter that the font lacks
        figure.savefig(temporary, format="png")
    temporary.replace(path)
