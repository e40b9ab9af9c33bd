"""Figures of certified accuracy, attacks and training (extra `lipnext[report]`): for files and for the audit's page.

Curves of accuracy are exact steps: an accuracy at radius r counts what is right with a radius (or attack distance) above r.
"""

import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lipnext.core.errors import ConfigError
from lipnext.core.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#2767a9", "#b8531a", "#2f7d4f", "#8a4f9e", "#8c6d1f", "#3c8a93", "#a8405c", "#5b6470")
INK, FAINT, LINES, PAPER = "#1d232a", "#5a6470", "#d5dae0", "#ffffff"
NAMES = {colour: f"--c{k}" for k, colour in enumerate(COLOURS)} | {
    INK: "--ink",
    FAINT: "--faint",
    LINES: "--lines",
    PAPER: "--paper",
}
"""By these names a page gives the colours of an inline figure anew, such as in the dark."""
TICKS = {"l2": 36, "linf": 1}
"""Ticks are at multiples of so many grey levels, doubled until a few are left."""
LEFT_OVER = 0.005
"""A curve is drawn to where its accuracy falls below this."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Curve:
    """An accuracy against radius, constant between its points.

    Attributes:
        name: for the legend.
        radius: float64 (m,), rising, in pixel units of images in [0, 1].
        accuracy: float64 (m,), from `radius[k]` on up to `radius[k + 1]`.
        norm: "l2" or "linf".
        kind: "deterministic" or "probabilistic".
        dashed: for a reference.
        colour: a number; None takes the next.
    """

    name: str
    radius: np.ndarray
    accuracy: np.ndarray
    norm: str
    kind: str = "deterministic"
    dashed: bool = False
    colour: int | None = None


def exact_curve(
    name: str, radii: np.ndarray, right: np.ndarray, norm: str, kind: str = "deterministic"
) -> Curve:
    """Return the share that is right with a value above r, as a curve over r from 0.

    Args:
        name: for the legend.
        radii: float64 (n,), n >= 1, radii or attack distances, at least 0; inf is above every r.
        right: bool (n,).
        norm: "l2" or "linf".
        kind: "deterministic" or "probabilistic".
    """
    values = np.sort(radii[right])
    places = np.unique(np.concatenate([[0.0], values[np.isfinite(values)]]))
    above = len(values) - np.searchsorted(values, places, side="right")
    return Curve(name=name, radius=places, accuracy=above / len(radii), norm=norm, kind=kind)


def certified_accuracy(curves: Sequence[Curve]) -> "Figure":
    """Draw certified accuracy against radius, one curve a model.

    Raises:
        ConfigError: where there is no curve, norms or kinds are mixed, or matplotlib is not installed.
    """
    if not curves:
        raise ConfigError("a figure needs at least one curve")
    first = curves[0]
    for name in ("norm", "kind"):
        for curve in curves:
            if getattr(curve, name) != getattr(first, name):
                raise ConfigError(
                    f"{first.name} is {getattr(first, name)} and {curve.name} is {getattr(curve, name)}; "
                    f"radii of another {name} cannot be compared, draw them apart"
                )
    with _style():
        figure, (axes,) = _figure(1, (6.4, 4.6))
        for k, curve in enumerate(curves):
            axes.plot(
                curve.radius,
                curve.accuracy,
                "--" if curve.dashed else "-",
                drawstyle="steps-post",
                color=COLOURS[(k if curve.colour is None else curve.colour) % len(COLOURS)],
                alpha=0.65 if curve.dashed else 1.0,
                label=curve.name,
            )
        _radius_axis(axes, first.norm, max(_end(curve) for curve in curves))
        axes.set(ylabel="certified accuracy", ylim=(0, 1))
        figure.legend(loc="outside lower center", ncols=2)
    return figure


def audited_accuracy(
    whole: Curve, certified: Curve, attacked: Curve | None, marks: Mapping[float, float]
) -> "Figure":
    """Draw what is certified of the whole test part, and of the samples the band in which the truth lies.

    Args:
        whole: certified, of the test part.
        certified: of the samples.
        attacked: of the samples; None where no attack searched for the smallest change.
        marks: attacked accuracy by radius of the balls that were attacked.
    """
    with _style():
        figure, (axes,) = _figure(1, (5.0, 3.3))
        if attacked is not None:
            grid = np.union1d(certified.radius, attacked.radius)
            lower, upper = (_at(curve, grid) for curve in (certified, attacked))
            axes.fill_between(grid, lower, upper, step="post", color=COLOURS[1], alpha=0.12, linewidth=0)
            axes.plot(
                attacked.radius,
                attacked.accuracy,
                color=COLOURS[1],
                label=attacked.name,
                drawstyle="steps-post",
            )
        axes.plot(
            list(marks), list(marks.values()), "o", color=COLOURS[1], label="attacked within eps, samples"
        )
        axes.plot(
            certified.radius,
            certified.accuracy,
            color=COLOURS[0],
            label=certified.name,
            drawstyle="steps-post",
        )
        axes.plot(
            whole.radius, whole.accuracy, color=INK, label=whole.name, linewidth=1.1, drawstyle="steps-post"
        )
        ends = [_end(curve) for curve in (whole, certified, attacked) if curve is not None]
        _radius_axis(axes, whole.norm, max(ends))
        axes.set(ylabel="accuracy", ylim=(0, 1))
        axes.legend()
    return figure


def attack_scatter(radius: np.ndarray, distance: np.ndarray, right: np.ndarray, norm: str) -> "Figure":
    """Draw the closest attack against the certified radius of each sample, the forbidden half shaded.

    Args:
        radius: float64 (n,), certified.
        distance: float64 (n,), of the closest attack, inf where none succeeded: drawn at the upper edge.
        right: bool (n,), whether the label is the true one.
        norm: "l2" or "linf".
    """
    found = np.isfinite(distance)
    reach = max([1 / 255, *radius, *distance[found]]) * 1.06
    with _style():
        figure, (axes,) = _figure(1, (5.0, 4.0))
        axes.fill_between([0, reach], [0, reach], color=COLOURS[6], alpha=0.13, linewidth=0)
        axes.plot([0, reach], [0, reach], color=COLOURS[6], linewidth=1)
        axes.text(
            0.97,
            0.05,
            "an attack here\nwould refute a radius",
            ha="right",
            color=COLOURS[6],
            transform=axes.transAxes,
        )
        for rows, name, colour, marker in (
            (right, "label right", COLOURS[0], "o"),
            (~right, "label wrong", COLOURS[1], "s"),
        ):
            for shown, height, form, label in (
                (rows & found, distance, marker, name),
                (rows & ~found, np.full_like(distance, reach), "^", f"{name}, no attack succeeded"),
            ):
                if shown.any():
                    axes.plot(
                        radius[shown],
                        height[shown],
                        form,
                        color=colour,
                        alpha=0.75,
                        markersize=4,
                        label=label,
                        clip_on=False,
                    )
        _radius_axis(axes, norm, reach)
        axes.set(
            xlabel=f"certified {norm} radius, images in [0, 1]",
            ylabel="closest attack found",
            ylim=(0, reach),
        )
        places, labels = _ticks(norm, reach)
        axes.set_yticks(places, labels)
        axes.legend(loc="upper left")
    return figure


def radius_histogram(histogram: Mapping[str, Sequence[float]], norm: str) -> "Figure":
    """Draw how many images have which radius.

    Args:
        histogram: `edges` (m + 1,), counts `right` and `wrong` (m,).
        norm: "l2" or "linf".
    """
    edges, right, wrong = (np.array(histogram[key]) for key in ("edges", "right", "wrong"))
    with _style():
        figure, (axes,) = _figure(1, (5.0, 2.8))
        options: dict[str, Any] = {
            "width": np.diff(edges),
            "align": "edge",
            "edgecolor": PAPER,
            "linewidth": 0.5,
        }
        axes.bar(edges[:-1], right, color=COLOURS[0], label="label right", **options)
        axes.bar(edges[:-1], wrong, bottom=right, color=COLOURS[1], label="label wrong", **options)
        _radius_axis(axes, norm, edges[-1])
        axes.set(ylabel="images")
        axes.legend()
    return figure


def training_curves(logs: Mapping[str, Sequence[Mapping[str, Any]]]) -> "Figure":
    """Draw loss, drift and the estimates on the validation part against the epoch.

    Args:
        logs: by name the epochs of a run, from `training.log.epochs`, at least one.

    Raises:
        ConfigError: where matplotlib is not installed.
    """
    with _style():
        from matplotlib.ticker import MaxNLocator

        figure, (loss, estimate, drift) = _figure(3, (5.0, 6.2))
        for k, (name, epochs) in enumerate(logs.items()):
            told = [e for e in epochs if "validation_estimate" in e]
            colour = COLOURS[k % len(COLOURS)]
            loss.plot([e["epoch"] for e in epochs], [e["loss"] for e in epochs], color=colour, label=name)
            drift.plot([e["epoch"] for e in epochs], [e["drift"] for e in epochs], color=colour)
            for key, line, value in _estimates(told):
                label = key if k == 0 else None
                estimate.plot([e["epoch"] for e in told], value, line, color=colour, label=label)
        loss.set(ylabel="training loss")
        estimate.set(ylabel="estimate, validation", ylim=(0, 1))
        drift.set(ylabel="drift, max ||WᵀW − I||", xlabel="epoch")
        drift.set_ylim(bottom=0)
        drift.yaxis.set_major_formatter("{x:.0e}")
        for axes in (loss, estimate, drift):
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if len(logs) > 1:
            figure.legend(*loss.get_legend_handles_labels(), loc="outside lower center", ncols=2)
        if estimate.get_legend_handles_labels()[0]:
            estimate.legend()
    return figure


def save(figure: "Figure", path: Path) -> None:
    """Write a figure to a .png or .svg file, atomically.

    Raises:
        OSError: where the file cannot be written.
    """
    content = io.BytesIO()
    with _style():
        if path.suffix == ".svg":
            figure.savefig(content, format="svg", metadata={"Date": None})
        else:
            figure.savefig(content, format="png", dpi=144)
    with atomic_write(path, "wb") as file:
        file.write(content.getvalue())


def inline_svg(figure: "Figure", name: str, description: str) -> str:
    """Return a figure as an element for an HTML page, in the page's font and colours.

    Args:
        figure: what to draw.
        name: identifier, different from those of other figures on the page.
        description: what the figure says, for those who do not see it.
    """
    content = io.StringIO()
    with _style():
        figure.savefig(content, format="svg", transparent=True, metadata={"Date": None})
    text = content.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r"#([0-9a-f]{6})\b", lambda found: _variable(found[0]), text)
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    text = re.sub(r' (?:width|height)="[0-9.]+pt"', "", text, count=2)
    text = re.sub(r"font: ([0-9.]+)px [^;\"]*", r"font-size: \1px", text)
    return text.replace("<svg ", f'<svg role="img" aria-label="{escape(description)}" ', 1)


def check_installed(*modules: str) -> None:
    """Refuse at once where a library of the extra `report` is missing.

    Raises:
        ConfigError: one line.
    """
    import importlib.util

    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise ConfigError(f'{module} is not installed; run: pip install "lipnext[report]"')


def _variable(colour: str) -> str:
    return f"var({NAMES[colour]}, {colour})" if colour in NAMES else colour


def _estimates(told: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str, list[float]]]:
    """Clean accuracy and the certified one at the first eps."""
    if not told:
        return
    eps = next(iter(told[0]["validation_estimate"]["cra"]))
    yield "clean", "--", [e["validation_estimate"]["clean"] for e in told]
    yield f"estimated at {eps}", "-", [e["validation_estimate"]["cra"][eps] for e in told]


def _at(curve: Curve, grid: np.ndarray) -> np.ndarray:
    place = np.searchsorted(curve.radius, grid, side="right") - 1
    return np.asarray(curve.accuracy)[place]


def _end(curve: Curve) -> float:
    """The radius from which on less than `LEFT_OVER` is left."""
    accuracy = np.asarray(curve.accuracy)
    return float(curve.radius[min(int((accuracy >= LEFT_OVER).sum()), len(accuracy) - 1)])


def _radius_axis(axes: "Axes", norm: str, end: float) -> None:
    end = max(end, 1 / 255)
    places, labels = _ticks(norm, end)
    axes.set(xlim=(0, end), xlabel=f"{norm} radius, images in [0, 1]")
    axes.set_xticks(places, labels)


def _ticks(norm: str, end: float) -> tuple[list[float], list[str]]:
    spacing = TICKS[norm]
    while end * 255 / spacing > 7.5:
        spacing *= 2
    levels = range(0, math.floor(end * 255) + 1, spacing)
    return [level / 255 for level in levels], [f"{level}/255" if level else "0" for level in levels]


def _figure(rows: int, size: tuple[float, float]) -> "tuple[Figure, Sequence[Axes]]":
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, squeeze=False)[:, 0].tolist()


@contextmanager
def _style() -> Iterator[None]:
    """Quiet axes; for drawing and for saving alike. Figures are the same whatever the user's matplotlibrc says."""
    check_installed("matplotlib")
    import matplotlib

    settings: Any = {
        "font.family": "sans-serif",
        "font.size": 10,
        "text.color": INK,
        "text.parse_math": False,  # a run may be called a$b
        "axes.edgecolor": FAINT,
        "axes.labelcolor": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": LINES,
        "grid.linewidth": 0.6,
        "xtick.color": FAINT,
        "ytick.color": FAINT,
        "xtick.labelsize": 9,
        "ytick.labelsize": 9,
        "legend.frameon": False,
        "legend.fontsize": 9,
        "lines.linewidth": 1.7,
        "svg.fonttype": "none",
        "svg.hashsalt": "lipnext",
    }
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(settings)
        yield
