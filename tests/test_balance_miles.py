"""MILES: the paper's schedule on known rows, and what it says in short."""

import math
import random

import pytest

from tests.anchors import ANCHORS
from training.balance.miles import lr_factors, relative_gains


@pytest.mark.parametrize("row", ANCHORS["MILES"]["rows"], ids=lambda row: str(row["metrics"]))
def test_known_rows(row):
    assert lr_factors(*row["metrics"], tau=0.2, mu=0.5) == {"image": row["image"], "text": row["text"]}
    u_image, u_text = relative_gains(*row["metrics"])
    assert (u_image, u_text, abs(u_image - u_text)) == pytest.approx((row["u_image"], row["u_text"], row["delta"]), abs=1e-15)


def published(both, image, text, tau, mu):
    """The algorithm branch by branch, as it is printed, both rates set back first."""
    rate = {"image": 1.0, "text": 1.0}
    u_image, u_text = (both - text) / both, (both - image) / both
    delta = abs(u_image - u_text)
    if delta <= tau or (u_image < 0 and u_text < 0):
        pass
    elif u_image > 0 and u_text < 0:
        rate["image"] = mu
    elif u_image < 0 and u_text > 0:
        rate["text"] = mu
    elif u_image < u_text:
        rate["text"] = mu
    else:
        rate["image"] = mu
    return rate


def test_delta_identity_and_the_short_form():
    """delta = |M_image - M_text| / M_both; slow the better one if they differ by more than tau and not both beat the joint."""
    draw = random.Random("miles")
    slowed = 0
    for _ in range(2000):
        both, image, text = (draw.random() + 0.01 for _ in range(3))
        tau, mu = draw.random(), draw.random()
        u_image, u_text = relative_gains(both, image, text)
        delta = abs(image - text) / both
        assert abs(u_image - u_text) == pytest.approx(delta, abs=1e-12) and (u_image > u_text) == (image > text)
        if abs(delta - tau) < 1e-9:
            continue
        found = lr_factors(both, image, text, tau=tau, mu=mu)
        assert found == published(both, image, text, tau, mu)
        slow = delta > tau and not (image > both and text > both)
        better = "image" if image > text else "text"
        assert found == {"image": 1.0, "text": 1.0} | ({better: mu} if slow else {}), "at most one is slowed, by mu alone"
        slowed += slow
    assert 200 < slowed < 1800


def test_a_row_of_measurements_leaves_nothing_behind():
    """Text leads, then the picture, then neither: the other side is back at 1 at once, and nothing multiplies up."""
    seen = [lr_factors(*metrics, tau=0.2, mu=0.5) for metrics in
            ((0.7, 0.2, 0.6), (0.7, 0.2, 0.6), (0.7, 0.6, 0.2), (0.7, 0.5, 0.5))]
    assert seen == [{"image": 1.0, "text": 0.5}, {"image": 1.0, "text": 0.5}, {"image": 0.5, "text": 1.0},
                    {"image": 1.0, "text": 1.0}]


def test_the_knobs_move_what_they_say():
    assert lr_factors(0.7, 0.2, 0.6, tau=0.6, mu=0.5)["text"] == 1.0
    assert lr_factors(0.7, 0.2, 0.6, tau=0.5, mu=0.25)["text"] == 0.25
    assert lr_factors(0.7, 0.2, 0.6, tau=0.0, mu=1.0) == {"image": 1.0, "text": 1.0}
    assert lr_factors(0.7, 0.5, 0.5, tau=0.0, mu=0.5) == {"image": 1.0, "text": 1.0}, "equal metrics, even with tau = 0"


@pytest.mark.parametrize("both", (0.0, -0.1))
def test_a_joint_model_at_chance_says_nothing(both):
    assert lr_factors(both, 0.4, -0.2, tau=0.2, mu=0.5) == {"image": 1.0, "text": 1.0}


def test_below_chance_alone_is_allowed():
    """Text 0.4 of 0.5, the picture 0.1 below chance: delta = 0.5 / 0.5 = 1."""
    assert lr_factors(0.5, -0.1, 0.4, tau=0.9, mu=0.5) == {"image": 1.0, "text": 0.5}


@pytest.mark.parametrize("change, words", (
    ({"image": math.nan}, "finite"), ({"both": math.inf}, "finite"), ({"tau": -0.1}, "tau"), ({"mu": 1.5}, "mu"),
    ({"mu": math.nan}, "mu")))
def test_errors(change, words):
    arguments = {"both": 0.7, "image": 0.2, "text": 0.6, "tau": 0.2, "mu": 0.5} | change
    with pytest.raises(ValueError, match=words):
        lr_factors(**arguments)
