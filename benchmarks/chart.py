"""Charts as SVG, written by hand: two kinds of them need no library."""

from __future__ import annotations

import math
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

WIDTH = 860
OURS = "#d62728"
COLOURS = ("#1f77b4", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b", "#7f7f7f", "#17becf", "#bcbd22")
SECOND = "#f29a9b"
DASHES = ("", "7 4", "2 3", "9 3 2 3")


def bars(
    path: Path,
    title: str,
    unit: str,
    groups: Mapping[str, Mapping[str, float]],
    *,
    limit: float = math.inf,
) -> None:
    """Draw a horizontal bar for each value, in groups; those above the limit are cut off."""
    left, row, top = 250, 20, 70
    highest = max((value for group in groups.values() for value in group.values()), default=1)
    scale = (WIDTH - left - 90) / max(min(highest, limit), 1e-9)
    lines = []
    y = top
    for group, values in groups.items():
        lines.append(_text(12, y + 14, group, weight="bold"))
        y += row
        for name, value in values.items():
            width = min(max(value, 0), limit) * scale
            lines.append(_text(left - 8, y + 14, name, anchor="end"))
            lines.append(
                f'<rect x="{left}" y="{y + 3}" width="{width:.1f}" height="{row - 6}" '
                f'fill="{_colour(name, 0)}"/>'
            )
            if value > limit:
                cut = left + width - 30
                lines.append(
                    f'<path d="M{cut} {y}l-6 {row}M{cut + 8} {y}l-6 {row}" stroke="white" '
                    'stroke-width="3"/>'
                )
            lines.append(_text(left + width + 6, y + 14, _number(value)))
            y += row
        y += 8
    _write(path, title, unit, lines, y + 10)


def lines(
    path: Path,
    title: str,
    unit: str,
    labels: Sequence[str],
    axis: str,
    series: Mapping[str, Sequence[float]],
) -> None:
    """Draw a line for each series over the labels."""
    left, right, top, height = 80, WIDTH - 360, 80, 300
    highest = _round_up(max(max(values) for values in series.values()))
    step = (right - left) / max(len(labels) - 1, 1)
    drawn = []
    for quarter in range(5):
        y = top + height - height * quarter / 4
        drawn.append(f'<path d="M{left} {y}H{right}" stroke="#ddd"/>')
        drawn.append(_text(left - 8, y + 4, _number(highest * quarter / 4), anchor="end"))
    for index, label in enumerate(labels):
        drawn.append(_text(left + index * step, top + height + 20, label, anchor="middle"))
    drawn.append(_text((left + right) / 2, top + height + 42, axis, anchor="middle"))
    others = 0
    for index, (name, values) in enumerate(series.items()):
        colour = _colour(name, others)
        dash = "" if _is_ours(name) else DASHES[others % len(DASHES)]
        others += not _is_ours(name)
        points = [
            f"{left + place * step:.1f} {top + height - height * value / highest:.1f}"
            for place, value in enumerate(values)
        ]
        width = 3 if _is_ours(name) else 1.8
        style = f'fill="none" stroke="{colour}" stroke-width="{width}" stroke-dasharray="{dash}"'
        drawn.append(f'<path d="M{" L".join(points)}" {style}/>')
        y = top + 10 + index * 24
        drawn.append(f'<path d="M{right + 20} {y}h30" {style}/>')
        drawn.append(_text(right + 58, y + 4, name))
    bottom = max(top + height + 60, top + 20 + len(series) * 24)
    _write(path, title, unit, drawn, bottom)


def _is_ours(name: str) -> bool:
    return name.startswith("wsgi_dbsession")


def _colour(name: str, index: int) -> str:
    if _is_ours(name):
        return SECOND if "," in name else OURS
    return COLOURS[index % len(COLOURS)]


def _round_up(value: float) -> float:
    """Return the next number that can be divided by four and read."""
    unit = 10.0 ** math.floor(math.log10(max(value, 1e-9)))
    steps = (1, 1.2, 1.6, 2, 2.4, 3.2, 4, 6, 8, 10)
    return next(step * unit for step in steps if step * unit >= value)


def _number(value: float) -> str:
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3g}"


def _text(x: float, y: float, text: str, *, anchor: str = "start", weight: str = "normal") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-weight="{weight}">'
        f"{escape(text)}</text>"
    )


def _write(path: Path, title: str, unit: str, drawn: list[str], height: float) -> None:
    start = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" '
        'font-family="Helvetica, Arial, sans-serif" font-size="13" fill="#222">'
    )
    head = [
        f'<rect width="{WIDTH}" height="{height:.0f}" fill="white"/>',
        f'<text x="12" y="28" font-size="18" font-weight="bold">{escape(title)}</text>',
        f'<text x="12" y="50" fill="#555">{escape(unit)}</text>',
    ]
    path.write_text("\n".join([start, *head, *drawn, "</svg>"]) + "\n")
