import contextlib
import math

import pytest
import torch
from torch.nn import functional

from lipnext import losses, systems
from lipnext.core.errors import ConfigError
from lipnext.core.experiment import LossSpec
from lipnext.training.objective import Objective

LOGITS = torch.tensor([[2.0, 1.0, -1.0], [0.5, 0.25, 1.0]], dtype=torch.float64)
LABELS = torch.tensor([0, 1])
DISTANCES = torch.tensor([[0, 1.0, 1.2], [1.0, 0, 1.4], [1.2, 1.4, 0]], dtype=torch.float64)


def test_the_radius_ramps_over_its_share_and_then_stays() -> None:
    objective = Objective(LossSpec(radius="36/255", ramp_from=0.1, ramp_to=3.0, ramp_share=0.5))
    radii = [objective.radius(p) for p in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert radii == pytest.approx([36 / 255 * f for f in (0.1, 1.55, 3.0, 3.0, 3.0)], rel=1e-12)


def test_the_temperature_moves_geometrically() -> None:
    assert Objective(LossSpec(temperature=0.5)).temperature(0.7) == 0.5
    objective = Objective(LossSpec(temperature=1.0, temperature_end=0.25))
    temperatures = [objective.temperature(p) for p in (0, 0.5, 1)]
    assert temperatures == pytest.approx([1, 0.5, 0.25], rel=1e-12)


def test_cross_entropy_alone_knows_no_radius() -> None:
    objective = Objective(LossSpec(name="cross-entropy", temperature=0.5))
    wanted = 0.5 * functional.cross_entropy(LOGITS / 0.5, LABELS)
    assert objective(LOGITS, LABELS, DISTANCES, 0.0).item() == pytest.approx(wanted.item(), rel=1e-12)
    assert torch.equal(objective(LOGITS, LABELS, DISTANCES, 0), objective(LOGITS, LABELS, DISTANCES, 1))


def test_emma_raises_every_rival_by_what_the_radius_allows() -> None:
    """For the first sample both rivals are out of reach, so the shift is the whole `radius * distance`."""
    objective = Objective(LossSpec(radius="36/255", ramp_from=1, ramp_to=1))
    radius = 36 / 255
    u = [0.0, -1 + radius * 1.0, -3 + radius * 1.2]
    wanted = math.log(sum(math.exp(v) for v in u))
    assert objective(LOGITS[:1], LABELS[:1], DISTANCES, 0.3).item() == pytest.approx(wanted, rel=1e-12)


def test_the_loss_grows_with_the_radius() -> None:
    objective = Objective(LossSpec(ramp_from=0.1, ramp_to=3.0, ramp_share=1))
    losses = [objective(LOGITS, LABELS, DISTANCES, p).item() for p in (0, 0.5, 1)]
    assert losses == sorted(losses)
    assert losses[0] < losses[2]


def test_a_loss_that_nobody_has_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"loss.name: there is no loss 'ema'; did you mean 'emma'"):
        Objective(LossSpec(name="ema"))


def test_a_system_can_bring_a_loss_of_its_own() -> None:
    seen = {}

    def own(network: object, images: torch.Tensor, labels: torch.Tensor, **rest: object) -> torch.Tensor:
        seen.update(rest, network=network)
        return images.sum() + labels.sum()

    spec = LossSpec(name="own", radius="0.5", ramp_from=1, ramp_to=1)
    network = systems.build_network(systems.experiment("tiny"), (1, 8, 8), 10)
    loss = Objective(spec, {"own": own}).of(network, LOGITS, LABELS, 0.3, contextlib.nullcontext())
    assert loss.item() == LOGITS.sum().item() + 1
    assert seen == {"network": network, "spec": spec, "radius": 0.5, "progress": 0.3}


def test_the_calibrated_loss_takes_its_numbers_from_the_experiment() -> None:
    spec = LossSpec(name="cll", radius="0.3", ramp_from=1, ramp_to=1, slack=0.2, penalty=0.01)
    wanted = losses.cll(LOGITS, LABELS, DISTANCES, 0.3, slack=0.2, penalty=0.01)
    assert Objective(spec)(LOGITS, LABELS, DISTANCES, 0.5).item() == wanted.item()


def test_hinge_asks_every_rival_for_the_margin() -> None:
    objective = Objective(LossSpec(name="hinge", offset=0.7))
    slow = 0.0
    for z, y in zip(LOGITS.tolist(), LABELS.tolist(), strict=True):
        slow += sum(max(0.0, 0.7 - z[y] + z[k]) for k in range(len(z)) if k != y) / len(z) / len(LOGITS)
    assert objective(LOGITS, LABELS, DISTANCES, 0.5).item() == pytest.approx(slow, rel=1e-12)
    assert slow > 0


def test_the_power_takes_over_late() -> None:
    spec = LossSpec(name="cross-entropy", power=2.0, power_after=0.6)
    shares = {0.0: 0.0, 0.6: 0.0, 0.7: 0.5, 0.8: 1.0, 1.0: 1.0}
    for progress, share in shares.items():
        wanted = losses.cross_entropy(LOGITS, LABELS, power=2.0, share=share)
        assert Objective(spec)(LOGITS, LABELS, DISTANCES, progress).item() == pytest.approx(
            wanted.item(), rel=1e-12
        )
    assert losses.cross_entropy(LOGITS, LABELS, power=2.0, share=0.0) == losses.cross_entropy(LOGITS, LABELS)
    never = LossSpec(name="cross-entropy", power=2.0, power_after=1.0)
    assert Objective(never)(LOGITS, LABELS, DISTANCES, 1.0) == losses.cross_entropy(LOGITS, LABELS)
