"""A classifier checks its input, splits into batches without a trace, and never uses a stale bound."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lipnext.core.bound import LipschitzBound
from lipnext.core.certificate import Certificate, Semantics
from lipnext.core.classifier import Classifier
from lipnext.core.errors import ConfigError, DataError, UnsoundError
from lipnext.core.files import sha256_tensors
from lipnext.core.system import Certifier

SHAPE = (1, 2, 2)


class Prover:
    """Counts its proofs; the certificate of a batch tells which weights it was proved for."""

    def __init__(self) -> None:
        self.proofs = 0

    def __call__(
        self, net: nn.Module, semantics: Semantics = "real", arithmetic: str = "float64"
    ) -> Certifier:
        self.proofs += 1
        frozen = copy.deepcopy(net).double()
        digest = sha256_tensors(frozen.state_dict())

        def certify(images: Tensor) -> Certificate:
            top = frozen(images.double()).topk(2, dim=1)
            margin = top.values[:, 0] - top.values[:, 1]
            return Certificate(
                label=top.indices[:, 0],
                radius=margin / 2,
                norm=2.0,
                kind="deterministic",
                confidence=1.0,
                semantics=semantics,
                arithmetic=arithmetic,
                slack=torch.zeros_like(margin),
                margin=margin,
                lipschitz=LipschitzBound(value=1.0, norm=2.0, proof="exact"),
                model_sha256=digest,
            )

        return certify


def classifier(dtype: torch.dtype = torch.float32) -> tuple[Classifier, Prover]:
    prover = Prover()
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3, dtype=dtype))
    return Classifier(net, prover, SHAPE, ("a", "b", "c"), "demo").eval(), prover


def images(n: int = 7) -> Tensor:
    return torch.rand(n, *SHAPE)


def test_batches_leave_no_trace_and_progress_adds_up() -> None:
    model, prover = classifier()
    batch, steps = images(7), []
    whole = model.certify(batch)
    parts = model.certify(batch, batch_size=3, progress=steps.append)
    assert steps == [3, 3, 1]
    assert prover.proofs == 1
    assert parts.label.tolist() == whole.label.tolist()
    torch.testing.assert_close(parts.radius, whole.radius, rtol=1e-14, atol=1e-14)


def test_an_empty_batch_gives_an_empty_certificate() -> None:
    model, _ = classifier()
    assert len(model.certify(images(0))) == 0
    assert model.predict(images(0)).shape == (0,)


def test_each_semantics_has_its_own_proof() -> None:
    model, prover = classifier()
    batch = images()
    assert model.certify(batch).semantics == "real"
    deployed = model.certify(batch, semantics="deployed", arithmetic="float32")
    assert (deployed.semantics, deployed.arithmetic) == ("deployed", "float32")
    assert model.certify(batch).semantics == "real"
    assert prover.proofs == 3  # one is kept, not one a semantics: each holds a copy of the weights


def test_forward_and_predict() -> None:
    model, _ = classifier(torch.float64)
    batch = images()
    assert torch.equal(model(batch), model.net(batch))
    assert torch.equal(model.predict(batch), model.net(batch).argmax(1))
    assert model.predict(batch.float()).dtype == torch.int64
    assert model(batch).requires_grad
    assert not model.certify(batch).radius.requires_grad


def change_in_place(net: Any) -> None:
    with torch.no_grad():
        net[1].weight[0, 0] += 1


def change_through_data(net: Any) -> None:
    net[1].weight.data[0, 0] += 1


def change_through_numpy(net: Any) -> None:
    net[1].weight.detach().numpy()[0, 0] += 1


def change_by_replacing(net: Any) -> None:
    net[1] = nn.Linear(4, 3, dtype=torch.float32).eval()


def change_structure(net: Any) -> None:
    net.append(nn.Tanh().eval())


@pytest.mark.parametrize(
    "change",
    [change_in_place, change_through_data, change_through_numpy, change_by_replacing, change_structure],
)
def test_bounds_are_proved_again_whenever_the_network_changed(change: Any) -> None:
    model, prover = classifier()
    batch = images()
    before = model.certify(batch)
    model.certify(batch)
    assert prover.proofs == 1
    change(model.net)
    after = model.certify(batch)
    assert prover.proofs == 2
    assert not torch.equal(before.margin, after.margin)


def test_a_plain_attribute_counts_too() -> None:
    model, prover = classifier()
    model.certify(images())
    model.net[1].gain = 2.0  # nothing of it shows in the weights or in the repr
    model.certify(images())
    assert prover.proofs == 2


def test_a_hidden_buffer_counts_as_weights() -> None:
    model, prover = classifier()
    model.net.register_buffer("scale", torch.ones(1), persistent=False)
    model.certify(images())
    model.net.scale += 1  # type: ignore[operator]
    model.certify(images())
    assert prover.proofs == 2


def test_a_copy_is_independent() -> None:
    model, _ = classifier()
    batch = images()
    before = model.certify(batch)
    twin = copy.deepcopy(model)
    change_in_place(twin.net)
    assert not torch.equal(twin.certify(batch).margin, before.margin)
    assert torch.equal(model.certify(batch).margin, before.margin)


def test_the_weights_are_the_state_and_the_proof_is_not() -> None:
    model, _ = classifier()
    model.certify(images())
    assert list(model.state_dict()) == ["net.1.weight", "net.1.bias"]


def test_unsound_use_is_refused_before_anything_is_proved() -> None:
    model, prover = classifier()
    with pytest.raises(UnsoundError, match="cannot certify in train mode"):
        model.train().certify(images())
    model.eval()
    with pytest.raises(DataError, match="divide by 255"):
        model.certify(torch.zeros(1, *SHAPE, dtype=torch.uint8))
    with pytest.raises(DataError, match=r"must lie in \[0, 1\]"):
        model.predict(images() + 1)
    with pytest.raises(ConfigError, match="batch_size must be at least 1, got 0"):
        model.certify(images(), batch_size=0)
    assert prover.proofs == 0


def test_a_failed_proof_is_not_remembered() -> None:
    model, prover = classifier()
    model.certify(images())
    change_in_place(model.net)

    def refuse(net: nn.Module, semantics: Semantics = "real", arithmetic: str = "float64") -> Certifier:
        raise UnsoundError("unknown module")

    model.make_certifier = refuse
    for _ in range(2):
        with pytest.raises(UnsoundError, match="unknown module"):
            model.certify(images())
    assert prover.proofs == 1


def test_classes_and_shape_are_checked() -> None:
    net = nn.Identity()
    assert Classifier(net, Prover(), SHAPE, 3, "demo").classes == ("0", "1", "2")
    with pytest.raises(ConfigError, match="at least 2 classes with different names, got 1"):
        Classifier(net, Prover(), SHAPE, 1, "demo")
    with pytest.raises(ConfigError, match="different names"):
        Classifier(net, Prover(), SHAPE, ("a", "a"), "demo")
    with pytest.raises(
        ConfigError, match=r"input_shape must be \(C, H, W\) with positive sizes, got \(1, 0, 2\)"
    ):
        Classifier(net, Prover(), (1, 0, 2), 2, "demo")
