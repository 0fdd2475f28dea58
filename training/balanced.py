"""What trainers do for a balance method: its views, its probe, its turn before the optimizer's step. No method is named here."""

import functools
import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from training.balance.hook import World
from training.balance.methods import method_of
from training.balance.views import Seen, see
from training.collate import IGNORED, answer_numbers
from training.config import Recipe
from training.losses import weighted_nll
from training.model import unwrap
from training.objective import Answers
from training.probe import branch_probe

STATE = "balance.json"      # in checkpoints: what the method remembers


class Balanced:
    """Mixed into a trainer, before TRL's class. Calls `set_up_balance` at the end of its __init__."""

    recipe: Recipe

    def set_up_balance(self) -> None:
        """Raises RecipeError when the method cannot be set up."""
        args = self.args
        world = World(seed=self.recipe.seed, model=unwrap(self.model), step=lambda: self.state.global_step,
                      share=1 / args.gradient_accumulation_steps / self.accelerator.num_processes,
                      total=lambda values: self.accelerator.reduce(values.to(args.device), reduction="sum"),
                      again=lambda: self._again,
                      optimizer=self._bare_optimizer)
        self.balance = method_of(self.recipe, world)
        plan, encoder, size = self.data_collator.plan, self.data_collator.encoder, self.recipe.micro_batch
        self.probing = plan.branch_probe and branch_probe(plan.branch_probe, self.recipe.balance, size, encoder)
        self._batches: list[dict] = []          # micro-batches of this optimizer step on this rank
        self._begun = False                     # the step's first pass
        self._noise: dict | None = None         # random states that it began with
        self._only: str | None = None           # the branch whose own loss is asked for
        self._again = False                     # passes are repeated, which are not counted

    def _bare_optimizer(self) -> torch.optim.Optimizer:
        optimizer = self.optimizer
        while getattr(optimizer, "optimizer", None) is not None:
            optimizer = optimizer.optimizer     # inside accelerate's and DeepSpeed's wrappers
        return optimizer

    # -- an optimizer step -------------------------------------------------------------------------

    def get_batch_samples(self, *args, **kwargs):
        samples, number = super().get_batch_samples(*args, **kwargs)
        self._batches, self._begun = samples, False
        return samples, number

    def training_step(self, model, inputs, num_items_in_batch=None):
        if self.balance is None:
            return super().training_step(model, inputs, num_items_in_batch)
        if not self._begun:
            self._begun = True
            if self.probing is not None and self.state.global_step % self.probing.every == 0:
                self.balance.on_probe(self.probing.ask(self))
            self._noise = _random_states(self.args.device) if self.balance.replays else None
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            replay = functools.partial(self._replay, model, num_items_in_batch)
            self.balance.on_gradients(self._bare_optimizer().param_groups, replay)
        return loss

    def before_optimizer_step(self) -> None:
        """To be called where the loss of a micro-batch is known: before the last one's backward pass the method may set the pace.

        (Not later, because DeepSpeed makes the optimizer's step in that pass.)
        """
        if self.balance is None or self._again or not self.accelerator.sync_gradients:
            return
        groups = self._bare_optimizer().param_groups
        for group, rate in zip(groups, self.lr_scheduler.get_last_lr(), strict=True):
            group["lr"] = rate                  # the schedule's, whatever the last step was made with
        self.balance.before_step(groups)

    def _replay(self, model, num_items_in_batch, branch: str | None = None) -> None:
        """Gradients of this step's micro-batches anew, at the weights as they are now and with the same random numbers."""
        self.model.zero_grad()
        self._again, self._only = True, branch
        try:
            with _replayed(self._noise, self.args.device):
                for number, inputs in enumerate(self._batches):
                    last = number == len(self._batches) - 1
                    with nullcontext() if last else self.accelerator.no_sync(model=model):
                        super().training_step(model, inputs, num_items_in_batch)
        finally:
            self._again, self._only = False, None

    # -- the views of a micro-batch ----------------------------------------------------------------

    def balance_loss(self, model, inputs: dict[str, Any], main: Answers, answers: Tensor | float) -> Tensor | None:
        """What the method adds to a micro-batch's loss, if anything.

        Args:
            inputs: `branches`, `at`, `token` as the collator made them, and `labels` of the drawn view.
            answers: number of answers in the whole optimizer step.
        """
        views: dict[str, Seen] = {}
        if branches := inputs["branches"]:
            at, token = inputs["at"], inputs["token"]
            views["both"] = self.seen(main, inputs["labels"], at, token)
            learns = self.recipe.balance.views(self.state.global_step)
            for name, batch in branches.items():
                if learns[name] is not None:
                    views[name] = self.seen(self.look_at(model, batch, learns[name], True), batch["labels"], at, token)
        return self.balance.loss(views, answers)

    def seen(self, found: Answers, labels: Tensor, at: Tensor, token: Tensor) -> Seen:
        """A look at a batch as balance methods see it; see training.balance.views.see."""
        return see(found.distribution, labels[:, 1:][labels[:, 1:] != IGNORED], answer_numbers(labels), found.hidden, at, token)

    def branch_loss(self, model, inputs: dict[str, Any], total: Tensor | float) -> Tensor:
        """The supervised loss of one branch alone, of the whole optimizer step's weight `total`."""
        batch = inputs["branches"][self._only]
        found = self.look_at(model, batch, True, False)
        return weighted_nll(found.log_probs, batch["loss_weight"][:, 1:][batch["labels"][:, 1:] != IGNORED], total)

    # -- log and checkpoints -----------------------------------------------------------------------

    def balance_shown(self) -> dict[str, float]:
        return {} if self.balance is None else {f"balance/{name}": value for name, value in sorted(self.balance.shown.items())}

    def _save_checkpoint(self, model, trial) -> None:
        super()._save_checkpoint(model, trial)
        if self.args.should_save and self.balance is not None:
            folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            (folder / STATE).write_text(json.dumps(self.balance.state()), encoding="utf-8")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Here and not where weights are loaded, which for all weights and under DeepSpeed are loaded elsewhere."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self.balance is not None:
            self.balance.load(json.loads((Path(checkpoint) / STATE).read_text(encoding="utf-8")))


def _random_states(device: torch.device) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    return states | {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else states


def _set_random_states(states: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(states["cpu"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


@contextmanager
def _replayed(states: dict[str, Tensor], device: torch.device) -> Iterator[None]:
    """Random numbers as they were; afterwards as they are now."""
    now = _random_states(device)
    _set_random_states(states, device)
    try:
        yield
    finally:
        _set_random_states(now, device)
