"""CGGM: coefficients with and without guards, the direction term, and why modulation acts on the update."""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from tests.anchors import ANCHORS, det, numbers, same
from training.balance.cggm import coefficients, cosine, direction_cosines, direction_loss, option_gradient

KNOWN = ANCHORS["CGGM"]


@pytest.mark.parametrize("case", KNOWN["coefficients"], ids=lambda case: str(case["now"]))
def test_known_coefficients(case):
    found = coefficients(case["now"], case["before"], guard=False)
    assert found.dtype == torch.float64
    same(found, case["expected"])
    same(coefficients(numbers(case["now"]), numbers(case["before"])), case["expected"])


def test_coefficients_by_hand():
    """The first improves by .3, the second by .1: c = (.1 / .4, .3 / .4). The faster one is held back."""
    torch.testing.assert_close(coefficients([0.5, 0.4], [0.2, 0.3]), numbers([0.25, 0.75]), rtol=0, atol=1e-7)


def test_coefficients_sum_to_one_less_than_there_are_and_ignore_the_sign_of_the_metric():
    """sum c = M - s / (s + 1e-8). An error rate in place of an accuracy gives the same coefficients."""
    torch.manual_seed(0)
    for size in (2, 3, 5):
        for _ in range(200):
            now, before = torch.rand(2, size, dtype=torch.float64)
            s = (now - before).sum()
            if abs(s) < 0.01:
                continue
            found = coefficients(now, before, guard=False)
            assert found.sum().item() == pytest.approx((size - s / (s + 1e-8)).item(), abs=1e-9)
            assert found.sum().item() == pytest.approx(size - 1, abs=1e-5)
            turned = coefficients(1 - now, 1 - before, guard=False)
            torch.testing.assert_close(turned, found, rtol=0, atol=1e-8 * 3 / s.item() ** 2)


def test_the_guard():
    """Improvements that cancel: as released the coefficients run away, guarded they are 1."""
    still = [0.5, 0.6], [0.4, 0.7]
    assert coefficients(*still, guard=False).abs().max() > 1e6 and torch.equal(coefficients(*still), torch.ones(2).double())
    # Sums of 1.1e-3 and 0.9e-3 lie on both sides of the threshold.
    assert coefficients([0.0011, 0.0], [0.0, 0.0]).tolist() == [0.1, pytest.approx(1.0, abs=1e-4)]
    assert coefficients([0.0009, 0.0], [0.0, 0.0]).tolist() == [1.0, 1.0]
    # d = (.5, -.4), s = .1: c = (-4, 5), an ascent for the first.
    torch.testing.assert_close(coefficients([0.5, 0.1], [0.0, 0.5], guard=False), numbers([-4, 5]), rtol=1e-6, atol=0)
    assert coefficients([0.5, 0.1], [0.0, 0.5]).tolist() == [0.1, 2.0]
    torch.manual_seed(0)
    for _ in range(300):
        now, before = (torch.randint(0, 9, (2,)) / 8 for _ in range(2))
        found = coefficients(now, before)
        assert 0.1 <= found.min() and found.max() <= 2 and found.dtype == now.dtype


@pytest.mark.parametrize("now, before, words", (
    ([0.5, math.nan], [0.0, 0.0], "finite"), ([0.5], [0.5, 0.5], r"\(1,\) now and \(2,\) before"), ([], [], "modalities")))
def test_metrics_that_make_no_sense(now, before, words):
    with pytest.raises(ValueError, match=words):
        coefficients(now, before)


def test_known_direction_loss_and_its_gradient():
    joint = det((3, 4), 0.7, 0.1).requires_grad_()
    sides = [det((3, 4), 0.3 + 0.2 * k, 0.5 * k).requires_grad_() for k in range(3)]
    cosines = direction_cosines(joint, sides, mode="weight")
    same(cosines, KNOWN["cosines"])
    case = KNOWN["coefficients"][0]
    loss = direction_loss(coefficients(case["now"], case["before"], guard=False), cosines)
    assert loss.item() == pytest.approx(KNOWN["direction_loss"], abs=1e-14)
    loss.backward()
    same(joint.grad, KNOWN["joint_gradient"])
    assert all(side.grad is None for side in sides)


def test_direction_loss_by_hand():
    """c = (.5, -1), cosines (.6, -.2): (1.5 - (.3 + .2)) / 2 = .5. Where every cosine agrees with its sign it is 0."""
    assert direction_loss(numbers([0.5, -1]), numbers([0.6, -0.2])).item() == pytest.approx(0.5)
    assert direction_loss(numbers([0.5, -1]), numbers([1, -1])).item() == 0
    c = numbers([0.5, 1]).requires_grad_()
    assert not direction_loss(c, numbers([0, 0])).requires_grad
    with pytest.raises(ValueError, match="coefficients"):
        direction_loss(numbers([1, 1]), numbers([1, 1, 1]))


def test_cosines_at_the_edges():
    """(3, 4) and (4, 3): 24 / 25, at any scale; a vector of 0 has the cosine 0, with a gradient of 0."""
    one, two = numbers([[3], [4]]), numbers([[4], [3]])
    for scale in (1.0, 1e-200, 1e200):
        assert cosine(scale * one, two).item() == pytest.approx(0.96, abs=1e-15)
    assert cosine(1e-30 * one.float(), two.float()).item() == pytest.approx(0.96, abs=1e-6)
    zero = torch.zeros(2, 1, dtype=torch.float64, requires_grad=True)
    value = cosine(zero, two)
    value.backward()
    assert value.item() == 0 and torch.equal(zero.grad, torch.zeros_like(zero))
    with pytest.raises(ValueError, match="cosine between"):
        cosine(one, two.T)


def toy():
    """Hidden states of 5 rows, weights of an output layer of 4 options, labels."""
    return det((5, 3), 0.8, 0.2).requires_grad_(), det((4, 3), 0.5, 0.4).requires_grad_(), torch.tensor([0, 1, 3, 3, 2])


def test_the_formula_of_the_output_layers_gradient_is_autograds():
    hidden, weight, labels = toy()
    logits = hidden @ weight.T
    found = option_gradient(hidden, logits, labels)
    expected, = torch.autograd.grad(cross_entropy(logits, labels), weight)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-15)
    # With options that some rows do not have: the last option is row 2's and 3's answer, and missing elsewhere.
    exists = torch.tensor([[True, True, True, False]] * 2 + [[True] * 4] * 2 + [[True, True, True, False]])
    masked = (hidden @ weight.T).masked_fill(~exists, -math.inf)
    expected, = torch.autograd.grad(cross_entropy(masked, labels), weight)
    torch.testing.assert_close(option_gradient(hidden, masked, labels), expected, rtol=0, atol=1e-15)
    torch.testing.assert_close(option_gradient(hidden, hidden @ weight.T, labels, exists), expected, rtol=0, atol=1e-15)
    assert torch.equal(option_gradient(hidden[:0], logits[:0], labels[:0]), torch.zeros(4, 3, dtype=torch.float64))


def test_what_each_mode_of_the_direction_term_teaches():
    """analytic: everything below the frozen output layer. weight: the output layer alone. stale: nothing."""
    hidden, weight, labels = toy()
    views = [det((5, 3), 0.3 + k, k).requires_grad_() for k in range(2)]
    frozen = weight.detach()
    side_gradients = [option_gradient(view, view @ frozen.T, labels) for view in views]
    c = numbers([0.5, 1.0])

    def term(h):
        return direction_loss(c, direction_cosines(option_gradient(h, h @ frozen.T, labels), side_gradients))

    term(hidden).backward()
    assert all(view.grad is None for view in views) and hidden.grad.abs().max() > 0
    assert torch.autograd.gradcheck(term, hidden), "differentiated through h and through p"
    classifiers = [det((4, 3), 0.7 + k, k).requires_grad_() for k in range(2)]
    direction_loss(c, direction_cosines(weight, classifiers, mode="weight")).backward()
    assert weight.grad.abs().max() > 0 and all(one.grad is None for one in classifiers)
    gradient = option_gradient(hidden, hidden @ frozen.T, labels)
    stale = direction_loss(c, direction_cosines(gradient, side_gradients, mode="stale"))
    assert stale.item() == term(hidden).item() and not stale.requires_grad
    with pytest.raises(ValueError, match="analytic, weight and stale"):
        direction_cosines(gradient, side_gradients, mode="fresh")


def moved(optimizer, scales, *, on: str) -> torch.Tensor:
    """Where a least-squares problem ends after 30 steps whose gradient or rate is scaled by `scales`."""
    x = det((8, 3), 0.9, 0.1)
    y = x @ numbers([1, -2, 1])
    w = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    tool = optimizer([w], lr=0.01)
    for step in range(30):
        tool.zero_grad()
        ((x @ w - y) ** 2).mean().backward()
        scale = scales[step % len(scales)]
        if on == "gradient":
            w.grad *= scale
        else:
            tool.param_groups[0]["lr"] = 0.01 * scale
        tool.step()
    return w.detach()


def test_adam_ignores_a_constant_scale_of_the_gradient():
    """So modulation acts on the update, by a factor on the learning rate. Only changes of the scale reach Adam."""
    adam, sgd = torch.optim.Adam, torch.optim.SGD
    plain = moved(adam, [1.0], on="gradient")

    def away(w, plain):
        return ((w - plain).norm() / plain.norm()).item()

    assert away(moved(adam, [0.1], on="gradient"), plain) < 1e-5
    assert away(moved(adam, [0.1, 1.9], on="gradient"), plain) > 0.01
    assert away(moved(adam, [0.1], on="rate"), plain) > 0.5
    slow = moved(sgd, [1.0], on="gradient")
    assert away(moved(sgd, [0.1], on="gradient"), slow) > 0.5
    torch.testing.assert_close(moved(sgd, [0.1], on="rate"), moved(sgd, [0.1], on="gradient"), rtol=1e-12, atol=0)
