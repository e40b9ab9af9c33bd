"""A certificate refuses what is unproved, counts strictly and exactly, and writes numbers that read back."""

import csv
import json
import math
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lipnext.core.bound import Estimate, LipschitzBound
from lipnext.core.certificate import Certificate
from lipnext.core.eps import parse_eps_list
from lipnext.core.errors import ConfigError, DataError, UnsoundError

BOUND = LipschitzBound(value=1.0, norm=2.0, proof="product")
RADII = [0.5, 0.0, 0.25, 36 / 255]
LABELS = torch.tensor([1, 0, 2, 3])


def certificate(**changes: Any) -> Certificate:
    radius = changes.get("radius", torch.tensor(RADII, dtype=torch.float64))
    n = len(radius)
    fields: dict[str, Any] = {
        "label": torch.tensor([1, 0, 0, 3])[:n],
        "radius": radius,
        "norm": 2.0,
        "kind": "deterministic",
        "confidence": 1.0,
        "semantics": "real",
        "slack": torch.full((n,), 1e-9, dtype=torch.float64),
        "margin": torch.ones(n, dtype=torch.float64),
        "lipschitz": BOUND,
        "model_sha256": "0" * 64,
    }
    return Certificate(**(fields | changes))


def float64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_statistics_count_all_samples() -> None:
    # Right: samples 0, 1 and 3; sample 2 is certified but wrong.
    cert = certificate()
    assert cert.clean_accuracy(LABELS) == 3 / 4
    assert cert.accuracy_at(0.2, LABELS) == 1 / 4
    assert cert.accuracy_at("1/10", LABELS) == 2 / 4
    assert cert.acr(LABELS) == (0.5 + 36 / 255) / 4
    assert cert.mean_radius_correct(LABELS) == (0.5 + 36 / 255) / 3
    assert certificate().mean_radius_correct(LABELS + 1) == 0.0


def test_certified_is_strict_and_exact() -> None:
    cert = certificate(radius=float64(0.25, math.nextafter(0.25, 1), math.nextafter(0.25, 0), 0.0))
    assert cert.certified_at("1/4").tolist() == [False, True, False, False]


@given(st.floats(min_value=0, max_value=2), st.fractions(min_value="1/1000", max_value=2))
def test_certified_agrees_with_rational_arithmetic(radius: float, eps: Fraction) -> None:
    assert certificate(radius=float64(radius)).certified_at(eps).item() == (Fraction(radius) > eps)


@given(st.fractions(min_value="1/1000", max_value=2), st.sampled_from([-1, 0, 1]))
def test_certified_is_exact_at_the_closest_floats(eps: Fraction, step: int) -> None:
    radius = float(eps)
    radius = math.nextafter(radius, step * math.inf) if step else radius
    assert certificate(radius=float64(radius)).certified_at(eps).item() == (Fraction(radius) > eps)


def test_certified_refuses_bad_eps() -> None:
    with pytest.raises(ConfigError, match="eps must be above 0, got '0'"):
        certificate().certified_at(0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"label": torch.zeros(4, dtype=torch.float64)},
            r"label must be a torch\.int64 tensor of shape \(n,\), got torch\.float64",
        ),
        ({"label": torch.zeros(4, 1, dtype=torch.int64)}, r"got torch\.int64 of shape \(4, 1\)"),
        (
            {"radius": torch.zeros(4, dtype=torch.float32)},
            r"radius must be a torch\.float64 tensor of shape \(4,\)",
        ),
        ({"radius": RADII}, "radius must be .* got list"),
        ({"radius": float64(0, math.nan, 0, 0)}, "radius must be finite; put 0 where nothing is proved"),
        ({"radius": float64(0, math.inf, 0, 0)}, "radius must be finite"),
        ({"radius": float64(0, -1e-300, 0, 0)}, "radius must not be negative"),
        (
            {"slack": float64(0, 0, 0)},
            r"slack must be a torch\.float64 tensor of shape \(4,\), got .* \(3,\)",
        ),
        ({"slack": float64(0, -1, 0, 0)}, "slack must not be negative"),
        ({"margin": float64(0, math.nan, 0, 0)}, "margin must be finite"),
        ({"norm": 1.0}, r"the norm must be 2\.0 or inf, got 1\.0"),
        ({"norm": math.inf}, "a radius in linf cannot rest on a bound in l2"),
        ({"kind": "global"}, "kind must be 'deterministic' or 'probabilistic', got 'global'"),
        (
            {"confidence": 0.999},
            r"confidence must be 1\.0 for a deterministic .* got 0\.999 for a deterministic one",
        ),
        ({"kind": "probabilistic"}, r"got 1\.0 for a probabilistic one"),
        ({"kind": "probabilistic", "confidence": 0.0}, r"got 0\.0 for a probabilistic one"),
        ({"kind": "probabilistic", "confidence": math.nan}, "got nan for a probabilistic one"),
        ({"semantics": "float"}, "semantics must be 'real' or 'deployed', got 'float'"),
        ({"arithmetic": "float32"}, "arithmetic must be one of float64 for semantics 'real', got 'float32'"),
        ({"semantics": "deployed", "arithmetic": "bfloat16"}, "arithmetic must be one of float64, float32, "),
        ({"lipschitz": 1.0}, "a proved LipschitzBound is needed, got float"),
        ({"lipschitz": None}, "a proved LipschitzBound is needed, got NoneType"),
        (
            {"lipschitz": Estimate(1.0, "20 power iterations")},
            r"an estimate \(20 power iterations\) is not a bound",
        ),
        (
            {"lipschitz": Estimate(1.0, "attack"), "kind": "probabilistic", "confidence": 0.9},
            r"an estimate \(attack\) is not a bound",
        ),
        ({"model_sha256": ""}, "model_sha256 must be 64 hexadecimal digits, got ''"),
    ],
)
def test_unsound_records_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsoundError, match=message):
        certificate(**({"radius": float64(*RADII)} | changes) if "radius" not in changes else changes)


def test_an_abstention_is_probabilistic_has_no_radius_and_counts_as_wrong() -> None:
    votes = {"kind": "probabilistic", "confidence": 0.999}
    label, radius = torch.tensor([0, -1, -1, 1]), float64(0.5, 0.0, 0.0, 0.4)
    cert = certificate(label=label, radius=radius, **votes)
    truth = torch.tensor([0, 0, 1, 1])
    assert cert.clean_accuracy(truth) == 0.5
    assert cert.accuracy_at("0.1", truth) == 0.5
    assert cert.acr(truth) == pytest.approx(0.9 / 4)
    assert cert.summary(truth, {})["abstained"] == 2
    for bad in (
        {"label": label, "radius": radius},
        {"label": label, "radius": float64(0.5, 0.1, 0.0, 0.4), **votes},
        {"label": label - 1, "radius": radius, **votes},
    ):
        with pytest.raises(
            UnsoundError, match=r"label must be a class, or -1 with radius 0 in a probabilistic"
        ):
            certificate(**bad)


def test_a_probabilistic_radius_needs_no_lipschitz_bound() -> None:
    cert = certificate(kind="probabilistic", confidence=0.999, lipschitz=None)
    assert cert.summary(LABELS, {})["lipschitz"] is None


@pytest.mark.parametrize(
    ("labels", "form"),
    [
        (LABELS[:3], r"torch\.int64 of shape \(3,\)"),
        (LABELS.double(), r"torch\.float64 of shape \(4,\)"),
        (LABELS[:, None], r"torch\.int64 of shape \(4, 1\)"),
        ([1, 0, 2, 3], "list"),
    ],
)
def test_labels_that_do_not_fit_are_refused(labels: Any, form: str, tmp_path: Path) -> None:
    cert = certificate()
    uses: list[Callable[[], object]] = [
        lambda: cert.accuracy_at(0.1, labels),
        lambda: cert.clean_accuracy(labels),
        lambda: cert.acr(labels),
        lambda: cert.mean_radius_correct(labels),
        lambda: cert.to_jsonl(tmp_path / "x", labels),
    ]
    for use in uses:
        with pytest.raises(
            DataError, match=rf"labels must be an int64 tensor of shape \(4,\), one a sample, got {form}"
        ):
            use()
    assert list(tmp_path.iterdir()) == []


def test_an_empty_certificate_has_no_accuracy() -> None:
    empty = certificate(radius=float64())
    assert len(empty) == 0
    assert list(empty.records()) == []
    with pytest.raises(DataError, match="at least one sample, got an empty certificate"):
        empty.clean_accuracy(torch.zeros(0, dtype=torch.int64))


def test_summary_has_the_keys_of_the_command_line() -> None:
    assert certificate().summary(LABELS, parse_eps_list("36/255,0.2")) == {
        "n": 4,
        "clean": 0.75,
        # The float 36/255 is the largest one not above the fraction, so this radius does not exceed it.
        "cra": {"36/255": 0.25, "0.2": 0.25},
        "acr": (0.5 + 36 / 255) / 4,
        "lipschitz": {"bound": 1.0, "proof": "product"},
        "norm": "l2",
        "kind": "deterministic",
        "confidence": 1.0,
        "abstained": 0,
        "semantics": "real",
        "arithmetic": "float64",
        "margin": certificate().margin.median().item(),
        "float_error": certificate().slack.max().item(),
        "model_sha256": "0" * 64,
    }


FIELDS = ["idx", "label", "correct", "pred", "radius", "margin", "slack"]
COMMON = ["norm", "kind", "confidence", "semantics", "arithmetic", "model_sha256"]


@settings(max_examples=25)
@given(radii=st.lists(st.floats(min_value=0, max_value=1e300), min_size=1, max_size=4))
def test_exports_read_back_exactly(tmp_path_factory: pytest.TempPathFactory, radii: list[float]) -> None:
    folder = tmp_path_factory.mktemp("export")
    cert, labels = certificate(radius=float64(*radii)), LABELS[: len(radii)]
    cert.to_jsonl(folder / "c.jsonl", labels)
    cert.to_csv(folder / "c.csv", labels)
    lines = [json.loads(line) for line in (folder / "c.jsonl").read_text().splitlines()]
    rows = list(csv.DictReader((folder / "c.csv").read_text().splitlines()))
    assert [line["radius"] for line in lines] == radii
    assert [float(row["radius"]) for row in rows] == radii
    assert [line["correct"] for line in lines] == (cert.label == labels).tolist()
    assert list(lines[0]) == list(rows[0]) == FIELDS + COMMON


def test_exports_without_labels(tmp_path: Path) -> None:
    certificate().to_jsonl(tmp_path / "c.jsonl")
    certificate(radius=float64()).to_csv(tmp_path / "c.csv")
    names = ["idx", "pred", "radius", "margin", "slack", *COMMON]
    assert list(json.loads((tmp_path / "c.jsonl").read_text().splitlines()[0])) == names
    assert (tmp_path / "c.csv").read_text() == ",".join(names) + "\n"


def test_cat_joins_in_order() -> None:
    whole = certificate()
    parts = [
        certificate(
            label=whole.label[part],
            radius=whole.radius[part],
            slack=whole.slack[part],
            margin=whole.margin[part],
        )
        for part in (slice(0, 1), slice(1, 1), slice(1, 4))
    ]
    joined = Certificate.cat(parts)
    assert list(joined.records()) == list(whole.records())
    assert joined.lipschitz == BOUND


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"norm": math.inf, "lipschitz": LipschitzBound(value=1.0, norm=math.inf, proof="exact")}, "norm"),
        ({"kind": "probabilistic", "confidence": 0.9}, "kind"),
        ({"semantics": "deployed"}, "semantics"),
        ({"semantics": "deployed", "arithmetic": "float32"}, "semantics"),
        ({"model_sha256": "1" * 64}, "model_sha256"),
        ({"lipschitz": LipschitzBound(value=1.5, norm=2.0, proof="product")}, "lipschitz"),
        ({"per_image": True}, "per_image"),
    ],
)
def test_cat_refuses_what_differs(changes: dict[str, Any], name: str) -> None:
    with pytest.raises(
        UnsoundError, match=f"certificates with different {name} cannot be joined .*; report them apart"
    ):
        Certificate.cat([certificate(), certificate(**changes)])


def test_cat_refuses_nothing() -> None:
    with pytest.raises(UnsoundError, match="nothing to join"):
        Certificate.cat([])


@given(st.integers(0, 4), st.integers(0, 4))
def test_parts_carry_everything_and_join_again(start: int, stop: int) -> None:
    start, stop = sorted((start, stop))
    cert = certificate(rival=torch.tensor([3, 1, 2, 0]))
    part = cert[start:stop]
    assert part.radius.tolist() == RADII[start:stop]
    again = Certificate.cat([cert[:start], part, cert[stop:]])
    for name in ("label", "radius", "slack", "margin", "rival"):
        assert torch.equal(getattr(again, name), getattr(cert, name))
    assert again.lipschitz == BOUND
    assert certificate()[:2].rival is None


def test_rivals_are_checked() -> None:
    with pytest.raises(UnsoundError, match=r"rival must be a torch.int64 tensor of shape \(4,\)"):
        certificate(rival=torch.tensor([1, 2, 3]))
    with pytest.raises(UnsoundError, match="with and without rivals"):
        Certificate.cat([certificate(), certificate(rival=torch.tensor([3, 1, 2, 0]))])
