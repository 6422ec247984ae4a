"""The curves of a report page, as HTML and SVG in the page's own colours."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from itertools import pairwise
from typing import Any, NamedTuple, TypeAlias

import numpy as np

Values: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]
Series: TypeAlias = Mapping[str, tuple[Sequence[float], Sequence[float]]]
"""The x and the y values of each line, by its name."""

BUCKETS = 300
"""A longer series keeps the lowest and the highest value of each of so many buckets: about 600 points."""
HUES = 6
"""How many line colours the page has."""
MOST_TICKS = 7
"""An axis has at most about so many steps between its ticks."""
BOUNDLESS = 1e300
"""From here on a value counts as infinite: the length of an axis must be finite too."""


class Unit(NamedTuple):
    """How y values are written: multiplied by ``factor``, in this format, before this sign."""

    factor: float
    format: str
    sign: str

    def write(self, value: float) -> str:
        """Return a value that is already multiplied, as text."""
        return f"{value:{self.format}}{self.sign}"


PLAIN, PERCENT = Unit(1.0, ".4g", ""), Unit(100.0, ".1f", "%")


class Axis(NamedTuple):
    """The range of an axis and its ticks, as positions (0 to 1) and labels."""

    low: float
    high: float
    ticks: list[tuple[float, str]]

    def place(self, values: Values) -> Values:
        """Map values to positions along the axis."""
        return (values - self.low) / (self.high - self.low)


class Line(NamedTuple):
    """One series as float64 arrays, y NaN wherever x or y is not finite."""

    name: str
    x: Values
    y: Values

    def finite(self) -> tuple[Values, Values]:
        """Return the points that can be drawn."""
        mask = np.isfinite(self.y)
        return self.x[mask], self.y[mask]


def plot(x_label: str, y_label: str, series: Series, percent: bool) -> str:
    """Return a drawing of the lines as HTML; with ``percent``, y values are fractions that are written as percentages.

    Raises ValueError for a series with unequally many x and y values.
    """
    unit = PERCENT if percent else PLAIN
    lines = [_line(name, *xy, unit.factor) for name, xy in series.items()]
    drawn = [line.finite() for line in lines]
    if not any(len(x) for x, _ in drawn):
        return "<p>There is no finite value to draw.</p>"
    x_values = np.concatenate([x for x, _ in drawn])
    # There is no layer 1.5 and no half step.
    x_axis = _axis(x_values, widen=False, least=1.0 if (x_values == np.rint(x_values)).all() else 0.0)
    y_axis = _axis(np.concatenate([y for _, y in drawn]), widen=True)
    left = max(len(label + unit.sign) for _, label in y_axis.ticks) + 1.5
    right = max(len(label) for _, label in x_axis.ticks) / 2
    ticks = "".join(
        f'<span class="tick y" style="bottom: {100 * at:.2f}%">{label}{unit.sign}</span>' for at, label in y_axis.ticks
    )
    ticks += "".join(f'<span class="tick x" style="left: {100 * at:.2f}%">{label}</span>' for at, label in x_axis.ticks)
    grid = "".join(f"M0 {1000 * (1 - at):.1f}H1000" for at, _ in y_axis.ticks)
    paths = "".join(
        f'<path class="line" style="--hue: var(--s{i % HUES})" d="{_path(line, x_axis, y_axis)}"/>'
        for i, line in enumerate(lines)
    )
    spoken = escape(f"{y_label} against {x_label}. " + " ".join(_spoken(line, unit) for line in lines))
    keys = "".join(f'<span style="--hue: var(--s{i % HUES})">{_key(line, unit)}</span>' for i, line in enumerate(lines))
    # The labels are HTML over a stretched drawing: on a phone the drawing shrinks and the letters do not.
    drawing = f'<path class="grid" d="{grid}"/>{paths}'
    return (
        f'<figure style="--left: {left:.1f}ch; --right: {right:.1f}ch">\n'
        f'<div class="plot" role="img" aria-label="{spoken}"><span class="y-label">{escape(y_label)}</span>'
        f'<div class="area"><svg viewBox="0 0 1000 1000" preserveAspectRatio="none">{drawing}</svg>{ticks}</div>'
        f'<span class="x-label">{escape(x_label)}</span></div>\n'
        f'<figcaption class="legend">{keys}</figcaption></figure>'
    )


def _line(name: str, x: Sequence[float], y: Sequence[float], factor: float = 1.0) -> Line:
    if len(x) != len(y):
        raise ValueError(f"series {name!r} has {len(x)} x values and {len(y)} y values")
    xs, ys = np.asarray(x, dtype=np.float64), factor * np.asarray(y, dtype=np.float64)
    return Line(name, xs, np.where((np.abs(xs) < BOUNDLESS) & (np.abs(ys) < BOUNDLESS), ys, np.nan))


def _axis(values: Values, widen: bool, least: float = 0.0) -> Axis:
    """Choose round ticks, at least ``least`` apart, for the values' range; ``widen`` stretches it to the next ticks."""
    low, high = float(values.min()), float(values.max())
    largest = max(-low, high, 1e-300)
    if high - low <= 1e-9 * largest:
        margin = largest / 10 if largest > 1e-300 else 0.5
        low, high = low - margin, high + margin
    power = 10.0 ** math.floor(math.log10((high - low) / MOST_TICKS))
    step = next(step for factor in (1, 2, 5, 10, 20) if (step := factor * power) >= (high - low) / MOST_TICKS)
    step = max(step, least)
    # The slack keeps a range that ends at a tick, but for rounding, at that tick.
    first, last = low / step + 1e-9, high / step - 1e-9
    if widen:
        first, last = math.floor(first), math.ceil(last)
        low, high = first * step, last * step
    numbers = [i * step for i in range(math.ceil(first - 2e-9), math.floor(last + 2e-9) + 1)]
    return Axis(low, high, [((number - low) / (high - low), _label(number, step)) for number in numbers])


def _label(number: float, step: float) -> str:
    if not 1e-4 <= step < 1e6:
        return f"{number:.6g}"
    if step >= 1000 and number:
        return f"{number / 1000:,.0f}k"
    return f"{number:,.{max(0, -math.floor(math.log10(step)))}f}"


def _thin(line: Line) -> Line:
    """Keep the lowest, the highest and the first missing value of each bucket: spikes and gaps stay visible."""
    count = len(line.y)
    if count <= 2 * BUCKETS:
        return line
    kept = {0, count - 1}
    for start, stop in pairwise(np.linspace(0, count, BUCKETS + 1).astype(int).tolist()):
        part = line.y[start:stop]
        missing = np.isnan(part)
        if not missing.all():
            kept |= {start + int(np.nanargmin(part)), start + int(np.nanargmax(part))}
        if missing.any():
            kept.add(start + int(missing.argmax()))
    index = sorted(kept)
    return Line(line.name, line.x[index], line.y[index])


def _path(line: Line, x_axis: Axis, y_axis: Axis) -> str:
    """Return the path data, with the pen lifted at missing values."""
    thin = _thin(line)
    parts, down = [], False
    for x, y in zip(1000 * x_axis.place(thin.x), 1000 * (1 - y_axis.place(thin.y)), strict=True):
        if math.isnan(y):
            down = False
            continue
        # The segment of length zero makes a point without neighbours a dot.
        parts.append(f"L{x:.1f} {y:.1f}" if down else f"M{x:.1f} {y:.1f}h0")
        down = True
    return "".join(parts)


def _key(line: Line, unit: Unit) -> str:
    y = line.finite()[1]
    ending = f"{unit.write(y[-1])} at the end" if len(y) else "no value"
    missing = len(line.y) - len(y)
    gaps = f", {missing:,} not finite" if missing else ""
    return f"<i></i>{escape(line.name)}<small>{ending}{gaps}</small>"


def _spoken(line: Line, unit: Unit) -> str:
    x, y = line.finite()
    if not len(y):
        return f"{line.name}: no value."
    ends = f"{unit.write(y[0])} at {x[0]:.6g}, {unit.write(y[-1])} at {x[-1]:.6g}"
    return f"{line.name}: {ends}, lowest {unit.write(y.min())}, highest {unit.write(y.max())}."
