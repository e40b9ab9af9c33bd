import copy
import re
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from helpers import Call
from hypothesis import given
from hypothesis import strategies as st

import lipnext
from lipnext.core.errors import ConfigError
from lipnext.deployment.vnnlib import half_side, query

EPS = Fraction(36, 255)


def parse(text: str) -> tuple[dict[str, Fraction], dict[str, Fraction], list[tuple[int, int]], int]:
    """Lower and upper bounds of the inputs, the pairs (j, y) of `Y_j >= Y_y`, and the number of outputs."""
    lower = {
        name: Fraction(value) for name, value in re.findall(r"^\(assert \(>= (X_\d+) (\S+)\)\)$", text, re.M)
    }
    upper = {
        name: Fraction(value) for name, value in re.findall(r"^\(assert \(<= (X_\d+) (\S+)\)\)$", text, re.M)
    }
    pairs = [(int(j), int(y)) for j, y in re.findall(r"\(and \(>= Y_(\d+) Y_(\d+)\)\)", text)]
    return lower, upper, pairs, len(re.findall(r"^\(declare-const Y_\d+ Real\)$", text, re.M))


@pytest.fixture(scope="module")
def digits() -> lipnext.Classifier:
    return lipnext.load("digits")


@given(st.fractions(Fraction(1, 10**6), 10), st.integers(1, 200_000))
def test_the_box_lies_inside_the_ball_and_is_no_smaller_than_it_must_be(eps: Fraction, inputs: int) -> None:
    half = Fraction(half_side(eps, inputs))
    assert inputs * half**2 <= eps**2
    assert inputs * (half * (1 + Fraction(1, 2**50))) ** 2 > eps**2


def test_a_query_states_the_box_and_every_rival(digits: lipnext.Classifier) -> None:
    image = torch.rand(1, 1, 8, 8)
    image[0, 0, 0, :2] = torch.tensor([0.0, 1.0])
    certificate = digits.certify(image)
    label = int(certificate.label)
    lower, upper, pairs, outputs = parse(query(image[0], 10, certificate, 3, EPS))
    assert outputs == 10
    assert pairs == [(j, label) for j in range(10) if j != label]
    half = EPS / 8  # sqrt(64), so that the box is known exactly
    for i, pixel in enumerate(image.flatten().tolist()):
        for side, corner in ((lower, Fraction(pixel) - half), (upper, Fraction(pixel) + half)):
            assert abs(side[f"X_{i}"] - corner) <= Fraction(2, 10**15)
        assert (
            Fraction(pixel) - half
            <= lower[f"X_{i}"]
            < Fraction(pixel)
            < upper[f"X_{i}"]
            <= Fraction(pixel) + half
        )
    assert lower["X_0"] < 0  # the certificate does not end at 0 and 1, nor does the query
    assert len(lower) == len(upper) == 64


def test_a_certified_image_answers_unsat_wherever_the_box_is_tried(digits: lipnext.Classifier) -> None:
    image = torch.rand(1, 1, 8, 8)
    certificate = digits.certify(image)
    eps = Fraction(float(certificate.radius)) * Fraction(9, 10)
    text = query(image[0], 10, certificate, 0, eps)
    assert "expected: unsat" in text
    lower, upper, pairs, _ = parse(text)
    low, high = (torch.tensor([float(side[f"X_{i}"]) for i in range(64)]) for side in (lower, upper))
    corners = torch.where(torch.rand(200, 64) < 0.5, low, high).reshape(-1, 1, 8, 8)
    with torch.no_grad():
        logits = copy.deepcopy(digits.net).double()(corners)
    assert not any(bool((logits[:, j] >= logits[:, y]).any()) for j, y in pairs)
    assert "nothing is proved" in query(image[0], 10, certificate, 0, eps * 2)


def test_an_eps_that_cannot_be_written_is_refused(digits: lipnext.Classifier) -> None:
    image = torch.rand(1, 1, 8, 8)
    with pytest.raises(ConfigError, match="too small to be written with 15 digits"):
        query(image[0], 10, digits.certify(image), 0, Fraction(1, 10**12))


def test_on_the_command_line(call: Call, tmp_path: Path) -> None:
    out = tmp_path / "q.vnnlib"
    code, printed, err = call(
        "export", "digits", "--to", "vnnlib", "--out", out, "--sample", 0, "--eps", "36/255"
    )
    assert code == 0
    assert "lipnext: digits is " in err
    assert "; image 0, label " in out.read_text()
    assert "certified radius" in printed
    for words, message in (
        (["--sample", 999, "--eps", "1"], "sample must be in 0..358, got 999"),
        (["--sample", 0, "--eps", "36"], "looks like 8-bit units"),
    ):
        code, _, err = call("export", "digits", "--to", "vnnlib", "--out", tmp_path / "r.vnnlib", *words)
        assert (code, message in err) == (2, True)
    assert [p.name for p in tmp_path.iterdir()] == ["q.vnnlib"]
