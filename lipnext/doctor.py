"""Does all work on this machine? A tiny model goes the whole way: train, certify, attack, save, reload."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from lipnext import runs
from lipnext.auditing.attack import minimal_norm, violations
from lipnext.auditing.lipschitz import estimate_lipschitz
from lipnext.certificates.graph import trace
from lipnext.core.certificate import Certificate
from lipnext.core.classifier import Classifier
from lipnext.core.eps import round_down, round_up
from lipnext.core.errors import LipnextError
from lipnext.core.experiment import Experiment, LossSpec, OptimSpec, TrainSpec
from lipnext.core.guard import check_certifiable
from lipnext.core.network import LipschitzNetwork
from lipnext.data.dataset import load as load_data
from lipnext.deployment.factory import load_factory
from lipnext.systems import get

IMAGES = 32


@dataclass(frozen=True)
class Check:
    """One line of the doctor's table."""

    name: str
    passed: bool
    detail: str


@dataclass(frozen=True)
class Row:
    """One operation of a network: its own bound with the proof, K up to it, or why it is refused."""

    place: str
    operation: str
    bound: float | None
    proof: str | None
    lipschitz: float | None
    problem: str | None


def examine_model(model: str, input_shape: tuple[int, int, int]) -> list[Row]:
    """List the operations of a network of one's own, refused ones included.

    Args:
        model: "file.py:factory".
        input_shape: (C, H, W).

    Raises:
        ConfigError: where there is no such network.
        UnsoundError: where it cannot be traced at all, or weights or environment do not allow a proof.
    """
    net = load_factory(model)
    check_certifiable(net)
    rows = []
    for place in trace(net, input_shape).places:
        # A sum or a concatenation has no bound of its own: it depends on the branches.
        own = getattr(place.operation, "factor", place.lipschitz)
        rows.append(
            Row(
                place=place.path,
                operation="" if place.operation is None else place.operation.label,
                bound=None if own is None else own.value,
                proof=None if own is None else own.proof,
                lipschitz=None if place.lipschitz is None else place.lipschitz.value,
                problem=place.problem,
            )
        )
    return rows


def examine() -> list[Check]:
    """Run all checks, about ten seconds; one that raises has failed; the others still run if they can."""
    checks = [_check("environment", _environment)]
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        checks.append(_check("train", lambda: _train(run)))
        if not checks[-1].passed:
            return checks
        model = runs.load(run)
        images = load_data(Experiment.from_yaml(run / runs.EXPERIMENT).data).test.float_images(slice(IMAGES))
        certificate = model.certify(images)
        checks += [
            _check("certify", lambda: _certify(certificate)),
            _check("attack", lambda: _attack(model, images, certificate)),
            _check("bound", lambda: _bound(model, images, certificate)),
            _check("reload", lambda: _reload(run, images, certificate)),
        ]
    return checks


def _check(name: str, action: Callable[[], tuple[bool, str]]) -> Check:
    try:
        return Check(name, *action())
    except LipnextError as error:
        return Check(name, False, str(error))


def _environment() -> tuple[bool, str]:
    check_certifiable(torch.nn.Linear(1, 1).eval())
    threads = torch.get_num_threads()
    return True, f"torch {torch.__version__}, {threads} threads, float64 products exact where they must be"


def _train(folder: Path) -> tuple[bool, str]:
    experiment = Experiment(
        system="lipnext",
        model=dict(get("lipnext").presets["tiny"]),
        train=TrainSpec(epochs=3, batch_size=64),
        optim=OptimSpec(lr=0.05),
        loss=LossSpec(temperature=0.25, ramp_to=1.0),
    )
    result = runs.train(experiment, folder)
    clean = result["clean"]
    return clean > 0.3, f"3 epochs on the digits: {round_down(clean, 3)} of the test part right (chance 0.1)"


def _certify(certificate: Certificate) -> tuple[bool, str]:
    positive = int((certificate.radius > 0).sum())
    largest = round_down(certificate.radius.max().item(), 3)
    return positive > 0, f"{positive} of {IMAGES} radii positive, largest {largest}"


def _attack(model: Classifier, images: torch.Tensor, certificate: Certificate) -> tuple[bool, str]:
    network = _executed(model)
    result = minimal_norm(network, images.double(), certificate.label)
    inside = violations(certificate, result)
    closest = (result.distance / certificate.radius.clamp_min(1e-12)).min().item()
    detail = f"{len(inside)} successes inside a radius; the closest attack needed {closest:.2f} radii"
    return len(inside) == 0, detail


def _bound(model: Classifier, images: torch.Tensor, certificate: Certificate) -> tuple[bool, str]:
    assert certificate.lipschitz is not None
    estimate = estimate_lipschitz(_executed(model).features, images.double())
    proved = certificate.lipschitz.value
    detail = f"steepest pair found {estimate.value:.6f}, proved bound {round_up(proved, 9)}"
    return estimate.value <= proved, detail


def _reload(folder: Path, images: torch.Tensor, certificate: Certificate) -> tuple[bool, str]:
    again = runs.load(folder).certify(images)
    same = torch.equal(again.radius, certificate.radius) and torch.equal(again.label, certificate.label)
    return same, "certificates bit for bit the same" if same else "certificates differ after loading again"


def _executed(model: Classifier) -> LipschitzNetwork:
    """What the certificate speaks of: the stored weights, in float64."""
    network = model.net
    assert isinstance(network, LipschitzNetwork)
    return network.materialise().double()
