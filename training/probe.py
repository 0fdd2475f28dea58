"""Held-out problems that are asked during training, with the picture alone, the words alone, neither, and both."""

from typing import TYPE_CHECKING

import torch

from data_prep.encode import Encoder
from training.balance.settings import Balance
from training.collate import Collator
from training.config import Loss
from training.mixture import Mixture
from training.objective import BRANCHES, Objective, Role
from training.order import Draw

if TYPE_CHECKING:
    from training.balanced import Balanced

METRICS = ("accuracy", "probability", "loss")


class _Held:
    """The probe's conversations, as a collator reads them."""

    def __init__(self, mixture: Mixture) -> None:
        self.mixture, self.batch = mixture, len(mixture)
        self.draw, self.conversation = mixture.draw, mixture.conversation


class Probing:
    """A probe of a run.

    Args:
        mixture: its conversations. The view that it draws counts as both; the branches follow from it.
        balance: the recipe's method, for its probe's pace and the question's place.
        size: conversations in a forward pass.
    """

    def __init__(self, mixture: Mixture, balance: Balance, size: int, encoder: Encoder) -> None:
        self.mixture, self.every, self.size = mixture, balance.probe.every, size
        self.roles = {name: Role(shown, False, True, question=name == "text" or balance.question == "kept")
                      for name, shown in BRANCHES.items()}
        self.roles["both"] = Role({view: view for view in BRANCHES["none"]}, False, True)
        self._objective = Objective(Loss(), ())
        self._collator = Collator(_Held(mixture), encoder)

    @torch.no_grad()
    def ask(self, trainer: "Balanced") -> dict[str, dict[str, float]]:
        """Per branch and metric the mean over answers, the same on every rank; each asks its part of the problems.

        accuracy and probability are corrected for chance (training.balance.views.Seen.value), loss is the branch's own.
        """
        accelerator, model = trainer.accelerator, trainer.model
        training = model.training
        model.eval()
        sums = torch.zeros(len(self.roles), len(METRICS) + 1, dtype=torch.float64, device=trainer.args.device)
        for start in range(accelerator.process_index * self.size, len(self.mixture), self.size * accelerator.num_processes):
            draws: list[Draw] = [self.mixture.draw(n) for n in range(start, min(start + self.size, len(self.mixture)))]
            batch = trainer._prepare_inputs(self._collator.branches(draws, self.roles, self._objective))
            for row, name in enumerate(self.roles):
                shown = batch["branches"][name]
                with accelerator.autocast():
                    found = trainer.look_at(model, shown, False, True)
                seen = trainer.seen(found, shown["labels"], batch["at"], batch["token"])
                values = [seen.value("accuracy"), seen.value("probability"), seen.own_loss()]
                sums[row] += torch.stack([*(value.sum() for value in values), values[0].new_tensor(float(len(batch["at"])))])
        model.train(training)
        sums = accelerator.reduce(sums, reduction="sum")
        means = (sums[:, :-1] / sums[:, -1:]).tolist()
        return {name: dict(zip(METRICS, row)) for name, row in zip(self.roles, means)}
