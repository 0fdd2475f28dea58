"""Losses and loss weights, by hand."""

import math

import numpy as np
import pytest
import torch

from training.collate import loss_weights
from training.losses import cross_modal_kl, evidence_weights, jensen_shannon, weighted_nll


def test_weighted_nll_by_hand():
    """Row 1: 1 * 0.5 + 2 * 1.0 = 2.5; row 2: 0.25 * 4.0 = 1.0. Together 3.5, over a step that weighs 7: 0.5."""
    log_probs = torch.tensor([[-0.5, -1.0, -9.0], [-4.0, -9.0, -9.0]], requires_grad=True)
    weight = torch.tensor([[1.0, 2.0, 0.0], [0.25, 0.0, 0.0]])
    loss = weighted_nll(log_probs, weight, 7.0)
    assert loss.shape == () and loss.item() == pytest.approx(0.5)
    loss.backward()
    torch.testing.assert_close(log_probs.grad, -weight / 7)


def test_the_step_may_be_cut_anywhere():
    log_probs, weight = -torch.rand(8, 5), torch.rand(8, 5)
    whole = weighted_nll(log_probs, weight, weight.sum())
    parts = sum(weighted_nll(log_probs[i : i + 2], weight[i : i + 2], weight.sum()) for i in range(0, 8, 2))
    torch.testing.assert_close(parts, whole)


@pytest.mark.parametrize("total", (0.0, torch.tensor(0.0), torch.tensor(5)))
def test_no_weight_is_a_loss_of_zero_with_a_gradient_of_zero(total):
    log_probs = torch.full((2, 3), -2.0, requires_grad=True)
    loss = weighted_nll(log_probs, torch.zeros(2, 3), total)
    loss.backward()
    assert loss.item() == 0 and torch.equal(log_probs.grad, torch.zeros(2, 3))


def test_half_precision_is_weighed_and_summed_in_single():
    log_probs = torch.full((1, 4096), -1.0, dtype=torch.bfloat16)
    assert weighted_nll(log_probs, torch.full((1, 4096), 1 / 3), 1.0).item() == pytest.approx(4096 / 3, rel=1e-6)


def test_rows_share_a_weight_of_one():
    """Two answers, of 3 tokens and of 1: thirds and a whole. By tokens, all count 1."""
    trained = np.array([0, 1, 1, 1, 0, 0, 1, 0], dtype=bool)
    third = np.float32(1 / 3)
    assert loss_weights(trained, "rows").tolist() == [0, third, third, third, 0, 0, 1, 0]
    assert loss_weights(trained, "tokens").tolist() == [0, 1, 1, 1, 0, 0, 1, 0]
    assert loss_weights(trained, "rows").dtype == loss_weights(trained, "tokens").dtype == np.float32


@pytest.mark.parametrize(
    "trained, expected", (([1, 1], [0.5, 0.5]), ([1, 0, 1], [1, 0, 1]), ([0, 0], [0, 0]), ([1], [1]), ([], []))
)
def test_rows_at_the_edges(trained, expected):
    assert loss_weights(np.array(trained, dtype=bool), "rows").tolist() == expected


# -- between views ---------------------------------------------------------------------------------


def k3(difference: float, **options) -> tuple[float, float]:
    """Value and gradient of one token whose teacher is `difference` above its student."""
    student = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    value = cross_modal_kl(torch.tensor([difference], dtype=torch.float64), student, torch.ones(1), **options)
    value.backward()
    return value.item(), student.grad.item()


@pytest.mark.parametrize("difference, value, gradient", (
    (0.0, 0.0, 0.0), (math.log(2), 0.306853, -1.0), (-math.log(2), 0.193147, 0.5), (2.0, 4.389056, -6.389056)))
@pytest.mark.parametrize("clamp", (10.0, None))
def test_k3_by_hand(difference, value, gradient, clamp):
    """e^k - k - 1, and 1 - e^k as its gradient."""
    assert k3(difference, clamp=clamp) == pytest.approx((value, gradient), abs=1e-6)


def test_the_published_clamp_has_no_gradient_where_it_matters_most():
    """From k = 2.61 on, the tokens that need the facts most are cut to 10 and teach nothing; without the clamp they do."""
    assert k3(2.6108, clamp=10.0)[1] == pytest.approx(-12.61, abs=0.01)
    assert k3(2.6110, clamp=10.0) == (10.0, 0.0) and k3(3.0, clamp=10.0) == (10.0, 0.0)
    assert k3(3.0) == pytest.approx((16.085537, -19.085537), abs=1e-6)
    assert k3(-12.0, clamp=10.0) == (10.0, 0.0) and k3(-12.0)[1] == pytest.approx(1.0, abs=1e-4)
    # Far out the exponential goes on as a straight line: finite, and with a gradient.
    assert k3(19.999)[1] == pytest.approx(k3(20.001)[1], rel=0.01) and math.isfinite(k3(500.0)[0])
    assert k3(500.0)[1] == pytest.approx(1 - math.exp(20))


def test_the_other_estimators_by_hand():
    """Teacher (3/4, 1/4), student (1/2, 1/2), the answer's token is the first."""
    teacher, student = torch.tensor([[0.75, 0.25]]).log(), torch.tensor([[0.5, 0.5]]).log()
    one = torch.ones(1)
    token = teacher[:, 0], student[:, 0], one
    assert cross_modal_kl(*token, estimator="forward").item() == pytest.approx(math.log(1.5))
    assert cross_modal_kl(*token, estimator="distill").item() == pytest.approx(math.log(2))
    full = cross_modal_kl(teacher, student, one, estimator="full").item()
    assert full == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    # Over the teacher's own samples, k3 and forward are estimates of other things: chi-squared less KL, and KL.
    ratio = torch.tensor([1.5, 0.5], dtype=torch.float64)
    p = torch.tensor([0.75, 0.25], dtype=torch.float64)
    expected = {name: sum(p[i] * cross_modal_kl(ratio[i : i + 1].log(), torch.zeros(1, dtype=torch.float64), one, estimator=name)
                          for i in range(2)).item() for name in ("forward", "k3")}
    assert expected["forward"] == pytest.approx(full) and expected["k3"] == pytest.approx(((p * ratio).sum() - 1).item() - full)


@pytest.mark.parametrize("estimator", ("k3", "forward", "distill", "full"))
def test_divergence_over_a_mask(estimator):
    shape = (2, 3, 5) if estimator == "full" else (2, 3)
    torch.manual_seed(0)
    teacher, student = (torch.randn(shape).log_softmax(-1).requires_grad_() for _ in range(2))
    mask = torch.tensor([[1.0, 0, 1], [0, 0, 0]])
    value = cross_modal_kl(teacher, student, mask, estimator=estimator)
    each = [cross_modal_kl(teacher[0, i : i + 1], student[0, i : i + 1], torch.ones(1), estimator=estimator) for i in (0, 2)]
    assert value.item() == pytest.approx(sum(each).item() / 2)
    value.backward()
    assert teacher.grad is None, "the teacher gets no gradient"
    counted = student.grad.reshape(2, 3, -1).abs().sum(-1) > 0
    assert torch.equal(counted, mask.bool())
    student.grad = None
    nothing = cross_modal_kl(teacher, student, torch.zeros(2, 3), estimator=estimator)
    nothing.backward()
    assert nothing.item() == 0 and not student.grad.any()
    same = cross_modal_kl(teacher, teacher.detach().clone().requires_grad_(), mask, estimator=estimator)
    assert same.item() == pytest.approx(0, abs=1e-6) or estimator == "distill"


def test_what_is_masked_out_may_be_infinite():
    student = torch.tensor([float("-inf"), -1.0], requires_grad=True)
    value = cross_modal_kl(torch.tensor([-1.0, -0.5]), student, torch.tensor([0, 1]), estimator="forward")
    value.backward()
    assert value.item() == 0.5 and student.grad.tolist() == [0, -1]


@pytest.mark.parametrize("options, said", (({"estimator": "k4"}, "no such estimator: k4"), (
    {"estimator": "forward", "clamp": 10.0}, "a clamp belongs to the estimator k3")))
def test_divergences_that_do_not_exist(options, said):
    with pytest.raises(ValueError, match=said):
        cross_modal_kl(torch.zeros(2), torch.zeros(2), torch.ones(2), **options)
    with pytest.raises(ValueError, match="are of different tokens"):
        cross_modal_kl(torch.zeros(3), torch.zeros(2), torch.ones(2))
    with pytest.raises(ValueError, match="a mask of shape"):
        cross_modal_kl(torch.zeros(2), torch.zeros(2), torch.ones(3))


def test_jensen_shannon_by_hand():
    """(3/4, 1/4) and (1/4, 3/4) with the middle (1/2, 1/2): KL of either to it is 3/4 ln 3/2 + 1/4 ln 1/2. At most ln 2."""
    one, two = torch.tensor([[0.75, 0.25], [1 - 1e-7, 1e-7]]).log(), torch.tensor([[0.25, 0.75], [1e-7, 1 - 1e-7]]).log()
    value = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert jensen_shannon(one[:1], two[:1], torch.ones(1)).item() == pytest.approx(value)
    assert jensen_shannon(two[:1], one[:1], torch.ones(1)).item() == pytest.approx(value)
    assert jensen_shannon(one[1:], two[1:], torch.ones(1)).item() == pytest.approx(math.log(2), rel=1e-4)
    assert jensen_shannon(one, one, torch.ones(2)).item() == pytest.approx(0, abs=1e-7)
    one.requires_grad_(), two.requires_grad_()
    jensen_shannon(one, two, torch.tensor([1.0, 0])).backward()
    assert one.grad[0].any() and two.grad[0].any() and not one.grad[1].any()


def test_evidence_by_hand():
    """0.9 with and 0.4 without the picture: 0.2 + 0.8 * 0.5. It counts as much when the picture speaks against the token."""
    with_picture = torch.tensor([0.9, 0.4, 0.3]).log().requires_grad_()
    weights = evidence_weights(with_picture, torch.tensor([0.4, 0.9, 0.3]).log(), 0.2)
    assert weights.tolist() == pytest.approx([0.6, 0.6, 0.2]) and not weights.requires_grad
    assert evidence_weights(with_picture, torch.tensor([0.4, 0.9, 0.3]).log(), 1.0).tolist() == [1, 1, 1]
