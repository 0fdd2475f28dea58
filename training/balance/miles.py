"""MILES (arXiv 2510.17394): after each measurement, slow down the modality that is learned faster by itself."""

import math
from collections.abc import Mapping

from torch import Tensor

from training.balance.hook import Metrics, Modulation, World
from training.balance.settings import SIDES, Miles
from training.balance.views import Seen


def relative_gains(both: float, image: float, text: float) -> tuple[float, float]:
    """What each modality adds to the other, over the joint metric: (u_image, u_text) = ((M - M_text)/M, (M - M_image)/M).

    Raises:
        ZeroDivisionError: the joint metric is 0.
    """
    return (both - text) / both, (both - image) / both


def lr_factors(both: float, image: float, text: float, *, tau: float, mu: float) -> dict[str, float]:
    """Factors on the global learning rate of the two modalities (the schedule of the paper).

    With delta = |u_image - u_text|: both 1 when delta <= tau or when each modality alone beats the joint model (both u < 0);
    else mu for the one with the larger u, 1 for the other. Since delta = |M_image - M_text| / M_both, and u_image > u_text
    exactly when M_image > M_text, this says: slow the better one if the two differ by more than tau of the joint metric and at
    least one does not beat it.

    The factors depend on these metrics alone, never on earlier factors, so each rate is either the global one or mu times it.
    Taken literally, the paper's algorithm does not set back the other rate when dominance changes sides; here both are always
    given. What fuses the modalities is never scaled.

    Args:
        both, image, text: accuracy or F1 of the joint model and of each modality alone, higher is better. Accuracy over options
            should be corrected for chance first: what guessing adds to all three makes delta smaller.
        tau: >= 0; 0.2 was best on one data set of the paper (LUMA).
        mu: in [0, 1]; 0.5 was best there, 1 is no modulation.

    Returns:
        {"image": factor, "text": factor}, at most one of them different from 1. Both are 1 when the joint metric is not above
        0: relative gains mean nothing then.

    Raises:
        ValueError: a metric that is not finite, or tau or mu out of range.
    """
    if not (tau >= 0 and 0 <= mu <= 1):
        raise ValueError(f"tau must not be negative and mu must lie between 0 and 1, not tau = {tau}, mu = {mu}")
    if not all(math.isfinite(metric) for metric in (both, image, text)):
        raise ValueError(f"metrics must be finite: both {both}, image {image}, text {text}")
    factors = {"image": 1.0, "text": 1.0}
    if both > 0:
        u_image, u_text = relative_gains(both, image, text)
        if abs(u_image - u_text) > tau and not (u_image < 0 and u_text < 0):
            factors["image" if u_image > u_text else "text"] = float(mu)
    return factors


class MilesMethod(Modulation):
    """MILES on the towers of one model: the probe's accuracies, corrected for chance, decide the factors until the next probe."""

    settings: Miles

    def __init__(self, settings: Miles, world: World) -> None:
        super().__init__(settings, world)
        self.branches = ("both", *SIDES)

    def on_probe(self, metrics: Metrics) -> None:
        values = {branch: metrics[branch][self.settings.metric] for branch in self.branches}
        self.shown |= {f"value_{branch}": value for branch, value in values.items()}
        self.set(lr_factors(**values, tau=self.settings.tau, mu=self.settings.mu))

    def loss(self, views: Mapping[str, Seen], answers: Tensor | float) -> Tensor | None:
        if self.settings.unimodal_ce:
            own = sum(views[side].own_loss().sum() for side in SIDES)
            return self.strength * self.settings.unimodal_ce * own / answers
