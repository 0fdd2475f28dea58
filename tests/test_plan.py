"""Stages: whose turn it is, what is carried over, and that a plan can be continued."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml

from training.config import RecipeError, load_recipe
from training.mixture import Mixture
from training.pace import scheduler, segments
from training.plan import PLAN_FILE, Plan

from .running import metrics, refusal, run, same, trainer_of, weights
from .test_resume import interrupted

STAGES = [
    {"share": 0.5},
    {"share": 0.25, "mixture": "vision.yaml", "loss": {"cross_modal_kl": {"coef": 1.0, "answers": "all"}}, "optimizer": "restart"},
    {"share": 0.25, "mixture": "vision.yaml", "optimizer": "restart", "schedule": "restart"},
]


@pytest.fixture
def staged(recipe_file, twins, tmp_path):
    """A recipe of three stages: both, vision with a divergence, vision."""

    def write(**changes) -> Path:
        source = {"problems": str(twins / "train.jsonl"), "turns": 2, "views": {"vision": 1.0}}
        (tmp_path / "vision.yaml").write_text(yaml.safe_dump({"sources": {"twins": source}}), encoding="utf-8")
        values = {"views": {"both": 1.0}, "turns": 2, "steps": 8, "batch": 4, "micro_batch": 2, "stages": STAGES} | changes
        return recipe_file(**values)

    return write


def test_stages_follow_each_other(staged):
    plan = Plan(load_recipe(staged()))
    draws = [plan.draw(n) for n in range(len(plan))]
    assert [draw.stage for draw in draws] == [0] * 16 + [1] * 8 + [2] * 8
    assert [draw.view.value for draw in draws] == ["both"] * 16 + ["vision"] * 16
    assert [(stage.start, stage.end) for stage in plan.stages] == [(0, 4), (4, 6), (6, 8)]
    assert [plan.stage_at(step).number for step in range(8)] == [0] * 4 + [1] * 2 + [2] * 2
    # Later stages go through the problems in an order of their own, and not through the same ones again.
    orders = [[draw.problems for draw in draws[a:b]] for a, b in ((0, 8), (16, 24), (24, 32))]
    assert len({str(order) for order in orders}) == 3


def test_the_first_stage_is_drawn_as_if_it_were_alone(staged):
    recipe = load_recipe(staged())
    alone = Mixture(recipe.data.mixture, seed=recipe.seed, draws=16)
    plan = Plan(recipe)
    assert [plan.draw(n)._replace(stage=0) for n in range(16)] == [alone.draw(n) for n in range(16)]


@pytest.mark.parametrize("shares, steps, starts", (([0.5, 0.5], 5, [0, 2, 5]), ([1 / 3] * 3, 10, [0, 3, 7, 10]),
                                                   ([0.4, 0.2, 0.4], 180, [0, 72, 108, 180])))
def test_stage_starts(staged, shares, steps, starts):
    recipe = load_recipe(staged(steps=steps, stages=[{"share": share} for share in shares]))
    assert recipe.stage_starts == starts


@pytest.mark.parametrize(
    "change, said",
    (
        ({"stages": [{"share": 0.5}, {"share": 0.4}]}, "the shares of the stages sum to 0.9; they must sum to 1"),
        ({"steps": 1}, "steps=1 are too few for 3 stages"),
        ({"stages": [{"share": 1.0, "mixture": "nowhere.yaml"}]}, "stages.0.mixture: no such file: nowhere.yaml"),
        ({"stages": [{"share": 1.0, "mixtur": "a.yaml"}]}, "stages.0.mixtur: no such key; did you mean 'mixture'?"),
        ({"stages": [{"share": 1.0, "optimizer": "new"}]}, "stages.0.optimizer: "),
        ({"stages": [{"share": 1.0, "schedule": "restart"}]}, "the first stage begins with a fresh optimizer and schedule anyway"),
        ({"loss": {"cross_modal_kl": {"estimator": "full", "clamp": 10.0}}}, "a clamp belongs to the estimator k3, not to full"),
    ),
)
def test_wrong_stages(staged, change, said):
    with pytest.raises(RecipeError) as caught:
        load_recipe(staged(**change))
    assert said in str(caught.value)


def test_one_stage_can_be_overridden(staged):
    path = staged()
    recipe = load_recipe(path, ["stages.1.loss.cross_modal_kl.coef=0.25", "stages.0.share=0.5"])
    assert recipe.stages[1].loss.cross_modal_kl.coef == 0.25 and recipe.stages[1].loss.cross_modal_kl.answers == "all"
    assert recipe.stages[2] == load_recipe(path).stages[2]
    with pytest.raises(RecipeError, match="override stages.3.share=1: the recipe has no such entry in its list"):
        load_recipe(path, ["stages.3.share=1"])


# -- the schedule ----------------------------------------------------------------------------------


def factors(recipe) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    found = scheduler(recipe, optimizer)
    values = []
    for _ in range(recipe.steps):
        values.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        found.step()
    return values


def test_the_schedule_is_carried_or_restarted(staged):
    """Linear over 6 steps and over 2: the second stage carries on, the third begins again. With one step of warm-up each."""
    recipe = load_recipe(staged(optim={"schedule": "linear", "warmup_steps": 1}))
    assert segments(recipe) == [(0, 6), (6, 8)]
    assert factors(recipe) == pytest.approx([0, 1, 0.8, 0.6, 0.4, 0.2, 0, 1])
    whole = load_recipe(staged(optim={"schedule": "linear", "warmup_steps": 1}, stages=[]))
    assert factors(whole) == pytest.approx([0] + [1 - n / 7 for n in range(7)])


def test_the_optimizer_is_restarted_where_a_stage_says(staged):
    """Adam's step counters: 8 where moments are carried over, 2 and 4 where the last restart was that long ago."""
    for stages, age in ((STAGES, 2), ([*STAGES[:2], {"share": 0.25}], 4), ([{"share": 0.5}, {"share": 0.5}], 8)):
        trainer = trainer_of(staged(stages=stages))
        from training.callbacks import RestartOptimizer

        trainer.add_callback(RestartOptimizer(trainer.recipe))
        trainer.train()
        optimizer = trainer.optimizer
        while getattr(optimizer, "optimizer", None) is not None:
            optimizer = optimizer.optimizer
        assert {int(state["step"]) for state in optimizer.state.values()} == {age}


# -- running and continuing ------------------------------------------------------------------------


def test_a_staged_run_logs_what_each_stage_measures(staged):
    rows = metrics(run(staged()))
    assert ["cross_modal_kl" in row for row in rows] == [False] * 4 + [True] * 2 + [False] * 2


@pytest.mark.parametrize("cut", (4, 5, 7))
def test_resuming_between_and_within_stages(staged, monkeypatch, cut):
    changes = dict(save={"every": 1}, lora={"dropout": 0.1}, optim={"schedule": "cosine", "warmup_steps": 1})
    straight = run(staged(name="straight", **changes))
    path = staged(name="cut", **changes)
    interrupted(path, monkeypatch, cut + 1)
    run(path, "--resume")
    assert same(weights(straight), weights(Path(load_recipe(path).run_dir)))


def test_the_plan_is_saved_and_checked(staged):
    run_dir = run(staged(save={"every": 5}))
    folder = run_dir / "checkpoints" / "checkpoint-5"
    saved = json.loads((folder / PLAN_FILE).read_text(encoding="utf-8"))
    plan = Plan(load_recipe(run_dir / "recipe.yaml"))
    drawn = Counter((draw.stage, draw.view.value) for draw in (plan.draw(n) for n in range(20)))
    assert {(part["stage"], part["view"]): part["drawn"] for part in saved["parts"]} == {**drawn, (2, "vision"): 0}
    assert saved["draws"] == 20 and set(saved["data"]) == set(plan.hashes)
    plan.check(folder, 5)
    other = Plan(load_recipe(run_dir / "recipe.yaml", ["seed=7", "run_dir=elsewhere"]))
    with pytest.raises(RecipeError, match=r"plan.json: the order of the data is not the one the run began with; it differs in seed, last"):
        other.check(folder, 5)
    (folder / PLAN_FILE).unlink()
    with pytest.raises(RecipeError, match="cannot be read, so the order of the data cannot be continued"):
        plan.check(folder, 5)


def test_a_loss_that_the_mixture_does_not_allow_is_refused_before_training(staged):
    stages = [{"share": 1.0, "loss": {"consistency": {}}}]
    assert "draws the view text, for which there is no other side" in refusal(staged(views={"text": 1.0}, stages=stages))
