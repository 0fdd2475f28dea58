"""The common interface of balance methods. A trainer calls it and knows no method by name.

In an optimizer step, in this order:

    probe      `on_probe(metrics)`, when the method's settings have a probe and it is due
    forward    of every micro-batch: `begin(extras)`, then `loss(views, ...)` with the branches that settings.views(step) names
    backward   before the last micro-batch's: `before_step(groups)`, which may change the learning rates of this step
    gradients  `on_gradients(groups, again)`, when all are there, before they are clipped
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from data_prep.encode import Encoded
from training.balance.settings import SIDES, Common, Measuring
from training.balance.shapley import running_mean
from training.balance.views import Seen
from training.order import Draw

Metrics = Mapping[str, Mapping[str, float]]         # branch ("both", "image", "text", "none") -> metric -> value
Groups = Sequence[dict[str, Any]]                   # optimizer groups, with "modality" beside "lr"


@dataclass
class World:
    """What a method may know of the run."""
    seed: int
    model: nn.Module                                # the transformers model, without wrappers
    step: Callable[[], int] = lambda: 0             # optimizer steps that are done
    share: float = 1.0                              # of the optimizer step's micro-batches over all ranks that one is
    total: Callable[[Tensor], Tensor] = lambda values: values       # sum over ranks
    again: Callable[[], bool] = lambda: False       # whether a step's passes are being repeated, which nothing may count twice
    optimizer: Callable[[], torch.optim.Optimizer] | None = None    # without wrappers


class Method:
    """Does nothing; methods override what they need.

    Attributes:
        shown: numbers to be logged, by name.
        replays: whether `on_gradients` runs the step's passes again.
        changes_gradients: whether `on_gradients` does anything, so that it must see whole gradients.
    """

    replays = False
    changes_gradients = False

    def __init__(self, settings: Common, world: World) -> None:
        self.settings, self.world, self.strength = settings, world, settings.strength
        self.shown: dict[str, float] = {}

    def on_probe(self, metrics: Metrics) -> None:
        """Values on held-out problems, the same on every rank."""

    def begin(self, extras: Mapping[str, Any]) -> None:
        """Before the forward pass of the drawn view. extras: what the method's Showing put into the batch."""

    def loss(self, views: Mapping[str, Seen], answers: Tensor | float) -> Tensor | None:
        """What is added to the loss of a micro-batch.

        Args:
            views: "both" is the drawn view; the others are those that settings.views(step) names.
            answers: number of answers in the whole optimizer step, over micro-batches and ranks: means are divided by it.
        """

    def before_step(self, groups: Groups) -> None:
        """Change the learning rates of this step; they stand at the schedule's."""

    def on_gradients(self, groups: Groups, again: Callable[[str | None], None]) -> None:
        """Change the gradients of this step, which stand in the parameters.

        again: clears the gradients and makes those of the same micro-batches anew; of one branch's own loss, when named.
        """

    def state(self) -> dict[str, Any]:
        """What a resumed run needs, as JSON values."""
        return {}

    def load(self, state: Mapping[str, Any]) -> None:
        """What `state` gave."""


class Showing:
    """What a method changes about how drawn problems are shown. Lives in the data loader's workers.

    Attributes:
        complete: whether the batch also carries what the rows were before (`complete`, see Collator).
    """

    complete = False

    def draw(self, draw: Draw, key: tuple) -> Draw:
        """Another draw in place of this one. key: (epoch, view, ids of its problems), all that chance may depend on beside the
        seed."""
        return draw

    def row(self, row: Encoded, key: tuple) -> tuple[Encoded, dict[str, float]]:
        """The row as it is to be shown, and numbers about it, of the same names for every row."""
        return row, {}


class Measured(Method):
    """A method that follows how well each branch does, on its own batches or on a probe.

    Subclasses override `measured`, which is called after each measurement with values by branch.
    """

    settings: Measuring
    branches: Sequence[str] = SIDES

    def __init__(self, settings: Measuring, world: World) -> None:
        super().__init__(settings, world)
        self.values: dict[str, float] | None = None     # running means by branch
        self._sums: Tensor | None = None                # of this step: sum of each branch's value, and the number of answers

    def measured(self, values: dict[str, float]) -> None:
        """Called with the running mean (on batches) or the newest values (on a probe) of every branch of `branches`."""

    def watch(self, views: Mapping[str, Seen]) -> None:
        """Count a micro-batch in, when the step is one that is measured. (Branches may be there for other reasons, too.)"""
        if self.world.again() or not self.settings.due(self.world.step()) or not set(self.branches) <= set(views):
            return
        values = [views[branch].value(self.settings.metric) for branch in self.branches]
        sums = torch.stack([*(value.sum() for value in values), values[0].new_tensor(float(len(values[0])))]).double()
        self._sums = sums if self._sums is None else self._sums + sums

    def loss(self, views: Mapping[str, Seen], answers: Tensor | float) -> Tensor | None:
        self.watch(views)

    def before_step(self, groups: Groups) -> None:
        if self._sums is not None:
            *sums, count = self.world.total(self._sums).tolist()
            self._sums = None
            if count:
                self._take([total / count for total in sums], self.settings.decay)

    def on_probe(self, metrics: Metrics) -> None:
        if self.settings.measure == "probe":
            self._take([metrics[branch][self.settings.metric] for branch in self.branches], 0.0)

    def _take(self, values: list[float], decay: float) -> None:
        past = None if self.values is None else list(self.values.values())
        self.values = dict(zip(self.branches, running_mean(past, values, decay)))
        self.shown |= {f"value_{branch}": value for branch, value in self.values.items()}
        self.measured(self.values)

    def state(self) -> dict[str, Any]:
        return {"values": self.values, "shown": self.shown}

    def load(self, state: Mapping[str, Any]) -> None:
        self.values, self.shown = state["values"], dict(state["shown"])


class Modulation(Measured):
    """A method whose measurements give each modality a factor on its learning rate, which holds until the next one."""

    def __init__(self, settings: Measuring, world: World) -> None:
        super().__init__(settings, world)
        self.factors = dict.fromkeys(SIDES, 1.0)

    def before_step(self, groups: Groups) -> None:
        super().before_step(groups)
        scale(groups, self.factors)
        self.shown |= {f"factor_{side}": factor for side, factor in self.factors.items()}

    def set(self, factors: Mapping[str, float]) -> None:
        """The factors of the next steps, at full strength."""
        self.factors = {side: 1 + self.strength * (factor - 1) for side, factor in factors.items()}

    def state(self) -> dict[str, Any]:
        return {**super().state(), "factors": self.factors}

    def load(self, state: Mapping[str, Any]) -> None:
        super().load(state)
        self.factors = dict(state["factors"])


def scale(groups: Groups, factors: Mapping[str, float]) -> None:
    """Multiply the learning rate of each modality's groups. Under Adam a factor on gradients would do nothing: it acts here on the
    update. What belongs to both modalities keeps its pace."""
    for group in groups:
        group["lr"] = group["lr"] * factors.get(group["modality"], 1.0)
