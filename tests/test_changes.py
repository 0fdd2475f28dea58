"""Continuing a run as another recipe or on other data, when that is asked for: what is recorded, what follows from it, what is refused."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from data_prep.provenance import file_sha256
from training import callbacks, collate
from training.changes import differences, fixed
from training.config import RecipeError, load_recipe
from training.export import main as export
from training.plan import Plan
from training.run import RunFolder

from .running import metrics, refusal, run, same, weights
from .test_resume import interrupted

ASKED = "--resume", "--allow-changes"
SIX = dict(steps=6, batch=2, micro_batch=1, save={"every": 2}, optim={"schedule": "linear"})


def test_another_learning_rate(recipe_file, monkeypatch, tmp_path):
    """The new rates and their schedule hold from the checkpoint on, which brings its own, and moments go on: the step before which
    nothing but the rate was changed has the loss of the straight run. Then it is made longer, after its end."""
    straight = run(recipe_file(name="straight", **SIX))
    path = recipe_file(name="cut", **SIX)
    interrupted(path, monkeypatch, 5)
    path = recipe_file(name="cut", **{**SIX, "steps": 8, "optim": {"schedule": "linear", "weight_decay": 0.1, "lr": {"merger": 5e-4}}})
    message = refusal(path, "--resume")
    assert "optim.lr.merger (0.001 then, 0.0005 now)" in message and message.endswith("add --allow-changes")
    run_dir = run(path, *ASKED)
    rows = metrics(run_dir)
    assert [row["step"] for row in rows] == list(range(1, 9))
    ends = [6, 6, 6, 6, 8, 8, 8, 8]         # of the schedule
    assert [row["lr_vision"] for row in rows] == pytest.approx([1e-3 * (1 - n / end) for n, end in enumerate(ends)])
    assert [row["lr_merger"] for row in rows[4:]] == pytest.approx([5e-4 * (1 - n / 8) for n in range(4, 8)])
    assert [row["loss"] for row in rows[:5]] == [row["loss"] for row in metrics(straight)[:5]]
    state = torch.load(run_dir / "checkpoints" / "checkpoint-8" / "optimizer.pt", weights_only=True)
    assert {float(moments["step"]) for moments in state["state"].values()} == {8.0}
    assert [group["weight_decay"] for group in state["param_groups"]] == [0.1, 0.1, 0.1]
    changes = {"optim.lr.merger": {"old": 1e-3, "new": 5e-4}, "optim.weight_decay": {"old": 0.0, "new": 0.1}, "steps": {"old": 6, "new": 8}}
    info = json.loads((run_dir / "run.json").read_text())
    assert info["changed"] == [{"step": 4, "recipe": changes, "data": {}}] and info["finished"] is True
    assert yaml.safe_load((run_dir / "recipe.yaml").read_text()) == load_recipe(path).to_dict()
    before = weights(run_dir)

    assert same(weights(run(path, *ASKED)), before), "a finished run that nothing changes"
    assert "is at step 8, and the changed recipe has 8 steps" in refusal(path, "optim.clip=0.5", *ASKED)
    run(path, "steps=9", *ASKED)
    assert [row["step"] for row in metrics(run_dir)] == list(range(1, 10)) and not same(weights(run_dir), before)
    info = json.loads((run_dir / "run.json").read_text())
    assert [one["step"] for one in info["changed"]] == [4, 8] and info["steps"] == 9

    export([str(run_dir), "--out", str(tmp_path / "exported")])
    card = (tmp_path / "exported" / "README.md").read_text()
    assert "Changed after step 4: `optim.lr.merger` from `0.001` to `0.0005`; " in card
    assert "Changed after step 8: `steps` from `8` to `9`." in card


def test_another_mixture(recipe_file, monkeypatch, tmp_path):
    """The order of the new recipe, from the checkpoint's step on."""
    path = recipe_file(name="cut", **SIX)
    old = file_sha256(tmp_path / "cut-mixture.yaml")
    interrupted(path, monkeypatch, 5)
    recipe_file(name="cut", **SIX, views={"text": 1.0})
    message = refusal(path, "--resume")
    assert "the data changed since the run began" in message and "cut-mixture.yaml" in message and message.endswith("add --allow-changes")
    drawn = []
    original = collate.Collator.__call__
    monkeypatch.setattr(collate.Collator, "__call__", lambda self, rows: (drawn.extend(
        (row["draw"], self.plan.draw(row["draw"]).view.value) for row in rows), original(self, rows))[1])
    run_dir = run(path, *ASKED)
    assert drawn == [(number, "text") for number in range(8, 12)]
    info = json.loads((run_dir / "run.json").read_text())
    (name,) = info["changed"][0]["data"]
    new = file_sha256(tmp_path / "cut-mixture.yaml")
    assert info["changed"] == [{"step": 4, "recipe": {}, "data": {name: {"old": old, "new": new}}}] and name.endswith("cut-mixture.yaml")
    assert info["data"][name] == new
    last = run_dir / "checkpoints" / "checkpoint-6"
    assert json.loads((last / "plan.json").read_text()) == json.loads(json.dumps(Plan(load_recipe(path)).state(6)))
    assert [row["step"] for row in metrics(run_dir)] == list(range(1, 7))
    export([str(run_dir), "--out", str(tmp_path / "exported")])
    card = " ".join((tmp_path / "exported" / "README.md").read_text().split())
    assert f"cut-mixture.yaml` from SHA-256 `{old}` to SHA-256 `{new}`." in card and "What was trained on before has licences too" in card


def test_what_no_checkpoint_can_be_continued_as(recipe_file, monkeypatch):
    """Said before anything is loaded, and the folder stays as it is. Before the first checkpoint everything may change."""
    path = recipe_file(steps=4, save={"every": 2})
    interrupted(path, monkeypatch, 3)
    run_dir = Path(load_recipe(path).run_dir)
    before = {file: file.read_bytes() for file in run_dir.rglob("*") if file.is_file()}
    with monkeypatch.context() as patch:
        patch.setattr("training.model.load_base", lambda *_: pytest.fail("the model was loaded"))
        message = refusal(path, "lora.language.rank=8", *ASKED)
    assert "cannot be continued so, whatever is allowed: lora.language: rank and alpha belong" in message and "rank 4 then, 8 now" in message
    assert {file: file.read_bytes() for file in run_dir.rglob("*") if file.is_file()} == before
    for folder in callbacks.checkpoints(run_dir / "checkpoints"):
        (folder / callbacks.COMPLETE).unlink()
    run(path, "lora.language.rank=8", *ASKED)
    assert json.loads((run_dir / "run.json").read_text())["changed"][0]["step"] == 0


def test_the_flag_goes_with_resume(recipe_file):
    path = recipe_file()
    assert "--allow-changes: goes together with --resume" in refusal(path, "--allow-changes")
    assert not Path(load_recipe(path).run_dir).exists()


@pytest.mark.parametrize("changes, said", (
    ({"model": {"name": "other"}}, "model.name: the weights were learned on another base"), ({"model": {"quantize": "nf4"}}, "model.quantize"),
    ({"model": {"adapter": "elsewhere"}}, "model.adapter"), ({"lora": None}, "lora: a LoRA was trained"),
    ({"optim": {"lr": {"vision": 0.0}}}, "vision, merger, language was trained, and now merger, language"),
    ({"lora": {"vision": {"rank": 4, "alpha": 4.0}}}, "lora.vision: rank and alpha"), ({"lora": {"by_token": True}}, "lora.by_token"),
    ({"optim": {"name": "adamw_8bit"}}, "optim.name: the moments of adamw"), ({"preference": {}}, "preference: "),
    ({"balance": {"method": "lnln", "level": 1}}, "balance: the modules"), ({"balance": {"method": "mnl"}}, "balance.method: "),
    ({"lora": {"vision": {"rank": 4, "alpha": 8.0}, "dropout": 0.1}, "balance": {"method": "mnl", "strength": 0.0}, "batch": 8, "seed": 3,
      "model": {"max_pixels": 3136}, "loss": {"weigh": "rows"}}, None)), ids=str)
def test_changes_of_every_kind(recipe_file, changes, said):
    reason = fixed(load_recipe(recipe_file()), load_recipe(recipe_file(**changes)))
    assert reason is None if said is None else said in reason, reason


def test_differences_by_hand():
    old, new = {"a": 1, "b": {"c": [1], "d": 2}, "e": None}, {"a": 1, "b": {"c": [1, 2], "f": 3}}
    assert differences(old, new) == {"b.c": {"old": [1], "new": [1, 2]}, "b.d": {"old": 2, "new": None}, "b.f": {"old": None, "new": 3}}


def test_a_change_that_was_recorded_before_the_process_was_killed_is_recorded_once(recipe_file):
    recipe = load_recipe(recipe_file())
    RunFolder(recipe, resume=False).start({"data.jsonl": "ab"})
    for _ in range(2):      # killed behind run.json, and before recipe.yaml
        folder = RunFolder(load_recipe(recipe_file(log_every=3)), resume=True, allow_changes=True)
        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr("training.run.replacing", lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
            folder.start({"data.jsonl": "ab"})
    assert folder.info["changed"] == [{"step": 0, "recipe": {"log_every": {"old": 1, "new": 3}}, "data": {}}]
    with pytest.raises(RecipeError, match=r"log_every \(1 then, 3 now\)"):
        RunFolder(load_recipe(recipe_file(log_every=3)), resume=True)
