"""What balance methods cost: the arithmetic by hand, recipes found by their content, and one small run. No time is tested."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from benchmarks import balance_cost
from benchmarks.balance_cost import WARMUP, Block, Clock, Entry, alternating, block_steps, find, ratios, summarise
from training.balance.settings import Cggm, Miles, Mnl, Msam, Probe
from training.config import RecipeError, load_recipe

WHAT = ("name", "method", "steps", "repeats")
MEASURED = ("step_s", "ratio", "ratio_low", "ratio_high")
VIEWS = {"both": 0.5, "vision": 0.5}


@pytest.fixture
def place(recipe_file, tmp_path):
    """A folder with plain.yaml; writes further recipes by name."""
    recipe_file(name="plain", views=VIEWS, steps=4)

    def write(name: str, **values) -> Path:
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump({"name": name, **values}), encoding="utf-8")
        return path

    return write


def entries_of(place, tmp_path) -> list[Entry]:
    """Plain, timed for 3 steps, and a method, timed for 2."""
    other = place("other", base="plain.yaml", balance={"method": "mnl"})
    return [Entry(path, load_recipe(path), steps) for path, steps in ((tmp_path / "plain.yaml", 3), (other, 2))]


def test_ratios_by_hand(place, tmp_path):
    """Clocks start anywhere; a method's 2 steps are compared with the first 2 of plain's 3."""
    plain, other = entries = entries_of(place, tmp_path)
    assert [entry.path for entry in alternating(entries, 2)] == [plain.path, other.path, plain.path, other.path, plain.path]
    blocks = [Block(plain.path, {0: 100.0, 2: 102.0, 3: 103.0}),    # 2 s for 2 steps, 3 s for 3
              Block(other.path, {0: 200.0, 2: 206.0}),              # 6 s: over the mean of 2 and 4 s
              Block(plain.path, {0: 300.0, 2: 304.0, 3: 305.0}),    # 4 s, 5 s
              Block(other.path, {0: 0.0, 2: 14.0}),                 # 14 s: over the mean of 4 and 6 s
              Block(plain.path, {0: 400.0, 2: 406.0, 3: 409.0})]    # 6 s, 9 s
    assert ratios(blocks, other, plain.path) == pytest.approx([6 / 3, 14 / 5])
    # Plain against plain: 3 s over 5 s, 5 s over the mean of 3 and 9 s, 9 s over 5 s.
    assert ratios(blocks, plain, plain.path) == pytest.approx([3 / 5, 5 / 6, 9 / 5])
    rows = summarise(blocks, entries)
    assert [[row[key] for key in WHAT] for row in rows] == [["plain", None, 3, 3], ["other", "mnl", 2, 2]]
    assert [rows[0][key] for key in MEASURED] == pytest.approx([5 / 3, 5 / 6, 3 / 5, 9 / 5])
    assert [rows[1][key] for key in MEASURED] == pytest.approx([5.0, 2.4, 2.0, 2.8])


@pytest.mark.parametrize("balance, steps, expected", (
    (None, 20, 20), (Mnl(), 7, 7), (Cggm(every=10), 20, 20), (Cggm(every=10), 21, 30), (Msam(every=20), 1, 20),
    (Miles(probe=Probe("x.yaml", every=24)), 20, 24), (Miles(probe=Probe("x.yaml", every=24)), 48, 48),
    # A probe measures in place of the batch, so `every` is not used.
    (Msam(measure="probe", every=20, probe=Probe("x.yaml", every=24)), 20, 24)))
def test_blocks_hold_whole_periods(balance, steps, expected):
    assert block_steps(balance, steps) == expected


def test_the_clock_starts_after_the_warm_up_and_stops_training(monkeypatch):
    clock, control, state = Clock([3, 2]), SimpleNamespace(should_training_stop=False), SimpleNamespace(global_step=0)
    clock.wait = False
    monkeypatch.setattr(balance_cost.time, "process_time", lambda: 10.0 * state.global_step)
    while not control.should_training_stop:
        state.global_step += 1
        clock.on_step_end(None, state, control)
    assert state.global_step == WARMUP + 3
    assert clock.stamps == {0: 10.0 * WARMUP, 2: 10.0 * (WARMUP + 2), 3: 10.0 * (WARMUP + 3)}


def test_recipes_are_found_by_content(place, recipe_file, tmp_path, capsys):
    place("z-method", base="plain.yaml", balance={"method": "ogm_ge", "every": 6})
    place("bare", base="plain.yaml", optim={"clip": 2.0})       # the base alone is enough
    place("elsewhere", base="z-plain.yaml", optim={"clip": 2.0})
    place("wider", base="plain.yaml", balance={"method": "mnl"}, batch=8)
    recipe_file(name="z-plain", views=VIEWS)
    alone = yaml.safe_load((tmp_path / "plain.yaml").read_text())
    place("alone", **{key: value for key, value in alone.items() if key != "name"}, balance={"method": "mnl"})
    found = find(tmp_path / "plain.yaml", sorted(tmp_path.glob("*.yaml")), 4)
    assert [(entry.recipe.name, entry.steps) for entry in found] == [("plain", 6), ("alone", 4), ("bare", 4), ("z-method", 6)]
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and "wider.yaml: left out, differs from" in said[0] and said[0].endswith("plain.yaml in batch")


def test_nothing_to_compare(place, tmp_path):
    with pytest.raises(RecipeError, match="no recipe to compare has plain.yaml as its base or a balance section"):
        find(tmp_path / "plain.yaml", [tmp_path / "plain.yaml"], 2)
    method = place("method", base="plain.yaml", balance={"method": "mnl"})
    with pytest.raises(RecipeError, match="method.yaml: balance: .* has a method itself"):
        find(method, [method], 2)


def test_a_small_run(place, tmp_path, capsys):
    factors = place("factors", base="plain.yaml", balance={"method": "random_factors", "of": "runs/no-such-run", "every": 2})
    warm = place("warm", base="plain.yaml", balance={"method": "mnl", "warmup_steps": 50})
    out = tmp_path / "new" / "cost.json"
    balance_cost.main(["--out", str(out), "--plain", str(tmp_path / "plain.yaml"), "--recipes", str(factors), str(warm),
                       "--steps", "2", "--repeats", "1"])
    found = json.loads(out.read_text(encoding="utf-8"))
    assert set(found) == {"commit", "dirty", "packages", "python", "device", "clock", "cores", "threads", "seed", "batch", "micro_batch",
                          "model", "model_sha256", "data_sha256", "recipes"}
    assert set(found["data_sha256"]) == {"plain-mixture.yaml", "train.jsonl"}
    assert [[row[key] for key in WHAT] for row in found["recipes"]] == [
        ["plain", None, 2, 3], ["factors", "random_factors", 2, 1], ["warm", "mnl", 2, 1]]
    for row in found["recipes"]:
        assert set(row) == {"recipe", "recipe_sha256", *WHAT, *MEASURED}
        assert 0 < row["ratio_low"] <= row["ratio"] <= row["ratio_high"] and row["step_s"] > 0
    assert str(tmp_path) not in out.read_text(), "what is committed names no machine"
    assert not (tmp_path / "runs").exists(), "no run folder is left behind"
    assert "random_factors" in capsys.readouterr().out


def test_errors_are_one_sentence(place, tmp_path, capsys):
    place("broken", base="plain.yaml", balance={"method": "mnl", "lamb": 1})
    words = ["--out", str(tmp_path / "cost.json"), "--plain", str(tmp_path / "plain.yaml")]
    with pytest.raises(SystemExit, match="error: .*lamb.*no such key; did you mean 'lam'"):
        balance_cost.main(words)
    with pytest.raises(SystemExit):
        balance_cost.main([*words, "--repeats", "0"])
    assert "--steps and --repeats must be at least 1" in capsys.readouterr().err
    assert not (tmp_path / "cost.json").exists()
