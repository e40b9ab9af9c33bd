"""Figures: curves are exact, what cannot be compared is refused, files are what their names say."""

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lipnext.core.errors import ConfigError
from lipnext.deployment import figures
from lipnext.deployment.figures import (
    Curve,
    certified_accuracy,
    exact_curve,
    inline_svg,
    save,
    training_curves,
)

pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra: report)")

VALUES = st.one_of(st.sampled_from([0.0, 0.25, 0.5, np.inf]), st.floats(0, 2))


def curve(name: str = "a", **changes: Any) -> Curve:
    fields = {"radius": np.array([0.0, 0.2, 0.6]), "accuracy": np.array([0.9, 0.4, 0.0]), "norm": "l2"}
    return Curve(name=name, **(fields | changes))


def log(epochs: int = 3) -> list[dict[str, Any]]:
    estimate = {"clean": 0.5, "cra": {"36/255": 0.25}, "acr": 0.1}
    return [
        {"epoch": k + 1, "loss": 1 / (k + 1), "drift": 1e-5, "validation_estimate": estimate}
        for k in range(epochs)
    ]


@settings(max_examples=50)
@given(st.lists(st.tuples(VALUES, st.booleans()), min_size=1, max_size=12), VALUES)
def test_a_curve_is_exact_at_every_radius(samples: list[tuple[float, bool]], at: float) -> None:
    radii, right = (np.array(column) for column in zip(*samples, strict=True))
    found = exact_curve("a", radii, right, "l2")
    assert list(found.radius) == sorted(set(found.radius))
    for r in [*found.radius, *(at for _ in [0] if at < np.inf)]:
        place = np.flatnonzero(found.radius <= r)[-1]
        count = sum(ok and value > r for value, ok in samples)
        assert found.accuracy[place] == count / len(samples)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"norm": "linf"}, "a is l2 and b is linf; radii of another norm cannot be compared"),
        ({"kind": "probabilistic"}, "a is deterministic and b is probabilistic; radii of another kind"),
    ],
)
def test_what_cannot_be_compared_is_refused(other: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        certified_accuracy([curve(), curve("b", **other)])
    with pytest.raises(ConfigError, match="at least one curve"):
        certified_accuracy([])


def test_the_curve_is_drawn_as_steps_between_its_points_with_ticks_at_grey_levels() -> None:
    figure = certified_accuracy([curve("digits$1"), curve("b", dashed=True)])
    (axes,) = figure.axes
    first, second = axes.get_lines()
    assert first.get_drawstyle() == "steps-post"
    assert (list(first.get_xdata()), list(first.get_ydata())) == ([0.0, 0.2, 0.6], [0.9, 0.4, 0.0])
    assert second.get_linestyle() == "--"
    assert axes.get_xlim() == (0, 0.6)
    labels = [text.get_text() for text in axes.get_xticklabels()]
    assert labels == ["0", "36/255", "72/255", "108/255", "144/255"]
    assert list(axes.get_xticks()) == [36 * k / 255 for k in range(5)]


def test_ticks_grow_apart_where_radii_are_large_and_stand_close_in_linf() -> None:
    assert figures._ticks("l2", 5.0)[1] == ["0", "288/255", "576/255", "864/255", "1152/255"]
    assert figures._ticks("linf", 9 / 255)[1] == ["0", "2/255", "4/255", "6/255", "8/255"]


@pytest.mark.parametrize("ending", [".png", ".svg"])
def test_files_are_what_their_names_say_and_the_same_every_time(ending: str, tmp_path: Path) -> None:
    for name in ("a", "b"):
        save(certified_accuracy([curve()]), tmp_path / f"{name}{ending}")
    content = (tmp_path / f"a{ending}").read_bytes()
    assert content == (tmp_path / f"b{ending}").read_bytes()
    if ending == ".png":
        assert content.startswith(b"\x89PNG")
    else:
        assert ElementTree.fromstring(content).tag == "{http://www.w3.org/2000/svg}svg"
    assert len(list(tmp_path.iterdir())) == 2


def test_an_inline_figure_asks_for_nothing_and_takes_the_colours_of_its_page() -> None:
    texts = [inline_svg(certified_accuracy([curve()]), name, 'a < b & "c"') for name in ("one", "two")]
    ids = [name for text in texts for name in re.findall(r'\bid="([^"]+)"', text)]
    assert len(ids) == len(set(ids)) > 20
    for text in texts:
        assert ElementTree.fromstring(text).attrib["aria-label"] == 'a < b & "c"'
        assert set(re.findall(r"(?:href=\"|url\()([^\")]*)", text)) <= {f"#{name}" for name in ids}
        assert "var(--c0, #2767a9)" in text
        # outside of var(), only what the page does not name
        assert not re.findall(r"(?<!, )#(?:1d232a|5a6470|d5dae0|2767a9)", text)
        assert "metadata" not in text


def test_training_curves_of_one_run_and_of_several() -> None:
    one = training_curves({"a": log()})
    loss, estimate, drift = one.axes
    assert list(loss.get_lines()[0].get_ydata()) == [1.0, 0.5, 1 / 3]
    assert [line.get_label() for line in estimate.get_lines()] == ["clean", "estimated at 36/255"]
    assert list(drift.get_lines()[0].get_ydata()) == [1e-5] * 3
    assert "estimate" in estimate.get_ylabel()
    sparse = [
        {key: value for key, value in entry.items() if key != "validation_estimate"} for entry in log(1)
    ]
    several = training_curves({"a": log(), "b": sparse})
    assert [len(axes.get_lines()) for axes in several.axes] == [2, 2, 2]


def test_without_matplotlib_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError) as error:
        certified_accuracy([curve()])
    assert str(error.value) == 'matplotlib is not installed; run: pip install "lipnext[report]"'
