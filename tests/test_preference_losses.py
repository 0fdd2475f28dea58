"""The preference losses as formulas: values at the start, reductions, signs of gradients, invariances, each by hand."""

import math

import pytest
import torch

from training.losses import anchor, conditional, dpo, gce, language_prior, noise_aware_q, svco, sympmo

LN2 = math.log(2)
ZERO = torch.zeros(3, dtype=torch.float64)


def numbers(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def slopes(value: torch.Tensor, *inputs: torch.Tensor) -> list[list[float]]:
    return [one.tolist() for one in torch.autograd.grad(value.sum(), inputs)]


def test_values_at_the_start():
    """Policy and reference agree: every log-ratio is 0."""
    assert dpo(ZERO, ZERO, 0.1).tolist() == pytest.approx([LN2] * 3)
    mdpo = dpo(ZERO, ZERO, 0.1) + conditional(ZERO, ZERO, 0.1) + anchor(ZERO, 0.1)
    assert mdpo.tolist() == pytest.approx([3 * LN2] * 3)
    assert (svco(ZERO, ZERO, ZERO, 0.1) + svco(ZERO, ZERO, ZERO, 0.1)).tolist() == pytest.approx([4 * LN2] * 3)
    for lam, eta in ((0.5, 1.0), (0.3, 0.2)):
        whole = dpo(ZERO, ZERO, 0.1) + sympmo(ZERO, ZERO, ZERO, ZERO, 0.1, lam, 1e-4, eta)
        assert whole.tolist() == pytest.approx([LN2 * (1 + 2 * lam + 2 * eta)] * 3)
    for q in (0.2, 0.7, 1.0):
        assert gce(ZERO, q).tolist() == pytest.approx([(1 - 0.5**q) / q] * 3)
    assert language_prior(ZERO, 0.1).tolist() == pytest.approx([LN2] * 3)


def test_values_by_hand():
    chosen, rejected = numbers(3.0, -1.0), numbers(1.0, 2.0)
    assert dpo(chosen, rejected, 0.5).tolist() == pytest.approx([-math.log(sigmoid(1.0)), -math.log(sigmoid(-1.5))])
    assert conditional(chosen, rejected, 0.5).tolist() == dpo(chosen, rejected, 0.5).tolist()
    assert anchor(chosen, 0.5, 0.25).tolist() == pytest.approx([-math.log(sigmoid(1.25)), -math.log(sigmoid(-0.75))])
    assert language_prior(chosen, 0.5).tolist() == pytest.approx([-math.log(sigmoid(-1.5)), -math.log(sigmoid(0.5))])
    assert gce(numbers(1.0), 0.5).item() == pytest.approx((1 - sigmoid(1.0) ** 0.5) / 0.5)
    one = sympmo(*(numbers(x) for x in (1.0, 0.0, -1.0, 2.0)), 0.5, 0.5, 0.1, 2.0)     # margins 1 and 3
    hand = -0.5 * (math.log(sigmoid(0.5)) + math.log(sigmoid(1.5))) + 0.1 * 4 - 2 * (math.log(sigmoid(0.5)) + math.log(sigmoid(1.0)))
    assert one.item() == pytest.approx(hand)
    two = svco(numbers(2.0), numbers(1.0), numbers(-3.0), 0.5)
    assert two.item() == pytest.approx(-math.log(sigmoid(0.5)) - math.log(sigmoid(2.0)))


@pytest.mark.parametrize("margin", [-4.0, -0.3, 0.0, 2.5, 15.0])
def test_generalised_cross_entropy_lies_between_dpo_and_the_error(margin):
    value = numbers(margin)
    bce = -math.log(sigmoid(margin))
    assert gce(value, 0.0).item() == pytest.approx(bce, abs=1e-12)
    assert gce(value, 1e-9).item() == pytest.approx(bce, rel=1e-6, abs=1e-12)
    assert gce(value, 1.0).item() == pytest.approx(1 - sigmoid(margin), abs=1e-12)
    falling = [gce(value, q).item() for q in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert all(one >= two for one, two in zip(falling, falling[1:]))
    for q in (0.0, 0.3, 1.0):
        (slope,) = slopes(gce(value, q), value)
        assert slope[0] == pytest.approx(-(1 - sigmoid(margin)) * sigmoid(margin) ** q, rel=1e-9)


def test_q_takes_no_gradient_and_must_be_a_share():
    q = torch.tensor(0.5, requires_grad=True)
    gce(numbers(1.0), q).sum().backward()
    assert q.grad is None
    for wrong in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="between 0 and 1"):
            gce(numbers(1.0), wrong)


def test_q_of_the_paper_and_of_the_released_code():
    zero, wide, wrong = torch.zeros(4), torch.full((4,), 40.0), torch.full((4,), -40.0)
    assert noise_aware_q(zero, 0.5, form="paper").item() == pytest.approx(0.5)
    assert noise_aware_q(zero, 0.5, form="code").item() == pytest.approx(1.0)
    assert noise_aware_q(wide, 0.5, form="paper").item() == pytest.approx(0.01)
    assert noise_aware_q(wide, 0.5, form="code").item() == pytest.approx(0.001)
    assert noise_aware_q(wrong, 0.5, form="code").item() == noise_aware_q(wrong, 0.5, form="paper").item() == pytest.approx(1.0)
    mean = torch.tensor([1.0, 3.0])
    assert noise_aware_q(mean, 0.5, form="paper").item() == pytest.approx(1 - sigmoid(1.0))
    with pytest.raises(ValueError, match="paper and code"):
        noise_aware_q(zero, 0.5, form="half")


def test_signs_of_gradients():
    own, rejected, other, blind = (numbers(x) for x in (0.3, -0.2, 0.7, 0.1))
    for value, inputs, signs in (
        (dpo(own, rejected, 0.1), (own, rejected), (-1, 1)),
        (conditional(own, other, 0.1), (own, other), (-1, 1)),
        (anchor(own, 0.1), (own,), (-1,)),
        (language_prior(blind, 0.1), (blind,), (1,)),
        (sympmo(own, rejected, other, blind, 0.1, 0.5, 0.0, 1.0), (own, rejected, other, blind), (-1, 1, 1, -1)),
    ):
        assert [math.copysign(1, slope[0]) for slope in slopes(value, *inputs)] == list(signs)
    (slope,) = slopes(anchor(own, 0.1, 0.5), own)
    assert slope[0] == pytest.approx(-0.1 * sigmoid(-(0.1 * 0.3 - 0.5)))
    for d in (-3.0, 0.1, 500.0):
        blind = numbers(d)
        (slope,) = slopes(language_prior(blind, 0.1), blind)
        assert slope[0] == pytest.approx(0.1 * sigmoid(0.1 * d)), "never 0: it goes on pushing"


def test_equal_pictures_teach_nothing_and_cost_ln_2():
    """The chosen answer under the same picture twice: one log-probability, whatever it is made of."""
    weight = numbers(1.3)
    own = other = 2.0 * weight
    value = conditional(own, other, 0.1)
    assert value.item() == pytest.approx(LN2) and slopes(value, weight) == [[0.0]]
    assert svco(own, weight, other, 0.1).item() >= 2 * LN2


def test_a_constant_of_a_picture_cancels_in_sympmo_and_not_in_the_conditional_term():
    d11, d12, d21, d22 = (numbers(x) for x in (0.5, -0.4, -0.1, 0.9))
    shift = 0.7
    one = sympmo(d11, d12, d21, d22, 0.1, 0.5, 0.1, 0.0)
    two = sympmo(d11 + shift, d12 + shift, d21, d22, 0.1, 0.5, 0.1, 0.0)
    assert one.item() == pytest.approx(two.item(), abs=1e-12)
    assert abs(conditional(d11, d21, 0.1).item() - conditional(d11 + shift, d21, 0.1).item()) > 0.01
    assert dpo(d11, d12, 0.1).item() == pytest.approx(dpo(d11 + shift, d12 + shift, 0.1).item(), abs=1e-12)
    assert anchor(d11 + shift, 0.1).item() != anchor(d11, 0.1).item()
    swapped = sympmo(d22, d21, d12, d11, 0.1, 0.5, 0.1, 1.0)
    assert swapped.item() == pytest.approx(sympmo(d11, d12, d21, d22, 0.1, 0.5, 0.1, 1.0).item(), abs=1e-12)


def test_extreme_log_ratios_stay_finite():
    far = numbers(-1e4, 1e4)
    for value in (dpo(far, -far, 1.0), anchor(far, 1.0), gce(far, 0.5), gce(far, 0.0), language_prior(far, 1.0)):
        assert value.isfinite().all()
        assert torch.autograd.grad(value.sum(), far)[0].isfinite().all()
