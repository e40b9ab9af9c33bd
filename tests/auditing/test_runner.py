import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from known_boundaries import linear_case, trained_digits
from torch import Tensor

from lipnext.auditing import runner
from lipnext.auditing.ascent import distances
from lipnext.auditing.runner import ATTACKS, STANDARD, SuiteResult, run_suite
from lipnext.core.errors import ConfigError, DataError

MODEL = "0" * 64


def suite(path: Path, case: tuple[Any, Tensor, Tensor, Tensor], **options: Any) -> SuiteResult:
    logits, images, labels, _ = case
    options = {"model_sha256": MODEL, "eps": "0.5,1", "batch_size": 5, "steps": 20} | options
    return run_suite(logits, images, labels, path, **options)


def quick(path: Path, case: tuple[Any, Tensor, Tensor, Tensor], **options: Any) -> SuiteResult:
    """Where the file matters and not what is found."""
    return suite(path, case, **({"attacks": ["pgd", "apgd-ce"], "steps": 3, "eps": "1"} | options))


@pytest.mark.parametrize("norm", [2.0, math.inf])
def test_it_finds_the_known_distances(tmp_path: Path, norm: float) -> None:
    case = linear_case(0, norm)
    result = suite(tmp_path / "a.jsonl", case, eps="0.2", norm=norm)
    truth = case[3]
    assert (result.distance >= truth * (1 - 1e-12)).all()
    assert (result.distance <= truth * 1.01).all()
    assert result.attack == ("minimal-norm",) * len(truth)
    assert result.norm == norm


def test_attacked_accuracy_counts_right_and_unbroken(tmp_path: Path) -> None:
    case = linear_case(1)
    labels, truth = case[2], case[3]
    true_labels = labels.clone()
    true_labels[0] = (labels[0] + 1) % 5
    result = suite(tmp_path / "a.jsonl", case)
    for eps in (0.5, 1.0):
        expected = int(((true_labels == labels) & (truth > eps)).sum()) / 12
        assert result.accuracy_at(eps, true_labels) == expected
    with pytest.raises(
        ConfigError, match=r"the balls attacked are 0\.5, 1; run the attacks with eps 36/255 as well"
    ):
        result.accuracy_at("36/255", labels)
    with pytest.raises(DataError, match=r"labels must be int64 of shape \(12,\)"):
        result.accuracy_at("0.5", labels[:3])


def test_a_distance_equal_to_eps_is_broken() -> None:
    label = torch.tensor([0, 0, 0])
    distance = torch.tensor([0.5, math.nextafter(0.5, 1), math.inf], dtype=torch.float64)
    result = SuiteResult(
        label=label,
        distance=distance,
        attack=("pgd", "pgd", None),
        norm=2.0,
        eps={"1/2": runner.parse_eps("1/2")},
    )
    assert result.accuracy_at(0.5, label) == 2 / 3


@pytest.mark.parametrize("name", [name for name in ATTACKS if not name.startswith(("foolbox", "auto"))])
def test_every_own_attack_runs_alone(tmp_path: Path, name: str) -> None:
    case = linear_case(2)
    result = suite(tmp_path / "a.jsonl", case, attacks=[name], steps=50)
    truth = case[3]
    assert (result.distance >= truth * (1 - 1e-12)).all()
    found = result.distance.isfinite()
    assert found.any()
    assert {attack for attack, hit in zip(result.attack, found.tolist(), strict=True) if hit} == {name}
    assert all(attack is None for attack, hit in zip(result.attack, found.tolist(), strict=True) if not hit)


@pytest.mark.parametrize(
    "name",
    ["foolbox-ddn", "foolbox-fmn", "foolbox-pgd", pytest.param("autoattack", marks=pytest.mark.slow)],
)
def test_every_adapter_runs_alone(tmp_path: Path, name: str) -> None:
    pytest.importorskip("pyautoattack")
    net, images, labels = trained_digits()
    result = run_suite(
        net,
        images[:6],
        labels[:6],
        tmp_path / "a.jsonl",
        model_sha256=MODEL,
        attacks=[name],
        eps="0.8",
        box=True,
        steps=20,
    )
    assert result.distance.isfinite().any()


def test_an_attack_in_a_ball_leaves_out_what_is_broken_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits, images, labels, truth = linear_case(3)
    seen: list[tuple[int, float]] = []
    pgd = runner.IN_A_BALL["pgd"]

    def counting(logits: Any, images: Tensor, labels: Tensor, radius: Tensor, **options: Any) -> Any:
        seen.append((len(images), float(radius[0])))
        return pgd(logits, images, labels, radius, **options)

    monkeypatch.setitem(runner.IN_A_BALL, "pgd", counting)
    options = {"model_sha256": MODEL, "attacks": ["minimal-norm", "pgd"], "eps": "1,0.5"}
    run_suite(logits, images, labels, tmp_path / "a.jsonl", **options)
    assert seen == [(int((truth > eps).sum()), eps) for eps in (0.5, 1.0)]


def test_successes_inside_the_own_radius_are_returned_with_their_points(tmp_path: Path) -> None:
    logits, images, labels, truth = case = linear_case(4)
    radius = truth * 0.999
    radius[[2, 7]] *= 1.1
    for _ in range(2):  # the second time they come from the file
        result = suite(tmp_path / "a.jsonl", case, eps=(), radius=radius)
        assert sorted(result.inside) == [2, 7]
        for k, point in result.inside.items():
            assert point.dtype == images.dtype
            assert float(distances(images[k : k + 1], point[None], 2.0)) == float(result.distance[k])
            assert result.distance[k] <= radius[k]
            assert int(logits(point[None]).argmax()) != int(labels[k])
    honest = suite(tmp_path / "b.jsonl", case, eps=(), radius=truth * 0.999)
    assert honest.inside == {}


def test_the_closest_successes_asked_for_are_kept_wherever_they_lie(tmp_path: Path) -> None:
    logits, images, labels, truth = case = linear_case(4)
    for _ in range(2):  # the second time they come from the file
        result = suite(tmp_path / "a.jsonl", case, radius=truth * 0.999, keep=[7, 1])
        assert sorted(result.kept) == [1, 7]
        assert result.inside == {}
        for k, point in result.kept.items():
            assert float(distances(images[k : k + 1], point[None], 2.0)) == float(result.distance[k])
            assert int(logits(point[None]).argmax()) != int(labels[k])
    unbroken = quick(tmp_path / "b.jsonl", case, attacks=["pgd"], eps="0.000001", keep=[1])
    assert unbroken.kept == {}
    with pytest.raises(ConfigError, match="holds attacks with another keep"):
        suite(tmp_path / "a.jsonl", case, radius=truth * 0.999, keep=[2])


# ---- resuming


def same(a: SuiteResult, b: SuiteResult) -> bool:
    return torch.equal(a.distance, b.distance) and a.attack == b.attack and a.inside.keys() == b.inside.keys()


@pytest.mark.parametrize("cut", [0, 1, 2, 3])
def test_a_suite_goes_on_where_it_stopped(tmp_path: Path, cut: int) -> None:
    """Cut after the header and `cut` batches, and in the middle of the next line."""
    logits, images, labels, _ = case = linear_case(5)
    whole = tmp_path / "whole.jsonl"
    expected = quick(whole, case)
    lines = whole.read_text().splitlines(keepends=True)
    assert len(lines) == 4
    part = tmp_path / "part.jsonl"
    part.write_text("".join(lines[: 1 + cut]) + (lines[1 + cut][:20] if cut < 3 else ""))
    evaluated: list[int] = []

    def counting(x: Tensor) -> Tensor:
        evaluated.append(len(x))
        return logits(x)

    progress: list[int] = []
    result = quick(part, (counting, images, labels, case[3]), progress=progress.append)
    assert same(result, expected)
    assert part.read_text() == whole.read_text()
    assert progress == [5, 5, 2]
    assert bool(evaluated) == (cut < 3)


def test_an_interrupted_suite_keeps_its_finished_batches(tmp_path: Path) -> None:
    case = linear_case(6)
    path = tmp_path / "a.jsonl"

    def stop(images_done: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quick(path, case, progress=stop)
    assert len(path.read_text().splitlines()) == 2
    assert same(quick(path, case), quick(tmp_path / "b.jsonl", case))


def test_a_header_that_was_cut_off_starts_again(tmp_path: Path) -> None:
    case = linear_case(5)
    expected = quick(tmp_path / "a.jsonl", case)
    text = (tmp_path / "a.jsonl").read_text()
    (tmp_path / "b.jsonl").write_text(text[:30])
    assert same(quick(tmp_path / "b.jsonl", case), expected)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"model_sha256": "1" * 64}, "model_sha256"),
        ({"attacks": ["pgd"]}, "attacks"),
        ({"eps": "0.5"}, "eps"),
        ({"steps": 4}, "steps"),
        ({"seed": 1}, "seed"),
        ({"box": True}, "box"),
        ({"restarts": 2}, "restarts"),
        ({"batch_size": 4}, "batch_size"),
        ({"radius": 0.1}, "data_sha256"),
    ],
)
def test_another_header_is_refused_and_the_file_kept(
    tmp_path: Path, change: dict[str, Any], key: str
) -> None:
    case = linear_case(5, n=3)
    path = tmp_path / "a.jsonl"
    quick(path, case)
    before = path.read_bytes()
    with pytest.raises(
        ConfigError, match=f"holds attacks with another {key} .*; give another path or delete it"
    ) as caught:
        quick(path, case, **change)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == before


def test_other_images_are_refused(tmp_path: Path) -> None:
    logits, images, labels, truth = linear_case(5, n=3)
    path = tmp_path / "a.jsonl"
    quick(path, (logits, images, labels, truth))
    with pytest.raises(ConfigError, match="another data_sha256"):
        quick(path, (logits, images.float(), labels, truth))


@pytest.mark.parametrize("text", ["hello", "hello\n", "{}\n", "[1]\n", '{"format": "lipnext attacks 0"}\n'])
def test_a_file_of_something_else_is_refused_and_kept(tmp_path: Path, text: str) -> None:
    path = tmp_path / "notes.txt"
    path.write_text(text)
    with pytest.raises((ConfigError, DataError), match="no file of attacks") as caught:
        quick(path, linear_case(5, n=3))
    assert "\n" not in str(caught.value)
    assert path.read_text() == text


def test_a_line_that_is_missing_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    quick(path, linear_case(5))
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([lines[0], lines[2]]))
    with pytest.raises(DataError, match="damaged: line 2 is not batch 0; delete it"):
        quick(path, linear_case(5))


def test_the_file_is_json_that_any_reader_takes(tmp_path: Path) -> None:
    """No NaN and no Infinity, which strict readers refuse: an image that nothing broke has null."""
    quick(tmp_path / "a.jsonl", linear_case(5), eps="0.01")

    def refuse(text: str) -> Any:
        raise AssertionError(text)

    records = [
        json.loads(line, parse_constant=refuse) for line in (tmp_path / "a.jsonl").read_text().splitlines()
    ]
    assert records[1]["distance"] == [None] * 5


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"attacks": ["pdg"]}, ConfigError, "unknown attack 'pdg'; did you mean 'pgd'"),
        ({"attacks": []}, ConfigError, "attacks must be different names, at least one"),
        ({"attacks": ["pgd", "pgd"]}, ConfigError, "attacks must be different names"),
        ({"attacks": ["pgd"], "eps": ()}, ConfigError, "attack pgd works in a ball; give eps or radius"),
        ({"attacks": ["foolbox-pgd"], "radius": 0.1}, ConfigError, "takes one radius for all images"),
        ({"attacks": ["autoattack"]}, ConfigError, r"keeps images in \[0, 1\]; pass box=True"),
        ({"batch_size": 0}, ConfigError, "batch_size must be at least 1"),
        ({"steps": 0}, ConfigError, "steps must be at least 1"),
        ({"eps": "36"}, ConfigError, "looks like 8-bit units"),
        ({"radius": -1.0}, DataError, "a radius must be finite"),
    ],
)
def test_bad_settings_are_refused_before_a_file_is_made(
    tmp_path: Path, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    path = tmp_path / "a.jsonl"
    with pytest.raises(error, match=message):
        quick(path, linear_case(5, n=3), **change)
    assert not path.exists()


def test_no_image_gives_an_empty_result(tmp_path: Path) -> None:
    logits, images, labels, truth = linear_case(5)
    result = quick(tmp_path / "a.jsonl", (logits, images[:0], labels[:0], truth[:0]))
    assert len(result.distance) == 0
    assert set(STANDARD) <= set(ATTACKS)
