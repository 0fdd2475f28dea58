"""M-SAM: the two-point step against known numbers, plain SAM, the base optimizer, and what may go wrong in between."""

import math
from copy import deepcopy

import pytest
import torch
from torch.nn.functional import cross_entropy, dropout

from tests.anchors import ANCHORS, numbers, same
from training.balance.msam import ModalitySAM, blend, perturbation

KNOWN = ANCHORS["MSAM"]
ROW, COLUMN = torch.arange(6)[:, None].double(), torch.arange(4)[None].double()
X = torch.sin(0.5 * (4 * ROW + COLUMN) + 0.3)
Y = torch.tensor([0, 1, 2, 0, 1, 2])


def weights(dtype=torch.float64):
    row, column = torch.arange(4)[:, None].double(), torch.arange(3)[None].double()
    return (0.1 * torch.cos(0.7 * (3 * row + column))).to(dtype).requires_grad_()


def passes(w, *, seen=None, set_to_none=True, loss=lambda w: cross_entropy(X.to(w) @ w, Y)):
    """The closure of a toy classifier; `seen` collects the weights at each call."""
    def closure():
        if seen is not None:
            seen.append(w.detach().clone())
        if w.grad is not None:
            w.grad = None if set_to_none else w.grad.zero_()
        value = loss(w)
        value.backward()
        return value
    return closure


def gradient(w):
    return torch.autograd.grad(cross_entropy(X @ w, Y), w)[0]


@pytest.mark.parametrize("set_to_none", (True, False))
def test_known_step(set_to_none):
    w, seen = weights(), []
    sam = ModalitySAM([w], torch.optim.SGD([w], lr=0.1), rho=0.05, share=0.625)
    before = w.detach().clone()
    g0, loss = gradient(w), sam.step(passes(w, seen=seen, set_to_none=set_to_none))
    assert loss.item() == pytest.approx(KNOWN["loss"], abs=1e-15)
    assert len(seen) == 2 and torch.equal(seen[0], before)
    assert (seen[1] - before).norm().item() == pytest.approx(0.05, abs=1e-12), "rho is the length of the step up"
    assert g0.norm().item() == pytest.approx(KNOWN["g0_norm"], abs=1e-13)
    assert gradient(seen[1].requires_grad_()).norm().item() == pytest.approx(KNOWN["g1_norm"], abs=1e-12)
    same(w.grad, KNOWN["blend"])
    same(w, KNOWN["W_after"])


def test_known_step_in_the_largest_norm():
    w, seen = weights(), []
    ModalitySAM([w], torch.optim.SGD([w], lr=0.1), rho=0.05, p=math.inf, share=0.625).step(passes(w, seen=seen))
    assert w.grad.norm().item() == pytest.approx(KNOWN["blend_norm_p_infinity"], abs=1e-12)
    torch.testing.assert_close((seen[1] - seen[0]).abs(), torch.full((4, 3), 0.05).double())


def test_blend_and_perturbation_by_hand():
    """(3) and (4) together have length 5: rho = 1 moves them by .6 and .8. Two radii share the one norm."""
    assert blend(numbers([1, 2]), numbers([3, -2]), 0.25).tolist() == [1.5, 1.0]
    pieces = [numbers([3]), numbers([[-4]])]
    torch.testing.assert_close(torch.cat([one.flatten() for one in perturbation(pieces, [1.0, 1.0], 2)]), numbers([0.6, -0.8]))
    torch.testing.assert_close(torch.cat([one.flatten() for one in perturbation(pieces, [1.0, 0.5], 2)]), numbers([0.6, -0.4]))
    assert [one.item() for one in perturbation(pieces, [1.0, 0.5], math.inf)] == [1.0, -0.5]
    assert not perturbation([torch.zeros(2)], [1.0], 2)[0].any(), "no gradient, no direction"


def test_a_full_share_is_sam_and_the_blend_is_linear_in_the_share():
    """SAM as its paper has it: w - lr g(w + rho g / |g|)."""
    start = weights().detach()
    g0 = gradient(weights())
    g1 = gradient((start + 0.05 * g0 / g0.norm()).requires_grad_())
    for share in (1.0, 0.25, torch.tensor(0.5)):
        w = weights()
        ModalitySAM([w], torch.optim.SGD([w], lr=0.1), rho=0.05, share=share).step(passes(w))
        torch.testing.assert_close(w.detach(), start - 0.1 * (float(share) * g1 + (1 - float(share)) * g0), rtol=0, atol=1e-12)


BASES = (lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=0.01),
         lambda params: torch.optim.AdamW(params, lr=0.01))


@pytest.mark.parametrize("base", BASES, ids=("sgd", "adamw"))
@pytest.mark.parametrize("options", ({"rho": 0.0}, {"rho": 0.05, "share": 0.0}), ids=("no-radius", "no-share"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16))
def test_without_radius_or_share_it_is_the_base_optimizer_bit_for_bit(base, options, dtype):
    plain, wrapped, seen = weights(dtype), weights(dtype), []
    optimizer = base([plain])
    sam = ModalitySAM([wrapped], base([wrapped]), **options)
    for _ in range(5):
        optimizer.zero_grad()
        cross_entropy(X.to(plain) @ plain, Y).backward()
        optimizer.step()
        sam.step(passes(wrapped, seen=seen))
    assert torch.equal(plain, wrapped) and len(seen) == 5, "one pass per step"
    torch.testing.assert_close(sam.state_dict()["state"], optimizer.state_dict()["state"], rtol=0, atol=0)


def test_share_and_radius_may_change_between_steps():
    w, seen = weights(), []
    sam = ModalitySAM([w], torch.optim.SGD([w], lr=0.1), rho=0.05, share=0.0)
    sam.step(passes(w, seen=seen))
    sam.share = 0.5
    sam.step(passes(w, seen=seen))
    sam.groups[0]["rho"] = 0.5
    sam.step(passes(w, seen=seen))
    assert len(seen) == 5
    assert (seen[2] - seen[1]).norm() == pytest.approx(0.05) and (seen[4] - seen[3]).norm() == pytest.approx(0.5)


def test_only_the_given_parameters_are_perturbed_and_all_are_updated():
    """The dominant tower alone: the other one stands still in between, and takes the blended gradient too."""
    a, b = weights(), torch.ones(3, dtype=torch.float64, requires_grad=True)
    seen = []

    def closure():
        seen.append((a.detach().clone(), b.detach().clone()))
        sam.zero_grad()
        loss = cross_entropy(X @ a + b.sin(), Y)
        loss.backward()
        return loss

    sam = ModalitySAM([{"params": [a], "rho": 0.1}], torch.optim.SGD([a, b], lr=0.1), rho=9.0)
    sam.step(closure)
    assert (seen[1][0] - seen[0][0]).norm() == pytest.approx(0.1) and torch.equal(seen[1][1], seen[0][1])
    (up, bias), bias_before = seen[1], seen[0][1]
    expected, = torch.autograd.grad(cross_entropy(X @ up + bias.requires_grad_().sin(), Y), bias)
    torch.testing.assert_close(b.detach(), bias_before - 0.1 * expected)


def test_parameters_without_gradients():
    """One is used in no pass, one only in the second: what is missing in one pass counts as 0 there, in both as missing."""
    never, late, early = (torch.ones(2, dtype=torch.float64, requires_grad=True) for _ in range(3))
    w, frozen, calls = weights(), torch.ones(1), []

    def loss(w):
        calls.append(1)
        return cross_entropy(X @ w, Y) + (late.sum() if len(calls) == 2 else 0)

    base = torch.optim.SGD([w, never, late], lr=0.1, weight_decay=0.5)
    sam = ModalitySAM([w, never, late, frozen], base, rho=0.05, share=0.25)
    sam.step(passes(w, loss=loss))
    assert never.grad is None and torch.equal(never, torch.ones(2).double()), "weight decay does not touch it either"
    assert late.grad.tolist() == [0.25, 0.25]
    calls.clear()

    def fading():
        calls.append(1)
        early.grad = w.grad = None
        (cross_entropy(X @ w, Y) + (early.sum() if len(calls) == 1 else 0)).backward()

    ModalitySAM([w, early], torch.optim.SGD([w, early], lr=0.1), rho=0.05, share=0.25).step(fading)
    assert early.grad.tolist() == [0.75, 0.75]


def test_nothing_has_a_gradient():
    w = weights()
    sam = ModalitySAM([w], torch.optim.SGD([w], lr=0.1), rho=0.05)
    before = w.detach().clone()
    assert sam.step(lambda: 1.5) == 1.5 and torch.equal(w, before)


@pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16))
def test_a_second_pass_that_fails_leaves_the_weights_as_they_were(dtype):
    """In half precision too, where taking the perturbation away again would not give the same bits."""
    w, calls = weights(dtype), []
    before = w.detach().clone()
    sam = ModalitySAM([w], torch.optim.SGD([w], lr=0.1), rho=0.05)
    good = passes(w)

    def closure():
        calls.append(w.detach().clone())
        if len(calls) == 2:
            raise KeyboardInterrupt
        return good()

    with pytest.raises(KeyboardInterrupt):
        sam.step(closure)
    assert not torch.equal(calls[1], before) and torch.equal(w, before)
    sam.step(closure)
    assert len(calls) == 4 and not torch.equal(w, before), "and the next step works"


def test_both_passes_see_the_same_dropout_and_the_random_numbers_go_on_as_after_one():
    w, masks = weights(), []

    def loss(w):
        masks.append(dropout(torch.ones(6, 4, dtype=torch.float64), 0.5))
        return cross_entropy((X * masks[-1]) @ w, Y)

    sam = ModalitySAM([w], torch.optim.SGD([w], lr=0.1), rho=0.05)
    torch.manual_seed(3)
    sam.step(passes(w, loss=loss))
    after = torch.rand(4)
    torch.manual_seed(3)
    first = dropout(torch.ones(6, 4, dtype=torch.float64), 0.5)
    assert torch.equal(after, torch.rand(4))
    assert torch.equal(masks[0], first) and torch.equal(masks[1], first)
    sam.step(passes(w, loss=loss))
    assert not torch.equal(masks[2], first), "and another one in the next step"


def test_a_loss_of_the_dominant_view_climbs_and_is_blended():
    """share g_d(w + rho g_d / |g_d|) + (1 - share) g(w), with L_d on three of the rows."""
    w, start = weights(), weights().detach()

    def part(w):
        return cross_entropy(X[:3] @ w, Y[:3])

    sam = ModalitySAM([w], torch.optim.SGD([w], lr=0.1), rho=0.05, share=0.4)
    sam.step(passes(w), passes(w, loss=part))
    at = start.clone().requires_grad_()
    gd = torch.autograd.grad(part(at), at)[0]
    up = (start + 0.05 * gd / gd.norm()).requires_grad_()
    expected = 0.4 * torch.autograd.grad(part(up), up)[0] + 0.6 * gradient(at)
    torch.testing.assert_close(w.grad, expected, rtol=0, atol=1e-12)


def test_the_pieces_make_the_step():
    one, two = weights(), weights()
    ModalitySAM([one], torch.optim.SGD([one], lr=0.1), rho=0.05, share=0.625).step(passes(one))
    base = torch.optim.SGD([two], lr=0.1)
    sam, run = ModalitySAM([two], base, rho=0.05, share=0.625), passes(two)
    for _ in range(3):                          # gradients of three micro-batches add up before the climb
        (cross_entropy(X @ two, Y) / 3).backward()
    sam.keep()
    sam.perturb()
    run()
    sam.restore()
    base.step()
    torch.testing.assert_close(one, two, rtol=0, atol=1e-14)
    with pytest.raises(RuntimeError, match="nothing to restore"):
        sam.restore()
    sam.perturb()
    with pytest.raises(RuntimeError, match="perturbed already"):
        sam.perturb()


def test_schedulers_and_checkpoints_are_the_base_optimizers():
    w = weights()
    sam = ModalitySAM([w], torch.optim.SGD([w], lr=0.1, momentum=0.9), rho=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(sam, lambda step: 0.5 ** step)
    sam.step(passes(w))
    schedule.step()
    assert sam.base.param_groups[0]["lr"] == 0.05 and sam.param_groups is sam.base.param_groups and sam.state is sam.base.state
    saved, start = deepcopy(sam.state_dict()), w.detach().clone()
    torch.testing.assert_close(saved, sam.base.state_dict(), rtol=0, atol=0)
    sam.step(passes(w))
    again = start.clone().requires_grad_()
    other = ModalitySAM([again], torch.optim.SGD([again], lr=9.0, momentum=0.9), rho=0.05)
    other.load_state_dict(saved)
    assert other.base.param_groups[0]["lr"] == 0.05
    other.step(passes(again))
    other.zero_grad()
    assert torch.equal(w, again) and again.grad is None


@pytest.mark.parametrize("change, words", (
    ({"rho": -1.0}, "rho"), ({"rho": math.nan}, "rho"), ({"p": 1}, "2 or infinity"), ({"share": 1.5}, "share"),
    ({"share": math.nan}, "share"), ({"params": []}, "no parameter"),
    ({"params": [torch.zeros(1, requires_grad=True)]}, "1 of the 1 parameters to perturb are not in")))
def test_arguments_that_make_no_sense(change, words):
    w = weights()
    with pytest.raises(ValueError, match=words):
        ModalitySAM(**({"params": [w], "base_optimizer": torch.optim.SGD([w], lr=0.1), "rho": 0.05} | change))


def test_errors_of_a_step():
    w = weights()
    sam = ModalitySAM([w], torch.optim.SGD([w], lr=0.1), rho=0.05)
    with pytest.raises(ValueError, match="closure"):
        sam.step()
    sam.share = 2
    with pytest.raises(ValueError, match="between 0 and 1, not 2"):
        sam.step(passes(w))
    with pytest.raises(ValueError, match="twice"):
        ModalitySAM([{"params": [w]}, {"params": [w]}], torch.optim.SGD([w], lr=0.1), rho=0.05)
