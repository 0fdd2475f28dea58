"""Auxiliary losses of each branch: with fixed weights, or with those of Gradient-Blend (arXiv 1905.12681)."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from training.balance.hook import Groups, Method, Metrics, World
from training.balance.settings import SIDES, UnimodalLosses
from training.balance.views import Seen

BRANCHES = ("both", *SIDES)
HIGHEST = 4.0           # of a branch's weight in units of the joint loss's


def blend_weights(train: tuple[float, float], held_out: tuple[float, float]) -> float:
    """G / O^2 of one branch between two measurements (its overfitting-to-generalisation ratio, eq. 5): not normalised.

    G is what its loss on held-out problems fell by, O what the distance of that loss from the training loss grew by. 0 where it
    did not get better. Where the distance did not grow, O counts as a hundredth of G: what does not overfit counts much, and is
    still a number.

    Args:
        train, held_out: losses at the two measurements, the earlier one first.
    """
    gain = held_out[0] - held_out[1]
    if gain <= 0:
        return 0.0
    overfit = (held_out[1] - train[1]) - (held_out[0] - train[0])
    return gain / max(overfit, gain / 100) ** 2


class UnimodalLossesMethod(Method):
    """Adds the cross-entropies of the branches. In a blend they are weighed anew at every probe from the third one on, as the
    first one comes before any training loss; until then each counts as much as the joint loss, which keeps the weight 1."""

    settings: UnimodalLosses

    def __init__(self, settings: UnimodalLosses, world: World) -> None:
        super().__init__(settings, world)
        self.weights = {side: getattr(settings, side) for side in SIDES}
        self._sums: Tensor | None = None            # (branches, 2) of this step on this rank: sum of losses, number of answers
        self._train = {branch: [0.0, 0.0] for branch in BRANCHES}       # the same since the last probe, over all ranks
        self._last: dict[str, list[float]] | None = None                # at the last probe: [training loss, held-out loss]

    def loss(self, views: Mapping[str, Seen], answers: Tensor | float) -> Tensor | None:
        own = {branch: view.own_loss() for branch, view in views.items() if branch in BRANCHES}
        if not own:
            return None
        if self.settings.blend is not None:
            sums = torch.stack([torch.stack([losses.sum(), losses.new_tensor(float(len(losses)))])
                                for losses in (own[branch].detach() for branch in BRANCHES)]).double()
            self._sums = sums if self._sums is None else self._sums + sums
        return self.strength * sum(self.weights[side] * own[side].sum() for side in SIDES if side in own) / answers

    def before_step(self, groups: Groups) -> None:
        if self._sums is not None:
            # At every step, so that a checkpoint, which one rank writes, holds the sums of all.
            for branch, (total, count) in zip(BRANCHES, self.world.total(self._sums).tolist()):
                self._train[branch] = [self._train[branch][0] + total, self._train[branch][1] + count]
            self._sums = None

    def on_probe(self, metrics: Metrics) -> None:
        now = {branch: [total / count, metrics[branch]["loss"]] for branch, (total, count) in self._train.items() if count}
        self._train = {branch: [0.0, 0.0] for branch in BRANCHES}
        if now and self._last:
            ogr = {branch: blend_weights(*zip(self._last[branch], now[branch])) for branch in BRANCHES}
            for side in SIDES:
                # Against a joint loss that did not get better, any gain is worth the most.
                ratio = ogr[side] / ogr["both"] if ogr["both"] else HIGHEST * (ogr[side] > 0)
                self.weights[side] = min(ratio, HIGHEST)
        self._last = now or None
        self.shown |= {f"weight_{side}": weight for side, weight in self.weights.items()}

    def state(self) -> dict[str, Any]:
        return {"weights": self.weights, "train": self._train, "last": self._last, "shown": self.shown}

    def load(self, state: Mapping[str, Any]) -> None:
        self.weights, self._train = dict(state["weights"]), state["train"]
        self._last, self.shown = state["last"], dict(state["shown"])

