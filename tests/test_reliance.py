"""eval.reliance: every measure worked by hand, what is undefined stays undefined, and the interval is that of eval.stats."""

import math

import numpy as np
import pytest
import scipy.stats

from eval import reliance, stats
from eval.reliance import Measure, difference, estimate, mean_of

LN2 = math.log(2)


def value(measure: Measure) -> float:
    return measure.value()


def test_agrees() -> None:
    pred, other = ["A", "B", None, None, "4", "C"], ["A", "C", None, "A", "4.0", "C"]
    right = [1, 0, 0, 0, 1, 0]
    assert reliance.agrees(pred, other, right, right).tolist() == [[1, 0, 0, 0, 1, 1]]


def test_consistency_of_all_right_and_wrong() -> None:
    same, right = [[1, 0, 1, 1]], np.array([[1, 1, 0, 0]])
    assert value(reliance.consistency(same)) == 0.75
    assert value(reliance.consistency(same, right)) == 0.5
    wrong = reliance.consistency(same, 1 - right)
    assert value(wrong) == 1 and wrong.n == 2
    assert math.isnan(value(reliance.consistency(same, 0 * right)))


def test_consistency_among_is_over_answers_of_all_seeds() -> None:
    # seed 1 has three right answers, two of them stay; seed 2 has one, and it stays: 3 of 4, not the mean of 2/3 and 1
    found = reliance.consistency([[1, 1, 0], [1, 0, 0]], [[1, 1, 1], [1, 0, 0]])
    assert value(found) == pytest.approx(3 / 4) and found.n == 2


@pytest.mark.parametrize("first, second, k, expected", [
    ([0, 0, 1, 1], [0, 1, 1, 1], [2] * 4, 0.5),                            # C 3/4, p_e = 1/2 1/4 + 1/2 3/4 = 1/2
    ([0, 0, 1, 1, 2, 2], [0, 1, 1, 1, 2, 2], [2, 2, 2, 2, 3, 3], 0.5),     # C 5/6, p_e = 4/6 1/2 + 2/6 1; pooled places: 3/4
    ([0, -1], [0, -1], [2, 2], 1 / 3),                                     # unparsed: C 1/2, p_e = 1/2 1/2
    ([0, 1, -1], [0, 1, -1], [2, 2, None], 1.0),                           # an open question does not count
    ([0, 1], [1, 0], [2, 2], -1.0),
])
def test_kappa(first, second, k, expected) -> None:
    assert value(reliance.kappa([first], [second], k)) == pytest.approx(expected)


def test_kappa_of_seeds_with_habits_of_their_own() -> None:
    # C = (1 + 3/4) / 2; p_e is 1 in the first seed and 3/4 in the second. Pooled marginals would say p_e = 1/2
    first, second = [[0, 0, 0, 0], [1, 1, 1, 1]], [[0, 0, 0, 0], [1, 1, 1, 0]]
    assert value(reliance.kappa(first, second, [2] * 4)) == pytest.approx(0)


def test_kappa_undefined() -> None:
    found = estimate(reliance.kappa([[0, 0, 0]], [[0, 0, 0]], [2, 3, 4]))
    assert math.isnan(found.value) and math.isnan(found.low) and "one place" in found.note
    found = estimate(reliance.kappa([[-1]], [[-1]], [None]))
    assert math.isnan(found.value) and found.note == "no item has options" and found.n == 0


def test_kappa_of_unrelated_answers_is_0() -> None:
    draw = np.random.default_rng(0)
    first, second = (draw.choice(3, size=(1, 1000), p=[0.6, 0.3, 0.1]) for _ in range(2))
    found = estimate(reliance.kappa(first, second, [3] * 1000))
    assert abs(found.value) < 0.1 and found.low < 0 < found.high
    assert value(reliance.consistency(first == second)) > 0.4  # 0.36 + 0.09 + 0.01: raw consistency misleads


def test_places() -> None:
    found = reliance.places_of([["b", None, "C"]], [("a", "b"), ("a", "b"), None])
    assert found.tolist() == [[1, -1, -1]]


def test_flips_are_those_of_stats() -> None:
    pred, other = ["A", "A", "B", "B", None], ["A", "B", "A", "C", None]
    right, still = [1, 1, 0, 0, 0], [1, 0, 1, 0, 0]
    known = stats.flip_rate(pred, other, right, still)
    names = (None, "right_to_wrong", "wrong_to_right", "wrong_to_other")
    rates = [value(reliance.flips(pred, other, right, still, name)) for name in names]
    assert rates == pytest.approx([known.rate, known.right_to_wrong, known.wrong_to_right, known.wrong_to_other])
    assert rates == pytest.approx([0.6, 0.2, 0.2, 0.2])
    # C + flips + unparsed under both = 1
    assert value(reliance.consistency(reliance.agrees(pred, other, right, still))) + rates[0] + 0.2 == pytest.approx(1)


def test_soft_differences() -> None:
    first = reliance.log_probabilities([[3 + math.log(0.5), 3 + math.log(0.5)], [0.0, 0.0, 0.0]])
    second = reliance.log_probabilities([[math.log(0.25), math.log(0.75)], [0.0, 0.0, 0.0]])
    assert np.exp(first) == pytest.approx(np.array([[0.5, 0.5, 0], [1 / 3] * 3]))
    assert reliance.kl(first, second) == pytest.approx([0.5 * LN2 + 0.5 * math.log(2 / 3), 0])
    assert reliance.kl(second, first)[0] == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5))  # not symmetric
    by_hand = (0.5 * math.log(4 / 3) + 0.5 * math.log(4 / 5) + 0.25 * math.log(2 / 3) + 0.75 * math.log(6 / 5)) / 2
    assert reliance.jensen_shannon(first, second) == pytest.approx([by_hand, 0])
    assert reliance.jensen_shannon(second, first) == pytest.approx([by_hand, 0])
    assert reliance.gold_change(first, second, np.array([0, 2])) == pytest.approx([LN2, 0])
    assert reliance.gold_change(first, second, np.array([1, 2]))[0] == pytest.approx(math.log(2 / 3))


def test_jensen_shannon_of_disjoint_options_is_ln_2() -> None:
    sure = reliance.log_probabilities([[0.0, -2000.0], [-2000.0, 0.0]])
    assert reliance.jensen_shannon(sure[:1], sure[1:]) == pytest.approx([LN2])
    assert reliance.kl(sure[:1], sure[1:]) == pytest.approx([2000])


def test_utility_and_imbalance() -> None:
    full, no_text, no_image = [1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 1, 0]
    assert value(reliance.utility(full, no_text)) == 0.75
    assert value(reliance.imbalance(full, no_text, no_image)) == 0.75
    assert value(reliance.imbalance(full, no_text, full)) == 1
    # both hurt, which is one sign
    assert value(reliance.imbalance([0, 0, 0, 0], no_text, no_image)) == pytest.approx(0.25 / (0.25 + 0.75))


def test_imbalance_is_undefined_and_not_clipped() -> None:
    for no_text, no_image in (([1, 1, 1, 1], [0, 0, 0, 0]), ([1, 1, 0, 0], [1, 1, 0, 0])):
        found = estimate(reliance.imbalance([1, 1, 0, 0], no_text, no_image))
        assert math.isnan(found.value) and "one sign" in found.note
    # three seeds whose picture is worth exactly 0; summed as thirds it is -7e-18, which is not another sign
    gains = np.array([[0, -1, 1, 0, -1, -1, 1, 0], [1, 1, -1, 1, -1, -1, 1, 0], [0, 0, -1, 0, 1, 0, -1, 1]])
    full, nothing = np.ones((3, 8)), np.zeros((3, 8))
    assert gains.sum() == 0 > gains.mean(axis=0).mean()
    assert value(reliance.imbalance(full, nothing, full - gains)) == 1
    assert value(reliance.imbalance(full, full - gains, nothing)) == 0


def test_an_interval_is_undefined_where_a_resample_is() -> None:
    full, no_text, no_image = np.ones(40), np.r_[np.zeros(20), np.ones(20)], np.r_[0, np.ones(39)]
    found = estimate(reliance.imbalance(full, no_text, no_image))
    assert found.value == pytest.approx(0.5 / 0.525) and found.high == 1  # U_image is 0 in some resamples, never below
    full[-3:] = 0  # now text and image can differ in sign
    no_image[-3:] = [1, 0, 0]
    no_text[-3:] = 0
    no_image[1] = 0
    found = estimate(reliance.imbalance(full, no_text, no_image))
    assert 0.9 < found.value < 1 and math.isnan(found.low) and "in some resamples" in found.note


def test_utilisation_and_perceptual_score() -> None:
    both, text = [1, 1, 1, 1, 0], [1, 1, 1, 0, 0]
    assert value(reliance.utilisation(both, text)) == pytest.approx((0.8 - 0.6) / 0.8)
    assert math.isnan(value(reliance.utilisation([0, 0], [1, 0])))
    right, shuffled = [1, 1, 1, 0], [1, 0, 0, 0]
    assert value(reliance.perceptual_score(right, shuffled)) == pytest.approx((0.75 - 0.25) / 0.75)
    assert value(reliance.perceptual_score_majority(right, shuffled, 0.2)) == pytest.approx((0.75 - 0.25) / 0.8)
    assert estimate(reliance.perceptual_score([0, 0], [1, 0])).note == "no item is right with its own picture"
    assert "always right" in estimate(reliance.perceptual_score_majority(right, shuffled, 1.0)).note


@pytest.mark.parametrize("gold, choices, expected", [
    (["A", "A", "B"], [("A", "B")] * 3, 2 / 3),
    (["red", "blue", "up", "two"], [("red", "x"), ("blue", "x"), ("up", "x"), ("x", "two")], 3 / 4),  # the first place
    (["4", "4", "5"], [None] * 3, 2 / 3),
])
def test_majority(gold, choices, expected) -> None:
    assert reliance.majority(gold, choices) == pytest.approx(expected)


def test_shapley_is_that_of_stats() -> None:
    none, image, text, both = [0, 0, 0, 1], [0, 1, 0, 1], [1, 1, 0, 1], [1, 1, 1, 1]
    known = stats.shapley(none, image, text, both)
    parts = {part: value(reliance.shapley(none, image, text, both, part)) for part in ("image", "text", "interaction", "share")}
    assert parts == pytest.approx({"image": 0.25, "text": 0.5, "interaction": 0.0, "share": 1 / 3})
    assert parts == pytest.approx({"image": known.image, "text": known.text, "interaction": known.interaction,
                                   "share": known.image_share})
    many = np.random.default_rng(4).random((4, 100)) < [[0.2], [0.6], [0.7], [0.95]]
    share, known = estimate(reliance.shapley(*many, "share")), stats.shapley(*many)
    assert (share.value, share.low, share.high) == pytest.approx((known.image_share, known.low, known.high))
    # log-probabilities are no shares, and are taken as they are
    assert value(reliance.shapley([-2.0], [-1.0], [-0.5], [-0.25], "image")) == pytest.approx((1 + 0.25) / 2)
    assert math.isnan(value(reliance.shapley(none, none, none, none, "share")))


def test_follows() -> None:
    wrong = np.zeros(6)
    conflict, words, image = ((row, wrong) for row in (
        ["A", "B", "C", "A", None, "A"], ["A", "A", "A", "A", "A", None], ["B", "B", "B", "A", "B", "B"]))
    # item 3 is answered alike by both, and in item 5 the words alone were not: four items count
    found = {part: reliance.follows(conflict, words, image, part) for part in ("preference", "text", "image", "neither")}
    assert {part: value(one) for part, one in found.items()} == {"preference": 0.5, "text": 0.25, "image": 0.25, "neither": 0.5}
    assert found["text"].n == 4 and found["preference"].n == 2
    found = estimate(reliance.follows(conflict, words, words, "preference"))
    assert math.isnan(found.value)


def test_interval_is_the_bootstrap_of_stats() -> None:
    draw = np.random.default_rng(1)
    values, groups = draw.random(60), [f"g{number // 3}" for number in range(60)]
    known = stats.mean_interval(values, clusters=groups, seed=5)
    found = estimate(Measure((values,), lambda mean: mean, n=60), groups, seed=5)
    assert (found.value, found.low, found.high, found.n_clusters) == (known.value, known.low, known.high, 20)
    assert estimate(mean_of(values), groups, seed=5) == known
    assert estimate(mean_of(values), list(range(60)), seed=5).low != known.low


def test_interval_is_that_of_scipy() -> None:
    draw = np.random.default_rng(6)
    groups = np.repeat(np.arange(12), draw.integers(1, 9, 12))  # of unlike sizes
    top, bottom = draw.random((2, len(groups)))
    found = estimate(Measure((top, bottom), lambda a, b: a / b + a, n=len(groups)), groups, seed=5)
    sums = [np.bincount(groups, one) for one in (top, bottom, np.ones(len(groups)))]

    def by_hand(a, b, size, axis):
        a, b, size = (one.sum(axis=axis) for one in (a, b, size))
        return a / b + a / size

    known = scipy.stats.bootstrap(sums, by_hand, paired=True, vectorized=True, n_resamples=stats.RESAMPLES,
                                  method="percentile", rng=np.random.default_rng(5))
    assert (found.low, found.high) == pytest.approx(tuple(known.confidence_interval), abs=1e-12)


def test_ratio_of_means_is_resampled_as_a_whole() -> None:
    draw = np.random.default_rng(2)
    among, values = (draw.random((1, 400)) < 0.5).astype(float), draw.random((1, 400))
    found = estimate(mean_of(values, among))
    alone = stats.mean_interval(values[among > 0])
    assert found.value == pytest.approx(alone.value) and found.n == int(among.sum())
    assert found.high - found.low == pytest.approx(alone.high - alone.low, rel=0.1)


def test_difference_is_paired() -> None:
    draw = np.random.default_rng(3)
    among, values = (draw.random((1, 200)) < 0.5).astype(float), draw.random((1, 200))
    same = difference(mean_of(values, among), mean_of(values, among))
    assert (same.value, same.low, same.high) == (0, 0, 0) and "no width" in same.note
    moved = difference(mean_of(values, among), mean_of(values + 0.1, among))  # unpaired the interval would be 0.16 wide
    assert moved.value == pytest.approx(0.1) and moved.high - moved.low < 1e-9
    mixed = difference(mean_of(values), mean_of(values, among))  # a plain mean against a ratio
    assert mixed.value == pytest.approx(values[among > 0].mean() - values.mean()) and mixed.low < mixed.value < mixed.high
    undefined = difference(mean_of(values), mean_of(values, 0 * among))
    assert math.isnan(undefined.value) and undefined.note == "no item counts"


def test_groups() -> None:
    ratio = mean_of([1, 0, 1, 1], [1, 1, 1, 0])
    assert "one group" in estimate(ratio, ["g"] * 4).note and math.isnan(estimate(ratio, ["g"] * 4).low)
    assert estimate(ratio, ["a", "a", "b", "b"]) == estimate(ratio, ["x", "x", "c", "c"])  # names do not matter
    with pytest.raises(stats.StatsError, match="3 cluster names for 4 items"):
        estimate(ratio, ["g"] * 3)
    with pytest.raises(stats.StatsError, match="no items"):
        estimate(mean_of(np.zeros((1, 0)), np.zeros((1, 0))))
