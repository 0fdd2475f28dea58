"""The pace of training: the factor on every tower's learning rate, over the stages of a recipe."""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from training.config import Recipe


def segments(recipe: Recipe) -> list[tuple[int, int]]:
    """(first step, end) of each run of the schedule: the whole training, cut where a stage restarts it."""
    starts = [start for start, stage in zip(recipe.stage_starts, recipe.stages) if stage.schedule == "restart" and start]
    return list(pairwise([0, *starts, recipe.steps]))


def scheduler(recipe: Recipe, optimizer: torch.optim.Optimizer) -> LambdaLR:
    """The recipe's schedule (of transformers.get_scheduler) on each segment; the step alone decides the factor, so that a resumed
    run goes on where it was."""
    parts = segments(recipe)
    factors = []
    for start, end in parts:
        stand_in = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        factors.append(get_scheduler(recipe.optim.schedule, stand_in, num_warmup_steps=recipe.optim.warmup_steps,
                                     num_training_steps=end - start).lr_lambdas[0])
    starts = [start for start, _ in parts]

    def factor(step: int) -> float:
        number = bisect_right(starts, step) - 1
        return factors[number](step - starts[number])

    return LambdaLR(optimizer, factor)


def set_rates(optimizer: torch.optim.Optimizer, pace: LambdaLR, groups: list[dict], betas: Sequence[float]) -> None:
    """After a checkpoint was loaded, which brings its own: rates, weight decay and betas as the recipe has them now, at the step that
    the schedule is at. Where nothing was changed they are the same bits.

    groups: as training.model.parameter_groups gives them, one for each of the optimizer.
    """
    pace.base_lrs = [group["lr"] for group in groups]
    for group, fresh, factor in zip(optimizer.param_groups, groups, pace.lr_lambdas, strict=True):
        group |= {"initial_lr": fresh["lr"], "lr": fresh["lr"] * factor(pace.last_epoch), "weight_decay": fresh["weight_decay"],
                  "betas": tuple(betas)}
    pace._last_lr = [group["lr"] for group in optimizer.param_groups]
