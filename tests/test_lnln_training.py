"""LNLN in training: what is corrupted and when, what the modules learn, and that evaluation finds them beside the adapter."""

import json
from itertools import combinations

import pytest
import torch
from safetensors.torch import load_file

from data_prep.answerer import Answerer
from data_prep.problem import View, read_problems, render
from modeling.adapters import read_extras

from .running import metrics, refusal, run, same, trainer_of, weights

SIDES = {"views": {"both": 0.5, "vision": 0.5}}
ALWAYS = {"chance": 1.0, "highest": 1.0}


def lnln(level: int, **more) -> dict:
    return {"balance": {"method": "lnln", "level": level, "rate": 1.0, "text": ALWAYS, "image": ALWAYS, **more}}


def batch_of(recipe, first: int = 0) -> dict:
    collator = trainer_of(recipe).data_collator
    return collator([{"draw": n} for n in range(first, first + 4)])


def test_words_and_cells_are_missing_and_nothing_else(recipe_file):
    whole, gone = batch_of(recipe_file(**SIDES)), batch_of(recipe_file(**SIDES, **lnln(0)))
    encoder = trainer_of(recipe_file(**SIDES)).data_collator.encoder
    lost = whole["input_ids"] != gone["input_ids"]
    assert lost.any() and (gone["input_ids"][lost] == encoder.missing_id).all()
    assert torch.equal(whole["labels"], gone["labels"]) and torch.equal(whole["attention_mask"], gone["attention_mask"])
    assert not (lost & (whole["labels"] != -100)).any()
    cells = (whole["pixel_values"] != gone["pixel_values"]).any(1).view(-1, 4)
    assert cells.any() and torch.equal(cells.any(1), cells.all(1)), "whole merged cells, and no parts of one"
    assert not gone["pixel_values"][cells.flatten()].any()
    assert set(gone["extras"]) == {"image", "text"} and all(0 <= rate <= 1 for rate in gone["extras"]["text"].tolist())


def test_masks_are_fresh_in_every_epoch_and_the_same_in_every_run(recipe_file):
    recipe = recipe_file(**SIDES, **lnln(0), steps=120)
    one, two = batch_of(recipe), batch_of(recipe)
    assert torch.equal(one["input_ids"], two["input_ids"]) and torch.equal(one["pixel_values"], two["pixel_values"])
    collator = trainer_of(recipe).data_collator
    draws = [collator.plan.draw(n) for n in range(len(collator.plan))]
    pairs = combinations(range(len(draws)), 2)
    again = next((a, b) for a, b in pairs if draws[a][:4] == draws[b][:4] and draws[a].epoch != draws[b].epoch)
    first, second = (collator([{"draw": n}]) for n in again)
    assert not torch.equal(first["input_ids"], second["input_ids"])


def test_a_chance_of_0_is_plain_training(recipe_file):
    never = {"chance": 0.0}
    one = run(recipe_file(name="plain", **SIDES))
    two = run(recipe_file(name="corrupted", **SIDES, balance={"method": "lnln", "level": 0, "text": never, "image": never}))
    assert same(weights(one), weights(two))


@pytest.mark.parametrize("level", [1, 2])
def test_levels_train_the_modules_and_evaluation_loads_them(recipe_file, twins, tiny, level):
    path = recipe_file(**SIDES, **lnln(level), steps=3, log_every=1)
    before = {name: value.clone() for name, value in trainer_of(path).model.get_base_model().mender.state_dict().items()}
    folder = run(path) / "adapter"
    after = load_file(folder / "mender.safetensors")
    assert set(after) == set(before)
    moved = {name.split(".")[0] for name in after if not torch.equal(after[name], before[name])}
    assert {"estimator", "text_in", "text_reconstruction", "image_reconstruction"} <= moved
    assert ("out" in moved) == ("discriminator" in moved) == (level == 2), "level 1 mends nothing, and nobody judges it"
    assert read_extras(folder)["mender"]["mends"] == (level == 2)
    rows = metrics(folder.parent)
    assert all(rows[-1][f"balance/loss_{name}"] > 0 for name in ("cc", "rec"))

    answerer = Answerer(str(tiny), str(folder))
    assert answerer.encoder.slots == 8 and same(answerer.model.get_base_model().mender.state_dict(), after)
    prompts = [render(problem, View.both) for problem in read_problems(twins / "test.jsonl")[:2]]
    scores = answerer.likelihoods(prompts)
    with torch.no_grad():
        answerer.model.get_base_model().mender.out.weight.add_(1.0)
    changed = answerer.likelihoods(prompts)
    assert (scores != changed) == (level == 2), "what is mended is read"


def test_completeness_is_learned(recipe_file):
    """w follows the share of words that are there: its loss falls below that of the best constant."""
    rows = metrics(run(recipe_file(**SIDES, **lnln(1), steps=60, batch=16, micro_batch=16, log_every=1)))
    early, late = (sum(row["balance/loss_cc"] for row in part) / 10 for part in (rows[:10], rows[-10:]))
    assert late < early and late < 1 / 12, "1/12 is the variance of the rate"


def test_resumed_exactly(recipe_file):
    section = {**SIDES, **lnln(2), "save": {"every": 2, "keep": 3}}
    straight = run(recipe_file(name="straight", steps=4, **section))
    path = recipe_file(name="resumed", steps=4, **section)
    broken = run(path)
    for name in ("checkpoint-4",):
        for file in sorted((broken / "checkpoints" / name).rglob("*"), reverse=True):
            file.unlink() if file.is_file() else file.rmdir()
        (broken / "checkpoints" / name).rmdir()
    info = json.loads((broken / "run.json").read_text())
    (broken / "run.json").write_text(json.dumps({**info, "finished": False}))
    run(path, "--resume")
    assert same(weights(straight), weights(broken))
    assert same(*(load_file(folder / "adapter" / "mender.safetensors") for folder in (straight, broken)))


def test_what_is_refused(recipe_file):
    assert "needs lora" in refusal(recipe_file(**SIDES, **lnln(2), lora=None))
    frozen = {"optim": {"lr": {"language": 0.0}}}
    assert "frozen" in refusal(recipe_file(**SIDES, **lnln(1), **frozen))
