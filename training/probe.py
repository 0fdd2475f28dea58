"""Held-out problems that are asked during training, with the picture alone, the words alone, neither, and both."""

from typing import TYPE_CHECKING

import torch

from data_prep.encode import Encoder
from data_prep.problem import View
from training.balance.settings import Probe
from training.collate import Collator
from training.config import Loss, Recipe, RecipeError
from training.mixture import Mixture
from training.objective import BRANCHES, Objective, Role, WITHOUT_PICTURE
from training.order import Draw

if TYPE_CHECKING:
    from training.balanced import Balanced

SEED = 0                    # of which problems are asked: the same for every seed of training
METRICS = ("accuracy", "probability", "loss")


class _Held:
    """The probe's conversations, as a collator reads them."""

    def __init__(self, mixture: Mixture) -> None:
        self.mixture, self.batch = mixture, len(mixture)
        self.draw, self.conversation = mixture.draw, mixture.conversation


class Probing:
    """A probe of a run.

    Args:
        settings: the recipe's. Its mixture draws the view that counts as both; branches follow from it.
        recipe: for the question's place, and the size of a batch.

    Raises:
        RecipeError: its mixture cannot be read, or draws what has no branches.
    """

    def __init__(self, settings: Probe, recipe: Recipe, encoder: Encoder) -> None:
        def needs(view: View) -> tuple[View, ...]:
            if view not in WITHOUT_PICTURE:
                raise RecipeError(f"balance: the probe's mixture {settings.mixture} draws the view {view.value}, which has no picture "
                                  f"side and word side; it may draw {', '.join(one.value for one in WITHOUT_PICTURE)}")
            return tuple(shown[view] for shown in BRANCHES.values())

        self.settings, self.size = settings, recipe.micro_batch
        self.mixture = Mixture(settings.mixture, seed=SEED, draws=settings.items, needs=needs)
        self.roles = {name: Role(shown, False, True, question=name == "text" or recipe.balance.question == "kept")
                      for name, shown in BRANCHES.items()}
        self.roles["both"] = Role({view: view for view in WITHOUT_PICTURE}, False, True)
        self._objective = Objective(Loss(), ())
        self._collator = Collator(_Held(self.mixture), encoder)

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
