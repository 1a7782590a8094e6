"""Lines over time as an SVG picture, written by hand: a plot is no reason to need a plotting library."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_COLORS = ("#c0392b", "#2471a3", "#1e8449", "#b9770e", "#7d3c98", "#117a65", "#5d6d7e", "#a04000")
_WIDTH, _HEIGHT = 380, 240
"""Of a panel's drawing."""
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 14, 30, 38
_LEGEND = 20
"""Height of a row of it."""


@dataclass(frozen=True)
class Panel:
    """One set of axes."""

    title: str
    lines: Sequence[tuple[str, Sequence[tuple[float, float]]]]
    """(name, points by time). A name has the same colour in all panels."""


def svg(panels: Sequence[Panel], across: str, up: str) -> str:
    """Panels side by side, all with the same scale. `across` and `up` say what the axes are."""
    points = [point for panel in panels for _, line in panel.lines for point in line]
    right = max((x for x, _ in points), default=1.0) or 1.0
    top = max((y for _, y in points), default=1.0) or 1.0
    names = list(dict.fromkeys(name for panel in panels for name, _ in panel.lines))
    step = _LEFT + _WIDTH + _RIGHT
    width, height = step * len(panels), _TOP + _HEIGHT + _BOTTOM + _LEGEND * math.ceil(len(names) / 4)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" font-family="sans-serif" font-size="12" fill="#333">',
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
    ]
    for i, panel in enumerate(panels):
        parts.append(f'<g transform="translate({i * step + _LEFT},{_TOP})">')
        parts += _axes(panel.title, right, top, across, up if i == 0 else "")
        parts += [_line(line, right, top, _color(names, name)) for name, line in panel.lines]
        parts.append("</g>")
    for i, name in enumerate(names):
        x, y = _LEFT + i % 4 * (width - _LEFT) // 4, _TOP + _HEIGHT + _BOTTOM + i // 4 * _LEGEND
        parts.append(f'<rect x="{x}" y="{y}" width="18" height="4" fill="{_color(names, name)}"/>')
        parts.append(f'<text x="{x + 24}" y="{y + 7}">{escape(name)}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _color(names: Sequence[str], name: str) -> str:
    return _COLORS[names.index(name) % len(_COLORS)]


def _axes(title: str, right: float, top: float, across: str, up: str) -> list[str]:
    parts = [
        f'<text x="{_WIDTH / 2}" y="-12" text-anchor="middle" font-size="14">{escape(title)}</text>',
        f'<text x="{_WIDTH / 2}" y="{_HEIGHT + 32}" text-anchor="middle">{escape(across)}</text>',
        f'<text transform="translate(-38,{_HEIGHT / 2}) rotate(-90)" text-anchor="middle">'
        f"{escape(up)}</text>",
    ]
    for tick in _ticks(top):
        y = _HEIGHT * (1 - tick / top)
        parts.append(f'<path d="M0 {y:.1f}H{_WIDTH}" stroke="#ddd"/>')
        parts.append(f'<text x="-6" y="{y + 4:.1f}" text-anchor="end" font-size="11">{_short(tick)}</text>')
    for tick in _ticks(right):
        x = _WIDTH * tick / right
        parts.append(f'<text x="{x:.1f}" y="{_HEIGHT + 16}" text-anchor="middle">{_short(tick)}</text>')
    parts.append(f'<path d="M0 0V{_HEIGHT}H{_WIDTH}" fill="none" stroke="#333"/>')
    return parts


def _line(line: Sequence[tuple[float, float]], right: float, top: float, color: str) -> str:
    points = " ".join(f"{_WIDTH * x / right:.1f},{_HEIGHT * (1 - y / top):.1f}" for x, y in line)
    return f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="2"/>'


def _ticks(most: float) -> list[float]:
    """About five round numbers from 0 on."""
    power = 10.0 ** math.floor(math.log10(most))
    step = next(power * part for part in (0.1, 0.2, 0.25, 0.5, 1.0, 2.0) if most <= 5.5 * power * part)
    return [step * i for i in range(int(most / step) + 1)]


def _short(value: float) -> str:
    return f"{value / 1000:g}k" if value >= 1000 else f"{value:g}"
