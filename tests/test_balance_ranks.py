"""Balance methods on two ranks: what they measure and repeat is that of one."""

from pathlib import Path

import pytest
import torch

from training.config import load_recipe

from .running import metrics, run, run_in_two_processes, weights


def test_two_processes_train_as_one(recipe_file):
    """The same losses, measurements and, but for rounding, the same adapter. Shares are measured over both ranks, and passes
    are repeated under the launcher's wrapper, on one branch's own loss: that of the words has no picture on any rank."""
    section = {"method": "msam", "every": 2, "rho": 0.1, "scope": "view"}
    changes = dict(views={"both": 0.5, "vision": 0.5}, steps=3, batch=4, micro_batch=1, save={"every": 3}, balance=section)
    path = recipe_file(name="two", **changes)
    run_in_two_processes(path)
    two, one = Path(load_recipe(path).run_dir), run(recipe_file(name="one", **changes))
    assert len(metrics(two)) == 3
    shown = [key for key in metrics(one)[2] if key.startswith("balance/")]
    assert shown
    for mine, theirs in zip(metrics(two), metrics(one)):
        keys = [key for key in ("loss", "grad_norm", "token_accuracy", *shown) if key in theirs]
        assert [mine[key] for key in keys] == pytest.approx([theirs[key] for key in keys], rel=1e-3, abs=1e-4)
    mine, theirs = weights(two), weights(one)
    assert set(mine) == set(theirs)
    assert torch.cat([(mine[name] - theirs[name]).abs().flatten() for name in mine]).median() < 1e-6
