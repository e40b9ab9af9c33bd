"""The audit: what it reports, and that each kind of refuted claim leaves a file that anyone can check."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Flatten
from torch import Tensor, nn

from lipnext.auditing import runner
from lipnext.auditing.ascent import AttackResult
from lipnext.auditing.audit import Audit, audit, parse_attacks, write_reproducers
from lipnext.auditing.lipschitz import steepest_pair
from lipnext.auditing.rounding_search import images_near_boundary
from lipnext.certificates.margin import MarginCertifier
from lipnext.core.certificate import Certificate
from lipnext.core.classifier import Classifier
from lipnext.core.eps import parse_eps_list
from lipnext.core.errors import ConfigError, DataError, UnsoundError
from lipnext.core.network import LipschitzNetwork
from lipnext.nn.head import UnitRowHead

SHAPE = (1, 3, 3)
EPS = parse_eps_list("1/8,1/4")
TRUTH = torch.tensor([0, 1, 2, 0, 1])


class Claimed:
    """A certifier whose radii are those of the margin certificate times a factor."""

    def __init__(self, net: nn.Module, factor: float) -> None:
        self.honest, self.factor = MarginCertifier(net), factor

    def __call__(self, images: Tensor) -> Certificate:
        certificate = self.honest(images)
        return dataclasses.replace(certificate, radius=certificate.radius * self.factor)

    def describe(self) -> dict[str, Any]:
        return self.honest.describe()


def model(factor: float = 1.0) -> Classifier:
    head = UnitRowHead(9, 3, generator=torch.Generator().manual_seed(0))
    net = LipschitzNetwork([Flatten()], head, SHAPE).eval()
    return Classifier(net, lambda n, *rest: Claimed(n, factor), SHAPE, 3, "linear")


def images() -> Tensor:
    return torch.rand(5, *SHAPE, generator=torch.Generator().manual_seed(1))


def audited(of: Classifier, stated: dict[str, Any] | None = None) -> Audit:
    return audit(of, images(), TRUTH, EPS, attacks=("minimal-norm", "pgd"), steps=20, stated=stated)


def stated(of: Classifier) -> dict[str, Any]:
    """What a bundle states about a network."""
    certifier = MarginCertifier(of.net)
    return json.loads(json.dumps(certifier.describe() | {"model_sha256": certifier.model_sha256}))


def test_what_holds_is_reported_sample_by_sample() -> None:
    honest = model()
    found = audited(honest, stated(honest))
    document = json.loads(json.dumps(found.document(), allow_nan=False))
    assert document["holds"]
    assert document["violations"] == []
    certificate = honest.certify(images())
    assert [s["radius"] for s in document["samples"]] == certificate.radius.tolist()
    assert [s["label"] for s in document["samples"]] == TRUTH.tolist()
    # linear logits: the radius is the distance to the boundary
    for sample in document["samples"]:
        assert sample["radius"] <= sample["distance"] <= sample["radius"] * (1 + 1e-9) + 1e-9
    right = certificate.label == TRUTH
    for name, value in EPS.items():
        share = int((right & (certificate.radius > float(value))).sum()) / 5
        assert document["cra"][name] == document["attacked"][name] == share
        assert document["gap"][name] == 0
    assert 1 <= document["closest"] <= 1 + 1e-9
    assert [layer["name"] for layer in document["slopes"]] == ["K", "body.0"]
    assert all(0.99 < layer["estimate"] <= 1 + 1e-9 for layer in document["slopes"])
    assert {check["name"] for check in document["checks"]} == {
        "labels", "batches", "shares", "weights", "radii", "slack", "product", "distances"
    }  # fmt: skip
    assert document["environment"]["tf32"] is False


def test_a_radius_too_large_by_a_millionth_leaves_a_file_with_the_counterexample(tmp_path: Path) -> None:
    dishonest = model(1 + 1e-6)
    found = audited(dishonest)
    attacks = [v for v in found.violations if v.kind == "attack"]
    assert len(attacks) == int((found.certificate.radius > 0).sum()) > 0
    assert not found.document()["holds"]
    paths = write_reproducers(found.violations, tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted(paths)
    assert [path.name for path in paths][:2] == ["reproducer-0.npz", "reproducer-1.npz"]
    with np.load(paths[0], allow_pickle=False) as file:
        data = {name: file[name] for name in file.files}
    assert str(data["kind"]) == "attack"
    perturbed, image = torch.from_numpy(data["perturbed"]), torch.from_numpy(data["image"])
    assert perturbed.dtype == torch.float64
    # everything can be computed again from the file and the network
    assert np.linalg.norm((perturbed - image).numpy()) <= data["radius"]
    again = dishonest.net(torch.stack([image, perturbed])).detach().numpy()
    np.testing.assert_allclose(again, np.stack([data["logits"], data["logits_perturbed"]]), atol=1e-12)
    assert again[0].argmax() == data["label"] != again[1].argmax()
    assert data["model_sha256"] == dishonest.certify(images()).model_sha256


def test_a_bound_below_a_slope_leaves_a_file_with_the_pair(tmp_path: Path) -> None:
    honest = model()
    low = stated(honest)
    low["lipschitz"]["bound"] = 0.9
    low["layers"][0]["bound"] = 0.9
    found = audited(honest, low)
    assert [v.kind for v in found.violations] == ["slope", "slope"]
    assert found.violations[0].detail.startswith("K: a pair with the slope ")
    assert [(layer.name, layer.bound, layer.holds) for layer in found.slopes] == [
        ("K", 0.9, False),
        ("body.0", 0.9, False),
    ]
    for path in write_reproducers(found.violations, tmp_path):
        with np.load(path, allow_pickle=False) as data:
            pair = torch.from_numpy(np.stack([data["image"], data["perturbed"]]))
            out = honest.net.features(pair)
            slope = (out[0] - out[1]).norm() / (pair[0] - pair[1]).norm()
            assert slope.item() == pytest.approx(float(data["slope"]), rel=1e-9)
            assert slope.item() > data["bound"]


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda s: s.update(model_sha256="0" * 64), "weights"),
        (lambda s: s["lipschitz"].update(bound=1 - 1e-12), "product"),
        (lambda s: s["head_distances"][1].__setitem__(0, 0.99 * s["head_distances"][1][0]), "distances"),
        (lambda s: s["head_distances"].pop(), "distances"),
    ],
)
def test_false_statements_are_counted_again(change: Any, name: str) -> None:
    honest = model()
    false = stated(honest)
    change(false)
    found = audited(honest, false)
    assert [check.name for check in found.checks if not check.holds] == [name]
    assert [v.kind for v in found.violations] == ["recount"]
    assert found.violations[0].detail.startswith(f"{name}: ")


def test_an_attack_that_lies_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    def liar(logits: Any, x: Tensor, labels: Tensor, **options: Any) -> AttackResult:
        zero = torch.zeros(len(x), dtype=torch.float64)
        return AttackResult(success=zero == 0, distance=zero, images=x.clone(), label=labels, norm=2.0)

    monkeypatch.setitem(runner.MINIMAL, "minimal-norm", liar)
    assert audited(model()).violations == ()


def test_the_steepest_pair_has_the_slope_that_it_is_found_for() -> None:
    weight = torch.randn(6, 9, generator=torch.Generator().manual_seed(2))

    def features(x: Tensor) -> Tensor:
        return (x.flatten(1) @ weight.T).abs()

    pair = steepest_pair(features, images())
    out = features(torch.stack([pair.first, pair.last]))
    slope = (out[0] - out[1]).norm() / (pair.first - pair.last).norm()
    assert slope.item() == pytest.approx(pair.estimate.value, rel=1e-9)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pgd,minimal", r"unknown attack 'minimal'; did you mean 'minimal-norm'\?"),
        ("", "unknown attack ''; known: "),
        ("pgd, pgd", "attack 'pgd' is given twice; leave one out"),
        ("autoattack", "unknown attack 'autoattack'"),
    ],
)
def test_names_of_attacks_that_are_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_attacks(text)


def test_names_of_attacks() -> None:
    assert parse_attacks("pgd, apgd-ce") == ["pgd", "apgd-ce"]


def test_bad_input_is_refused() -> None:
    other = Classifier(nn.Flatten().eval(), lambda net, *rest: Claimed(net, 1), SHAPE, 9, "none")
    with pytest.raises(UnsoundError, match="an audit needs a LipschitzNetwork, got a Flatten"):
        audited(other)
    with pytest.raises(DataError, match="an audit needs at least one image"):
        audit(model(), images()[:0], TRUTH[:0], EPS)
    with pytest.raises(DataError, match=r"labels must be an int64 tensor of shape \(5,\)"):
        audit(model(), images(), TRUTH[:3], EPS, attacks=("minimal-norm",))
    with pytest.raises(UnsoundError, match="cannot certify in train mode"):
        audited(model().train())


# ---- a deployed program


def near_the_boundary(net: LipschitzNetwork) -> Tensor:
    """Images that float32 cannot tell from the boundary between two classes."""
    draws = torch.rand(200, *SHAPE, generator=torch.Generator().manual_seed(2))
    labels = net(draws).argmax(1)
    differ = labels != labels.roll(1)
    return images_near_boundary(net, draws[differ], draws.roll(1, 0)[differ], dtype=torch.float32)


def rounded(claims: str) -> Audit:
    """The audit of a float32 program whose radii are those of these semantics."""
    head = UnitRowHead(9, 3, generator=torch.Generator().manual_seed(0))

    def certifier(net: nn.Module, semantics: str, arithmetic: str) -> Any:
        proved = MarginCertifier(net, claims, arithmetic if claims == "deployed" else "float64")

        def certify(images: Tensor) -> Certificate:
            return dataclasses.replace(proved(images), semantics=semantics, arithmetic=arithmetic)

        return certify

    program = LipschitzNetwork([Flatten()], head, SHAPE).eval().float()
    points = near_the_boundary(program.materialise().double())
    return audit(
        Classifier(program, certifier, SHAPE, 3, "linear"),
        points,
        torch.zeros(len(points), dtype=torch.int64),
        EPS,
        attacks=("minimal-norm",),
        steps=5,
        semantics="deployed",
        arithmetic="float32",
    )


def test_radii_of_real_arithmetic_are_refuted_for_a_program_in_float32(tmp_path: Path) -> None:
    found = rounded("real")
    kinds = {violation.kind for violation in found.violations}
    assert kinds == {"rounding"}
    first = found.violations[0]
    assert first.arrays["perturbed"].dtype == np.float32
    assert first.arrays["distance"] <= first.arrays["radius"]
    assert first.arrays["label"] != first.arrays["label_perturbed"]
    [path, *_] = write_reproducers(found.violations, tmp_path)
    assert str(np.load(path)["arithmetic"]) == "float32"


def test_radii_of_the_deployed_program_hold() -> None:
    found = rounded("deployed")
    assert found.violations == ()
    assert found.document()["environment"]["arithmetic"] == "float32"
