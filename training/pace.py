"""The pace of training: the factor on every tower's learning rate, over the stages of a recipe."""

from bisect import bisect_right
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
