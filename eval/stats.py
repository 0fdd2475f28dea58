"""Statistics on paired answers: the gap, its change, and what else an answer file can say. No model, no files.

Arrays hold one value per item: 1.0 right, 0.0 wrong. Several training seeds on the same items are a 2-D array
(seeds, items); they are averaged per item first, because items and not runs are what is sampled here (the spread
between seeds is a second, separate interval: `seed_spread`). Items that share a picture or a template fail together,
so `clusters` (items,) names their group: standard errors are clustered and the bootstrap draws whole groups.

Shares and differences are fractions, not percentages. Source of paired and clustered errors: E. Miller, "Adding Error
Bars to Evals" (arXiv 2411.00640), with the C/(C-1) correction that it leaves out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import scipy.stats
import statsmodels.api as sm
from statsmodels.stats.contingency_tables import mcnemar as _mcnemar
from statsmodels.stats.proportion import proportion_confint

LEVEL = 0.95  # of every interval
RESAMPLES = 5000  # bootstrap draws: the ends of an interval then move by about 0.04 SE from seed to seed
FEW_CLUSTERS = 20  # below this a percentile interval is visibly too narrow
NAN = float("nan")


class StatsError(ValueError):
    """The numbers asked for cannot be computed from these arrays; the message says why."""


@dataclass(frozen=True)
class Mean:
    """A mean over items (an accuracy), or a mean of differences."""

    value: float
    se: float  # clustered; nan with one cluster, or where only an interval is given
    low: float
    high: float
    n: int
    n_clusters: int
    note: str = ""


@dataclass(frozen=True)
class Gap:
    """A paired difference of two accuracies on the same items, first minus second."""

    gap: float
    se: float  # clustered; nan with one cluster
    low: float
    high: float
    mcnemar_p: float  # exact, two-sided; nan over several seeds. It tests gap = 0 and knows no clusters
    n: int
    n_clusters: int = 0
    note: str = ""


@dataclass(frozen=True)
class Change:
    """after - before of a paired difference. change = d_text - d_vision, so both are given."""

    change: float
    se: float
    low: float
    high: float
    d_text: float
    d_vision: float
    n: int
    n_clusters: int = 0
    note: str = ""


@dataclass(frozen=True)
class Flips:
    """Share of items whose answer changes when the picture is replaced, and where the changes go."""

    rate: float
    se: float
    low: float
    high: float
    right_to_wrong: float
    wrong_to_right: float
    wrong_to_other: float
    n: int
    note: str = ""


@dataclass(frozen=True)
class Agreement:
    agreement: float
    expected: float  # by chance, given both accuracies
    kappa: float | None  # None when chance agreement is already 1
    n: int


@dataclass(frozen=True)
class Shapley:
    """Two-player Shapley values of image and text; shares are None when both values are 0."""

    image: float
    text: float
    interaction: float  # below 0: the two are redundant; above 0: each needs the other
    image_share: float | None
    text_share: float | None
    low: float = NAN  # interval of image_share
    high: float = NAN
    n: int = 0
    note: str = ""


@dataclass(frozen=True)
class Spread:
    """Between training seeds: mean and t-interval over the per-seed values."""

    values: tuple[float, ...]
    mean: float
    sd: float  # nan for one seed
    low: float
    high: float


def accuracy(correct, *, clusters=None) -> Mean:
    """Mean of `correct` with its clustered SE and a Wilson interval at the effective sample size p(1-p)/SE^2.

    Wilson, because it stays inside [0, 1] and keeps a width at 0 and at 1, where the normal interval has none.
    Raises StatsError for no items, for values outside [0, 1], and for clusters of another length.
    """
    values, seeds = _values(correct)
    codes, count = cluster_codes(clusters, len(values))
    p, se = float(values.mean()), _clustered_se(values, codes, count)
    if count == 1:
        return Mean(p, NAN, NAN, NAN, len(values), 1, _note(values, count))
    # Where the SE is 0 it says nothing: count every cluster as one independent item, the cautious end.
    effective = min(p * (1 - p) / se**2, float(len(values) * seeds)) if se > 0 and 0 < p < 1 else float(count)
    low, high = proportion_confint(p * effective, effective, alpha=1 - LEVEL, method="wilson")
    return Mean(p, se, float(low), float(high), len(values), count, _note(values, count, width=True))


def mean_interval(values, *, clusters=None, seed=0) -> Mean:
    """Mean of per-item values (items,) or (seeds, items), with clustered SE and cluster-bootstrap interval.

    SE^2 = C/(C-1) * 1/n^2 * sum over clusters of (sum of (d_i - mean) in it)^2; without clusters this is sd(d)/sqrt(n).
    Unlike in `accuracy` the values may be differences. Raises StatsError for no items or a value that is not finite.
    """
    values = np.atleast_2d(np.asarray(values, dtype=float)).mean(axis=0)
    if not values.size or not np.isfinite(values).all():
        raise StatsError("no items" if not values.size else "a value is not a finite number")
    codes, count = cluster_codes(clusters, len(values))
    low, high = bootstrap(lambda mean: mean, [values], codes, seed)
    return Mean(float(values.mean()), _clustered_se(values, codes, count), low, high, len(values), count,
                _note(values, count))


def paired_gap(text_correct, vision_correct, *, clusters=None, seed=0) -> Gap:
    """Gap = mean(t_i - v_i) on the same items, SE and interval of `mean_interval`, and exact McNemar.

    text_correct, vision_correct: (items,) or (seeds, items), the same items in the same order.
    Raises StatsError for no items, unequal lengths, values outside [0, 1].
    """
    text, vision = _same_length(text_correct, vision_correct)
    found = mean_interval(text - vision, clusters=clusters, seed=seed)
    return Gap(found.value, found.se, found.low, found.high, mcnemar(text_correct, vision_correct), found.n,
               found.n_clusters, found.note)


def gap_change(before, after, *, clusters=None, seed=0) -> Change:
    """Change of the gap on the same items: mean of (t1_i - v1_i) - (t0_i - v0_i), d_text and d_vision beside it.

    before, after: pairs (text_correct, vision_correct), each (items,) or (seeds, items). SE, interval and errors as in
    paired_gap. d_text = mean(t1 - t0) and d_vision = mean(v1 - v0): a gap that closed because text fell shows here.
    """
    t0, v0, t1, v1 = _same_length(*before, *after)
    found = mean_interval((t1 - v1) - (t0 - v0), clusters=clusters, seed=seed)
    return Change(found.value, found.se, found.low, found.high, float((t1 - t0).mean()), float((v1 - v0).mean()),
                  found.n, found.n_clusters, found.note)


def closure(before, after, *, clusters=None, seed=0) -> Mean:
    """(G0 - G1) / G0, the part of the gap that is gone, with a cluster-bootstrap interval (no SE). As in gap_change.

    The value is nan when G0 is 0. Unstable near that: the note says so when the interval of G0 holds 0.
    """
    t0, v0, t1, v1 = _same_length(*before, *after)
    g0, g1 = t0 - v0, t1 - v1
    codes, count = cluster_codes(clusters, len(g0))
    if g0.mean() == 0:
        return Mean(NAN, NAN, NAN, NAN, len(g0), count, "there was no gap to close")
    start = mean_interval(g0, clusters=clusters, seed=seed)
    low, high = bootstrap(lambda a, b: (a - b) / a, [g0, g1], codes, seed)
    note = start.note if not start.low <= 0 <= start.high else "the gap before may be 0, so this share is unstable"
    return Mean(float((g0.mean() - g1.mean()) / g0.mean()), NAN, low, high, len(g0), count, note)


def mcnemar(first, second) -> float:
    """Exact two-sided McNemar p-value: p = min(1, 2 P[Bin(b + c, 1/2) <= min(b, c)]) over the discordant items.

    nan when an item is neither right nor wrong (an average over seeds). Clusters are not accounted for.
    """
    a, b = _same_length(first, second)
    if not np.isin([a, b], (0, 1)).all():
        return NAN
    table = [[int(((a == i) & (b == j)).sum()) for j in (1, 0)] for i in (1, 0)]
    return float(_mcnemar(table, exact=True).pvalue)


def flips_of(pred, pred_other, correct, correct_other) -> np.ndarray:
    """1.0 per (seed, item) whose answer changed: rightness changed, or both are wrong in different words.

    Two right answers in different words ("4", "4.0") are no change, and neither are two unparsed ones (None).
    Shapes (items,) or (seeds, items); the result is 2-D. Raises StatsError when the shapes differ.
    """
    pred, other = (np.atleast_2d(np.array(one, dtype=object)) for one in (pred, pred_other))
    right, still = (np.atleast_2d(np.asarray(one, dtype=float)) == 1 for one in (correct, correct_other))
    if not pred.shape == other.shape == right.shape == still.shape:
        raise StatsError(f"answers of shapes {pred.shape} and {other.shape} for items of shape {right.shape}")
    return ((right != still) | (~right & ~still & (pred != other))).astype(float)


def flip_rate(pred, pred_other, correct, correct_other, *, clusters=None, seed=0) -> Flips:
    """Share of items answered otherwise under another picture: the sum of right->wrong, wrong->right, wrong->other.

    Arguments as in flips_of.
    """
    flips = flips_of(pred, pred_other, correct, correct_other)
    right, still = (np.atleast_2d(np.asarray(one, dtype=float)) == 1 for one in (correct, correct_other))
    found = mean_interval(flips, clusters=clusters, seed=seed)
    return Flips(found.value, found.se, found.low, found.high, float((right & ~still).mean()),
                 float((~right & still).mean()), float((flips * (~right & ~still)).mean()), found.n, found.note)


def agreement(pred, pred_other, correct, correct_other, n_choices: Sequence[int | None]) -> Agreement:
    """Share of items with the same answer in two views, and kappa = (A - A0) / (1 - A0).

    A0 = a b + (1 - a)(1 - b) / (k - 1) is the agreement of two views with accuracies a, b whose errors are independent
    and even over the k - 1 wrong choices. Unparsed answers disagree on every item, also with each other.
    n_choices: k per item; None (open question) counts as endlessly many.
    """
    a, b = _same_length(correct, correct_other)
    pred, other = np.atleast_2d(np.array(pred, dtype=object)), np.atleast_2d(np.array(pred_other, dtype=object))
    if pred.shape != other.shape or pred.shape[1] != len(a) or len(n_choices) != len(a):
        raise StatsError("answers, correctness and numbers of choices must be of the same items")
    if any(k is not None and k < 1 for k in n_choices):
        raise StatsError("a question without any choice")
    same = (pred == other) & (pred != None) & (other != None)  # noqa: E711  elementwise on objects
    # with a single choice a wrong answer is an unparsed one, and those never agree
    by_chance = float(np.mean([0.0 if k is None or k == 1 else 1 / (k - 1) for k in n_choices]))
    found, expected = float(same.mean()), kappa_chance(float(a.mean()), float(b.mean()), by_chance)
    return Agreement(found, expected, None if expected >= 1 else (found - expected) / (1 - expected), len(a))


def kappa_chance(a: float, b: float, by_chance: float) -> float:
    """Expected agreement of two accuracies; by_chance = mean of 1 / (k - 1)."""
    return a * b + (1 - a) * (1 - b) * by_chance


def shapley_values(none, image, text, both):
    """(phi_image, phi_text) of two players: phi_image = [(image - none) + (both - text)] / 2. Numbers or arrays."""
    return ((image - none) + (both - text)) / 2, ((text - none) + (both - image)) / 2


def shapley(none, image, text, both, *, clusters=None, seed=0) -> Shapley:
    """Shapley values of accuracy from the views blind, vision, text, both, and each one's share of |phi|.

    Arrays as in paired_gap. The interval is that of the image's share; nan when that is undefined in some draws.
    """
    columns = _same_length(none, image, text, both)
    n, v, t, b = (float(one.mean()) for one in columns)
    phi_image, phi_text = shapley_values(n, v, t, b)
    total = abs(phi_image) + abs(phi_text)
    if total == 0:
        return Shapley(phi_image, phi_text, b - t - v + n, None, None, n=len(columns[0]), note="both values are 0")
    codes, count = cluster_codes(clusters, len(columns[0]))
    low, high = bootstrap(_image_share, columns, codes, seed)
    return Shapley(phi_image, phi_text, b - t - v + n, abs(phi_image) / total, abs(phi_text) / total, low, high,
                   len(columns[0]), _note(None, count))


def shapley_change(before, after, *, clusters=None, seed=0) -> Mean | None:
    """after - before of the image's Shapley share, without an SE (nan); None when it is undefined on either side.

    before, after: (none, image, text, both) as in shapley, on the same items.
    """
    columns = _same_length(*before, *after)

    def change(*means):
        return _image_share(*means[4:]) - _image_share(*means[:4])

    with np.errstate(invalid="ignore"):
        value = float(change(*(np.float64(one.mean()) for one in columns)))
    if math.isnan(value):
        return None
    codes, count = cluster_codes(clusters, len(columns[0]))
    low, high = bootstrap(change, columns, codes, seed)
    return Mean(value, NAN, low, high, len(columns[0]), count, _note(None, count))


def _image_share(none, image, text, both):
    phi_image, phi_text = (np.abs(phi) for phi in shapley_values(none, image, text, both))
    return phi_image / (phi_image + phi_text)


def chance_level(n_choices: Sequence[int | None]) -> float:
    """Accuracy of an even guess: mean of 1/k; 0 for an open question (None)."""
    if not len(n_choices):
        raise StatsError("no items")
    if any(k is not None and k < 1 for k in n_choices):
        raise StatsError("a question without any choice")
    return float(np.mean([0.0 if k is None else 1 / k for k in n_choices]))


def seed_spread(values: Sequence[float]) -> Spread:
    """The per-seed values with their t-interval: how much another training run would differ. One seed: no interval."""
    values = tuple(float(value) for value in values)
    if not values:
        raise StatsError("no seeds")
    mean = float(np.mean(values))
    if len(values) == 1:
        return Spread(values, mean, NAN, NAN, NAN)
    sd = float(np.std(values, ddof=1))
    half = float(scipy.stats.t.ppf((1 + LEVEL) / 2, len(values) - 1)) * sd / math.sqrt(len(values))
    return Spread(values, mean, sd, mean - half, mean + half)


def bootstrap(statistic: Callable, columns: Sequence[np.ndarray], codes: np.ndarray, seed: int) -> tuple[float, float]:
    """Percentile interval of statistic(mean of column 1, mean of column 2, ...) over whole clusters drawn together.

    columns: arrays (items,); codes: cluster number per item; (nan, nan) with one cluster or an undefined statistic.
    """
    count = int(codes.max()) + 1
    if count < 2:
        return NAN, NAN
    # A mean needs only each cluster's sum and size, and a draw of clusters only how often each was drawn.
    sizes = np.bincount(codes, minlength=count)
    sums = np.stack([*(np.bincount(codes, weights=column, minlength=count) for column in columns), sizes], axis=1)
    totals = np.concatenate([times @ sums for times in _drawn(count, seed, RESAMPLES)])
    with np.errstate(divide="ignore", invalid="ignore"):
        found = statistic(*(totals[:, :-1] / totals[:, -1:]).T)
    low, high = np.quantile(found, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])  # nan where it is undefined in one of the draws
    return float(low), float(high)


@lru_cache(maxsize=1)  # all measures of a task draw alike
def _drawn(count: int, seed: int, resamples: int) -> list[np.ndarray]:
    """How often each cluster was drawn: arrays (draws, count) that add up to `resamples` draws of `count` clusters."""
    rng, rows, times = np.random.default_rng(seed), max(1, 2_000_000 // count), []
    for start in range(0, resamples, rows):
        draws = rng.integers(0, count, (min(rows, resamples - start), count))
        places = draws + np.arange(len(draws))[:, None] * count
        times.append(np.bincount(places.ravel(), minlength=draws.size).reshape(draws.shape).astype(np.uint16))
    return times


def _clustered_se(values: np.ndarray, codes: np.ndarray, count: int) -> float:
    if count < 2:
        return NAN
    fit = sm.OLS(values, np.ones(len(values))).fit(cov_type="cluster", cov_kwds={"groups": codes})
    return float(np.sqrt(max(fit.cov_params()[0, 0], 0.0)))


def _note(values: np.ndarray | None, count: int, width: bool = False) -> str:
    if count == 1:
        return "all items are in one group, so there is no standard error"
    if values is not None and not width and np.ptp(values) == 0:
        return "every item has the same value, so the interval has no width"
    return f"only {count} groups: the interval is likely too narrow" if count < FEW_CLUSTERS else ""


def _values(correct) -> tuple[np.ndarray, int]:
    """(per-item mean over seeds, number of seeds)."""
    array = np.asarray(correct, dtype=float)
    if array.size == 0 or array.ndim not in (1, 2):
        raise StatsError("no items" if not array.size else f"expected (items,) or (seeds, items), got {array.shape}")
    if not ((array >= 0) & (array <= 1)).all():
        raise StatsError("correctness must lie in 0 to 1 for every item")
    return (array, 1) if array.ndim == 1 else (array.mean(axis=0), array.shape[0])


def _same_length(*arrays) -> list[np.ndarray]:
    columns = [_values(one)[0] for one in arrays]
    if len({len(one) for one in columns}) > 1:
        raise StatsError(f"arrays of {', '.join(str(len(one)) for one in columns)} items; they must be the same items")
    return columns


def cluster_codes(clusters, n: int) -> tuple[np.ndarray, int]:
    """(cluster number per item, how many there are); None: every item by itself. StatsError for another length than n."""
    if clusters is None:
        return np.arange(n), n
    if len(clusters) != n:
        raise StatsError(f"{len(clusters)} cluster names for {n} items")
    # Numbered as they appear, so that renaming groups leaves every bootstrap draw as it was.
    numbers: dict[str, int] = {}
    codes = np.array([numbers.setdefault(str(one), len(numbers)) for one in clusters])
    return codes, len(numbers)
