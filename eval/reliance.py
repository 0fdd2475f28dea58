"""How much answers depend on the picture: pure measures on the answers to one item in several views. No model, no files.

Arrays are (seeds, items), one row per training seed; (items,) stands for one seed. Shares and differences are fractions,
divergences are nats. Every function below gives a `Measure`, a function of means over items, or what goes into one. So one
bootstrap over whole groups (`estimate`) serves them all, and two models on the same items are compared in pairs (`difference`).

Sources: perceptual score, Gat et al. (arXiv 2110.14375); conditional utilisation (arXiv 2202.05306). What is marked "our
definition" is ours, also where the words are common in the literature.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from eval import stats

EPSILON = 1e-12  # a sum of thirds over three seeds is not exactly 0


@dataclass(frozen=True)
class Measure:
    """function(mean of column 1, mean of column 2, ...); it must work elementwise on arrays of means.

    columns: arrays (items,), already averaged over seeds. function None: the mean of the one column. n: items that
    count, averaged over seeds. undefined: in words, when the function has no value.
    """

    columns: tuple[np.ndarray, ...]
    function: Callable | None = None
    n: float = 0.0
    undefined: str = ""

    def value(self) -> float:
        means = [np.float64(column.mean()) for column in self.columns]
        with np.errstate(divide="ignore", invalid="ignore"):
            return float(means[0] if self.function is None else self.function(*means))


def estimate(measure: Measure, clusters: Sequence | None = None, seed: int = 0) -> stats.Mean:
    """Value and 95 % interval of a measure; whole clusters (items,) are drawn. A plain mean also has its clustered SE.

    Undefined is nan, never a number made up for it, and the note says why. An interval is undefined as well when the
    measure is in one of the resamples. Raises StatsError as stats.mean_interval.
    """
    if measure.function is None:
        return stats.mean_interval(measure.columns[0], clusters=clusters, seed=seed)
    return _interval(measure, clusters, seed)


def difference(before: Measure, after: Measure, clusters: Sequence | None = None, seed: int = 0) -> stats.Mean:
    """after - before on the same items in the same order, with the interval of the paired bootstrap. As in `estimate`."""
    if before.function is None and after.function is None:
        return stats.mean_interval(after.columns[0] - before.columns[0], clusters=clusters, seed=seed)
    count, first, second = len(before.columns), before.function or _mean, after.function or _mean
    both = Measure(before.columns + after.columns, lambda *means: second(*means[count:]) - first(*means[:count]),
                    min(before.n, after.n), before.undefined or after.undefined)
    return _interval(both, clusters, seed)


def _interval(measure: Measure, clusters: Sequence | None, seed: int) -> stats.Mean:
    if not len(measure.columns[0]):
        raise stats.StatsError("no items")
    codes, groups = stats.cluster_codes(clusters, len(measure.columns[0]))
    value, counted = measure.value(), round(measure.n)
    if not np.isfinite(value):
        return stats.Mean(stats.NAN, stats.NAN, stats.NAN, stats.NAN, counted, groups, measure.undefined)
    low, high = stats.bootstrap(measure.function, measure.columns, codes, seed)
    note = ""
    if groups == 1:
        note = "all items are in one group, so there is no interval"
    elif not np.isfinite(low):
        note = f"no interval: in some resamples {measure.undefined}"
    elif high - low < EPSILON:
        note = "every resample gives the same value, so the interval has no width"
    elif groups < stats.FEW_CLUSTERS:
        note = f"only {groups} groups: the interval is likely too narrow"
    return stats.Mean(value, stats.NAN, low, high, counted, groups, note)


def mean_of(values, among=None, undefined: str = "no item counts") -> Measure:
    """Mean of values (seeds, items), or only over the answers where `among` (seeds, items) is 1: a ratio of means."""
    values = np.atleast_2d(np.asarray(values, dtype=float))
    if among is None:
        return Measure((values.mean(axis=0),), n=values.shape[1])
    among = np.broadcast_to(np.atleast_2d(np.asarray(among, dtype=float)), values.shape)
    if among.all():
        return Measure((values.mean(axis=0),), n=values.shape[1])
    counted = np.where(among > 0, values, 0.0)
    return Measure((counted.mean(axis=0), among.mean(axis=0)), _ratio, n=float(among.mean(axis=0).sum()), undefined=undefined)


def _mean(mean):
    return mean


def _ratio(top, bottom):
    return np.where(np.abs(bottom) > EPSILON, top / bottom, np.nan)


# consistency

def agrees(pred, other, right, still) -> np.ndarray:
    """1.0 per (seed, item) where both answers could be read and are the same option, or the same words, or both right.

    pred, other: what was answered (None: unparsed, which agrees with nothing, not even with another unparsed answer).
    right, still: 1.0 where that answer is right; two right answers in different words ("4", "4.0") are the same answer.
    """
    pred, other = _objects(pred), _objects(other)
    both_right = (np.atleast_2d(right) == 1) & (np.atleast_2d(still) == 1)
    parsed = (pred != None) & (other != None)  # noqa: E711  elementwise on objects
    return (parsed & ((pred == other) | both_right)).astype(float)


def consistency(same, among=None) -> Measure:
    """C_a = share of items with the same chosen option under the original input and under ablation a. Our definition.

    same: see `agrees`. among: 1.0 for the answers to count, such as those that are right under the original: then
    it is the share of right answers that stay although the picture is gone, so that did not need it.
    """
    return mean_of(same, among, "no answer is of this kind")


def places_of(pred, choices: Sequence[Sequence[str] | None]) -> np.ndarray:
    """Where the chosen option stands in the order shown, from 0: (seeds, items) ints; -1 unparsed or an open question."""
    return np.array([[list(shown).index(one) if shown and one in shown else -1 for one, shown in zip(row, choices)]
                     for row in _objects(pred)])


def kappa(places, other, n_choices: Sequence[int | None]) -> Measure:
    """kappa_a = (C_a - p_e) / (1 - p_e), p_e from the two option marginals: Cohen's form; the marginals are our definition.

    places, other: see `places_of`. The marginals are those of the place at which the chosen option was shown (first,
    second, ...; for answers by letter that is the letter), taken among the items with equally many options, because a
    place that only some items have is no chance of the others:

        p_e = sum over k of (share of items with k options) * sum over places j < k of p(j | k) q(j | k)

    with p under the original and q under the ablation; of several seeds each has marginals of its own, and p_e is the mean
    of theirs, because only answers of one model meet. Options are shown permuted per item, in the same order in every
    view, so a place says nothing about the question and p_e is what habits of place alone would give. Open questions do
    not count. 1: no answer depends on what was taken away; 0: they are alike as two independent answers are.
    """
    places, other = np.atleast_2d(places), np.atleast_2d(other)
    counts = np.array([k or 0 for k in n_choices])
    columns = [((places == other) & (places >= 0) & (counts > 0)).mean(axis=0), (counts > 0).astype(float)]
    strata = []
    for k in sorted(set(counts[counts > 0].tolist())):
        inside = counts == k
        pairs = [((p == j) & inside, (q == j) & inside) for p, q in zip(places, other) for j in range(k)]
        pairs = [pair for pair in pairs if pair[0].any() and pair[1].any()]  # the others add nothing, in any resample
        strata.append(len(pairs))
        columns += [inside.astype(float), *(column.astype(float) for pair in pairs for column in pair)]

    def corrected(*means):
        expected, at = 0.0, 2
        for pairs in strata:
            inside = means[at + 1:at + 1 + 2 * pairs]
            met = sum((p * q for p, q in zip(inside[::2], inside[1::2])), 0.0 * means[at]) / len(places)
            expected = expected + np.where(means[at] > 0, met / means[at], 0.0)
            at += 1 + 2 * pairs
        agreed, expected = means[0] / means[1], expected / means[1]
        return np.where(1 - expected > EPSILON, (agreed - expected) / (1 - expected), np.nan)

    return Measure(tuple(columns), corrected, n=float((counts > 0).sum()),
                    undefined="chance agreement is 1 (every answer stands in one place)" if strata else "no item has options")


def flips(pred, other, right, still, among: str | None = None) -> Measure:
    """Share of items whose answer changes; `among` one direction: "right_to_wrong", "wrong_to_right", "wrong_to_other".

    The split of stats.flip_rate: the three directions sum to the rate. Two unparsed answers are no change here, and no
    agreement in `consistency`; C_a + flips + share unparsed under both = 1.
    """
    changed = stats.flips_of(pred, other, right, still)
    was, now = (np.atleast_2d(np.asarray(one, dtype=float)) == 1 for one in (right, still))
    kinds = {None: True, "right_to_wrong": was & ~now, "wrong_to_right": ~was & now, "wrong_to_other": ~was & ~now}
    return mean_of(changed * kinds[among])


# soft differences

def log_probabilities(scores: Sequence[Sequence[float]]) -> np.ndarray:
    """Log-softmax of each item's option log-likelihoods: (items, largest number of options), -inf past an item's last one."""
    padded = np.full((len(scores), max(map(len, scores), default=0)), -np.inf)
    for row, one in zip(padded, scores):
        row[:len(one)] = one
    top = padded.max(axis=1, keepdims=True)
    return padded - top - np.log(np.exp(padded - top).sum(axis=1, keepdims=True))


def kl(original: np.ndarray, ablated: np.ndarray) -> np.ndarray:
    """KL(original || ablated) = sum over options of p (log p - log q), per item, in nats. Arrays of `log_probabilities`."""
    with np.errstate(invalid="ignore"):
        terms = np.exp(original) * (original - ablated)
    return np.where(np.isneginf(original), 0.0, terms).sum(axis=-1)


def jensen_shannon(original: np.ndarray, ablated: np.ndarray) -> np.ndarray:
    """JS = (KL(p || m) + KL(q || m)) / 2 with m = (p + q) / 2, per item, in nats: 0 for equal, at most ln 2 = 0.693."""
    middle = np.logaddexp(original, ablated) - np.log(2)
    return (kl(original, middle) + kl(ablated, middle)) / 2


def gold_change(original: np.ndarray, ablated: np.ndarray, gold: np.ndarray) -> np.ndarray:
    """PMI = log p(gold | original) - log p(gold | ablated), per item, in nats: what the input lent to the right option."""
    rows = np.arange(len(gold))
    return original[rows, gold] - ablated[rows, gold]


# what a modality is worth

def utility(full, without) -> Measure:
    """U_m = Acc(x) - Acc(x with m removed or neutralised), on the same items. Our definition."""
    return mean_of(np.atleast_2d(full) - np.atleast_2d(without))


def imbalance(full, no_text, no_image) -> Measure:
    """U_text / (U_text + U_image), U_text = Acc(x) - Acc(x without text), U_image likewise. Our definition.

    0.5: both are worth as much; 1: the picture is worth nothing beside the words. Undefined when the two utilities do not
    have one sign, or are both 0: a share of gain and loss means nothing, so it is not clipped to 0 or 1.
    """
    text, image = ((np.atleast_2d(full) - np.atleast_2d(one)).mean(axis=0) for one in (no_text, no_image))

    def share(u_text, u_image):
        u_text, u_image = (np.where(np.abs(one) > EPSILON, one, 0.0) for one in (u_text, u_image))
        return np.where((u_text * u_image >= 0) & (u_text + u_image != 0), u_text / (u_text + u_image), np.nan)

    return Measure((text, image), share, n=len(text),
                   undefined="the utilities of text and image do not have one sign, or both are 0")


def utilisation(both, without) -> Measure:
    """u(m | other) = (B - O) / B: both = accuracies with both modalities (B), without = with the other one alone (O).

    Conditional utilisation rate of arXiv 2202.05306. u(image | text) = (B - T) / B, u(text | image) = (B - V) / B.
    """
    both, without = (np.atleast_2d(np.asarray(one, dtype=float)).mean(axis=0) for one in (both, without))
    return Measure((both, without), lambda b, o: _ratio(b - o, b), n=len(both), undefined="no item is right in the view both")


def perceptual_score(right, shuffled) -> Measure:
    """(Acc - Acc with the image permuted over items) / Acc (Gat et al., arXiv 2110.14375; Z = Acc).

    The first accuracy is that of the own picture; the authors' code permutes in both terms, which is not done here. Each
    item has one other item's picture, the same for every model, where the paper's permutation is drawn at random.
    """
    return replace(utilisation(right, shuffled), undefined="no item is right with its own picture")


def perceptual_score_majority(right, shuffled, majority: float) -> Measure:
    """(Acc - Acc with the image permuted over items) / (1 - majority): the same with Z = 1 - majority. See `majority`."""
    if not majority < 1:
        return Measure((np.atleast_2d(right).mean(axis=0),), lambda mean: mean * np.nan, n=np.atleast_2d(right).shape[1],
                        undefined="a constant answer is always right")
    return mean_of((np.atleast_2d(right) - np.atleast_2d(shuffled)) / (1 - majority))


def majority(gold: Sequence[str], choices: Sequence[Sequence[str] | None]) -> float:
    """Accuracy of the best constant answer: the commonest right answer, or the commonest place of it, whichever is more."""
    said = Counter(gold).most_common(1)[0][1]
    placed = Counter(list(shown).index(one) for one, shown in zip(gold, choices) if shown and one in shown)
    return max(said, *placed.values(), 0) / len(gold)


def shapley(none, image, text, both, part: str) -> Measure:
    """Two-player Shapley values of the coalitions blind, vision, text, both (stats.shapley_values), (seeds, items) each.

    part: "image" phi_I = [(V - N) + (B - T)] / 2; "text" phi_T = [(T - N) + (B - V)] / 2; phi_I + phi_T = B - N;
    "interaction" B - T - V + N, below 0 when the two are redundant; "share" |phi_I| / (|phi_I| + |phi_T|).
    The worth may be correctness or the gold option's log-probability.
    """
    none, image, text, both = (np.atleast_2d(np.asarray(one, dtype=float)).mean(axis=0) for one in (none, image, text, both))
    phi_image, phi_text = stats.shapley_values(none, image, text, both)
    if part == "share":
        return Measure((phi_image, phi_text), lambda i, t: _ratio(np.abs(i), np.abs(i) + np.abs(t)), n=len(none),
                        undefined="both Shapley values are 0")
    return mean_of({"image": phi_image, "text": phi_text, "interaction": both - text - image + none}[part])


# conflict

def follows(conflict, words, image, among: str) -> Measure:
    """What is followed when the picture and another problem's facts contradict each other. Our definition.

    conflict, words, image: pairs (pred, right) of (seeds, items), the answers in the views conflict, other_facts (the
    words alone) and vision (the picture alone). Counted are the answers where words and picture, each alone, were read
    and answered differently. among: "text", "image", "neither", shares of these; "preference" = text / (text + image).
    """
    (pred, right), (said, said_right), (seen, seen_right) = conflict, words, image
    parsed = (_objects(said) != None) & (_objects(seen) != None)  # noqa: E711  elementwise on objects
    differ = parsed & (agrees(said, seen, said_right, seen_right) == 0)
    text = differ * agrees(pred, said, right, said_right)
    picture = differ * agrees(pred, seen, right, seen_right)
    if among == "preference":
        return mean_of(text, text + picture, "no answer follows the words or the picture")
    shares = {"text": text, "image": picture, "neither": differ - text - picture}
    return mean_of(shares[among], differ, "words and picture alone are never answered differently")


def _objects(answers) -> np.ndarray:
    """(seeds, items) of answers as objects: numpy would otherwise turn None and words into one kind of string."""
    rows = list(answers)
    if not rows or isinstance(rows[0], str) or rows[0] is None:
        rows = [rows]
    array = np.empty((len(rows), len(rows[0])), dtype=object)
    for place, row in enumerate(rows):
        array[place, :] = list(row)
    return array
