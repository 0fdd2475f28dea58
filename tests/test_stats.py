"""eval.stats: formulas worked by hand, degenerate input, and the published figures of a paired benchmark."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest

from eval import stats
from eval.stats import StatsError


def test_paired_gap_by_hand():
    # d = 1, 0, 0, -1, 1 -> mean 0.2; squared deviations 0.64 + 0.04 + 0.04 + 1.44 + 0.64 = 2.8;
    # sd = sqrt(2.8 / 4), SE = sd / sqrt(5) = sqrt(0.14)
    found = stats.paired_gap([1, 1, 0, 0, 1], [0, 1, 0, 1, 0])
    assert found.gap == pytest.approx(0.2) and found.se == pytest.approx(math.sqrt(0.14)) and found.n == 5
    # b = 2, c = 1: 2 P[Bin(3, 1/2) <= 1] = 2 * 4/8 = 1
    assert found.mcnemar_p == 1.0 and found.low < 0.2 < found.high


def test_clustered_error_by_hand():
    # d = 1, 1, 0, 0, -1, 0 in clusters aa bb cc: mean 1/6, sums of deviations 2 - 1/3, -1/3, -1 - 1/3 = 5/3, -1/3, -4/3
    # SE^2 = 3/2 * 1/36 * (25 + 1 + 16)/9 = 42 / 216
    found = stats.paired_gap([1, 1, 0, 1, 0, 1], [0, 0, 0, 1, 1, 1], clusters=list("aabbcc"))
    assert found.se == pytest.approx(math.sqrt(42 / 216)) and found.n_clusters == 3
    assert "3 groups" in found.note


def test_repeated_items_in_clusters_gain_nothing():
    rng = np.random.default_rng(0)
    text, vision = rng.random(60) < 0.8, rng.random(60) < 0.5
    once = stats.paired_gap(text, vision)
    thrice = stats.paired_gap(np.repeat(text, 3), np.repeat(vision, 3), clusters=np.repeat(np.arange(60), 3))
    assert thrice.se == pytest.approx(once.se) and (thrice.low, thrice.high) == pytest.approx((once.low, once.high))


def test_cluster_names_may_be_of_any_kind():
    named = stats.paired_gap([1, 1, 0, 1], [0, 0, 0, 1], clusters=["x", None, 1, "1"])
    assert named.n_clusters == 3  # 1 and "1" are one name


@pytest.mark.parametrize("b, c, p", [(5, 0, 2 / 32), (6, 1, 2 * 8 / 128), (0, 0, 1.0), (3, 3, 1.0)])
def test_mcnemar_by_hand(b, c, p):
    first, second = [1] * b + [0] * c + [1, 0], [0] * b + [1] * c + [1, 0]
    assert stats.mcnemar(first, second) == pytest.approx(p)


def test_interval_covers_the_truth_as_often_as_it_says():
    # 200 samples of 100 items with a gap of 0.3: 95 % of the intervals hold it (binomial SE 1.5 points)
    rng = np.random.default_rng(3)
    held = sum(found.low <= 0.3 <= found.high for found in (
        stats.paired_gap(rng.random(100) < 0.8, rng.random(100) < 0.5, seed=number) for number in range(200)))
    assert 0.90 <= held / 200 <= 0.99


def test_seed_moves_the_interval_a_little_and_the_same_seed_not_at_all():
    rng = np.random.default_rng(0)
    pair = rng.random(150) < 0.8, rng.random(150) < 0.5
    one, again, other = (stats.paired_gap(*pair, seed=seed) for seed in (1, 1, 2))
    assert one == again and (one.low, one.high) != (other.low, other.high)
    assert other.low == pytest.approx(one.low, abs=0.2 * one.se)


def test_no_change_gives_an_interval_around_zero():
    rng = np.random.default_rng(5)
    before = rng.random(300) < 0.9, rng.random(300) < 0.6
    after = rng.random(300) < 0.9, rng.random(300) < 0.6
    found = stats.gap_change(before, after)
    assert found.low < 0 < found.high
    same = stats.gap_change(before, before)
    assert (same.change, same.se, same.low, same.high) == (0, 0, 0, 0) and "no width" in same.note


def test_gap_change_by_hand():
    before, after = ([1, 1, 1, 1], [0, 0, 1, 0]), ([1, 1, 1, 0], [1, 0, 1, 1])
    # g = (t1 - v1) - (t0 - v0) = -1, 0, 0, -2: mean -0.75; deviations^2 0.0625 + 0.5625 * 2 + 1.5625 = 2.75
    found = stats.gap_change(before, after)
    assert found.change == pytest.approx(-0.75) and found.se == pytest.approx(math.sqrt(2.75 / 3 / 4))
    assert (found.d_text, found.d_vision) == pytest.approx((-0.25, 0.5))
    assert found.change == pytest.approx(found.d_text - found.d_vision)


def test_closure_by_hand_and_without_a_gap():
    before, after = ([1, 1, 1, 1], [0, 0, 1, 1]), ([1, 1, 1, 1], [1, 0, 1, 1])
    assert stats.closure(before, after).value == pytest.approx((0.5 - 0.25) / 0.5)
    none = stats.closure(([1, 0], [1, 0]), ([1, 1], [1, 0]))
    assert math.isnan(none.value) and "no gap" in none.note
    assert "unstable" in stats.closure(([1, 0] * 20, [0, 1] * 19 + [0, 0]), ([1, 0] * 20, [1, 0] * 20)).note


def test_seeds_are_averaged_per_item():
    text, vision = [[1, 1, 1], [1, 1, 0]], [[0, 1, 0], [0, 0, 0]]
    found = stats.paired_gap(text, vision)
    # per item: text 1, 1, .5; vision 0, .5, 0 -> d = 1, .5, .5
    assert found.gap == pytest.approx(2 / 3) and found.n == 3 and math.isnan(found.mcnemar_p)
    assert found.se == pytest.approx(np.std([1, 0.5, 0.5], ddof=1) / math.sqrt(3))
    # one run before, two after
    assert stats.gap_change(([1, 1, 1], [0, 0, 0]), (text, vision)).d_vision == pytest.approx(1 / 6)


def test_seed_spread_by_hand():
    found = stats.seed_spread([0.1, 0.2, 0.3])
    half = 4.302652729911275 * 0.1 / math.sqrt(3)  # t(0.975, 2) = 4.3027
    assert (found.mean, found.sd) == pytest.approx((0.2, 0.1))
    assert (found.low, found.high) == pytest.approx((0.2 - half, 0.2 + half))
    assert math.isnan(stats.seed_spread([0.1]).low)


def test_accuracy_is_wilson_and_stays_inside():
    found = stats.accuracy([1] * 8 + [0] * 2)
    # SE with n - 1: effective n = p(1-p)/SE^2 = 9; Wilson at p = 0.8, n = 9, z = 1.959964
    z, p, n = 1.959964, 0.8, 9
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / 4 / n**2)
    assert (found.low, found.high) == pytest.approx((middle - half, middle + half), abs=1e-6)
    top = stats.accuracy([1] * 50)
    assert top.value == 1 and top.high == 1 and 0.9 < top.low < 1
    assert stats.accuracy([1, 1, 0, 0] * 20, clusters=[n // 4 for n in range(80)]).se == 0  # balanced groups
    wide = stats.accuracy(np.repeat([1, 0], 40), clusters=np.repeat(np.arange(8), 10))
    assert wide.high - wide.low > stats.accuracy(np.repeat([1, 0], 40)).high - stats.accuracy(np.repeat([1, 0], 40)).low


def test_flips_and_their_split():
    pred, other = ["a", "b", "a", None, None, "c"], ["b", "a", "c", None, "a", "c"]
    right, still = [1, 0, 0, 0, 0, 1], [0, 1, 0, 0, 0, 1]
    found = stats.flip_rate(pred, other, right, still)
    assert found.rate == pytest.approx(4 / 6)
    assert (found.right_to_wrong, found.wrong_to_right, found.wrong_to_other) == pytest.approx((1 / 6, 1 / 6, 2 / 6))
    assert stats.flip_rate(["4", "x"], ["4.0", "x"], [1, 0], [1, 0]).rate == 0  # right in other words


@pytest.mark.parametrize("a, b, agree, expected, kappa", [(0.303, 0.350, 0.347, 0.257, 0.12),
                                                          (0.547, 0.475, 0.447, 0.339, 0.16)])
def test_chance_agreement_of_published_models(a, b, agree, expected, kappa):
    """SEAM's Qwen2.5-VL-7B and -72B, text against vision, 4 options."""
    found = stats.kappa_chance(a, b, 1 / 3)
    assert found == pytest.approx(expected, abs=5e-4)
    assert (agree - found) / (1 - found) == pytest.approx(kappa, abs=5e-3)


def test_agreement_by_hand():
    # same answer on 2 of 4 (both unparsed is no agreement); a = 0.5, b = 0.25, k = 3
    found = stats.agreement(["x", "y", None, "z"], ["x", "y", None, "q"], [1, 0, 0, 1], [1, 0, 0, 0], [3] * 4)
    expected = 0.5 * 0.25 + 0.5 * 0.75 / 2
    assert found.agreement == 0.5 and found.expected == pytest.approx(expected)
    assert found.kappa == pytest.approx((0.5 - expected) / (1 - expected))
    assert stats.agreement(["x"], ["x"], [1], [1], [2]).kappa is None


def test_shapley_by_hand():
    # N 0.25, V 0.5, T 0.75, B 1.0: phi_I = (0.25 + 0.25)/2, phi_T = (0.5 + 0.5)/2, interaction 1 - .75 - .5 + .25 = 0
    found = stats.shapley([0, 0, 0, 1], [0, 0, 1, 1], [0, 1, 1, 1], [1, 1, 1, 1])
    assert (found.image, found.text, found.interaction) == pytest.approx((0.25, 0.5, 0.0))
    assert (found.image_share, found.text_share) == pytest.approx((1 / 3, 2 / 3))
    none = stats.shapley([1, 0], [1, 0], [1, 0], [1, 0])
    assert none.image_share is None and none.text_share is None
    # a harmful picture counts by its size
    harm = stats.shapley([1, 1], [0, 1], [1, 1], [1, 0])
    assert harm.image == pytest.approx(-0.5) and harm.image_share == 1.0


def test_shapley_change():
    old = [0] * 40, [0] * 40, [1] * 40, [1] * 40   # all text: share 0
    new = [0] * 40, [1] * 40, [0] * 40, [1] * 40   # all image: share 1
    assert stats.shapley_change(old, new).value == 1.0
    assert stats.shapley_change(old, ([1] * 40,) * 4) is None


def test_chance_level():
    assert stats.chance_level([2, 4, None, 4]) == pytest.approx((0.5 + 0.25 + 0 + 0.25) / 4)


def test_one_cluster_has_no_error_and_says_so():
    found = stats.paired_gap([1, 1, 0], [0, 1, 0], clusters=["x"] * 3)
    assert math.isnan(found.se) and math.isnan(found.low) and "one group" in found.note
    assert math.isnan(stats.accuracy([1, 0], clusters=["x", "x"]).se)


@pytest.mark.parametrize("call, words", [
    (lambda: stats.paired_gap([], []), "no items"),
    (lambda: stats.accuracy([]), "no items"),
    (lambda: stats.paired_gap([1, 0], [1]), "2, 1 items"),
    (lambda: stats.paired_gap([1, 2], [1, 0]), "0 to 1"),
    (lambda: stats.paired_gap([1, float("nan")], [1, 0]), "0 to 1"),
    (lambda: stats.paired_gap([1, 0], [1, 0], clusters=["x"]), "1 cluster names for 2 items"),
    (lambda: stats.gap_change(([1], [1]), ([1, 0], [1, 0])), "same items"),
    (lambda: stats.chance_level([]), "no items"),
    (lambda: stats.chance_level([0]), "without any choice"),
    (lambda: stats.seed_spread([]), "no seeds"),
    (lambda: stats.flip_rate(["a"], ["a"], [1, 0], [1, 0]), "shapes"),
])
def test_wrong_input_is_an_error_that_says_why(call, words):
    with pytest.raises(StatsError, match=words):
        call()


@pytest.fixture(scope="module")
def published():
    root = os.environ.get("EVENSIGHT_REALDATA")
    if not root:
        pytest.skip("EVENSIGHT_REALDATA is not set: the published paired answers are not here")
    path = Path(root) / "paired_outputs" / "mmmu_pro_gpt4o.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _column(rows, form, field="correct"):
    return [row[form][field] for row in rows]


def test_published_accuracies(published):
    wanted = {"standard_cot": 55.03, "vision_cot": 50.06, "standard_direct": 40.12, "vision_direct": 42.43}
    for form, value in wanted.items():
        assert round(100 * stats.accuracy(_column(published, form)).value, 2) == value


def test_published_gap(published):
    """GPT-4o on MMMU-Pro, 1,730 items: gap +4.97, paired SE 1.19 (unpaired 1.70), McNemar p 3.6e-5."""
    text, vision = _column(published, "standard_cot"), _column(published, "vision_cot")
    found = stats.paired_gap(text, vision)
    assert found.n == 1730 and round(100 * found.gap, 2) == 4.97 and round(100 * found.se, 2) == 1.19
    assert found.mcnemar_p == pytest.approx(3.6e-5, abs=5e-7)
    unpaired = math.hypot(stats.accuracy(text).se, stats.accuracy(vision).se)
    assert round(100 * unpaired, 2) == 1.70
    reach = 1.96 * found.se
    assert (found.low, found.high) == pytest.approx((found.gap - reach, found.gap + reach), abs=2e-3)
    direct = stats.paired_gap(_column(published, "standard_direct"), _column(published, "vision_direct"))
    assert round(100 * direct.gap, 2) == -2.31 and round(direct.mcnemar_p, 2) == 0.10


def test_published_agreement(published):
    found = stats.agreement(*(_column(published, form, "pred") for form in ("standard_cot", "vision_cot")),
                            *(_column(published, form) for form in ("standard_cot", "vision_cot")),
                            [row["n_options"] for row in published])
    assert round(found.agreement, 3) == 0.560
