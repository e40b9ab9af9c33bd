"""The rounded normal noise: its stored distribution, how it is drawn, and that no rounding error is made with it."""

from collections import Counter
from decimal import Decimal, localcontext
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from scipy import special, stats

from lipnext.bounds.normal import normal_cdf
from lipnext.certificates import noise


def variation(weights: list[int]) -> Decimal:
    """Half the summed differences from a rounded normal number, tails included, by another formula than the table's."""
    with localcontext() as context:
        context.prec = 50
        border = [normal_cdf((n + 0.5) / noise.LEVELS)[0] for n in range(8192)]
        mass = [2 * border[0] - 1, *(b - a for a, b in pairwise(border))]
        apart = [abs(Decimal(weights[8192 + n]) / 2**63 - p) for n, p in enumerate(mass)]
        return (apart[0] + 2 * sum(apart[1:]) + 2 * (1 - border[-1])) / 2


@pytest.mark.slow
def test_the_stored_distribution_is_within_its_total_variation() -> None:
    weights = noise.weights()
    assert sum(weights) == 2**63
    assert weights[1:] == weights[:0:-1]
    assert variation(weights) <= Decimal(noise.TOTAL_VARIATION)
    # The measure sees one draw in 2^40 that went to another number.
    spoilt = weights.copy()
    spoilt[8192] -= 2**24
    spoilt[8193] += 2**24
    assert variation(spoilt) > Decimal(noise.TOTAL_VARIATION)


def test_the_stored_distribution_is_that_of_scipy() -> None:
    edges = torch.arange(-8192.5, 8192) / noise.LEVELS
    mass = torch.from_numpy(special.ndtr(edges.numpy())).diff()
    stored = torch.tensor([weight / 2**63 for weight in noise.weights()])
    torch.testing.assert_close(stored, mass, rtol=0, atol=2e-15)


def test_the_slots_hold_every_draw_once() -> None:
    keep, other = noise._alias()
    drawn: Counter[int] = Counter()
    for slot, (own, number) in enumerate(zip(keep.tolist(), other.tolist(), strict=True)):
        assert 0 <= own <= 2**49
        drawn[slot - 8192] += own
        drawn[number] += 2**49 - own
    assert [drawn[n] for n in range(-8192, 8192)] == noise.weights()


def test_draws_are_those_of_a_rounded_normal_number_and_follow_from_the_generator() -> None:
    drawn = noise.rounded_normal((300, 1000), torch.Generator().manual_seed(3))
    assert drawn.dtype == torch.int16
    assert torch.equal(drawn, noise.rounded_normal((300, 1000), torch.Generator().manual_seed(3)))
    assert not torch.equal(drawn, noise.rounded_normal((300, 1000), torch.Generator().manual_seed(4)))
    # 40 equally likely cells; the p-value of one fixed seed is no matter of luck.
    edges = torch.from_numpy(stats.norm.ppf([k / 40 for k in range(1, 40)])) * noise.LEVELS
    cells = torch.bucketize(drawn.double().flatten() + 1e-9, edges.round() + 0.5).bincount(minlength=40)
    exact = torch.from_numpy(special.ndtr(((edges.round() + 0.5) / noise.LEVELS).numpy()))
    expected = torch.cat([exact[:1], exact.diff(), 1 - exact[-1:]]) * drawn.numel()
    assert stats.chisquare(cells.numpy(), expected.numpy()).pvalue > 0.001
    # Neighbours and rows know nothing of one another.
    x = drawn.double() / noise.LEVELS
    assert abs((x[:, 1:] * x[:, :-1]).mean()) < 0.01
    assert abs((x[1:] * x[:-1]).mean()) < 0.01
    assert (x**4).mean().item() == pytest.approx(3, abs=0.05)


def test_a_rounded_sum_is_the_sum_of_the_rounded_noise() -> None:
    spacing, step = Fraction(0.37) / noise.LEVELS, 12_345
    for delta in torch.randn(200, generator=torch.Generator().manual_seed(0)).tolist():
        assert round((step * spacing + Fraction(delta)) / spacing) == step + round(Fraction(delta) / spacing)
