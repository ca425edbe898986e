"""Bars as SVG, written by hand: the same text from the same numbers on every machine, so that a test sees it drift.

A picture is two files, for pages in dark letters and in light ones. Every bar carries its name and its number, so it
needs no legend, no grid and no scale.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

WIDTH, BARS_FROM, BARS_TO = 860, 250, 700  # pixels; names stand before the bars, numbers behind them
LINE, GAP, TOP = 22, 14, 64  # from bar to bar, between groups, above the first
FONT = "-apple-system, 'Segoe UI', Helvetica, Arial, sans-serif"


@dataclass(frozen=True)
class Bar:
    name: str
    length: float  # of each part
    label: str  # behind the bar
    kind: str  # ours, theirs, or quoted: of somebody's documentation
    parts: int = 1  # of one length, end to end


@dataclass(frozen=True)
class Palette:
    """Colours of letters and of bars; what is quoted is an outline in the colour of theirs."""

    letters: str
    faint: str
    ours: str
    theirs: str


PALETTES = {
    "": Palette("#1f2328", "#59636e", "#0b6e4f", "#9aa4ae"),
    "-dark": Palette("#f0f6fc", "#9198a1", "#3fb68b", "#6e7681"),
}


def files(file: Path, title: str, scale: str, groups: dict[str, list[Bar]]) -> dict[Path, str]:
    """A picture's files, beside a result's, and what they hold."""
    return {
        file.with_name(f"{file.stem}{suffix}.svg"): svg(title, scale, groups, palette)
        for suffix, palette in PALETTES.items()
    }


def markdown(source: str, description: str) -> str:
    """Both files; GitHub shows the one for the reader's theme. `source` is the light one's address, without .svg."""
    return (
        f'<picture>\n<source media="(prefers-color-scheme: dark)" srcset="{source}-dark.svg">\n'
        f'<img alt="{escape(description)}" src="{source}.svg">\n</picture>'
    )


def svg(title: str, scale: str, groups: dict[str, list[Bar]], palette: Palette) -> str:
    """Groups of bars below each other; `scale` says what a bar's length is."""
    longest = max((bar.parts * bar.length for bars in groups.values() for bar in bars), default=0) or 1
    lines, y = [_text(16, 26, title, palette.letters, 16, bold=True), _text(16, 46, scale, palette.faint)], TOP
    for name, bars in groups.items():
        lines.append(_text(16, y + 15, name, palette.letters, 14, bold=True))
        for bar in bars:
            lines += _bar(bar, y, longest, palette)
            y += LINE
        y += GAP
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y}" width="{WIDTH}" height="{y}"'
    return "\n".join([f'{head} font-family="{FONT}" role="img">', *lines, "</svg>"]) + "\n"


def _bar(bar: Bar, y: int, longest: float, palette: Palette) -> list[str]:
    width = max(2, round((BARS_TO - BARS_FROM) * bar.length / longest)) if bar.length else 0
    colour = palette.ours if bar.kind == "ours" else palette.theirs
    style = f'fill="none" stroke="{colour}" stroke-dasharray="3 2"' if bar.kind == "quoted" else f'fill="{colour}"'
    letters = palette.letters if bar.kind == "ours" else palette.faint
    seam = 1 if bar.parts > 1 else 0  # a pixel without ink, so that parts can be told apart
    return [
        _text(BARS_FROM - 8, y + 15, bar.name, letters, anchor="end"),
        *(
            f'<rect x="{BARS_FROM + part * width}" y="{y + 3}" width="{width - seam}" height="{LINE - 6}" {style}/>'
            for part in range(bar.parts if width else 0)
        ),
        _text(BARS_FROM + bar.parts * width + 7, y + 15, bar.label, letters, bold=bar.kind == "ours"),
    ]


def _text(x: int, y: int, text: str, colour: str, size: int = 13, anchor: str = "start", bold: bool = False) -> str:
    weight = ' font-weight="600"' if bold else ""
    return (
        f'<text x="{x}" y="{y}" font-size="{size}" fill="{colour}" text-anchor="{anchor}"{weight}>{escape(text)}</text>'
    )
