"""Plots as SVG texts: few lines of our own, so that a page needs nothing else. Colours come from the page's styles."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, LEFT, TOP, BOTTOM = 640, 190, 14, 44
TICKS = (0.0, 0.25, 0.5, 0.75, 1.0)
HUES = 10  # colours that the page's styles have
LABEL, TURN = 15, 6.2  # the height of a label, and the width of one of its letters


@dataclass(frozen=True)
class Dot:
    """A row in `scatter`: its name, the place of its colour, and its numbers, each between 0 and 1."""

    name: str
    hue: int
    x: float
    y: float
    below: float | None = None


@dataclass(frozen=True)
class Track:
    """A row in `lines`: its name, the place of its colour, and its points, y between 0 and 1."""

    name: str
    hue: int
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Bar:
    """A row in `bars`: its name, and its parts with their sizes."""

    name: str
    parts: Sequence[tuple[str, float]]


@dataclass(frozen=True)
class Pair:
    """A row in `pairs`: its name, the place of its colour, and two numbers between 0 and 1."""

    name: str
    hue: int
    first: float
    last: float


def scatter(dots: Sequence[Dot], x: str, y: str, below: str) -> str:
    """One dot to a row, with a small ring where its second number is.

    Args:
        dots: The rows.
        x: What the horizontal axis is.
        y: What the dot's height is.
        below: What the ring's height is.
    """
    left, right, height = 60, _room(dot.name for dot in dots), 420
    wide, tall = WIDTH - left - right, height - TOP - BOTTOM

    def place(u: float, v: float) -> tuple[float, float]:
        return left + u * wide, TOP + (1 - v) * tall

    parts = []
    for tick in TICKS:
        (px, py), (qx, _) = place(tick, tick), place(1, tick)
        parts.append(_line(left, py, qx, py, "grid") + _text(left - 8, py + 4, f"{tick:g}", "end"))
        parts.append(_line(px, TOP, px, TOP + tall, "grid") + _text(px, TOP + tall + 18, f"{tick:g}", "middle"))
    parts.append(_text(left + wide / 2, height - 6, x, "middle"))
    parts.append(_text(14, TOP + tall / 2, f"{y}; ring: {below}", "middle", turned=True))
    heights = _apart([place(dot.x, dot.y)[1] + 4 for dot in dots], TOP + tall + 12)
    for dot, label in zip(dots, heights, strict=True):
        px, py = place(dot.x, dot.y)
        if dot.below is not None:
            _, ring = place(dot.x, dot.below)
            parts.append(_line(px, py, px, ring, f"stroke{dot.hue % HUES}"))
            parts.append(f'<circle cx="{px:.1f}" cy="{ring:.1f}" r="4" class="ring stroke{dot.hue % HUES}"/>')
        parts.append(f'<circle cx="{px:.1f}" cy="{py:.1f}" r="6" class="fill{dot.hue % HUES}"/>')
        parts.append(_line(px + 8, py, left + wide + 14, label - 4, "leader"))
        parts.append(_text(left + wide + 18, label, dot.name, "start", f"fill{dot.hue % HUES}"))
    return _svg(height, parts, f"{y} against {x}")


def lines(tracks: Sequence[Track], x: str, y: str) -> str:
    """One line to a row, with its name at the end.

    Args:
        tracks: The rows; each has a point or more.
        x: What the horizontal axis is.
        y: What the vertical axis is.
    """
    left, right, height = 60, _room(track.name for track in tracks), 360
    wide, tall = WIDTH - left - right, height - TOP - BOTTOM
    most = max(p for track in tracks for p, _ in track.points)
    parts = []
    for tick in TICKS:
        py = TOP + (1 - tick) * tall
        parts.append(_line(left, py, left + wide, py, "grid") + _text(left - 8, py + 4, f"{tick:g}", "end"))
    for value in sorted({p for track in tracks for p, _ in track.points}):
        parts.append(_text(left + value / most * wide, TOP + tall + 18, f"{value:g}", "middle"))
    parts.append(_text(left + wide / 2, height - 6, x, "middle"))
    parts.append(_text(14, TOP + tall / 2, y, "middle", turned=True))
    heights = _apart([TOP + (1 - track.points[-1][1]) * tall + 4 for track in tracks], TOP + tall + 12)
    for track, label in zip(tracks, heights, strict=True):
        hue = track.hue % HUES
        places = [(left + p / most * wide, TOP + (1 - v) * tall) for p, v in track.points]
        path = " ".join(f"{px:.1f},{py:.1f}" for px, py in places)
        parts.append(f'<polyline points="{path}" class="track stroke{hue}"/>')
        parts += [f'<circle cx="{px:.1f}" cy="{py:.1f}" r="3.5" class="fill{hue}"/>' for px, py in places]
        parts.append(_line(places[-1][0] + 5, places[-1][1], left + wide + 14, label - 4, "leader"))
        parts.append(_text(left + wide + 18, label, track.name, "start", f"fill{hue}"))
    return _svg(height, parts, f"{y} over {x}")


def bars(rows: Sequence[Bar], unit: str) -> str:
    """One bar to a row, made of its parts, with the sum at its end.

    Args:
        rows: The rows.
        unit: What the sum is in.
    """
    known = {name for row in rows for name, value in row.parts if value > 0}
    names = [name for name in dict.fromkeys(name for row in rows for name, _ in row.parts) if name in known]
    most = max((sum(value for _, value in row.parts) for row in rows), default=0.0) or 1.0
    several, step = len(names) > 1, 26
    wide = WIDTH - LEFT - 90
    parts = []
    for i, row in enumerate(rows):
        at, y = float(LEFT), TOP + i * step
        parts.append(_text(LEFT - 8, y + 14, row.name, "end"))
        for name, value in row.parts:
            if value > 0:
                length = value / most * wide
                hint = f"<title>{escape(name)}: {value:.4g} {escape(unit)}</title>"
                hue = names.index(name) % HUES
                parts.append(
                    f'<rect x="{at:.1f}" y="{y}" width="{length:.1f}" height="18" class="fill{hue}">{hint}</rect>'
                )
                at += length
        parts.append(_text(at + 6, y + 14, f"{sum(value for _, value in row.parts):.3g} {unit}", "start"))
    bottom = TOP + len(rows) * step + 10
    if several:
        at = float(LEFT)
        for i, name in enumerate(names):
            parts.append(f'<rect x="{at:.1f}" y="{bottom}" width="12" height="12" class="fill{i % HUES}"/>')
            parts.append(_text(at + 17, bottom + 11, name, "start"))
            at += 32 + TURN * len(name) * 1.1
    return _svg(bottom + (26 if several else 4), parts, unit)


def pairs(rows: Sequence[Pair], first: str, last: str) -> str:
    """Two marks to a row: a ring and a dot.

    Args:
        rows: The rows.
        first: What the ring is.
        last: What the dot is.
    """
    step, wide = 26, WIDTH - LEFT - 40
    bottom = TOP + len(rows) * step
    parts = []
    for tick in TICKS:
        px = LEFT + tick * wide
        parts.append(_line(px, TOP, px, bottom, "grid") + _text(px, bottom + 16, f"{tick:g}", "middle"))
    for i, row in enumerate(rows):
        y, hue = TOP + i * step + 12, row.hue % HUES
        a, b = LEFT + row.first * wide, LEFT + row.last * wide
        parts.append(_text(LEFT - 8, y + 4, row.name, "end") + _line(a, y, b, y, f"stroke{hue}"))
        parts.append(f'<circle cx="{b:.1f}" cy="{y}" r="5" class="fill{hue}"/>')
        parts.append(f'<circle cx="{a:.1f}" cy="{y}" r="6.5" class="hollow stroke{hue}"/>')
    parts.append(_text(LEFT + wide / 2, bottom + 36, f"ring: {first}; dot: {last}", "middle"))
    return _svg(bottom + 46, parts, f"{first} and {last}")


def _room(names: Iterable[str]) -> float:
    """How much of the width the labels at the right take."""
    return 26 + TURN * max(map(len, names), default=0)


def _apart(heights: Sequence[float], lowest: float) -> list[float]:
    """Heights of labels, moved down as far as they would stand on each other, and up again from the lowest place."""
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    out, last = list(heights), float("-inf")
    for i in order:
        last = out[i] = max(out[i], last + LABEL)
    last = lowest + LABEL
    for i in reversed(order):
        last = out[i] = min(out[i], last - LABEL)
    return out


def _text(x: float, y: float, text: str, anchor: str, style: str = "", turned: bool = False) -> str:
    turn = f' transform="rotate(-90 {x:.1f} {y:.1f})"' if turned else ""
    named = f' class="{style}"' if style else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{named}{turn}>{escape(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, style: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{style}"/>'


def _svg(height: float, parts: Iterable[str], about: str) -> str:
    head = f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(about)}">'
    return head + "".join(parts) + "</svg>"
