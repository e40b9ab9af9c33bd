"""The tables of a test part against slow counting in rationals."""

import json
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lipnext.auditing.overview import overview
from lipnext.core.bound import LipschitzBound
from lipnext.core.certificate import Certificate
from lipnext.core.eps import parse_eps_list
from lipnext.core.errors import DataError

CLASSES = ("cat", "dog", "eel")
EPS = parse_eps_list("1/255,1/2")
RADII = st.one_of(
    st.sampled_from([0.0, 1 / 255, 0.5, 2 / 255, 5e-324]), st.floats(0, 1.2, allow_subnormal=False)
)
SAMPLES = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2), RADII), min_size=1, max_size=12)


def certificate(labels: list[int], radii: list[float], margin: float = 1.0) -> Certificate:
    radius = torch.tensor(radii, dtype=torch.float64)
    return Certificate(
        label=torch.tensor(labels),
        radius=radius,
        norm=2.0,
        kind="deterministic",
        confidence=1.0,
        semantics="real",
        slack=torch.full_like(radius, 1e-3),
        margin=torch.full_like(radius, margin),
        lipschitz=LipschitzBound(value=1.25, norm=2.0, proof="product"),
        model_sha256="0" * 64,
    )


def truth(of: list[int]) -> Tensor:
    return torch.tensor(of)


@settings(max_examples=30)
@given(SAMPLES)
def test_every_count_is_that_of_slow_counting(samples: list[tuple[int, int, float]]) -> None:
    true, label, radii = ([s[k] for s in samples] for k in range(3))
    table = overview(certificate(label, radii), truth(true), CLASSES, EPS)
    assert json.loads(json.dumps(table, allow_nan=False)) == table
    n = len(samples)
    for name, eps in EPS.items():
        certified = [Fraction(r) > eps for r in radii]
        for i in range(3):
            row = table["confusion"][name][i]
            for j in range(3):
                assert row[j] == sum(
                    c and t == i and p == j for t, p, c in zip(true, label, certified, strict=True)
                )
            assert row[3] == sum(t == i and not c for t, c in zip(true, certified, strict=True))
        wrong = sum(c and t != p for t, p, c in zip(true, label, certified, strict=True))
        assert table["certified_but_wrong"][name] == wrong
        assert table["cra"][name] == sum(table["confusion"][name][i][i] for i in range(3)) / n
    for k, row in enumerate(table["classes"]):
        members = [(p, Fraction(r)) for t, p, r in samples if t == k]
        assert (row["name"], row["n"]) == (CLASSES[k], len(members))
        if not members:
            assert row["clean"] is row["acr"] is row["cra"]["1/2"] is None
            continue
        assert row["clean"] == sum(p == k for p, _ in members) / len(members)
        assert row["cra"]["1/2"] == sum(p == k and r > Fraction(1, 2) for p, r in members) / len(members)
        mean = float(sum((r for p, r in members if p == k), Fraction(0)) / len(members))
        assert row["acr"] == pytest.approx(mean, rel=1e-14, abs=0)


@settings(max_examples=30)
@given(SAMPLES)
def test_the_histogram_holds_every_positive_radius_in_its_bin(samples: list[tuple[int, int, float]]) -> None:
    true, label, radii = ([s[k] for s in samples] for k in range(3))
    histogram = overview(certificate(label, radii), truth(true), CLASSES, EPS)["histogram"]
    edges = histogram["edges"]
    assert edges[0] == 0
    assert edges[-1] > max(radii) * (1 - 1e-12)
    assert len(edges) <= 32
    assert len(histogram["right"]) == len(histogram["wrong"]) == len(edges) - 1
    for key, same in (("right", True), ("wrong", False)):
        kept = [r for t, p, r in samples if r > 0 and (t == p) == same]
        assert sum(histogram[key]) == len(kept)
        for count, low, high in zip(histogram[key], edges, edges[1:], strict=False):
            # one rounding of an edge may move a radius that lies on it
            assert (
                sum(low * (1 + 1e-12) < r < high * (1 - 1e-12) for r in kept)
                <= count
                <= sum(low * (1 - 1e-12) <= r <= high * (1 + 1e-12) for r in kept)
            )


@settings(max_examples=30)
@given(SAMPLES)
def test_the_curve_is_the_certified_accuracy_at_each_grey_level_and_ends_at_zero(
    samples: list[tuple[int, int, float]],
) -> None:
    true, label, radii = ([s[k] for s in samples] for k in range(3))
    curve = overview(certificate(label, radii), truth(true), CLASSES, EPS)["curve"]
    assert curve["accuracy"][-1] == 0
    for k, (radius, accuracy) in enumerate(zip(curve["radius"], curve["accuracy"], strict=True)):
        assert radius == pytest.approx(k / 255, rel=1e-15)
        count = sum(t == p and r > radius for t, p, r in samples)
        assert accuracy == count / len(samples)


def test_the_error_budget_says_what_is_taken_off() -> None:
    budget = overview(certificate([0, 1, 2], [0.5, 0.25, 0.0]), truth([0, 1, 2]), CLASSES, EPS)[
        "error_budget"
    ]
    assert budget == {
        "lipschitz_excess": 0.25,
        "float_error": 1e-3,
        "median_margin": 1.0,
        "share_of_margin_median": 1e-3,
        "share_of_margin_largest": 1e-3,
        "without_radius": 1,
    }
    nothing = overview(certificate([1], [0.0]), truth([0]), CLASSES, EPS)
    assert nothing["error_budget"]["share_of_margin_largest"] is None
    assert nothing["median_radius"] == 0.0


def test_labels_that_no_class_has_are_refused() -> None:
    with pytest.raises(DataError, match=r"labels must be in 0\.\.2, got 1\.\.3"):
        overview(certificate([1, 1], [0.5, 0.5]), truth([1, 3]), CLASSES, EPS)
    with pytest.raises(DataError, match="labels must be an int64 tensor"):
        overview(certificate([1, 1], [0.5, 0.5]), truth([1]), CLASSES, EPS)
