"""What watches over a run: steps that are no numbers, items that are too long, memory that is short, and the gap on the way."""

import json
import math

import pytest
import torch
import yaml
from transformers import TrainerCallback

import train
from data_prep.problem import ProblemError
from training.callbacks import last_checkpoint
from training.config import RecipeError, load_recipe
from training.probe import gap_of

from .running import metrics, refusal, run, trainer_of

SECTION = dict(views={"both": 0.5, "vision": 0.5}, steps=5, batch=4, micro_batch=2, log_every=1, save={"every": 1, "keep": 9})


class Spoils(TrainerCallback):
    """Makes the gradients of some steps (counted from 1) infinite, and keeps the weights after each step."""

    def __init__(self, *steps: int) -> None:
        self.steps, self.weights = steps, []

    def on_train_begin(self, args, state, control, model=None, **kwargs) -> None:
        self.parameter = next(p for name, p in model.named_parameters() if p.requires_grad and "lora_B" in name)
        self.parameter.register_hook(lambda gradient: gradient * (math.inf if state.global_step + 1 in self.steps else 1))

    def on_step_end(self, args, state, control, model=None, **kwargs) -> None:
        self.weights.append([p.detach().clone() for p in model.parameters() if p.requires_grad])


def spoiled(path, *steps):
    trainer, spoils = trainer_of(path), Spoils(*steps)
    trainer.add_callback(spoils)
    return trainer, spoils


def moved(one, two) -> bool:
    return any(not torch.equal(a, b) for a, b in zip(one, two))


def test_a_step_that_is_no_number_stops_the_run_and_names_its_problems(recipe_file):
    path = recipe_file(**SECTION)
    trainer, _ = spoiled(path, 3)
    with pytest.raises(RecipeError, match="step 3: loss or gradient is not finite; its problems are in .*non_finite.json"):
        trainer.train()
    folder = load_recipe(path).run_dir
    found = json.loads(open(f"{folder}/non_finite.json").read())
    assert found["step"] == 3 and len(found["micro_batches"]) == 2
    plan = trainer.data_collator.plan
    ids = [problem["ids"] for part in found["micro_batches"] for problem in part["problems"]]
    assert ids == [list(plan.ids(plan.draw(number))) for number in range(8, 12)]
    assert all(part["loss"] > 0 for part in found["micro_batches"]), "the loss was a number; the gradient was none"


def test_a_skipped_step_changes_nothing_and_is_counted(recipe_file):
    trainer, spoils = spoiled(recipe_file(**SECTION, guard={"non_finite": "skip"}), 3)
    logged = []
    trainer.log = lambda logs, *args, **kwargs: logged.append({**logs, **trainer.guard_shown()})
    trainer.train()
    first, second, third, fourth, fifth = spoils.weights
    assert not moved(second, third) and moved(first, second) and moved(third, fourth) and moved(fourth, fifth)
    assert all(torch.isfinite(one).all() for one in fifth)
    assert ["skipped_steps" in row for row in logged[:5]] == [False, False, True, True, True]


def test_skipping_ends_when_it_does_not_end(recipe_file):
    trainer, _ = spoiled(recipe_file(**SECTION, guard={"non_finite": "skip", "skips": 2}), 2, 3, 4, 5)
    with pytest.raises(RecipeError, match="step 4: .* the 3th in a row"):
        trainer.train()


def test_train_says_it_in_one_sentence_and_keeps_the_checkpoint(recipe_file, monkeypatch):
    path = recipe_file(**SECTION)
    original = train.train

    def spoiling(*args, **kwargs):
        from training import build

        made = build.build_trainer

        def with_spoils(*a, **k):
            trainer = made(*a, **k)
            trainer.add_callback(Spoils(3))
            return trainer

        monkeypatch.setattr(build, "build_trainer", with_spoils)
        return original(*args, **kwargs)

    monkeypatch.setattr(train, "train", spoiling)
    assert "set guard.non_finite=skip" in refusal(path)
    from pathlib import Path

    assert last_checkpoint(Path(load_recipe(path).run_dir)).name == "checkpoint-2"


def test_an_item_that_is_too_long_is_named(recipe_file):
    trainer = trainer_of(recipe_file(**SECTION))
    collator = trainer.data_collator
    collator.encoder.longest = 20
    problem = collator.plan.ids(collator.plan.draw(0))[0]
    with pytest.raises(ProblemError, match=rf"{problem}: \d+ tokens together, and the model has positions for 20: lower"):
        collator([{"draw": 0}])


def test_out_of_memory_names_the_keys_that_help(recipe_file, monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(train, "train", full)
    said = refusal(recipe_file(**SECTION))
    assert all(key in said for key in ("micro_batch", "model.checkpointing", "model.max_pixels"))


def test_gap_by_hand():
    found = gap_of({view: {"right": value} for view, value in (("both", 0.9), ("vision", 0.5), ("text", 0.8), ("blind", 0.3))})
    assert [found[key] for key in ("gap", "text_gap", "image_gain")] == pytest.approx([0.4, 0.3, 0.2])


def probe_of(twins, tmp_path, views) -> dict:
    file = tmp_path / "probe.yaml"
    file.write_text(yaml.safe_dump({"sources": {"twins": {"problems": str(twins / "test.jsonl"), "views": views}}}))
    return {"mixture": str(file), "items": 6, "every": 2}


def test_the_gap_is_logged_on_the_way(recipe_file, twins, tmp_path):
    section = {**SECTION, "steps": 4}
    plain = run(recipe_file(name="plain", **section))
    probed = run(recipe_file(name="probed", **section, probe=probe_of(twins, tmp_path, {"both": 1.0})))
    rows = metrics(probed)
    assert [row["probe/step"] for row in rows] == [0, 0, 2, 2]
    for row in rows:
        assert row["probe/gap"] == pytest.approx(row["probe/both"] - row["probe/vision"])
        assert all(0 <= row[f"probe/{view}"] <= 1 for view in ("both", "vision", "text", "blind"))
    assert [row["loss"] for row in rows] == [row["loss"] for row in metrics(plain)], "asking changes nothing"
    assert "data" in json.loads((probed / "run.json").read_text())
    assert any(name.endswith("test.jsonl") for name in json.loads((probed / "run.json").read_text())["data"])


def test_a_probe_needs_all_four_views(recipe_file, twins, tmp_path):
    said = refusal(recipe_file(**SECTION, probe=probe_of(twins, tmp_path, {"vision": 1.0})))
    assert "the mixture draws the view vision; it must draw both" in said
