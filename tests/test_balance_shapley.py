"""Shapley values and shares of modalities, and the values of a view, by hand."""

import math
from itertools import permutations

import pytest
import torch

from tests.anchors import ANCHORS, numbers, same
from training.balance.shapley import (
    accuracy, chance_corrected, option_log_probs, probability, running_mean, shapley, shapley_two, shares)


def test_two_players_by_hand():
    """phi_image = ((.4 - .1) + (.7 - .55)) / 2 = .225, phi_text = ((.55 - .1) + (.7 - .4)) / 2 = .375."""
    known = ANCHORS["Shapley"]
    values = [known[key] for key in ("none", "image", "text", "both")]
    phi = shapley_two(*values)
    assert phi == pytest.approx((known["phi_image"], known["phi_text"]), abs=1e-15)
    assert shares(phi) == pytest.approx(tuple(known["shares"]), abs=1e-15)
    same(torch.stack(shapley_two(*numbers(values))), phi)


def test_the_sum_is_what_both_add_and_swapping_the_players_swaps_the_values():
    torch.manual_seed(0)
    none, image, text, both = torch.rand(4, 100, dtype=torch.float64)
    phi = shapley_two(none, image, text, both)
    torch.testing.assert_close(phi[0] + phi[1], both - none)
    assert torch.equal(torch.stack(shapley_two(none, text, image, both)), torch.stack(phi[::-1]))


def test_more_players_are_means_over_the_orders_of_joining():
    """The definition itself: what a player adds when it joins, averaged over all 6 orders."""
    players = ("image", "text", "sound")
    torch.manual_seed(0)
    v = {frozenset(players[i] for i in range(3) if mask >> i & 1): value
         for mask, value in enumerate(torch.rand(8, dtype=torch.float64).tolist())}
    expected = dict.fromkeys(players, 0.0)
    for order in permutations(players):
        for i, player in enumerate(order):
            expected[player] += (v[frozenset(order[:i + 1])] - v[frozenset(order[:i])]) / 6
    found = shapley(v)
    assert found == pytest.approx(expected, abs=1e-15)
    assert sum(found.values()) == pytest.approx(v[frozenset(players)] - v[frozenset()])
    two = shapley({(): 0.1, ("image",): 0.4, ("text",): 0.55, ("text", "image"): 0.7})
    assert two == pytest.approx({"image": 0.225, "text": 0.375})


def test_subsets_that_are_missing_or_there_twice():
    with pytest.raises(ValueError, match=r"no value for the players \['image', 'text'\]; 2 players need all 4 subsets"):
        shapley({(): 0.0, ("image",): 1.0, ("text",): 1.0})
    with pytest.raises(ValueError, match="two values"):
        shapley({(): 0.0, ("a",): 1.0, ("b",): 1.0, ("a", "b"): 1.0, ("b", "a"): 2.0})


@pytest.mark.parametrize("phi, expected", (
    ((0.225, 0.375), (0.375, 0.625)), ((0.3, -0.1), (1.0, 0.0)), ((0.0, 0.0), (0.5, 0.5)), ((-1.0, -2.0), (0.5, 0.5)),
    ((1e-320, 1e-320), (0.5, 0.5)), ((1.7e308, 1.7e308), (0.5, 0.5)), ((0.0, -1.0, -2.0), (1 / 3, 1 / 3, 1 / 3)),
    ((3, 1), (0.75, 0.25))))
def test_shares_by_hand(phi, expected):
    found = shares(phi)
    assert type(found) is tuple and found == pytest.approx(expected, abs=1e-15)
    assert sum(found) == pytest.approx(1, abs=1e-15) and min(found) >= 0
    assert shares(phi[::-1]) == pytest.approx(expected[::-1], abs=1e-15)


def test_shares_keep_the_form_of_what_comes_in():
    assert shares([1.0, 3.0]) == [0.25, 0.75] and shares({"image": 1.0, "text": 3.0}) == {"image": 0.25, "text": 0.75}
    table = numbers([[1, 3], [-1, -1], [2, -5]])
    same(shares(table), [[0.25, 0.75], [0.5, 0.5], [1, 0]])
    assert shares(table).dtype == torch.float64 and shares(table.float()).dtype == torch.float32
    image, text = shares((table[:, 0], table[:, 1]))
    assert torch.equal(torch.stack([image, text], -1), shares(table))
    same(shares(numbers([0.0, 0.0, 0.0])), [1 / 3] * 3, 1e-16)


@pytest.mark.parametrize("phi", ((math.nan, 1.0), (math.inf, 1.0), (), torch.tensor(1.0)))
def test_shares_of_nothing_or_of_no_numbers(phi):
    with pytest.raises(ValueError, match="shares of"):
        shares(phi)


def test_options_that_a_question_does_not_have():
    """Row 1 has options of weights 1 and 3; row 2 has three of weights 1, 1 and 2."""
    logits = numbers([[0, math.log(3), 7], [0, 0, math.log(2)]]).requires_grad_()
    exists = torch.tensor([[True, True, False], [True, True, True]])
    found = option_log_probs(logits, exists)
    same(found[:, :2].exp(), [[0.25, 0.75], [0.25, 0.25]])
    assert found[0, 2] == -math.inf and found.dtype == torch.float64
    found[:, 1].sum().backward()
    same(logits.grad, [[-0.25, 0.25, 0], [-0.25, 0.75, -0.5]])
    padded = logits.detach().masked_fill(~exists, -math.inf)
    assert torch.equal(option_log_probs(padded), found), "padding with -inf says the same"
    same(probability(logits, torch.tensor([1, 2]), exists), [0.75, 0.5])
    same(accuracy(logits, torch.tensor([1, 0]), exists), [1, 0])
    assert not probability(logits, torch.tensor([1, 2]), exists).requires_grad
    assert option_log_probs(torch.zeros(1, 2, dtype=torch.bfloat16)).dtype == torch.float32


def test_options_that_make_no_sense():
    with pytest.raises(ValueError, match="question 1 of the batch has no options"):
        option_log_probs(torch.tensor([[0.0, 1.0], [-math.inf, -math.inf]]))
    with pytest.raises(ValueError, match=r"mask of shape \(2,\)"):
        option_log_probs(torch.zeros(1, 2), torch.ones(2, dtype=torch.bool))


def test_chance_by_hand():
    """Of 4 options: (.625 - .25) / .75 = .5; always right is 1, guessing 0."""
    assert chance_corrected(0.625, 4) == pytest.approx(0.5) and chance_corrected(0.25, 4) == 0 and chance_corrected(1.0, 3) == 1
    same(chance_corrected(numbers([0.625, 0.5, 0.0]), torch.tensor([4, 2, 2])), [0.5, 0, -1])
    for options in (1, torch.tensor([4, 1])):
        with pytest.raises(ValueError, match="2 options or more"):
            chance_corrected(0.5, options)


def test_running_mean_by_hand():
    first = running_mean(None, [1, 0], 0.9)
    assert first == [1.0, 0.0]
    assert running_mean(first, [0.0, 1.0], 0.9) == pytest.approx([0.9, 0.1]) and running_mean(first, [5, 6], 0) == [5, 6]
    with pytest.raises(ValueError, match="decay"):
        running_mean(None, [1.0], 1.0)
    with pytest.raises(ValueError, match="zip"):
        running_mean([1.0], [1.0, 2.0], 0.5)
