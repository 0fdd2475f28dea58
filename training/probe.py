"""Held-out problems that are asked during training in several views: what a balance method follows, and how wide the gap is."""

from typing import TYPE_CHECKING

import torch

from data_prep.encode import Encoder
from data_prep.problem import View
from training.balance.settings import Balance, Probe
from training.collate import Collator
from training.config import Loss
from training.mixture import Mixture
from training.objective import BRANCHES, Objective, Role
from training.order import Draw
from training.sharding import gathers

if TYPE_CHECKING:
    from training.balanced import Balanced

METRICS = ("accuracy", "probability", "loss", "right")
FOUR = (View.both, View.vision, View.text, View.blind)


class _Held:
    """The probe's conversations, as a collator reads them."""

    def __init__(self, mixture: Mixture) -> None:
        self.mixture, self.batch = mixture, len(mixture)
        self.draw, self.conversation = mixture.draw, mixture.conversation


def branch_probe(mixture: Mixture, balance: Balance, size: int, encoder: Encoder) -> "Probing":
    """What a balance method asks: both, and its branches. The view that the mixture draws counts as both."""
    roles = {name: Role(shown, False, True, question=name == "text" or balance.question == "kept")
             for name, shown in BRANCHES.items()}
    roles["both"] = Role({view: view for view in BRANCHES["none"]}, False, True)
    return Probing(mixture, balance.probe.every, roles, size, encoder)


def gap_probe(mixture: Mixture, settings: Probe, size: int, encoder: Encoder) -> "Probing":
    """What says how wide the gap is: the four views of problems that can be shown in all of them."""
    return Probing(mixture, settings.every, {view.value: Role({View.both: view}, False, True) for view in FOUR}, size, encoder)


def gap_of(metrics: dict[str, dict[str, float]]) -> dict[str, float]:
    """Accuracies of a gap probe, and gap = both - vision, text_gap = text - vision, image_gain = vision - blind.

    As eval.gap has them but for the conversation: here later questions stand behind earlier answers.
    """
    right = {view: found["right"] for view, found in metrics.items()}
    return right | {"gap": right["both"] - right["vision"], "text_gap": right["text"] - right["vision"],
                    "image_gain": right["vision"] - right["blind"]}


class Probing:
    """A probe of a run.

    Args:
        mixture: its conversations.
        every: optimizer steps between two askings.
        roles: by name, how they are shown.
        size: conversations in a forward pass.
    """

    def __init__(self, mixture: Mixture, every: int, roles: dict[str, Role], size: int, encoder: Encoder) -> None:
        self.mixture, self.every, self.roles, self.size = mixture, every, roles, size
        self._objective = Objective(Loss(), ())
        self._collator = Collator(_Held(mixture), encoder)

    @torch.no_grad()
    def ask(self, trainer: "Balanced") -> dict[str, dict[str, float]]:
        """Per branch and metric the mean over answers, the same on every rank; each asks its part of the problems.

        accuracy and probability are corrected for chance (training.balance.views.Seen.value), `right` is accuracy as it is, and
        loss is the branch's own.
        """
        accelerator, model = trainer.accelerator, trainer.model
        training = model.training
        model.eval()
        sums = torch.zeros(len(self.roles), len(METRICS) + 1, dtype=torch.float64, device=trainer.args.device)
        together = self.size * accelerator.num_processes
        for start in range(accelerator.process_index * self.size, -(-len(self.mixture) // together) * together, together):
            counts = start < len(self.mixture)
            if not counts and not gathers(trainer.args):
                break
            first = start if counts else 0      # where weights lie in parts, all ranks ask as often, some without need
            draws: list[Draw] = [self.mixture.draw(n) for n in range(first, min(first + self.size, len(self.mixture)))]
            batch = trainer._prepare_inputs(self._collator.branches(draws, self.roles, self._objective))
            for row, name in enumerate(self.roles):
                shown = batch["branches"][name]
                with accelerator.autocast():
                    found = trainer.look_at(model, shown, False, True)
                seen = trainer.seen(found, shown["labels"], batch["at"], batch["token"])
                values = [seen.value("accuracy"), seen.value("probability"), seen.own_loss(), seen.value("accuracy", corrected=False)]
                sums[row] += counts * torch.stack([*(value.sum() for value in values), values[0].new_tensor(float(len(batch["at"])))])
        model.train(training)
        sums = accelerator.reduce(sums, reduction="sum")
        means = (sums[:, :-1] / sums[:, -1:]).tolist()
        return {name: dict(zip(METRICS, row)) for name, row in zip(self.roles, means)}
