"""Mutants: bugs planted in the real code or in real files, each of which certify, audit or verify has to catch.

Two scenes. Linear: networks in memory whose distance to the decision boundary is known and equal to the certified radius, so
that a radius too large by a millionth is seen. Bundle: a small LipNeXt, saved, certified and recorded with the planted code, or
edited and sealed again, so that no hash can help.
"""

import contextlib
import copy
import dataclasses
import hashlib
import inspect
import io
import json
import math
import textwrap
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from helpers import Flatten, rotations
from torch import Tensor, nn

from lipnext.auditing.audit import Audit, audit
from lipnext.bounds.convolution import convolution_bound
from lipnext.bounds.spectral import estimate_spectral_norm
from lipnext.certificates import margin
from lipnext.certificates.margin import MarginCertifier
from lipnext.core.bound import LipschitzBound
from lipnext.core.certificate import Certificate
from lipnext.core.classifier import Classifier
from lipnext.core.eps import parse_eps
from lipnext.core.errors import BundleError, UnsoundError
from lipnext.core.experiment import Experiment
from lipnext.core.files import sha256_tensors
from lipnext.core.module import LipschitzModule
from lipnext.core.network import LipschitzNetwork
from lipnext.core.rounding import RoundingState, fraction_down
from lipnext.deployment import bundle
from lipnext.manifold.polar import retract
from lipnext.nn import block, mixing
from lipnext.nn.head import UnitRowHead
from lipnext.nn.position import Centre
from lipnext.systems import build_network

verify = pytest.importorskip("lipnext.verify")
pytest.importorskip("flint", reason="python-flint is not installed (extra: verify)")

SHAPE = (1, 4, 4)
EPS = {"1/8": parse_eps("1/8")}
FAST: dict[str, Any] = {"attacks": ("minimal-norm",), "steps": 20}
Patch = pytest.MonkeyPatch


# ---- Scenes


def classifier(
    rows: Tensor, bias: list[float] | None = None, body: list[LipschitzModule] | None = None
) -> Classifier:
    """Logits that are linear in the pixels, behind a body of isometries."""
    head = UnitRowHead(16, len(rows))
    with torch.no_grad():
        head.weight.copy_(rows)
        head.bias.copy_(torch.tensor(bias or [0.0] * len(rows)))
    head.normalised = True
    net = LipschitzNetwork([*(body or []), Flatten()], head, SHAPE)
    return Classifier(net.eval(), MarginCertifier, SHAPE, len(rows), "linear")


def opposite() -> Classifier:
    """Two classes with opposite unit rows: the boundary is a plane, at half the margin."""
    row = torch.randn(16, generator=torch.Generator().manual_seed(1))
    row = row / row.norm()
    return classifier(torch.stack([row, -row]))


def far_rival() -> Classifier:
    """Three classes; the runner-up's row is near the label's, the third class has the nearer boundary."""
    first, second, *_ = torch.eye(16).unbind()
    near = torch.tensor(0.2)
    return classifier(torch.stack([first, near.cos() * first + near.sin() * second, -first]), [1.0, 0.9, 0.8])


def noise() -> Tensor:
    return torch.rand(4, *SHAPE, generator=torch.Generator().manual_seed(0))


def examined(model: Classifier, images: Tensor | None = None) -> Audit:
    images = noise() if images is None else images
    return audit(model, images, torch.zeros(len(images), dtype=torch.int64), EPS, **FAST)


def kinds(found: Audit) -> set[str]:
    """What refuted a claim: attacks, slopes, or the name of what was counted again."""
    counted = {check.name for check in found.checks if not check.holds}
    return {v.kind for v in found.violations if v.kind != "recount"} | counted


EXPERIMENT = Experiment(system="lipnext", model={"width": 16, "depth": 2, "patch": 2, "shift": 0.125})


def network(drift: float = 0.0) -> LipschitzNetwork:
    """An untrained LipNeXt with encodings and biases; `drift` moves its matrices off the manifold."""
    net = build_network(EXPERIMENT, (1, 8, 8), 4)
    noise = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            step = torch.randn(parameter.shape, generator=noise)
            parameter.add_(step * (0.1 if name.endswith(("bias", "position")) else drift))
    return net


def saved(folder: Path, drift: float = 0.0) -> Path:
    """Save, certify and record, as the command line does."""
    bundle.save_bundle(network(drift), EXPERIMENT, ("a", "b", "c", "d"), folder)
    record(folder)
    return folder


def record(folder: Path) -> None:
    images = pictures()
    np.save(folder / "images.npy", images.numpy())
    bundle.load_bundle(folder).certify(images).to_jsonl(folder / "records.jsonl")


def pictures() -> Tensor:
    return torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(2))


def doubt(folder: Path) -> str:
    """The reason for which verify refuses a bundle, "" if everything holds."""
    data = ["--images", str(folder / "images.npy"), "--records", str(folder / "records.jsonl")]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = verify.main([str(folder), *data, "--json"])
    report = json.loads(out.getvalue())
    assert report["holds"] is (code == 0)
    return str(report.get("reason", ""))


def audited(folder: Path) -> Audit:
    stated = json.loads((folder / "certificate.json").read_text())
    images, truth = pictures(), torch.zeros(8, dtype=torch.int64)
    model = bundle.load_bundle(folder)
    return audit(model, images, truth, EPS, **FAST, stated=stated)


# ---- Tools to plant with


def rewrite(patch: Patch, owner: type, name: str, old: str, new: str) -> None:
    """Replace one piece of a method's source, and fail where that piece is not there any more."""
    function = getattr(owner, name)
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(old) == 1, f"{owner.__name__}.{name} holds {old!r} {source.count(old)} times"
    made: dict[str, Any] = {}
    exec(source.replace(old, new), inspect.unwrap(function).__globals__, made)
    patch.setattr(owner, name, made[name])


def edit_weights(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    change(tensors)
    (folder / "model.safetensors").write_bytes(safetensors.torch.save(tensors, {"format": "pt"}))


def edit_certificate(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    certificate = json.loads((folder / "certificate.json").read_text())
    change(certificate)
    (folder / "certificate.json").write_text(json.dumps(certificate, indent=2) + "\n")


def seal(folder: Path) -> None:
    """Make every hash right again, so that only mathematics can notice a change."""

    def hashes(certificate: dict[str, Any]) -> None:
        certificate["model_sha256"] = sha256_tensors(
            safetensors.torch.load_file(folder / "model.safetensors")
        )
        for key, name in (("weights_file_sha256", "model.safetensors"), ("config_sha256", "config.json")):
            certificate[key] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        rest = {key: value for key, value in certificate.items() if key != "certificate_sha256"}
        text = json.dumps(rest, sort_keys=True)
        certificate["certificate_sha256"] = hashlib.sha256(text.encode()).hexdigest()

    edit_certificate(folder, hashes)
    sha256 = json.loads((folder / "certificate.json").read_text())["model_sha256"]
    lines = (folder / "records.jsonl").read_text().splitlines()
    records = [json.loads(line) | {"model_sha256": sha256} for line in lines]
    (folder / "records.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))


# ---- Control: without a mutant everything holds


@pytest.mark.parametrize("make", [opposite, far_rival])
def test_control_linear(make: Callable[[], Classifier]) -> None:
    found = examined(make())
    assert kinds(found) == set()
    closest = found.closest()
    assert closest is not None
    # the radius is the distance, up to rounding: what is too large by a millionth shows
    assert 1 <= closest <= 1 + 1e-9


@pytest.mark.parametrize("drift", [0.0, 0.05])
def test_control_bundle(drift: float, tmp_path: Path) -> None:
    saved(tmp_path, drift)
    seal(tmp_path)
    assert kinds(audited(tmp_path)) == set()
    assert doubt(tmp_path) == ""


# ---- The mutants


def test_root_two_for_two(monkeypatch: Patch, tmp_path: Path) -> None:
    """Rows of unit length need not be orthogonal: their distance goes up to 2."""

    def orthogonal(rows: Tensor) -> Tensor:
        return math.sqrt(2) * (1 - torch.eye(len(rows)))

    monkeypatch.setattr(margin, "head_distances", orthogonal)
    assert {"attack", "radii"} <= kinds(examined(opposite()))
    assert "head_distances: 1.41421356" in doubt(saved(tmp_path))


def test_not_strictly_above_eps(monkeypatch: Patch) -> None:
    model = opposite()
    truth = model.certify(noise()).label
    exactly = Fraction(model.certify(noise()).radius.max().item())
    eps = {str(exactly): exactly}
    assert kinds(audit(model, noise(), truth, eps, **FAST)) == set()
    monkeypatch.setattr(
        Certificate, "certified_at", lambda self, e: self.radius >= fraction_down(parse_eps(e))
    )
    assert kinds(audit(model, noise(), truth, eps, **FAST)) == {"shares"}


def test_runner_up_only(monkeypatch: Patch) -> None:
    rewrite(
        monkeypatch,
        MarginCertifier,
        "__call__",
        "radius, rival = ratio.min(dim=1)",
        "rival = logits.scatter(1, labels[:, None], -math.inf).argmax(dim=1)\n"
        "    radius = ratio.gather(1, rival[:, None]).squeeze(1)",
    )
    assert {"attack", "radii"} <= kinds(examined(far_rival()))


def test_tie(monkeypatch: Patch) -> None:
    """Rivals that are not behind are left out of the minimum, so that a tie gets the next rival's radius."""
    first, second, *_ = torch.eye(16).unbind()
    model = classifier(torch.stack([first, second, -first]))
    image = torch.full((1, *SHAPE), 0.5)
    certificate = model.certify(image)
    assert certificate.radius.item() == 0
    assert kinds(examined(model, image)) == set()
    rewrite(
        monkeypatch,
        MarginCertifier,
        "__call__",
        "ratio.scatter_(1, labels[:, None], math.inf)",
        "ratio[margin <= 0] = math.inf",
    )
    assert model.certify(image).radius.item() > 0
    assert {"labels", "radii"} <= kinds(examined(model, image))


def test_power_iteration_for_a_bound(monkeypatch: Patch, tmp_path: Path) -> None:
    monkeypatch.setattr(
        mixing,
        "near_orthogonal_bound",
        lambda weight: LipschitzBound(
            value=estimate_spectral_norm(weight, steps=3).value, norm=2.0, proof="gram-residual"
        ),
    )
    assert "neither proved nor refuted" in doubt(saved(tmp_path))


def test_an_estimate_as_a_bound(monkeypatch: Patch) -> None:
    monkeypatch.setattr(
        mixing,
        "near_orthogonal_bound",
        lambda weight: LipschitzBound(value=estimate_spectral_norm(weight), norm=2.0, proof="gram-residual"),
    )
    model = Classifier(network().eval(), MarginCertifier, (1, 8, 8), 4, "lipnext")
    with pytest.raises(UnsoundError, match=r"an estimate \(power iteration, 50 steps\) is not a bound"):
        model.certify(pictures())


@pytest.fixture
def precision() -> Iterator[None]:
    """Put the settings back that go with TF32."""
    yield
    for place in (torch.backends.mkldnn, torch.backends.mkldnn.matmul, torch.backends.mkldnn.conv):
        if hasattr(place, "fp32_precision"):
            place.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")


@pytest.mark.usefixtures("precision")
def test_tf32_on(tmp_path: Path) -> None:
    saved(tmp_path)
    torch.backends.cuda.matmul.allow_tf32 = True
    with pytest.raises(UnsoundError, match=r"cannot certify with (TF32|reduced float32 products)"):
        bundle.load_bundle(tmp_path).certify(pictures())


def test_autocast_on(tmp_path: Path) -> None:
    saved(tmp_path)
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.raises(UnsoundError, match="cannot certify under autocast"),
    ):
        bundle.load_bundle(tmp_path).certify(pictures())


def test_bfloat16_weights(tmp_path: Path) -> None:
    model = Classifier(network().bfloat16().eval(), MarginCertifier, (1, 8, 8), 4, "lipnext")
    with pytest.raises(UnsoundError, match=r"in torch\.bfloat16; store the weights in float32 or float64"):
        model.certify(pictures())
    saved(tmp_path)
    edit_weights(tmp_path, lambda t: t.update({name: w.bfloat16().float() for name, w in t.items()}))
    with pytest.raises(BundleError, match="is not the file that was certified"):
        bundle.load_bundle(tmp_path)
    seal(tmp_path)
    assert "but its norms multiply to" in doubt(tmp_path)
    # what is stated is below the norms of the rounded matrices, even for new records
    record(tmp_path)
    assert "but its norms multiply to" in doubt(tmp_path)
    assert "slope" in kinds(audited(tmp_path))


class BatchNorm(LipschitzModule):
    """`(x - mean) / 4` with the running mean, which is a contraction in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(1, eps=0.0, affine=False)
        self.norm.running_var = torch.full((1,), 16.0)

    def forward(self, images: Tensor) -> Tensor:
        return self.norm(images)

    def lipschitz_bound(self) -> LipschitzBound:
        return LipschitzBound(value=0.25, norm=2.0, proof="scaling")

    def rounding(self, state: RoundingState) -> RoundingState:
        return RoundingState(norm=state.norm, error=state.error + 1e-12, unit=state.unit)


def test_batch_norm_in_train_mode(monkeypatch: Patch) -> None:
    rows = torch.stack([torch.eye(16)[0], -torch.eye(16)[0]])
    model = classifier(rows, body=[BatchNorm()])
    assert kinds(examined(model)) == set()
    model.net.body[0].train()
    with pytest.raises(UnsoundError, match=r"cannot certify in train mode \(body\.0 is\); call \.eval"):
        examined(model)
    model.net.eval()
    # in evaluation mode by its flag, but not by what it does
    monkeypatch.setattr(
        BatchNorm,
        "forward",
        lambda self, x: nn.functional.batch_norm(x, None, None, training=True, eps=1e-12),
    )
    assert {"batches", "slope"} <= kinds(examined(model))


def test_forgotten_standard_deviation(monkeypatch: Patch, tmp_path: Path) -> None:
    monkeypatch.setattr(Centre, "forward", lambda self, images: (images - 0.5) / 0.2)
    saved(tmp_path)
    assert {"slope", "attack"} <= kinds(audited(tmp_path))
    assert "record 0: " in doubt(tmp_path)


def test_bound_of_the_matrix_before_a_step(monkeypatch: Patch) -> None:
    """The certifier is kept although the weights have changed since."""
    layer = mixing.OrthogonalMixing(16, identity=True)

    class Mix(Flatten):
        def __init__(self) -> None:
            super().__init__()
            self.mix = layer

        def forward(self, images: Tensor) -> Tensor:
            return self.mix(images.flatten(1))

        def lipschitz_bound(self) -> LipschitzBound:
            return self.mix.lipschitz_bound()

        def rounding(self, state: RoundingState) -> RoundingState:
            return self.mix.rounding(state)

    head = UnitRowHead(16, 2)
    model = Classifier(LipschitzNetwork([Mix()], head, SHAPE).eval(), MarginCertifier, SHAPE, 2, "linear")
    rewrite(monkeypatch, Classifier, "_certifier", "self._proved[0] != state", "False")
    assert kinds(examined(model)) == set()
    with torch.no_grad():
        model.net.body[0].mix.weight.copy_(1.05 * rotations(n=16, seed=0))
    assert {"weights", "slope"} <= kinds(examined(model))


def test_bound_of_the_retracted_matrix(monkeypatch: Patch, tmp_path: Path) -> None:
    """What is proved is the matrix after the retraction, what is saved the one before it."""
    system = bundle.get("lipnext")

    def certify_retracted(net: nn.Module) -> Any:
        with torch.no_grad():
            for name, parameter in net.named_parameters():
                if name.endswith(("rotation", "product")):
                    parameter.copy_(retract(parameter.double()))
        return system.certify(net)

    def too_late(name: str) -> Any:
        return dataclasses.replace(system, certify=lambda net, *rest: certify_retracted(copy.deepcopy(net)))

    with monkeypatch.context() as patch:
        patch.setattr(bundle, "polish", lambda net: net.double().materialise().float())
        patch.setattr(bundle, "get", too_late)
        bundle.save_bundle(network(drift=0.02), EXPERIMENT, ("a", "b", "c", "d"), tmp_path)
    record(tmp_path)
    assert "slope" in kinds(audited(tmp_path))
    assert "but its norms multiply to" in doubt(tmp_path)


def test_a_thousandth_added_to_one_weight(tmp_path: Path) -> None:
    saved(tmp_path)
    edit_weights(tmp_path, lambda t: t["body.2.rotation"][3, 5].add_(1e-3))
    with pytest.raises(BundleError, match="is not the file that was certified"):
        bundle.load_bundle(tmp_path)
    seal(tmp_path)
    assert "layer body.2 claims" in doubt(tmp_path)


def test_radius_rounded_up(monkeypatch: Patch, tmp_path: Path) -> None:
    """At the sixth digit."""
    rewrite(
        monkeypatch,
        MarginCertifier,
        "__call__",
        "torch.where(proved, radius, 0.0)",
        "torch.where(proved, (radius * 1e6).ceil() / 1e6, 0.0)",
    )
    assert {"attack", "radii"} <= kinds(examined(opposite()))
    assert "is not proved; proved is about" in doubt(saved(tmp_path))


def test_radius_in_float32(monkeypatch: Patch) -> None:
    rewrite(
        monkeypatch,
        MarginCertifier,
        "__call__",
        "torch.where(proved, radius, 0.0)",
        "torch.where(proved, radius.float().double(), 0.0)",
    )
    assert "attack" in kinds(examined(opposite()))


def test_swapped_rows_of_the_head(tmp_path: Path) -> None:
    saved(tmp_path)
    edit_weights(tmp_path, lambda t: t.update({"head.weight": t["head.weight"][[1, 0, 2, 3]].contiguous()}))
    with pytest.raises(BundleError, match="is not the file that was certified"):
        bundle.load_bundle(tmp_path)
    seal(tmp_path)
    assert "distances" in kinds(audited(tmp_path))
    assert "head_distances: " in doubt(tmp_path)


def test_zeros_shifted_in_and_claimed_circular(monkeypatch: Patch, tmp_path: Path) -> None:
    """Still 1-Lipschitz, but not the network that the certificate describes."""

    def filled_with_zeros(tokens: Tensor, group: int, sign: int = 1) -> None:
        circular(tokens, group, sign)
        for part, (axis, step) in enumerate(((1, 1), (1, -1), (2, 1), (2, -1))):
            entering = 0 if sign * step > 0 else tokens.shape[axis] - 1
            tokens[..., part * group : (part + 1) * group].select(axis, entering).zero_()

    circular = block.shift_
    monkeypatch.setattr(block, "shift_", filled_with_zeros)
    assert "is that of no rival" in doubt(saved(tmp_path))


class SecondDifference(LipschitzModule):
    """`-x_(i-1) + 2 x_i - x_(i+1)` along rows, zeros around them, with the bound of the given padding."""

    kernel = torch.tensor([[[[-1.0, 2.0, -1.0]]]], dtype=torch.float64)

    def __init__(self, claimed: str) -> None:
        super().__init__()
        self.claimed = claimed

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.conv2d(images, self.kernel, padding=(0, 1))

    def lipschitz_bound(self) -> LipschitzBound:
        return convolution_bound(self.kernel, (3, 3), padding=(0, 1), padding_mode=self.claimed)

    def rounding(self, state: RoundingState) -> RoundingState:
        return RoundingState(norm=4 * state.norm, error=4 * state.error + 1e-12, unit=state.unit)


def test_zero_padding_claimed_circular() -> None:
    """On a circle of three pixels the norm is 2 - 2 cos(2 pi / 3) = 3; with zeros around it is 2 + sqrt 2."""
    images = torch.rand(6, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    found = {}
    for claimed in ("zeros", "circular"):
        head = UnitRowHead(9, 2, generator=torch.Generator().manual_seed(1))
        net = LipschitzNetwork([SecondDifference(claimed), Flatten()], head, (1, 3, 3)).eval()
        model = Classifier(net, MarginCertifier, (1, 3, 3), 2, "linear")
        found[claimed] = examined(model, images)
    assert kinds(found["zeros"]) == set()
    assert "slope" in kinds(found["circular"])
    layer = next(layer for layer in found["circular"].slopes if layer.name == "body.0")
    assert layer.bound == pytest.approx(3)
    assert layer.estimate == pytest.approx(2 + math.sqrt(2), rel=0.01)


def test_largest_layer_for_the_product(monkeypatch: Patch, tmp_path: Path) -> None:
    def largest(*bounds: LipschitzBound) -> LipschitzBound:
        return LipschitzBound(value=max(b.value for b in bounds), norm=2.0, proof="product")

    with monkeypatch.context() as patch:
        patch.setattr(margin.LipschitzBound, "compose", staticmethod(largest))
        saved(tmp_path)
    assert "product" in kinds(audited(tmp_path))
    assert "below the product of the layer bounds" in doubt(tmp_path)


def test_rounding_error_forgotten(monkeypatch: Patch, tmp_path: Path) -> None:
    monkeypatch.setattr(margin, "margin_errors", lambda rows, *rest: torch.zeros(len(rows), len(rows)))
    assert "margin_error 0.0 of" in doubt(saved(tmp_path))


def test_logits_in_float32(monkeypatch: Patch, tmp_path: Path) -> None:
    rewrite(
        monkeypatch,
        MarginCertifier,
        "__call__",
        "self.network(whole_blocks(images.double()))",
        "copy.deepcopy(self.network).float()(images.float()).double()",
    )
    monkeypatch.setattr(margin, "copy", copy, raising=False)
    saved(tmp_path)
    assert "slack" in kinds(audited(tmp_path))
    assert "is that of no rival" in doubt(tmp_path)


def test_margin_not_reduced_by_its_error(monkeypatch: Patch) -> None:
    """The slack is reported but not subtracted: seen only by who counts again."""
    rewrite(monkeypatch, MarginCertifier, "__call__", "tensor_down(margin - error)", "margin")
    found = examined(opposite())
    assert "slack" in kinds(found)
