"""Quantised language towers: what is quantised and what is not, that training goes the same way, and what is refused."""

import json

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

from training.config import load_recipe
from training.estimate import memory_gb
from training.model import count_parameters, empty_base, load_base, prepare, tower_of

from .running import metrics, refusal, run, same, trainer_of, weights

SECTION = dict(views={"both": 0.5, "vision": 0.5}, steps=4, batch=4, micro_batch=2, log_every=1)
KINDS = {"nf4": bnb.nn.Linear4bit, "int8": bnb.nn.Linear8bitLt}


def quantised(kind: str | None, **more) -> dict:
    return {**SECTION, "model": {"quantize": kind}, **more}


@pytest.mark.parametrize("kind", KINDS)
def test_the_language_towers_layers_are_quantised_and_nothing_else(recipe_file, kind):
    base = load_base(load_recipe(recipe_file(**quantised(kind))).model)
    for name, module in base.named_modules():
        if isinstance(module, nn.Linear):
            inside = tower_of(name) == "language" and name != "lm_head"
            assert isinstance(module, KINDS[kind]) == inside, name
    if kind == "nf4":
        state = base.model.language_model.layers[0].mlp.up_proj.weight.quant_state
        assert state.quant_type == "nf4" and state.nested, "double quantisation"


@pytest.mark.parametrize("kind", KINDS)
def test_training_goes_as_that_of_the_whole_model(recipe_file, kind):
    plain, small = (metrics(run(recipe_file(name=name, **quantised(one)))) for name, one in (("plain", None), ("small", kind)))
    assert [row["loss"] for row in small] == pytest.approx([row["loss"] for row in plain], rel=0.1)
    assert [row["loss"] for row in small] != [row["loss"] for row in plain]
    trainer = trainer_of(recipe_file(**quantised(kind)))
    trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    assert {parameter.dtype for parameter in trained} == {torch.float32}, "an adapter in bfloat16 loses its updates"


def test_counts_are_those_of_the_whole_model(recipe_file):
    counts = [count_parameters(trainer_of(recipe_file(**quantised(kind))).model) for kind in (None, "nf4", "int8")]
    assert counts[0] == counts[1] == counts[2]


def test_small_moments(recipe_file):
    big = {"rank": 64}          # tensors below 4,096 numbers keep whole moments
    trainer = trainer_of(recipe_file(**quantised("nf4", lora={tower: big for tower in ("vision", "merger", "language")},
                                                 optim={"name": "adamw_8bit"})))
    trainer.train()
    states = [state for state in trainer._bare_optimizer().state.values()]
    assert {state["state1"].dtype for state in states} >= {torch.uint8}


def test_resumed_exactly(recipe_file):
    section = quantised("nf4", save={"every": 2, "keep": 3}, optim={"name": "adamw_8bit"})
    straight = run(recipe_file(name="straight", **section))
    path = recipe_file(name="resumed", **section)
    broken = run(path)
    (broken / "checkpoints" / "checkpoint-4" / "complete").unlink()
    (broken / "run.json").write_text(json.dumps({**json.loads((broken / "run.json").read_text()), "finished": False}))
    run(path, "--resume")
    assert same(weights(straight), weights(broken))


def test_memory_by_hand(recipe_file):
    """The language tower's linear weights take 4.127 bits in place of 32, and Adam's moments 2 bytes in place of 8."""
    found = {}
    for kind, name in ((None, "adamw"), ("nf4", "adamw_8bit")):
        recipe = load_recipe(recipe_file(**quantised(kind, optim={"name": name})))
        model = prepare(empty_base(recipe.model), recipe)
        found[kind] = memory_gb(model, recipe, 10, 10, 2), model
    linear = sum(module.weight.numel() for name, module in found[None][1].named_modules()
                 if type(module) is nn.Linear and "language_model.layers" in name and "base_layer" in name)
    trained = sum(numbers["trained"] for numbers in count_parameters(found[None][1]).values())
    whole, small = found[None][0], found["nf4"][0]
    assert (whole["weights"] - small["weights"]) * 2**30 == pytest.approx(linear * (4 - 4.127 / 8), rel=1e-6)
    key = "trained weights, gradients, Adam"
    assert (whole[key] - small[key]) * 2**30 == pytest.approx(trained * 6)


def test_what_is_refused(recipe_file):
    assert "a quantised weight cannot be trained" in refusal(recipe_file(**quantised("nf4", lora=None)))
    by_token = {"by_token": True}
    assert "not made for quantised layers" in refusal(recipe_file(**quantised("int8", lora=by_token)))
    assert "nf4" in refusal(recipe_file(**quantised("fp4")))
