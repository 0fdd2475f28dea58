"""OGM-GE, modality dropout and shuffled coefficients, by hand."""

import math

import pytest
import torch

from tests.anchors import det, numbers
from training.balance.ogm import coefficients, modality_dropout, shuffled, with_noise


@pytest.mark.parametrize("image, text, alpha, expected", (
    (2.0, 4.0, 0.5, (1.0, 1 - math.tanh(1.0))),         # text leads by a ratio of 2
    (6.0, 4.0, 0.2, (1 - math.tanh(0.3), 1.0)),         # the picture by 1.5
    (3.0, 3.0, 0.5, (1.0, 1.0)), (0.0, 0.0, 0.5, (1.0, 1.0)), (0.0, 1.0, 0.5, (1.0, 0.0)), (0.0, 1.0, 0.0, (1.0, 1.0)),
    (2.0, 4.0, 0.0, (1.0, 1.0)), (5e-324, 1.0, 0.5, (1.0, 0.0))))
def test_coefficients_by_hand(image, text, alpha, expected):
    found = coefficients(image, text, alpha=alpha)
    assert (found["image"], found["text"]) == pytest.approx(expected, abs=1e-15)
    turned = coefficients(text, image, alpha=alpha)
    assert (turned["text"], turned["image"]) == (found["image"], found["text"])


def test_the_slightest_lead_costs_at_once():
    assert coefficients(1.0, 1.0 + 1e-9, alpha=0.3)["text"] == pytest.approx(1 - math.tanh(0.3), abs=1e-8)


@pytest.mark.parametrize("scores", ((-1.0, 1.0, 0.5), (math.nan, 1.0, 0.5), (1.0, math.inf, 0.5), (1.0, 2.0, -0.5)))
def test_scores_that_make_no_sense(scores):
    with pytest.raises(ValueError, match="finite and not negative"):
        coefficients(*scores[:2], alpha=scores[2])


def test_noise_has_the_spread_of_the_gradient():
    gradient = det((200, 200), 0.7, 0.1, 3.0)
    random = torch.Generator().manual_seed(0)
    noise = with_noise(gradient, 0.25, random=random) - 0.25 * gradient
    assert noise.std().item() == pytest.approx(gradient.std().item(), rel=0.02)
    assert noise.mean().item() == pytest.approx(0, abs=0.06)
    again = with_noise(gradient, 0.25, random=torch.Generator().manual_seed(0)) - 0.25 * gradient
    assert torch.equal(again, noise)
    assert with_noise(numbers([2.0]), 0.5).tolist() == [1.0], "one element has no spread"


def test_modality_dropout():
    """Chances .2 and .3 over 20,000 rows, never both; a row's mask is its own, whoever else is in the batch."""
    seeds = [(0, 1, f"problem {i}") for i in range(20_000)]
    found = modality_dropout(seeds, image=0.2, text=0.3)
    assert found.dtype == torch.bool and found.any(-1).all()
    missing = (~found).double().mean(0)
    assert missing[0].item() == pytest.approx(0.2, abs=0.02) and missing[1].item() == pytest.approx(0.3, abs=0.02)
    assert torch.equal(modality_dropout(seeds[50:100][::-7], image=0.2, text=0.3), found[50:100].flip(0)[::7])
    another_epoch = [(0, 2, name) for _, _, name in seeds[:100]]
    assert not torch.equal(modality_dropout(another_epoch, image=0.2, text=0.3), found[:100])
    assert modality_dropout(seeds[:9], image=0.0, text=0.0).all()
    assert torch.equal(modality_dropout(seeds[:200], image=0.4, text=0.6).sum(-1), torch.ones(200, dtype=torch.long))
    for image, text in ((-0.1, 0.5), (0.6, 0.5), (math.nan, 0.0)):
        with pytest.raises(ValueError, match="chances"):
            modality_dropout(seeds[:2], image=image, text=text)


def test_shuffled_coefficients_are_the_same_ones_in_another_order():
    table = det((50, 2), 0.7, 0.1)
    found = shuffled(table, seed=(0, "cggm"))
    assert not torch.equal(found, table) and torch.equal(shuffled(table, seed=(0, "cggm")), found)
    assert sorted(map(tuple, found.tolist())) == sorted(map(tuple, table.tolist())), "those of one step stay together"
    assert not torch.equal(shuffled(table, seed=(1, "cggm")), found)
