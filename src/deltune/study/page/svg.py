"""A small writer of SVG charts that follow the page's colours and stay legible on a phone."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape

WIDTH, HEIGHT = 470, 330
LEFT, RIGHT, TOP, BOTTOM = 44, 134, 14, 40
LABEL = 12.5
"""Height of a line of labels."""
BAR, STEPS = 12.0, 10
"""The colour scale: pixels of its width, and its boxes."""


@dataclass(frozen=True, slots=True)
class Series:
    """One method in a chart: its slot in the palette, and its points (x, y)."""

    name: str
    slot: int
    dashed: bool
    points: tuple[tuple[float, float], ...]
    bars: tuple[float | None, ...] = ()
    """Half lengths of error bars, one per point."""


@dataclass(frozen=True, slots=True)
class Axis:
    """A range of values laid over a range of pixels."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        """The pixel of a value."""
        low, high = self._scale(self.low), self._scale(self.high)
        share = (self._scale(value) - low) / ((high - low) or 1.0)
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round values inside the range, about five."""
        if self.log:
            first, last = math.floor(math.log10(self.low)), math.floor(math.log10(self.high))
            wide = math.log10(self.high / self.low) >= 2
            steps = (1,) if wide else (1, 2, 5)
            ticks = [step * 10.0**power for power in range(first, last + 1) for step in steps]
            return [value for value in ticks if self.low <= value <= self.high]
        step = _round_step((self.high - self.low) / 5)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [index * step for index in range(first, last + 1)]

    def _scale(self, value: float) -> float:
        return math.log10(value) if self.log else value


@dataclass(slots=True)
class Canvas:
    """Elements of one SVG picture, in drawing order."""

    title: str
    width: float = WIDTH
    height: float = HEIGHT
    parts: list[str] = field(default_factory=list)

    def line(self, x1: float, y1: float, x2: float, y2: float, css: str) -> None:
        """A straight line."""
        self.parts.append(
            f'<line class="{css}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'
        )

    def text(self, x: float, y: float, words: str, css: str = "", anchor: str = "start") -> None:
        """A line of text."""
        self.parts.append(
            f'<text class="{css}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">'
            f"{escape(words)}</text>"
        )

    def path(self, points: Sequence[tuple[float, float]], css: str) -> None:
        """A line through points."""
        steps = " L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        self.parts.append(f'<path class="{css}" d="M{steps}"/>')

    def dot(self, x: float, y: float, css: str, title: str, radius: float = 3.2) -> None:
        """A point that says its values."""
        self.parts.append(
            f'<circle class="{css}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}">'
            f"<title>{escape(title)}</title></circle>"
        )

    def box(self, x: float, y: float, width: float, height: float, css: str, title: str) -> None:
        """A bar that says its value."""
        self.parts.append(
            f'<rect class="{css}" x="{x:.1f}" y="{y:.1f}" width="{max(0.0, width):.1f}" '
            f'height="{height:.1f}" rx="2"><title>{escape(title)}</title></rect>'
        )

    def slanted(self, x: float, y: float, words: str, css: str, degrees: int = 45) -> None:
        """A line of text that rises to the right."""
        self.parts.append(
            f'<text class="{css}" transform="translate({x:.1f} {y:.1f}) rotate(-{degrees})">'
            f"{escape(words)}</text>"
        )

    def heat(
        self, x: float, y: float, side: float, value: float | None, words: str, title: str,
        *, tall: float | None = None,
    ) -> None:  # fmt: skip
        """A square, or a box that is `tall`, whose colour tells a value from 0 to 1, with its words
        inside."""
        tall = side if tall is None else tall
        strength = 0.0 if value is None else min(1.0, max(0.0, value))
        self.parts.append(
            f'<g class="heat{" strong" if strength > 0.6 else ""}" style="--v:{strength:.3f}">'
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{side:.1f}" height="{tall:.1f}" rx="2">'
            f"<title>{escape(title)}</title></rect>"
            f'<text x="{x + side / 2:.1f}" y="{y + tall / 2 + 4:.1f}" text-anchor="middle">'
            f"{escape(words)}</text></g>"
        )

    def begin(self, name: str) -> None:
        """Opens the group of one method, which the page can highlight."""
        self.parts.append(f'<g class="m" data-m="{escape(name, quote=True)}">')

    def end(self) -> None:
        """Closes the group."""
        self.parts.append("</g>")

    def render(self) -> str:
        """The picture as an inline element."""
        return (
            f'<svg viewBox="0 0 {self.width:.0f} {self.height:.0f}" role="img" '
            f'aria-label="{escape(self.title, quote=True)}">' + "".join(self.parts) + "</svg>"
        )


def frame(canvas: Canvas, x: Axis, y: Axis, x_name: str, y_name: str) -> None:
    """Axes with their ticks, grid lines and names."""
    for value in y.ticks():
        canvas.line(x.start, y.at(value), x.end, y.at(value), "grid")
        canvas.text(x.start - 6, y.at(value) + 4, tick(value), "tick", "end")
    for value in x.ticks():
        canvas.line(x.at(value), y.start, x.at(value), y.start + 4, "axis")
        canvas.text(x.at(value), y.start + 17, tick(value), "tick", "middle")
    canvas.line(x.start, y.start, x.end, y.start, "axis")
    canvas.text((x.start + x.end) / 2, canvas.height - 5, x_name, "name", "middle")
    canvas.text(4, y.end - 4, y_name, "name")


def colours(
    canvas: Canvas, scale: Axis, left: float, top: float, tall: float, words: Callable[[float], str]
) -> Axis:
    """What the colours of a heat map mean, as a bar with ticks; returns the bar's axis.

    Args:
        canvas: that the map is on.
        scale: value -> strength of the colour, from 0 to 1.
        left: of the bar, in pixels.
        top: of it.
        tall: its height.
        words: what a tick says of its value.
    """
    up, step = Axis(scale.low, scale.high, top + tall, top), tall / STEPS
    for number in range(STEPS):
        canvas.heat(left, top + tall - (number + 1) * step, BAR, (number + 0.5) / STEPS, "", "",
                    tall=step)  # fmt: skip
    for value in up.ticks():
        canvas.line(left + BAR, up.at(value), left + BAR + 4, up.at(value), "axis")
        canvas.text(left + BAR + 6, up.at(value) + 4, words(value), "tick")
    return up


def tick(value: float) -> str:
    """A tick's label."""
    if abs(value) >= 1e9:
        return f"{value / 1e9:g}G"
    if abs(value) >= 1e6:
        return f"{value / 1e6:g}M"
    if abs(value) >= 1e4:
        return f"{value / 1e3:g}k"
    return f"{round(value, 6):g}"


def css_of(series: Series, part: str) -> str:
    """The classes of a method's line, dot or label."""
    return f"{part} s{series.slot}" + (" dashed" if series.dashed else "")


def spaced(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions near the wanted ones, in their order, at least `gap` apart and inside the range."""
    order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    gap = min(gap, (high - low) / max(1, len(wanted) - 1))
    placed = [0.0] * len(wanted)
    for rank, index in enumerate(order):
        floor = low if rank == 0 else placed[order[rank - 1]] + gap
        placed[index] = max(floor, wanted[index])
    ceiling = high
    for index in reversed(order):
        placed[index] = min(placed[index], ceiling)
        ceiling = placed[index] - gap
    return placed


def covering(values: Sequence[float], share: float = 0.06) -> tuple[float, float]:
    """A range with a little air around the values."""
    low, high = min(values), max(values)
    air = share * ((high - low) or abs(high) or 1.0)
    return low - air, high + air


def _round_step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough or 1.0))
    return next(power * step for step in (1, 2, 2.5, 5, 10) if power * step >= rough * 0.999)
