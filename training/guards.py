"""What watches over a run: a loss or gradient that is no number, and how wide the gap is on problems that are not trained on."""

import math
from pathlib import Path
from typing import Any

import torch

from data_prep.provenance import write_json
from training.config import Recipe, RecipeError
from training.probe import gap_of, gap_probe


class Guarded:
    """Mixed into a trainer, before TRL's class. Calls `set_up_guards` at the end of its __init__."""

    recipe: Recipe

    def set_up_guards(self) -> None:
        plan, encoder = self.data_collator.plan, self.data_collator.encoder
        self.watching = plan.gap_probe and gap_probe(plan.gap_probe, self.recipe.probe, self.recipe.micro_batch, encoder)
        self._losses: list[torch.Tensor] = []           # of the step's micro-batches on this rank
        self._step_batches: list[dict] = []
        self._skipped, self._in_a_row = 0, 0            # optimizer steps left out
        self._gap: dict[str, float] = {}                # what the last probe found

    def get_batch_samples(self, *args, **kwargs):
        samples, number = super().get_batch_samples(*args, **kwargs)
        self._step_batches, self._losses = samples, []
        if self.watching is not None and self.state.global_step % self.watching.every == 0:
            self._gap = {"step": self.state.global_step, **gap_of(self.watching.ask(self))}
        return samples, number

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self._losses.append(loss)
        return loss

    def _get_grad_norm(self, model, grad_norm=None):
        """Called once a step, when its gradients are whole and not used yet (but by DeepSpeed, which has made its step)."""
        norm = super()._get_grad_norm(model, grad_norm)
        # One wait for the device; the same on every rank, as gradients are, so that all stop or none.
        losses = torch.stack(self._losses).sum()
        bad = self.accelerator.reduce((~torch.isfinite(losses)).float(), reduction="sum")
        if math.isfinite(float(norm)) and not bad:
            self._in_a_row = 0
            return norm
        self._skipped, self._in_a_row = self._skipped + 1, self._in_a_row + 1
        file = self._write_down(float(norm))
        guard, step = self.recipe.guard, self.state.global_step + 1
        if guard.non_finite == "stop" or self._in_a_row > guard.skips:
            several = f", the {self._in_a_row}th in a row" if self._in_a_row > 1 else ""
            raise RecipeError(f"step {step}: loss or gradient is not finite{several}; its problems are in {file}. The last checkpoint "
                              "is intact: lower optim.lr or raise optim.warmup_steps, leave the problems out, or set guard.non_finite=skip")
        model.zero_grad()               # without gradients the optimizer leaves weights and moments as they are
        return norm

    def _write_down(self, norm: float) -> Path:
        """Which problems this rank had, and their losses."""
        plan = self.data_collator.plan
        draws = [[plan.draw(number) for number in batch["draws"]] for batch in self._step_batches]
        rank = self.args.process_index
        file = Path(self.recipe.run_dir) / ("non_finite.json" if self.args.world_size == 1 else f"non_finite-rank{rank}.json")
        batches = [{"loss": _number(loss), "problems": [{"draw": number, "ids": list(plan.ids(draw))}
                                                         for number, draw in zip(batch["draws"], part)]}
                   for loss, batch, part in zip(self._losses, self._step_batches, draws)]
        write_json(file, {"step": self.state.global_step + 1, "skipped_steps": self._skipped, "gradient_norm": _number(norm),
                          "micro_batches": batches})
        return file

    def guard_shown(self) -> dict[str, float]:
        shown = {f"probe/{name}": value for name, value in self._gap.items()}
        return shown | ({"skipped_steps": self._skipped} if self._skipped else {})


def _number(value: Any) -> float | str:
    """JSON knows no nan and no inf."""
    return float(value) if math.isfinite(float(value)) else str(float(value))
